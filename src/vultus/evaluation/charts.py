"""Line charts and histograms as SVG, drawn for reading: few lines, the text in the colour of the page around them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MOST_POINTS = 300  # of one line; more are averaged
COLOURS = 8

# Colours hold on a light and on a dark ground; a page that shows charts includes this once.
STYLE = """
.s0{--c:#2464ad}.s1{--c:#c2491d}.s2{--c:#1f8553}.s3{--c:#7b4bb3}.s4{--c:#9a6d00}.s5{--c:#107a85}.s6{--c:#b53c7c}
.s7{--c:#666}
@media (prefers-color-scheme:dark){.s0{--c:#7fb4f0}.s1{--c:#f58e62}.s2{--c:#63c795}.s3{--c:#bb98e8}.s4{--c:#e3b84f}
.s5{--c:#5ccbd3}.s6{--c:#f08fc0}.s7{--c:#aaa}}
.chart text{fill:currentColor;font:11px system-ui,sans-serif}
.chart .rule{stroke:currentColor;stroke-opacity:.14}.chart .base{stroke:currentColor;stroke-opacity:.55}
.chart .line{stroke:var(--c);fill:none;stroke-width:1.8;stroke-linejoin:round}.chart .dash{stroke-dasharray:5 3}
.chart .dot{fill:var(--c)}.chart .area{fill:var(--c);fill-opacity:.28}
.chart .mark{stroke:currentColor;stroke-dasharray:2 3;stroke-opacity:.8}
""".strip()
ALONE = "svg{color:#1b1b1b}@media (prefers-color-scheme:dark){svg{color:#ececec}}"


@dataclass(frozen=True)
class Line:
    """A named line. `colour` counts from 0."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    dots: bool = False


def compact(value: float) -> str:
    """12800 as 12.8k; for the labels of axes."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def line_chart(title: str, lines: Sequence[Line], *, x_label: str = "images seen") -> str:
    """An SVG of lines over a common axis; empty text if there is nothing to draw."""
    drawn = [(line, _thinned(line.points)) for line in lines if line.points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = sorted(y for _, points in drawn for _, y in points)
    # One wild value must not press the rest into a line: the axis ends where all but 1 % of the values lie.
    cut = len(ys) // 200
    low, high = ys[cut], ys[-1 - cut]
    y_ticks = _ticks(low, high, 4)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    pad = (high - low) * 0.04
    x_ticks = [tick for tick in _ticks(min(xs), max(xs), 4) if min(xs) <= tick <= max(xs)]
    frame = _Frame(min(xs), max(xs), low - pad, high + pad)
    parts = [frame.axes(x_ticks, y_ticks, x_label)]
    for line, points in drawn:
        kind = f"s{line.colour % COLOURS} line{' dash' if line.dashed or line.colour >= COLOURS else ''}"
        path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
        last = f"{escape(line.label)}: {points[0][1]:.4g} to {points[-1][1]:.4g}"
        parts.append(f'<path class="{kind}" d="M{path}"><title>{last}</title></path>')
        if line.dots or len(points) == 1:
            dots = "".join(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.4"/>' for x, y in points)
            parts.append(f'<g class="s{line.colour % COLOURS} dot">{dots}</g>')
    told = "; ".join(f"{line.label} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for line, points in drawn)
    return _svg(f"{title}: {told}", parts)


def histogram(
    title: str,
    edges: Sequence[float],
    filled: Mapping[str, tuple[int, Sequence[float]]],
    outlined: Mapping[str, tuple[int, Sequence[float]]],
    *,
    x_label: str,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Densities {label: (colour, heights)} over common edges, some filled and some as outlines, and marked places."""
    parts: list[str] = []
    everything = [*filled.items(), *outlined.items()]
    high = max((height for _, (_, heights) in everything for height in heights), default=0.0)
    if not high > 0 or len(edges) < 2:
        return ""
    frame = _Frame(edges[0], edges[-1], 0.0, high * 1.05)
    ticks = [tick for tick in _ticks(edges[0], edges[-1], 5) if edges[0] <= tick <= edges[-1]]
    parts.append(frame.axes(ticks, [], x_label))
    for label, (colour, heights) in everything:
        steps = [f"{frame.x(edges[0]):.1f} {frame.y(0):.1f}"]
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            steps += [f"{frame.x(left):.1f} {frame.y(height):.1f}", f"{frame.x(right):.1f} {frame.y(height):.1f}"]
        steps.append(f"{frame.x(edges[-1]):.1f} {frame.y(0):.1f}")
        kind = "area" if label in filled else "line"
        parts.append(f'<path class="s{colour} {kind}" d="M{"L".join(steps)}"><title>{escape(label)}</title></path>')
    for row, (label, place) in enumerate((marks or {}).items()):
        x = frame.x(place)
        ends = f'text-anchor="end" x="{x - 3:.1f}"' if x > WIDTH * 0.6 else f'x="{x + 3:.1f}"'
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text {ends} y="{TOP + 10 + 13 * row}">{escape(label)}</text>')
    return _svg(title, parts)


def alone(svg: str) -> str:
    """The same SVG as a file of its own."""
    return svg.replace(">", f"><style>{STYLE}\n{ALONE}</style>", 1) + "\n" if svg else ""


class _Frame:
    """From values to places in the picture."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.width = left, (right - left) or 1.0
        self.low, self.height = low, (high - low) or 1.0

    def x(self, value: float) -> float:
        return LEFT + min(max((value - self.left) / self.width, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - min(max((value - self.low) / self.height, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
        bottom = HEIGHT - BOTTOM
        parts = [f'<path class="base" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>']
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{compact(tick)}</text>')
        for tick in x_ticks:
            x = self.x(tick)
            anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<path class="base" d="M{x:.1f} {bottom}v3"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{compact(tick)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    # A width for readers of the file alone; a page sets its own.
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH * 2}"'
    return f'{head} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: means over stretches of equal count, the ends as they are."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS - 2))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    spread = high - low
    if spread <= max(abs(low), abs(high)) * 1e-9:
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread / 2, high + spread / 2
    rough = spread / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]

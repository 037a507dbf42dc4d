"""Plots as matplotlib figures, for a file, a notebook or a page. matplotlib is the optional extra `plot`.

Every function that makes a figure raises ImportError without matplotlib. `curves`, `distributions` and `intervals` are
for PNG files and notebooks. `line_chart` and `histogram` are small panels for a page: `to_svg` writes their text and
axes in the colour of the page, and the colours of the series hold on a light and on a dark background.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vultus.evaluation import registry
from vultus.evaluation.headlines import headlines_of, of_other_data
from vultus.evaluation.tables import Results, group_of

COLOURS = {
    "same person": "#2a9d5c",
    "different people": "#8a8a8a",
    "generated, type I": "#d1495b",
    "generated, type II": "#3a6ea5",
    "real unseen faces": "#2a9d5c",
    "generated": "#d1495b",
}
LEGEND = {
    "same person": "two photos of one person",
    "different people": "photos of two people",
    "generated, type I": "generated face, source photo (type I)",
    "generated, type II": "generated face, other photo (type II)",
    "real unseen faces": "photos of unseen people",
    "generated": "generated faces",
}
# Of the series of a chart. Each has a contrast of 3 or more on white and on a dark page (#121212).
PALETTE = ("#3b82c4", "#d2562a", "#2a9461", "#8e63c7", "#a97f10", "#178a95", "#c74f8b", "#808080")
STYLE = "".join(f".s{number}{{--c:{colour}}}" for number, colour in enumerate(PALETTE))  # for the legend of a page
STANDALONE = "svg{color:#1b1b1b}@media (prefers-color-scheme:dark){svg{color:#ececec}}"
MAX_POINTS = 300  # of one line; more are averaged
PAGE = "#010203"  # the colour of text and axes, drawn where `to_svg` writes currentColor
_SIZE = (5.0, 3.05)  # inches of a panel; in an SVG 360 x 220 points


def curves(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Adversarial losses, and the MSE in training and on unseen people, over images seen.

    `lines` are those of a run's stats.jsonl.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line for line in lines if "evaluator" not in line]
    for name, label in (("D_adversarial", "discriminator"), ("G_adversarial", "generator")):
        logged = [line for line in steps if name in line]
        left.plot([line["cur_nimg"] for line in logged], [line[name] for line in logged], label=label)
    left.set(xlabel="images seen", ylabel="adversarial loss")
    logged = [line for line in steps if "G_mse" in line]
    right.plot([line["cur_nimg"] for line in logged], [line["G_mse"] for line in logged], label="in training")
    unseen = [line for line in lines if line.get("evaluator") == "unseen"]
    right.plot([line["cur_nimg"] for line in unseen], [line["mse"] for line in unseen], "o-", label="unseen people")
    right.set(xlabel="images seen", ylabel="MSE, values in [-1, 1]")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def distributions(results: Results, kinds: Sequence[str]) -> Any:
    """Histograms of `kinds` of scores (keys of `distributions`): a row for each kind, a panel for each result."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results) + 0.6, 2.7 * len(kinds) + 0.5), layout="constrained")
    panels = figure.subplots(len(kinds), len(results), squeeze=False, sharex="row", sharey="row")
    for row, kind in enumerate(kinds):
        for panel, (name, result) in zip(panels[row], results.items(), strict=True):
            shown = result["distributions"].get(kind)
            if shown is None:
                panel.set_axis_off()
                continue
            for label, density in shown.items():
                if label not in COLOURS:
                    continue
                real = not label.startswith("generated")
                panel.stairs(
                    density, shown["edges"], label=label, color=COLOURS[label], fill=real, alpha=0.35 if real else 1
                )
            for number, (far, threshold) in enumerate(shown.get("thresholds", {}).items()):
                panel.axvline(threshold, color="#444444", linewidth=0.8, linestyle="--")
                # One below the other: the thresholds are near together.
                place = {"transform": panel.get_xaxis_transform(), "va": "top", "fontsize": 7}
                panel.text(threshold, 0.99 - 0.07 * number, f" FAR {far}", **place)
            title = name if row == 0 else ""
            if kind == "nearest" and of_other_data(result):
                title += "\nphotos of this data set, on which the snapshot was NOT trained"
            panel.set_title(title.strip(), fontsize=10)
            panel.set(yticks=[], ylabel="density" if panel is panels[row][0] else None)
            panel.set_xlabel("cosine to the nearest training photo" if kind == "nearest" else f"score by {kind}")
            for side in ("left", "top", "right"):
                panel.spines[side].set_visible(False)
    handles, labels = next(panel for panel in panels.flat if panel.axison).get_legend_handles_labels()
    words = [LEGEND.get(label, label) for label in labels]
    columns = min(len(labels), 2 * len(results))  # side by side they would be wider than a figure of one panel
    figure.legend(handles, words, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def intervals(results: Results, rows: Sequence[str] = (), *, columns: int = 4) -> Any:
    """Metrics with their 95 % intervals: a panel for each of `rows`, a point for each result; dashed: real photos.

    Without `rows` it shows the headlines of the registry.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for result in results.values() for name in result["metrics"]))
    shown = {metric.name for result in results.values() for metric in headlines_of(result)}
    usual = [metric.name for metric in registry.headlines(names) if metric.name in shown]
    rows = [name for name in rows or usual if name in names]
    columns = min(columns, max(1, len(rows)))
    height = -(-max(1, len(rows)) // columns)
    size = (2.9 * columns, (1.0 + 0.28 * len(results)) * height)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flat
    for panel, name in zip(panels, [*rows, *[None] * (height * columns - len(rows))], strict=True):
        if name is None:
            panel.set_axis_off()
            continue
        estimates = {title: result["metrics"][name] for title, result in results.items() if name in result["metrics"]}
        for place, row in enumerate(estimates.values()):
            if row.get("low") is not None:
                panel.plot([row["low"], row["high"]], [place, place], color="#3a6ea5", linewidth=2)
            panel.plot([row["value"]], [place], "o", color="#3a6ea5", markersize=5)
        real = next((row["real"] for row in estimates.values() if row.get("real") is not None), None)
        if real is not None:
            panel.axvline(real, color="#2a9d5c", linewidth=1, linestyle="--")
        panel.set(yticks=range(len(estimates)), yticklabels=list(estimates), ylim=(len(estimates) - 0.4, -0.6))
        panel.set_title(f"{name} {group_of(name)[1]}", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["left", "top", "right"]].set_visible(False)
    return figure


# --- small panels for a page ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A series of (x, y) points. `colour` counts from 0; from 8 on colours repeat, and lines are dashed."""

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


def line_chart(title: str, lines: Sequence[Line], *, x_label: str = "images seen") -> Any:
    """A figure of lines over a common axis, or None if there is nothing to draw.

    Values that are not finite are left out. The y axis ends where all but 1 % of the values lie: one extreme value
    must not flatten the rest.
    """
    drawn = [(line, points) for line in lines if (points := _thinned(_finite(line.points)))]
    if not drawn:
        return None
    ends = "; ".join(f"{line.label} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for line, points in drawn)
    figure, axes = _panel(f"{title}: {ends}", x_label)
    for line, points in drawn:
        axes.plot(
            *zip(*points, strict=True),
            color=PALETTE[line.colour % len(PALETTE)],
            linestyle=(0, (4, 2)) if line.dashed or line.colour >= len(PALETTE) else "-",
            marker="o" if line.dots or len(points) == 1 else None,
            markersize=3.5,
            linewidth=1.5,
        )
    ys = sorted(y for _, points in drawn for _, y in points)
    cut = len(ys) // 200
    low, high = ys[cut], ys[-1 - cut]
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.grid(axis="y", color=PAGE, alpha=0.14, linewidth=0.8)
    return figure


def histogram(
    title: str,
    edges: Sequence[float],
    filled: Mapping[str, tuple[int, Sequence[float]]],
    outlined: Mapping[str, tuple[int, Sequence[float]]],
    *,
    x_label: str,
    marks: Mapping[str, float] | None = None,
) -> Any:
    """A figure of densities, or None if there is nothing to draw.

    Args:
        title: what it shows, for readers who do not see it.
        edges: of the bins, common to all densities.
        filled: {label: (colour, heights)} of the densities drawn as areas.
        outlined: the same for those drawn as lines.
        x_label: under the axis.
        marks: {label: x} of vertical lines, such as thresholds.
    """
    parts = [(label, *part, label in filled) for label, part in [*filled.items(), *outlined.items()]]
    if len(edges) < 2 or not any(height > 0 for _, _, heights, _ in parts for height in heights):
        return None
    figure, axes = _panel(title, x_label)
    for _, colour, heights, area in parts:
        shown = PALETTE[colour % len(PALETTE)]
        axes.stairs(heights, edges, color=shown, fill=area, alpha=0.4 if area else 1, linewidth=0 if area else 1.5)
    axes.set(xlim=(edges[0], edges[-1]), yticks=[])
    axes.set_ylim(bottom=0)
    right = max((marks or {}).values(), default=edges[0]) > edges[0] + 0.6 * (edges[-1] - edges[0])
    for row, (label, place) in enumerate((marks or {}).items()):
        axes.axvline(place, color=PAGE, alpha=0.8, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.annotate(
            label,
            (place, 0.98 - 0.08 * row),  # one below the other: thresholds are near together
            xycoords=("data", "axes fraction"),
            xytext=(-4 if right else 4, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=9,
            color=PAGE,
        )
    return figure


def to_svg(figure: Any, *, standalone: bool = False) -> str:
    """A figure of `line_chart` or `histogram` as an SVG element for a page; "" for None.

    The same figure gives the same text: no date, no random id. The background is transparent, text stays text, and text
    and axes have the colour of the text around the element (currentColor). `standalone` adds a style sheet for a file
    of its own, which follows the colour scheme of the reader.
    """
    if figure is None:
        return ""
    import matplotlib

    title = figure.get_label()
    buffer = io.StringIO()
    # Ids of one page must differ between its charts, so they depend on the title.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"\s*<(metadata|style)[ >].*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace(PAGE, "currentColor").replace("'DejaVu Sans'", "system-ui")
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)  # two decimals are enough
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").strip()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    # A width for a file of its own; a page sets another. matplotlib's own style sheet would hold for the whole page.
    shape = f'{view[0]} width="720" style="stroke-linejoin:round;stroke-linecap:butt"'
    head = f'<svg {names} class="chart" {shape} role="img" aria-label="{escape(title)}">'
    return head + (f"<style>{STANDALONE}</style>" if standalone else "") + text[text.index(">") + 1 :]


def _panel(title: str, x_label: str) -> tuple[Any, Any]:
    """A figure with one pair of axes in the colour of the page; `title` is its label, which is not drawn."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained", label=title)
    axes = figure.subplots()
    axes.set_xlabel(x_label, color=PAGE, fontsize=10)
    axes.tick_params(color=PAGE, labelcolor=PAGE, labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set(color=PAGE, alpha=0.55)
    for axis, count in ((axes.xaxis, 5), (axes.yaxis, 4)):
        axis.set_major_locator(MaxNLocator(count, steps=(1, 2, 2.5, 5, 10)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    return figure, axes


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS: means over stretches of equal count, the ends as they are."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS - 2))
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]
    return [points[0], *means, points[-1]]

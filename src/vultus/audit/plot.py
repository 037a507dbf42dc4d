"""The trade-off of an audit as a plot: what is left for verification, against the success of the attack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vultus.audit.tables import FAR, marked_name
from vultus.evaluation.plots import PAGE, PALETTE, to_svg

PANEL = (7.6, 4.6)  # inches
FONT = 9.0  # points
MARKERS = "os^D"  # after the colours have been used once, the next marker
_LETTER, _LINE = 0.6, 1.25  # size of a letter, in font sizes; generous, as the page has another font

Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


def trade_off(result: Mapping[str, Any], *, standalone: bool = False) -> str:
    """An SVG element with a panel for each encoder, "" without matplotlib.

    Right is the success of the attack (type II at FAR 1e-3), up the TAR of templates at FAR 1e-3; bars are the 95 %
    intervals over people. Dashed is what real photos reach in place of the faces. `standalone`: for a file of its own.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    names = list(next(iter(result["protections"].values()))["success"])
    title = "TAR of templates against success of the attack, for each protection"
    width, height = PANEL[0], PANEL[1] * len(names)
    figure = Figure(figsize=(width, height), dpi=72, label=title)
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    # Fixed margins: labels are placed in points, before anything is drawn.
    left, below, above = 0.62, 0.55, 0.35
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.12 / width,
        bottom=below / height,
        top=1 - above / height,
        hspace=(below + above) / (PANEL[1] - below - above),
    )
    for axes, name in zip(panels, names, strict=True):
        _panel(axes, name, result)
    return to_svg(figure, standalone=standalone)


def _panel(axes: Any, encoder: str, result: Mapping[str, Any]) -> None:
    attacked = encoder == next(iter(next(iter(result["protections"].values()))["success"]))
    role = "the attacked encoder" if attacked else "another encoder"
    axes.set_title(f"Faces compared by {marked_name(encoder, result)}, {role}", color=PAGE, fontsize=10, loc="left")
    axes.set_xlabel("success of the attack, type II, % (left is safer)", color=PAGE, fontsize=10)
    axes.set_ylabel("TAR of templates, % (up is better)", color=PAGE, fontsize=10)
    axes.tick_params(color=PAGE, labelcolor=PAGE, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=PAGE, alpha=0.55)
    axes.grid(color=PAGE, alpha=0.12, linewidth=0.8)
    axes.set(xlim=(-3, 103), ylim=(-3, 105))  # with other limits small differences look large
    axes.set_axisbelow(True)
    shown = {
        title: (row["success"][encoder][f"type2@{FAR}"], row["tar"])
        for title, row in result["protections"].items()
        if row["success"][encoder][f"type2@{FAR}"] and row["tar"]
    }
    points, bars = [], []
    real = result["real"].get(encoder, {}).get(f"type2@{FAR}")
    if real:
        place = 100 * real["value"]
        axes.axvline(place, color=PAGE, alpha=0.6, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.text(place - 0.8, 1, "real photos", color=PAGE, fontsize=FONT, ha="right", va="bottom")
        middle, top = axes.transData.transform((place, 105))
        bars.append((middle - 3, 0.0, middle + 3, top))
    for number, (x, y) in enumerate(shown.values()):
        colour, marker = _style(number)
        for (low, high), other in (((x["low"], x["high"]), y), ((y["low"], y["high"]), x)):
            across = other is y
            xs = (low, high) if across else (other["value"], other["value"])
            ys = (other["value"], other["value"]) if across else (low, high)
            ends = [axes.transData.transform((100 * a, 100 * b)) for a, b in zip(xs, ys, strict=True)]
            bars.append((ends[0][0] - 1, ends[0][1] - 1, ends[1][0] + 1, ends[1][1] + 1))
            axes.plot([100 * a for a in xs], [100 * b for b in ys], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(100 * x["value"], 100 * y["value"], marker, color=colour, markersize=6)
        points.append(tuple(axes.transData.transform((100 * x["value"], 100 * y["value"]))))
    area = axes.get_window_extent()
    places = place_labels(list(shown), points, bars, (area.x0, area.y0, area.x1, area.y1))
    for number, (title, point, place) in enumerate(zip(shown, points, places, strict=True)):
        offset = (place[0] - point[0], place[1] - point[1])
        beside = max(0.0, abs(offset[0]) - len(title) * FONT * _LETTER / 2)
        far_off = math.hypot(beside, max(0.0, abs(offset[1]) - FONT * _LINE / 2)) > FONT  # then a line leads to it
        axes.annotate(
            title,
            axes.transData.inverted().transform(point),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=FONT,
            color=_style(number)[0],
            arrowprops={"arrowstyle": "-", "color": _style(number)[0], "alpha": 0.5, "linewidth": 0.7}
            if far_off
            else None,
        )


def _style(number: int) -> tuple[str, str]:
    return PALETTE[number % len(PALETTE)], MARKERS[number // len(PALETTE) % len(MARKERS)]


def place_labels(
    labels: Sequence[str], points: Sequence[tuple[float, float]], bars: Sequence[Box], area: Box
) -> list[tuple[float, float]]:
    """Centres of labels near their points, in points: no label on another one or outside `area` where that can be.

    One after another takes the place that covers the least of the earlier labels, points and bars, near its own point.
    """
    taken: list[Box] = []
    spots = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    found = []
    for label, (x, y) in zip(labels, points, strict=True):
        width, height = len(label) * FONT * _LETTER, FONT * _LINE
        best, cost = (x, y), math.inf
        for distance, step in itertools.product((7, 14, 24, 36, 50, 66, 84, 104), range(16)):
            across, up = math.cos(math.tau * step / 16), math.sin(math.tau * step / 16)
            centre = (x + across * (distance + width / 2), y + up * (distance + height / 2))
            box = (centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2)
            outside = 1 - _shared(box, area) / (width * height)
            price = 1e4 * outside + 100 * sum(_shared(box, other) for other in taken) + 2 * distance
            price += 20 * sum(_shared(box, other) for other in spots) + 2 * sum(_shared(box, bar) for bar in bars)
            if price < cost:
                best, cost, chosen = centre, price, box
        taken.append(chosen)
        found.append(best)
    return found


def _shared(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

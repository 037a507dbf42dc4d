"""Plots as matplotlib figures, for a file or a notebook. Every function raises ImportError without matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vultus.evaluation.tables import group_of

COLOURS = {
    "same person": "#2a9d5c",
    "different people": "#8a8a8a",
    "generated, type I": "#d1495b",
    "generated, type II": "#3a6ea5",
    "real unseen faces": "#2a9d5c",
    "generated": "#d1495b",
}
# Beginnings of the rows that `intervals` shows, unless it is told others.
SHOWN = (
    *("identity_", "type2_", "rank1_", "fid_", "fd_", "coverage_", "lpips", "stlpips"),
    *("diversity_noise_", "copied_"),
)

Results = Mapping[str, Mapping[str, Any]]  # {name: evaluate(...)}


def curves(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Losses, and the error on unseen people, over images seen; `lines` are those of a run's stats.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line for line in lines if "evaluator" not in line]
    for name, label in (("D_adversarial", "discriminator"), ("G_adversarial", "generator")):
        found = [line for line in steps if name in line]
        left.plot([line["cur_nimg"] for line in found], [line[name] for line in found], label=label)
    left.set(xlabel="images seen", ylabel="adversarial loss")
    found = [line for line in steps if "G_mse" in line]
    right.plot([line["cur_nimg"] for line in found], [line["G_mse"] for line in found], label="in training")
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
            found = result["distributions"].get(kind)
            if found is None:
                panel.set_axis_off()
                continue
            for label, density in found.items():
                if label not in COLOURS:
                    continue
                real = not label.startswith("generated")
                panel.stairs(
                    density, found["edges"], label=label, color=COLOURS[label], fill=real, alpha=0.35 if real else 1
                )
            for number, (far, threshold) in enumerate(found.get("thresholds", {}).items()):
                panel.axvline(threshold, color="#444444", linewidth=0.8, linestyle="--")
                # One below the other: the thresholds are near together.
                place = {"transform": panel.get_xaxis_transform(), "va": "top", "fontsize": 7}
                panel.text(threshold, 0.99 - 0.07 * number, f" FAR {far}", **place)
            panel.set(title=name if row == 0 else None, yticks=[])
            panel.set_xlabel("cosine to the nearest training photo" if kind == "nearest" else f"score by {kind}")
            for side in ("left", "top", "right"):
                panel.spines[side].set_visible(False)
    handles, labels = next(panel for panel in panels.flat if panel.axison).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def intervals(results: Results, rows: Sequence[str] = (), *, columns: int = 4) -> Any:
    """Figures with their 95 % intervals: a panel for each of `rows`, a point for each result; dashed: real photos.

    Without `rows` it shows those whose names begin as SHOWN says.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for result in results.values() for name in result["metrics"]))
    rows = [name for name in rows or (n for start in SHOWN for n in names if n.startswith(start)) if name in names]
    columns = min(columns, max(1, len(rows)))
    height = -(-max(1, len(rows)) // columns)
    size = (2.9 * columns, (1.0 + 0.28 * len(results)) * height)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flat
    for panel, name in zip(panels, [*rows, *[None] * (height * columns - len(rows))], strict=True):
        if name is None:
            panel.set_axis_off()
            continue
        found = {title: result["metrics"][name] for title, result in results.items() if name in result["metrics"]}
        for place, row in enumerate(found.values()):
            panel.plot([row["low"], row["high"]], [place, place], color="#3a6ea5", linewidth=2)
            panel.plot([row["value"]], [place], "o", color="#3a6ea5", markersize=5)
        real = next((row["real"] for row in found.values() if "real" in row), None)
        if real is not None:
            panel.axvline(real, color="#2a9d5c", linewidth=1, linestyle="--")
        panel.set(yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.4, -0.6))
        panel.set_title(f"{name} {group_of(name)[1]}", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["left", "top", "right"]].set_visible(False)
    return figure


# --- charts of a report -----------------------------------------------------------------------------------------------

PALETTE = ("#3b82d0", "#d9622b", "#2f9e63", "#9467d0", "#b0840f", "#1a98a6", "#d05590", "#8a8a8a")  # light and dark
MOST_POINTS = 300  # of one line; more are averaged
_TEXT = "#010203"  # stands for the colour of the page's text, see to_svg


@dataclass(frozen=True)
class Line:
    """A named line of (x, y) points. `colour` counts from 0."""

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
    """A Figure of lines over a common axis, or None if there is nothing to show."""
    shown = [(line, _thinned(line.points)) for line in lines if line.points]
    if not shown:
        return None
    figure, axes = _figure()
    for line, points in shown:
        axes.plot(
            *zip(*points, strict=True),
            color=PALETTE[line.colour % len(PALETTE)],
            linestyle="--" if line.dashed else "-",
            marker="o" if line.dots or len(points) == 1 else "",
            markersize=3.5,
            linewidth=1.5,
            label=line.label,
        )
    ys = sorted(y for _, points in shown for _, y in points)
    cut = len(ys) // 200  # the axis ends where all but 1 % of the values lie
    low, high = ys[cut], ys[-1 - cut]
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    axes.set_ylim(low - pad, high + pad)
    axes.set_xlabel(x_label)
    axes.grid(axis="y", alpha=0.2, color=_TEXT)
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    axes.locator_params(nbins=5)
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
    """A Figure of densities {label: (colour, heights)}, or None if there is nothing to show."""
    everything = [*filled.values(), *outlined.values()]
    high = max((height for _, heights in everything for height in heights), default=0.0)
    if not high > 0 or len(edges) < 2:
        return None
    figure, axes = _figure()
    for label, (colour, heights) in filled.items():
        axes.stairs(heights, edges, fill=True, alpha=0.35, color=PALETTE[colour], label=label)
    for label, (colour, heights) in outlined.items():
        axes.stairs(heights, edges, color=PALETTE[colour], linewidth=1.5, label=label)
    for row, (label, place) in enumerate((marks or {}).items()):
        axes.axvline(place, color=_TEXT, linewidth=0.8, linestyle=":")
        axes.text(place, 0.97 - 0.08 * row, f" {label}", transform=axes.get_xaxis_transform(), va="top", color=_TEXT)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, high * 1.05), yticks=[], xlabel=x_label)
    axes.spines["left"].set_visible(False)
    return figure


def to_svg(figure: Any) -> str:
    """A figure as an SVG element: transparent, its text in the colour of the page around it."""
    import io

    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vultus"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_TEXT, "currentColor").strip()


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_TEXT)
    axes.tick_params(colors=_TEXT, labelsize=8)
    axes.xaxis.label.set(color=_TEXT, size=9)
    return figure, axes


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return list(points)
    size = -(-len(points) // (MOST_POINTS - 2))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]

"""Plots as matplotlib figures, for a file or a notebook. Every function raises ImportError without matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

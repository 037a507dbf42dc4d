"""Plots: what they show, read back from the figure."""

from __future__ import annotations

import io
from typing import Any

import pytest

from vultus.evaluation.plots import curves, distributions, intervals

pytest.importorskip("matplotlib", reason="needs the extra `plot`")


def result(value: float, **more: Any) -> dict[str, Any]:
    row = {"value": value, "low": value - 0.1, "high": value + 0.1}
    rows = {"mse": row, "identity_facenet": row | {"real": 0.7}} | more
    return {"metrics": rows, "distributions": {"dlib": {"edges": [0, 1, 2], "generated": [0.5, 0.5]}}}


def drawn(figure: Any) -> list[Any]:
    """The panels in use, after the figure was really drawn."""
    figure.savefig(io.BytesIO(), format="png")
    return [panel for panel in figure.axes if panel.axison]


def test_intervals_of_every_snapshot_and_real_photos() -> None:
    panels = drawn(intervals({"a": result(0.3), "b": result(0.5)}))
    assert [panel.get_title() for panel in panels] == ["identity_facenet ↑"]
    lines = [list(line.get_xdata()) for line in panels[0].lines]
    assert lines == [pytest.approx([0.2, 0.4]), [0.3], pytest.approx([0.4, 0.6]), [0.5], [0.7, 0.7]]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["a", "b"]


def test_intervals_of_chosen_rows_where_one_lacks_it() -> None:
    results = {"a": result(0.3, only={"value": 1.0, "low": 0.0, "high": 2.0}), "b": result(0.5)}
    panels = drawn(intervals(results, ["mse", "only", "unknown"], columns=2))
    assert [panel.get_title() for panel in panels] == ["mse ↓", "only "]
    assert [label.get_text() for label in panels[1].get_yticklabels()] == ["a"]
    assert not drawn(intervals({"a": result(0.3)}, ["unknown"]))


def test_curves_and_distributions() -> None:
    lines: list[dict[str, Any]] = [
        {"cur_nimg": 0, "evaluator": "unseen", "mse": 0.5},
        {"cur_nimg": 8, "D_adversarial": 1.0, "G_adversarial": 2.0, "G_mse": 0.4},
        {"cur_nimg": 16, "D_adversarial": 1.5, "G_adversarial": 2.5, "G_mse": 0.3},
        {"cur_nimg": 16, "evaluator": "unseen", "mse": 0.35},
    ]
    left, right = drawn(curves(lines))
    assert [list(line.get_ydata()) for line in left.lines] == [[1.0, 1.5], [2.0, 2.5]]
    assert [list(line.get_ydata()) for line in right.lines] == [[0.4, 0.3], [0.5, 0.35]]
    panels = drawn(distributions({"a": result(0.3), "b": result(0.4) | {"distributions": {}}}, ["dlib"]))
    assert [panel.get_title() for panel in panels] == ["a"]

"""Plots: what they show, read back from the figure."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from vultus.evaluation.plots import Line, compact, curves, distributions, histogram, intervals, line_chart, to_svg

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


# --- panels for a page ------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_lines_of_several_runs() -> None:
    points = [(0, 0.0), (10_000, 1.0), (20_000, 0.5)]
    figure = line_chart("MSE", [Line("a", points, 0), Line("b", points, 1, dashed=True, dots=True), Line("c", [])])
    [panel] = drawn(figure)
    assert [list(line.get_ydata()) for line in panel.lines] == [[0.0, 1.0, 0.5]] * 2
    assert [line.get_linestyle() for line in panel.lines] == ["-", "--"]
    assert [line.get_marker() for line in panel.lines] == ["None", "o"]
    assert len({line.get_color() for line in panel.lines}) == 2
    assert {"0", "10k", "20k", "images seen", "0.5"} <= set(texts(to_svg(figure)))


@pytest.mark.parametrize(
    "points",
    [[(5, 1.0)], [(0, 2.0), (9, 2.0)], [(0, 0.0), (9, 0.0)], [(0, -1e-12), (1, 1e300)], [(0, 1.0), (1, float("nan"))]],
)
def test_lines_that_are_hard_to_scale(points: list[tuple[float, float]]) -> None:
    assert "nan" not in to_svg(line_chart("t", [Line("a", points)]))


def test_a_long_line_is_averaged_and_an_extreme_value_does_not_flatten_it() -> None:
    points = [(float(n), 1.0 + (n % 2) * 0.1) for n in range(20_000)]
    points[500] = (500.0, 1e9)
    [panel] = drawn(line_chart("t", [Line("a", points)]))
    assert len(panel.lines[0].get_xdata()) <= 300
    assert panel.get_ylim()[1] < 3


def test_histograms_mark_thresholds() -> None:
    real, generated = {"real": (2, [1.0, 3.0])}, {"generated": (1, [2.0, 2.0])}
    figure = histogram("t", [0, 1, 2], real, generated, x_label="score", marks={"FAR 1e-2": 1.5})
    [panel] = drawn(figure)
    assert [patch.get_fill() for patch in panel.patches] == [True, False]
    assert [list(line.get_xdata()) for line in panel.lines] == [[1.5, 1.5]]
    assert {"FAR 1e-2", "score"} <= set(texts(to_svg(figure)))


def test_nothing_to_draw() -> None:
    assert line_chart("t", [Line("a", [])]) is None
    assert histogram("t", [0, 1], {"real": (2, [0.0])}, {}, x_label="x") is None
    assert to_svg(None) == ""


def test_an_svg_for_a_page() -> None:
    def svg(title: str = "a <b> & c", **keywords: Any) -> str:
        return to_svg(line_chart(title, [Line('"x"', [(0, 0.00123), (1, 0.5)], dots=True)]), **keywords)

    text = svg()
    assert text == svg()  # deterministic
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'a <b> & c: "x" from 0.00123 to 0.5'
    assert "currentColor" in text
    assert not re.search("#0{6}|#010203|#f{6}|<style|<metadata", text)  # no colour or style of a fixed page
    ids = [set(re.findall(r'id="([^"]+)"', one)) for one in (text, svg("another"))]
    assert ids[0]
    assert not ids[0] & ids[1]  # two charts of a page do not share an id
    references = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert references
    assert set(references) <= ids[0]
    assert "prefers-color-scheme:dark" in svg(standalone=True)


def test_numbers_of_an_axis() -> None:
    assert [compact(value) for value in (0.5, 12_800, 3_000_000)] == ["0.5", "12.8k", "3M"]

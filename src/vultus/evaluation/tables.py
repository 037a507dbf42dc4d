"""Results of evaluations as one table, a column for each: its values, and the same as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vultus.evaluation import registry
from vultus.evaluation.headlines import of_other_data, partiality

CONTEXT = ("cur_nimg", "split", "n_images", "n_people", "noises", "seed", "resolution", "device", "seconds")
USUAL = {"noise_strength": 1.0, "best_of": 1}  # context that is a row only where a result differs from it
REAL = "real photos"
OTHER = " (other data)"  # follows values of memorization that were not measured on the data of the training
UNKNOWN = "other"  # the group of metrics that the registry does not know

Results = Mapping[str, Mapping[str, Any]]  # {name: evaluate(...)}


@dataclass(frozen=True)
class Cell:
    """A value of one result. `text` is the formatted value, "-" for None; `interval` its 95 % interval, or ""."""

    value: float | str | None
    text: str
    low: float | None = None
    high: float | None = None
    interval: str = ""

    def __str__(self) -> str:
        """Value and interval."""
        return f"{self.text} {self.interval}".rstrip()


@dataclass(frozen=True)
class Row:
    """A metric, an entry of the context, or the heading of a group (which has no cells).

    `real` is what real photos reach, formatted, "" where unknown; `arrow` says which values are better.
    """

    kind: Literal["group", "metric", "context"]
    name: str
    arrow: str = ""
    real: str = ""
    cells: Sequence[Cell] = ()


@dataclass(frozen=True)
class Table:
    """Rows of several results; `columns` are the names of the results, a cell of each row for each."""

    columns: list[str]
    rows: list[Row]


def build_table(results: Results, *, circumstances: bool = True) -> Table:
    """The table of several snapshots' results. Without `circumstances` it ends with the metrics.

    Metrics whose names differ (another number of images, another split) are never one row.
    """
    rows: list[Row] = []
    names = dict.fromkeys(name for result in results.values() for name in result["metrics"])
    for name in sorted(names, key=registry.order):
        group, arrow = group_of(name)
        if group != next((row.name for row in reversed(rows) if row.kind == "group"), None):
            rows.append(Row("group", group))
        estimates = [result["metrics"].get(name) for result in results.values()]
        real = next((one["real"] for one in estimates if one and one.get("real") is not None), None)
        digits = _decimals(name, estimates, real)
        text = "" if real is None else f"{real:.{digits}f}"
        cells = [_cell(estimate, digits) for estimate in estimates]
        if group == registry.MEMORIZATION:
            shown = zip(cells, results.values(), strict=True)
            cells = [replace(cell, text=cell.text + OTHER) if of_other_data(one) else cell for cell, one in shown]
        both = zip(cells, results.values(), strict=True)
        cells = [c if c.value is None else replace(c, text=c.text + partiality(name, r)) for c, r in both]
        rows.append(Row("metric", name, arrow, text, cells))
    if circumstances:
        rows += _context_rows([result["context"] for result in results.values()])
    return Table(list(results), rows)


def format_table(results: Results, *, intervals: bool = True, circumstances: bool = True) -> str:
    """`build_table` as Markdown, with `circumstances` between alarms, and notes and what was not measured.

    A cell is the value with its 95 % interval, or with `intervals` False the value alone. The column of real photos
    is what a perfect generator would reach. Alarms come before the table.
    """
    lines = _aligned(table_lines(results, intervals=intervals, circumstances=circumstances))
    if not circumstances:
        return "\n".join(lines)
    alarms = _list(results, "alarms", "Alarms")
    return "\n".join([*alarms, *([""] if alarms else []), *lines, *_remarks(results)])


def table_lines(results: Results, *, intervals: bool = True, circumstances: bool = True) -> list[list[str]]:
    """The formatted cells of `build_table`, its head first; the heading of a group is `**group**` and empty cells."""
    table = build_table(results, circumstances=circumstances)
    lines = [["", "", REAL, *table.columns]]
    for row in table.rows:
        if row.kind == "group":
            lines.append([f"**{row.name}**", *[""] * (len(table.columns) + 2)])
        else:
            cells = [str(cell) if intervals else cell.text for cell in row.cells]
            lines.append([row.name, row.arrow, row.real, *cells])
    return lines


def format_gap(gaps: Results) -> str:
    """Training people minus unseen people, {name: gap(...)}, as a Markdown table of the metrics that all have."""
    names = [name for name in next(iter(gaps.values())) if all(name in gap for gap in gaps.values())]
    lines = [["train - test", *gaps]]
    for name in names:
        estimates = [gap[name] for gap in gaps.values()]
        digits = _decimals(name, estimates, None)
        lines.append([name, *(str(_cell(estimate, digits)) for estimate in estimates)])
    return "\n".join(_aligned(lines))


def group_of(name: str) -> tuple[str, str]:
    """The group of a metric and the sign of its direction; ("other", "") for an unknown one."""
    metric = registry.find(name)
    return (UNKNOWN, "") if metric is None else (metric.family.group, metric.arrow)


def markdown(text: Any) -> str:
    """Text for a line or a cell of Markdown, its special characters escaped."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(text).split()))


def _context_rows(contexts: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = [Row("group", "circumstances")]
    unusual = [key for key, usual in USUAL.items() if any(one.get(key, usual) != usual for one in contexts)]
    for key in (*CONTEXT, *unusual):
        values = [context.get(key, USUAL.get(key)) for context in contexts]
        cells = [Cell(value, "-" if value is None else str(value)) for value in values]
        rows.append(Row("context", key, cells=cells))
    return rows


def _decimals(name: str, estimates: Sequence[Mapping[str, float] | None], real: float | None) -> int:
    """Decimals of a row: four significant figures of its largest value."""
    values = [abs(estimate["value"]) for estimate in estimates if estimate]
    largest = max([*values, *([abs(real)] if real is not None else [])], default=0.0)
    metric = registry.find(name)
    return metric.decimals(largest) if metric else registry.decimals(largest)


def _cell(estimate: Mapping[str, float] | None, digits: int) -> Cell:
    if estimate is None:
        return Cell(None, "-")
    value, low, high = estimate["value"], estimate.get("low"), estimate.get("high")
    known = low is not None and high is not None
    return Cell(value, f"{value:.{digits}f}", low, high, f"[{low:.{digits}f}, {high:.{digits}f}]" if known else "")


def _remarks(results: Results) -> list[str]:
    notes = _list(results, "notes", "Notes")
    lines = ["", *notes] if notes else []
    missing = {names: reason for result in results.values() for names, reason in result["missing"].items()}
    if missing:
        lines += ["", "Not measured:", "", *(f"- {names}: {reason}" for names, reason in missing.items())]
    return lines


def _list(results: Results, kind: str, title: str) -> list[str]:
    texts: dict[str, list[str]] = {}
    for name, result in results.items():
        for text in result[kind]:
            texts.setdefault(text, []).append(name)
    lines = [f"- {', '.join(names)}: {text}" for text, names in texts.items()]
    return [f"{title}:", "", *lines] if lines else []


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines = [lines[0], ["-" * max(3, width) for width in widths], *lines[1:]]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]

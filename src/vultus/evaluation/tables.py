"""Results of evaluations as one table, a column for each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIGHER, LOWER, NEAR = "↑", "↓", "="  # better: higher, lower, near to real photos

# Rows by the beginning of their names, in the order in which a reader wants them.
CATALOGUE: dict[str, dict[str, str]] = {
    "identity": {"identity_": HIGHER, "type1_": HIGHER, "type2_": HIGHER, "rank": HIGHER},
    "realism": {
        "fid_": LOWER,
        "kid_": LOWER,
        "fd_": LOWER,
        "kd_": LOWER,
        "precision_": HIGHER,
        "recall_": HIGHER,
        "density_": HIGHER,
        "coverage_": HIGHER,
    },
    "reconstruction": {"mse": LOWER, "psnr": HIGHER, "ms_ssim": HIGHER, "lpips": LOWER, "stlpips": LOWER},
    "diversity": {"diversity_identity": NEAR, "pairs_above": NEAR, "diversity_noise": NEAR},
    "honesty": {"nearest_train": NEAR, "copied": NEAR},
}
CONTEXT = ("cur_nimg", "split", "n_images", "n_people", "noises", "seed", "resolution", "device", "seconds")
USUAL = {"noise_strength": 1.0}  # circumstances that are a row only where one result differs
TOP = "real photos"


def group_of(name: str) -> tuple[str, str]:
    """The group of a row and which direction is better; ("other", "") for an unknown one."""
    for group, entries in CATALOGUE.items():
        for start, arrow in entries.items():
            if name.startswith(start):
                return group, arrow
    return "other", ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: the value as text, and its 95 % interval as text or ""."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """A row: `kind` is group (only `name`), metric or context. `real` is what real photos reach, or ""."""

    kind: str
    name: str
    arrow: str = ""
    real: str = ""
    cells: list[Cell] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A table of results: a column for each, by name."""

    columns: list[str]
    rows: list[Row]


def build_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Results of several snapshots, {name: evaluate(...)}, as a table whose values and intervals stay apart."""
    plain, full = table_lines(results, intervals=False), table_lines(results)
    rows: list[Row] = []
    group = ""
    for (name, arrow, real, *texts), (_, _, _, *cells) in zip(plain[1:], full[1:], strict=True):
        if name.startswith("**"):
            group = name.strip("*")
            rows.append(Row("group", group))
            continue
        kind = "context" if group == "circumstances" else "metric"
        pairs = [Cell(text, cell[len(text) :].strip()) for text, cell in zip(texts, cells, strict=True)]
        rows.append(Row(kind, name, arrow, real, pairs))
    return Table(list(results), rows)


def format_table(
    results: Mapping[str, Mapping[str, Any]], *, intervals: bool = True, circumstances: bool = True
) -> str:
    """Results of several snapshots, {name: evaluate(...)}, as a Markdown table, then alarms, notes and what is missing.

    A cell is the figure with its 95 % interval, or with `intervals` False alone; without `circumstances` the table ends
    with the figures and nothing follows it. The column of real photos says what a
    perfect generator would reach. Rows whose names differ (another N, another split) are never one row.
    """
    lines = table_lines(results, intervals=intervals, circumstances=circumstances)
    return "\n".join([*_aligned(lines), *(_remarks(results) if circumstances else [])])


def table_lines(
    results: Mapping[str, Mapping[str, Any]], *, intervals: bool = True, circumstances: bool = True
) -> list[list[str]]:
    """The cells of that table, its head first. A line that only names a group is `**group**` and empty cells."""
    names = dict.fromkeys(name for result in results.values() for name in result["metrics"])
    order = [(group, start) for group, entries in CATALOGUE.items() for start in entries]
    placed = sorted(names, key=lambda name: _place(name, order))
    lines = [["", "", TOP, *results]]
    shown = ""
    for name in placed:
        group, arrow = group_of(name)
        if group != shown:
            lines.append([f"**{group}**", *[""] * (len(results) + 2)])
            shown = group
        rows = [result["metrics"].get(name) for result in results.values()]
        natural = next((row["real"] for row in rows if row and "real" in row), None)
        digits = _digits(name, rows, natural)
        lines.append(
            [
                name,
                arrow,
                "" if natural is None else f"{natural:.{digits}f}",
                *(_cell(row, digits, intervals) for row in rows),
            ]
        )
    if not circumstances:
        return lines
    lines.append(["**circumstances**", *[""] * (len(results) + 2)])
    contexts = [result["context"] for result in results.values()]
    unusual = [key for key, usual in USUAL.items() if any(c.get(key, usual) != usual for c in contexts)]
    for key in (*CONTEXT, *unusual):
        cells = [context.get(key, USUAL.get(key)) for context in contexts]
        lines.append([key, "", "", *("-" if cell is None else str(cell) for cell in cells)])
    return lines


def _remarks(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for kind, title in (("alarms", "Alarms"), ("notes", "Notes")):
        texts: dict[str, list[str]] = {}
        for name, result in results.items():
            for text in result[kind]:
                texts.setdefault(text, []).append(name)
        if texts:
            found += ["", f"{title}:", ""]
            found += [f"- {', '.join(of)}: {text}" for text, of in texts.items()]
    lacking = {rows: why for result in results.values() for rows, why in result["missing"].items()}
    if lacking:
        found += ["", "Not measured:", "", *(f"- {rows}: {why}" for rows, why in lacking.items())]
    return found


def markdown(text: Any) -> str:
    """Text in a line or a cell of Markdown, as it is."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(text).split()))


def format_gap(gaps: Mapping[str, Mapping[str, Any]]) -> str:
    """Train people minus unseen people, {name: gap(...)}, as a Markdown table of the rows that all of them have."""
    rows = [name for name in next(iter(gaps.values())) if all(name in found for found in gaps.values())]
    lines = [["train - test", *gaps]]
    for name in rows:
        cells = [found[name] for found in gaps.values()]
        lines.append([name, *(_cell(cell, _digits(name, cells, None), True) for cell in cells)])
    return "\n".join(_aligned(lines))


def _place(name: str, order: list[tuple[str, str]]) -> tuple[int, int]:
    group, _ = group_of(name)
    groups = [*CATALOGUE, "other"]
    starts = [start for _, start in order]
    best = next((number for number, start in enumerate(starts) if name.startswith(start)), len(starts))
    return groups.index(group), best


def _digits(name: str, rows: list[Any], natural: float | None) -> int:
    """Four significant figures of the largest, and no more than four decimals."""
    largest = max(
        [abs(row["value"]) for row in rows if row] + ([abs(natural)] if natural is not None else []), default=0
    )
    if name.startswith(("kd_", "kid_")):
        return 5 if largest < 0.1 else 4
    return 3 if largest < 2 else 2 if largest < 100 else 1


def _cell(row: Mapping[str, float] | None, digits: int, intervals: bool) -> str:
    if row is None:
        return "-"
    value = f"{row['value']:.{digits}f}"
    return f"{value} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]" if intervals else value


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines = [lines[0], ["-" * max(3, width) for width in widths], *lines[1:]]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]

"""The result of an audit as tables: cells of text, in Markdown, for a terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cells = list[list[str]]  # the head first
REAL = "real photos, no attack"
CASES = {"own_keys": "everybody with a key of their own", "stolen_key": "impostors with the stolen key"}
FAR = "0.001"  # of the tables and plots that show one rate only


def percent(estimate: Mapping[str, float] | None) -> str:
    """`78.8 (72.6 to 84.6)`: percentages, with the 95 % interval over people."""
    if estimate is None:
        return "-"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def main_cells(result: Mapping[str, Any]) -> Cells:
    """TAR and the success of the attack at both rates by every encoder: of real photos, then of each protection."""
    protections: Mapping[str, Any] = result["protections"]
    columns = [(name, key) for name, values in next(iter(protections.values()))["success"].items() for key in values]
    head = ["protection", "length", "TAR of templates", *(heading(name, key, result) for name, key in columns)]
    rows = [
        [title, str(row["dim"]), percent(row["tar"]), *(percent(row["success"][name][key]) for name, key in columns)]
        for title, row in protections.items()
    ]
    real = [percent(result["real"].get(name, {}).get(key)) for name, key in columns]
    return [head, [REAL, "-", "-", *real], *rows]


def key_cells(result: Mapping[str, Any]) -> Cells:
    """TAR in the two cases of protections with a key for each person; without such a protection empty."""
    rows = [
        [title, *(percent(row["tar_cases"][case]) for case in CASES), CASES[row["tar_case"]]]
        for title, row in result["protections"].items()
        if "tar_cases" in row
    ]
    head = ["protection", *(f"TAR, {words}" for words in CASES.values()), "case in the other tables"]
    return [head, *rows] if rows else []


def group_cells(result: Mapping[str, Any]) -> Cells:
    """A row for each protection and group, at a FAR of 1e-3; without groups empty."""
    if not result["context"].get("groups"):
        return []
    first = next(iter(result["protections"].values()))
    columns = [(name, key) for name, values in first["success"].items() for key in values if key.endswith(f"@{FAR}")]
    head = ["protection", "group", "photos", "people", "TAR of templates"]
    head += [heading(name, key, result) for name, key in columns]
    everybody = {"n_images": result["context"]["n_images"], "n_people": result["context"]["n_people"]}
    rows = []
    for title, row in result["protections"].items():
        for group, part in {**row["groups"], "all": row | everybody}.items():
            counts = [str(part["n_images"]), str(part["n_people"])]
            values = [part["tar"], *(part["success"][name][key] for name, key in columns)]
            rows.append([title, group, *counts, *map(percent, values)])
    return [head, *rows]


def heading(encoder: str, key: str, result: Mapping[str, Any]) -> str:
    """`type1@0.001` of an encoder in words; an encoder that the losses contained is marked."""
    kind, _, far = key.partition("@")
    return f"{marked_name(encoder, result)}, type {'I' if kind == 'type1' else 'II'}, FAR {far}"


def marked_name(encoder: str, result: Mapping[str, Any]) -> str:
    """The name of an encoder, with a mark if the training of the generator contained it."""
    context = result["context"]
    names = {encoder, context["attacked"]} if context["attacked"].startswith(encoder) else {encoder}
    return f"{encoder} (in the loss)" if names & set(context["loss_encoders"]) else encoder


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


def text(result: Mapping[str, Any]) -> str:
    """All tables of a result, as Markdown."""
    return "\n\n".join(
        markdown(cells) for cells in (main_cells(result), key_cells(result), group_cells(result)) if cells
    )

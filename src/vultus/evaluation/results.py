"""Reading the results of evaluations, of any version of their format.

Version 2 is what `evaluate` returns. Version 1 was a flat dictionary: a number for each metric, with `_std` and `_real`
beside it, between the entries of the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vultus._files import read_json
from vultus._formats import VERSIONS, upgrade, upgrades
from vultus.errors import UserError
from vultus.evaluation import registry
from vultus.evaluation.tables import CONTEXT

FILE = "results.json"
MAPPINGS = ("context", "metrics", "distributions", "people", "missing")  # keys of a result
LISTS = ("alarms", "notes")


def read_results(path: str | Path) -> dict[str, dict[str, Any]]:
    """The results in a file, or in `results.json` of a folder: {column: result}, each as the current version has it.

    Metrics of version 1 have no interval (`low`, `high`). Raises UserError that names the file if it is missing, no
    JSON, or no result of an evaluation.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name} here; give a folder that vultus evaluate --out wrote")
    columns = read_json(path)
    if isinstance(columns, dict) and _version(columns) == 1 and _metric_names(columns):
        columns = {path.parent.name: columns}  # version 1 had no columns
    if not isinstance(columns, dict) or not columns:
        raise _invalid(path)
    return {name: read_result(result, path) for name, result in columns.items()}


def read_result(result: Any, where: object) -> dict[str, Any]:
    """One result as the current version has it, every key of MAPPINGS and LISTS included.

    `where` names the file or snapshot in the UserError for what is no result.
    """
    if not isinstance(result, Mapping):
        raise _invalid(where)
    current = _empty() | dict(upgrade("evaluation", _version(result), result, where))
    shaped = all(isinstance(current[key], Mapping) for key in MAPPINGS)
    if not shaped or not all(isinstance(current[key], list) for key in LISTS):
        raise _invalid(where)
    rows = current["metrics"].values()
    if not rows or not all(isinstance(row, Mapping) and "value" in row and _is_numbers(row) for row in rows):
        raise _invalid(where)
    return current


def _is_numbers(row: Mapping[str, Any]) -> bool:
    """Whether what a table shows of this row are numbers."""
    shown = [row["value"], *(row[key] for key in ("low", "high", "real", "std") if row.get(key) is not None)]
    # A whole number in JSON has no limit, and one beyond the range of floats cannot be shown.
    return all(
        isinstance(value, int | float) and not (isinstance(value, int) and abs(value) > 1e300) for value in shown
    )


def _empty() -> dict[str, Any]:
    return {key: {} for key in MAPPINGS} | {key: [] for key in LISTS}


def _invalid(where: object) -> UserError:
    return UserError(f"{where}: not the results of vultus evaluate; run it again with --out")


def _version(result: Mapping[str, Any]) -> Any:
    if isinstance(result.get("metrics"), Mapping):
        return result.get("format", VERSIONS["evaluation"])  # the metadata of a snapshot leaves the format out
    return result.get("format", 1)


def _metric_names(flat: Mapping[str, Any]) -> list[str]:
    """The metrics of a result of version 1; the spread and the value of real photos stand beside them."""
    numbers = [name for name, value in flat.items() if isinstance(value, float)]
    return [name for name in numbers if not name.endswith(("_real", "_std")) and registry.find(name)]


@upgrades("evaluation", 1)
def _from_flat(flat: Mapping[str, Any]) -> dict[str, Any]:
    rows = {}
    for name in _metric_names(flat):
        beside = {key: flat[f"{name}_{key}"] for key in ("std", "real") if f"{name}_{key}" in flat}
        rows[name] = {"value": flat[name]} | beside
    context = {key: flat[key] for key in (*CONTEXT, "data_sha256") if key in flat}
    return _empty() | {"format": 2, "context": context, "metrics": rows, "notes": list(flat.get("notes", []))}

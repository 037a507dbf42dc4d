"""Reading the results of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vultus._files import read_json
from vultus.errors import UserError


def read_results(path: Path) -> dict[str, Any]:
    """results.json as `vultus evaluate --out` wrote it: {column: result}. Raises UserError that names the file."""
    results = read_json(path)
    if not isinstance(results, dict) or not all(_is_result(result) for result in results.values()):
        raise UserError(f"{path}: not the results of vultus evaluate; run it again")
    return results


def _is_result(result: Any) -> bool:
    if not isinstance(result, Mapping) or not isinstance(result.get("metrics"), Mapping):
        return False
    rows = result["metrics"].values()
    shaped = all(isinstance(result.get(key), Mapping) for key in ("context", "distributions", "missing"))
    shaped = shaped and all(isinstance(result.get(key), list) for key in ("alarms", "notes"))
    return shaped and all(isinstance(row, Mapping) and {"value", "low", "high"} <= row.keys() for row in rows)

"""audit.json: the stored result of an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vultus._files import read_json
from vultus._formats import upgrade
from vultus.errors import UserError


def read_audit(path: str | Path) -> dict[str, Any]:
    """The result in an audit.json, as `audit_people` returned it, in the form of the current version.

    Raises UserError that names the file if it is missing, of a newer version, or no result of an audit.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(value.get(key), dict) for key in ("context", "protections")):
        raise UserError(f"{path}: not the audit.json of `vultus audit`")
    result: dict[str, Any] = upgrade("audit", value.get("format"), value, path)
    return result

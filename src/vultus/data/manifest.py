"""Reading the manifest of a prepared data set, with a check of everything that its readers use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vultus._files import read_json
from vultus._formats import upgrade
from vultus.errors import UserError

Json = dict[str, Any]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_shards(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(shard, dict)
        and _is_text(shard.get("file"))
        and Path(shard["file"]).name == shard["file"]
        and _is_count(shard.get("rows"))
        and _is_text(shard.get("sha256"))
        for shard in value
    )


def _is_splits(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(split, dict) and _is_count(split.get("images")) for split in value.values()
    )


# What readers use: where it stands, what it must be, and whether it is that.
_CHECKS: list[tuple[str, str, Callable[[Any], bool]]] = [
    ("resolution", "a number of pixels from 16 to 1024", lambda value: _is_count(value) and 16 <= value <= 1024),
    ("encoder.id", "text", _is_text),
    ("encoder.dim", "a number from 1 to 65536", lambda value: _is_count(value) and 1 <= value <= 65536),
    ("facenet", "an encoder with its dim", lambda value: value is None or (isinstance(value, dict) and "dim" in value)),
    ("counts.splits", "the numbers of images of each split", _is_splits),
    ("crop", "the crop of the photos", lambda value: isinstance(value, dict)),
    ("shards", "a list of file, rows and sha256", _is_shards),
    ("content_sha256", "text", _is_text),
]


def read_manifest(folder: Path) -> Json:
    """The manifest of a prepared data set, in the form of the current version.

    Raises UserError that names the folder or the file and the remedy if it is no prepared data set, is not finished, is
    of a newer version, or holds a value that cannot be right.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        reason = (
            "not finished: run the same `vultus prepare` again"
            if (folder / "progress").is_dir()
            else "not a prepared data set: create one with `vultus prepare SOURCE --out DIR`"
        )
        raise UserError(f"{folder}: {reason}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise UserError(f"{path}: not the manifest of a prepared data set; prepare the data set again")
    manifest = upgrade("prepared data set", manifest["schema"], manifest, path)
    for name, kind, is_valid in _CHECKS:
        value: Any = manifest
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not is_valid(value):
            shown = "is missing" if value is None else f"is {str(value)[:60]!r}"
            raise UserError(
                f"{path}: {name} {shown}, {kind} is needed; restore the file from a copy, or prepare the data set again"
            )
    return manifest

"""The folder of a synthetic data set while it is written.

Incomplete: train-*, progress/begun.json, progress/NUMBER.json (a record: its shard is complete)
Complete:   train-*, README.md, synthesis.json with the records (written last)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vultus._files import make_folder, read_json, write_json
from vultus._formats import upgrade
from vultus.data.integrity import lost_shards
from vultus.errors import UserError

CARD = "README.md"
MANIFEST = "synthesis.json"

Json = dict[str, Any]


class SynthesisFolder:
    """Reads and writes what is beside the shards. The caller holds the lock of the folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` must exist."""
        self.folder, self.progress = folder, folder / "progress"
        self._begun = self.progress / "begun.json"

    def open(self, options: Mapping[str, Any]) -> Json | None:
        """The manifest if the data set is complete.

        Raises UserError if it was begun with other options.
        """
        for temporary in (*self.folder.glob(".*.tmp"), *self.progress.glob(".*.tmp")):
            temporary.unlink()
        path = self.folder / MANIFEST
        if path.is_file():
            shutil.rmtree(self.progress, ignore_errors=True)
            value = read_json(path)
            if not isinstance(value, dict) or "format" not in value or not isinstance(value.get("options"), dict):
                raise UserError(f"{path}: not the manifest of a synthetic data set; choose another --out")
            manifest: Json = upgrade("synthetic data set", value["format"], value, path)
            _check_same(self.folder, manifest["options"], options)
            return manifest
        if self._begun.is_file():
            _check_same(self.folder, read_json(self._begun), options)
        return None

    def begin(self, options: Mapping[str, Any]) -> None:
        """Keep the options for a process that resumes."""
        make_folder(self.progress)
        write_json(self._begun, options)

    def record(self, number: int, entry: Json) -> None:
        """Record that a shard is complete."""
        if self.progress.is_dir():
            write_json(self.progress / f"{number:05d}.json", entry)

    def recorded(self) -> dict[int, Json]:
        """The records of an incomplete data set, by the numbers of the shards."""
        return {int(path.stem): read_json(path) for path in self.progress.glob("[0-9]*.json")}

    def lost(self, entries: Mapping[int, Json]) -> dict[int, str]:
        """{number: reason} of the recorded shards that are missing or damaged."""
        lost = lost_shards(self.folder, [entry for entry in entries.values() if entry["rows"]])
        return {number: lost[entry["file"]] for number, entry in entries.items() if entry["file"] in lost}

    def finish(self, manifest: Json) -> None:
        """Write the manifest of a complete data set."""
        write_json(self.folder / MANIFEST, manifest)
        shutil.rmtree(self.progress, ignore_errors=True)


def check_place(out: Path) -> None:
    """Raise UserError if `out` holds files that are not of a synthetic data set."""
    if not out.is_dir() or (out / MANIFEST).is_file() or (out / "progress" / "begun.json").is_file():
        return
    # Of a process that was killed when it began, an empty folder `progress` and temporary files may be left.
    found = [*out.iterdir(), *(out / "progress").glob("*")]
    names = sorted(path.name for path in found if not path.name.startswith(".") and path != out / "progress")
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(f"--out {out}: holds other files ({shown}); choose an empty or new folder")


def _check_same(folder: Path, begun: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if begun.get(name) != value:
            option = name if name == "snapshot" else f"--{name}"
            raise UserError(
                f"{folder}: was begun with {option} {json.dumps(begun.get(name))}, now it is {json.dumps(value)}; "
                "give the same options or choose another --out"
            )

"""A complete prepared data set to which the same command is given again: is there anything to do?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vultus._files import json_value
from vultus.data.changes import Changes, History, sidecars_of
from vultus.data.integrity import lost_shards
from vultus.data.items import Source, counted
from vultus.data.manifest import read_manifest
from vultus.data.options import Options
from vultus.data.photo_folder import FolderPart
from vultus.data.shards import PreparedFolder
from vultus.data.sources import is_on_hub, open_source
from vultus.errors import UserError


class Existing:
    """Compares a complete data set with its manifest and its source.

    Attributes:
        manifest: of the data set.
        source: opened, if that was needed and possible.
        begun: what a preparation records when it begins (see PreparedFolder.begin).
        entries: the sidecars of its shards.

    Raises UserError for other options, and for shards that are lost and cannot be made again.
    """

    def __init__(self, folder: PreparedFolder, options: Options) -> None:
        self.folder, self.options = folder, options
        self.manifest: dict[str, Any] = read_manifest(folder.folder)
        options.check_same(folder.folder, self.manifest.get("options", {}))
        self.entries: Sequence[dict[str, Any]] = folder.sidecars()
        listing = self.manifest.get("listing", {})
        self.begun = {
            "options": self.manifest["options"],
            "encoder": self.manifest["encoder"],
            "revision": listing.get("revision", ""),
        }
        if "facenet" in self.manifest:
            self.begun["facenet"] = self.manifest["facenet"]
        if "columns" in listing:
            self.begun["columns"] = listing["columns"]
        self.source: Source | None = None
        self._lost = lost_shards(folder.folder, self.manifest["shards"])

    def needs_work(self) -> bool:
        """Whether photos are to be added, or shards to be made again; `entries` are then complete.

        Prints what has changed in the source and does not concern the data set.
        """
        if self._lost and not self.entries:
            name, reason = next(iter(self._lost.items()))
            raise UserError(
                f"{self.folder.folder / name}: {reason}; this data set was prepared by a version that did not keep "
                "which photos are in which shard, so it can't be made again alone: prepare into another --out"
            )
        name = self.options.source
        if not Path(name).exists() and is_on_hub(name):
            return bool(self._lost)  # read at the recorded revision, so nothing can have changed
        try:
            self.source = open_source(
                name, self.options.split, image_column=self.options.image_column, id_column=self.options.id_column
            )
        except UserError as error:
            if self._lost:
                raise
            _note(f"the source can't be compared with the data set ({error})")
            return False
        part = self.source.parts[0]
        if isinstance(part, FolderPart):
            return self._compare(part) or bool(self._lost)
        revision = self.begun["revision"]
        if revision and revision != self.source.revision and not self._lost:
            _note(
                f"the files of {name} have changed since this data set was prepared, which is left as it is; to read "
                "them as they are now, prepare into another --out"
            )
        return bool(self._lost)

    def _compare(self, part: FolderPart) -> bool:
        """Whether the folder of photos has any that are to be read; prints the other changes."""
        if not self.entries:
            self.entries = sidecars_of(self.folder, self.manifest, _skips(self.folder.skipped_file))
        changes = Changes.of(part, History(self.entries))
        for note in changes.notes(self.options.source):
            _note(note)
        room = (self.options.limit or sys.maxsize) - sum(entry["items"] for entry in self.entries)
        if not changes.new or room <= 0:
            return False
        _note(f"new in {self.options.source}, added to the data set: {counted(min(changes.new, room), 'photo')}")
        return True


def _skips(file: Path) -> list[dict[str, Any]]:
    try:
        return [json_value(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # without it, these photos are tried once more
        return []


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)

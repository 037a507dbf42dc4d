"""What has changed in a folder of photos since it was read: photos that are new, gone, or other files than before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vultus.data.items import Item, Signature, counted
from vultus.data.photo_folder import FolderPart
from vultus.data.shards import PreparedFolder
from vultus.errors import UserError
from vultus.images.io import BadImage, open_image

Json = dict[str, Any]
Listed = tuple[str, int | None, int | None]  # key, size in bytes and modification time in ns of a file that was read


class History:
    """The photos of a folder that were read, and what became of them.

    Args:
        entries: the sidecars of their shards, each with a `listing`.
    """

    def __init__(self, entries: Iterable[Json]) -> None:
        self._read: dict[str, Signature | None] = {}
        self._skipped: dict[str, Json] = {}
        for entry in entries:
            for key, size, modified in entry.get("listing", ()):
                self._read[key] = None if size is None or modified is None else (size, modified)
                self._skipped.pop(key, None)
            self._skipped |= {skip["key"]: skip for skip in entry["skipped"]}

    def is_new(self, item: Item) -> bool:
        """Whether to read a photo: a new one, or a skipped one that is another file now or can be read now."""
        if item.key not in self._read:
            return True
        skip = self._skipped.get(item.key)
        if skip is None or item.problem is not None:
            return False
        return self.is_changed(item) or (bool(skip.get("again")) and _can_be_opened(item))

    def is_changed(self, item: Item) -> bool:
        """Whether a photo that was read has another size or modification time now."""
        before = self._read.get(item.key)
        return before is not None and item.signature is not None and before != item.signature

    def gone(self, keys: set[str]) -> list[str]:
        """The photos with an embedding that are not among `keys`."""
        return [key for key in self._read if key not in keys and key not in self._skipped]

    def listing(self) -> Json:
        """Number and sha256 of the names, sizes and modification times that were read, for the manifest."""
        digest = hashlib.sha256()
        for key, signature in sorted(self._read.items()):
            digest.update(f"{key}\0{signature}\n".encode())
        return {"photos": len(self._read), "sha256": digest.hexdigest()}


def _can_be_opened(item: Item) -> bool:
    try:
        open_image(item.read()).close()
    except (OSError, BadImage):
        return False
    return True


@dataclass(frozen=True)
class Changes:
    """Numbers of photos, and the first of each kind."""

    new: int
    changed: int
    gone: Sequence[str]
    first_changed: str | None

    @classmethod
    def of(cls, part: FolderPart, history: History) -> Changes:
        """The changes of a folder since `history`. Every file's size and time is read, but no file."""
        new, changed, first = 0, 0, None
        keys = set()
        for item in part.items(None):
            keys.add(item.key)
            if history.is_new(item):
                new += 1
            elif history.is_changed(item):
                changed, first = changed + 1, first or item.key
        return cls(new, changed, history.gone(keys), first)

    def notes(self, source: str) -> list[str]:
        """A line for each kind of change that the data set does not follow."""
        notes = []
        if self.gone:
            notes.append(
                f"no longer in {source}, but still in the data set: {counted(len(self.gone), 'photo')} (the first: "
                f"{self.gone[0]}); for a data set without, prepare into another --out"
            )
        if self.changed:
            notes.append(
                f"changed in {source}, but in the data set as before: {counted(self.changed, 'photo')} (the first: "
                f"{self.first_changed}); to read what is there now, prepare into another --out"
            )
        return notes


def listed(items: Iterable[Item]) -> list[Listed]:
    """The listing of a shard: what `History` needs of its items."""
    return [(item.key, *(item.signature or (None, None))) for item in items]


def with_listings(folder: PreparedFolder, entries: Sequence[Json]) -> list[Json]:
    """Sidecars of a folder of photos, with the `listing` that older versions did not keep: from the shards."""
    result = []
    for entry in entries:
        if "listing" not in entry:
            keys = [*folder.column(entry, "key"), *(skip["key"] for skip in entry["skipped"])]
            entry = {**entry, "listing": [(key, None, None) for key in keys]}
        result.append(entry)
    return result


def sidecars_of(folder: PreparedFolder, manifest: Json, skipped: Sequence[Json]) -> list[Json]:
    """Sidecars of a complete set of a folder of photos that an older version wrote, which did not keep them.

    Raises UserError if a shard cannot be read.
    """
    entries = []
    for index, shard in enumerate(manifest["shards"]):
        first = {"skipped": [dict(skip) for skip in skipped]} if index == 0 else {"skipped": []}
        entry = {**shard, "items": shard["rows"] + len(first["skipped"]), "part": 0, "position": None, **first}
        entries.append(entry)
    try:
        return with_listings(folder, entries)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.folder}: a shard can't be read ({error}); prepare into another --out") from None

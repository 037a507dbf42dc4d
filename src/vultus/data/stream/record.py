"""What a run read from its stream, and what it left out: stream.json in the run folder.

A resumed run leaves out the same, so that it goes on with the same photos in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vultus._files import read_json, write_json
from vultus._formats import VERSIONS, upgrade
from vultus.data.items import counted
from vultus.data.stream.options import option_name
from vultus.data.stream.remote import changed
from vultus.errors import UserError

FILE = "stream.json"
SHOWN = 3  # of what was left out, in the note at the end

Json = dict[str, Any]


class Record:
    """What the run folder says about the stream.

    Args:
        head: source, revision, options and files (see Shard.entry) of the stream.

    Attributes:
        folder: the run folder; None keeps the record in memory.
        photos: those that cannot be used: file, group, row (of the training rows of that row group), key, reason.
        shards: files left out during the run: file, epoch, position, place (see Skips), photos, reason.
        unopened: files that could not be read when the run began: file, reason.
    """

    def __init__(self, head: Json, unopened: list[Json]) -> None:
        self.head = head
        self.folder: Path | None = None
        self.photos: list[Json] = []
        self.shards: list[Json] = []
        self.unopened = unopened
        self._loaded = False

    def load(self) -> None:
        """Take what an earlier session of the run left out."""
        if self._loaded or self.folder is None:
            return
        self._loaded = True
        before = read_record(self.folder)
        if before is not None:
            skipped = before["skipped"]
            self.photos, self.shards, self.unopened = skipped["photos"], skipped["files"], skipped["unopened"]

    def save(self) -> None:
        """Write the file, if the run folder is there."""
        if self.folder is not None and self.folder.is_dir():
            skipped = {"photos": self.photos, "files": self.shards, "unopened": self.unopened}
            write_json(self.folder / FILE, {"format": VERSIONS["stream record"], **self.head, "skipped": skipped})

    def notes(self) -> list[str]:
        """Lines that say what was left out, for the end of a run."""
        lines = []
        for what, entries, name in (
            ("file", [*self.unopened, *self.shards], "file"),
            ("photo", self.photos, "key"),
        ):
            if entries:
                shown = "; ".join(f"{entry[name]}: {entry['reason']}" for entry in entries[:SHOWN])
                more = f"; {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
                lines.append(f"{counted(len(entries), what)} of {self.head['source']} skipped ({shown}{more})")
        if lines and self.folder is not None:
            lines[-1] += f"; all are in {self.folder / FILE}"
        return lines


def read_record(folder: str | Path) -> Json | None:
    """The stream.json of a run folder; None if there is none. Raises UserError for one that cannot be used."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        record = upgrade("stream record", record["format"], record, path)
        for name in ("photos", "files", "unopened"):
            record["skipped"][name]
        record["options"], record["files"], record["source"], record["revision"]
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: not the record of a stream; restore it from a copy, or start over with --fresh"
        ) from None
    return record


def check_same(folder: Path, before: Mapping[str, Any], head: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise UserError if the run in `folder` was begun with other options or on other files.

    `names` are the full names of the files of `head`, for messages.
    """
    for name, value in head["options"].items():
        if before["options"].get(name) != value:
            raise UserError(
                f"{folder}: was begun with {option_name(name)} {before['options'].get(name)}, now it is {value}; give "
                "the same options, start over with --fresh, or choose another --out"
            )
    old, new = _by_name(before["files"]), _by_name(head["files"])
    for name in old:
        if name in new and old[name] != new[name]:
            (size, etag, _), (size_now, etag_now, _) = old[name], new[name]
            raise changed(names[name], f"{size} bytes, ETag {etag}", f"{size_now} bytes, ETag {etag_now}")
    other = sorted(old.keys() ^ new.keys())
    if other:
        state = "is no longer in" if other[0] in old else "is new in"
        raise UserError(
            f"{folder}: {other[0]} {state} {head['source']} since this run was begun; start over with --fresh, or "
            "choose another --out"
        )


def _by_name(files: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: list(rest) for name, *rest in files}

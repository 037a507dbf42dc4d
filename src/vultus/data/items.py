"""What a source is made of: photos that are not decoded yet, in sequences that can be resumed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vultus.images.io import MAX_FILE_BYTES, BadImage

ONE_PER_IMAGE = "one per image"  # Source.identities where the source names nobody

Position = dict[str, Any]  # JSON
Signature = tuple[int, int]  # size in bytes and modification time in ns of a file


def nobody_named(source: str, remedy: str) -> str:
    """The note about a source whose identities are ONE_PER_IMAGE."""
    return (
        f"note: {source} names no identities, so every image counts as a person of its own, and one person may be in "
        f"both splits; {remedy}"
    )


def counted(count: int, noun: str) -> str:
    """The number with the noun, in the plural unless it is one: 1 photo, 2 photos."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class Item:
    """One photo of a source, not decoded: its bytes, or the path of its file.

    Attributes:
        key: its name in the source, different from all others; that of a folder ends with a slash.
        identity: the person on it.
        data: its bytes, or the path of its file; None if there is no image.
        problem: why it cannot be read, where that is known already.
        signature: of its file, if it has one.
    """

    key: str
    identity: str
    data: bytes | Path | None
    problem: str | None = None
    signature: Signature | None = None

    def read(self) -> bytes:
        """The encoded image. Raises OSError if the file cannot be read, BadImage if it is missing or too large."""
        if self.data is None:
            raise BadImage(self.problem or "no image in this row")
        if isinstance(self.data, bytes):
            return self.data
        size = self.data.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadImage(f"file too large: {size // 1_000_000} MB, the limit is {MAX_FILE_BYTES // 1_000_000} MB")
        return self.data.read_bytes()


class Part(Protocol):
    """A sequence of items of one split. It can be read by one reader at a time."""

    split: str | None  # "train" or "test"; None if the source has no splits
    total: int | None  # number of items, if it is known without reading them
    seekable: bool  # `items` begins at {"row": N} without reading what is before; total is known, and it can be pickled

    def items(self, position: Position | None) -> Generator[Item, None, None]:
        """The items after `position` (None: all items)."""
        ...

    def position(self) -> Position:
        """The position after the item that `items` yielded last."""
        ...


@dataclass(frozen=True)
class Source:
    """Parts in reading order: "test" before "train", so that the identities of the test split are known first.

    Attributes:
        parts: see above.
        revision: changes with the files of the source, as far as this can be checked without reading them. Empty for a
            folder of photos, whose files are compared one by one.
        identities: where the identity of a photo comes from, in words: "column celeb_id", "sub-folders", ONE_PER_IMAGE.
        columns: of a table, those of the image and of the identity (None: it has none).
        notes: what the user should know about the source, a line each.
    """

    parts: Sequence[Part]
    revision: str
    identities: str
    columns: tuple[str, str | None] | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_splits(self) -> bool:
        """Whether the source has both a train and a test split."""
        return {part.split for part in self.parts} >= {"train", "test"}

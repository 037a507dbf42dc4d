"""A folder of photos as a source: its photos by path, the top-level sub-folder as the identity."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vultus.data.items import ONE_PER_IMAGE, Item, Position, Signature, counted
from vultus.images.io import photo_suffixes

MAX_DEPTH = 100  # folders inside one another
# Images that are not read: layered or raw files, drawings, formats without a signature.
OTHER_IMAGES = frozenset(
    [
        ".psd",
        ".psb",
        ".xcf",
        ".tga",
        ".eps",
        ".svg",
        ".jxl",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".raf",
        ".rw2",
        ".pcx",
        ".sgi",
        ".exr",
        ".hdr",
        ".ico",
        ".icns",
    ]
)


@dataclass(slots=True)
class Survey:
    """What a folder holds besides its photos, and where the photos lie.

    Attributes:
        in_folders: photos in sub-folders.
        loose: photos in the folder itself.
        other_images: suffixes and numbers of image files of formats that are not read.
        not_images: suffixes and numbers of the remaining files.
    """

    in_folders: int = 0
    loose: int = 0
    other_images: Counter[str] = field(default_factory=Counter)
    not_images: Counter[str] = field(default_factory=Counter)

    def identities(self) -> str:
        """Where the identities come from, in words."""
        if not self.in_folders:
            return ONE_PER_IMAGE
        return f"sub-folders, and {ONE_PER_IMAGE} outside of them" if self.loose else "sub-folders"

    def others(self) -> list[str]:
        """A line for each kind of file that is passed over."""
        lines = []
        if self.other_images:
            lines.append(f"{_listed(self.other_images)} not read: image formats to convert to JPEG or PNG")
        if self.not_images:
            lines.append(f"{_listed(self.not_images)} not read: not images")
        return lines


def _listed(suffixes: Counter[str]) -> str:
    shown = ", ".join(f"{suffix or 'without suffix'} {count}" for suffix, count in suffixes.most_common(5))
    more = ", ..." if len(suffixes) > 5 else ""
    return f"{counted(suffixes.total(), 'file')} ({shown}{more})"


class FolderPart:
    """Photos in a folder and its sub-folders, ordered by path. The top-level sub-folder is the identity.

    A sub-folder that cannot be read is an item with a problem.
    """

    seekable = False

    def __init__(self, folder: Path) -> None:
        """Counts the photos, which lists every folder. Raises OSError if `folder` itself cannot be read."""
        self.folder = folder
        self.split: str | None = None
        self.survey = Survey()
        self.total: int | None = sum(1 for _ in _walk(folder, survey=self.survey))
        self._last: list[str] = []

    def items(
        self, position: Position | None, wanted: Callable[[Item], bool] | None = None
    ) -> Generator[Item, None, None]:
        """Items after the path in `position`, those that are `wanted`. One folder's listing at a time is in memory."""
        self._last = list(position["last"]) if position else []
        for found in _walk(self.folder, after=tuple(self._last)):
            item = found.item()
            if wanted is None or wanted(item):
                self._last = list(found.parts)
                yield item

    def position(self) -> Position:
        """The path of the last item."""
        return {"last": self._last}


@dataclass(frozen=True, slots=True)
class _Found:
    parts: tuple[str, ...]  # of the path, escaped where they are not UTF-8
    path: Path
    problem: str | None = None
    is_folder: bool = False
    signature: Signature | None = None

    def item(self) -> Item:
        key = "/".join(self.parts) + ("/" if self.is_folder else "")
        identity = self.parts[0] if len(self.parts) > 1 else key
        return Item(key, identity, None if self.problem else self.path, self.problem, self.signature)


def _walk(
    folder: Path,
    prefix: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    above: frozenset[tuple[int, int]] = frozenset(),
    survey: Survey | None = None,
) -> Iterator[_Found]:
    """Every photo whose path is greater than `after`, in order. `survey` counts what is found."""
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a parent folder, which would never end
            return
        if len(prefix) > MAX_DEPTH:
            yield _Found(prefix, folder, f"folder not read: more than {MAX_DEPTH} folders inside one another", True)
            return
        with os.scandir(folder) as entries:
            # Keys are stored as UTF-8; a name that is not UTF-8 gets escapes.
            named = [(os.fsencode(entry.name).decode("utf-8", "backslashreplace"), entry) for entry in entries]
    except OSError as error:
        if not prefix:
            raise
        if prefix > after:
            yield _Found(prefix, folder, f"folder can't be read ({error.strerror})", True)
        return
    for name, entry in sorted(named, key=lambda pair: pair[0]):
        if name.startswith("."):
            continue
        parts = (*prefix, name)
        suffix = os.path.splitext(name)[1].lower()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
            problem = None
        except OSError as error:  # a link to itself
            is_folder = is_file = False
            problem = f"can't be read ({error.strerror})"
        if is_folder:
            if parts >= after[: len(parts)]:
                yield from _walk(Path(entry.path), parts, after, above | {here}, survey)
            continue
        if not is_file and problem is None and entry.is_symlink():
            problem = "a link to nothing"
        if suffix not in photo_suffixes() or not (is_file or problem):
            # What a link that leads nowhere was meant to be shows its suffix at best.
            if survey is not None and is_file:
                (survey.other_images if suffix in OTHER_IMAGES else survey.not_images)[suffix] += 1
            if problem is None or suffix:
                continue
        if survey is not None and is_file:
            survey.loose, survey.in_folders = survey.loose + (not prefix), survey.in_folders + bool(prefix)
        if parts > after:
            yield _Found(parts, Path(entry.path), problem, signature=_signature(entry) if is_file else None)


def _signature(entry: os.DirEntry[str]) -> Signature | None:
    try:
        status = entry.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns

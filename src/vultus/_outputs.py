"""Where a command may write: never over a file that it reads, nor into a folder whose photos it reads, and over a file
of somebody else only if the user asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from vultus._files import make_folder
from vultus.errors import UserError

REPLACE = "choose another --out, or replace it with --overwrite"


class Inputs:
    """What a command reads, which it must not write to.

    Two paths are compared by the file that they lead to, so links, other spellings and relative paths are recognised.
    Paths that do not exist are ignored.

    Args:
        files: files; none of them is ever replaced, even with --overwrite.
        folders: folders of which every file is read, in sub-folders too; nothing is written inside.
    """

    def __init__(
        self, files: Iterable[str | os.PathLike[str]] = (), folders: Iterable[str | os.PathLike[str]] = ()
    ) -> None:
        self._files = {key for path in files if (key := _identity(path)) is not None}
        self._folders = {key: Path(path) for path in folders if (key := _identity(path)) is not None}

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise UserError if `path`, a file or folder to write, is one of the inputs or lies inside one."""
        if self._files and _identity(path) in self._files:
            raise UserError(f"{path}: is read by this command and would be replaced; choose another --out")
        if not self._folders:
            return
        for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
            for folder in (place, *place.parents):
                if (key := _identity(folder)) is not None and key in self._folders:
                    raise UserError(
                        f"{path}: all photos in {self._folders[key]} are read, so what is written there would be read "
                        f"as a photo the next time; choose another --out"
                    )


def check_output(
    *paths: str | os.PathLike[str],
    inputs: Inputs | None = None,
    own: Callable[[Path], bool] | None = None,
    overwrite: bool | None = None,
) -> None:
    """Raise UserError unless the files `paths` may be written; call it before the work starts.

    Args:
        paths: the files to write; with `inputs` only, folders too.
        inputs: what the command reads.
        own: whether an existing file was written by this command, so that it may be replaced without `overwrite`. None:
            no existing file may be replaced.
        overwrite: replace existing files of others; never those of `inputs`. None: the command has no --overwrite.
    """
    for path in map(Path, paths):
        if inputs is not None:
            inputs.check(path)
        if overwrite or not os.path.lexists(path) or path.is_dir():
            continue
        if own is None or not own(path):
            remedy = "choose another --out" if overwrite is None else REPLACE
            known = "" if own is None else " and is no earlier result of this command"
            raise UserError(f"{path}: exists{known}; {remedy}")


def check_absent(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Create `folder`. Raises UserError if one of the files `names` is there: results are not replaced."""
    for path in (make_folder(folder) / name for name in names):
        if path.exists():
            raise UserError(f"{path}: exists already; choose another --out")


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Device and number of the file or folder that the path leads to; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino

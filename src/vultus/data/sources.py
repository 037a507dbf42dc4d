"""Where photos come from: a folder, local Parquet files, or a Hugging Face data set read as a stream.

A source is a list of parts. A part yields its items in a fixed order. After any item it has a position, as JSON, from
which another process can resume with the next item. No image is decoded here.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from vultus._download import HUB
from vultus.data.items import Item, Part, Position, Source
from vultus.data.photo_folder import FolderPart
from vultus.data.tables import hub, local_parquet, parquet_files
from vultus.errors import UserError
from vultus.images.io import photo_suffixes

__all__ = ["FolderPart", "Item", "Part", "Position", "Source", "is_on_hub", "open_source"]


def open_source(
    source: str,
    split: str | None = None,
    *,
    revision: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
) -> Source:
    """Open a folder of photos, local Parquet files, or a Hugging Face data set.

    Args:
        source: a folder, a Parquet file, a glob of Parquet files, or a data set of the hub: its id user/name, or
            hf://user/name[@revision].
        split: read only this split of the source.
        revision: of an earlier call; a Hugging Face data set is read at this revision, other sources ignore it.
        image_column: the column of the images (tables.IMAGE).
        id_column: the column of the identities (default: the first of tables.IDENTITY that is there).

    Raises UserError if there is no such source, it has no photos, it has no such split, or a column is missing or holds
    something else.
    """
    columns = {"image_column": image_column, "id_column": id_column}
    path = Path(source)
    try:
        if path.is_dir():
            # A local copy of a Hugging Face data set has its Parquet files in a sub-folder.
            files = parquet_files(path) or (None if _has_photo(path) else parquet_files(path, "*/*.parquet"))
            return local_parquet(source, files, split, **columns) if files else _folder(source, split, columns)
    except OSError as error:
        raise UserError(
            f"{error.filename or source}: can't be read ({error.strerror}); change its permissions"
        ) from None
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise UserError(f"{source}: not a folder of photos, a Parquet file or a Hugging Face data set")
        return local_parquet(source, [path], split, **columns)
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if name.endswith(".parquet")]
        if not files:
            raise UserError(f"{source}: no Parquet file matches")
        return local_parquet(source, files, split, **columns)
    if is_on_hub(source):
        name, _, given = source.removeprefix(HUB).partition("@")
        return hub(name, split, given or revision, **columns)
    raise UserError(f"{source}: no such file or folder, and not the id of a Hugging Face data set (user/name)")


def is_on_hub(source: str) -> bool:
    """Whether `source`, for which there is no file or folder, has the form of the id of a data set."""
    if source.startswith(HUB):
        return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]*\w(@.+)?", source.removeprefix(HUB)))
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", source)) and not source.endswith(".parquet")


def _folder(source: str, split: str | None, columns: dict[str, str | None]) -> Source:
    given = {"--split": split} | {f"--{name.replace('_', '-')}": value for name, value in columns.items()}
    for option, value in given.items():
        if value is not None:
            kind = "splits" if option == "--split" else "columns"
            raise UserError(f"{source}: a folder of photos has no {kind}; leave {option} out")
    part = FolderPart(Path(source))
    if part.total == 0:
        others = "".join(f"; {line}" for line in part.survey.others())
        kinds = ", ".join(sorted(photo_suffixes()))
        raise UserError(f"{source}: no photos in this folder (looked for {kinds}, and for *.parquet){others}")
    return Source([part], "", part.survey.identities())


def _has_photo(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in photo_suffixes() for entry in entries)

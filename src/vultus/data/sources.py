"""Where photos come from: a folder, local Parquet files, or a Hugging Face data set read as a stream.

A source is a list of parts. A part yields its items in a fixed order. After any item it has a position, as JSON, from
which another process can resume with the next item. No image is decoded here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vultus.errors import UserError
from vultus.images.io import SUFFIXES, BadImage

MAX_FILE_BYTES = 200_000_000  # a larger file is not a photo and could fill the memory
IMAGE, PERSON = "image", "celeb_id"  # columns as in the data set flwrlabs/celeba; others are ignored
SCHEMA_HINT = f"columns needed: {IMAGE!r} (struct of bytes, path) and, for identities, {PERSON!r} (number or text)"

Position = dict[str, Any]  # JSON


@dataclass(frozen=True, slots=True)
class Item:
    """One photo of a source, not decoded: its bytes, or the path of its file."""

    key: str
    identity: str
    data: bytes | Path | None

    def read(self) -> bytes:
        """The encoded image. Raises OSError if the file cannot be read, BadImage if it is missing or too large."""
        if self.data is None:
            raise BadImage("no image in this row")
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

    def items(self, position: Position | None) -> Generator[Item, None, None]:
        """The items after `position` (None: all items)."""
        ...

    def position(self) -> Position:
        """The position after the item that `items` yielded last."""
        ...


@dataclass(frozen=True)
class Source:
    """Parts in reading order: "test" before "train", so that the identities of the test split are known first.

    `revision` changes with the files of the source, as far as this can be checked without reading them.
    """

    parts: Sequence[Part]
    revision: str

    @property
    def has_splits(self) -> bool:
        """Whether the source has both a train and a test split."""
        return {part.split for part in self.parts} >= {"train", "test"}


def open_source(source: str, split: str | None = None, *, revision: str | None = None) -> Source:
    """Open a folder of photos, local Parquet files, or a Hugging Face data set.

    Args:
        source: a folder, a Parquet file, a glob of Parquet files, or the id user/name of a data set.
        split: read only this split of the source.
        revision: of an earlier call; a Hugging Face data set is read at this revision, other sources ignore it.

    Raises UserError if there is no such source, it has no photos, or it has no such split.
    """
    path = Path(source)
    if path.is_dir():
        # A local copy of a Hugging Face data set has its Parquet files in a sub-folder.
        files = _parquet_files(path) or (None if _has_photo(path) else _parquet_files(path, "*/*.parquet"))
        if files:
            return _local_parquet(source, files, split)
        if split is not None:
            raise UserError(f"{source}: a folder of photos has no splits; leave --split out")
        part = FolderPart(path)
        if part.total == 0:
            kinds = ", ".join(sorted(SUFFIXES))
            raise UserError(f"{source}: no photos in this folder (looked for {kinds}, and for *.parquet)")
        return Source([part], "")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise UserError(f"{source}: not a folder of photos, a Parquet file or a Hugging Face data set")
        return _local_parquet(source, [path], split)
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if name.endswith(".parquet")]
        if not files:
            raise UserError(f"{source}: no Parquet file matches")
        return _local_parquet(source, files, split)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", source) and not source.endswith(".parquet"):
        return _hub(source, split, revision)
    raise UserError(f"{source}: no such file or folder, and not the id of a Hugging Face data set (user/name)")


# --- a folder of photos ----------------------------------------------------------------------------------------------


class FolderPart:
    """Photos in a folder and its sub-folders, ordered by path. The top-level sub-folder is the identity."""

    def __init__(self, folder: Path) -> None:
        """Counts the photos, which lists every folder."""
        self.folder = folder
        self.split: str | None = None
        self.total: int | None = sum(1 for _ in _walk(folder))
        self._last: list[str] = []

    def items(self, position: Position | None) -> Generator[Item, None, None]:
        """Items after the path in `position`. The listing of one folder at a time is in memory."""
        self._last = list(position["last"]) if position else []
        for parts, path in _walk(self.folder, after=tuple(self._last)):
            self._last = list(parts)
            key = "/".join(parts)
            yield Item(key, parts[0] if len(parts) > 1 else key, path)

    def position(self) -> Position:
        """The path of the last item."""
        return {"last": self._last}


def _walk(
    folder: Path,
    prefix: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[tuple[tuple[str, ...], Path]]:
    """(path parts, path) of every photo whose parts are greater than `after`, in order."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a parent folder, which would never end
        return
    with os.scandir(folder) as entries:
        # Keys are stored as UTF-8; a name that is not UTF-8 gets escapes.
        named = [(os.fsencode(entry.name).decode("utf-8", "backslashreplace"), entry) for entry in entries]
    for name, entry in sorted(named, key=lambda pair: pair[0]):
        if name.startswith("."):
            continue
        parts = (*prefix, name)
        if _is(entry.is_dir):
            if parts >= after[: len(parts)]:
                yield from _walk(Path(entry.path), parts, after, above | {here})
        elif parts > after and os.path.splitext(name)[1].lower() in SUFFIXES and _is(entry.is_file):
            yield parts, Path(entry.path)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a broken link or one to itself
        return False


def _has_photo(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in SUFFIXES for entry in entries)


# --- Parquet, local or on the hub ------------------------------------------------------------------------------------


class StreamPart:
    """One split of a data set, read with `datasets` as a stream."""

    def __init__(self, name: str, stream: Any, split: str, total: int | None, source: str, has_person: bool) -> None:
        """`stream` has the columns that `_stream_part` selects; `source` is for error messages."""
        self.name = name
        self.split: str | None = split
        self.total = total
        self.source = source
        self._stream = stream
        self._start = stream.state_dict()
        self._has_person = has_person
        self._row = 0

    def items(self, position: Position | None) -> Generator[Item, None, None]:
        """Rows after `position`. Raises UserError if the stream fails."""
        self._row = position["row"] if position else 0
        self._stream.load_state_dict(position["stream"] if position else self._start)
        rows = iter(self._stream)
        try:
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except Exception as error:  # pyarrow, fsspec and huggingface_hub have their own exception classes
                    raise UserError(
                        f"{self.source}: reading broke off at row {self._row} of {self.name} ({_reason(error)}); "
                        "what is done is kept: repair the source or the network and run the same command again"
                    ) from error
                image = row[IMAGE] or {}
                key = image.get("path") or f"{self.name}/{self._row:07d}"
                person = row[PERSON] if self._has_person else None
                self._row += 1
                yield Item(key, key if person is None else str(person), image.get("bytes"))
        finally:
            # Generators that stay open would print errors when the interpreter exits.
            rows.close()

    def position(self) -> Position:
        """The state of the stream after the last row, and the number of that row."""
        return {"row": self._row, "stream": self._stream.state_dict()}


def _parquet_files(folder: Path, pattern: str = "*.parquet") -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(".") and path.is_file())


def split_of(name: str) -> str:
    """The use of a split: "test" for test, valid, validation, val and dev, "train" for any other."""
    return "test" if re.match(r"(test|valid|validation|val|dev)([-_.\d]|$)", name.lower()) else "train"


def split_name(file: Path) -> str:
    """The split at the start of a file name: test-00000-of-00002.parquet -> test; "train" if there is none."""
    match = re.match(r"(train|test|validation|valid|val|dev)([-_.\d]|$)", file.name.lower())
    return match[1] if match else "train"


def _local_parquet(source: str, files: list[Path], split: str | None) -> Source:
    import pyarrow.parquet

    splits: dict[str, list[Path]] = {}
    rows: dict[str, int] = {}
    revision = hashlib.sha256()
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                columns, count = parquet.schema_arrow.names, parquet.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{file}: can't be read as Parquet ({_reason(error)}); fetch it again or move it away"
            ) from None
        if IMAGE not in columns:
            raise UserError(f"{file}: {_no_image(columns)}")
        name = split_name(file)
        splits.setdefault(name, []).append(file)
        rows[name] = rows.get(name, 0) + count
        revision.update(f"{file.name} {file.stat().st_size} {count}\n".encode("utf-8", "backslashreplace"))
    _check_split(source, split, splits)
    names = sorted(name for name in splits if split in (None, name))
    if not sum(rows[name] for name in names):
        raise UserError(f"{source}: no rows in its Parquet files")
    datasets = _datasets()
    parts = []
    for name in names:
        paths = [glob.escape(str(path.absolute())) for path in splits[name]]
        try:
            stream = datasets.load_dataset("parquet", data_files={name: paths}, split=name, streaming=True)
            parts.append(_stream_part(name, stream, rows[name], source))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{source}: can't be read as Parquet ({_reason(error)})") from None
    return _in_order(parts, revision.hexdigest())


def _hub(source: str, split: str | None, revision: str | None) -> Source:
    datasets = _datasets()
    import huggingface_hub

    try:
        # A single request first: without a network load_dataset would retry for half a minute.
        sha = str(huggingface_hub.HfApi().dataset_info(source, revision=revision, timeout=20).sha)
        streams = datasets.load_dataset(source, revision=sha, streaming=True)
        _check_split(source, split, streams)
        parts = []
        for name in sorted(name for name in streams if split in (None, name)):
            info = (streams[name].info.splits or {}).get(name)
            parts.append(_stream_part(name, streams[name], info.num_examples if info else None, source))
    except UserError:
        raise
    except huggingface_hub.errors.GatedRepoError:
        raise UserError(
            f"{source}: access to this data set is restricted; request access on its page, then `hf auth login`"
        ) from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(
            f"{source}: no such local folder, and no such data set on the hub, or a private one; check the name, or "
            "`hf auth login`"
        ) from None
    except Exception as error:  # each layer below has its own exception classes
        raise UserError(
            f"{source}: no such local folder, and as a Hugging Face data set it can't be opened ({_reason(error)}); "
            "check the name, the network, and `hf auth login` if access is restricted"
        ) from None
    return _in_order(parts, sha)


def _stream_part(name: str, stream: Any, total: int | None, source: str) -> StreamPart:
    import datasets

    columns = stream.column_names or list(next(iter(stream.take(1)), {}))
    if IMAGE not in columns:
        raise UserError(f"{source}: {_no_image(columns)}")
    has_person = PERSON in columns
    stream = stream.select_columns([IMAGE, PERSON] if has_person else [IMAGE])
    stream = stream.cast_column(IMAGE, datasets.Image(decode=False))
    return StreamPart(name, stream, split_of(name), total or None, source, has_person)


def _in_order(parts: list[StreamPart], revision: str) -> Source:
    ordered: list[StreamPart] = sorted(parts, key=lambda part: (part.split != "test", part.name))
    return Source(ordered, revision)


def _no_image(columns: Sequence[str]) -> str:
    return f"has no column {IMAGE!r} (it has {', '.join(columns[:8])}); {SCHEMA_HINT}"


def _check_split(source: str, split: str | None, splits: Any) -> None:
    if split is not None and split not in splits:
        raise UserError(f"{source}: has no split {split!r}; it has {', '.join(sorted(splits))}")


def _datasets() -> Any:
    """The `datasets` library without its progress bars and retry messages."""
    import datasets
    from huggingface_hub.utils import logging

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    return datasets


def _reason(error: BaseException) -> str:
    """The first line of an error message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__

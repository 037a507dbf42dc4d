"""Parquet files and Hugging Face data sets as a source: which columns are read, and the rows as a stream."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vultus.data.items import ONE_PER_IMAGE, Item, Position, Source, counted
from vultus.data.parquet_part import ParquetPart, broke_off, row_item
from vultus.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE = "image"  # the column of the image, unless another one is named
# Columns that are taken for the identity, the first of them that holds numbers or text.
IDENTITY = ("celeb_id", "identity", "identity_id", "person", "person_id", "subject", "subject_id", "label")

Columns = tuple[str, str | None]  # of the image and of the identity


class StreamPart:
    """One split of a data set, read with `datasets` as a stream."""

    seekable = False

    def __init__(
        self,
        name: str,
        stream: Any,
        split: str,
        total: int | None,
        source: str,
        columns: Columns,
        *,
        identity_required: bool = False,
    ) -> None:
        """`stream` has the two `columns`; `source` is for error messages."""
        self.name = name
        self.split: str | None = split
        self.total = total
        self.source = source
        self._stream = stream
        self._start = stream.state_dict()
        self._image, self._identity = columns
        self._required = identity_required
        self._row = 0

    def items(self, position: Position | None) -> Generator[Item, None, None]:
        """Rows after `position`. Raises UserError if the stream fails, or a row lacks an identity that is required.

        A position without the state of the stream is reached by reading all rows before it.
        """
        self._row = position["row"] if position else 0
        state = position.get("stream") if position else None
        self._stream.load_state_dict(state or self._start)
        stream = iter(self._stream)
        rows = stream if state else itertools.islice(stream, self._row, None)
        try:
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except Exception as error:  # pyarrow, fsspec and huggingface_hub have their own exception classes
                    raise broke_off(self.source, self.name, self._row, _reason(error)) from error
                item = row_item(
                    self._row,
                    row[self._image],
                    row[self._identity] if self._identity else None,
                    source=self.source,
                    name=self.name,
                    column=self._identity,
                    required=self._required,
                )
                self._row += 1
                yield item
        finally:
            # Generators that stay open would print errors when the interpreter exits.
            stream.close()

    def position(self) -> Position:
        """The state of the stream after the last row, and the number of that row."""
        return {"row": self._row, "stream": self._stream.state_dict()}


# --- columns ---------------------------------------------------------------------------------------------------------


def choose_columns(schemas: Mapping[str, pa.Schema], image_column: str | None, id_column: str | None) -> Columns:
    """The columns of image and identity in all of these schemas (by the names of their files or splits).

    Raises UserError, which lists the columns, for one that is missing or of a type that cannot be used.
    """
    image = image_column or IMAGE
    for where, schema in schemas.items():
        option = f"--image-column {image}" if image_column else f"column {image!r}"
        if image not in schema.names:
            remedy = "name another column" if image_column else "name the one of the images with --image-column"
            raise UserError(f"{where}: {option}: no such column; it has {_listed(schema)}; {remedy}")
        if not _holds_images(schema.field(image).type):
            raise UserError(
                f"{where}: {option} does not hold images, which are bytes or a struct of bytes and path; it has "
                f"{_listed(schema)}; name another one with --image-column"
            )
        if id_column is not None and id_column not in schema.names:
            raise UserError(
                f"{where}: --id-column {id_column}: no such column; it has {_listed(schema)}; name another column"
            )
        if id_column is not None and not _holds_identities(schema.field(id_column).type):
            raise UserError(
                f"{where}: --id-column {id_column} does not hold numbers or text; it has {_listed(schema)}; name "
                "another column"
            )
    if id_column is not None:
        return image, id_column
    for name in IDENTITY:
        having = [where for where, schema in schemas.items() if _has_identity(schema, name)]
        if len(having) == len(schemas):
            return image, name
        if having:
            lacking = next(where for where in schemas if where not in having)
            raise UserError(
                f"{lacking}: has no column {name!r}, by which {having[0]} names its people; it has "
                f"{_listed(schemas[lacking])}; name a column of both with --id-column, or read them apart"
            )
    return image, None


def _has_identity(schema: pa.Schema, name: str) -> bool:
    return name in schema.names and _holds_identities(schema.field(name).type)


def _holds_images(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_identities(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (types.is_integer, types.is_floating, types.is_string, types.is_large_string))


def _listed(schema: pa.Schema) -> str:
    shown = [f"{field.name} ({str(field.type).partition('<')[0]})" for field in list(schema)[:10]]
    return ", ".join(shown) + (f" and {len(schema) - 10} more" if len(schema) > 10 else "")


def _missing(files: Sequence[Path], column: str) -> dict[Path, tuple[int, int]]:
    """{file: (rows without a value in the column, the first of them)} for the files that have such rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    missing = {}
    for file in files:
        values = pq.read_table(file, columns=[column]).column(0)
        mask = pc.is_null(values, nan_is_null=True)
        if count := pc.sum(mask).as_py() or 0:
            missing[file] = (count, pc.index(mask, True).as_py())
    return missing


def identities_from(columns: Columns) -> str:
    """Where the identities come from, in words; see Source."""
    return ONE_PER_IMAGE if columns[1] is None else f"column {columns[1]}"


# --- Parquet files ---------------------------------------------------------------------------------------------------


def parquet_files(folder: Path, pattern: str = "*.parquet") -> list[Path]:
    """The Parquet files in a folder that are not hidden, in order."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(".") and path.is_file())


def split_of(name: str) -> str:
    """The use of a split: "test" for test, valid, validation, val and dev, "train" for any other."""
    return "test" if re.match(r"(test|valid|validation|val|dev)([-_.\d]|$)", name.lower()) else "train"


def split_name(file: Path) -> str:
    """The split at the start of a file name: test-00000-of-00002.parquet -> test; "train" if there is none."""
    match = re.match(r"(train|test|validation|valid|val|dev)([-_.\d]|$)", file.name.lower())
    return match[1] if match else "train"


def local_parquet(
    source: str, files: list[Path], split: str | None, *, image_column: str | None, id_column: str | None
) -> Source:
    """Local Parquet files as a source. Raises UserError as `open_source` does."""
    import pyarrow
    import pyarrow.parquet

    splits: dict[str, list[Path]] = {}
    counts: dict[Path, int] = {}
    schemas: dict[Path, pa.Schema] = {}
    revision = hashlib.sha256()
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                schemas[file], counts[file] = parquet.schema_arrow, parquet.metadata.num_rows
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8
            raise UserError(
                f"{file}: can't be read as Parquet ({_reason(error)}); fetch it again or move it away"
            ) from None
        splits.setdefault(split_name(file), []).append(file)
        revision.update(f"{file.name} {file.stat().st_size} {counts[file]}\n".encode("utf-8", "backslashreplace"))
    check_split(source, split, splits)
    names = _in_order(splits, split)
    read = [file for name in names for file in splits[name]]
    columns = choose_columns({str(file): schemas[file] for file in read}, image_column, id_column)
    if not sum(counts[file] for file in read):
        raise UserError(f"{source}: no rows in its Parquet files")
    notes = _check_identities(read, columns, schemas, required=id_column is not None)
    parts = [
        ParquetPart(
            name,
            split_of(name),
            [(file, counts[file]) for file in splits[name]],
            source,
            columns,
            identity_required=id_column is not None,
        )
        for name in names
    ]
    return Source(parts, revision.hexdigest(), identities_from(columns), columns, notes)


def _check_identities(
    files: list[Path], columns: Columns, schemas: Mapping[Path, pa.Schema], *, required: bool
) -> tuple[str, ...]:
    """A note on rows without an identity. Raises UserError if there are any and the column is `required`."""
    import pyarrow

    if columns[1] is None:
        return ()
    try:
        missing = _missing(files, columns[1])
    except (pyarrow.ArrowException, OSError, ValueError):
        return ()  # a damaged page: reported with its row when the rows are read
    if missing and required:
        file, (count, first) = next(iter(missing.items()))
        raise UserError(
            f"{file}: --id-column {columns[1]} has no value in {counted(count, 'row')} (the first: row {first}); it "
            f"has {_listed(schemas[file])}; name another column, or leave these rows out"
        )
    if missing:
        count = sum(count for count, _ in missing.values())
        return (f"{counted(count, 'row')} without {columns[1]}, each counted as a person of its own",)
    return ()


# --- the hub ---------------------------------------------------------------------------------------------------------


def hub(
    source: str, split: str | None, revision: str | None, *, image_column: str | None, id_column: str | None
) -> Source:
    """A data set on the Hugging Face hub as a source. Raises UserError as `open_source` does."""
    datasets = datasets_library()
    import huggingface_hub

    with hub_errors(source, "no such local folder, and "):
        # A single request first: without a network load_dataset would retry for half a minute.
        sha = str(huggingface_hub.HfApi().dataset_info(source, revision=revision, timeout=20).sha)
        streams = datasets.load_dataset(source, revision=sha, streaming=True)
        check_split(source, split, streams)
        names = _in_order(streams, split)
        schemas = {f"{source}, split {name}": _schema(streams[name]) for name in names}
        columns = choose_columns(schemas, image_column, id_column)
        parts = []
        for name in names:
            info = (streams[name].info.splits or {}).get(name)
            total = info.num_examples if info else None
            parts.append(_stream_part(name, streams[name], total, source, columns, id_column is not None))
    return Source(parts, sha, identities_from(columns), columns)


@contextlib.contextmanager
def hub_errors(source: str, before: str = "") -> Iterator[None]:
    """Turn the errors of the hub's libraries into UserError, a line that begins with `source` and then `before`."""
    import datasets
    import huggingface_hub

    restricted = f"{source}: access to this data set is restricted; request access on its page, then `hf auth login`"
    try:
        yield
    except UserError:
        raise
    except huggingface_hub.errors.GatedRepoError:
        raise UserError(restricted) from None
    except huggingface_hub.errors.RevisionNotFoundError:
        raise UserError(f"{source}: this data set has no such revision; check the name after the @") from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(
            f"{source}: {before}no such data set on the hub, or a private one; check the name, or `hf auth login`"
        ) from None
    except Exception as error:  # each layer below has its own exception classes
        if isinstance(error, datasets.exceptions.DatasetNotFoundError) and "gated" in str(error):
            raise UserError(restricted) from None
        reason = _reason(error)
        what = "and as a Hugging Face data set it can't be opened" if before else "can't be opened"
        raise UserError(
            f"{source}: {before.removesuffix('and ')}{what} ({reason}); check the name, the network, and "
            "`hf auth login` if access is restricted"
        ) from None


def _schema(stream: Any) -> pa.Schema:
    """The columns of a stream; where the data set does not declare them, those of its first row."""
    import datasets

    features = stream.features
    if features is None:
        first: dict[str, Any] = next(iter(stream.take(1)), {})
        features = datasets.Dataset.from_list([first]).features if first else datasets.Features()
    return features.arrow_schema


def _stream_part(
    name: str, stream: Any, total: int | None, source: str, columns: Columns, identity_required: bool
) -> StreamPart:
    import datasets

    image, identity = columns
    stream = stream.select_columns([image] if identity is None else [image, identity])
    stream = stream.cast_column(image, datasets.Image(decode=False))
    return StreamPart(name, stream, split_of(name), total or None, source, columns, identity_required=identity_required)


def _in_order(splits: Iterable[str], split: str | None) -> list[str]:
    """The splits that are read, those for test first."""
    return sorted((name for name in splits if split in (None, name)), key=lambda name: (split_of(name) != "test", name))


def check_split(source: str, split: str | None, splits: Any) -> None:
    """Raise UserError if the source has no such split."""
    if split is not None and split not in splits:
        raise UserError(f"{source}: has no split {split!r}; it has {', '.join(sorted(splits))}")


def datasets_library() -> Any:
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

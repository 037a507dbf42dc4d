"""Embeddings in tables: Parquet, CSV, JSON, and prepared data sets."""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from vultus._files import read_json
from vultus.data.integrity import check_shards
from vultus.data.manifest import read_manifest
from vultus.errors import UserError
from vultus.sampling.embedding_rows import (
    CHUNK,
    DAMAGED,
    HEADER,
    Embeddings,
    Needed,
    array_rows,
    encoder_in,
    reading,
    without_name,
)

KEYS = ("key", "name", "file", "path", "image", "")  # of the column that names the photo; pandas' index has no name
BLOCK = 1 << 22  # bytes of a CSV file that are read at a time


def read_parquet(source: str, path: Path, name: str | None, needed: Needed) -> Embeddings:
    """Open a column of a Parquet file. Raises UserError."""
    name = name or "embedding"
    with pq.ParquetFile(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    header = (schema.metadata or {}).get(HEADER.encode())
    if name not in schema.names:
        raise UserError(
            f"{path}: has no column {name!r}; it has {', '.join(schema.names[:12])}; select one with {path}:COLUMN"
        )
    _check_column(f"{source}: column {name!r}", schema.field(name).type)
    if not count:
        raise UserError(f"{source}: holds no embeddings; give at least one")
    first = next(_parquet_batches(path, name, 1))
    if (length := int(_lengths(first)[0])) >= 0:
        needed.count(source, (count, length), None if header is None else encoder_in(header, source))
    return Embeddings(source, count, needed.dim, functools.partial(_parquet_rows, source, path, name, needed.dim))


def _check_column(what: str, kind: pa.DataType) -> None:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise UserError(f"{what} holds {kind}; a column of lists of floats is needed")
    if not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise UserError(f"{what} holds lists of {kind.value_type}; lists of floats are needed")


def _parquet_batches(path: Path, name: str, size: int) -> Iterator[pa.Array]:
    """The column in batches. With a buffer the file is read page by page, not a whole row group at once."""
    with reading(path), pq.ParquetFile(path, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(batch_size=size, columns=[name]):
            if len(batch):
                yield batch.column(0)


def _lengths(column: pa.Array) -> np.ndarray:
    """Number of values of each row; -1 where there is no list."""
    lengths: np.ndarray = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    return lengths


def _parquet_rows(source: str, path: Path, name: str, dim: int) -> Iterator[np.ndarray]:
    start = 0
    for column in _parquet_batches(path, name, CHUNK):
        lengths = _lengths(column)
        if len(wrong := np.flatnonzero(lengths != dim)):
            row = int(wrong[0])
            content = "no embedding" if lengths[row] < 0 else f"{lengths[row]} values"
            raise UserError(f"{source}: row {start + row} holds {content}, not {dim}; leave it out or compute it again")
        values = column.flatten()
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // dim
            raise UserError(f"{source}: row {start + row} has a missing value; leave it out or compute it again")
        yield values.to_numpy().reshape(-1, dim)
        start += len(column)


# --- CSV --------------------------------------------------------------------------------------------------------------


def read_csv(source: str, path: Path, name: str | None, needed: Needed) -> Embeddings:
    """Open a CSV file, with or without a line of names. Raises UserError."""
    without_name(source, path, name)
    layout = _layout(source, path)
    count = sum(len(batch) for batch in _csv_batches(path, layout, layout.vector[:1]))
    needed.count(source, (count, len(layout.vector)))
    return Embeddings(source, count, needed.dim, functools.partial(_csv_rows, path, layout))


@dataclass(frozen=True)
class _Layout:
    """The columns of a CSV file: their number, the places of those of the vector, and whether the first line names
    them."""

    columns: int
    vector: range
    named: bool


def _layout(source: str, path: Path) -> _Layout:
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            first, second = itertools.islice(itertools.chain(csv.reader(file), ([], [])), 2)
    except csv.Error as error:
        raise UserError(f"{source}: not a readable .csv file ({error}); it may be {DAMAGED}") from None
    numbers = [text for text in first if _is_number(text)]
    # pandas names the columns 0, 1, 2, ... unless it is told otherwise.
    named = not numbers or numbers == [str(number) for number in range(len(numbers))]
    values = second if named else first
    if not values:
        raise UserError(f"{source}: holds no embeddings; give at least one")
    numeric = [not text or _is_number(text) for text in values]
    keys = [place for place, text in enumerate(first) if named and text.strip() in KEYS]
    keys = keys or [place for place, is_number in enumerate(numeric) if not is_number]
    # The vector is the first run of numbers behind the key.
    behind = range(keys[0] + 1 if keys else 0, len(numeric))
    begin = next((place for place in behind if numeric[place]), None)
    if begin is None:
        raise UserError(f"{source}: has no columns of numbers behind its key; a row is a key and a vector")
    end = next((place for place in range(begin, len(numeric)) if not numeric[place]), len(numeric))
    return _Layout(len(first), range(begin, end), named)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _csv_batches(path: Path, layout: _Layout, places: range) -> Iterator[pa.RecordBatch]:
    names = [str(place) for place in range(layout.columns)]
    chosen = [names[place] for place in places]
    read = pa_csv.ReadOptions(column_names=names, skip_rows=int(layout.named), block_size=BLOCK, use_threads=False)
    convert = pa_csv.ConvertOptions(include_columns=chosen, column_types=dict.fromkeys(chosen, pa.float64()))
    with reading(path), pa_csv.open_csv(path, read_options=read, convert_options=convert) as batches:
        yield from batches


def _csv_rows(path: Path, layout: _Layout) -> Iterator[np.ndarray]:
    for batch in _csv_batches(path, layout, layout.vector):
        # A missing value becomes NaN, which is reported with its row.
        rows = np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
        for start in range(0, len(rows), CHUNK):
            yield rows[start : start + CHUNK]


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json_file(source: str, path: Path, name: str | None, needed: Needed) -> Embeddings:
    """Read a JSON file as a whole: what `vultus embed`, the page or the API writes, or lists. Raises UserError."""
    without_name(source, path, name)
    found, encoder = _in_json(read_json(path), source)
    if not found:
        needed.count(source, (0,), encoder)
    rows = np.zeros((len(found), needed.dim))
    for number, row in enumerate(found):
        if not isinstance(row, list) or any(type(value) not in (int, float) for value in row):
            raise UserError(f"{source}: row {number} is no list of numbers; leave it out or compute it again")
        if not number:
            needed.count(source, (len(found), len(row)), encoder)
        if len(row) != needed.dim:
            raise UserError(
                f"{source}: row {number} holds {len(row)} values, not {needed.dim}; leave it out or compute it again"
            )
        try:
            rows[number] = row
        except OverflowError:  # an integer beyond the range of float64
            rows[number] = np.inf
    return Embeddings(source, len(rows), needed.dim, functools.partial(array_rows, rows))


def _in_json(value: Any, source: str) -> tuple[list[Any], dict[str, Any] | None]:
    """The rows in a JSON value, not checked, and their encoder, if it is named."""
    if isinstance(value, list):
        return (value if value and isinstance(value[0], list) else [value] if value else []), None
    if isinstance(value, dict):
        header, named = value.get(HEADER), value.get("encoder")  # the page gives the id alone
        encoder = {"id": named} if header is None and isinstance(named, str) else None
        encoder = encoder if header is None else encoder_in(header, source)
        if isinstance(rows := value.get("embeddings"), list):
            return rows, encoder
        if "embedding" in value:
            return [value["embedding"]], encoder
        faces = value.get("faces")
        if isinstance(faces, list) and all(isinstance(face, dict) and "embedding" in face for face in faces):
            return [face["embedding"] for face in faces], encoder
    raise UserError(f'{source}: holds no embedding; a list of numbers or {{"embedding": [...]}} is needed')


# --- prepared data sets -----------------------------------------------------------------------------------------------


def read_folder(source: str, path: Path, name: str | None, needed: Needed) -> Embeddings:
    """Open a prepared data set. Raises UserError."""
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: not a prepared data set (no manifest.json); prepare it, or give an embedding file")
    manifest = read_manifest(path)
    check_shards(path, manifest)
    splits = manifest["counts"]["splits"]
    if name is not None and name not in splits:
        raise UserError(f"{path}: has no split {name!r}; it has {', '.join(splits)}")
    count = sum(split["images"] for key, split in splits.items() if name in (None, key))
    needed.count(source, (count, manifest["encoder"]["dim"]), manifest["encoder"])
    files = [path / shard["file"] for shard in manifest["shards"]]
    return Embeddings(source, count, needed.dim, functools.partial(_shard_rows, files, name, needed.dim))


def _shard_rows(files: list[Path], split: str | None, dim: int) -> Iterator[np.ndarray]:
    for file in files:
        with reading(file), pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as shard:
            for number in range(shard.num_record_batches):
                batch = shard.get_batch(number)
                column = batch.column("embedding")
                if column.type.list_size != dim:
                    raise UserError(
                        f"{file.parent / 'manifest.json'}: encoder.dim is {dim}, but {file.name} holds "
                        f"{column.type.list_size}; restore the file from a copy, or prepare the data set again"
                    )
                values = column.flatten().to_numpy().reshape(len(column), -1)
                if split is not None:
                    values = values[batch.column("split").to_numpy(zero_copy_only=False) == split]
                for start in range(0, len(values), CHUNK):
                    yield values[start : start + CHUNK].copy()

"""Embeddings of photos that were computed elsewhere: a table of a key and a vector for each photo.

| file | column of the key | vector |
|---|---|---|
| `.parquet` | `key`, `name`, `file`, `path`, `image` or the first of strings | `embedding` or the first of lists |
| `.csv` | the same | all columns of numbers after the key |

A Parquet file that `vultus embed` wrote names its encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from vultus._files import json_value, sha256_file
from vultus.errors import UserError, in_one_line
from vultus.models.encoders import IDS, UNIT

KEYS = ("key", "name", "file", "path", "image")
SUFFIXES = (".parquet", ".csv")
HEADER = b"vultus"  # metadata of the schema; see sampling/photo_embeddings.py


@dataclass(frozen=True)
class EmbeddingTable:
    """The vectors of one encoder, whose network is not at hand.

    Attributes:
        path: the file.
        id: name of the encoder.
        dim: length of a vector.
        normalised: whether the vectors in the file have unit norm.
        sha256: of the file.
        weights_sha256: of the encoder's weights; empty where the table does not say it.
    """

    path: Path
    id: str
    dim: int
    normalised: bool
    sha256: str
    weights_sha256: str
    _rows: dict[str, int]
    _vectors: npt.NDArray[np.float32]

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def vectors(self, keys: Sequence[str]) -> npt.NDArray[np.float32]:
        """The vectors [n, dim] of these keys, unit norm."""
        return self._vectors[[self._rows[key] for key in keys]]

    @property
    def example(self) -> str:
        """The first key."""
        return next(iter(self._rows))

    def entry(self) -> dict[str, Any]:
        """What a data set records about the encoder."""
        return {
            "id": self.id,
            "dim": self.dim,
            "weights_sha256": self.weights_sha256,
            "dtype": "float32",
            "normalised": self.normalised,
            "table_sha256": self.sha256,
        } | ({} if self.id in IDS else {"network": False})


def read_table(path: str | Path, name: str | None = None) -> EmbeddingTable:
    """Read a table; `name` is that of the encoder, by default the name of the file.

    Raises UserError that names the file and the row for a table that cannot be read, two rows of one key, and vectors
    of different lengths, that are not finite, or zero.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--embeddings {path}: no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--embeddings {path}: a table is {' or '.join(SUFFIXES)}, with a key and a vector in each row")
    try:
        table = pq.read_table(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
        table.validate(full=True)
        names = table.schema.names  # of bytes that may not be UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"--embeddings {path}: cannot be read ({in_one_line(error)[:120]}); write it again") from None
    if len(set(names)) < len(names):
        raise UserError(f"--embeddings {path}: two of its columns have the same name; rename or drop one")
    if not table.num_rows:
        raise UserError(f"--embeddings {path}: holds no row")
    column = _key_column(path, table.schema)
    keys = table[column].to_pylist()
    rows: dict[str, int] = {}
    for number, key in enumerate(keys):
        if not isinstance(key, str) or not key:
            raise UserError(f"--embeddings {path}: row {number} has no {column}; leave it out")
        if key in rows:
            raise UserError(
                f"--embeddings {path}: rows {rows[key]} and {number} have the same {column}, {key!r}; a photo has one "
                "vector: leave one out"
            )
        rows[key] = number
    values = _vectors(path, table, column)
    # Divide by the largest entry first: the square of a very small or large one is out of the range of float64.
    largest = np.abs(values).max(1, keepdims=True)
    for wrong, what in (
        (~np.isfinite(values).all(1), "values that are not finite"),
        (largest[:, 0] == 0, "only zeros"),
    ):
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            raise UserError(f"--embeddings {path}: row {number} ({keys[number]}) holds {what}; leave it out")
    scaled = values / largest
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    normalised = bool(np.abs(lengths * largest - 1).max() < UNIT)
    vectors = (scaled / lengths).astype(np.float32)
    known = {} if name else _encoder_of(table.schema)
    return EmbeddingTable(
        path,
        name or known.get("id", path.stem),
        vectors.shape[1],
        normalised,
        sha256_file(path),
        known.get("weights_sha256", ""),
        rows,
        vectors,
    )


def _encoder_of(schema: pa.Schema) -> dict[str, str]:
    """Id and weights_sha256 of the encoder, from the header of `vultus embed`; empty without one."""
    try:
        encoder = json_value((schema.metadata or {}).get(HEADER, b"{}"))["encoder"]
        return {key: str(encoder[key]) for key in ("id", "weights_sha256")}
    except (ValueError, KeyError, TypeError):
        return {}


def _read_csv(path: Path) -> pa.Table:
    with open(path, encoding="utf-8", errors="replace") as file:
        names = [name.strip().strip('"') for name in file.readline().split(",")]
    # The key stays text: 000001 is not 1.
    text = {name: pa.string() for name in names if name in KEYS} or {names[0]: pa.string()}
    return pa_csv.read_csv(path, convert_options=pa_csv.ConvertOptions(column_types=text))


def _key_column(path: Path, schema: pa.Schema) -> str:
    strings = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    found = next((name for name in (*KEYS, *strings) if name in strings), None)
    if found is None:
        raise UserError(
            f"--embeddings {path}: no column of strings (it has {', '.join(schema.names[:6])}); a column `key` that "
            "names the photo is needed"
        )
    return found


def _vectors(path: Path, table: pa.Table, key: str) -> npt.NDArray[np.float64]:
    """The vectors [N, dim], as stored."""
    lists = [field.name for field in table.schema if _is_list(field.type)]
    if lists:
        column = table["embedding" if "embedding" in lists else lists[0]].combine_chunks()
        rows = column.to_pylist()
        dim = len(rows[0] or ())
        for number, row in enumerate(rows):
            if row is None or len(row) != dim or not dim or None in row:
                held = "no vector" if not row or None in row else f"{len(row)} numbers"
                raise UserError(
                    f"--embeddings {path}: row {number} holds {held}, the first row {dim}; all vectors must have one "
                    "length"
                )
        return np.asarray(rows, np.float64)
    after = table.schema.names[table.schema.names.index(key) + 1 :]
    columns = [name for name in after if _is_number(table.schema.field(name).type)]
    if not columns:
        raise UserError(f"--embeddings {path}: no column of lists, and no columns of numbers after `{key}`")
    values = [table[name].to_numpy(zero_copy_only=False) for name in columns]
    return np.stack(values, 1).astype(np.float64)


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and _is_number(kind.value_type))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))

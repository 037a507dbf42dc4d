"""Read face embeddings from a file or a prepared data set, in chunks.

A source is `PATH` or `PATH:NAME`:

| file | read | NAME |
|---|---|---|
| `.npy` | rows of the array | |
| `.npz` | rows of one array of the archive | the array; without it `embeddings`, `embedding` or the first |
| `.safetensors` | rows of one tensor | the tensor; as for `.npz` |
| `.parquet` | a column of lists | the column; without it `embedding` |
| folder | the embeddings of a prepared data set | the split; without it all rows |

Arrays are [N, dim], or [dim] for one embedding. Memory does not grow with N.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors
import torch
from torch import Tensor

from vultus.data.integrity import check_shards
from vultus.data.manifest import read_manifest
from vultus.errors import UserError

CHUNK = 1024  # rows that are read at a time
SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")
_PREFERRED = ("embeddings", "embedding")
_DAMAGED = "truncated or damaged; write it again"


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of one source, opened but not read.

    Attributes:
        source: as the user wrote it.
        count: number of rows.
        dim: length of each.
    """

    source: str
    count: int
    dim: int
    _rows: Callable[[], Iterator[np.ndarray]]

    def chunks(self) -> Iterator[Tensor]:
        """Yield float32 tensors [n <= CHUNK, dim] of unit-norm rows, in the order of the file.

        Raises UserError that names source and row if a row is not finite or all zero, or the file ends too soon.
        """
        for _, rows in self._checked():
            yield torch.from_numpy(rows)

    def check(self) -> None:
        """Read the whole source once, so that a bad row is reported before the work starts.

        Prints a note on stderr, once, if the rows are not of unit norm. Raises UserError as `chunks` does.
        """
        worst = max((float(np.abs(norms - 1).max()) for norms, _ in self._checked()), default=0.0)
        if worst > 1e-3:
            print(f"note: {self.source}: norms differ from 1 by up to {worst:.3g}; normalised", file=sys.stderr)

    def row(self, index: int) -> Tensor:
        """One embedding [dim], float32. Raises UserError if there is no such row."""
        if not 0 <= index < self.count:
            raise UserError(f"{self.source}: has no row {index}; its rows are 0 to {self.count - 1}")
        for chunk in self.chunks():
            if index < len(chunk):
                return chunk[index]
            index -= len(chunk)
        raise UserError(f"{self.source}: {_DAMAGED}")

    def _checked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(norms [n] as stored, unit-norm rows float32 [n, dim])."""
        start = 0
        for rows in self._rows():
            yield normalise_rows(rows, self.source, start)
            start += len(rows)
        if start != self.count:
            raise UserError(f"{self.source}: ends at row {start} of {self.count}: {_DAMAGED}")


def normalise_rows(rows: np.ndarray, source: str, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, dim] -> (norms float64 [n], unit-norm rows float32 [n, dim]), computed in float64.

    Raises UserError that names `source` and the row, counted from `start`, if one is not finite or all zero.
    """
    wide = rows.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(wide).all(1))
    if len(bad):
        kind = "NaN" if np.isnan(wide[bad[0]]).any() else "infinity"
        raise UserError(f"{source}: row {start + bad[0]} holds {kind}; leave it out or compute it again")
    # Divide by the largest entry first: the square of a very small or large one is out of the range of float64.
    largest = np.abs(wide).max(1)
    empty = np.flatnonzero(largest == 0)
    if len(empty):
        raise UserError(f"{source}: row {start + empty[0]} is all zeros, which is no embedding; leave it out")
    wide /= largest[:, None]
    norms = np.linalg.norm(wide, axis=1)
    return norms * largest, (wide / norms[:, None]).astype(np.float32)


def open_embeddings(source: str | Path, dim: int = 512) -> Embeddings:
    """Open a source (see above) and check its shape and type. Raises UserError that names it and the remedy."""
    text = str(source)
    path, name = split_source(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    reader = _read_folder if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read embeddings from {path.suffix or 'this'}; use {', '.join(SUFFIXES)}")
    with _reading(path):
        return reader(text, path, name, dim)


def split_source(source: str | Path) -> tuple[Path, str | None]:
    """`PATH:NAME` or `PATH` -> (PATH, NAME or None)."""
    path = Path(source)
    if not path.exists() and ":" in str(source):
        head, _, tail = str(source).rpartition(":")
        return Path(head), tail or None
    return path, None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the exceptions that libraries raise on a damaged file into a UserError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, safetensors.SafetensorError, pa.ArrowException, EOFError, OSError) as error:
        # Arrow reports damaged pages as OSError too, but only errors of the operating system have an errno.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a readable {path.suffix} file ({reason}); it may be {_DAMAGED}") from None


def _row_count(source: str, shape: tuple[int, ...], dim: int) -> int:
    """Rows of an array of this shape; raises UserError unless it is [N, dim] with N > 0, or [dim]."""
    if shape == (dim,):
        return 1
    if len(shape) == 2 and shape[1] == dim and shape[0] > 0:
        return shape[0]
    if 0 in shape:
        raise UserError(f"{source}: holds no embeddings (shape {list(shape)}); give at least one")
    if len(shape) in (1, 2):
        raise UserError(
            f"{source}: holds {shape[-1]}-dimensional embeddings (shape {list(shape)}), but the "
            f"generator takes {dim}; compute them with FaceNet "
            f"(VGGFace2, 512 dimensions) as `vultus prepare` does"
        )
    raise UserError(f"{source}: has shape {list(shape)}; an array [N, {dim}] is needed")


def _choose(source: str, path: Path, name: str | None, names: list[str], kind: str) -> str:
    """`name`, or the default array of the file. Raises UserError that lists `names` if it is not among them."""
    if not names:
        raise UserError(f"{path}: holds no {kind}")
    if name is None:
        name = next((preferred for preferred in _PREFERRED if preferred in names), names[0])
        if len(names) > 1:
            print(
                f"{source}: reading {kind} {name!r} of {len(names)}; select one with {path}:NAME",
                file=sys.stderr,
            )
    if name not in names:
        raise UserError(f"{path}: has no {kind} {name!r}; it has {', '.join(sorted(names)[:12])}")
    return name


# --- numpy ----------------------------------------------------------------------------------------------------------


def _npy_header(source: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) of the .npy stream, whose position is then the start of the data."""
    try:
        version = np.lib.format.read_magic(file)
        # Version 3 differs from 2 only in the encoding of field names, and arrays with fields are refused.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise UserError(f"{source}: not a numpy array ({str(error).splitlines()[0][:100]}); write it again") from None
    if dtype.hasobject:
        raise UserError(f"{source}: holds pickled Python objects, which are refused; save a float32 array")
    _check_dtype(source, dtype)
    return shape, fortran, dtype


def _check_dtype(source: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fiu":
        raise UserError(f"{source}: holds {dtype.name} values, not numbers; save a float32 array")


def _npy_rows(
    source: str, opened: Callable[[], contextlib.AbstractContextManager[IO[bytes]]], path: Path
) -> Iterator[np.ndarray]:
    """Rows of a .npy stream in C order, read when needed (the pages of a memory map would stay in memory once read)."""
    with _reading(path), opened() as file:
        shape, _, dtype = _npy_header(source, file)
        dim = shape[-1]
        remaining = shape[0] if len(shape) == 2 else 1
        while remaining:
            count = min(CHUNK, remaining)
            data = _read(file, count * dim * dtype.itemsize)
            whole = len(data) // (dim * dtype.itemsize)
            if whole:
                yield np.frombuffer(data, dtype, whole * dim).reshape(whole, dim)
            if whole < count:
                return
            remaining -= count


def _read(file: IO[bytes], size: int) -> bytes:
    """`size` bytes, or fewer at the end of the file: a compressed stream may give less at a time."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _array_rows(array: np.ndarray) -> Iterator[np.ndarray]:
    array = np.atleast_2d(array)
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK]


def _read_npy(source: str, path: Path, name: str | None, dim: int) -> Embeddings:
    if name is not None:
        raise UserError(f"{source}: a .npy file holds one array; leave out ':{name}'")
    opened = functools.partial(_plain, path)
    with opened() as file:
        shape, fortran, dtype = _npy_header(source, file)
        count = _row_count(source, shape, dim)
        size = path.stat().st_size - file.tell()
    row = dim * dtype.itemsize
    if size < count * row:
        raise UserError(f"{source}: ends at row {size // row} of {count}: {_DAMAGED}")
    if fortran and len(shape) == 2:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return Embeddings(source, count, dim, functools.partial(_array_rows, array))
    return Embeddings(source, count, dim, functools.partial(_npy_rows, source, opened, path))


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def _member(path: Path, member: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        yield file


def _read_npz(source: str, path: Path, name: str | None, dim: int) -> Embeddings:
    with zipfile.ZipFile(path) as archive:
        names = [entry.removesuffix(".npy") for entry in archive.namelist() if entry.endswith(".npy")]
    name = _choose(source, path, name, names, "array")
    opened = functools.partial(_member, path, f"{name}.npy")
    with opened() as file:
        shape, fortran, _ = _npy_header(source, file)
    count = _row_count(source, shape, dim)
    if fortran and len(shape) == 2:
        # The rows are spread over the whole stream, so this rare layout is read as a whole.
        with np.load(path, allow_pickle=False) as arrays:
            return Embeddings(source, count, dim, functools.partial(_array_rows, arrays[name]))
    return Embeddings(source, count, dim, functools.partial(_npy_rows, source, opened, path))


# --- safetensors, Parquet, prepared data sets -------------------------------------------------------------------------


def _read_safetensors(source: str, path: Path, name: str | None, dim: int) -> Embeddings:
    with safetensors.safe_open(path, "np") as file:
        name = _choose(source, path, name, list(file.keys()), "tensor")
        view = file.get_slice(name)
        shape, kind = tuple(view.get_shape()), str(view.get_dtype())
    if kind not in ("F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64"):
        raise UserError(f"{source}: holds {kind} values, not numbers; save a float32 tensor")
    count = _row_count(source, shape, dim)
    framework = "pt" if kind == "BF16" else "np"  # numpy has no bfloat16
    rows = functools.partial(_safetensors_rows, path, name, shape, framework)
    return Embeddings(source, count, dim, rows)


def _safetensors_rows(path: Path, name: str, shape: tuple[int, ...], framework: str) -> Iterator[np.ndarray]:
    for start in range(0, shape[0] if len(shape) == 2 else 1, CHUNK):
        # Opened again for each chunk: the pages of the memory map would add up to the size of the file.
        with _reading(path), safetensors.safe_open(path, framework) as file:
            view = file.get_slice(name)
            part = view[start : min(start + CHUNK, shape[0])] if len(shape) == 2 else view[:][None]
            yield part.float().numpy() if framework == "pt" else part


def _read_parquet(source: str, path: Path, name: str | None, dim: int) -> Embeddings:
    name = name or "embedding"
    with pq.ParquetFile(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    if name not in schema.names:
        raise UserError(
            f"{path}: has no column {name!r}; it has {', '.join(schema.names[:12])}; select one with {path}:COLUMN"
        )
    _check_column(f"{source}: column {name!r}", schema.field(name).type)
    if not count:
        raise UserError(f"{source}: holds no embeddings; give at least one")
    first = next(_parquet_batches(path, name, 1))
    if (length := int(_lengths(first)[0])) >= 0:
        _row_count(source, (count, length), dim)
    return Embeddings(source, count, dim, functools.partial(_parquet_rows, source, path, name, dim))


def _check_column(what: str, kind: pa.DataType) -> None:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise UserError(f"{what} holds {kind}; a column of lists of floats is needed")
    if not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise UserError(f"{what} holds lists of {kind.value_type}; lists of floats are needed")


def _parquet_batches(path: Path, name: str, size: int) -> Iterator[pa.Array]:
    """The column in batches. With a buffer the file is read page by page, not a whole row group at once."""
    with _reading(path), pq.ParquetFile(path, buffer_size=1 << 20) as file:
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


def _read_folder(source: str, path: Path, name: str | None, dim: int) -> Embeddings:
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: not a prepared data set (no manifest.json); prepare it, or give an embedding file")
    manifest = read_manifest(path)
    check_shards(path, manifest)
    splits = manifest["counts"]["splits"]
    if name is not None and name not in splits:
        raise UserError(f"{path}: has no split {name!r}; it has {', '.join(splits)}")
    count = sum(split["images"] for key, split in splits.items() if name in (None, key))
    _row_count(source, (count, manifest["encoder"]["dim"]), dim)
    files = [path / shard["file"] for shard in manifest["shards"]]
    return Embeddings(source, count, dim, functools.partial(_shard_rows, files, name, dim))


def _shard_rows(files: list[Path], split: str | None, dim: int) -> Iterator[np.ndarray]:
    for file in files:
        with _reading(file), pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as shard:
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


_READERS: dict[str, Callable[[str, Path, str | None, int], Embeddings]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}

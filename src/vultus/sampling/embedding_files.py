"""Read face embeddings from a file or a prepared data set, in chunks, checked before anything is made from them.

A source is `PATH` or `PATH:NAME`:

| file | read | NAME |
|---|---|---|
| `.npy` | rows of the array | |
| `.npz` | rows of one array of the archive | the array; without it `embeddings`, `embedding` or the first |
| `.safetensors` | rows of one tensor | the tensor; as for `.npz` |
| `.parquet` | a column of lists | the column; without it `embedding` |
| folder | the embeddings of a prepared data set | the split; without it all rows |

Arrays are [N, dim], or [dim] for one embedding. Memory does not grow with N. Torch is needed for tensors only.
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
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors

from vultus._files import read_json
from vultus.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1024  # rows that are read at a time
SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")
_PREFERRED = ("embeddings", "embedding")
_DAMAGED = "cut short or damaged; write it again"


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

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield float32 arrays [n <= CHUNK, dim] of unit-norm rows, in the order of the file.

        Raises UserError that names source and row if a row is not finite or all zero, or the file ends too soon.
        """
        for _, rows in self._checked():
            yield rows

    def chunks(self) -> Iterator[Tensor]:
        """As `arrays`, as tensors."""
        import torch

        return map(torch.from_numpy, self.arrays())

    def check(self) -> None:
        """Read the whole source once, so that a bad row is found before the work starts.

        Says on stderr, once, if the rows were not of unit norm. Raises UserError as `chunks` does.
        """
        worst = max((float(np.abs(norms - 1).max()) for norms, _ in self._checked()), default=0.0)
        if worst > 1e-3:
            print(f"note: {self.source}: norms are up to {worst:.3g} away from 1; normalised", file=sys.stderr)

    def row(self, index: int) -> Tensor:
        """As `vector`, as a tensor."""
        import torch

        return torch.from_numpy(self.vector(index))

    def vector(self, index: int) -> np.ndarray:
        """One embedding [dim], float32. Raises UserError if there is no such row."""
        if not 0 <= index < self.count:
            raise UserError(f"{self.source}: has no row {index}; its rows are 0 to {self.count - 1}")
        for chunk in self.arrays():
            if index < len(chunk):
                return chunk[index]
            index -= len(chunk)
        raise UserError(f"{self.source}: {_DAMAGED}")

    def _checked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(norms [n] as stored, unit-norm rows float32 [n, dim])."""
        start = 0
        for rows in self._rows():
            wide = rows.astype(np.float64)
            bad = np.flatnonzero(~np.isfinite(wide).all(1))
            if len(bad):
                kind = "NaN" if np.isnan(wide[bad[0]]).any() else "infinity"
                raise UserError(f"{self.source}: row {start + bad[0]} holds {kind}; leave it out or compute it again")
            # Divided by the largest entry first: the square of a tiny or huge one leaves the range of numbers.
            largest = np.abs(wide).max(1)
            empty = np.flatnonzero(largest == 0)
            if len(empty):
                raise UserError(f"{self.source}: row {start + empty[0]} is all zeros, which is no face; leave it out")
            wide /= largest[:, None]
            norms = np.linalg.norm(wide, axis=1)
            yield norms * largest, (wide / norms[:, None]).astype(np.float32)
            start += len(rows)
        if start != self.count:
            raise UserError(f"{self.source}: ends at row {start} of {self.count}: {_DAMAGED}")


def open_embeddings(source: str | Path, dim: int = 512) -> Embeddings:
    """Open a source (see above) and check its shape and type. Raises UserError that names it and the remedy."""
    text = str(source)
    path, name = Path(text), None
    if not path.exists() and ":" in text:
        head, _, tail = text.rpartition(":")
        path, name = Path(head), tail or None
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    reader = _read_folder if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read embeddings from {path.suffix or 'this'}; use {', '.join(SUFFIXES)}")
    with _reading(path):
        return reader(text, path, name, dim)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what libraries raise on a damaged file into one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, safetensors.SafetensorError, pa.ArrowException, EOFError, OSError) as error:
        # Arrow reports damaged pages as OSError too, but only the system's errors carry a number.
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
        what = f"{shape[-1]}-dimensional embeddings"
        raise UserError(
            f"{source}: holds {what} (shape {list(shape)}), but the generator takes {dim}; compute them with FaceNet "
            f"(VGGFace2, 512 dimensions) as `vultus prepare` does"
        )
    raise UserError(f"{source}: has shape {list(shape)}; an array [N, {dim}] is needed")


def _choose(source: str, path: Path, name: str | None, names: list[str], kind: str) -> str:
    """The named array, or the obvious one. Raises UserError that lists those there."""
    if not names:
        raise UserError(f"{path}: holds no {kind}")
    if name is None:
        name = next((preferred for preferred in _PREFERRED if preferred in names), names[0])
        if len(names) > 1:
            print(f"{source}: reading {kind} {name!r} of {len(names)}; choose one by {path}:NAME", file=sys.stderr)
    if name not in names:
        raise UserError(f"{path}: has no {kind} {name!r}; it has {', '.join(sorted(names)[:12])}")
    return name


# --- numpy ----------------------------------------------------------------------------------------------------------


def _npy_header(source: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) of the .npy stream, which then stands at its data."""
    try:
        version = np.lib.format.read_magic(file)
        # The only difference of version 3 are field names in UTF-8, and arrays with fields are refused anyway.
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
    """Rows of a .npy stream in C order, read as they are needed (a memory map would stay in memory once read)."""
    with _reading(path), opened() as file:
        shape, _, dtype = _npy_header(source, file)
        dim = shape[-1]
        left = shape[0] if len(shape) == 2 else 1
        while left:
            count = min(CHUNK, left)
            data = _read(file, count * dim * dtype.itemsize)
            whole = len(data) // (dim * dtype.itemsize)
            if whole:
                yield np.frombuffer(data, dtype, whole * dim).reshape(whole, dim)
            if whole < count:
                return
            left -= count


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
        here = path.stat().st_size - file.tell()
    row = dim * dtype.itemsize
    if here < count * row:
        raise UserError(f"{source}: ends at row {here // row} of {count}: {_DAMAGED}")
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
        # Its rows are spread over the whole stream, so this rare layout is the one that is read at once.
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
    framework = "pt" if kind == "BF16" else "np"  # numpy knows no bfloat16
    rows = functools.partial(_safetensors_rows, path, name, shape, framework)
    return Embeddings(source, count, dim, rows)


def _safetensors_rows(path: Path, name: str, shape: tuple[int, ...], framework: str) -> Iterator[np.ndarray]:
    for start in range(0, shape[0] if len(shape) == 2 else 1, CHUNK):
        # Opened anew for each chunk: the pages that the map has read would add up to the size of the file.
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
            f"{path}: has no column {name!r}; it has {', '.join(schema.names[:12])}: choose one by {path}:COLUMN"
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
    """The column in pieces. With a buffer the file is read page by page, not a whole row group at once."""
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
            found = "no embedding" if lengths[row] < 0 else f"{lengths[row]} values"
            raise UserError(f"{source}: row {start + row} holds {found}, not {dim}; leave it out or compute it again")
        values = column.flatten()
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // dim
            raise UserError(f"{source}: row {start + row} has a missing value; leave it out or compute it again")
        yield values.to_numpy().reshape(-1, dim)
        start += len(column)


def _read_folder(source: str, path: Path, name: str | None, dim: int) -> Embeddings:
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: not a prepared data set (no manifest.json); prepare it, or give a file of embeddings")
    manifest = read_json(path / "manifest.json")
    splits = manifest["counts"]["splits"]
    if name is not None and name not in splits:
        raise UserError(f"{path}: has no split {name!r}; it has {', '.join(splits)}")
    count = sum(split["images"] for key, split in splits.items() if name in (None, key))
    _row_count(source, (count, manifest["encoder"]["dim"]), dim)
    files = [path / shard["file"] for shard in manifest["shards"]]
    return Embeddings(source, count, dim, functools.partial(_shard_rows, files, name))


def _shard_rows(files: list[Path], split: str | None) -> Iterator[np.ndarray]:
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing; prepare the data set again")
        with _reading(file), pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as shard:
            for number in range(shard.num_record_batches):
                batch = shard.get_batch(number)
                column = batch.column("embedding")
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

"""Arrays of embeddings: .npy, .npz and .safetensors. Only the array that is asked for is read."""

from __future__ import annotations

import contextlib
import functools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors

from vultus.errors import UserError
from vultus.sampling.embedding_rows import (
    CHUNK,
    DAMAGED,
    HEADER,
    Embeddings,
    Needed,
    array_rows,
    choose,
    encoder_in,
    reading,
    without_name,
)

MAX_HEADER = 1 << 20  # bytes of the header of `vultus embed`
MAX_WHOLE = 1 << 28  # bytes of a compressed array that is read at once


def _npy_header(source: str, file: IO[bytes], *, numbers: bool = True) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
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
    if numbers and dtype.kind not in "fiu":
        raise UserError(f"{source}: holds {dtype.name} values, not numbers; save a float32 array")
    return shape, fortran, dtype


def _npy_rows(
    source: str, opened: Callable[[], contextlib.AbstractContextManager[IO[bytes]]], path: Path
) -> Iterator[np.ndarray]:
    """Rows of a .npy stream in C order, read when needed (the pages of a memory map would stay in memory once read)."""
    with reading(path), opened() as file:
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


def read_npy(source: str, path: Path, name: str | None, needed: Needed) -> Embeddings:
    """Open a .npy file. Raises UserError."""
    without_name(source, path, name)
    opened = functools.partial(_plain, path)
    with opened() as file:
        shape, fortran, dtype = _npy_header(source, file)
        count = needed.count(source, shape)
        size = path.stat().st_size - file.tell()
    row = needed.dim * dtype.itemsize
    if size < count * row:
        raise UserError(f"{source}: ends at row {size // row} of {count}: {DAMAGED}")
    if fortran and len(shape) == 2:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return Embeddings(source, count, needed.dim, functools.partial(array_rows, array))
    return Embeddings(source, count, needed.dim, functools.partial(_npy_rows, source, opened, path))


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def _member(path: Path, member: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        yield file


def _npz_header(path: Path, names: list[str]) -> str | None:
    """The header that `vultus embed` writes."""
    if HEADER not in names:
        return None
    with _member(path, f"{HEADER}.npy") as file:
        shape, _, dtype = _npy_header(f"{path}: array {HEADER!r}", file, numbers=False)
    if shape or dtype.kind != "U" or dtype.itemsize > MAX_HEADER:
        return None  # an array of the user's
    with np.load(path, allow_pickle=False) as arrays:
        return str(arrays[HEADER])


def read_npz(source: str, path: Path, name: str | None, needed: Needed) -> Embeddings:
    """Open a .npz file. Raises UserError."""
    with zipfile.ZipFile(path) as archive:
        names = [entry.removesuffix(".npy") for entry in archive.namelist() if entry.endswith(".npy")]
    header = _npz_header(path, names)
    # One of several arrays is chosen with a note; in a file of `vultus embed` there is no doubt.
    name = choose(source, path, name if header is None else name or "embeddings", names, "array")
    opened = functools.partial(_member, path, f"{name}.npy")
    with opened() as file:
        shape, fortran, dtype = _npy_header(source, file)
    count = needed.count(source, shape, None if header is None else encoder_in(header, source))
    if fortran and len(shape) == 2:
        # The rows are spread over the whole stream, so this rare layout is read as a whole.
        if count * needed.dim * dtype.itemsize > MAX_WHOLE:
            raise UserError(
                f"{source}: is larger than {MAX_WHOLE >> 20} MiB, and in column order; save it in row order"
            )
        with np.load(path, allow_pickle=False) as arrays:
            return Embeddings(source, count, needed.dim, functools.partial(array_rows, arrays[name]))
    return Embeddings(source, count, needed.dim, functools.partial(_npy_rows, source, opened, path))


def read_safetensors(source: str, path: Path, name: str | None, needed: Needed) -> Embeddings:
    """Open a .safetensors file. Raises UserError."""
    with safetensors.safe_open(path, "np") as file:
        name = choose(source, path, name, list(file.keys()), "tensor")
        view = file.get_slice(name)
        shape, kind = tuple(view.get_shape()), str(view.get_dtype())
    if kind not in ("F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64"):
        raise UserError(f"{source}: holds {kind} values, not numbers; save a float32 tensor")
    count = needed.count(source, shape)
    framework = "pt" if kind == "BF16" else "np"  # numpy has no bfloat16
    rows = functools.partial(_safetensors_rows, path, name, shape, framework)
    return Embeddings(source, count, needed.dim, rows)


def _safetensors_rows(path: Path, name: str, shape: tuple[int, ...], framework: str) -> Iterator[np.ndarray]:
    for start in range(0, shape[0] if len(shape) == 2 else 1, CHUNK):
        # Opened again for each chunk: the pages of the memory map would add up to the size of the file.
        with reading(path), safetensors.safe_open(path, framework) as file:
            view = file.get_slice(name)
            part = view[start : min(start + CHUNK, shape[0])] if len(shape) == 2 else view[:][None]
            yield part.float().numpy() if framework == "pt" else part

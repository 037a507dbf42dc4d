"""Rows of embeddings: opened, not read; checked, normalised, in chunks. What the readers of all file formats share."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vultus._files import json_value
from vultus._formats import upgrade
from vultus.errors import UserError
from vultus.models.encoders import difference
from vultus.models.facenet import FaceNet

CHUNK = 1024  # rows that are read at a time
HEADER = "vultus"  # the array, key or metadata in which a file of `vultus embed` says where it comes from
_PREFERRED = ("embeddings", "embedding")
DAMAGED = "truncated or damaged; write it again"


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
        raise UserError(f"{self.source}: {DAMAGED}")

    def _checked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(norms [n] as stored, unit-norm rows float32 [n, dim])."""
        start = 0
        for rows in self._rows():
            yield normalise_rows(rows, self.source, start)
            start += len(rows)
        if start != self.count:
            raise UserError(f"{self.source}: ends at row {start} of {self.count}: {DAMAGED}")


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


@dataclass(frozen=True)
class Needed:
    """What a generator takes: the length of an embedding, and its encoder as encoder_entry() describes it, if known."""

    dim: int
    encoder: Mapping[str, Any]

    def count(self, source: str, shape: tuple[int, ...], encoder: Mapping[str, Any] | None = None) -> int:
        """Rows of an array of this shape, of embeddings of `encoder` (None: not known).

        Raises UserError unless it is [N, dim] with N > 0, or [dim], and the encoder is the one that is needed.
        """
        if differs := difference(self.encoder, encoder or {}):
            raise UserError(
                f"{source}: holds embeddings of {differs}, on which the generator was trained; embed the photos with "
                "that encoder, or use another generator"
            )
        if shape == (self.dim,):
            return 1
        if len(shape) == 2 and shape[1] == self.dim and shape[0] > 0:
            return shape[0]
        if 0 in shape:
            raise UserError(f"{source}: holds no embeddings (shape {list(shape)}); give at least one")
        if len(shape) in (1, 2):
            name = self.encoder.get("id", FaceNet.id)
            remedy = "FaceNet (VGGFace2, 512 dimensions) as `vultus prepare` does" if name == FaceNet.id else name
            raise UserError(
                f"{source}: holds {shape[-1]}-dimensional embeddings (shape {list(shape)}), but the generator takes "
                f"{self.dim}; compute them with {remedy}"
            )
        raise UserError(f"{source}: has shape {list(shape)}; an array [N, {self.dim}] is needed")


def encoder_in(header: str | bytes | dict[str, Any], source: str) -> dict[str, Any]:
    """The encoder in the header of a file of `vultus embed`, as JSON or its value.

    Raises UserError if the header is damaged or of a newer version.
    """
    try:
        value = header if isinstance(header, dict) else json_value(header)
        return dict(upgrade("embeddings", value["format"], value, source)["encoder"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{source}: its header {HEADER!r} is {DAMAGED}") from None


def without_name(source: str, path: Path, name: str | None) -> None:
    """Raise UserError if a NAME is given for a file that holds one array."""
    if name is not None:
        raise UserError(f"{source}: a {path.suffix} file holds one array; leave out ':{name}'")


def array_rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array [N, dim] or [dim], in chunks."""
    array = np.atleast_2d(array)
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the exceptions that libraries raise on a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, numpy, Arrow and safetensors raise many kinds on damaged files
        # Arrow reports damaged pages as OSError too, but only errors of the operating system have an errno. EINVAL
        # comes from a seek to a place that a damaged file names.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a readable {path.suffix} file ({reason}); it may be {DAMAGED}") from None


def choose(source: str, path: Path, name: str | None, names: list[str], kind: str) -> str:
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

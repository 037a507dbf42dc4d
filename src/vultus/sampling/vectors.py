"""What faces are made of, without torch: embeddings from a file, and of people who do not exist.

A source is read once, in order, a chunk at a time, so memory does not grow with its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vultus.errors import UserError
from vultus.sampling.embedding_files import open_embeddings
from vultus.sampling.latents import Floats, sample_identities

Skipped = tuple[str, str]  # photo, reason


@dataclass(frozen=True)
class Conditions:
    """Where embeddings come from, read once.

    Attributes:
        count: how many there are, or at most (bad photos are left out).
        chunks: (names [n], unit-norm embeddings [n, c_dim]) in turn, as arrays or, from conditions.py, as tensors; a
            name begins the names of its pictures.
        skipped: filled while `chunks` is read.
    """

    count: int
    chunks: Iterable[tuple[list[str], Any]]
    skipped: list[Skipped] = field(default_factory=list)


class Trained(Protocol):
    """What a source must know of the snapshot, or of the exported model, that its embeddings are for."""

    @property
    def population(self) -> Mapping[str, Any]:
        """`mean` and `factor` of the training embeddings (people.py), as arrays or tensors, or nothing."""

    @property
    def metadata(self) -> dict[str, Any]:
        """As in checkpoint.Snapshot; read here: `generator` and `encoder`."""

    @property
    def path(self) -> Path | None:
        """For messages."""


def from_embeddings(source: str | Path, model: Trained) -> Conditions:
    """The rows of a file or prepared data set (see embeddings.py), all checked before the first is used."""
    embeddings = open_embeddings(source, _dim(model))
    embeddings.check()
    return Conditions(embeddings.count, _numbered(embeddings.arrays(), embeddings.count))


def random_people(model: Trained, count: int, *, seed: int = 0, start: int = 0) -> Conditions:
    """`count` people who do not exist, number `start` and after. Raises UserError if the model cannot tell any."""
    if count < 1:
        raise UserError(f"cannot make {count} random people; ask for at least one")
    people = _people(model)
    chunks = (
        sample_identities(people, min(256, count - done), seed=seed, start=start + done)
        for done in range(0, count, 256)
    )
    return Conditions(count, _numbered(chunks, count))


def one_embedding(text: str, model: Trained, *, seed: int = 0) -> Floats:
    """One embedding [c_dim] by name: `random` or `random:N`, or `FILE#ROW` (without #ROW row 0)."""
    if match := re.fullmatch(r"random(?::(\d+))?", text):
        return sample_identities(_people(model), 1, seed=seed, start=int(match[1] or 0))[0]
    source, row = text, 0
    if not Path(text).exists() and (match := re.fullmatch(r"(.+)#(\d+)", text)):
        source, row = match[1], int(match[2])
    return open_embeddings(source, _dim(model)).vector(row)


def _dim(model: Trained) -> int:
    dim: int = model.metadata["generator"]["c_dim"]
    return dim


def _people(model: Trained) -> dict[str, Any]:
    if not {"mean", "factor"} <= model.population.keys():
        raise UserError(f"{model.path}: holds no description of people to draw from; give embeddings or photos")
    return {key: np.asarray(value) for key, value in model.population.items()}


def _numbered(chunks: Iterable[Floats], count: int) -> Iterator[tuple[list[str], Floats]]:
    digits = max(6, len(str(count - 1)))
    start = 0
    for chunk in chunks:
        yield [f"{index:0{digits}d}" for index in range(start, start + len(chunk))], chunk
        start += len(chunk)

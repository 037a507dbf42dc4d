"""Random identities that are kept apart: the angle between any two embeddings is at least a given one.

Shape legend: embeddings [N, c_dim] float32 of unit norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vultus.errors import UserError
from vultus.sampling.latents import Floats, sample_identities

MISSES = 1000  # random identities passed over in a row after which there is no room for another person
_CANDIDATES = 512  # identities that are compared at once: fewer than MISSES, so that none is missed who is not needed
_ACCEPTED = 8192  # people that they are compared with at once


@dataclass(frozen=True)
class Person:
    """A person: `number` of the random identity, which names its embedding `c` [c_dim], together with the seed."""

    number: int
    c: Floats


class People:
    """The random identities of a seed, in order, without those that are nearer to an earlier one than `min_angle`.

    Person i depends on (population, seed, min_angle, i) alone. Cosines are computed in float64, so that the processor
    and the number of threads decide nothing. Work grows with the square of the number of people, memory with the
    embeddings: 2 KiB a person.

    Args:
        population: the population prior of a snapshot.
        seed: of the random identities.
        min_angle: between two embeddings, in degrees, 0 to 180.
    """

    def __init__(self, population: Mapping[str, Tensor], *, seed: int, min_angle: float) -> None:
        self._population, self._seed = population, seed
        self._angle, self._cosine = min_angle, math.cos(math.radians(min_angle))
        self._c = np.empty((0, len(population["mean"])), np.float32)
        self._numbers: list[int] = []
        self._drawn = self._misses = 0

    def take(self, start: int, count: int) -> list[Person]:
        """The people number `start` to `start + count - 1`. Raises UserError if MISSES identities in a row are too near
        to the people before them."""
        while len(self._numbers) < start + count:
            self._draw()
        rows = range(start, start + count)
        return [Person(self._numbers[row], self._c[row].copy()) for row in rows]

    def _draw(self) -> None:
        c = sample_identities(self._population, _CANDIDATES, seed=self._seed, start=self._drawn).numpy()
        rows, count = c.astype(np.float64), len(self._numbers)
        near = np.zeros(len(rows), dtype=bool)
        for first in range(0, count, _ACCEPTED):
            others = self._c[first : min(first + _ACCEPTED, count)].astype(np.float64)
            near |= (rows @ others.T > self._cosine).any(1)
        cosines = rows @ rows.T
        kept: list[int] = []
        for row in range(len(rows)):
            if near[row] or (cosines[row, kept] > self._cosine).any():
                self._misses += 1
                if self._misses == MISSES:
                    raise UserError(
                        f"no room for more people at --min-angle {self._angle:g}: after {count + len(kept)}, {MISSES} "
                        "random identities in a row were too near to one of them; lower --min-angle or --people"
                    )
            else:
                kept.append(row)
                self._misses = 0
        self._add(c, kept)

    def _add(self, c: Floats, kept: list[int]) -> None:
        count = len(self._numbers)
        if count + len(kept) > len(self._c):
            grown = np.empty((2 * len(self._c) + _CANDIDATES, c.shape[1]), np.float32)
            grown[:count] = self._c[:count]
            self._c = grown
        self._c[count : count + len(kept)] = c[kept]
        self._numbers += [self._drawn + row for row in kept]
        self._drawn += len(c)

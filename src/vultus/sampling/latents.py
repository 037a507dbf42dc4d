"""Random numbers by position, people who do not exist, paths on the sphere: numpy alone, for torch need not be there.

Shape legend: embeddings [N, D] float32 of unit norm; noise z [N, z_dim] float32, standard normal.

Random numbers are a function of (seed, index) alone, so that person or noise number 70,001 is the same whether it is
asked for alone, in batches of 16, or on another machine. people.py gives the same as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vultus.errors import UserError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_ROWS = 64  # people are computed in aligned blocks of this size, see sample_identities
_PEOPLE, _NOISE = 1, 2  # streams of one seed that never meet


def normals(stream: int, seed: int, start: int, count: int, size: int, variant: int = 0) -> Floats:
    """Standard normals [count, size]; row i is a function of (stream, seed, start + i, variant) alone.

    Philox is a counter-based generator (Salmon et al. 2011): its key holds stream and seed, its counter index and
    variant, so no two rows share numbers and none needs those before it. (torch's CPU generator keeps only 32 bits of
    its seed, and its numbers depend on how many are asked for at once.)
    """
    rows = np.empty((count, size), dtype=np.float32)
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    for row in range(count):
        counter = np.array([0, 0, start + row, variant], dtype=np.uint64)
        np.random.Generator(np.random.Philox(counter=counter, key=key)).standard_normal(out=rows[row], dtype=np.float32)
    return rows


def noise(seed: int, start: int, count: int, z_dim: int, *, variant: int = 0) -> Floats:
    """The generator's noise for items `start` to `start + count - 1`: [count, z_dim], standard normal.

    Row i depends on (seed, start + i, variant) alone; `variant` numbers several faces of one embedding.
    """
    return normals(_NOISE, seed, start, count, z_dim, variant)


def check_strength(noise_strength: float) -> None:
    """Raise UserError unless noise can be multiplied by it."""
    if not 0 <= noise_strength < math.inf:
        raise UserError(f"--noise_strength {noise_strength}: must be a number of 0 or more")


def sample_identities(people: Mapping[str, npt.ArrayLike], count: int, *, seed: int, start: int = 0) -> Floats:
    """Embeddings of the random people number `start` to `start + count - 1`: [count, D], unit norm.

    `people` is what people.fit_people returns. Person i depends on (people, seed, i) alone, to the last bit: a matrix
    product rounds differently for other batch sizes, so it always runs on the same aligned blocks of 64 people.
    """
    parts = {key: np.asarray(value, dtype=np.float64) for key, value in people.items()}
    blocks = [
        _people_block(parts, normals(_PEOPLE, seed, block * _ROWS, _ROWS, parts["factor"].shape[1] + 1).astype(float))
        for block in range(start // _ROWS, -(-(start + count) // _ROWS))
    ]
    if not blocks:
        return np.zeros((0, len(parts["mean"])), dtype=np.float32)
    skip = start % _ROWS
    return np.concatenate(blocks)[skip : skip + count]


def _people_block(people: Mapping[str, Doubles], normal: Doubles) -> Floats:
    """normal [n, D + 1] -> embeddings [n, D]; the last number chooses the component, where there are any."""
    normal, choice = normal[:, :-1], normal[:, -1]
    if "weights" in people:
        means, factors = people["means"], people["factors"]
        bounds = people["weights"].cumsum()
        below = [0.5 * math.erfc(-value / math.sqrt(2)) for value in choice]  # the normal distribution function
        chosen = np.searchsorted(bounds / bounds[-1], below).clip(max=len(bounds) - 1)
        rank = means.shape[1]
        mixed = means[chosen] + np.einsum("nij,nj->ni", factors[chosen], normal[:, :rank])
        normal = np.concatenate([mixed, normal[:, rank:]], 1)
    return _unit(people["mean"] + normal @ people["factor"].T).astype(np.float32)


def slerp(a: npt.ArrayLike, b: npt.ArrayLike, t: npt.ArrayLike) -> Doubles:
    """The point at fraction `t` of the shorter arc from `a` to `b`, unit vectors [..., D]; `t` is one number or [...].

    Equal vectors give that vector. Antipodes have no shortest arc; the path then turns through the axis where `a` is
    smallest, so that it is still smooth and always the same.
    """
    x, y = _unit(np.asarray(a, dtype=np.float64)), _unit(np.asarray(b, dtype=np.float64))
    cosine = (x * y).sum(-1, keepdims=True)
    side = y - cosine * x
    axis: Any = np.eye(x.shape[-1])[np.abs(x).argmin(-1)]
    axis = axis - (axis * x).sum(-1, keepdims=True) * x
    length = np.linalg.norm(side, axis=-1, keepdims=True)
    angle = np.arctan2(length, cosine) * np.asarray(t, dtype=np.float64)[..., None]
    turn = _unit(np.where((length < 1e-7) & (cosine < 0), axis, side))
    return _unit(np.cos(angle) * x + np.sin(angle) * turn)


def _unit(x: Doubles) -> Doubles:
    """Rows divided by their length; a row of zeros stays."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(min=1e-12)

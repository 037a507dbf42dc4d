"""Noise, random identities, and interpolation on the sphere.

Shape legend: embeddings c [N, c_dim] float32 of unit norm; noise z [N, z_dim] float32, standard normal.

Every random number is a function of (seed, index) alone: identity or noise number 70,001 is the same whether it is
drawn alone, in a batch of 16, or on another machine. The computations run in numpy, in float64 where they sum, because
torch's CPU generator keeps only 32 bits of its seed and its numbers depend on how many are drawn at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus.errors import UserError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_BLOCK = 64  # identities are computed in aligned blocks of this size, see sample_identities
_IDENTITIES, _NOISE = 1, 2  # independent streams of one seed


def _normals(stream: int, seed: int, start: int, count: int, size: int, variant: int = 0) -> Floats:
    """Standard normals [count, size]; row i is a function of (stream, seed, start + i, variant) alone.

    Philox is a counter-based generator (Salmon et al. 2011): its key holds the seed and the stream, its counter the
    index and the variant, so no two rows share numbers and no row depends on the rows before it.
    """
    rows = np.empty((count, size), dtype=np.float32)
    key = np.array([int(seed) % 2**64, stream], dtype=np.uint64)
    for row in range(count):
        counter = np.array([0, 0, start + row, variant], dtype=np.uint64)
        np.random.Generator(np.random.Philox(counter=counter, key=key)).standard_normal(out=rows[row], dtype=np.float32)
    return rows


def noise(seed: int, start: int, count: int, z_dim: int, *, variant: int = 0) -> Tensor:
    """The generator's noise for the items `start` to `start + count - 1`: [count, z_dim] float32, standard normal.

    Row i depends on (seed, start + i, variant) alone; `variant` numbers several faces of one embedding.
    """
    return torch.from_numpy(_normals(_NOISE, seed, start, count, z_dim, variant))


def sample_identities(
    population: Mapping[str, Tensor | npt.ArrayLike], count: int, *, seed: int, start: int = 0
) -> Tensor:
    """Embeddings of the random identities number `start` to `start + count - 1`: [count, c_dim] float32, unit norm.

    `population` is the result of population.fit_population. Identity i depends on (population, seed, i) alone, to the
    last bit: a matrix product rounds differently for other batch sizes, so it always runs on the same aligned blocks of
    64 identities.
    """
    parts = {key: _doubles(value) for key, value in population.items()}
    size = parts["factor"].shape[1] + 1
    blocks = [
        _identity_block(parts, _normals(_IDENTITIES, seed, block * _BLOCK, _BLOCK, size).astype(float))
        for block in range(start // _BLOCK, -(-(start + count) // _BLOCK))
    ]
    if not blocks:
        return torch.zeros(0, len(parts["mean"]))
    skip = start % _BLOCK
    return torch.from_numpy(np.concatenate(blocks)[skip : skip + count])


def _identity_block(population: Mapping[str, Doubles], normal: Doubles) -> Floats:
    """normal [n, c_dim + 1] -> embeddings [n, c_dim]; the last number selects the component of a mixture."""
    normal, choice = normal[:, :-1], normal[:, -1]
    if "weights" in population:
        means, factors = population["means"], population["factors"]
        bounds = population["weights"].cumsum()
        uniform = [0.5 * math.erfc(-value / math.sqrt(2)) for value in choice]  # the normal distribution function
        component = np.searchsorted(bounds / bounds[-1], uniform).clip(max=len(bounds) - 1)
        rank = means.shape[1]
        mixed = means[component] + np.einsum("nij,nj->ni", factors[component], normal[:, :rank])
        normal = np.concatenate([mixed, normal[:, rank:]], 1)
    return _normalise(population["mean"] + normal @ population["factor"].T).astype(np.float32)


def blend(c: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of embeddings c [N, c_dim], normalised: [c_dim]. `weights` [N] are not negative.

    With equal weights and photos of one person it describes the person better than each photo; with other people it is
    a blend of them. Raises UserError if the mean is zero and has no direction.
    """
    mean = (c * weights[:, None]).sum(0)
    if not mean.any():
        raise UserError("the weighted embeddings cancel each other out; give a weight above 0, or other embeddings")
    return F.normalize(mean, dim=0)


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Spherical interpolation: the point at fraction `t` of the shorter arc from `a` to `b`.

    `a` and `b` are unit vectors [..., c_dim], `t` is one number or [...]; the result has the dtype and device of `a`.
    Equal vectors give that vector. Opposite vectors have no shortest arc; the path then turns through the axis in which
    `a` is smallest, so that it is smooth and always the same.
    """
    x, y = _normalise(_doubles(a)), _normalise(_doubles(b))
    cosine = (x * y).sum(-1, keepdims=True)
    side = y - cosine * x
    axis: Any = np.eye(x.shape[-1])[np.abs(x).argmin(-1)]
    axis = axis - (axis * x).sum(-1, keepdims=True) * x
    length = np.linalg.norm(side, axis=-1, keepdims=True)
    angle = np.arctan2(length, cosine) * _doubles(t)[..., None]
    turn = _normalise(np.where((length < 1e-7) & (cosine < 0), axis, side))
    return torch.from_numpy(_normalise(np.cos(angle) * x + np.sin(angle) * turn)).to(a)


def _doubles(value: Tensor | npt.ArrayLike) -> Doubles:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)


def _normalise(x: Doubles) -> Doubles:
    """Rows divided by their length; a row of zeros stays."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(min=1e-12)

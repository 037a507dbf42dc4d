"""Protections of face embeddings: what a system stores instead of the embedding.

Shape legend: embeddings c [N, D] float32 of unit norm; keys [N] int64; templates [N, K] float32. Templates are compared
by their cosine, which for templates of -1 and 1 orders pairs as the Hamming distance does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vultus.errors import UserError

Keys = Literal["none", "system", "person"]
DEFAULT = (
    "plain", "8bit", "1bit", "noise-0.5", "noise-1", "noise-2", "rotation", "rotation-pairs", "biohash-known",
    "biohash-unknown", "pca-64", "pca-16",
)  # fmt: skip
KNOWN = "plain, 8bit, 1bit, noise-LEVEL, rotation, rotation-pairs, biohash-known, biohash-unknown, pca-K"
BITS = 128  # of a BioHash, or the length of the embedding if that is smaller


class Protection(Protocol):
    """The interface of a protection.

    Attributes:
        keys: "none"; "system": one secret key for all templates; "person": a secret key for each person.
        attacker: what the attacker has besides the templates, in words.
        pairs: whether the attacker has templates of known photos under the attacked key of the system.
        key_known: whether the attacker has the keys.
    """

    keys: Keys
    attacker: str
    pairs: bool
    key_known: bool

    def fit(self, c: Tensor) -> None:
        """Learn from the embeddings of the training split."""
        ...

    def protect(self, c: Tensor, keys: Tensor) -> Tensor:
        """Templates of the embeddings."""
        ...

    def seen(self, templates: Tensor, keys: Tensor) -> Tensor:
        """What the attacker's mapping gets: the template, or what a known key makes of it."""
        ...


@dataclass
class Plain:
    """The embedding itself."""

    keys: Keys = "none"
    attacker: str = "templates"
    pairs: bool = False
    key_known: bool = False

    def fit(self, c: Tensor) -> None:
        """Nothing is learned."""

    def protect(self, c: Tensor, keys: Tensor) -> Tensor:
        """See Protection."""
        return c

    def seen(self, templates: Tensor, keys: Tensor) -> Tensor:
        """See Protection."""
        return templates


@dataclass
class Quantised(Plain):
    """Every number with `bits` bits: its sign, or one of 2^bits - 1 levels over the range of the training split."""

    bits: int = 8

    def fit(self, c: Tensor) -> None:
        """The largest absolute value."""
        self._top = c.abs().max()

    def protect(self, c: Tensor, keys: Tensor) -> Tensor:
        """See Protection."""
        if self.bits == 1:
            return torch.where(c >= 0, 1.0, -1.0)
        levels = 2 ** (self.bits - 1) - 1
        return (c / self._top * levels).round().clamp(-levels, levels) / levels * self._top


@dataclass
class Noise(Plain):
    """Gaussian noise whose root mean square length is `level` times that of the embedding."""

    level: float = 1.0

    def protect(self, c: Tensor, keys: Tensor) -> Tensor:
        """See Protection. The noise is drawn anew for every call, from torch's generator."""
        return c + torch.randn_like(c) * (self.level / c.shape[1] ** 0.5)


@dataclass
class Rotation(Plain):
    """A secret orthogonal matrix for the whole system. Cosines of templates are those of the embeddings."""

    keys: Keys = "system"
    attacker: str = "templates; not the matrix"

    def protect(self, c: Tensor, keys: Tensor) -> Tensor:
        """See Protection."""
        return _by_key(keys, lambda key, rows: c[rows] @ orthonormal(key, c.shape[1], c.shape[1]).T)


@dataclass
class BioHash(Plain):
    """Signs of a secret random orthonormal projection, one for each person (Teoh et al. 2006, "Random multispace
    quantization as an analytic mechanism for BioHashing")."""

    keys: Keys = "person"
    attacker: str = "templates; not the keys"

    def fit(self, c: Tensor) -> None:
        """The length of the embedding."""
        self._dim = c.shape[1]

    def _matrix(self, key: int) -> Tensor:
        return orthonormal(key, min(BITS, self._dim), self._dim)

    def protect(self, c: Tensor, keys: Tensor) -> Tensor:
        """See Protection."""
        return _by_key(keys, lambda key, rows: torch.where(c[rows] @ self._matrix(key).T >= 0, 1.0, -1.0))

    def seen(self, templates: Tensor, keys: Tensor) -> Tensor:
        """With the key the pseudo-inverse of the projection, [N, D]; without it the template."""
        if not self.key_known:
            return templates
        return F.normalize(_by_key(keys, lambda key, rows: templates[rows] @ self._matrix(key)), dim=1)


@dataclass
class Components(Plain):
    """The first `count` principal components of the training split."""

    count: int = 64

    def fit(self, c: Tensor) -> None:
        """Raises UserError if the embeddings have fewer components."""
        if self.count > min(c.shape):
            raise UserError(f"--protect pca-{self.count}: the embeddings have {min(c.shape)} components at most")
        self._mean = c.mean(0)
        self._axes = torch.linalg.svd(c - self._mean, full_matrices=False).Vh[: self.count]

    def protect(self, c: Tensor, keys: Tensor) -> Tensor:
        """See Protection."""
        return (c - self._mean) @ self._axes.T


def canonical(name: str) -> str:
    """One name for all that mean the same: `noise-1` for `noise-1.0`."""
    match = re.fullmatch(r"noise-(\d+)\.0*|noise-(\d+\.\d*?[1-9])0*", name)
    return f"noise-{match[1] or match[2]}" if match else name


def load_protection(name: str) -> Protection:
    """The protection of that name. Raises UserError that lists the names."""
    if name == "plain":
        return Plain()
    if name in ("1bit", "8bit"):
        return Quantised(bits=int(name[0]))
    if name == "rotation":
        return Rotation()
    if name == "rotation-pairs":
        return Rotation(attacker="templates, and those of known photos under the same matrix", pairs=True)
    if name == "biohash-known":
        return BioHash(attacker="templates and keys", key_known=True)
    if name == "biohash-unknown":
        return BioHash()
    if match := re.fullmatch(r"noise-(\d+(?:\.\d+)?)", name):
        return Noise(level=float(match[1]))
    if match := re.fullmatch(r"pca-([1-9]\d{0,5})", name):
        return Components(count=int(match[1]))
    raise UserError(f"--protect {name}: no such protection; there are {KNOWN}")


@functools.lru_cache(maxsize=4)
def orthonormal(key: int, rows: int, dim: int) -> Tensor:
    """A random matrix [rows, dim] with orthonormal rows, a function of the key."""
    random = torch.Generator().manual_seed(key)
    return torch.linalg.qr(torch.randn(dim, rows, generator=random))[0].T.contiguous()


def _by_key(keys: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    values, codes = keys.unique(return_inverse=True)
    parts = [(rows := (codes == number).nonzero()[:, 0], function(int(key), rows)) for number, key in enumerate(values)]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([part for _, part in parts])[order]

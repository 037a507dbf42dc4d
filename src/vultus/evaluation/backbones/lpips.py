"""Perceptual distances between two images, trained on human judgements of similarity.

Shape legend: x [N, 3, S, S] float in [-1, 1], S from 32; features of `embed`: one [N, D_l] float32 for each layer l;
distances [N] float32, 0 for equal images.

Both compare the activations of an AlexNet (models/alexnet.py) after each of its five ReLUs: at every position they are
normalized to unit length, subtracted, squared and summed with a weight for each channel; the mean over positions,
summed over the layers, is the distance.

- LPIPS (Zhang et al. 2018, arXiv:1801.03924), version 0.1: torchvision's ImageNet weights in the trunk, the weights of
  the channels from the package `lpips` (BSD-2-Clause), which are part of vultus.
- Shift-tolerant LPIPS (Ghildyal and Liu 2022, arXiv:2207.13686), version ST0.0: a trunk trained without the large
  strides, blurred before each downsampling. Both sets of weights are in the package `stlpips_pytorch` (BSD-2-Clause).
  Its distances are not LPIPS, and are never called so.

The networks are defined here because both packages import torchvision, and one of them IPython.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import safetensors.torch
import torch
from torch import Tensor

from vultus._download import WeightFile, find_weights
from vultus.models.alexnet import (
    STLPIPS_SHA256,
    AlexNetTrunk,
    Convolutions,
    ShiftTolerantTrunk,
    convolutions_of,
    stlpips_convolutions,
    stlpips_state,
)

ALEXNET_WEIGHTS = WeightFile(
    "alexnet-owt-7be5be79.pth",
    sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
LPIPS_HEADS = Path(__file__).parents[2] / "assets" / "lpips_alex_v0.1_heads.safetensors"


class Perceptual(Protocol):
    """The interface of a perceptual distance."""

    id: str  # identifies weights and formula: two of one id give the same distances
    short: str  # in the names of metrics
    weights_sha256: str
    dtype: torch.dtype

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [N, 3, S, S] in [-1, 1] -> for each layer float32 [N, D_l], computed once for each image."""
        ...

    def distance(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        """Distance row by row between two results of `embed` -> float32 [N]."""
        ...


class _AlexDistance:
    """The common part of both distances: images to features, features to a distance. Frozen, in float32.

    w (a - b)² = (√w a - √w b)²: the features of `embed` contain the weights of the channels and of the mean over
    positions, so a distance is the squared Euclidean distance of two vectors.
    """

    id: str
    short: str
    dtype = torch.float32
    step: int  # images at a time on a CPU; the activations of more do not fit into its cache
    trunk_class: ClassVar[type[AlexNetTrunk]]

    def __init__(
        self,
        convolutions: Convolutions,
        heads: Sequence[Tensor],
        *,
        device: torch.device | str = "cpu",
        weights_sha256: str = "",
    ) -> None:
        """`heads`: weights of the channels of each layer, [C] from 0."""
        self.weights_sha256 = weights_sha256
        self.trunk = self.trunk_class(convolutions, device=device)
        self.roots = [head.sqrt()[:, None, None].to(device) for head in heads]

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [N, 3, S, S] in [-1, 1] -> for each layer float32 [N, D_l]; at S = 128 at most 2.6 MB for an image."""
        step = self.step if x.device.type == "cpu" else max(1, len(x))
        parts = [self._embed(part) for part in x.split(step)]
        return tuple(torch.cat(layer) for layer in zip(*parts, strict=True))

    def distance(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        """Distance row by row between two results of `embed` -> float32 [N]."""
        return torch.stack([(one - other).square_().sum(1) for one, other in zip(a, b, strict=True)]).sum(0)

    def _embed(self, x: Tensor) -> list[Tensor]:
        features = []
        for y, root in zip(self.trunk.features(x), self.roots, strict=True):
            length = torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1e-10
            unit = (y / length).mul_(root / math.sqrt(y.shape[2] * y.shape[3]))
            features.append(unit.permute(0, 2, 3, 1).flatten(1))
        return features


class LPIPS(_AlexDistance):
    """Learned Perceptual Image Patch Similarity, AlexNet, version 0.1 (Zhang et al. 2018)."""

    id = "lpips-alex-v0.1"
    short = "lpips"
    step = 16
    trunk_class = AlexNetTrunk


class STLPIPS(_AlexDistance):
    """Shift-tolerant LPIPS, AlexNet, version ST0.0 (Ghildyal and Liu 2022)."""

    id = "stlpips-alex-vst0.0"
    short = "stlpips"
    step = 4
    trunk_class = ShiftTolerantTrunk


def load_lpips(*, device: torch.device | str = "cpu", fetch: bool = False) -> LPIPS:
    """LPIPS with its real weights, checked against a pinned sha256 and read with weights_only.

    AlexNet is downloaded (244 MB, of which 4 % are used) only with `fetch`. Raises UserError that says how to get it
    where it is missing, or names the file where it is damaged.
    """
    path, weights = find_weights(ALEXNET_WEIGHTS, fetch=fetch)
    names = [f"features.{number}" for number in (0, 3, 6, 8, 10)]
    heads = safetensors.torch.load_file(LPIPS_HEADS)
    return LPIPS(
        convolutions_of(torch.load(path, map_location="cpu", weights_only=True), names, path),
        [heads[f"lin{number}"] for number in range(5)],
        device=device,
        weights_sha256=weights.sha256,
    )


def load_stlpips(*, device: torch.device | str = "cpu") -> STLPIPS:
    """Shift-tolerant LPIPS with its real weights, checked against a pinned sha256 and read with weights_only.

    Raises UserError that names the extra where it is not installed, or the file where it is damaged.
    """
    state, path = stlpips_state()
    return STLPIPS(
        stlpips_convolutions(state, path),
        [state[f"lin{number}.model.1.weight"].flatten() for number in range(5)],
        device=device,
        weights_sha256=STLPIPS_SHA256,
    )

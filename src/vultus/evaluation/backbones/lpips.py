"""Perceptual distances between two images, trained on human judgements of similarity.

Shape legend: x [N, 3, S, S] float in [-1, 1], S from 32; features of `embed`: one [N, D_l] float32 for each layer l;
distances [N] float32, 0 for equal images.

Both compare the activations of an AlexNet (Krizhevsky 2014, arXiv:1404.5997) after each of its five ReLUs: at every
position they are normalized to unit length, subtracted, squared and summed with a weight for each channel; the mean
over positions, summed over the layers, is the distance.

- LPIPS (Zhang et al. 2018, arXiv:1801.03924), version 0.1: torchvision's ImageNet weights in the trunk, the weights of
  the channels from the package `lpips` (BSD-2-Clause), which are part of vultus.
- Shift-tolerant LPIPS (Ghildyal and Liu 2022, arXiv:2207.13686), version ST0.0: a trunk trained without the large
  strides, blurred before each downsampling. Both sets of weights are in the package `stlpips_pytorch` (BSD-2-Clause).
  Its distances are not LPIPS, and are never called so.

The networks are defined here because both packages import torchvision, and one of them IPython.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._download import WeightFile, find_weights
from vultus._files import sha256_file
from vultus.errors import UserError

ALEXNET_WEIGHTS = WeightFile(
    "alexnet-owt-7be5be79.pth",
    sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
LPIPS_HEADS = Path(__file__).parents[2] / "assets" / "lpips_alex_v0.1_heads.safetensors"

PACKAGE = "stlpips_pytorch"
STLPIPS_NAME = "alex_shift_tolerant.pth"
STLPIPS_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
EXTRA = "pip install 'vultus[eval]'"

SHAPES = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and spread, on [-1, 1]
TAPS = {"inside": (0.25, 0.5, 0.25), "rim": (0.5, 0.5)}  # of the blur; see STLPIPS


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

    def __init__(
        self,
        convolutions: Sequence[tuple[Tensor, Tensor]],
        heads: Sequence[Tensor],
        *,
        device: torch.device | str = "cpu",
        weights_sha256: str = "",
    ) -> None:
        """`convolutions`: weight and bias in the `SHAPES` above; `heads`: weights of their channels, [C] from 0."""
        self.weights_sha256 = weights_sha256
        self.convolutions = [
            (weight.to(device).contiguous(memory_format=torch.channels_last), bias.to(device))
            for weight, bias in convolutions
        ]
        self.roots = [head.sqrt()[:, None, None].to(device) for head in heads]
        self.shift, self.scale = (torch.tensor(values, device=device)[:, None, None] for values in (SHIFT, SCALE))

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [N, 3, S, S] in [-1, 1] -> for each layer float32 [N, D_l]; at S = 128 at most 2.6 MB for an image."""
        step = self.step if x.device.type == "cpu" else max(1, len(x))
        parts = [self._embed(part) for part in x.split(step)]
        return tuple(torch.cat(layer) for layer in zip(*parts, strict=True))

    def distance(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        """Distance row by row between two results of `embed` -> float32 [N]."""
        return torch.stack([(one - other).square_().sum(1) for one, other in zip(a, b, strict=True)]).sum(0)

    def _embed(self, x: Tensor) -> list[Tensor]:
        x = ((x.float() - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        features = []
        for y, root in zip(self._layers(x), self.roots, strict=True):
            length = torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1e-10
            unit = (y / length).mul_(root / math.sqrt(y.shape[2] * y.shape[3]))
            features.append(unit.permute(0, 2, 3, 1).flatten(1))
        return features

    def _layers(self, x: Tensor) -> Iterator[Tensor]:
        """Scaled images -> the activations after each of the five ReLUs, [N, C, H, W]."""
        raise NotImplementedError

    def _later(self, x: Tensor, layer: int) -> Tensor:
        """Convolution `layer`, 1 to 4, which keeps the side, and its ReLU."""
        weight, bias = self.convolutions[layer]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2).relu_()


class LPIPS(_AlexDistance):
    """Learned Perceptual Image Patch Similarity, AlexNet, version 0.1 (Zhang et al. 2018)."""

    id = "lpips-alex-v0.1"
    short = "lpips"
    step = 16

    def _layers(self, x: Tensor) -> Iterator[Tensor]:
        weight, bias = self.convolutions[0]
        x = F.conv2d(x, weight, bias, stride=4, padding=2).relu_()
        yield x
        for layer in range(1, 5):
            x = self._later(F.max_pool2d(x, 3, stride=2) if layer < 3 else x, layer)
            yield x


class STLPIPS(_AlexDistance):
    """Shift-tolerant LPIPS, AlexNet, version ST0.0 (Ghildyal and Liu 2022).

    Instead of a stride, every downsampling is a blur with [1, 2, 1] / 4 in both directions, of the input reflected by 2
    pixels, at every other position ("blur-pool", Zhang 2019, arXiv:1904.11486).
    """

    id = "stlpips-alex-vst0.0"
    short = "stlpips"
    step = 4

    def __init__(
        self,
        convolutions: Sequence[tuple[Tensor, Tensor]],
        heads: Sequence[Tensor],
        *,
        device: torch.device | str = "cpu",
        weights_sha256: str = "",
    ) -> None:
        """See the base class."""
        super().__init__(convolutions, heads, device=device, weights_sha256=weights_sha256)
        taps = torch.tensor(TAPS["inside"], device=device)
        blur = torch.outer(taps, taps)
        self.blurs = {channels: blur.expand(channels, 1, 3, 3).contiguous() for channels in (64, 192)}
        self.first = {
            (rows, columns): _blurred(convolutions[0][0], rows, columns).to(device) for rows in TAPS for columns in TAPS
        }

    def _layers(self, x: Tensor) -> Iterator[Tensor]:
        x = self._first(x).relu_()
        yield x
        for layer in range(1, 5):
            if layer < 3:
                x = F.pad(F.max_pool2d(x, 3, stride=1), (2, 2, 2, 2), mode="reflect")
                x = F.conv2d(x, self.blurs[x.shape[1]], stride=2, groups=x.shape[1])
            x = self._later(x, layer)
            yield x

    def _first(self, x: Tensor) -> Tensor:
        """The first convolution, 11 x 11 with stride 1, and the blur after it, in one: [N, 3, S, S] -> [N, 64, T, T].

        The convolution and a blur of its output with stride 2 equal one convolution of 13 x 13 taps with stride 2, for
        a third of the operations and a quarter of the activations. That holds inside. At the reflected border, the
        first output equals the second, and so do the last two where the side is odd. Where it is even, the last blur
        is [1, 1] / 2, which gives a convolution of 12 taps.
        """
        bias = self.convolutions[0][1]
        x = F.pad(x, (2, 2, 2, 2))
        y = F.pad(F.conv2d(x, self.first["inside", "inside"], bias, stride=2), (1, 1, 1, 1), mode="replicate")
        if x.shape[-1] % 2 == 0:
            right = F.conv2d(x[..., -12:], self.first["inside", "rim"], bias, stride=2)
            y[..., -1:] = F.pad(right, (0, 0, 1, 1), mode="replicate")
            bottom = F.conv2d(x[..., -12:, :], self.first["rim", "inside"], bias, stride=2)
            y[..., -1:, :-1] = F.pad(bottom, (1, 0, 0, 0), mode="replicate")
            y[..., -1:, -1:] = F.conv2d(x[..., -12:, -12:], self.first["rim", "rim"], bias)
        return y


def _blurred(weight: Tensor, rows: str, columns: str) -> Tensor:
    """The kernel of a convolution that is followed by a blur: [O, I, K, K] -> [O, I, K + n - 1, K + m - 1]."""
    blur = torch.outer(torch.tensor(TAPS[rows]), torch.tensor(TAPS[columns])).double()
    flat = weight.double().flatten(0, 1)[:, None]
    both = F.conv2d(flat, blur.flip(0, 1)[None, None], padding=(len(TAPS[rows]) - 1, len(TAPS[columns]) - 1))
    both = both.unflatten(0, weight.shape[:2])[:, :, 0].to(weight.dtype)
    return both.contiguous(memory_format=torch.channels_last)


def load_lpips(*, device: torch.device | str = "cpu", fetch: bool = False) -> LPIPS:
    """LPIPS with its real weights, checked against a pinned sha256 and read with weights_only.

    AlexNet is downloaded (244 MB, of which 4 % are used) only with `fetch`. Raises UserError that says how to get it
    where it is missing, or names the file where it is damaged.
    """
    path, weights = find_weights(ALEXNET_WEIGHTS, fetch=fetch)
    names = [f"features.{number}" for number in (0, 3, 6, 8, 10)]
    heads = safetensors.torch.load_file(LPIPS_HEADS)
    state = _read(path)
    return LPIPS(
        _convolutions(state, names, path),
        [heads[f"lin{number}"] for number in range(5)],
        device=device,
        weights_sha256=weights.sha256,
    )


def stlpips_path() -> Path | None:
    """The weight file in the installed package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "weights" / "vST0.0" / STLPIPS_NAME


def load_stlpips(*, device: torch.device | str = "cpu") -> STLPIPS:
    """Shift-tolerant LPIPS with its real weights, checked against a pinned sha256 and read with weights_only.

    Raises UserError that names the extra where it is not installed, or the file where it is damaged.
    """
    path = stlpips_path()
    if path is None:
        raise UserError(f"the weights of shift-tolerant LPIPS are not installed; {EXTRA}")
    if not path.is_file() or sha256_file(path) != STLPIPS_SHA256:
        raise UserError(f"{path}: missing or damaged; pip install --force-reinstall --no-deps {PACKAGE}")
    state = _read(path)
    names = ["net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13"]
    return STLPIPS(
        _convolutions(state, names, path),
        [state[f"lin{number}.model.1.weight"].flatten() for number in range(5)],
        device=device,
        weights_sha256=STLPIPS_SHA256,
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _convolutions(state: Mapping[str, Tensor], names: Sequence[str], path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the five convolutions by name. Raises UserError if one is missing or has another shape."""
    convolutions = []
    for name, shape in zip(names, SHAPES, strict=True):
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        if weight is None or bias is None or tuple(weight.shape) != shape:
            raise UserError(f"{path}: not the weights of this AlexNet (no {name} of shape {list(shape)})")
        convolutions.append((weight, bias))
    return convolutions

"""AlexNet's convolutions: the features of LPIPS and of shift-tolerant LPIPS, and of a discriminator.

Shape legend: x [N, 3, S, S] float in [-1, 1], S from 32; the features after the five ReLUs have 64, 192, 384, 256 and
256 channels. Of shift-tolerant LPIPS and S = 128 their sides are 65, 33, 17, 17 and 17.

AlexNet: Krizhevsky 2014, arXiv:1404.5997, trained on ImageNet. Nothing here is trained; gradients flow to the images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._files import sha256_file
from vultus.errors import UserError

PACKAGE = "stlpips_pytorch"
STLPIPS_NAME = "alex_shift_tolerant.pth"
STLPIPS_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
EXTRA = "pip install 'vultus[eval]'"

SHAPES = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))
CHANNELS = tuple(shape[0] for shape in SHAPES)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and spread, on [-1, 1]
TAPS = {"inside": (0.25, 0.5, 0.25), "rim": (0.5, 0.5)}  # of the blur; see ShiftTolerantTrunk

Convolutions = Sequence[tuple[Tensor, Tensor]]  # weight and bias of each, in the SHAPES above


class AlexNetTrunk:
    """torchvision's AlexNet: a first convolution with stride 4, max-pools with stride 2.

    Args:
        convolutions: weights and biases.
        device, dtype: of the computation.
    """

    def __init__(
        self,
        convolutions: Convolutions,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        self.convolutions = [
            (weight.to(device, dtype).contiguous(memory_format=torch.channels_last), bias.to(device, dtype))
            for weight, bias in convolutions
        ]
        self.shift, self.scale = (torch.tensor(values, device=device)[:, None, None] for values in (SHIFT, SCALE))

    def features(self, x: Tensor, last: int = 4) -> list[Tensor]:
        """x [N, 3, S, S] in [-1, 1] -> the activations after the ReLUs 0 to `last`, [N, C, H, W] each, in `dtype`."""
        x = ((x.float() - self.shift) / self.scale).to(self.dtype, memory_format=torch.channels_last)
        return [features for _, features in zip(range(last + 1), self._layers(x), strict=False)]

    def _layers(self, x: Tensor) -> Iterator[Tensor]:
        """Scaled images -> the activations after each of the five ReLUs."""
        weight, bias = self.convolutions[0]
        x = F.conv2d(x, weight, bias, stride=4, padding=2).relu_()
        yield x
        for layer in range(1, 5):
            x = self._later(F.max_pool2d(x, 3, stride=2) if layer < 3 else x, layer)
            yield x

    def _later(self, x: Tensor, layer: int) -> Tensor:
        """Convolution `layer`, 1 to 4, which keeps the side, and its ReLU."""
        weight, bias = self.convolutions[layer]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2).relu_()


class ShiftTolerantTrunk(AlexNetTrunk):
    """The trunk of shift-tolerant LPIPS (Ghildyal and Liu 2022, arXiv:2207.13686), version ST0.0.

    Instead of a stride, every downsampling is a blur with [1, 2, 1] / 4 in both directions, of the input reflected by 2
    pixels, at every other position ("blur-pool", Zhang 2019, arXiv:1904.11486).
    """

    def __init__(
        self,
        convolutions: Convolutions,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """See the base class."""
        super().__init__(convolutions, device=device, dtype=dtype)
        taps = torch.tensor(TAPS["inside"], device=device)
        blur = torch.outer(taps, taps).to(dtype)
        self.blurs = {channels: blur.expand(channels, 1, 3, 3).contiguous() for channels in (64, 192)}
        self.first = {
            (rows, columns): _blurred(convolutions[0][0], rows, columns).to(device, dtype)
            for rows in TAPS
            for columns in TAPS
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


# --- weights ----------------------------------------------------------------------------------------------------------


def stlpips_path() -> Path | None:
    """The weight file in the installed package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "weights" / "vST0.0" / STLPIPS_NAME


def stlpips_state() -> tuple[Mapping[str, Tensor], Path]:
    """The weights of shift-tolerant LPIPS, trunk and heads, and their file; checked against a pinned sha256.

    Raises UserError that names the extra where it is not installed, or the file where it is damaged.
    """
    path = stlpips_path()
    if path is None:
        raise UserError(f"the weights of shift-tolerant LPIPS are not installed; {EXTRA}")
    if not path.is_file() or sha256_file(path) != STLPIPS_SHA256:
        raise UserError(f"{path}: missing or damaged; pip install --force-reinstall --no-deps {PACKAGE}")
    return torch.load(path, map_location="cpu", weights_only=True), path


def stlpips_convolutions(state: Mapping[str, Tensor], path: Path) -> list[tuple[Tensor, Tensor]]:
    """The convolutions in the result of stlpips_state()."""
    names = ["net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13"]
    return convolutions_of(state, names, path)


def convolutions_of(state: Mapping[str, Tensor], names: Sequence[str], path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the five convolutions by name. Raises UserError if one is missing or has another shape."""
    convolutions = []
    for name, shape in zip(names, SHAPES, strict=True):
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        if weight is None or bias is None or tuple(weight.shape) != shape:
            raise UserError(f"{path}: not the weights of this AlexNet (no {name} of shape {list(shape)})")
        convolutions.append((weight, bias))
    return convolutions

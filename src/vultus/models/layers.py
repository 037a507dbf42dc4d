"""Layers that compute in the dtype of their input, the sizes of the stages, and initializations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # negative slope of every leaky ReLU
OPTIONAL = ("noise_maps", "fine_width")  # settings of parts that only some kinds of network have; 0: without


def without_unused(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a network without those OPTIONAL ones that are 0.

    Kinds that have no such part need no argument for it, and earlier versions read what is written without them.
    """
    return {name: value for name, value in settings.items() if value or name not in OPTIONAL}


class Conv2d(nn.Conv2d):
    """Convolution in the dtype of its input; the parameters stay float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class GainConv2d(Conv2d):
    """Convolution whose weights are multiplied by `gain` in the forward pass."""

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, (self.weight * gain).to(x.dtype), bias)


class ConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution in the dtype of its input; the parameters stay float32."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        stride, padding = self.stride, self.padding
        return F.conv_transpose2d(x, self.weight.to(x.dtype), bias, stride, padding)  # type: ignore[arg-type]


class Linear(nn.Linear):
    """Linear layer in the dtype of its input; the parameters stay float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def stage_sides(resolution: int, finest: int) -> list[int]:
    """Sides of the stages: [4, 8, ..., finest]. Raises ValueError unless resolution is a power of two from 32."""
    if resolution < 32 or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of two from 32, not {resolution}")
    return [2**i for i in range(2, finest.bit_length())]


def widths(sides: list[int], base_width: int, max_width: int) -> list[int]:
    """Channels of each stage: base_width at the last, twice as many at each one before, at most max_width."""
    return [min(max_width, base_width * sides[-1] // side) for side in sides]


class Condition(nn.Module):
    """(z, c) -> [N, width]: z and c concatenated, each first projected to `projection` features unless that is 0."""

    def __init__(self, z_dim: int, c_dim: int, projection: int) -> None:
        super().__init__()
        self.scale = math.sqrt(c_dim)
        self.width = 2 * projection if projection else z_dim + c_dim
        self.from_z: nn.Module = Linear(z_dim, projection) if projection else nn.Identity()
        self.from_c: nn.Module = Linear(c_dim, projection) if projection else nn.Identity()
        self.projected = projection > 0

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        h = torch.cat([self.from_z(z), self.from_c(c.to(z.dtype) * self.scale)], 1)
        return F.leaky_relu(h, SLOPE) if self.projected else h


def init_he(module: nn.Module) -> None:
    """He-normal weights for leaky ReLUs of SLOPE, zero biases. To be called before spectral_norm."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_dcgan(module: nn.Module) -> None:
    """N(0, 0.02) for weights of convolutions, N(1, 0.02) for scales of batch-norms, He-normal for linear layers."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, SLOPE)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

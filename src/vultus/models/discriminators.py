"""Discriminators.

Shapes: x [N, 3, R, R] image in [-1, 1]; c [N, c_dim] unit-norm embedding; logits [N]. A network computes in the dtype
of x (float32 or bfloat16); its parameters and the logits are float32.

Initialization: `dcgan` as in generators.py; `projection` He-normal weights, biases 0. Both use spectral normalization.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vultus.models.layers import (
    SLOPE,
    Conv2d,
    GainConv2d,
    Linear,
    init_dcgan,
    init_he,
    stage_sides,
    widths,
    without_unused,
)


class DCGANDiscriminator(nn.Module):
    """Strided convolutions from R x R to 4x4, concatenation with the projected embedding, one logit.

    Spectral normalization of the convolutions (Miyato et al. 2018, arXiv:1802.05957) replaces DCGAN's batch-norm. With
    batch-norm the gradient of the logit with respect to the image was twenty times that of 10 MSE, and the
    reconstruction became worse during training.
    """

    def __init__(self, *, resolution: int, c_dim: int, base_width: int, max_width: int, projection: int) -> None:
        super().__init__()
        sides = stage_sides(resolution, resolution // 2)
        channels = [3, *widths(sides, base_width, max_width)[::-1]]
        self.scale = math.sqrt(c_dim)
        self.stages = nn.ModuleList(
            Conv2d(cin, cout, 4, 2, 1) for cin, cout in zip(channels[:-1], channels[1:], strict=True)
        )
        self.from_c = Linear(c_dim, projection)
        self.joint = Conv2d(channels[-1] + projection, channels[-1], 1)
        self.head = Conv2d(channels[-1], 1, 4)
        self.apply(init_dcgan)
        for convolution in (*self.stages, self.joint, self.head):
            spectral_norm(convolution)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = x
        for stage in self.stages:
            h = F.leaky_relu(stage(h), SLOPE)
        e = F.leaky_relu(self.from_c(c.to(x.dtype) * self.scale), SLOPE)
        h = torch.cat([h, e[:, :, None, None].expand(-1, -1, *h.shape[2:])], 1)
        return self.head(F.leaky_relu(self.joint(h), SLOPE)).flatten().float()


class ProjectionDiscriminator(nn.Module):
    """Pixel unshuffle to R/2 x R/2 x 12, then strided convolutions with spectral normalization to 4x4. The logit is an
    unconditional term plus the inner product of features and projected embedding (Miyato & Koyama 2018,
    arXiv:1802.05637). With `fine_width`, a convolution at R x R and a strided one replace the pixel unshuffle.

    `read` runs the convolutions once for several outputs; `match` computes the conditional term from its features.
    """

    def __init__(
        self, *, resolution: int, c_dim: int, base_width: int, max_width: int, projection: int, fine_width: int = 0
    ) -> None:
        super().__init__()
        sides = stage_sides(resolution, resolution // 2)
        channels = widths(sides, base_width, max_width)[::-1]
        self.scale = math.sqrt(c_dim)
        self.fine = Conv2d(3, fine_width, 3, padding=1) if fine_width else None
        self.stem = GainConv2d(fine_width, channels[0], 4, 2, 1) if fine_width else GainConv2d(12, channels[0], 3, 1, 1)
        self.stages = nn.ModuleList(
            GainConv2d(cin, cout, 4, 2, 1) for cin, cout in zip(channels[:-1], channels[1:], strict=True)
        )
        self.patch = Conv2d(channels[-2], 1, 1)
        self.features = Linear(channels[-1] * 16, projection)
        self.from_c = Linear(c_dim, projection)
        self.head = Linear(projection, 1)
        self.apply(init_he)
        fine = () if self.fine is None else (self.fine,)
        for layer in (*fine, self.stem, *self.stages, self.patch, self.features, self.from_c, self.head):
            spectral_norm(layer)
        self.gain = nn.Parameter(torch.ones(3))  # of the three logits, which spectral normalization bounds

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x -> unconditional logits [N], features [N, projection], logits of 8x8 patches [N, 8, 8]."""
        if self.fine is None:
            h = self.stem(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        else:
            h = F.leaky_relu(self.fine(x.contiguous(memory_format=torch.channels_last)), SLOPE, inplace=True)
            h = self.stem(h, math.sqrt(2))
        h = F.leaky_relu(h, SLOPE, inplace=True)
        for stage in self.stages:
            # A leaky ReLU about halves the variance, and spectral normalization keeps the weights from growing. The
            # gain of sqrt(2) compensates; it is applied to the weight, which is smaller than the features.
            h = F.leaky_relu(stage(h, math.sqrt(2)), SLOPE, inplace=True)
            if h.shape[-1] == 8:
                patch = self.patch(h)
        # The last layers are small and stay in float32.
        h = F.leaky_relu(self.features(h.flatten(1).float()), SLOPE, inplace=True)
        return self.head(h).squeeze(1) * self.gain[0], h, patch.squeeze(1).float() * self.gain[1]

    def match(self, features: Tensor, c: Tensor) -> Tensor:
        """Conditional term of the logits [N]: features [N, projection] and embeddings c [N, c_dim]."""
        return (features * self.from_c(c * self.scale)).sum(1) * self.gain[2]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        logits, features, _ = self.read(x)
        return logits + self.match(features, c)


DISCRIMINATORS: dict[str, type[nn.Module]] = {"dcgan": DCGANDiscriminator, "projection": ProjectionDiscriminator}


def build_discriminator(*, kind: str, **arguments: Any) -> nn.Module:
    """The discriminator with these fields of DiscriminatorConfig, in channels_last, with initial weights."""
    return DISCRIMINATORS[kind](**without_unused(arguments)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

"""Generators.

Shapes: z [N, z_dim] noise, standard normal; c [N, c_dim] unit-norm embedding; x [N, 3, R, R] image in [-1, 1]. A
network computes in the dtype of z (float32 or bfloat16); its parameters and its output are float32.

Initialization:
- dcgan: weights N(0, 0.02), batch-norm scales N(1, 0.02), biases 0 (Radford et al. 2016, arXiv:1511.06434).
- conditional-norm: He-normal weights, biases 0. The layers that compute scales and shifts have weights 0.3 times as
  large, so that a conditional norm starts close to a plain one. So has the last layer, with the same weights for the
  four pixels of a pixel shuffle (Aitken et al. 2017, arXiv:1707.02937), which avoids a checkerboard pattern.
- The entries of a unit-norm embedding are of the order 1/sqrt(c_dim). The embedding is multiplied by sqrt(c_dim), so
  that its entries are of the same order as those of the noise.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vultus.models.hub import HubMixin
from vultus.models.layers import (
    SLOPE,
    Condition,
    Conv2d,
    ConvTranspose2d,
    Linear,
    init_dcgan,
    init_he,
    stage_sides,
    widths,
    without_unused,
)


class GeneratorNetwork(nn.Module, HubMixin):
    """Base class of the generators: network(z, c) -> x.

    `GeneratorNetwork.from_pretrained("user/name" or folder)` loads a generator of any kind; see hub.py.

    Args:
        resolution: side R of the images in pixels.
        z_dim: length of the noise vector.
        c_dim: length of the embedding.

    Attributes:
        population: the population prior (see sampling/population.py), or empty; save_pretrained stores it.
        metadata: the metadata of the snapshot without `generator`; save_pretrained stores it.
        path: the file that the weights were read from, for messages; or None.
    """

    path: Path | None = None

    def __init__(self, resolution: int, z_dim: int, c_dim: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.population: dict[str, Tensor] = {}
        self.metadata: dict[str, Any] = {}

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Images x [N, 3, R, R] float32 in [-1, 1] of noise z [N, z_dim] and embeddings c [N, c_dim]."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The fields of GeneratorConfig that this network was built with."""
        kind = next(kind for kind, known in GENERATORS.items() if type(self) is known)
        assert isinstance(self._hub_mixin_config, dict)  # the arguments of the constructor, stored by ModelHubMixin
        return {"kind": kind} | without_unused(self._hub_mixin_config)

    @classmethod
    def build(cls, **settings: Any) -> Any:
        """See build_generator."""
        return build_generator(**settings)


MAP_SIDE = 8  # of the maps that are part of the noise


# --- DCGAN (Radford et al. 2016), conditional ------------------------------------------------------------------------


class DCGANGenerator(GeneratorNetwork):
    """Transposed convolutions from 4x4 to R x R with batch-norm and ReLU, then tanh."""

    def __init__(
        self, *, resolution: int, z_dim: int, c_dim: int, base_width: int, max_width: int, projection: int
    ) -> None:
        super().__init__(resolution, z_dim, c_dim)
        sides = stage_sides(resolution, resolution // 2)
        channels = widths(sides, base_width, max_width)
        self.condition = Condition(z_dim, c_dim, projection)
        self.stem = ConvTranspose2d(self.condition.width, channels[0], 4, 1, 0, bias=False)
        self.stages = nn.ModuleList(
            ConvTranspose2d(cin, cout, 4, 2, 1, bias=False)
            for cin, cout in zip(channels[:-1], channels[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in channels)
        self.to_rgb = ConvTranspose2d(channels[-1], 3, 4, 2, 1)
        self.apply(init_dcgan)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.stem(self.condition(z, c)[:, :, None, None])))
        for stage, norm in zip(self.stages, self.norms[1:], strict=True):
            h = F.relu(norm(stage(h)))
        return torch.tanh(self.to_rgb(h).float())


# --- conditional batch-norm ------------------------------------------------------------------------------------------


class ConditionalNorm(nn.Module):
    """Batch-norm with a scale and a shift per sample and channel, affine functions of w [N, w_dim].

    de Vries et al. 2017, arXiv:1707.00683; with noise in w, Brock et al. 2018, arXiv:1809.11096.
    """

    def __init__(self, channels: int, w_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = Linear(w_dim, 2 * channels)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        return _modulated(self.norm(h), self.affine(w))


class ConditionalNormBlock(nn.Module):
    """Residual block: 1x1 convolution to `cout` channels, upsampling by 2 if `up`, then
    x + conv(act(norm(conv(act(norm(x)))))), or x + conv(act(norm(x))) if not `deep`."""

    def __init__(self, cin: int, cout: int, w_dim: int, *, up: bool, deep: bool) -> None:
        super().__init__()
        self.up, self.deep = up, deep
        self.skip: nn.Module = Conv2d(cin, cout, 1, bias=False) if cin != cout else nn.Identity()
        if deep:
            self.norm1 = ConditionalNorm(cout, w_dim)
            self.conv1 = Conv2d(cout, cout, 3, padding=1, bias=False)
        self.norm2 = ConditionalNorm(cout, w_dim)
        self.conv2 = Conv2d(cout, cout, 3, padding=1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.skip(x)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        h = self.conv1(F.leaky_relu(self.norm1(x, w), SLOPE, inplace=True)) if self.deep else x
        return x + self.conv2(F.leaky_relu(self.norm2(h, w), SLOPE, inplace=True))


class ConditionalNormGenerator(GeneratorNetwork):
    """Residual blocks with conditional batch-norm from 4x4 to R/2 x R/2, then a convolution to 12 channels and a pixel
    shuffle to R x R. `projection` is the width of w; the noise gets half as many features as the embedding. With
    `fine_width` one more block of that many channels, at R x R, takes the place of the pixel shuffle. The last
    64 * `noise_maps` numbers of the noise are maps of 8x8, which are added to the features of that size.

    Blocks of 64x64 and larger have one convolution: a second one would cost as much as all smaller blocks together.
    """

    def __init__(
        self,
        *,
        resolution: int,
        z_dim: int,
        c_dim: int,
        base_width: int,
        max_width: int,
        projection: int,
        noise_maps: int = 0,
        fine_width: int = 0,
    ) -> None:
        super().__init__(resolution, z_dim, c_dim)
        if projection < 2:
            raise ValueError(f"a conditional-norm generator needs a projection of 2 or more, not {projection}")
        sides = stage_sides(resolution, resolution // 2)
        channels = widths(sides, base_width, max_width)
        if fine_width:
            sides, channels = [*sides, resolution], [*channels, fine_width]
        self.scale = math.sqrt(c_dim)
        self.maps = noise_maps
        self.from_z = Linear(z_dim - noise_maps * MAP_SIDE**2, projection // 2)
        self.from_c = Linear(c_dim, projection)
        self.from_maps = Conv2d(noise_maps, channels[sides.index(MAP_SIDE)], 1, bias=False) if noise_maps else None
        joined = projection + projection // 2
        self.mapping = Linear(joined, projection)
        self.stem = Linear(joined, channels[0] * 16)
        self.blocks = nn.ModuleList(
            ConditionalNormBlock(cin, cout, projection, up=side > 4, deep=side < 64)
            for side, cin, cout in zip(sides, [channels[0], *channels[:-1]], channels, strict=True)
        )
        self.norm = ConditionalNorm(channels[-1], projection)
        self.shuffle = 1 if fine_width else 2
        self.to_rgb = Conv2d(channels[-1], 3 * self.shuffle**2, 3, padding=1)
        self.apply(init_he)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ConditionalNorm):
                    module.affine.weight.mul_(0.3)
            first = self.to_rgb.weight[:: self.shuffle**2]
            self.to_rgb.weight.copy_(0.3 * first.repeat_interleave(self.shuffle**2, 0))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        z, maps = z.split([z.shape[1] - self.maps * MAP_SIDE**2, self.maps * MAP_SIDE**2], 1)
        s = F.leaky_relu(torch.cat([self.from_z(z), self.from_c(c.to(z.dtype) * self.scale)], 1), SLOPE)
        w = F.leaky_relu(self.mapping(s), SLOPE)
        h = self.stem(s).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, w)
            if self.from_maps is not None and h.shape[-1] == MAP_SIDE:
                h = h + self.from_maps(maps.unflatten(1, (self.maps, MAP_SIDE, MAP_SIDE)))
        h = self.to_rgb(F.leaky_relu(self.norm(h, w), SLOPE, inplace=True))
        if self.shuffle > 1:
            h = F.pixel_shuffle(h, self.shuffle)
        return torch.tanh(h.float())


def _modulated(h: Tensor, parameters: Tensor) -> Tensor:
    """h * (1 + scale) + shift per channel (FiLM, Perez et al. 2018, arXiv:1709.07871)."""
    scale, shift = parameters[:, :, None, None].chunk(2, 1)
    return torch.addcmul(shift, h, 1 + scale)


GENERATORS: dict[str, type[GeneratorNetwork]] = {
    "dcgan": DCGANGenerator,
    "conditional-norm": ConditionalNormGenerator,
}


def build_generator(*, kind: str, **arguments: Any) -> GeneratorNetwork:
    """The generator with these fields of GeneratorConfig, in channels_last, with initial weights."""
    return GENERATORS[kind](**without_unused(arguments)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

"""Generators and discriminators.

Shape legend: z [N, z_dim] noise, standard normal; c [N, c_dim] unit-norm embedding; x [N, 3, R, R] picture in [-1, 1];
logits [N]. A network computes in the dtype of the noise or picture that it is given (float32 or bfloat16) and keeps its
parameters in float32; pictures and logits come out in float32.

Initialisation, all rules:
- dcgan: weights N(0, 0.02), batch-norm scales N(1, 0.02), biases 0 (Radford et al. 2016, arXiv:1511.06434).
- residual: weights N(0, 1), multiplied in use by He's constant sqrt(2 / (1 + 0.2^2) / fan_in): Adam then moves each
  layer's output at a rate that does not grow with its fan-in (Karras et al. 2018, arXiv:1710.10196, section 4.1;
  without it these networks, which have no normalisation, blew up within 300 steps at a learning rate of 1e-3). The
  second convolution of each block 0, so that every block starts as its skip path (Zhang et al. 2019,
  arXiv:1901.09321); modulations 0; biases 0; the discriminator's two output layers 0, so that all logits start at 0;
  the generator's last layer a tenth, so that it starts near grey.
- conditional-norm, projection: He-normal weights, biases 0; the generator's scales and shifts 0.3 times that, so that
  the norms start near plain ones; its last layer 0.3 times that, and equal for the four pixels of a shuffle (Aitken et
  al. 2017, arXiv:1707.02937), so that there is no grid at the outset.
- An embedding of unit norm has entries of size 1/sqrt(512); it is multiplied by sqrt(c_dim) on entry, so that it
  speaks as loud as the noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vultus.models.hub import Pretrained
from vultus.models.layers import (
    SLOPE,
    Condition,
    Conv2d,
    ConvTranspose2d,
    EqualisedConv2d,
    EqualisedLinear,
    GainConv2d,
    Linear,
    init_he,
    stage_sides,
    widths,
)


class Generator(nn.Module, Pretrained):
    """What every generator has: generator(z, c) -> x, and the keyword arguments that it was built with.

    `Generator.from_pretrained("user/name" or folder)` gives the generator of whatever kind; see pretrained.py.
    """

    def __init__(self, resolution: int, z_dim: int, c_dim: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.people: dict[str, Tensor] = {}
        self.metadata: dict[str, Any] = {}

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        kind = next(kind for kind, known in GENERATORS.items() if type(self) is known)
        assert isinstance(self._hub_mixin_config, dict)  # the constructor's arguments, remembered by the mixin
        return {"kind": kind} | self._hub_mixin_config

    @classmethod
    def build(cls, **settings: Any) -> Any:
        return build_generator(**settings)


# --- DCGAN (Radford et al. 2016), conditional ------------------------------------------------------------------------


class DCGANGenerator(Generator):
    """Transposed convolutions from 4x4 to R x R with batch-norm and ReLU, tanh at the end."""

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


class DCGANDiscriminator(nn.Module):
    """Strided convolutions from R x R to 4x4; there the projected embedding joins, and one logit judges the pair.

    Spectral normalisation of the convolutions (Miyato et al. 2018, arXiv:1802.05957) stands in for DCGAN's batch-norm:
    with batch-norm the gradient of the logit to the picture was twenty times that of 10 MSE, and the reconstruction
    got worse with training (docs/log.md).
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


# --- residual networks without normalisation -------------------------------------------------------------------------


class GeneratorBlock(nn.Module):
    """Upsample, then x + conv(act(modulate(conv(act(x))))). Channels cin -> cout, side doubled if `up`."""

    def __init__(self, cin: int, cout: int, w_dim: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.skip: nn.Module = EqualisedConv2d(cin, cout, 1, bias=False) if cin != cout else nn.Identity()
        self.conv1 = EqualisedConv2d(cout, cout, 3, padding=1)
        self.conv2 = EqualisedConv2d(cout, cout, 3, padding=1)
        self.modulate1 = EqualisedLinear(w_dim, 2 * cout)
        self.modulate2 = EqualisedLinear(w_dim, 2 * cout)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.skip(x)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        h = self.conv1(F.leaky_relu(_modulated(x, self.modulate1(w)), SLOPE))
        h = self.conv2(F.leaky_relu(_modulated(h, self.modulate2(w)), SLOPE))
        return x + h


def _modulated(h: Tensor, parameters: Tensor) -> Tensor:
    """h * (1 + scale) + shift per channel (FiLM, Perez et al. 2018, arXiv:1709.07871)."""
    scale, shift = parameters[:, :, None, None].chunk(2, 1)
    return torch.addcmul(shift, h, 1 + scale)


class ResidualGenerator(Generator):
    """Modulated residual blocks from 4x4 to R/2 x R/2, then a convolution to 12 channels shuffled to R x R pixels.

    Nothing runs at full resolution: on a CPU a plain stage at 128x128 takes most of the time of all stages together.
    """

    def __init__(
        self, *, resolution: int, z_dim: int, c_dim: int, base_width: int, max_width: int, projection: int
    ) -> None:
        super().__init__(resolution, z_dim, c_dim)
        sides = stage_sides(resolution, resolution // 2)
        channels = widths(sides, base_width, max_width)
        self.condition = Condition(z_dim, c_dim, projection, EqualisedLinear)
        w_dim = self.condition.width
        self.mapping = EqualisedLinear(w_dim, w_dim)
        self.stem = EqualisedLinear(w_dim, channels[0] * 16)
        self.blocks = nn.ModuleList(
            GeneratorBlock(cin, cout, w_dim, up=index > 0)
            for index, (cin, cout) in enumerate(zip([channels[0], *channels[:-1]], channels, strict=True))
        )
        self.to_rgb = EqualisedConv2d(channels[-1], 12, 3, padding=1)
        self.apply(init_residual)
        with torch.no_grad():
            self.to_rgb.weight.mul_(0.1)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        w = self.condition(z, c)
        w = F.leaky_relu(self.mapping(w), SLOPE)
        h = self.stem(w).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, w)
        return F.pixel_shuffle(self.to_rgb(F.leaky_relu(h, SLOPE)), 2).float()


class DiscriminatorBlock(nn.Module):
    """x + conv(act(conv(act(x)))), then average down by 2 unless `last`. Channels cin -> cout."""

    def __init__(self, cin: int, cout: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = EqualisedConv2d(cin, cin, 3, padding=1)
        self.conv2 = EqualisedConv2d(cin, cin, 3, padding=1)
        self.skip: nn.Module = EqualisedConv2d(cin, cout, 1, bias=False) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(x, SLOPE))
        x = x + self.conv2(F.leaky_relu(h, SLOPE))
        return self.skip(F.avg_pool2d(x, 2) if self.down else x)


class ResidualDiscriminator(nn.Module):
    """Pixels folded to R/2 x R/2 x 12, residual blocks down to 4x4; the logit is an unconditional term plus the
    projection of the features on the embedding (Miyato & Koyama 2018, arXiv:1802.05637)."""

    def __init__(self, *, resolution: int, c_dim: int, base_width: int, max_width: int, projection: int) -> None:
        super().__init__()
        sides = stage_sides(resolution, resolution // 2)
        channels = widths(sides, base_width, max_width)[::-1]
        self.scale = math.sqrt(c_dim)
        self.stem = EqualisedConv2d(12, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(cin, cout, down=index < len(channels) - 1)
            for index, (cin, cout) in enumerate(zip(channels, [*channels[1:], channels[-1]], strict=True))
        )
        self.features = EqualisedLinear(channels[-1] * 16, projection)
        self.from_c = EqualisedLinear(c_dim, projection, bias=False)
        self.head = EqualisedLinear(projection, 1)
        self.apply(init_residual)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.from_c.weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.stem(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h)
        # The head is small and its logits are subtracted from each other: float32.
        h = F.leaky_relu(self.features(F.leaky_relu(h, SLOPE).flatten(1).float()), SLOPE)
        e = self.from_c(c.float() * self.scale)
        return self.head(h).squeeze(1) + (h * e).sum(1) / math.sqrt(h.shape[1])


def init_residual(module: nn.Module) -> None:
    """N(0, 1) weights, zero biases; second convolutions and modulations start at zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, GeneratorBlock):
        for layer in (module.conv2, module.modulate1, module.modulate2):
            nn.init.zeros_(layer.weight)
    if isinstance(module, DiscriminatorBlock):
        nn.init.zeros_(module.conv2.weight)


# --- conditional batch-norm, and a discriminator by projection --------------------------------------------------------


class ConditionalNorm(nn.Module):
    """Batch-norm whose scale and shift are an affine function of w [N, w_dim], sample by sample (de Vries et al. 2017,
    arXiv:1707.00683; of the noise too, Brock et al. 2018, arXiv:1809.11096)."""

    def __init__(self, channels: int, w_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = Linear(w_dim, 2 * channels)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        return _modulated(self.norm(h), self.affine(w))


class ConditionalNormBlock(nn.Module):
    """1x1 to cout, upsample if `up`, then x + conv(act(norm(conv(act(norm(x)))))), or with one convolution if not
    `deep`."""

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


class ConditionalNormGenerator(Generator):
    """Residual blocks under conditional batch-norm from 4x4 to R/2 x R/2, then a convolution to 12 channels shuffled to
    R x R pixels. `projection` is the width of w; the noise gets half as many features as the embedding.

    Blocks of 64x64 and more have one convolution: a second one there costs as much as all the blocks before.
    """

    def __init__(
        self, *, resolution: int, z_dim: int, c_dim: int, base_width: int, max_width: int, projection: int
    ) -> None:
        super().__init__(resolution, z_dim, c_dim)
        if projection < 2:
            raise ValueError(f"a conditional-norm generator needs a projection of 2 or more, not {projection}")
        sides = stage_sides(resolution, resolution // 2)
        channels = widths(sides, base_width, max_width)
        self.scale = math.sqrt(c_dim)
        self.from_z, self.from_c = Linear(z_dim, projection // 2), Linear(c_dim, projection)
        joined = projection + projection // 2
        self.mapping = Linear(joined, projection)
        self.stem = Linear(joined, channels[0] * 16)
        self.blocks = nn.ModuleList(
            ConditionalNormBlock(cin, cout, projection, up=side > 4, deep=side < 64)
            for side, cin, cout in zip(sides, [channels[0], *channels[:-1]], channels, strict=True)
        )
        self.norm = ConditionalNorm(channels[-1], projection)
        self.to_rgb = Conv2d(channels[-1], 12, 3, padding=1)
        self.apply(init_he)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ConditionalNorm):
                    module.affine.weight.mul_(0.3)
            self.to_rgb.weight.copy_(0.3 * self.to_rgb.weight[::4].repeat_interleave(4, 0))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        s = F.leaky_relu(torch.cat([self.from_z(z), self.from_c(c.to(z.dtype) * self.scale)], 1), SLOPE)
        w = F.leaky_relu(self.mapping(s), SLOPE)
        h = self.stem(s).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, w)
        h = self.to_rgb(F.leaky_relu(self.norm(h, w), SLOPE, inplace=True))
        return torch.tanh(F.pixel_shuffle(h, 2).float())


class ProjectionDiscriminator(nn.Module):
    """Pixels folded to R/2 x R/2 x 12, strided convolutions under spectral normalisation to 4x4. The logit is an
    unconditional term plus the projection of the features on the embedding (Miyato & Koyama 2018, arXiv:1802.05637).

    `read` shares the convolutions between several questions about the same pictures: x -> (unconditional logits [N],
    features [N, projection], a logit for each of 8x8 patches [N, 8, 8]); `match` gives the conditional term.
    """

    def __init__(self, *, resolution: int, c_dim: int, base_width: int, max_width: int, projection: int) -> None:
        super().__init__()
        sides = stage_sides(resolution, resolution // 2)
        channels = widths(sides, base_width, max_width)[::-1]
        self.scale = math.sqrt(c_dim)
        self.stem = Conv2d(12, channels[0], 3, padding=1)
        self.stages = nn.ModuleList(
            GainConv2d(cin, cout, 4, 2, 1) for cin, cout in zip(channels[:-1], channels[1:], strict=True)
        )
        self.patch = Conv2d(channels[-2], 1, 1)
        self.features = Linear(channels[-1] * 16, projection)
        self.from_c = Linear(c_dim, projection)
        self.head = Linear(projection, 1)
        self.apply(init_he)
        for layer in (self.stem, *self.stages, self.patch, self.features, self.from_c, self.head):
            spectral_norm(layer)
        self.gain = nn.Parameter(torch.ones(3))  # of the three logits, which would otherwise be bounded

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unconditional logits [N], features [N, projection], patch logits [N, 8, 8]."""
        h = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        h = F.leaky_relu(self.stem(h), SLOPE, inplace=True)
        for stage in self.stages:
            # Spectral normalisation halves the signal at every leaky ReLU; the weight, which is small, gives it back.
            h = F.leaky_relu(stage(h, math.sqrt(2)), SLOPE, inplace=True)
            if h.shape[-1] == 8:
                patch = self.patch(h)
        # The heads are small: float32.
        h = F.leaky_relu(self.features(h.flatten(1).float()), SLOPE, inplace=True)
        return self.head(h).squeeze(1) * self.gain[0], h, patch.squeeze(1).float() * self.gain[1]

    def match(self, features: Tensor, c: Tensor) -> Tensor:
        """How well features [N, projection] fit embeddings c [N, c_dim] -> [N]."""
        return (features * self.from_c(c * self.scale)).sum(1) * self.gain[2]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        logits, features, _ = self.read(x)
        return logits + self.match(features, c)


GENERATORS: dict[str, type[Generator]] = {
    "dcgan": DCGANGenerator,
    "residual": ResidualGenerator,
    "conditional-norm": ConditionalNormGenerator,
}
DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "dcgan": DCGANDiscriminator,
    "residual": ResidualDiscriminator,
    "projection": ProjectionDiscriminator,
}


def build_generator(*, kind: str, **arguments: Any) -> Generator:
    """A generator by the fields of GeneratorConfig, channels_last, with fresh weights."""
    return GENERATORS[kind](**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_discriminator(*, kind: str, **arguments: Any) -> nn.Module:
    """A discriminator by the fields of DiscriminatorConfig, channels_last, with fresh weights."""
    return DISCRIMINATORS[kind](**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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

from vultus.pretrained import Pretrained

SLOPE = 0.2  # of every leaky ReLU


class Conv2d(nn.Conv2d):
    """Convolution in the dtype of its input; the parameters stay float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


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


class EqualisedConv2d(Conv2d):
    """Convolution whose weights are N(0, 1) and scaled in use (see "Initialisation")."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * math.sqrt(2 / (1 + SLOPE**2) / self.weight[0].numel())
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, weight.to(x.dtype), bias)


class EqualisedLinear(Linear):
    """Linear layer whose weights are N(0, 1) and scaled in use (see "Initialisation")."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * math.sqrt(2 / (1 + SLOPE**2) / self.in_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)


def stage_sides(resolution: int, finest: int) -> list[int]:
    """[4, 8, ..., finest]. Raises ValueError unless resolution is a power of two from 32."""
    if resolution < 32 or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of two from 32, not {resolution}")
    return [2**i for i in range(2, finest.bit_length())]


def widths(sides: list[int], base_width: int, max_width: int) -> list[int]:
    """Channels for each side: base_width at the last, doubling towards the first, at most max_width."""
    return [min(max_width, base_width * sides[-1] // side) for side in sides]


class Condition(nn.Module):
    """(z, c) -> [N, width]: concatenated, each first projected to `projection` features unless that is 0."""

    def __init__(self, z_dim: int, c_dim: int, projection: int, linear: type[Linear] = Linear) -> None:
        super().__init__()
        self.scale = math.sqrt(c_dim)
        self.width = 2 * projection if projection else z_dim + c_dim
        self.from_z: nn.Module = linear(z_dim, projection) if projection else nn.Identity()
        self.from_c: nn.Module = linear(c_dim, projection) if projection else nn.Identity()
        self.projected = projection > 0

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        h = torch.cat([self.from_z(z), self.from_c(c.to(z.dtype) * self.scale)], 1)
        return F.leaky_relu(h, SLOPE) if self.projected else h


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


GENERATORS: dict[str, type[Generator]] = {"dcgan": DCGANGenerator, "residual": ResidualGenerator}
DISCRIMINATORS: dict[str, type[nn.Module]] = {"dcgan": DCGANDiscriminator, "residual": ResidualDiscriminator}


def build_generator(*, kind: str, **arguments: Any) -> Generator:
    """A generator by the fields of GeneratorConfig, channels_last, with fresh weights."""
    return GENERATORS[kind](**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_discriminator(*, kind: str, **arguments: Any) -> nn.Module:
    """A discriminator by the fields of DiscriminatorConfig, channels_last, with fresh weights."""
    return DISCRIMINATORS[kind](**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

"""Networks that method `coded` trains besides generator and discriminator. They are in checkpoints, not in snapshots.

Shapes as in generators.py. Weights are He-normal, biases 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vultus.models.alexnet import CHANNELS
from vultus.models.generators import MAP_SIDE
from vultus.models.layers import SLOPE, Conv2d, Linear, init_he

MATCH_SIDE = 3  # side to which deep features are pooled before they are compared with an embedding
LOG_VARIANCE = (-8.0, 2.0)  # range; keeps exp() bounded early in training


class PosteriorEncoder(nn.Module):
    """Posterior q(z | x) of the latents of a photo: x [N, 3, R, R] -> mean and log variance, each [N, z_dim] float32.

    It encodes what the embedding does not contain: pose, light, hair, background. The encoder of a variational
    autoencoder (Kingma & Welling 2014, arXiv:1312.6114) combined with a GAN (Bao et al. 2017, arXiv:1703.10155; Zhu et
    al. 2017, arXiv:1711.11586).

    Args:
        z_dim: length of the noise.
        size: side to which the photo is reduced first, a power of two from 32: a small one keeps the details of the
            face out of the latents.
        maps: maps of 8x8 that are the last part of the noise, each place computed from its surroundings.
        width: channels of the first convolution.
    """

    def __init__(self, z_dim: int, size: int = 32, maps: int = 0, width: int = 32) -> None:
        super().__init__()
        self.size, self.maps = size, maps
        channels = [3, *(min(width << number, 4 * width) for number in range((size // 4).bit_length() - 1))]
        self.convolutions = nn.ModuleList(
            Conv2d(cin, cout, 4, 2, 1) for cin, cout in zip(channels[:-1], channels[1:], strict=True)
        )
        self.head = Linear(channels[-1] * 16, 2 * (z_dim - maps * MAP_SIDE**2))
        self.map_head = Conv2d(channels[-2], 2 * maps, 1) if maps else None
        self.apply(init_he)
        with torch.no_grad():
            self.head.weight.mul_(0.3)  # the posterior starts close to the prior
            if self.map_head is not None:
                self.map_head.weight.mul_(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Photos x -> mean and log variance."""
        h, parts = F.adaptive_avg_pool2d(x, self.size), []
        for convolution in self.convolutions:
            h = F.leaky_relu(convolution(h), SLOPE)
            if self.map_head is not None and h.shape[-1] == MAP_SIDE:
                parts = [part.flatten(1).float() for part in self.map_head(h).chunk(2, 1)]
        both = list(self.head(h.flatten(1).float()).chunk(2, 1))
        mean, log_variance = (torch.cat(part, 1) for part in zip(both, parts, strict=True)) if parts else both
        return mean, log_variance.clamp(*LOG_VARIANCE)


def _unit_scale(features: Iterable[Tensor]) -> Tensor:
    """The factors [depths] that bring features of real photos to a root mean square of 1."""
    return torch.stack([1 / feature.float().square().mean().sqrt() for feature in features])


def _patch_logits(h: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """Features through the layers, with a leaky ReLU after all but the last: float32."""
    *hidden, last = layers
    for layer in hidden:
        h = F.leaky_relu(layer(h), SLOPE)
    logits: Tensor = last(h).float()
    return logits


class TextureDiscriminator(nn.Module):
    """Discriminator of the features of AlexNet from three depths, without a condition -> patch logits [N, 1, ., .]
    float32 for each.

    FaceNet's crop has neither hair nor background, and little texture; these features have. Projected GANs (Sauer et
    al. 2021, arXiv:2111.01007) without the random projections. All layers have spectral normalization. `scale` brings
    the features to a root mean square of 1; see calibrate().
    """

    LAYERS = (1, 2, 4)  # of AlexNet
    scale: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleList(
                (Conv2d(CHANNELS[layer], width, 1), Conv2d(width, 2 * width, 4, 2, 1), Conv2d(2 * width, 1, 3, 1, 1))
            )
            for layer in self.LAYERS
        )
        self.apply(init_he)
        for convolution in [layer for layer in self.modules() if isinstance(layer, Conv2d)]:
            spectral_norm(convolution)
        self.gain = nn.Parameter(torch.ones(len(self.LAYERS)))
        self.register_buffer("scale", torch.ones(len(self.LAYERS)))

    @torch.no_grad()
    def calibrate(self, features: list[Tensor]) -> None:
        """Set `scale` from the features of real photos."""
        self.scale.copy_(_unit_scale(features))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features of the LAYERS, from the trunk, in any dtype."""
        logits = []
        for h, head, scale, gain in zip(features, self.heads, self.scale, self.gain, strict=True):
            logits.append(_patch_logits(h * scale.to(h.dtype), head.children()) * gain)
        return logits


class FeatureDiscriminator(nn.Module):
    """Discriminator of FaceNet features from two depths: (shallow [N, 192, s, s], deep [N, 256, t, t]) -> patch logits
    [N, 1, ., .] float32 for each. `match` adds the condition: deep features and embedding -> logits [N].

    Projected GANs (Sauer et al. 2021, arXiv:2111.01007) without the random projections. All layers have spectral
    normalization. `scale` [2] brings the features to a root mean square of 1; see calibrate().
    """

    scale: Tensor

    def __init__(self, c_dim: int = 512, shallow_width: int = 64, deep_width: int = 128, projection: int = 256) -> None:
        super().__init__()
        a, b = shallow_width, deep_width
        self.c_scale = math.sqrt(c_dim)
        self.shallow = nn.ModuleList((Conv2d(192, a, 1), Conv2d(a, 2 * a, 4, 2, 1), Conv2d(2 * a, 1, 3, padding=1)))
        self.deep = nn.ModuleList((Conv2d(256, b, 1), Conv2d(b, b, 3, padding=1), Conv2d(b, 1, 3, padding=1)))
        self.paired = nn.ModuleList((Conv2d(256, b, 1), Linear(b * MATCH_SIDE**2, projection)))
        self.from_c = Linear(c_dim, projection)
        self.apply(init_he)
        for layer in (*self.shallow, *self.deep, *self.paired, self.from_c):
            spectral_norm(layer)
        # Spectral normalization bounds the logits. The inner product in `match` is larger, so its gain starts smaller.
        self.gain = nn.Parameter(torch.tensor([1.0, 1.0, 0.25]))
        self.register_buffer("scale", torch.ones(2))

    @torch.no_grad()
    def calibrate(self, features: tuple[Tensor, Tensor]) -> None:
        """Set `scale` from the features of real photos."""
        self.scale.copy_(_unit_scale(features))

    def scaled(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The features multiplied by `scale`, as forward(), match() and the perceptual loss take them."""
        shallow, deep = features
        scale = self.scale.to(shallow.dtype)
        return shallow * scale[0], deep * scale[1]

    def forward(self, features: tuple[Tensor, Tensor]) -> list[Tensor]:
        logits = []
        for h, layers, gain in zip(features, (self.shallow, self.deep), self.gain[:2], strict=True):
            logits.append(_patch_logits(h, layers) * gain)
        return logits

    def match(self, deep: Tensor, c: Tensor) -> Tensor:
        """Projection logits [N] of deep features [N, 256, t, t] and embeddings c [N, c_dim]."""
        first, second = self.paired
        h = F.adaptive_avg_pool2d(F.leaky_relu(first(deep), SLOPE), MATCH_SIDE)
        h = F.leaky_relu(second(h.flatten(1).float()), SLOPE)
        return (h * self.from_c(c * self.c_scale)).sum(1) * self.gain[2]

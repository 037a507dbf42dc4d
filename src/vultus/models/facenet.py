"""FaceNet, the frozen face encoder whose embeddings are the condition of a generator.

Shapes: x [N, 3, S, S] float in [-1, 1]; embeddings c [N, 512] float32, unit norm.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vultus._download import WeightFile, find_weights
from vultus.errors import UserError
from vultus.images.io import Crop, crop_x

FACENET_WEIGHTS = (
    WeightFile(
        "facenet_vggface2_fp16.safetensors",
        sha256="50b17ef6fce82e51f0044d8d7a858f187ce884a345d2dd1be519053fbe0e92de",
    ),
    WeightFile(
        "20180402-114759-vggface2.pt",
        sha256="281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
        url="https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt",
    ),
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by their names in settings


class Encoder(Protocol):
    """Interface of a face encoder."""

    id: str
    dim: int
    weights_sha256: str
    size: int  # side of its input in pixels
    dtype: torch.dtype  # of its computation

    @property
    def crop(self) -> Crop:
        """The part of the image that the encoder reads."""
        ...

    def embed(self, x: Tensor) -> Tensor:
        """Whole images x [N, 3, S, S] in [-1, 1] -> unit-norm float32 [N, dim]."""
        ...


class LossEncoder(Encoder, Protocol):
    """Interface of the encoder of a loss."""

    def embed(self, x: Tensor, size: int | None = None) -> Tensor:
        """See Encoder; differentiable with respect to x, which is read at `size` pixels, by default its own."""
        ...


# --- InceptionResnetV1 -------------------------------------------------------------------------------------------
# Szegedy et al. 2016 (arXiv:1602.07261) with the widths of FaceNet. The module names are those of facenet-pytorch, so
# that its weight files load with strict=True.


class BasicConv2d(nn.Module):
    """Convolution without bias, batch-norm, ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride=stride, padding=padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(cout, eps=0.001)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class ResidualBlock(nn.Module):
    """x + scale * conv1x1(concat(branches(x))), then ReLU unless `last`."""

    def __init__(self, channels: int, branches: Sequence[nn.Module], width: int, scale: float, last: bool) -> None:
        super().__init__()
        self.count = len(branches)
        for index, branch in enumerate(branches):
            self.add_module(f"branch{index}", branch)
        self.conv2d = nn.Conv2d(width, channels, 1)
        self.scale = scale
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.get_submodule(f"branch{index}")(x) for index in range(self.count)], 1)
        y = torch.add(x, self.conv2d(y), alpha=self.scale)
        return y if self.last else F.relu(y)


def _block35() -> ResidualBlock:
    one = BasicConv2d(256, 32, 1)
    two = nn.Sequential(BasicConv2d(256, 32, 1), BasicConv2d(32, 32, 3, padding=1))
    three = nn.Sequential(BasicConv2d(256, 32, 1), BasicConv2d(32, 32, 3, padding=1), BasicConv2d(32, 32, 3, padding=1))
    return ResidualBlock(256, [one, two, three], 96, scale=0.17, last=False)


def _block17() -> ResidualBlock:
    one = BasicConv2d(896, 128, 1)
    two = nn.Sequential(
        BasicConv2d(896, 128, 1),
        BasicConv2d(128, 128, (1, 7), padding=(0, 3)),
        BasicConv2d(128, 128, (7, 1), padding=(3, 0)),
    )
    return ResidualBlock(896, [one, two], 256, scale=0.10, last=False)


def _block8(scale: float = 0.20, last: bool = False) -> ResidualBlock:
    one = BasicConv2d(1792, 192, 1)
    two = nn.Sequential(
        BasicConv2d(1792, 192, 1),
        BasicConv2d(192, 192, (1, 3), padding=(0, 1)),
        BasicConv2d(192, 192, (3, 1), padding=(1, 0)),
    )
    return ResidualBlock(1792, [one, two], 384, scale=scale, last=last)


class Reduction(nn.Module):
    """Concatenate convolution branches and a max-pool, all with stride 2."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.count = len(branches) + 1
        for index, branch in enumerate((*branches, nn.MaxPool2d(3, stride=2))):
            self.add_module(f"branch{index}", branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(f"branch{index}")(x) for index in range(self.count)], 1)


class InceptionResnetV1(nn.Module):
    """[N, 3, 160, 160] with values (rgb - 127.5) / 128 -> [N, 512] of unit norm. Other sides work from 75 pixels on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d_1a = BasicConv2d(3, 32, 3, stride=2)
        self.conv2d_2a = BasicConv2d(32, 32, 3)
        self.conv2d_2b = BasicConv2d(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)
        self.conv2d_3b = BasicConv2d(64, 80, 1)
        self.conv2d_4a = BasicConv2d(80, 192, 3)
        self.conv2d_4b = BasicConv2d(192, 256, 3, stride=2)
        self.repeat_1 = nn.Sequential(*(_block35() for _ in range(5)))
        self.mixed_6a = Reduction(
            BasicConv2d(256, 384, 3, stride=2),
            nn.Sequential(
                BasicConv2d(256, 192, 1), BasicConv2d(192, 192, 3, padding=1), BasicConv2d(192, 256, 3, stride=2)
            ),
        )
        self.repeat_2 = nn.Sequential(*(_block17() for _ in range(10)))
        self.mixed_7a = Reduction(
            nn.Sequential(BasicConv2d(896, 256, 1), BasicConv2d(256, 384, 3, stride=2)),
            nn.Sequential(BasicConv2d(896, 256, 1), BasicConv2d(256, 256, 3, stride=2)),
            nn.Sequential(
                BasicConv2d(896, 256, 1), BasicConv2d(256, 256, 3, padding=1), BasicConv2d(256, 256, 3, stride=2)
            ),
        )
        self.repeat_3 = nn.Sequential(*(_block8() for _ in range(5)))
        self.block8 = _block8(scale=1.0, last=True)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x))))
        x = self.mixed_7a(self.repeat_2(self.mixed_6a(self.repeat_1(x))))
        x = self.block8(self.repeat_3(x)).mean((2, 3))
        x = self.last_linear(x.to(self.last_linear.weight.dtype))
        return F.normalize(self.last_bn(x))


# --- FaceNet as the encoder of the condition ------------------------------------------------------------------------


@functools.cache
def fastest_dtype(device: str) -> torch.dtype:
    """The faster dtype on `device`: bfloat16 or float32.

    On a CPU the instruction set does not decide: of two CPUs with AVX512-BF16, one ran bfloat16 twice as fast as
    float32, the other half as fast. A small convolution is therefore timed in both (about 50 ms, once per process).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind != "cpu" or not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(6):
        for dtype, taken in seconds.items():
            x = torch.ones(16, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
            weight = torch.ones(64, 64, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            taken.append(time.perf_counter() - start)
    return min(seconds, key=lambda dtype: min(seconds[dtype]))


def dtype_name(name: str, device: str) -> str:
    """The name of a dtype, with `auto` resolved to the faster one on `device`."""
    return next(key for key, value in DTYPES.items() if value == fastest_dtype(device)) if name == "auto" else name


class FaceNet(nn.Module):
    """The frozen encoder: whole images -> unit-norm embeddings of their central 80 %.

    It stays in evaluation mode (`train()` does nothing) and its parameters require no gradient; gradients flow to the
    images only. `network` has the weights as loaded, in float32. The forward pass runs on a copy of it in `dtype` and
    channels_last; the last linear layer and its batch-norm stay in float32.

    Args:
        network: with the loaded weights.
        device: of the computation.
        dtype: of the computation; by default the faster one, see fastest_dtype().
        weights_sha256: of the weight file.
    """

    id = "facenet-vggface2"
    dim = 512
    crop = 0.8
    size = 160

    def __init__(
        self,
        network: InceptionResnetV1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weights_sha256: str = "",
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False).to(device)
        self.dtype = fastest_dtype(str(device)) if dtype is None else dtype
        self.body = copy.deepcopy(self.network).to(dtype=self.dtype)
        self.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # The last layer is small and determines the direction of the embedding: always float32.
        self.body.last_linear = self.network.last_linear
        self.body.last_bn = self.network.last_bn
        self.weights_sha256 = weights_sha256
        super().train(False)

    def train(self, mode: bool = True) -> FaceNet:
        """Does nothing: a frozen encoder has no training mode."""
        return self

    def embed(self, x: Tensor, size: int | None = None) -> Tensor:
        """Whole images x [N, 3, S, S] in [-1, 1] -> [N, 512] float32, unit norm. Differentiable with respect to x.

        `size` is the side in pixels to which the crop is resized: 160 by default; 96 costs a fifth and suffices for a
        loss.
        """
        return self.embed_crop(crop_x(x, size or self.size, self.crop))

    def embed_crop(self, x: Tensor) -> Tensor:
        """Crops x [N, 3, s, s] in [-1, 1] (the central 80 % of images) -> [N, 512] float32, unit norm."""
        x = (x * (127.5 / 128)).to(self.dtype, memory_format=torch.channels_last)
        return self.body(x)


class FaceFeatures(nn.Module):
    """FaceNet in two parts, for losses that need its features and its embedding of the same images.

    A frozen copy of FaceNet. Batch-norms are folded into the convolutions and ReLUs are in place, which makes the
    backward pass cheaper.
    """

    def __init__(self, encoder: FaceNet) -> None:
        super().__init__()
        self.crop, self.dtype = encoder.crop, encoder.dtype
        body = copy.deepcopy(encoder.network)
        for module in body.modules():
            if isinstance(module, BasicConv2d) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
                module.relu = nn.ReLU(inplace=True)
        last_linear, last_bn = body.last_linear, body.last_bn
        body.last_linear, body.last_bn = copy.deepcopy(last_linear), copy.deepcopy(last_bn)
        self.body = body.to(dtype=self.dtype).requires_grad_(False)
        self.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.body.last_linear, self.body.last_bn = last_linear, last_bn  # float32, as in FaceNet
        super().train(False)

    def train(self, mode: bool = True) -> FaceFeatures:
        """Does nothing: a frozen encoder has no training mode."""
        return self

    def shallow(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Whole images x [N, 3, S, S] in [-1, 1], cropped and resized to `size` -> features [N, 192, s, s] and
        [N, 256, t, t] in `dtype`, where s is about size / 4 and t about size / 8. Differentiable with respect to x."""
        x = (crop_x(x, size, self.crop) * (127.5 / 128)).to(self.dtype, memory_format=torch.channels_last)
        b = self.body
        h = b.conv2d_2b(b.conv2d_2a(b.conv2d_1a(x)))
        middle = b.conv2d_4a(b.conv2d_3b(b.maxpool_3a(h)))
        return middle, b.repeat_1(b.conv2d_4b(middle))

    def rest(self, deep: Tensor) -> Tensor:
        """The second features of shallow() -> the embedding that FaceNet.embed returns, [N, 512] float32."""
        b = self.body
        h = b.repeat_3(b.mixed_7a(b.repeat_2(b.mixed_6a(deep))))
        h = b.last_linear(b.block8(h).mean((2, 3)).float())
        return F.normalize(b.last_bn(h))


def load_encoder_state(path: Path, name: str) -> dict[str, Tensor]:
    """State dict, float32, of a safetensors file or an official `.pt` (read with weights_only).

    Entries `logits.*`, a classifier, are left out. Raises UserError that names the file if it cannot be read as the
    weights of `name`.
    """
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as {name} weights ({type(error).__name__}); fetch it again") from None
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in state.items()
        if not key.startswith("logits.")
    }


@functools.cache
def _load_network() -> tuple[InceptionResnetV1, str]:
    path, weights = find_weights(*FACENET_WEIGHTS)
    network = InceptionResnetV1()
    try:
        network.load_state_dict(load_encoder_state(path, "FaceNet"), strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: not the keys of InceptionResnetV1 ({str(error).splitlines()[0]})") from None
    return network.eval(), weights.sha256


def load_facenet(*, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> FaceNet:
    """FaceNet with the VGGFace2 weights; `device` and `dtype` as in FaceNet.

    Raises UserError if the weights are neither in the weights folder nor in the cache and cannot be downloaded.
    """
    network, sha256 = _load_network()
    return FaceNet(copy.deepcopy(network), device=device, dtype=dtype, weights_sha256=sha256)

"""MobileFaceNet, a second face encoder: of the condition, for a loss beside FaceNet's, or as a judge.

Shapes: x [N, 3, S, S] float in [-1, 1]; embeddings [N, 128] float32, unit norm.

Chen et al. 2018, arXiv:1804.07573. The weights are those of the public repository foamliu/MobileFaceNet (Apache-2.0),
trained on MS-Celeb with the ArcFace loss (Deng et al. 2019, arXiv:1801.07698); 99.48 % on LFW by their author.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vultus._download import WeightFile, find_weights
from vultus.errors import UserError
from vultus.images.io import box_x
from vultus.models.facenet import load_encoder_state

MOBILEFACENET_WEIGHTS = (
    WeightFile(
        "mobilefacenet_foamliu.safetensors",
        sha256="9fd9262d707b2839e24671ced6dcb61afbcdda7b008a177a6b95165aff2c8c63",
    ),
    WeightFile(
        "mobilefacenet.pt",
        sha256="90a00ba1d8b0b688af3deb731ed53dca582e6106805d1bc3cfdef55f570493f4",
        url="https://github.com/foamliu/MobileFaceNet/raw/a6cc9032a659b615f477833e1a70b5e7931bcccc/weights/mobilefacenet.pt",
    ),
)

# The crop of ArcFace in an image as `vultus prepare` frames it, without landmarks: left, top, side, in images.
BOX = (0.1396, 0.112, 0.719)
SIDE = 112
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, on [0, 1]

# The inverted residuals: expansion, channels out, repeats, stride of the first.
GROUPS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


def _conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(cout), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expansion 1x1, depthwise 3x3, projection 1x1; plus the input where the sizes agree (Sandler et al. 2018,
    arXiv:1801.04381)."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = cin * expansion
        self.shortcut = stride == 1 and cin == cout
        self.conv = nn.Sequential(
            _conv_bn(cin, width, 1),
            _conv_bn(width, width, 3, stride, groups=width),
            nn.Conv2d(width, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, cin, S, S] -> [N, cout, S / stride, S / stride]."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with batch-norm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The shape stays."""
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class GlobalDepthwise(nn.Module):
    """Depthwise convolution over the whole 7x7 and batch-norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, 7, 7] -> [N, C, 1, 1]."""
        return self.bn(self.depthwise(x))


class MobileFaceNetNetwork(nn.Module):
    """[N, 3, 112, 112], normalized with ImageNet's mean and standard deviation -> [N, 128].

    The names of the modules are those of the published weights, which load with strict=True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _conv_bn(3, 64, 3, 2)
        self.dw_conv = DepthwiseSeparable(64)
        blocks, cin = [], 64
        for expansion, cout, repeats, stride in GROUPS:
            for number in range(repeats):
                blocks.append(InvertedResidual(cin, cout, 1 if number else stride, expansion))
                cin = cout
        self.features = nn.Sequential(*blocks)
        self.conv2 = _conv_bn(128, 512, 1)
        self.gdconv = GlobalDepthwise(512)
        self.conv3 = nn.Conv2d(512, 128, 1)
        self.bn = nn.BatchNorm1d(128)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings, not normalised."""
        x = self.gdconv(self.conv2(self.features(self.dw_conv(self.conv1(x)))))
        return self.bn(self.conv3(x).flatten(1).to(self.bn.weight.dtype))


def fold_norms(network: nn.Module) -> None:
    """Fold each batch-norm that follows a convolution, in the order of the modules, into that convolution."""
    previous: tuple[nn.Module, str, nn.Module] | None = None
    for owner in list(network.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.BatchNorm2d) and previous is not None and isinstance(previous[2], nn.Conv2d):
                setattr(previous[0], previous[1], fuse_conv_bn_eval(previous[2], child))
                setattr(owner, name, nn.Identity())
            previous = (owner, name, child)


class MobileFaceNet(nn.Module):
    """The frozen encoder: whole images -> unit-norm embeddings of ArcFace's crop, taken at a fixed place.

    It stays in evaluation mode and its parameters require no gradient; gradients flow to the images only.

    Args:
        network: with the loaded weights.
        device: of the computation.
        weights_sha256: of the weight file.
    """

    id = "mobilefacenet"
    dim = 128
    crop = BOX
    size = SIDE
    mean: Tensor
    std: Tensor
    dtype = torch.float32  # its depthwise convolutions gain nothing from bfloat16

    def __init__(
        self, network: MobileFaceNetNetwork, *, device: torch.device | str = "cpu", weights_sha256: str = ""
    ) -> None:
        super().__init__()
        self.body = copy.deepcopy(network).eval().requires_grad_(False)
        fold_norms(self.body)
        self.body.to(device)
        self.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights_sha256 = weights_sha256
        self.register_buffer("mean", torch.tensor(MEAN, device=device).view(3, 1, 1) * 2 - 1, persistent=False)
        self.register_buffer("std", torch.tensor(STD, device=device).view(3, 1, 1) * 2, persistent=False)
        super().train(False)

    def train(self, mode: bool = True) -> MobileFaceNet:
        """Does nothing: a frozen encoder has no training mode."""
        return self

    def embed(self, x: Tensor, jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
        """Whole images x [N, 3, S, S] in [-1, 1] -> [N, 128] float32, unit norm. Differentiable with respect to x.

        `jitter` is added to left, top and side of the crop, in images.
        """
        return self.embed_crop(box_x(x, BOX, jitter, SIDE))

    def embed_crop(self, x: Tensor) -> Tensor:
        """Crops x [N, 3, 112, 112] in [-1, 1] -> [N, 128] float32, unit norm."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.body(x))


@functools.cache
def _load_network() -> tuple[MobileFaceNetNetwork, str]:
    path, weights = find_weights(*MOBILEFACENET_WEIGHTS)
    network = MobileFaceNetNetwork()
    state = load_encoder_state(path, "MobileFaceNet")
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    expected = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    if state.keys() != expected:
        raise UserError(f"{path}: not the keys of MobileFaceNet; fetch it again")
    network.load_state_dict(state, strict=False)
    return network.eval(), weights.sha256


def load_mobilefacenet(*, device: torch.device | str = "cpu") -> MobileFaceNet:
    """MobileFaceNet with its published weights.

    Raises UserError if the weights are neither in the weights folder nor in the cache and cannot be downloaded.
    """
    network, sha256 = _load_network()
    return MobileFaceNet(network, device=device, weights_sha256=sha256)

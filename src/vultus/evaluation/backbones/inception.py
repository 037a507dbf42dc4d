"""The feature network of FID as published: the Inception network that TensorFlow released on 2015-12-05.

Shape legend: x [N, 3, S, S] float in [-1, 1]; features [N, 2048] float32.

The Fréchet Inception Distance (Heusel et al. 2017, arXiv:1706.08500) is defined by one frozen graph, its weights and
its own preprocessing; another Inception, another resize or another range give other values (Parmar et al. 2022,
arXiv:2104.11222). How this graph differs from InceptionV3 as described (Szegedy et al. 2015, arXiv:1512.00567) and in
other libraries:

- average pools do not count the padding; the last block has a max pool where the others have an average pool;
- images are resized to 299x299 by TensorFlow 1's bilinear rule, which maps pixel 0 to pixel 0 and does not
  antialias, and become (rgb - 128) / 128;
- the classifier has 1,008 classes.

Names are those of the weight file that pytorch-fid (Apache-2.0) converted from that graph and torch-fidelity
(Apache-2.0) reads. pytorch-fid itself resizes with half-pixel centres, so its values differ a little; those of
torch-fidelity do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vultus._download import WeightFile, find_weights
from vultus.errors import UserError
from vultus.images.io import to_images

# Of the file of 95,628,359 bytes; its first 8 hex digits are in both names.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RELEASES = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
MIRROR = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
INCEPTION_WEIGHTS = tuple(  # one file under two names
    WeightFile(name, SHA256, f"{place}/{name}")
    for place, name in (
        (RELEASES, "pt_inception-2015-12-05-6726825d.pth"),
        (MIRROR, "weights-inception-2015-12-05-6726825d.pth"),
    )
)


class BasicConv2d(nn.Module):
    """Convolution without bias, batch-norm, ReLU; padded to keep the side unless the stride is 2."""

    def __init__(self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(cin, cout, (height, width), stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> [N, cout, H', W']."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


Chain = Sequence[tuple[str, int, int | tuple[int, int]]]  # name, channels out, kernel


class Mixed(nn.Module):
    """Chains of convolutions and a pool side by side, concatenated.

    Convolutions of a chain whose names end in a and b are parallel, on the same input. The pool is followed by a 1x1
    convolution to `pooled` channels; without it (`pooled` 0) the pool and the last convolution of each chain halve the
    side.
    """

    def __init__(self, cin: int, pool: Callable[[Tensor], Tensor], pooled: int, *chains: Chain) -> None:
        super().__init__()
        self.pool = pool
        self.chains = [[name for name, _, _ in chain] for chain in chains]
        for chain in chains:
            width = cin
            for name, cout, kernel in chain:
                last = name == chain[-1][0]
                self.add_module(name, BasicConv2d(width, cout, kernel, stride=2 if last and not pooled else 1))
                if not name.endswith("a"):
                    width = cout
        self.branch_pool = BasicConv2d(cin, pooled, 1) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> the outputs of the chains, in order, then that of the pool."""
        outputs = []
        for chain in self.chains:
            y, ends = x, []
            for name in chain:
                step = self.get_submodule(name)(y)
                if name[-1] in "ab":
                    ends.append(step)
                else:
                    y = step
            outputs += ends or [y]
        y = self.pool(x)
        return torch.cat([*outputs, y if self.branch_pool is None else self.branch_pool(y)], 1)


def _block_a(cin: int, pooled: int) -> Mixed:
    one: Chain = [("branch1x1", 64, 1)]
    two: Chain = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    three: Chain = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(cin, _average, pooled, one, two, three)


def _block_b(cin: int) -> Mixed:
    one: Chain = [("branch3x3", 384, 3)]
    two: Chain = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(cin, _halve, 0, one, two)


def _block_c(cin: int, width: int) -> Mixed:
    one: Chain = [("branch1x1", 192, 1)]
    two: Chain = [("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))]
    three: Chain = [
        ("branch7x7dbl_1", width, 1),
        ("branch7x7dbl_2", width, (7, 1)),
        ("branch7x7dbl_3", width, (1, 7)),
        ("branch7x7dbl_4", width, (7, 1)),
        ("branch7x7dbl_5", 192, (1, 7)),
    ]
    return Mixed(cin, _average, 192, one, two, three)


def _block_d(cin: int) -> Mixed:
    one: Chain = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
    two: Chain = [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3),
    ]
    return Mixed(cin, _halve, 0, one, two)


def _block_e(cin: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    one: Chain = [("branch1x1", 320, 1)]
    two: Chain = [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]
    three: Chain = [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        ("branch3x3dbl_3a", 384, (1, 3)),
        ("branch3x3dbl_3b", 384, (3, 1)),
    ]
    return Mixed(cin, pool, 192, one, two, three)


class InceptionV3(nn.Module):
    """The network with the names of its weight file. `fc`, the classifier, is not used; strict loading needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, pad=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average)
        self.Mixed_7c = _block_e(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 299, 299] with values (rgb - 128) / 128 -> pooled features [N, 2048]."""
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def resize_like_tensorflow1(x: Tensor, size: int) -> Tensor:
    """ResizeBilinear of TensorFlow 1 with align_corners=False: [N, C, H, W] float32 -> [N, C, size, size].

    Output i is at i * side / size of the input, without the half pixel that later libraries add, and is interpolated
    between the two nearest inputs, also when it shrinks. Columns first, then rows, in float32, as in the original.
    """
    low, high, weight = _positions(x.shape[3], size, x.device)
    left = x[..., low]
    x = left + (x[..., high] - left) * weight
    low, high, weight = _positions(x.shape[2], size, x.device)
    top = x[:, :, low]
    return top + (x[:, :, high] - top) * weight[:, None]


def _positions(side: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` outputs: the input before it, the one after it, and the weight of the latter."""
    at = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(side / size, device=device)
    low = at.long()
    return low, (low + 1).clamp(max=side - 1), at - low


class InceptionFeatures(nn.Module):
    """The frozen feature network of FID. It stays in evaluation mode; no parameter requires a gradient."""

    id = "inception-2015-12-05-tf299"
    short = "inception"
    dim = 2048
    size = 299

    def __init__(
        self, network: InceptionV3, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.dtype = dtype
        network = network.eval().requires_grad_(False)
        self.network = network.to(device=device, dtype=dtype)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().train(False)

    def train(self, mode: bool = True) -> InceptionFeatures:
        """Does nothing: a frozen network has no training mode."""
        return self

    def features(self, x: Tensor) -> Tensor:
        """x [N, 3, S, S] in [-1, 1] of any side -> float32 [N, 2048].

        Values are rounded to 8 bits first: FID is measured on saved images.
        """
        x = resize_like_tensorflow1(to_images(x).float(), self.size)
        x = ((x - 128) / 128).to(self.dtype, memory_format=torch.channels_last)
        step = 4 if x.device.type == "cpu" else max(1, len(x))  # on a CPU: see EffnetFeatures
        return torch.cat([self.network(part).float() for part in torch.split(x, step)])


def load_inception(
    *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, fetch: bool = False
) -> InceptionFeatures:
    """FID's Inception with its real weights, checked against a pinned sha256 and read with weights_only.

    They are downloaded (96 MB) only with `fetch`. Raises UserError that says how to get them where they are missing, or
    names the file where it is damaged.
    """
    path, _ = find_weights(*INCEPTION_WEIGHTS, fetch=fetch)
    with torch.device("meta"):  # no random initialization, which the file replaces
        network = InceptionV3()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state, strict=True, assign=True)
    except Exception as error:
        raise UserError(f"{path}: not the weights of FID's Inception ({str(error).splitlines()[0]})") from None
    return InceptionFeatures(network, device=device, dtype=dtype)

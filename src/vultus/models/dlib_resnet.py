"""dlib's face recognition network in PyTorch, and a reader of its weights in dlib's own file format.

Shape legend: chips x [N, 3, 150, 150] float in [0, 255], RGB; embeddings [N, 128] float32.

A ResNet (He et al. 2016, arXiv:1512.03385) with half the filters of ResNet-34 and 29 convolutions, trained by Davis
King with a metric loss: two faces of one person have a distance below 0.6. On one thread dlib itself, in a wheel
without BLAS, embeds 8 faces/s and this network 200; the embeddings differ by less than 1e-6.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vultus.errors import UserError

MEAN = (122.782, 117.001, 104.298)  # of the training faces, RGB


class Block(nn.Module):
    """ReLU(conv3x3(ReLU(conv3x3(x))) + x); where `stride` is 2, x is average-pooled by 2x2.

    dlib pads the smaller tensor of a sum with zeros: channels that x does not have, and the last row and column, which
    the unpadded convolution loses on even sides (8 -> 3, while the average has 4).
    """

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Padded only where the stride is 1: dlib's rule for all its layers.
        self.first = nn.Conv2d(cin, cout, 3, stride, padding=1 if stride == 1 else 0)
        self.second = nn.Conv2d(cout, cout, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, cin, S, S] -> [N, cout, S // stride, S // stride]."""
        y = self.second(F.relu(self.first(x), inplace=True))
        if self.stride > 1:
            x = F.avg_pool2d(x, 2)
        missing = x.shape[-1] - y.shape[-1]
        y = F.pad(y, (0, missing, 0, missing))
        x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return F.relu(x + y, inplace=True)


STAGES = ((3, 32, 1), (4, 64, 2), (3, 128, 2), (3, 256, 2), (1, 256, 2))  # blocks, channels out, stride of the first


class DlibResNet(nn.Module):
    """[N, 3, 150, 150] RGB in [0, 255] -> [N, 128]; distances are Euclidean, nothing is normalised.

    dlib's affine layers, which replace the batch-norms of training, are folded into the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, stride=2)
        blocks, cin = [], 32
        for repeats, cout, stride in STAGES:
            for again in range(repeats):
                blocks.append(Block(cin, cout, 1 if again else stride))
                cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(256, 128, bias=False)
        self.mean: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings of face chips."""
        x = F.relu(self.stem((x - self.mean) / 256), inplace=True)
        x = self.blocks(F.max_pool2d(x, 3, stride=2))
        return self.head(x.mean((2, 3)))


class _Reader:
    """Reads dlib's serialization forwards: layers from input to output, each with a tag, tensors and numbers.

    Between the weights are dozens of bytes of other data (versions, flags, learning rates, empty tensors), which are
    skipped, but no further than to the next tag.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def tag(self, tag: str) -> None:
        """Skip the tag of the next layer with weights, which must be `tag`, or check that "the end" is next."""
        match = re.compile(rb"\x01[\x04-\x07](con_4|affine_|fc_2)").search(self.data, self.at)
        name = match[1].decode() if match else "the end"
        if name != tag:
            raise ValueError(f"{name} instead of {tag}")
        self.at = match.end() if match else len(self.data)

    def integer(self) -> int:
        """One integer: a byte with the count of bytes and the sign (bit 7), then the bytes, lowest first."""
        control = self.data[self.at]
        size = control & 15
        if not 1 <= size <= 8 or control & 0x70:
            raise ValueError(f"no integer at byte {self.at}")
        value = int.from_bytes(self.data[self.at + 1 : self.at + 1 + size], "little")
        self.at += 1 + size
        return -value if control & 0x80 else value

    def expect(self, *values: int) -> None:
        """Read integers that must have these values."""
        for value in values:
            at, number = self.at, self.integer()
            if number != value:
                raise ValueError(f"{number} instead of {value} at byte {at}")

    def floats(self, *shape: int) -> Tensor:
        """A tensor of dlib (always four dimensions), which must have `shape`."""
        self.expect(2, *shape)  # 2: version of the format
        count = torch.Size(shape).numel()
        if self.at + 4 * count > len(self.data):
            raise ValueError("it is truncated")
        values = torch.frombuffer(bytearray(self.data[self.at : self.at + 4 * count]), dtype=torch.float32)
        self.at += 4 * count
        if not values.isfinite().all():
            raise ValueError(f"a value before byte {self.at} is not finite")
        return values


def read_weights(path: Path) -> DlibResNet:
    """The network with the weights in dlib's `dlib_face_recognition_resnet_model_v1.dat`.

    Kind, order, shape, stride and padding of every layer are checked. Raises UserError that names the file if one is
    not as expected.
    """
    network = DlibResNet().requires_grad_(False)
    try:
        reader = _Reader(path.read_bytes())
        for conv in network.modules():
            if isinstance(conv, nn.Conv2d):
                _read_convolution(reader, conv)
        reader.tag("fc_2")
        reader.expect(128, 256)
        network.head.weight.copy_(reader.floats(256, 128, 1, 1).view(256, 128).T)
        reader.tag("the end")
    except (OSError, ValueError, IndexError) as error:
        reason = "it is truncated" if isinstance(error, IndexError) else getattr(error, "strerror", error)
        raise UserError(f"{path}: cannot be read as dlib's face encoder ({reason}); install it again") from None
    return network.eval()


def _read_convolution(reader: _Reader, conv: nn.Conv2d) -> None:
    """Fill `conv` from a convolution and the affine layer after it: gamma * (w * x + b) + beta in one."""
    size, out = conv.weight.numel(), conv.out_channels
    reader.tag("con_4")
    weight, bias = reader.floats(size + out, 1, 1, 1).double().split([size, out])
    (side, _), (stride, _), padding = conv.kernel_size, conv.stride, conv.padding[0]
    assert isinstance(padding, int)
    reader.expect(out, side, side, stride, stride, padding, padding)
    reader.tag("affine_")
    gamma, beta = reader.floats(2 * out, 1, 1, 1).double().split(out)
    conv.weight.copy_(weight.view_as(conv.weight) * gamma.view(-1, 1, 1, 1))
    assert conv.bias is not None
    conv.bias.copy_(bias * gamma + beta)

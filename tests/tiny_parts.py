"""Small stand-ins for the networks of an evaluation, and generators with known properties, and a data set for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vultus.data.dataset import PreparedDataset
from vultus.images.io import crop_x, to_x
from vultus.models.generators import GeneratorNetwork
from vultus.models.snapshot import Snapshot

SIDE, DIM, Z = 32, 16, 8


class TinyEncoder(nn.Module):
    """A fixed random projection of the central crop."""

    id = "tiny-test"
    dim = DIM
    weights_sha256 = "0" * 64
    crop = 0.8
    size = 12
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(3 * 36, DIM, generator=torch.Generator().manual_seed(1))

    def embed(self, x: Tensor, size: int | None = None) -> Tensor:
        x = F.adaptive_avg_pool2d(crop_x(x, size or self.size, self.crop), 6)
        return F.normalize(x.flatten(1) @ self.weight, dim=1)


class TinyJudge:
    """Another projection, of the whole image, compared by distance; it counts its input images in `seen`."""

    id = "tiny-judge"
    short = "umpire"
    dim = 12
    dtype = torch.float32
    weights_sha256 = "1" * 64
    similarity: Literal["cosine", "euclidean"] = "euclidean"

    def __init__(self) -> None:
        self.weight = torch.randn(3 * 64, 12, generator=torch.Generator().manual_seed(5)) / 8
        self.seen = 0

    def embed(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return F.adaptive_avg_pool2d(x, 8).flatten(1) @ self.weight


class TinyFeatures:
    """A feature network of 8 numbers that counts its input images in `seen`."""

    id = "tiny-features"
    short = "pool"
    dim = 8
    dtype = torch.float32

    def __init__(self) -> None:
        self.weight = torch.randn(3 * 16, 8, generator=torch.Generator().manual_seed(2))
        self.seen = 0

    def features(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return (F.adaptive_avg_pool2d(x, 4).flatten(1) @ self.weight).tanh()


class TinyPerceptual:
    """Mean difference of images reduced to 4x4; it counts its input images in `seen`."""

    id = "tiny-perceptual"
    short = "lpips_tiny"
    dtype = torch.float32
    weights_sha256 = "2" * 64

    def __init__(self) -> None:
        self.seen = 0

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        self.seen += len(x)
        return (F.adaptive_avg_pool2d(x, 4),)

    def distance(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        return (a[0] - b[0]).abs().mean((1, 2, 3))


class TinyGenerator(GeneratorNetwork):
    """One linear layer; `noise` and `condition` scale the weights of each input."""

    def __init__(self, noise: float = 0.1, condition: float = 1.0, side: int = SIDE) -> None:
        super().__init__(side, Z, DIM)
        random = torch.Generator().manual_seed(3)
        self.from_z = nn.Parameter(torch.randn(Z, 3 * 64, generator=random) * noise)
        self.from_c = nn.Parameter(torch.randn(DIM, 3 * 64, generator=random) * condition)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        h = (z @ self.from_z + c @ self.from_c).view(-1, 3, 8, 8)
        return F.interpolate(h, size=(self.resolution, self.resolution), mode="bilinear").tanh()


class Memory(GeneratorNetwork):
    """A generator that has memorized a data set: it returns the photo of the nearest embedding."""

    def __init__(self, dataset: PreparedDataset) -> None:
        super().__init__(dataset.resolution, Z, dataset.manifest["encoder"]["dim"])
        photos = dataset.batch(range(len(dataset)))
        self.register_buffer("c", photos.c)
        self.register_buffer("x", to_x(photos.images))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return self.x[(c @ self.c.T).argmax(1)]


class Recorder(TinyGenerator):
    """Records the noise that came with each embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: dict[tuple[float, ...], list[list[float]]] = {}

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        for noise, embedding in zip(z, c, strict=True):
            if not embedding.any():
                continue  # one that fills up a call
            self.noise.setdefault(tuple(embedding.tolist()), []).append(noise.tolist())
        return super().forward(z, c)


def snapshot(generator: GeneratorNetwork, dataset: PreparedDataset, **metadata: Any) -> Snapshot:
    values = {"encoder": dataset.manifest["encoder"], "crop": dataset.manifest["crop"], "cur_nimg": 1000}
    return Snapshot(generator, {}, values | metadata)


def audited(built_once: Callable[..., Path]) -> PreparedDataset:
    """The test split of 15 people with 4 photos each, which has 60 people to train on, embedded by TinyEncoder."""
    from conftest import write_dataset  # here: the campaigns import this module without pytest

    people = {"train": 60, "test": 15}
    options: dict[str, Any] = {"people": people, "photos": 4, "dim": DIM, "embed": TinyEncoder().embed}
    return PreparedDataset(built_once("audited", lambda folder: write_dataset(folder, **options)), "test")

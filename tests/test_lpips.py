"""Perceptual distances: the same values as a direct implementation of the formulas, and weights that are checked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._download import WeightFile
from vultus._files import sha256_file
from vultus.errors import UserError
from vultus.evaluation.backbones import lpips as perceptual
from vultus.evaluation.backbones.lpips import (
    ALEXNET_WEIGHTS,
    LPIPS,
    LPIPS_HEADS,
    STLPIPS,
    load_lpips,
    load_stlpips,
)
from vultus.models import alexnet
from vultus.models.alexnet import SCALE, SHAPES, SHIFT, stlpips_path

needs_weights = pytest.mark.skipif(stlpips_path() is None, reason="needs the extra: pip install 'vultus[eval]'")


def random_trunk() -> list[tuple[Tensor, Tensor]]:
    """Five convolutions that keep the spread of the activations, with biases that matter."""
    random = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(shape, generator=random) * (2 / (shape[1] * shape[2] ** 2)) ** 0.5,
            torch.randn(shape[0], generator=random) * 0.2,
        )
        for shape in SHAPES
    ]


def random_heads() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [(torch.rand(shape[0], generator=random) - 0.3).clamp(min=0) for shape in SHAPES]


def pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth random images with noise, in [-1, 1]."""
    random = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, 6, 6, generator=random) * 2 - 1
    smooth = F.interpolate(rough, size=(side, side), mode="bicubic")
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=random)).clamp(-1, 1)


def waves(side: int, phase: float) -> Tensor:
    """One image that needs no random number: [1, 3, side, side]."""
    t = torch.linspace(0, 1, side)
    rows = [torch.sin(6 * (c + 1) * t + phase)[:, None] * torch.cos(9 * t * (c + 1) - phase) for c in range(3)]
    return torch.stack(rows)[None]


def plain_distance(layers: list[tuple[Tensor, Tensor]], heads: list[Tensor]) -> Tensor:
    """The formula as the paper has it, in float64: activations of both images for each layer -> [N]."""
    total = torch.zeros(len(layers[0][0]), dtype=torch.float64)
    for (a, b), head in zip(layers, heads, strict=True):
        a, b = (y / (y.square().sum(1, keepdim=True).sqrt() + 1e-10) for y in (a, b))
        total += ((a - b).square() * head.double()[:, None, None]).sum(1).mean((1, 2))
    return total


def plain_layers(x: Tensor, trunk: list[tuple[Tensor, Tensor]], tolerant: bool) -> list[Tensor]:
    """The activations of either network, layer by layer, in float64."""
    x = (x.double() - torch.tensor(SHIFT).double()[:, None, None]) / torch.tensor(SCALE).double()[:, None, None]

    def halve(y: Tensor) -> Tensor:
        taps = torch.tensor([1, 2, 1], dtype=torch.float64) / 4
        kernel = torch.outer(taps, taps).expand(y.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(y, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=y.shape[1])

    found = []
    for layer, (weight, bias) in enumerate(trunk):
        if layer in (1, 2):
            x = halve(F.max_pool2d(x, 3, stride=1)) if tolerant else F.max_pool2d(x, 3, stride=2)
        stride = 4 if layer == 0 and not tolerant else 1
        x = F.conv2d(x, weight.double(), bias.double(), stride=stride, padding=(2, 2, 1, 1, 1)[layer])
        x = F.relu(halve(x) if layer == 0 and tolerant else x)
        found.append(x)
    return found


@pytest.mark.parametrize("side", [32, 33, 64, 65, 128])
@pytest.mark.parametrize("kind", [LPIPS, STLPIPS])
def test_distance_is_the_formulas(kind: type[LPIPS] | type[STLPIPS], side: int) -> None:
    """Also at the border, which the merged first convolution and blur treat apart: even and odd sides."""
    trunk, heads = random_trunk(), random_heads()
    network = kind(trunk, heads)
    a, b = pictures(3, side, 1), pictures(3, side, 2)
    a[0] = b[0]
    found = network.distance(network.embed(a), network.embed(b))
    layers = [plain_layers(x, trunk, kind is STLPIPS) for x in (a, b)]
    expected = plain_distance(list(zip(*layers, strict=True)), heads)
    assert found.dtype == torch.float32
    assert found[0] == 0
    assert found[1] > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [LPIPS, STLPIPS])
def test_distance_is_symmetric_and_does_not_depend_on_the_batch(kind: type[LPIPS] | type[STLPIPS]) -> None:
    network = kind(random_trunk(), random_heads())
    a, b = (network.embed(pictures(6, 48, seed)) for seed in (1, 2))
    together = network.distance(a, b)
    assert torch.equal(together, network.distance(b, a))
    alone = tuple(
        torch.cat(layer) for layer in zip(*(network.embed(x) for x in pictures(6, 48, 1)[:, None]), strict=True)
    )
    torch.testing.assert_close(network.distance(alone, b), together, rtol=1e-5, atol=1e-6)
    assert network.distance(alone, a).max() < 1e-9
    assert all(layer.dtype == torch.float32 and layer.ndim == 2 and not layer.requires_grad for layer in a)


def test_heads_are_the_published_ones() -> None:
    """Small, not negative (their roots are taken), and they say where they come from and under which licence."""
    assert LPIPS_HEADS.stat().st_size < 10_000
    with safetensors.safe_open(LPIPS_HEADS, "pt") as file:
        heads = [file.get_tensor(f"lin{number}") for number in range(5)]
        about = file.metadata()
    assert [len(head) for head in heads] == [shape[0] for shape in SHAPES]
    assert min(head.min() for head in heads) >= 0
    assert about["source_sha256"] == "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
    assert about["licence"] == "BSD-2-Clause"
    assert "Richard Zhang" in about["licence_text"]
    assert "lpips" in about["source"]


# --- shift-tolerant LPIPS with its real weights ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stlpips() -> STLPIPS:
    return load_stlpips()


@needs_weights
@pytest.mark.parametrize(("side", "expected"), [(128, 0.06699125213335197), (65, 0.03971337937273123)])
def test_real_weights_give_the_values_of_the_package(stlpips: STLPIPS, side: int, expected: float) -> None:
    """What stlpips_pytorch 0.0.2's own code gives for these two images, in float64."""
    found = stlpips.distance(stlpips.embed(waves(side, 0.0)), stlpips.embed(waves(side, 0.4)))
    assert found.item() == pytest.approx(expected, abs=1e-6)


@needs_weights
def test_real_weights_mind_content_more_than_a_shift(stlpips: STLPIPS) -> None:
    x = pictures(3, 128)
    shifted, other = x.roll(1, 3), pictures(3, 128, seed=1)
    near, far = (stlpips.distance(stlpips.embed(x), stlpips.embed(y)) for y in (shifted, other))
    assert (near * 3 < far).all()


@needs_weights
def test_the_package_is_found_without_running_it(stlpips: STLPIPS) -> None:
    """Its code imports torchvision and IPython, which are not needed."""
    assert "stlpips_pytorch" not in sys.modules
    assert stlpips.weights_sha256 == alexnet.STLPIPS_SHA256


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alexnet, "PACKAGE", "no_such_package_at_all")
    assert stlpips_path() is None
    with pytest.raises(UserError, match=r"pip install 'vultus\[eval\]'"):
        load_stlpips()


@needs_weights
def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package whose file was changed in one byte: refused by its hash before it is read."""
    source = stlpips_path()
    assert source is not None
    copy = tmp_path / "tampered_stlpips" / "weights" / "vST0.0" / source.name
    copy.parent.mkdir(parents=True)
    (tmp_path / "tampered_stlpips" / "__init__.py").touch()
    shutil.copyfile(source, copy)
    with open(copy, "r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(alexnet, "PACKAGE", "tampered_stlpips")
    with pytest.raises(UserError, match=f"{copy}: missing or damaged"):
        load_stlpips()


# --- LPIPS from a file of AlexNet's form ------------------------------------------------------------------------------


def alexnet_state() -> dict[str, Tensor]:
    state = {"classifier.6.bias": torch.zeros(1000)}
    for number, (weight, bias) in zip((0, 3, 6, 8, 10), random_trunk(), strict=True):
        state |= {f"features.{number}.weight": weight, f"features.{number}.bias": bias}
    return state


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """VULTUS_WEIGHTS, empty, and an empty cache."""
    monkeypatch.setenv("VULTUS_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_lpips_loads_trunk_and_heads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / ALEXNET_WEIGHTS.name
    torch.save(alexnet_state(), path)
    with pytest.raises(UserError, match=f"{path}: sha256 is .*fetch it again"):
        load_lpips()
    monkeypatch.setattr(perceptual, "ALEXNET_WEIGHTS", WeightFile(path.name, sha256_file(path)))
    network = load_lpips()
    with safetensors.safe_open(LPIPS_HEADS, "pt") as file:
        heads = [file.get_tensor(f"lin{number}") for number in range(5)]
    expected = LPIPS(random_trunk(), heads)
    a, b = pictures(2, 64, 1), pictures(2, 64, 2)
    found = network.distance(network.embed(a), network.embed(b))
    assert torch.equal(found, expected.distance(expected.embed(a), expected.embed(b)))
    assert network.weights_sha256 == sha256_file(path)


def test_a_file_without_a_layer_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / ALEXNET_WEIGHTS.name
    state = alexnet_state()
    del state["features.8.weight"]
    torch.save(state, path)
    monkeypatch.setattr(perceptual, "ALEXNET_WEIGHTS", WeightFile(path.name, sha256_file(path)))
    with pytest.raises(UserError, match=f"{path}: not the weights of .*features.8"):
        load_lpips()


def test_alexnet_is_not_downloaded_without_fetch(folder: Path) -> None:
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79\.pth not found; fetch https://download\.pytorch\.org/"):
        load_lpips()
    assert not (folder / "cache").exists()

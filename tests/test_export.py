"""Snapshots as ONNX files: the same faces as PyTorch's, in programs without it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tiny_exports import KINDS, Models
from tiny_parts import DIM, TinyEncoder, TinyFeatures, TinyJudge, TinyPerceptual
from vultus._files import sha256_file
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.evaluate import EvaluationSettings, evaluate
from vultus.export import onnx_export as export
from vultus.export.onnx_export import BATCHES, LIMIT, Floats, export_onnx
from vultus.models.facenet import FaceNet
from vultus.models.onnx_runtime import open_onnx
from vultus.models.snapshot import Snapshot, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.latents import noise, sample_identities


@pytest.mark.parametrize("kind", KINDS)
def test_same_faces_as_pytorch_in_every_batch(models: Models, kind: str) -> None:
    path, out, parity = models[kind]
    snapshot, model = load_snapshot(path), open_onnx(out)
    assert list(parity.largest) == list(BATCHES) == [1, 3, 16]
    assert max(parity.largest.values()) <= LIMIT == 1e-3
    for batch in (1, 2, 5, 16):
        z, c = noise(9, 0, batch, 20), sample_identities(snapshot.population, batch, seed=9)
        with torch.inference_mode():
            expected = snapshot.network(z, c).numpy()
        with torch.inference_mode():
            found = model.network(z, c).numpy()
        assert found.shape == (batch, 3, 32, 32)
        assert np.abs(found - expected).max() <= LIMIT
        assert expected.std() > 0.05
    assert np.abs(model.network(z, c.flip(0)).numpy() - expected).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_of_the_file(models: Models, kind: str) -> None:
    path, out, _ = models[kind]
    snapshot, model = load_snapshot(path), open_onnx(out)
    assert sorted(one.name for one in out.parent.glob(f"{kind}.*")) == [f"{kind}.onnx", f"{kind}.safetensors"]
    assert model.metadata["model"] == sha256_file(path)[:16]
    assert model.metadata["generator"] == snapshot.metadata["generator"]
    assert model.metadata["encoder"] == snapshot.metadata["encoder"]
    assert (model.metadata["licence"], model.metadata["precision"]) == ("for tests alone", "float32")
    assert (model.network.resolution, model.network.z_dim, model.network.c_dim) == (32, 20, KINDS[kind])
    assert model.population.keys() == snapshot.population.keys()
    assert all(np.array_equal(model.population[key], value.numpy()) for key, value in snapshot.population.items())
    graph = onnx.load(out).graph
    assert [(one.name, one.type.tensor_type.shape.dim[0].dim_param) for one in graph.input] == [("z", "N"), ("c", "N")]
    assert not [word for word in (b"site-packages", b"networks.py") if word in out.read_bytes()]


def test_int8_computes_in_integers_and_is_not_written_where_that_shows(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, out = load_snapshot(models["dcgan"][0]), tmp_path / "int8.onnx"
    monkeypatch.setattr(export, "_traced", lambda _: onnx.load(models["dcgan"][1]))  # it takes seconds
    parity = export_onnx(models["dcgan"][0], out, precision="int8")
    assert export.LEAST <= parity.psnr < 60
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(out).graph.node}
    assert stored(out) < 0.5 * stored(models["dcgan"][1])
    before = out.read_bytes()
    tried: list[list[str]] = []
    quantised = export._quantised
    monkeypatch.setattr(export, "_quantised", lambda *given: (tried.append(given[2]), quantised(*given))[1])
    monkeypatch.setattr(export, "LEAST", 200.0)
    with pytest.raises(UserError, match="8 bits change the faces"):
        export_onnx(snapshot, out, precision="int8")
    layers = [node.name for node in onnx.load(models["dcgan"][1]).graph.node if node.op_type in export.CONVOLUTIONS]
    assert tried == [
        layers[-count:] for count in range(2, max(2, len(layers) // 2) + 1)
    ]  # one more of the last each time
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


# --- vultus generate --------------------------------------------------------------------------------------------------

COMMANDS = {
    "files": ["--embeddings", "c.npy", "--num", "2", "--seed", "3"],
    "grid": ["--random", "18", "--grid", "--noise_strength", "0.7"],
    "between": ["--between", "random:70", "c.npy#2", "--steps", "4", "--seed", "5"],
}


def test_generate_writes_the_same_images(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("c.npy", unit(4))
    for name, words in COMMANDS.items():
        for kind, model in zip(("torch", "onnx"), models["dcgan"][:2], strict=True):
            # Without watermark: its choice of a pattern depends on every pixel.
            assert (
                main(["generate", str(model), *words, "--device", "cpu", "--no-mark", "--out", f"{kind}/{name}"]) == 0
            )
    images = {one.relative_to("torch") for one in Path("torch").rglob("*.png")}
    assert len(images) == 8 + 1 + 1
    assert images == {one.relative_to("onnx") for one in Path("onnx").rglob("*.png")}
    for name in images:
        with Image.open("torch" / name) as expected, Image.open("onnx" / name) as exported:
            difference = np.abs(np.asarray(expected).astype(int) - np.asarray(exported))
            assert difference.max() <= 1, name
            assert (difference > 0).mean() < 0.001, name
            assert exported.info["Comment"] == expected.info["Comment"]  # the snapshot's id, not the file's


def test_photos_give_the_same_face(models: Models, facenet: FaceNet, shared: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    row = pq.read_table(shared / "celeba" / "test-00000-of-00002.parquet").slice(0, 1).to_pylist()[0]
    (tmp_path / "a.webp").write_bytes(row["image"]["bytes"])
    path, out, _ = models["dcgan"]
    for name, model in {"torch": path, "onnx": out}.items():
        words = ["--photos", str(tmp_path / "a.webp"), "--device", "cpu", "--align", "false", "--no-mark"]
        assert main(["generate", str(model), *words, "--out", str(tmp_path / name)]) == 0
    faces = [np.asarray(Image.open(tmp_path / name / "a_0.png")).astype(int) for name in ("torch", "onnx")]
    assert np.abs(faces[0] - faces[1]).max() <= 1


# --- among the generators ---------------------------------------------------------------------------------------------


def test_evaluation_of_an_exported_model(models: Models, tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = PreparedDataset(tiny_dataset(dim=DIM), "test")
    path, out, _ = models["conditional-norm"]
    snapshot, exported = load_snapshot(path), load_snapshot(out)
    assert isinstance(exported, Snapshot)
    z, c = noise(0, 0, 3, 20), sample_identities(exported.population, 3, seed=0)
    assert (render(exported.network, z, c).int() - render(snapshot.network, z, c)).abs().max() <= 1
    tools = Backbones(TinyEncoder(), (TinyJudge(),), (TinyFeatures(),), (TinyPerceptual(),))
    settings = EvaluationSettings(cache=tmp_path / "cache", best_of=0)
    results = [evaluate(one, data, backbones=tools, settings=settings) for one in (snapshot, exported)]
    rows = [{name: row["value"] for name, row in result["metrics"].items()} for result in results]
    assert len(rows[0]) > 10
    assert rows[1] == pytest.approx(rows[0], rel=0.02, abs=0.02, nan_ok=True)
    assert results[1]["context"]["cur_nimg"] == 7
    assert len(list((tmp_path / "cache").glob("pixels-*.npy"))) > 1  # two generators in the cache


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_command_prints_the_difference(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "model.onnx"
    assert main(["export", str(models["dcgan"][0]), "--onnx", "--out", str(out), "--precision", "float16"]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == [str(out)]
    assert "largest difference to PyTorch" in shown.err
    assert open_onnx(out).metadata["precision"] == "float16"
    assert stored(out) < 0.6 * stored(models["dcgan"][1])
    z, c = noise(0, 0, 2, 20), torch.from_numpy(unit(2))
    half, full = (open_onnx(path).network(z, c) for path in (out, models["dcgan"][1]))
    assert 0 < (half - full).abs().max() < 0.02


def stored(path: Path) -> int:
    """Bytes of the weights."""
    return sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)


def unit(count: int) -> Floats:
    return F.normalize(torch.randn(count, 512, generator=torch.Generator().manual_seed(1))).numpy()


def test_mistakes_are_one_line(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, _ = models["dcgan"]
    (tmp_path / "cut.onnx").write_bytes(out.read_bytes()[:5000])
    model = onnx.load(out)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    onnx.helper.set_model_props(model, {"vultus": json.dumps({"format": "99", "generator": {}})})
    onnx.save(model, tmp_path / "future.onnx")
    model = onnx.load(out)
    del model.metadata_props[1]
    onnx.save(model, tmp_path / "nobody.onnx")
    wrong = {
        ("generate", str(tmp_path / "none.onnx"), "--random", "1"): "none.onnx: no such file; write it with vultus",
        ("generate", str(tmp_path / "cut.onnx"), "--random", "1"): "cut.onnx: not an ONNX model",
        ("generate", str(tmp_path / "other.onnx"), "--random", "1"): "other.onnx: not a generator that vultus",
        ("generate", str(tmp_path / "future.onnx"), "--random", "1"): "install a newer vultus",
        ("generate", str(tmp_path / "nobody.onnx"), "--random", "1"): "holds no population prior",
        ("generate", str(out), "--random", "1", "--device", "cuda"): "runs on the CPU",
        ("export", str(path)): "name the format",
        ("export", str(path), "--onnx"): "give a file name that ends in .onnx",
        ("export", str(out), "--onnx"): "give the snapshot that it was exported from",
        ("publish", str(out), "--repo", "a/b", "--dry-run"): "give the snapshot that it was exported from",
    }  # fmt: skip
    for words, message in wrong.items():
        place = "a.bin" if "ends in" in message else "x.onnx"
        assert main([*words, "--out", str(tmp_path / "out" / place)]) == 2, words
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in shown
    assert not [one for one in (tmp_path / "out").rglob("*.onnx") if one.is_file()]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for words in (["generate", str(out), "--random", "1"], ["export", str(path), "--onnx"]):
        assert main([*words, "--out", str(tmp_path / "x.onnx")]) == 2
        assert "pip install 'vultus[export]'" in capsys.readouterr().err

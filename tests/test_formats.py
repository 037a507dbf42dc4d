"""The golden files of every released version are read by the current code, and newer versions are refused."""

from __future__ import annotations

import json
import lzma
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vultus import _formats
from vultus._formats import VERSIONS, upgrade, upgrades
from vultus.audit.stored import read_audit
from vultus.audit.tables import group_cells, key_cells, main_cells
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.models.generators import GeneratorNetwork
from vultus.models.hub import write_folder
from vultus.models.snapshot import load_snapshot, save_snapshot
from vultus.reporting.run_folder import read_evaluations, read_run
from vultus.sampling.directions import read_directions
from vultus.sampling.embedding_files import open_embeddings
from vultus.sampling.face_files import read_faces

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
RUNS = {"run-gan": "reference-dcgan", "run-coded": "vultus-cpu"}  # and their presets


def pixels(network: GeneratorNetwork, expected: dict[str, Any]) -> torch.Tensor:
    """Every eighth pixel of the images for the noise and embeddings of expected.json, [2, 3 * 4 * 4]."""
    with torch.inference_mode():
        x = network(torch.tensor(expected["z"]), torch.tensor(expected["c"]))
    assert x.shape == (2, 3, 32, 32)
    return x[:, :, ::8, ::8].flatten(1)


def copy(name: str, folder: Path) -> Path:
    """A copy of a golden file or folder that can be changed, its checkpoints decompressed."""
    target = folder / name
    if (GOLDEN / name).is_file():
        shutil.copyfile(GOLDEN / name, target)
        return target
    shutil.copytree(GOLDEN / name, target)
    for path in target.glob("*.xz"):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
        path.unlink()
    return target


# --- golden files -----------------------------------------------------------------------------------------------------


def test_golden_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 1_000_000


def test_prepared_data_set() -> None:
    both = PreparedDataset(GOLDEN / "prepared", None)
    assert (len(both), both.resolution, both.manifest["licence"]) == (14, 32, "drawn")
    assert both.manifest["encoder"]["id"] == "tiny"
    train, test = both.with_split("train"), both.with_split("test")
    assert (len(train), len(test)) == (4, 10)
    assert set(train.identities).isdisjoint(test.identities)
    batch = both.batch([0, 1, 2])
    assert batch.keys == ["person 0/0.png", "person 0/1.png", "person 1/0.png"]
    assert batch.identities == ["person 0", "person 0", "person 1"]
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.images.float().mean().item() == pytest.approx(127.5, abs=40)
    assert both.embeddings().shape == (14, 8)
    assert torch.allclose(both.embeddings().norm(dim=1), torch.ones(14), atol=1e-6)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_generators(name: str) -> None:
    """Run folders, a snapshot in float16, a model folder and an ONNX file give the pixels that they gave then."""
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    snapshot = load_snapshot(GOLDEN / name)
    expected = EXPECTED[name]["at"]
    assert torch.allclose(pixels(snapshot.network, expected), torch.tensor(expected["x"]), rtol=1e-3, atol=1e-6)
    assert not snapshot.network.training
    assert snapshot.population["mean"].shape == (8,)
    assert snapshot.population["factor"].shape[0] == 8
    metadata = snapshot.metadata
    assert metadata["cur_nimg"] == 8
    assert metadata["preset"] == ("reference-dcgan" if name in ("run-gan", "generator.onnx") else "vultus-cpu")
    assert metadata["encoder"] == {"id": "tiny", "dim": 8, "weights_sha256": "0" * 64}
    assert metadata["crop"] == {"kind": "centre", "encoder_fraction": 0.8}
    assert metadata["licence"] == "drawn"
    assert metadata["data"]["images"] == 4
    assert metadata["generator"] | {"kind": None} == {
        "kind": None,
        "resolution": 32,
        "z_dim": 4,
        "c_dim": 8,
        "base_width": 8,
        "max_width": 8,
        "projection": 4,
    }


def test_model_folder_by_class() -> None:
    network = GeneratorNetwork.from_pretrained(GOLDEN / "published")
    expected = EXPECTED["published"]["at"]
    assert torch.allclose(pixels(network, expected), torch.tensor(expected["x"]), rtol=1e-3, atol=1e-6)
    assert set(network.population) >= {"mean", "factor"}


@pytest.mark.parametrize("name", RUNS)
def test_run_folder(name: str) -> None:
    run = read_run(GOLDEN / name)
    assert (run.cur_nimg, run.resolution) == (8, 32)
    assert run.config["method"] == {"run-gan": "gan", "run-coded": "cvae-gan"}[name]  # coded: the former name
    assert run.config["preset"] == RUNS[name]
    assert run.data["counts"]["images"] == 14
    assert [line["cur_nimg"] for line in run.steps] == [2, 4, 6, 8]
    assert len(run.series("G_total")) == 4
    assert [each.cur_nimg for each in run.samples] == [0, 8]
    assert run.sessions[0]["cur_nimg"] == 8
    assert run.trackers["tensorboard"]["sent"]["train"] == 8
    assert run.snapshot["cur_nimg"] == 8
    assert run.parameters > 1000
    assert not run.running
    assert run.remarks == []


@pytest.mark.parametrize("name", RUNS)
def test_training_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of version 1 resumes with the same command and becomes what it would have become then."""
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VULTUS_WEIGHTS", raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # FaceNet is not needed and must not be downloaded
    monkeypatch.setenv("no_proxy", "")
    out = copy(name, tmp_path)
    command = ["train", "--preset", RUNS[name], "--data", str(GOLDEN / "prepared"), "--out", str(out)]
    assert main([*command, "--images", "16", "--device", "cpu"]) == 0
    capsys.readouterr()
    snapshot = load_snapshot(out)
    assert snapshot.metadata["cur_nimg"] == 16
    before, after = (torch.tensor(EXPECTED[name][key]["x"]) for key in ("at", "resumed"))
    difference = (pixels(snapshot.network, EXPECTED[name]["resumed"]) - after).abs().max()
    assert difference < 0.05 * (after - before).abs().max()  # 0 on the machine that wrote the file
    run = read_run(out)
    assert (run.cur_nimg, len(run.sessions)) == (16, 2)
    assert run.samples[-1].cur_nimg == 16


def test_face_list() -> None:
    lines = read_faces(GOLDEN / "faces.jsonl")
    assert [line["file"] for line in lines] == ["000000_0.png", "000001_0.png"]
    assert lines[1]["cosine"] == 0.7875


def test_evaluation() -> None:
    found = read_evaluations([read_run(GOLDEN / "run-gan")])
    assert found.of_run == {"run-gan": "run-gan (test)"}
    result = found.columns["run-gan (test)"]
    stored = json.loads((GOLDEN / "run-gan" / "evaluation" / "results.json").read_text())["run-gan (test)"]
    assert result["context"]["n_images"] == 10
    assert result["metrics"].keys() == stored["metrics"].keys()
    assert result["metrics"]["identity_tiny"] == stored["metrics"]["identity_tiny"]


@pytest.mark.parametrize("suffix", ["npz", "parquet", "json", "csv"])
def test_embeddings(suffix: str) -> None:
    embeddings = open_embeddings(GOLDEN / f"embeddings.{suffix}", 4, {"id": "tiny"})
    expected = torch.nn.functional.normalize(torch.arange(1.0, 9.0).reshape(2, 4).cos())
    assert torch.allclose(torch.cat(list(embeddings.chunks())), expected, atol=1e-6)


def test_audit() -> None:
    result = read_audit(GOLDEN / "audit.json")
    assert (result["context"]["n_people"], result["context"]["groups"]) == (15, ["first", "none of these"])
    real, plain, hashed = main_cells(result)[1:]
    assert [row[0] for row in (real, plain, hashed)] == ["real photos, no attack", "plain", "biohash-known"]
    assert plain[3] == "100.0 (100.0 to 100.0)"
    assert key_cells(result)[1][-1] == "impostors with the stolen key"
    assert [row[1:4] for row in group_cells(result)[1:4]] == [
        ["first", "9", "3"],
        ["none of these", "51", "13"],
        ["all", "60", "15"],
    ]


def test_directions() -> None:
    directions = read_directions(GOLDEN / "directions.safetensors")
    assert torch.equal(directions.vectors["smile"], torch.arange(8) / 8)
    assert directions.cost("smile", 2).startswith("smile +1.5: changes the attribute by +0.90")


# --- newer and unknown versions ---------------------------------------------------------------------------------------


def change(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), count=1)
    assert count == 1
    path.write_text(text, encoding="utf-8")


def newer_data_set(folder: Path) -> tuple[Path, Any]:
    path = copy("prepared", folder)
    change(path / "manifest.json", '"schema": 1', '"schema": 2')
    return path / "manifest.json", lambda: PreparedDataset(path)


def newer_safetensors(name: str, folder: Path) -> Path:
    path = copy(name, folder)
    with safetensors.safe_open(path, "pt") as file:
        values = file.metadata() | {"format": "2"}
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), values))
    return path


def newer_snapshot(folder: Path) -> tuple[Path, Any]:
    path = newer_safetensors("snapshot-float16.safetensors", folder)
    return path, lambda: load_snapshot(path)


def newer_model_folder(folder: Path) -> tuple[Path, Any]:
    path = copy("published", folder)
    change(path / "config.json", '"format": "1"', '"format": "2"')
    return path / "config.json", lambda: load_snapshot(path)


def newer_onnx(folder: Path) -> tuple[Path, Any]:
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    path = copy("generator.onnx", folder)
    model = onnx.load(path)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    entries["vultus"] = json.dumps(json.loads(entries["vultus"]) | {"format": "2"})
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, path)
    return path, lambda: load_snapshot(path)


def newer_embeddings(folder: Path) -> tuple[Path, Any]:
    path = copy("embeddings.json", folder)
    change(path, '"format": 1', '"format": 2')
    return path, lambda: open_embeddings(path, 4)


def newer_audit(folder: Path) -> tuple[Path, Any]:
    path = copy("audit.json", folder)
    change(path, '"format": 1', '"format": 2')
    return path, lambda: read_audit(path)


def newer_directions(folder: Path) -> tuple[Path, Any]:
    path = newer_safetensors("directions.safetensors", folder)
    return path, lambda: read_directions(path)


@pytest.mark.parametrize(
    "make",
    [
        newer_data_set,
        newer_snapshot,
        newer_model_folder,
        newer_onnx,
        newer_embeddings,
        newer_audit,
        newer_directions,
    ],
)
def test_a_newer_version_is_refused_in_one_line_with_the_file(tmp_path: Path, make: Any) -> None:
    path, read = make(tmp_path)
    with pytest.raises(UserError, match="of version 2, this vultus reads up to version 1; install a newer") as caught:
        read()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# --- what is written --------------------------------------------------------------------------------------------------


def test_versions_are_written_as_before(tmp_path: Path) -> None:
    """A program of the same version reads what this one writes: the entries have the same names, values and types."""
    snapshot = load_snapshot(GOLDEN / "run-gan")
    path = tmp_path / "snapshot.safetensors"
    save_snapshot(path, network=snapshot.network, population=snapshot.population, metadata=snapshot.metadata)
    golden = GOLDEN / "run-gan" / "snapshot.safetensors"
    with safetensors.safe_open(path, "pt") as new, safetensors.safe_open(golden, "pt") as old:
        assert new.metadata() == old.metadata()
    new, old = safetensors.torch.load_file(path), safetensors.torch.load_file(golden)
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) for key in old)
    write_folder(load_snapshot(GOLDEN / "run-coded").network, tmp_path)
    for name in ("config.json", "model.safetensors", "people.safetensors"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / "published" / name).read_bytes()


# --- upgrades ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def third_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format of version 3 with upgrades from 1 and 2."""
    monkeypatch.setitem(VERSIONS, "example", 3)
    monkeypatch.setattr(_formats, "_UPGRADES", dict(_formats._UPGRADES))
    upgrades("example", 1)(lambda value: [*value, "1 to 2"])
    upgrades("example", 2)(lambda value: [*value, "2 to 3"])


@pytest.mark.usefixtures("third_version")
def test_upgrades_run_one_after_another() -> None:
    assert upgrade("example", 1, [], "a.json") == ["1 to 2", "2 to 3"]
    assert upgrade("example", "2", [], "a.json") == ["2 to 3"]
    assert upgrade("example", 3, [], "a.json") == []


@pytest.mark.usefixtures("third_version")
@pytest.mark.parametrize("version", [None, "x", 0, -1, 4, "99"])
def test_versions_without_an_upgrade_are_refused(version: Any) -> None:
    with pytest.raises(UserError, match=r"^a\.json: example of version") as caught:
        upgrade("example", version, [], "a.json")
    assert "\n" not in str(caught.value)

"""The demo as a new user runs it, without network and FaceNet; and the files that the package contains."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from vultus.cli import demo
from vultus.cli.main import main
from vultus.models import facenet as facenet_module
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.latents import sample_identities


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facenet_module._load_network.cache_clear()
    for name, value in {"VULTUS_WEIGHTS": "", "VULTUS_CACHE": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo, "IDENTITIES", 128)  # a quarter: generating them takes most of the time
    assert main(["demo", "--out", str(tmp_path / "demo"), "--seconds", "5"]) == 0
    stdout, stderr = capsys.readouterr()
    faces = tmp_path / "demo" / "faces.png"
    assert str(faces) in stdout
    with Image.open(faces) as image:
        assert image.width > 800
        assert np.asarray(image).std() > 30
    lines = [json.loads(line) for line in (tmp_path / "demo" / "tiny-run" / "stats.jsonl").read_text().splitlines()]
    errors = [line["mse"] for line in lines if line.get("evaluator") == "unseen"]
    assert errors[-1] < 0.8 * errors[0]
    assert (tmp_path / "demo" / "training.png").is_file()
    assert (tmp_path / "demo" / "curves.png").is_file() or "no plot" in stderr
    assert not (tmp_path / "none").exists()
    # In a log file, progress is a line every 10 seconds at most, not a bar.
    assert "\r" not in stderr
    assert len(stderr.splitlines()) < 40


def test_embedded_snapshot_has_its_metadata_and_is_no_pickle() -> None:
    path = default_snapshot()
    assert path.stat().st_size <= 25_000_000
    assert path.suffix == ".safetensors"
    metadata = load_snapshot(path).metadata
    assert metadata["encoder"]["id"] == "facenet-vggface2"
    assert "non-commercial" in metadata["licence"]
    assert metadata["hours"] >= 1
    assert metadata["metrics"]["context"]["split"] == "test"
    assert metadata["metrics"]["context"]["n_images"] == 2527


def test_gallery_is_sampled_from_the_embedded_population_prior() -> None:
    embeddings = gallery()
    samples = sample_identities(load_snapshot(default_snapshot()).population, len(embeddings), seed=7)
    assert torch.allclose(embeddings, samples, atol=1e-6)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)), atol=1e-5)


@pytest.mark.parametrize("name", ["default", "gallery"])
def test_assets_contain_finite_tensors(name: str) -> None:
    tensors = safetensors.torch.load_file(default_snapshot().with_name(f"{name}.safetensors"))
    assert tensors
    assert all(torch.isfinite(value.float()).all() for value in tensors.values())

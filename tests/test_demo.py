"""The demo as a new user runs it, without network and FaceNet; and the files that the package contains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.latents import sample_identities


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    environment = os.environ | {"VULTUS_WEIGHTS": "", "VULTUS_CACHE": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}
    # A quarter of the usual data set: generating it takes most of the time.
    program = "import sys; from vultus.cli import demo; demo.IDENTITIES = 128; from vultus.cli.main import main; "
    program += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "demo", "--out", str(tmp_path / "demo"), "--seconds", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    stdout, stderr = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, stderr
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

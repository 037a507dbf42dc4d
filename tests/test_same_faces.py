"""The faces of one seed: the same bytes on 1 and 2 threads; on other processors and in bfloat16 nearly the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vultus.images.io import to_x
from vultus.images.watermark import mark_pixels
from vultus.models.facenet import FaceNet
from vultus.models.snapshot import load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.latents import noise, sample_identities

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_pixel() -> None:
    snapshot = load_snapshot("default")
    faces = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        c = sample_identities(snapshot.population, 20, seed=5)
        faces.append(render(snapshot.network, noise(5, 0, 20, snapshot.network.z_dim), c))
    assert torch.equal(faces[0], faces[1])
    assert torch.equal(faces[0], faces[2])
    assert len(faces[0].flatten(1).unique(dim=0)) == 20


def test_the_watermark_of_a_face_does_not_depend_on_the_others() -> None:
    snapshot = load_snapshot("default")
    c, z = sample_identities(snapshot.population, 48, seed=0), noise(0, 0, 48, snapshot.network.z_dim)
    faces = render(snapshot.network, z, c).numpy()
    marked = mark_pixels(faces)
    for size in (1, 7):
        parts = [mark_pixels(faces[start : start + size]) for start in range(0, 48, size)]
        assert (np.concatenate(parts) == marked).all()
    assert (marked != faces).any((1, 2, 3)).all()


def test_facenet_sees_the_same_people_in_bfloat16(facenet: FaceNet) -> None:
    snapshot = load_snapshot("default")
    c, z = sample_identities(snapshot.population, 8, seed=5), noise(5, 0, 8, snapshot.network.z_dim)
    whole, half = (
        facenet.embed(to_x(render(snapshot.network, z, c, dtype))) for dtype in (torch.float32, torch.bfloat16)
    )
    cosines = (whole * half).sum(1)
    assert 0.99 < cosines.min() < 1
    assert (whole * half.roll(1, 0)).sum(1).max() < 0.9  # other people are told apart


@pytest.mark.slow
def test_other_instructions_onnx_and_bfloat16_change_little(tmp_path: Path) -> None:
    """The tolerances of docs/reliability.md."""
    command = [sys.executable, "scripts/same_faces.py", "--people", "8", "--json", str(tmp_path / "rows.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    names = ["instructions up to SSE4", "ONNX Runtime, float32", "bfloat16"]
    subprocess.run([*command, "--only", *names], cwd=ROOT, env=environment, check=True, capture_output=True)
    *others, half = (json.loads((tmp_path / "rows.json").read_text())[name] for name in names)
    for row in others:
        assert row["largest_level"] <= 1
        assert 0 < row["differing_per_million"] < 500
    assert 0 < half["mean_level"] < 1
    assert half["largest_level"] <= 48

"""The faces of one seed: the same bytes on 1 and 2 threads; on other processors and in bfloat16 nearly the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.mark.slow
def test_other_instructions_and_bfloat16_change_little(tmp_path: Path) -> None:
    """The tolerances of docs/reliability.md. The script checks FaceNet's cosine too where its weights are."""
    command = [sys.executable, "scripts/same_faces.py", "--people", "8", "--json", str(tmp_path / "rows.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    names = ["instructions up to SSE4", "bfloat16"]
    subprocess.run([*command, "--only", *names], cwd=ROOT, env=environment, check=True, capture_output=True)
    older, half = (json.loads((tmp_path / "rows.json").read_text())[name] for name in names)
    assert older["largest_level"] <= 1
    assert older["differing_per_million"] < 500
    assert 0 < half["mean_level"] < 1
    assert half["largest_level"] <= 48
    assert older.get("lowest_cosine", 1.0) > 0.9999
    assert half.get("lowest_cosine", 1.0) > 0.99

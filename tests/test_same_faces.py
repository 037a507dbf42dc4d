"""The faces of one seed: the same bytes on 1 and 2 threads; on other processors and in bfloat16 nearly the same."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vultus.images.watermark import mark_pixels
from vultus.models.facenet import FaceNet
from vultus.models.snapshot import load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.latents import noise, sample_identities
from vultus.sampling.photos import embed_photo

ROOT = Path(__file__).resolve().parents[1]


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
def test_files_are_the_same_with_other_threads_and_batches(tmp_path: Path) -> None:
    """Face 27 of this seed had another watermark with two threads of OpenBLAS."""
    files = []
    for threads, batch in ((1, 1), (2, 64)):
        out = tmp_path / f"{threads}"
        command = ["generate", "default", "--random", "28", "--seed", "5", "--batch", f"{batch}", "--out", f"{out}"]
        inherited = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
        environment = inherited | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": f"{threads}"}
        subprocess.run([sys.executable, "-m", "vultus", *command], env=environment, check=True, capture_output=True)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(files[0]) == 29
    assert files[0] == files[1]


@pytest.mark.usefixtures("threads")
def test_the_embedding_of_a_photo_is_the_same_with_other_threads(random_facenet: FaceNet, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    embeddings = []
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (200, 180, 3), np.uint8)).save(tmp_path / f"{number}.png")
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        photos = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
        embeddings.append(torch.stack([embed_photo(photo, random_facenet, align=False).c for photo in photos]))
        assert torch.get_num_threads() == count
    assert torch.equal(embeddings[0], embeddings[1])
    assert torch.equal(embeddings[0], embeddings[2])


def test_the_watermark_of_a_face_does_not_depend_on_the_others_or_the_memory_format() -> None:
    snapshot = load_snapshot("default")
    c = sample_identities(snapshot.population, 20, seed=2)
    faces = render(snapshot.network, noise(2, 0, 20, snapshot.network.z_dim), c).numpy()
    marked = mark_pixels(np.ascontiguousarray(faces))
    for count in (1, 7):
        parts = [mark_pixels(faces[start : start + count]) for start in range(0, 20, count)]
        assert np.array_equal(np.concatenate(parts), marked)


@pytest.mark.slow
def test_other_instructions_runtimes_and_bfloat16_change_little(tmp_path: Path) -> None:
    """The tolerances of docs/reliability.md. The script checks FaceNet's cosine too where its weights are."""
    command = [sys.executable, "scripts/same_faces.py", "--people", "8", "--json", str(tmp_path / "rows.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    exact = ["instructions up to SSE4", "ONNX Runtime, float32"]
    subprocess.run([*command, "--only", *exact, "bfloat16"], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    for name in exact:
        assert rows[name]["largest_output"] < 2e-4, name
        assert rows[name]["largest_level"] <= 1, name
        assert rows[name]["differing_per_million"] < 300, name
        assert rows[name]["marked_per_million"] < 1000, name
        assert rows[name].get("lowest_cosine", 1.0) > 0.9999, name
    if platform.machine() in ("x86_64", "AMD64"):
        assert rows[exact[0]]["largest_output"] > 0  # the instructions were in fact others
    half = rows["bfloat16"]
    assert 0 < half["mean_level"] < 1
    assert half["largest_level"] <= 48
    assert half.get("lowest_cosine", 1.0) > 0.99

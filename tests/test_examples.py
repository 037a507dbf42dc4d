"""The scripts in examples/ as their docstrings start them, small."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import vultus
from vultus.models import facenet

EXAMPLES = Path(__file__).parents[1] / "examples"


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs an example in `tmp_path` and returns its standard output."""

    def call(script: str, *arguments: str, weights: Path | None = None) -> str:
        facenet._load_network.cache_clear()
        monkeypatch.setenv("VULTUS_WEIGHTS", str(weights or ""))
        monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return call


def album(shared: Path, folder: Path, identities: int) -> Path:
    """Two real photos of each of so many identities, one sub-folder for each identity."""
    table = pq.read_table(shared / "celeba" / "test-00000-of-00002.parquet")
    photos: dict[int, list[bytes]] = {}
    for row in table.to_pylist():
        photos.setdefault(row["celeb_id"], []).append(row["image"]["bytes"])
    several = [key for key in sorted(photos) if len(photos[key]) > 1]
    for key in several[:identities]:
        (folder / str(key)).mkdir(parents=True)
        for number, data in enumerate(photos[key][:2]):
            (folder / str(key) / f"{number}.webp").write_bytes(data)
    return folder


def test_scripts_are_short_and_use_the_public_api_only() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 3
    for script in scripts:
        lines = script.read_text(encoding="utf-8").splitlines()
        assert len(lines) < 40
        assert not [line for line in lines if "vultus" in line and line.startswith(("from", "import vultus."))]


def test_sample_identities(run: Run, tmp_path: Path) -> None:
    shown = run("sample_identities.py", "--count", "2", "--num", "3", "--out", "new/identities.png")
    assert shown.strip() == str(Path("new/identities.png"))
    with Image.open(tmp_path / "new" / "identities.png") as image:
        assert image.size == (3 * 130 - 2, 2 * 130 - 2)
    assert vultus.detect(tmp_path / "new" / "identities.png")["synthetic"]


def test_photo_to_face(run: Run, shared: Path, tmp_path: Path) -> None:
    photos = sorted(album(shared, tmp_path / "photos", 1).glob("*/*.webp"))
    shown = run(
        "photo_to_face.py",
        *map(str, photos),
        "--num",
        "3",
        "--out",
        "faces",
        weights=shared / "weights",
    )
    cosines = [float(text) for line in shown.splitlines()[:2] for text in line.rpartition("cosine ")[2].split(", ")]
    assert len(cosines) == 6
    assert min(cosines) > 0.3
    assert len(list((tmp_path / "faces").glob("*.png"))) == 6


@pytest.mark.slow
def test_train_on_folder(run: Run, shared: Path, tmp_path: Path) -> None:
    album(shared, tmp_path / "photos", 24)
    shown = run(
        "train_on_folder.py", "photos", "--preset", "tiny", "--resolution", "32", "--images", "64", "--out", "mine",
        weights=shared / "weights",
    )  # fmt: skip
    assert "48 photos prepared" in shown
    assert "identity_facenet" in shown
    assert (tmp_path / "mine" / "run" / "snapshot.safetensors").is_file()
    assert (tmp_path / "mine" / "evaluation" / "table.md").is_file()
    with Image.open(tmp_path / "mine" / "faces.png") as image:
        assert image.size == (4 * 34 - 2, 8 * 34 - 2)

"""What `--out` may name: never a file that is read or that somebody else wrote, and only what can be written."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vultus
from vultus._outputs import Inputs, check_output
from vultus.cli.main import main
from vultus.errors import UserError
from vultus.models.facenet import FaceNet
from vultus.sampling import conditioning

DEVICE = ["--device", "cpu"]


@pytest.fixture
def photos(tmp_path: Path, random_facenet: FaceNet, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures in tmp_path, which is the working directory; FaceNet has random weights."""
    monkeypatch.setattr(conditioning, "load_condition_encoder", lambda *_, **__: random_facenet)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("ann.jpg", "bob.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def state(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(*words: str) -> int:
    return main(["generate", "default", *words, "--align", "false", *DEVICE])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("vultus: error: ")
    return shown[-1]


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("spelling", ["same", "absolute", "dots", "symbolic link", "hard link"])
def test_a_photo_that_is_read_is_never_replaced(
    photos: Path, spelling: str, overwrite: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    photo = photos / "ann.jpg"
    if spelling == "symbolic link":
        os.symlink(photo, "link.jpg")
    elif spelling == "hard link":
        os.link(photo, "hard.jpg")
    out = {
        "same": "photos/ann.jpg",
        "absolute": str(photo),
        "dots": "photos/../photos/./ann.jpg",
        "symbolic link": "link.jpg",
        "hard link": "hard.jpg",
    }[spelling]
    before = state(Path())
    assert run("--photos", "photos/ann.jpg", "--grid", "--out", out, *overwrite) == 2
    assert f"{out.replace('/./', '/')}: is read by this command" in error_of(capsys)
    assert state(Path()) == before
    if spelling == "symbolic link":
        assert Path("link.jpg").is_symlink()


@pytest.mark.parametrize("out", ["photos", "photos/new", "./photos/../photos/a/b", "there", "there/new"])
def test_faces_are_never_written_among_the_photos_that_are_read(
    photos: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink(photos, "there", target_is_directory=True)
    before = state(photos)
    for words in (["--photos", "photos"], ["--photos", "photos/bob.png", "photos"], ["--photos", "photos", "--grid"]):
        assert run(*words, "--out", out, "--overwrite") == 2
        assert "all photos in photos are read" in error_of(capsys)
    assert state(photos) == before
    assert sorted(path.name for path in photos.iterdir()) == ["ann.jpg", "bob.png"]


def test_the_other_inputs_are_not_replaced_either(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--random", "1", "--out", "way") == 0
    Path("way/000000_0.png").rename("way/between.png")
    np.save("c.npy", torch.nn.functional.normalize(torch.randn(2, 512)).numpy())
    os.link("c.npy", "c.png")
    before = state(Path())
    capsys.readouterr()
    assert run("--between", "way/between.png", "random:1", "--out", "way", "--overwrite") == 2
    assert "way/between.png: is read by this command" in error_of(capsys)
    assert run("--embeddings", "c.npy", "--grid", "--out", "c.png", "--overwrite") == 2
    assert "c.png: is read by this command" in error_of(capsys)
    # The name of the face is that of the second photo.
    Path("photos/ann.jpg").rename("photos/bob_0.jpg")
    assert run("--photos", "photos/bob.png", "--out", "photos") == 0
    Path("photos/bob_0.png").replace("photos/bob_0_0.png")
    capsys.readouterr()
    assert run("--photos", "photos/bob_0.jpg", "photos/bob_0_0.png", "--out", "photos", "--overwrite") == 2
    assert "photos/bob_0_0.png: is read by this command" in error_of(capsys)
    assert {name: one for name, one in state(Path()).items() if name in before and "ann" not in name} == {
        name: one for name, one in before.items() if "ann" not in name
    }


# --- files of others --------------------------------------------------------------------------------------------------


def test_a_file_of_somebody_else_is_replaced_on_request_only(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(photos / "ann.jpg").save("holiday.jpg")
    os.symlink("nowhere", "dangling.png")
    Path("faces").mkdir()
    Path("faces/000001_0.png").write_text("mine")
    Path("way").mkdir()
    Path("way/between.gif").write_text("mine")
    before = state(Path())
    grid = ["--random", "2", "--grid", "--out", "holiday.jpg"]
    assert run(*grid) == 2
    assert (
        "holiday.jpg: exists and was not written by vultus; choose another --out, or replace it with --overwrite"
        in (error_of(capsys))
    )
    assert run("--random", "1", "--grid", "--out", "dangling.png") == 2
    assert run("--between", "random:1", "random:2", "--out", "way") == 2
    assert run("--random", "2", "--out", "faces") == 2
    assert "faces/000001_0.png: exists and was not written by vultus" in error_of(capsys)
    assert state(Path()) == before | {"faces/000000_0.png": state(Path())["faces/000000_0.png"]}
    assert run(*grid, "--overwrite") == 0
    assert vultus.detect("holiday.jpg")["synthetic"]


@pytest.mark.slow
def test_the_same_command_again_is_no_error_and_another_one_is(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "faces": ["--random", "2", "--num", "2"],
        "grid.webp": ["--random", "2", "--grid"],
        "way": ["--between", "random:1", "random:2", "--steps", "3"],
        "mine": ["--photos", "photos/bob.png"],
    }
    for out, words in commands.items():
        assert run(*words, "--out", out) == 0
    before = state(Path())
    for out, words in commands.items():
        assert run(*words, "--out", out) == 0
        capsys.readouterr()
        change = {"faces": ["--noise_strength", "0.5"], "grid.webp": ["--no-mark"]}.get(out, ["--seed", "1"])
        assert run(*words, *change, "--out", out) == 2
        shown = error_of(capsys)
        assert f"vultus: error: {out}" in shown
        assert "exists and shows something else (AI-generated face, snapshot " in shown
        assert "or replace it with --overwrite" in shown
    assert state(Path()) == before
    assert run("--random", "3", "--num", "2", "--out", "faces") == 0  # the first four are the same
    assert run("--random", "2", "--num", "2", "--seed", "1", "--out", "faces", "--overwrite") == 0
    after = state(Path())
    assert after["faces/000002_1.png"] != before["faces/000001_1.png"] != after["faces/000001_1.png"]


def test_the_same_rules_from_python(tmp_path: Path) -> None:
    generator = vultus.load(device="cpu")
    faces = generator.sample(generator.sample_identities(2))
    (tmp_path / "own.png").write_text("mine")
    for out in ("own.png", "faces", "grid.png"):
        if out != "own.png":
            vultus.save_images(faces, tmp_path / out)
            vultus.save_images(faces, tmp_path / out)
        before = state(tmp_path)
        with pytest.raises(UserError, match=r"exists and (shows something else|was not written by vultus)"):
            vultus.save_images(faces.flip(0), tmp_path / out)
        assert state(tmp_path) == before
        vultus.save_images(faces.flip(0), tmp_path / out, overwrite=True)
        assert state(tmp_path) != before


def test_a_report_and_a_demo_replace_no_file_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "training.png").write_text("mine")
    assert main(["demo", "--out", str(tmp_path), "--seconds", "1"]) == 2
    assert "training.png: exists and is no earlier result of this command; choose another --out" in error_of(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.png"]


# --- suffixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".tif", ".tiff", ".gif", ".avif"])
def test_a_grid_in_every_format_is_marked(suffix: str, tmp_path: Path) -> None:
    if suffix == ".avif":
        from PIL import features

        if not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
    out = tmp_path / f"grid{suffix}"
    assert run("--random", "2", "--grid", "--out", str(out)) == 0
    assert run("--random", "2", "--grid", "--out", str(out)) == 0  # the same bytes, or the same pixels
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    found = vultus.detect(out)
    assert found["metadata"]["source"].endswith("trainedAlgorithmicMedia")
    assert found["metadata"]["seed"] == 0
    assert found["watermark"]["found"]


@pytest.mark.parametrize("name", ["x.bmp", "x.jgp", "x.mp4", "x.pdf", "x.v2"])
def test_a_grid_in_another_format_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--random", "2", "--grid", "--out", name) == 2
    shown = error_of(capsys)
    assert f"--out {name}: a grid cannot be written as {Path(name).suffix}; use .png, .jpg, .jpeg, .webp, " in shown
    assert not list(tmp_path.iterdir())
    assert run("--random", "2", "--grid", "--out", f"{name}/") == 0
    assert run("--random", "2", "--grid", "--out", name) == 0  # an existing folder
    assert [path.name for path in (tmp_path / name).iterdir()] == ["grid.png"]


@pytest.mark.parametrize("name", ["x.gif", "x.mp4", "x.png", "x.bmp", "x.heic"])
def test_a_folder_is_not_called_like_an_image(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--random", "1"], ["--between", "random:1", "random:2"]):
        assert run(*words, "--out", name) == 2
        assert f"{name}: a folder is needed" in error_of(capsys)
    assert not list(tmp_path.iterdir())
    assert run("--random", "1", "--out", "run.v2") == 0
    assert Path("run.v2/000000_0.png").is_file()


# --- the function -----------------------------------------------------------------------------------------------------


def test_other_spellings_on_a_disk_that_ignores_case(tmp_path: Path) -> None:
    (tmp_path / "own.jpg").touch()
    if not (tmp_path / "OWN.JPG").exists():
        os.link(tmp_path / "own.jpg", tmp_path / "OWN.JPG")  # what such a disk does: two names of one file
    with pytest.raises(UserError, match=r"OWN\.JPG: is read by this command"):
        check_output(tmp_path / "OWN.JPG", inputs=Inputs([tmp_path / "own.jpg"]), overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="has no device files")
def test_names_that_cannot_be_looked_up(tmp_path: Path) -> None:
    inputs = Inputs(["missing", "a\0b", tmp_path / "none"], ["missing"])
    for path in ("missing", "a\0b", "/dev/null"):
        inputs.check(path)

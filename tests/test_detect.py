"""`vultus detect`: several files and folders, every format that vultus writes, bad files among good ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vultus
from vultus.cli.main import main
from vultus.errors import UserError
from vultus.images.c2pa import read_credentials
from vultus.images.xmp import MEDIA_TYPES, Origin, encode_marked, read_marks

ORIGIN = Origin("abc", 7, "a test")


@pytest.fixture(scope="module")
def face() -> Image.Image:
    generator = vultus.load(device="cpu")
    pixels = generator.sample(generator.sample_identities(1))[0, 0]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@pytest.fixture
def folder(face: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """two/ with a marked face, a picture, two bad files, a sub-folder with a marked GIF, and what is no image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two" / "sub").mkdir(parents=True)
    (tmp_path / "two" / "a-cut.png").write_bytes(encode_marked(face, "PNG", ORIGIN)[:300])
    (tmp_path / "two" / "b.png").write_bytes(encode_marked(face, "PNG", ORIGIN))
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "two" / "c.bmp")
    (tmp_path / "two" / "d.jpg").touch()
    (tmp_path / "two" / "e.txt").write_text("text")
    (tmp_path / "two" / ".f.png").write_text("hidden")
    (tmp_path / "two" / "sub" / "g.gif").write_bytes(encode_marked(face, "GIF", ORIGIN))
    return tmp_path / "two"


def detect(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, list[str]]:
    code = main(["detect", *words, "--json"])
    shown = capsys.readouterr()
    return code, json.loads(shown.out), shown.err.splitlines()


def test_bad_files_are_listed_and_counted_and_the_rest_is_examined(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, results, messages = detect(capsys, "two")
    assert code == 1
    assert [(one["file"], one["synthetic"]) for one in results] == [
        ("two/a-cut.png", None),
        ("two/b.png", True),
        ("two/c.bmp", False),
        ("two/d.jpg", None),
        ("two/sub/g.gif", True),
    ]
    assert "damaged image" in results[0]["error"]
    assert "error" not in results[1]
    assert [line.partition(":")[0] for line in messages] == [
        "skipped two/a-cut.png",
        "skipped two/d.jpg",
        "2 of 3 images are marked as synthetic, 2 could not be read",
    ]
    assert main(["detect", "two/b.png", "two", "none.png"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("two/b.png: synthetic") == 2
    assert "two/sub/g.gif: synthetic\n  metadata: trainedAlgorithmicMedia, vultus" in shown.out
    assert "skipped none.png: cannot be read (No such file or directory)" in shown.err
    assert "3 of 4 images are marked as synthetic, 3 could not be read" in shown.err


def test_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "empty").mkdir()
    assert main(["detect", "two/c.bmp"]) == 0
    assert main(["detect", "two/c.bmp", "two/sub"]) == 0
    capsys.readouterr()
    for words, message in {
        ("empty",): "empty: no images in this folder (looked for .png, .jpg",
        ("two/d.jpg",): "two/d.jpg: empty file",
        ("two/d.jpg", "two/a-cut.png"): "two/d.jpg: empty file; give another image (and 1 more)",
        ("none.png",): "none.png: cannot be read",
    }.items():
        assert main(["detect", *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith(f"vultus: error: {message}")
    code, results, _ = detect(capsys, "two/d.jpg")
    assert (code, results[0]["synthetic"]) == (2, None)
    with pytest.raises(SystemExit):
        main(["detect", "--help"])
    assert "exit code: 0 if every image could be read" in " ".join(capsys.readouterr().out.split())


def test_what_vultus_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "default", "--between", "random:1", "random:2", "--steps", "3", "--out", str(tmp_path),
                 "--device", "cpu"]) == 0  # fmt: skip
    capsys.readouterr()
    code, results, _ = detect(capsys, str(tmp_path))
    assert code == 0
    assert [Path(one["file"]).name for one in results] == ["between.gif", "between.png"]
    for one in results:
        assert one["synthetic"]
        assert one["watermark"]["found"]
        assert one["metadata"]["seed"] == 0
        assert one["metadata"]["tool"] == f"vultus {vultus.__version__}"
    assert vultus.detect(tmp_path / "between.gif") == results[0]


@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_every_format(face: Image.Image, kind: Any, tmp_path: Path) -> None:
    if kind == "AVIF":
        from PIL import features

        if not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
    data = encode_marked(face, kind, ORIGIN)
    assert encode_marked(face, kind, ORIGIN) == data
    marks = read_marks(data)
    assert (marks.synthetic, marks.model, marks.seed) == (True, "abc", 7)
    assert "a test" in (marks.description or "")
    path = tmp_path / f"face.{kind.lower()}"
    path.write_bytes(data)
    found = vultus.detect(path)
    assert found["watermark"]["found"]
    assert found["metadata"]["model"] == "abc"
    with Image.open(path) as image:
        # Readers that do not know XMP find the description in the comment.
        difference = np.asarray(image.convert("RGB")).astype(int) - np.asarray(face)
        assert np.abs(difference).mean() < 6
    assert read_credentials(data, kind) is None


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n", b"II*\0" + bytes(50)])
def test_marks_of_what_is_no_image(data: bytes, tmp_path: Path) -> None:
    assert not read_marks(data).synthetic
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError) as caught:
        vultus.detect(tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_has_no_end_is_not_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("two/pipe.png")
    code, results, _ = detect(capsys, "two", "/dev/zero")
    assert code == 1
    errors = {one["file"]: one.get("error", "") for one in results}
    assert "not a regular file" in errors["two/pipe.png"]
    assert "not a regular file" in errors["/dev/zero"]

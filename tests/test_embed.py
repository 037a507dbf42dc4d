"""`vultus embed`: photos to files of embeddings, which are read again wherever embeddings are read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vultus
from vultus.cli.main import main
from vultus.errors import UserError
from vultus.images import align as faces
from vultus.models.facenet import FaceNet
from vultus.sampling.embedding_files import open_embeddings
from vultus.sampling.photo_embeddings import embed_photos

FORMATS = ("npy", "npz", "parquet", "csv", "json")


class TinyEncoder(torch.nn.Module):
    """A fixed random projection of a 16x16 crop."""

    id, dim, crop, size, weights_sha256, dtype = "tiny", 8, 0.8, 16, "0" * 64, torch.float32

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3 * 16 * 16, self.dim, generator=generator))

    def embed_crop(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.flatten(1) @ self.weight, dim=1)


TINY: Any = TinyEncoder()


def encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Ann/0.png, Ann/1.png, a damaged photo, and a name with quotes and a comma."""
    for name, data in {"Ann/0.png": encoded(0), "Ann/1.png": encoded(1), "cut.png": encoded(2)[:200]}.items():
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "album" / 'z "3", ü.png').write_bytes(encoded(3))
    return tmp_path / "album"


def rows(source: str | Path, encoder: str = "tiny", dim: int = 8) -> torch.Tensor:
    opened = open_embeddings(source, dim, {"id": encoder, "dim": dim})
    opened.check()
    return torch.cat(list(opened.chunks()))


def test_every_format_holds_the_rows_their_names_and_the_encoder(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["Ann/0.png", "Ann/1.png", 'z "3", ü.png']
    for suffix in FORMATS:
        result = embed_photos(album, tmp_path / f"c.{suffix}", encoder=TINY, align=False)
        assert (result.keys, result.photos, result.faces_found) == (keys, 4, [None] * 3)
        assert [key for key, _ in result.skipped] == ["cut.png"]
        assert "skipped cut.png: damaged" in capsys.readouterr().err
        torch.testing.assert_close(rows(tmp_path / f"c.{suffix}"), torch.from_numpy(result.embeddings))
        assert capsys.readouterr().err == "", "no note about the choice of an array, or about norms"
        if suffix in ("npz", "parquet", "json"):
            with pytest.raises(
                UserError,
                match=rf"c\.{suffix}: holds embeddings of tiny \(8 numbers\) instead of other \(9 numbers\), ",
            ):
                rows(tmp_path / f"c.{suffix}", "other", 9)
        if suffix == "npy":  # the file beside it, before that of the format .json replaces it
            beside = json.loads((tmp_path / "c.json").read_text())
            assert [face["key"] for face in beside["faces"]] == keys
            assert "embedding" not in beside["faces"][0]
            with pytest.raises(UserError, match=r"c\.json: holds no embedding"):
                rows(tmp_path / "c.json")
            (tmp_path / "c.json").unlink()
    header = json.loads((tmp_path / "c.json").read_text())["vultus"]
    assert header["encoder"] == {"id": "tiny", "dim": 8, "weights_sha256": "0" * 64, "dtype": "float32"}
    assert header["skipped"][0]["key"] == "cut.png"
    with np.load(tmp_path / "c.npz") as arrays:
        assert arrays["keys"].tolist() == keys
        assert json.loads(str(arrays["vultus"])) == header
    table = pq.read_table(tmp_path / "c.parquet")
    assert table["key"].to_pylist() == keys
    assert json.loads(table.schema.metadata[b"vultus"]) == header
    with open(tmp_path / "c.csv", encoding="utf-8", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == keys


def test_photos_of_several_sources(album: Path, tmp_path: Path) -> None:
    images = [{"bytes": encoded(4), "path": "four.png"}, {"bytes": encoded(0), "path": None}]
    pq.write_table(pa.table({"photo": images}), tmp_path / "table.parquet")
    table, loose = str(tmp_path / "table.parquet"), str(album / "Ann" / "0.png")
    result = embed_photos([album / "Ann", loose, loose], tmp_path / "a.npz", encoder=TINY, align=False)
    assert result.keys == [f"{album}/Ann/0.png", f"{album}/Ann/1.png", f"{loose}#1", f"{loose}#2"]
    result = embed_photos(table, tmp_path / "b.npz", encoder=TINY, align=False, image_column="photo")
    assert result.keys == ["four.png", "train/0000001"]
    assert torch.equal(rows(tmp_path / "b.npz")[1], rows(tmp_path / "a.npz")[0])
    assert embed_photos(album, tmp_path / "c.npz", encoder=TINY, align=False, limit=1).photos == 1


def test_what_is_refused(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each before a photo is read, in one line; no file is replaced or written."""
    monkeypatch.chdir(tmp_path)
    Path("old.npz").write_text("mine")
    Path("old.json").write_text("mine")
    Path("old.parquet").write_text("mine")
    Path("link.json").symlink_to(album / "cut.png")
    for arguments, message in {
        "album --out c.txt": "c.txt: cannot write embeddings to .txt; use .npy, .npz",
        "album --out old.npz": "old.npz: exists; choose another --out, or replace it with --overwrite",
        "album --out old.npy": "old.json: exists; choose",
        "album --out album/c.npz": "all photos in album are read",
        "album/cut.png --out link.json --overwrite": "is read by this command",
        "o*.parquet --out old.parquet --overwrite": "is read by this command",
        "none.jpg --out c.npz": "none.jpg: no such file or folder",
        "album --out c.npz --face both": "--face must be one of largest, central, all, not both",
        "album --out c.npz --split train": "leave --split out",
        "album/Ann/0.png --out c.npz --split train": "a photo has no splits or columns",
    }.items():
        assert main(["embed", *arguments.split(), "--align", "false"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(UserError, match=r"^album/cut\.png: damaged .*; no photo could be used"):
        embed_photos("album/cut.png", "c.npz", encoder=TINY, align=False)
    embed_photos("album", "old.npz", encoder=TINY, align=False, overwrite=True)
    assert len(rows("old.npz")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "album",
        "link.json",
        "old.json",
        "old.npz",
        "old.parquet",
    ]


@pytest.mark.skipif(not faces.available(), reason="the extra `align` is not installed")
def test_which_face_of_several(
    shared: Path, facenet: FaceNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three real faces in one photo: the largest on the left, one in the middle."""
    table = pq.read_table(shared / "celeba" / "test-00000-of-00002.parquet").slice(0, 3)
    group = Image.new("RGB", (900, 400), "grey")
    for image, (left, side) in zip(table["image"].to_pylist(), ((20, 240), (370, 160), (650, 160)), strict=True):
        group.paste(Image.open(io.BytesIO(image["bytes"])).resize((side, side)), (left, 80))
    group.save(tmp_path / "group.png")
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "grey.png")
    photos = [tmp_path / "group.png", tmp_path / "grey.png"]
    found = {
        which: embed_photos(photos, tmp_path / f"{which}.json", face=which, encoder=facenet)
        for which in ("central", "all")
    }
    every = found["all"]
    assert every.keys == [f"{photos[0]}{end}" for end in ("", "#1", "#2")]
    assert (every.faces_found, every.skipped) == ([3] * 3, [(str(photos[1]), "no face found")])
    boxes = np.array(every.boxes)
    assert 20 < boxes[0, 0] < boxes[0, 2] < 260, "the largest comes first"
    (central,) = found["central"].boxes
    assert central is not None
    assert central in every.boxes
    assert 370 < central[0] < central[2] < 530
    cosines = every.embeddings @ every.embeddings.T
    assert float((cosines - np.eye(3)).max()) < 0.5
    assert np.array_equal(vultus.embed(photos[0], device="cpu")[0], every.embeddings[0])
    central_rows = torch.from_numpy(found["central"].embeddings)
    torch.testing.assert_close(rows(tmp_path / "central.json", facenet.id, 512), central_rows)
    command = ["generate", "default", "--embeddings", str(tmp_path / "all.json"), "--out", str(tmp_path / "faces")]
    assert main(command) == 0
    assert len(list((tmp_path / "faces").glob("*.png"))) == 3
    capsys.readouterr()

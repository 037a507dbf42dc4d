"""From photos to a prepared data set: content, splits, unusable photos, resuming after kill -9 or a full disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from forked import Forks
from test_sources import write_parquet
from vultus._files import folder_lock
from vultus.data import prepare as module
from vultus.data.crops import in_test
from vultus.data.items import Item
from vultus.data.prepare import prepare
from vultus.errors import UserError
from vultus.images.io import centre_crop, crop_x, decode_image, from_pil, to_x
from vultus.models.facenet import FaceNet

SRC = Path(module.__file__).resolve().parents[2]


class TinyEncoder:
    """A small encoder: a fixed random projection of a 16x16 crop."""

    id = "tiny"
    dim = 8
    crop = 0.8
    size = 16
    weights_sha256 = "0" * 64
    dtype = torch.float32

    def __init__(self) -> None:
        self.weight = torch.randn(3 * 16 * 16, self.dim, generator=torch.Generator().manual_seed(0))
        self.batches: list[int] = []

    def embed(self, x: Tensor, size: int | None = None) -> Tensor:
        return self.embed_crop(crop_x(x, size or self.size, self.crop))

    def embed_crop(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 16, 16)
        assert torch.is_inference_mode_enabled()
        self.batches.append(len(x))
        return F.normalize(x.flatten(1) @ self.weight)


def random_image(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    random_image(number).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_photos(root: Path, people: int, photos: int) -> None:
    for person in range(people):
        folder = root / f"person {person:02d}"
        folder.mkdir(parents=True)
        for photo in range(photos):
            (folder / f"{photo}.jpg").write_bytes(jpeg(100 * person + photo))


def rows(out: Path) -> list[dict[str, Any]]:
    manifest = json.loads((out / "manifest.json").read_text())
    read: list[dict[str, Any]] = []
    for shard in manifest["shards"]:
        table = pa.ipc.open_file(out / shard["file"]).read_all()
        assert table.num_rows == shard["rows"]
        assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
        read += table.to_pylist()
    return read


def content(out: Path) -> dict[str, bytes]:
    """Every file but the lock, which filelock may remove."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def skipped(out: Path) -> dict[str, str]:
    lines = (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", people=12, photos=3)
    return tmp_path / "photos"


# --- content ---------------------------------------------------------------------------------------------------------


def test_rows_manifest_and_order(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    encoder = TinyEncoder()
    manifest = prepare(
        str(photos), out, resolution=24, test_fraction=0.3, licence="mine", batch=4, encoder=encoder, shard_items=10
    )
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert sorted(content(out)) == [
        "manifest.json",
        *(f"shard-0000{k}.arrow" for k in range(4)),
        "shards.jsonl",
        "skipped.jsonl",
    ]
    found = rows(out)
    assert [row["key"] for row in found] == [f"person {i:02d}/{j}.jpg" for i in range(12) for j in range(3)]
    assert [shard["rows"] for shard in manifest["shards"]] == [10, 10, 10, 6]
    assert sorted(encoder.batches) == sorted([4, 4, 2] * 3 + [4, 2])
    for row in found:
        assert row["identity"] == row["key"].split("/")[0]
        assert row["split"] == ("test" if in_test(row["identity"], 0.3) else "train")
        photo = decode_image((photos / row["key"]).read_bytes())
        crop = Image.open(io.BytesIO(row["image"]))
        assert (crop.format, crop.mode, crop.size) == ("JPEG", "RGB", (24, 24))
        assert crop.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # no chroma subsampling
        assert np.abs(np.asarray(crop).astype(int) - np.asarray(centre_crop(photo, 24))).mean() < 3
        with torch.inference_mode():
            expected = encoder.embed_crop(to_x(from_pil([centre_crop(photo, 16, 0.8)])))[0]
        assert torch.allclose(torch.tensor(row["embedding"]), expected, atol=1e-6)
    people = {split: {row["identity"] for row in found if row["split"] == split} for split in ("train", "test")}
    images = {split: sum(row["split"] == split for row in found) for split in ("train", "test")}
    assert people["test"]
    assert not people["train"] & people["test"]
    assert manifest["counts"] == {
        "images": 36,
        "skipped": 0,
        "splits": {split: {"images": images[split], "people": len(people[split])} for split in ("train", "test")},
    }
    assert {name: manifest[name] for name in ("schema", "source", "licence", "resolution", "crop", "encoder")} == {
        "schema": 1,
        "source": str(photos),
        "licence": "mine",
        "resolution": 24,
        "crop": {"kind": "centre", "encoder_fraction": 0.8},
        "encoder": {"id": "tiny", "dim": 8, "weights_sha256": "0" * 64, "dtype": "float32"},
    }
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "36 images of 12 people" in captured.err
    assert "images/s" in captured.err


def test_shards_can_be_mapped_into_memory(photos: Path, tmp_path: Path) -> None:
    prepare(str(photos), tmp_path / "out", encoder=TinyEncoder())
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(tmp_path / "out" / "shard-00000.arrow")) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
        assert pa.total_allocated_bytes() == before  # compressed columns would need memory
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 8)
        assert [str(table.schema.field(name).type) for name in ("image", "identity", "key", "split")] == [
            "binary",
            "string",
            "string",
            "string",
        ]
        del table


def test_split_depends_on_the_name_alone() -> None:
    names = [str(number) for number in range(20_000)]
    test = [name for name in names if in_test(name, 0.1)]
    assert abs(len(test) / len(names) - 0.1) < 0.01
    assert set(test) < {name for name in names if in_test(name, 0.2)}
    assert not any(in_test(name, 0.0) for name in names)
    assert test[:4] == ["9", "39", "49", "51"]  # the same in every version of vultus


def test_embedding_does_not_depend_on_the_resolution(photos: Path, tmp_path: Path) -> None:
    for resolution in (16, 64):
        prepare(str(photos), tmp_path / str(resolution), resolution=resolution, encoder=TinyEncoder())
    small, large = rows(tmp_path / "16"), rows(tmp_path / "64")
    assert [row["embedding"] for row in small] == [row["embedding"] for row in large]
    assert Image.open(io.BytesIO(large[0]["image"])).size == (64, 64)


# --- unusable photos -------------------------------------------------------------------------------------------------


def test_unusable_photos_are_skipped_with_their_reason(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "person 03" / "text.jpg").write_text("not an image")
    (photos / "person 03" / "cut.jpg").write_bytes(jpeg(1)[:600])
    (photos / "person 04" / "empty.png").touch()
    (photos / "person 05" / "notes.txt").write_text("not read")
    (photos / "person 06" / "tiny.jpg").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(photos / "person 06" / "tiny.jpg")
    out = tmp_path / "out"
    manifest = prepare(str(photos), out, batch=4, encoder=TinyEncoder(), shard_items=8)
    reasons = skipped(out)
    assert sorted(reasons) == [
        f"person {name}" for name in ("03/cut.jpg", "03/text.jpg", "04/empty.png", "06/tiny.jpg")
    ]
    assert reasons["person 03/text.jpg"].startswith("not a JPEG, PNG or WebP ")
    assert reasons["person 03/cut.jpg"].startswith("damaged ")
    assert reasons["person 04/empty.png"] == "empty file"
    assert reasons["person 06/tiny.jpg"].startswith("too small: 8x8")
    assert manifest["counts"]["images"] == len(rows(out)) == 36
    assert manifest["counts"]["skipped"] == 4
    errors = capsys.readouterr().err
    assert "4 skipped" in errors
    assert "skipped person 03/cut.jpg: damaged " in errors
    assert str(out / "skipped.jsonl") in errors


def test_unreadable_photo_is_skipped(photos: Path, tmp_path: Path) -> None:
    gone = photos / "person 02" / "1.jpg"
    real = Item.read

    def read(item: Item) -> bytes:
        if item.key.endswith("02/1.jpg"):
            gone.unlink(missing_ok=True)  # while the folder is being read
        return real(item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Item, "read", read)
        prepare(str(photos), tmp_path / "out", encoder=TinyEncoder())
    assert skipped(tmp_path / "out") == {"person 02/1.jpg": "can't be read (No such file or directory)"}


def test_a_shard_without_a_usable_photo_has_no_file(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number:02d}.jpg").write_bytes(b"bad" if 4 <= number < 8 else jpeg(number))
    manifest = prepare(str(tmp_path / "photos"), tmp_path / "out", encoder=TinyEncoder(), shard_items=4)
    assert [shard["file"] for shard in manifest["shards"]] == ["shard-00000.arrow", "shard-00002.arrow"]
    assert len(rows(tmp_path / "out")) == 8


def test_no_usable_photo_and_then_one(tmp_path: Path) -> None:
    root, out = tmp_path / "photos", tmp_path / "out"
    root.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (root / name).write_text("not an image")
    with pytest.raises(UserError, match=r"none of 2 photos can be used .*a\.jpg: not a JPEG.*skipped\.jsonl") as caught:
        prepare(str(root), out, encoder=TinyEncoder())
    assert "\n" not in str(caught.value)
    assert sorted(skipped(out)) == ["a.jpg", "b.jpg"]
    (root / "a.jpg").write_bytes(jpeg(0))
    assert prepare(str(root), out, encoder=TinyEncoder())["counts"]["images"] == 1
    assert sorted(skipped(out)) == ["b.jpg"]


def test_nothing_to_read_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="no photos in this folder"):
        prepare(str(tmp_path / "photos"), tmp_path / "out", encoder=TinyEncoder())
    assert content(tmp_path / "out") == {}


# --- Parquet splits --------------------------------------------------------------------------------------------------


def test_splits_of_the_source_are_kept(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "train-0.parquet", [1, 1, 2, 3])
    write_parquet(tmp_path / "in" / "valid-0.parquet", [4], first=4)
    write_parquet(tmp_path / "in" / "test-0.parquet", [5, 6], first=5)
    prepare(str(tmp_path / "in"), tmp_path / "out", test_fraction=0.9, encoder=TinyEncoder())
    found = {row["key"]: (row["identity"], row["split"]) for row in rows(tmp_path / "out")}
    train = {f"{number:06d}.png": (person, "train") for number, person in enumerate("1123")}
    assert found == {**train, "000004.png": ("4", "test"), "000005.png": ("5", "test"), "000006.png": ("6", "test")}


def test_identity_in_both_splits_stays_in_test(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "train-0.parquet", [1, 2, 2, 3])
    write_parquet(tmp_path / "in" / "test-0.parquet", [2, 4], first=4)
    manifest = prepare(str(tmp_path / "in"), tmp_path / "out", encoder=TinyEncoder(), shard_items=1)
    assert skipped(tmp_path / "out") == dict.fromkeys(["000001.png", "000002.png"], "this person is in the test split")
    assert manifest["counts"]["splits"] == {"train": {"images": 2, "people": 2}, "test": {"images": 2, "people": 2}}


def test_a_source_with_one_split_is_divided_by_identity(tmp_path: Path) -> None:
    people = [number // 2 for number in range(60)]
    write_parquet(tmp_path / "in" / "train-0.parquet", people)
    prepare(str(tmp_path / "in"), tmp_path / "out", test_fraction=0.5, encoder=TinyEncoder())
    found = rows(tmp_path / "out")
    assert {row["split"] for row in found} == {"train", "test"}
    assert all(row["split"] == ("test" if in_test(row["identity"], 0.5) else "train") for row in found)


def test_limit(tmp_path: Path, photos: Path) -> None:
    write_parquet(tmp_path / "in" / "train-0.parquet", [1] * 30)
    write_parquet(tmp_path / "in" / "test-0.parquet", [2] * 30, first=30)
    counts = prepare(str(tmp_path / "in"), tmp_path / "a", limit=20, encoder=TinyEncoder(), shard_items=7)["counts"]
    assert {name: split["images"] for name, split in counts["splits"].items()} == {"train": 18, "test": 2}
    prepare(str(photos), tmp_path / "b", limit=5, encoder=TinyEncoder(), shard_items=2)
    assert [row["key"][-8:] for row in rows(tmp_path / "b")] == [
        "00/0.jpg",
        "00/1.jpg",
        "00/2.jpg",
        "01/0.jpg",
        "01/1.jpg",
    ]


# --- options and the same command again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 8}, "--resolution 8: from 16 to 1024"),
        ({"resolution": 0}, "--resolution 0: from 16 to 1024"),
        ({"resolution": -1}, "--resolution -1: from 16 to 1024"),
        ({"resolution": 100_000}, "--resolution 100000: from 16 to 1024"),
        ({"test_fraction": float("nan")}, "--test_fraction nan"),
        ({"test_fraction": 1.0}, "--test_fraction 1.0"),
        ({"limit": 0}, "--limit 0"),
        ({"batch": 0}, "batch 0"),
        ({"dtype": "float16"}, "--dtype 'float16': one of auto"),
        ({"device": "cuda:77"}, "--device 'cuda:77'"),
        ({"device": "gpu"}, "--device 'gpu'"),
    ],
)
def test_options_out_of_range(photos: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare(str(photos), tmp_path / "out", encoder=TinyEncoder(), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        prepare(str(photos), tmp_path / "out", encoder=TinyEncoder())


def test_complete_folder_is_not_changed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    manifest = prepare(str(photos), out, encoder=TinyEncoder())
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    capsys.readouterr()
    encoder = TinyEncoder()
    assert prepare(str(photos), out, encoder=encoder) == manifest
    assert not encoder.batches
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == before
    assert "already complete, 36 images of 12 people" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"was begun with --resolution 128, now it is 64"):
        prepare(str(photos), out, resolution=64, encoder=TinyEncoder())


def test_shards_of_unknown_origin_are_not_overwritten(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(photos), out, encoder=TinyEncoder())
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds shards but neither"):
        prepare(str(photos), out, encoder=TinyEncoder())


def test_one_process_per_folder(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock(out, "prepare"), pytest.raises(UserError, match="another process is at work in this folder"):
        prepare(str(photos), out, encoder=TinyEncoder())
    prepare(str(photos), out, encoder=TinyEncoder())


class Broken(TinyEncoder):
    """Fails in the batch of a given number, as a lost GPU would."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def embed_crop(self, x: Tensor) -> Tensor:
        if len(self.batches) == self.at:
            raise RuntimeError("lost")
        return super().embed_crop(x)


def begin(photos: Path, out: Path, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="lost"):
        prepare(str(photos), out, batch=4, encoder=Broken(7), shard_items=12, **options)
    assert sorted(path.name for path in (out / "progress").iterdir()) == [
        "begun.json",
        "shard-00000.json",
        "shard-00001.json",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"resolution": 64}, "resolution 128, now it is 64"),
        ({"test_fraction": 0.2}, "test_fraction 0.1, now it is 0.2"),
        ({"limit": 20}, "limit null, now it is 20"),
        ({"licence": "mine"}, 'licence null, now it is "mine"'),
        ({"align": True}, "align false, now it is true"),
        ({"dtype": "float32"}, 'dtype "auto", now it is "float32"'),
    ],
)
def test_other_options_are_refused(photos: Path, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    begin(photos, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match=named):
        prepare(str(photos), tmp_path / "out", batch=4, encoder=TinyEncoder(), shard_items=12, **options)
    assert content(tmp_path / "out") == before


def test_another_encoder_is_refused(photos: Path, tmp_path: Path) -> None:
    begin(photos, tmp_path / "out")
    other = TinyEncoder()
    other.dtype = torch.bfloat16
    with pytest.raises(UserError, match="was begun with another encoder"):
        prepare(str(photos), tmp_path / "out", batch=4, encoder=other, shard_items=12)


def test_changed_parquet_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", [1] * 36)
    begin(tmp_path / "in.parquet", tmp_path / "out")
    write_parquet(tmp_path / "in.parquet", [1] * 37)
    with pytest.raises(UserError, match="have changed since"):
        prepare(str(tmp_path / "in.parquet"), tmp_path / "out", batch=4, encoder=TinyEncoder(), shard_items=12)


@pytest.mark.parametrize("kind", ["shard lost", "shard damaged", "nothing"])
def test_resuming_repeats_only_what_is_not_complete(photos: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    begin(photos, out)
    (out / ".shard-00002.arrow.12345.tmp").write_bytes(b"of a killed process")
    (out / "progress" / ".shard-00002.json.12345.tmp").write_bytes(b"of a killed process")
    if kind == "shard lost":
        (out / "shard-00001.arrow").unlink()
    elif kind == "shard damaged":
        data = bytearray((out / "shard-00001.arrow").read_bytes())
        data[1000] ^= 1
        (out / "shard-00001.arrow").write_bytes(data)
    encoder = TinyEncoder()
    prepare(str(photos), out, batch=4, encoder=encoder, shard_items=12)
    assert len(encoder.batches) == (3 if kind == "nothing" else 6)
    prepare(str(photos), tmp_path / "whole", batch=4, encoder=TinyEncoder(), shard_items=12)
    assert content(out) == content(tmp_path / "whole")


# --- kill -9 ---------------------------------------------------------------------------------------------------------

# Runs `prepare` and kills itself with SIGKILL at a named moment: before the file of that name gets its final name, or
# ("rmtree") when the clean-up after the manifest has started.
CHILD = """
import os, signal, sys
from pathlib import Path
from test_prepare import TinyEncoder, prepare
source, out, moment = sys.argv[1:]
def watch(event, arguments):
    if event == "os.rename" and os.path.basename(arguments[1]) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "os.remove" and moment == "rmtree" and os.path.exists(os.path.join(out, "manifest.json")):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
prepare(source, Path(out), resolution=32, batch=4, encoder=TinyEncoder(), shard_items=10)
"""


def uninterrupted(source: Path, out: Path) -> dict[str, bytes]:
    prepare(str(source), out, resolution=32, batch=4, encoder=TinyEncoder(), shard_items=10)
    return content(out)


@pytest.mark.slow
def test_kill_at_every_step_from_a_folder(photos: Path, tmp_path: Path, forks: Forks) -> None:
    (photos / "person 03" / "text.jpg").write_text("not an image")
    out = tmp_path / "out"
    moments = ["begun.json", "shard-00000.arrow", "shard-00001.json", "skipped.jsonl", "manifest.json", "rmtree"]
    for moment in moments:
        assert forks.run(CHILD, str(photos), str(out), moment).returncode == -signal.SIGKILL, moment
        leftovers = [path.name for path in out.rglob(".*.tmp")]
        assert (out / "manifest.json").exists() == (moment == "rmtree")
        assert [name.split(".", 2)[1] for name in leftovers] == ([] if moment == "rmtree" else [moment.split(".")[0]])
    assert (out / "progress").exists()
    assert prepare(str(photos), out, resolution=32, batch=4, encoder=TinyEncoder(), shard_items=10)
    assert content(out) == uninterrupted(photos, tmp_path / "whole")


@pytest.mark.slow
def test_kill_from_parquet_with_splits(tmp_path: Path, forks: Forks) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_parquet(source / "test-0.parquet", [7, 8, 9] * 5)
    write_parquet(source / "train-0.parquet", list(range(20)), first=15, rows_per_group=8)  # 7, 8, 9 are in both
    write_parquet(source / "train-1.parquet", list(range(20, 33)), first=35, rows_per_group=8)
    for moment in ("shard-00001.json", "shard-00003.arrow"):
        assert forks.run(CHILD, str(source), str(out), moment).returncode == -signal.SIGKILL, moment
    prepare(str(source), out, resolution=32, batch=4, encoder=TinyEncoder(), shard_items=10)
    assert content(out) == uninterrupted(source, tmp_path / "whole")
    assert list(skipped(out).values()) == ["this person is in the test split"] * 3


def test_full_disk_keeps_complete_shards(photos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    options: dict[str, Any] = {"resolution": 64, "batch": 4, "shard_items": 6}
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            prepare(str(photos), disk / "out", encoder=TinyEncoder(), **options)
        assert str(disk / "out") in str(caught.value.filename)
        kept = sorted(path.name for path in (disk / "out").glob("shard-*.arrow"))
        assert kept
        assert not list((disk / "out").rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        encoder = TinyEncoder()
        prepare(str(photos), disk / "out", encoder=encoder, **options)
        assert sum(encoder.batches) == 36 - 6 * len(kept)
        prepare(str(photos), tmp_path / "whole", encoder=TinyEncoder(), **options)
        assert content(disk / "out") == content(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_ends_at_once_and_the_next_run_resumes(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Interrupted(TinyEncoder):
        def embed_crop(self, x: Tensor) -> Tensor:
            if len(self.batches) == 4:
                raise KeyboardInterrupt
            return super().embed_crop(x)

    with pytest.raises(KeyboardInterrupt):
        prepare(str(photos), out, resolution=32, batch=4, encoder=Interrupted(), shard_items=10)
    prepare(str(photos), out, resolution=32, batch=4, encoder=TinyEncoder(), shard_items=10)
    assert content(out) == uninterrupted(photos, tmp_path / "whole")


# --- with the real encoder and real faces ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of each of eight people, as Parquet."""
    table = pyarrow.parquet.read_table(shared / "celeba" / "test-00000-of-00002.parquet")
    chosen: dict[int, list[int]] = {}
    for index, person in enumerate(table["celeb_id"].to_pylist()):
        chosen.setdefault(person, []).append(index)
    indices = [index for own in [own for own in chosen.values() if len(own) >= 4][:8] for index in own[:4]]
    file = tmp_path_factory.mktemp("faces") / "faces.parquet"
    pyarrow.parquet.write_table(table.take(indices), file)
    return file


@pytest.fixture(scope="module")
def prepared(faces: Path, facenet: FaceNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare(str(faces), out, dtype="float32", batch=8, shard_items=16)
    return out


def test_facenet_embeddings_separate_identities(prepared: Path, shared: Path) -> None:
    found = rows(prepared)
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["encoder"]["id"] == "facenet-vggface2"
    assert manifest["encoder"]["weights_sha256"] in (shared / "weights" / "SHA256SUMS").read_text()
    embeddings = torch.tensor([row["embedding"] for row in found])
    assert embeddings.shape == (32, 512)
    assert (embeddings.norm(dim=1) - 1).abs().max() < 1e-5
    people = [row["identity"] for row in found]
    cosine = embeddings @ embeddings.T
    same = torch.tensor([[a == b for b in people] for a in people])
    own = cosine[same & ~torch.eye(32, dtype=torch.bool)].mean()
    others = cosine[~same].mean()
    assert own > 0.55  # 0.69 over many people
    assert others < 0.15  # 0.02 over many people


def test_facenet_embeddings_are_those_of_the_photo(prepared: Path, faces: Path, facenet: FaceNet) -> None:
    photos = [decode_image(image["bytes"]) for image in pyarrow.parquet.read_table(faces)["image"].to_pylist()]
    with torch.inference_mode():
        direct = facenet.embed(to_x(from_pil([centre_crop(photo, 160) for photo in photos[:8]])))
    stored = torch.tensor([row["embedding"] for row in rows(prepared)[:8]])
    # FaceNet.embed resizes bilinearly, the preparation with Lanczos: almost the same embedding.
    assert (direct * stored).sum(1).min() > 0.99


@pytest.mark.slow
def test_facenet_kill_and_resume_gives_the_same_bytes(prepared: Path, faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import sys; from pathlib import Path; from vultus.data.prepare import prepare; "
        "prepare(sys.argv[1], Path(sys.argv[2]), dtype='float32', batch=8, shard_items=16)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    process = subprocess.Popen([sys.executable, "-c", script, str(faces), str(out)], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 200
    while not (out / "progress" / "shard-00000.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait(100) == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    prepare(str(faces), out, dtype="float32", batch=8, shard_items=16)
    assert content(out) == content(prepared)


def test_align(faces: Path, shared: Path, tmp_path: Path) -> None:
    module_faces = pytest.importorskip("vultus.images.align")
    if not module_faces.available():
        pytest.skip("the extra `align` is not installed")
    table = pyarrow.parquet.read_table(faces).slice(0, 6)
    root = tmp_path / "photos"
    root.mkdir()
    for index, image in enumerate(table["image"].to_pylist()):
        (root / f"{index}.webp").write_bytes(image["bytes"])
    random_image(1, (160, 160)).save(root / "no face.jpg")
    manifest = prepare(str(root), tmp_path / "out", align=True, encoder=TinyEncoder())
    assert manifest["crop"]["kind"] == "aligned"
    assert skipped(tmp_path / "out")["no face.jpg"] == "no face found"
    assert manifest["counts"]["images"] >= 4


def test_a_repaired_source_resumes_in_the_same_dtype(
    facenet: FaceNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    write_parquet(source, [1] * 12, rows_per_group=4)
    whole = source.read_bytes()
    start = pyarrow.parquet.read_metadata(source).row_group(2).column(0).dictionary_page_offset
    source.write_bytes(whole[:start] + bytes(300) + whole[start + 300 :])
    with pytest.raises(UserError, match=r"broke off at row \d+ of train"):
        prepare(str(source), out, batch=4, shard_items=4)
    begun = json.loads((out / "progress" / "begun.json").read_text())["encoder"]["dtype"]
    source.write_bytes(whole)
    # "auto" depends on a measurement, which may differ the next time.
    other = torch.float32 if begun == "bfloat16" else torch.bfloat16
    monkeypatch.setattr(module, "fastest_dtype", lambda device: other)
    manifest = prepare(str(source), out, batch=4, shard_items=4)
    assert manifest["encoder"]["dtype"] == begun
    assert manifest["counts"]["images"] == 12

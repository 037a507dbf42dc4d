"""The same preparation again: photos that were added, changed or removed, lost shards; and where it may write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import vultus
from permissions import permissions_hold
from test_prepare import Broken, TinyEncoder, content, jpeg, rows, skipped, write_photos
from test_sources import write_parquet
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.data.prepare import prepare
from vultus.errors import UserError
from vultus.images import io as images
from vultus.models.snapshot import load_snapshot
from vultus.reporting.run_folder import read_run
from vultus.reporting.run_summary import _facts


def run(source: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    return prepare(
        str(source), out, **{"resolution": 32, "batch": 4, "encoder": TinyEncoder(), "shard_items": 10} | options
    )


def people_of(out: Path) -> dict[str, str]:
    return {row["key"]: row["split"] for row in rows(out)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", people=9, photos=3)
    return tmp_path / "photos"


# --- photos that were added, changed or removed ----------------------------------------------------------------------


@pytest.mark.slow
def test_faces_among_the_photos_are_counted_aloud(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are easily written there by another command, and would be read as a person without a word."""
    run(photos, tmp_path / "out")
    assert "synthetic" not in capsys.readouterr().err
    for out in (photos / "made" / "a.png", photos / "made" / "b.jpg", photos / "made" / "c.gif"):
        assert main(["generate", "default", "--random", "1", "--grid", "--out", str(out)]) == 0
    capsys.readouterr()
    assert run(photos, tmp_path / "out")["counts"]["images"] == 30
    assert "note: 3 images marked as synthetic (the first: made/a.png) in the data set" in capsys.readouterr().err


def test_added_photos_become_further_shards(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    before = run(photos, out, test_fraction=0.4)
    shards = {shard["file"]: (out / shard["file"]).read_bytes() for shard in before["shards"]}
    splits = people_of(out)
    (photos / "person 00" / "1b.jpg").write_bytes(jpeg(900))  # before photos that were read
    (photos / "anna").mkdir()
    (photos / "anna" / "1.jpg").write_bytes(jpeg(901))
    (photos / "person 04" / "bad.jpg").write_text("not an image")
    encoder = TinyEncoder()
    capsys.readouterr()
    after = run(photos, out, test_fraction=0.4, encoder=encoder)
    assert sum(encoder.batches) == 2
    assert "added to the data set: 3 photos" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in shards} == shards
    assert [row["key"] for row in rows(out)][27:] == ["anna/1.jpg", "person 00/1b.jpg"]
    assert {key: split for key, split in people_of(out).items() if key in splits} == splits
    assert people_of(out)["person 00/1b.jpg"] == splits["person 00/1.jpg"]
    assert list(skipped(out)) == ["person 04/bad.jpg"]
    assert (after["counts"]["images"], after["counts"]["skipped"]) == (29, 1)
    assert after["content_sha256"] != before["content_sha256"]
    assert after["earlier"] == [{"shards": 3, "counts": before["counts"], "content_sha256": before["content_sha256"]}]
    assert after["listing"]["photos"] == 30
    assert after["listing"]["sha256"] != before["listing"]["sha256"]
    state = content(out)
    encoder = TinyEncoder()
    assert run(photos, out, test_fraction=0.4, encoder=encoder) == after
    assert not encoder.batches
    assert content(out) == state


def test_an_interrupted_extension_leaves_the_data_set_usable_and_resumes(photos: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    before = run(photos, out)
    shutil.copytree(out, whole)
    for number in range(25):
        (photos / "anna").mkdir(exist_ok=True)
        (photos / "anna" / f"{number:02d}.jpg").write_bytes(jpeg(900 + number))
    with pytest.raises(RuntimeError, match="lost"):
        run(photos, out, encoder=Broken(4))
    assert PreparedDataset(out, None).manifest == before
    encoder = TinyEncoder()
    run(photos, out, encoder=encoder)
    assert sum(encoder.batches) == 15
    run(photos, whole)
    assert content(out) == content(whole)
    assert len(PreparedDataset(out, None)) == 52


def test_photos_added_while_it_was_interrupted_are_read(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="lost"):
        run(photos, out, encoder=Broken(4))
    (photos / "anna").mkdir()
    (photos / "anna" / "1.jpg").write_bytes(jpeg(900))  # before those that were read
    assert run(photos, out)["counts"]["images"] == 28


def test_removed_and_changed_photos_are_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    manifest = run(photos, out)
    (photos / "person 03" / "1.jpg").unlink()
    (photos / "person 04" / "2.jpg").write_bytes(jpeg(77) + b" ")
    capsys.readouterr()
    assert run(photos, out) == manifest
    errors = capsys.readouterr().err
    assert "no longer in" in errors
    assert "1 photo (the first: person 03/1.jpg); for a data set without, prepare into another --out" in errors
    assert "1 photo (the first: person 04/2.jpg); to read what is there now, prepare into another --out" in errors


def test_a_skipped_photo_that_was_repaired_is_read(photos: Path, tmp_path: Path) -> None:
    bad = photos / "person 02" / "bad.jpg"
    bad.write_text("not an image")
    assert run(photos, tmp_path / "out")["counts"]["skipped"] == 1
    bad.write_bytes(jpeg(5))
    manifest = run(photos, tmp_path / "out")
    assert (manifest["counts"]["images"], manifest["counts"]["skipped"]) == (28, 0)
    assert skipped(tmp_path / "out") == {}


def test_limit_is_not_exceeded_by_added_photos(photos: Path, tmp_path: Path) -> None:
    manifest = run(photos, tmp_path / "out", limit=20)
    (photos / "anna").mkdir()
    (photos / "anna" / "1.jpg").write_bytes(jpeg(900))
    assert run(photos, tmp_path / "out", limit=20) == manifest
    assert run(photos, tmp_path / "more", limit=30)["counts"]["images"] == 28


def test_a_data_set_of_an_older_version_is_extended(tmp_path: Path) -> None:
    """It kept neither the names of the photos by shard nor their sizes."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, people=4, photos=3)
    (photos / "person 01" / "bad.jpg").write_text("not an image")
    manifest = run(photos, out)
    for key in ("listing", "identities"):
        del manifest[key]
    for key in ("image_column", "id_column"):
        del manifest["options"][key]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "shards.jsonl").unlink()
    state = content(out)
    assert run(photos, out) == manifest
    assert content(out) == state
    (photos / "person 02" / "3.jpg").write_bytes(jpeg(900))
    encoder = TinyEncoder()
    assert run(photos, out, encoder=encoder)["counts"]["images"] == 13
    assert encoder.batches == [1]
    assert run(photos, out)["earlier"][0]["content_sha256"] == manifest["content_sha256"]
    assert list(skipped(out)) == ["person 01/bad.jpg"]


def test_changed_parquet_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "in.parquet", [1, 1, 2, 2])
    manifest = run(tmp_path / "in.parquet", tmp_path / "out")
    manifest = json.loads(json.dumps(manifest))
    write_parquet(tmp_path / "in.parquet", [1, 1, 2, 2, 3])
    capsys.readouterr()
    assert run(tmp_path / "in.parquet", tmp_path / "out") == manifest
    assert "have changed since this data set was prepared" in capsys.readouterr().err


def test_a_source_that_is_gone_does_no_harm(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run(photos, tmp_path / "out")
    photos.rename(tmp_path / "away")
    assert run(photos, tmp_path / "out") == manifest
    assert "can't be compared" in capsys.readouterr().err


def test_another_spelling_of_the_source_is_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = run(photos, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert run("photos", tmp_path / "out") == manifest
    assert run("./photos/", tmp_path / "out") == manifest


@pytest.mark.slow
def test_a_training_goes_on_with_the_photos_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 steps on the data set equal 2, then further photos, then 2 more, bit for bit."""
    photos, data = tmp_path / "photos", tmp_path / "data"
    write_photos(photos, people=9, photos=3)
    options: dict[str, Any] = {"test_fraction": 0.4, "encoder": Embeds512()}
    before = run(photos, data, **options)
    settings = {"optim.batch": 4, "sample_every_nimg": 8, "checkpoint_every_nimg": 8}
    for out, length in (("whole", 16), ("resumed", 8)):
        vultus.train("tiny", data=data, out=tmp_path / out, images=length, settings=settings, device="cpu")
    for number in range(12):
        (photos / "person 00" / f"0{number}.jpg").write_bytes(jpeg(900 + number))
    after = run(photos, data, **options)
    capsys.readouterr()
    vultus.train("tiny", data=data, out=tmp_path / "resumed", images=16, settings=settings, device="cpu")
    assert "has grown from 27 to 39 images since this run began; it goes on with those 27" in capsys.readouterr().err
    whole, resumed = (load_snapshot(tmp_path / out) for out in ("whole", "resumed"))
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert all(torch.equal(whole.population[name], resumed.population[name]) for name in whole.population)
    assert resumed.metadata["data"] == whole.metadata["data"]
    record = json.loads((tmp_path / "resumed" / "config.json").read_text())["data"]
    assert (record["content_sha256"], record["counts"]) == (before["content_sha256"], before["counts"])
    vultus.train("tiny", data=data, out=tmp_path / "new", images=8, settings=settings, device="cpu")
    assert load_snapshot(tmp_path / "new").metadata["data"]["content_sha256"] == after["content_sha256"]


class Embeds512(TinyEncoder):
    dim = 512


# --- lost shards -----------------------------------------------------------------------------------------------------


def flip(path: Path, place: int = 2000) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_lost_shard_is_made_again_alone(
    photos: Path, tmp_path: Path, kind: str, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = photos, tmp_path / "out"
    if kind == "parquet":
        source = tmp_path / "in"
        write_parquet(source / "test-0.parquet", [7, 8, 9] * 4)
        write_parquet(source / "train-0.parquet", list(range(20)), first=12, rows_per_group=8)
    run(source, out)
    state = content(out)
    harm(out / "shard-00001.arrow")
    with pytest.raises(UserError, match=r"shard-00001\.arrow: (damaged|missing).*`vultus prepare` again") as caught:
        PreparedDataset(out)
    assert "\n" not in str(caught.value)
    encoder = TinyEncoder()
    capsys.readouterr()
    run(source, out, encoder=encoder)
    assert "shard-00001.arrow: " in capsys.readouterr().err
    assert sum(encoder.batches) == (10 if kind == "folder" else 2)
    assert content(out) == state
    PreparedDataset(out)


def test_a_lost_shard_whose_photos_are_gone_or_changed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    flip(out / "shard-00001.arrow")
    state = content(out)
    photo = photos / "person 04" / "1.jpg"
    data = photo.read_bytes()
    photo.unlink()
    with pytest.raises(UserError, match=r"1 of its 10 photos are no longer in .*; put them back") as caught:
        run(photos, out)
    assert "\n" not in str(caught.value)
    photo.write_bytes(jpeg(999))
    with pytest.raises(UserError, match=r"made again, but not with the same bytes.* into another --out"):
        run(photos, out)
    assert {name: data for name, data in content(out).items() if "progress" not in name} == state
    photo.write_bytes(data)
    run(photos, out)
    PreparedDataset(out)


def test_a_lost_shard_of_an_older_version_says_what_to_do(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    (out / "shards.jsonl").unlink()
    flip(out / "shard-00001.arrow")
    with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged.* prepare into another --out"):
        run(photos, out)


# --- folders that cannot be read -------------------------------------------------------------------------------------


def test_a_sub_folder_without_permission_is_one_bad_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, people=4, photos=3)
    (photos / "person 02").chmod(0)
    with permissions_hold():
        run(photos, out)
    assert skipped(out) == {"person 02/": "folder can't be read (Permission denied)"}
    errors = capsys.readouterr().err
    assert "9 images of 3 people" in errors
    assert "skipped person 02/: folder can't be read (Permission denied)" in errors
    (photos / "person 02").chmod(0o755)
    with permissions_hold():
        assert run(photos, out)["counts"]["images"] == 12
    assert skipped(out) == {}
    photos.chmod(0)
    with permissions_hold(), pytest.raises(UserError) as caught:
        run(photos, tmp_path / "other")
    photos.chmod(0o755)
    assert str(caught.value) == f"{photos}: can't be read (Permission denied); change its permissions"


def test_folders_without_end_and_links_to_themselves(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    deep = photos / "/".join(["d"] * 110)
    deep.mkdir(parents=True)
    (deep / "1.jpg").write_bytes(jpeg(1))
    (photos / "ada").mkdir()
    (photos / "ada" / "1.jpg").write_bytes(jpeg(2))
    (photos / "loop").symlink_to("loop")
    assert run(photos, tmp_path / "out")["counts"]["images"] == 1
    reasons = skipped(tmp_path / "out")
    assert reasons.pop("loop") == "can't be read (Too many levels of symbolic links)"
    ((key, reason),) = reasons.items()
    assert key.startswith("d/d/d/")
    assert reason.startswith("folder not read: more than 100 folders")


def test_when_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"none of 1 photos can be used .*loop: can't be read"):
        run(tmp_path / "photos", tmp_path / "out")


# --- where it may write ----------------------------------------------------------------------------------------------


def test_out_in_or_around_the_source_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(photos)
    for out, reason in [
        (photos, "is the source"),
        (tmp_path / "link", "is the source"),
        (photos / "person 00" / "..", "is the source"),
        (photos / "data" / "mine", "is inside the source"),
        (photos / "person 00", "is inside the source"),
        (tmp_path, "contains the source"),
    ]:
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        assert main(["prepare", str(photos), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"vultus: error: --out {out}: {reason}"), error
        assert error.count("\n") == 1
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_out_with_other_files_is_refused(photos: Path, tmp_path: Path, tiny_run: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    for name in ("mine", "notes", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "1.txt").write_text("text")
    (tmp_path / "notes" / "progress").mkdir()
    (tmp_path / "notes" / "progress" / "diary.txt").write_text("text")
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a web page"}')
    before = content(tmp_path)
    for name, reason in {
        "run": "holds other files (checkpoint",
        "mine": "holds other files (1.txt)",
        "notes": "holds other files (progress/diary.txt)",
        "other": "its manifest.json is not one of a prepared data set",
    }.items():
        with pytest.raises(UserError) as caught:
            run(photos, tmp_path / name)
        assert str(caught.value).startswith(f"--out {tmp_path / name}: {reason}")
        assert "choose an" in str(caught.value)
    assert content(tmp_path) == before


def test_out_that_is_empty_or_was_begun_is_taken(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").touch()
    run(photos, tmp_path / "out")
    # A data set that an older version wrote into its source is still found.
    shutil.move(tmp_path / "out", photos / "data")
    assert run(photos, photos / "data")["counts"]["images"] == 27


# --- who is on a photo -----------------------------------------------------------------------------------------------


def test_a_source_that_names_nobody_is_said_aloud_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "in.parquet", list(range(40)))
    table = pyarrow.parquet.read_table(tmp_path / "in.parquet")
    pyarrow.parquet.write_table(table.rename_columns(["image", "who"]), tmp_path / "in.parquet")
    options: dict[str, Any] = {"encoder": Embeds512(), "test_fraction": 0.4}
    manifest = run(tmp_path / "in.parquet", tmp_path / "out", **options)
    assert "note: " in (errors := capsys.readouterr().err)
    assert "names no identities, so every image counts as a person of its own, and one person may be in both" in errors
    assert "name the column of the identity with --id-column" in errors
    assert manifest["identities"] == "one per image"
    settings = {"optim.batch": 4, "sample_every_nimg": 8, "checkpoint_every_nimg": 8}
    vultus.train("tiny", data=tmp_path / "out", out=tmp_path / "run", images=8, settings=settings, device="cpu")
    recorded = read_run(tmp_path / "run")
    assert recorded.data["identities"] == "one per image"
    assert ("identities", "one per image") in _facts(recorded)
    other = run(tmp_path / "in.parquet", tmp_path / "other", id_column="who", **options)
    assert other["identities"] == "column who"
    with pytest.raises(UserError, match=r'was begun with --id-column "who", now it is null'):
        run(tmp_path / "in.parquet", tmp_path / "other", **options)
    capsys.readouterr()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.jpg").write_bytes(jpeg(1))
    run(tmp_path / "flat", tmp_path / "third")
    assert "put the photos of each person into a sub-folder" in capsys.readouterr().err


# --- formats that need an extra --------------------------------------------------------------------------------------


def test_heic_is_listed_with_the_remedy_and_read_once_the_extra_is_installed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pillow_heif", reason="the extra `heic` is not installed")
    images._heif_formats()
    images.decode_image(jpeg(0)).save(photos / "person 02" / "phone.HEIC", "HEIF")
    (photos / "person 03" / "raw.cr2").write_bytes(b"raw")
    (photos / "person 03" / "notes.txt").write_text("text")
    with monkeypatch.context() as patch:
        patch.setattr(images, "_heif_formats", lambda: ())
        manifest = run(photos, tmp_path / "out")
    assert skipped(tmp_path / "out") == {"person 02/phone.HEIC": "a HEIC image; to read it: pip install 'vultus[heic]'"}
    assert manifest["listing"]["other_images"] == {".cr2": 1}
    assert manifest["listing"]["not_images"] == {".txt": 1}
    errors = capsys.readouterr().err
    assert "1 file (.cr2 1) not read: image formats to convert to JPEG or PNG" in errors
    assert "1 file (.txt 1) not read: not images" in errors
    manifest = run(photos, tmp_path / "out")
    assert (manifest["counts"]["images"], manifest["counts"]["skipped"]) == (28, 0)
    assert rows(tmp_path / "out")[-1]["key"] == "person 02/phone.HEIC"

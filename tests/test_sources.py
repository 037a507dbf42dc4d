"""Folders, Parquet and the hub: what is read, in which order, and resuming from any position."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from forked import Forks
from stand_in_hub import SHA, Hub
from vultus.data import items as sources
from vultus.data.items import ONE_PER_IMAGE, Item, Part, Source
from vultus.data.sources import open_source
from vultus.data.tables import split_name, split_of
from vultus.errors import UserError
from vultus.images.io import BadImage


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (shade % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path, people: list[int | None], *, first: int = 0, rows_per_group: int = 4, paths: bool = True, **more: list
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + len(people))
    images = [{"bytes": png(number), "path": f"{number:06d}.png" if paths else None} for number in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "celeb_id": pa.array(people, pa.int64()), **more})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)


def every(part: Part) -> list[Item]:
    return list(part.items(None))


def assert_resumes_from_everywhere(part: Part) -> None:
    """Reading to any item and resuming from its position, as JSON, yields exactly the rest."""
    keys = [item.key for item in every(part)]
    for stop in range(1, len(keys) + 1):
        items = part.items(None)
        for _ in range(stop):
            next(items)
        position = json.loads(json.dumps(part.position()))
        items.close()
        assert [item.key for item in part.items(position)] == keys[stop:], stop


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    names = ["bea/2.png", "bea/10.PNG", "ada/b/x.jpg", "ada/a.webp", "ada/b.jpeg", "cy.png", "ada-2/1.jpg", "öl/ü.png"]
    for name in [*names, "bea/notes.txt", ".hidden/1.png", "bea/.thumb.png", "empty/readme.md"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(0))
    return root


def test_folder_in_order_of_paths_with_the_top_folder_as_identity(folder: Path) -> None:
    source = open_source(str(folder))
    (part,) = source.parts
    assert part.split is None
    assert not source.has_splits
    assert [(item.key, item.identity) for item in every(part)] == [
        ("ada/a.webp", "ada"),
        ("ada/b/x.jpg", "ada"),
        ("ada/b.jpeg", "ada"),
        ("ada-2/1.jpg", "ada-2"),
        ("bea/10.PNG", "bea"),
        ("bea/2.png", "bea"),
        ("cy.png", "cy.png"),
        ("öl/ü.png", "öl"),
    ]
    assert part.total == 8


def test_flat_folder_has_one_identity_per_photo(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        (tmp_path / name).write_bytes(png(0))
    (part,) = open_source(str(tmp_path)).parts
    assert [(item.key, item.identity) for item in every(part)] == [("a.jpg", "a.jpg"), ("b.png", "b.png")]


def test_folder_resumes_from_everywhere(folder: Path) -> None:
    assert_resumes_from_everywhere(open_source(str(folder)).parts[0])


def test_links(folder: Path) -> None:
    (folder / "bea" / "up").symlink_to(folder)  # a cycle
    (folder / "bea" / "self.png").symlink_to("self.png")
    (folder / "bea" / "gone.png").symlink_to("nothing")
    (folder / "dora").symlink_to(folder / "bea")  # the photos of an identity in another folder
    keys = [item.key for item in every(open_source(str(folder)).parts[0])]
    problems = {item.key: item.problem for item in every(open_source(str(folder)).parts[0]) if item.problem}
    assert [key for key in keys if key.startswith("dora/") and key not in problems] == ["dora/10.PNG", "dora/2.png"]
    assert len(keys) == 10 + 2 * 2
    assert {key: problem for key, problem in problems.items() if key.startswith("bea/")} == {
        "bea/gone.png": "a link to nothing",
        "bea/self.png": "can't be read (Too many levels of symbolic links)",
    }


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/a\xff.png", "wb") as file:
            file.write(png(3))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "b.png").write_bytes(png(4))
    (part,) = open_source(str(tmp_path)).parts
    items = every(part)
    assert [item.key for item in items] == ["a\\xff.png", "b.png"]
    assert items[0].read() == png(3)
    assert_resumes_from_everywhere(part)


def test_file_that_is_much_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(sources.MAX_FILE_BYTES + 1)
    (item,) = every(open_source(str(tmp_path)).parts[0])
    with pytest.raises(BadImage, match="file too large: 200 MB"):
        item.read()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such file or folder"),
        ("/nothing/here", "no such file or folder"),
        ("../nothing", "no such file or folder"),
        ("nothing/*.parquet", "no Parquet file matches"),
        ("text.txt", "not a folder of photos, a Parquet file or"),
        ("empty", "no photos in this folder"),
    ],
)
def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "text.txt").write_text("text")
    with pytest.raises(UserError, match=message) as caught:
        open_source(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_has_no_splits(folder: Path) -> None:
    with pytest.raises(UserError, match="has no splits"):
        open_source(str(folder), "train")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_test_comes_first_and_names_give_the_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [1, 1, 2])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [3], first=3)
    write_parquet(tmp_path / "valid-00000-of-00001.parquet", [5], first=4)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [4, None], first=5)
    source = open_source(str(tmp_path))
    assert source.has_splits
    assert [(part.split, part.total) for part in source.parts] == [("test", 2), ("test", 1), ("train", 4)]
    assert [[(item.key, item.identity) for item in every(part)] for part in source.parts] == [
        [("000005.png", "4"), ("000006.png", "000006.png")],
        [("000004.png", "5")],
        [("000000.png", "1"), ("000001.png", "1"), ("000002.png", "2"), ("000003.png", "3")],
    ]
    assert every(source.parts[2])[3].read() == png(3)


def test_parquet_resumes_from_everywhere(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", list(range(11)), rows_per_group=4)
    write_parquet(tmp_path / "train-1.parquet", list(range(5)), first=11, rows_per_group=2)
    assert_resumes_from_everywhere(open_source(str(tmp_path)).parts[0])


def test_one_split_alone_is_divided_anew(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [1, 2])
    write_parquet(tmp_path / "test-0.parquet", [3], first=2)
    source = open_source(str(tmp_path), "train")
    assert [part.total for part in source.parts] == [2]
    assert not source.has_splits
    with pytest.raises(UserError, match=r"has no split 'dev'; it has test, train"):
        open_source(str(tmp_path), "dev")


def test_single_file_glob_and_folder_of_folders(tmp_path: Path) -> None:
    write_parquet(tmp_path / "copy [1]" / "data" / "faces.parquet", [1, 2])
    write_parquet(tmp_path / "copy [1]" / "data" / "more.parquet", [3], first=2)
    root = tmp_path / "copy [1]"
    pattern = f"{tmp_path}/copy*/data/m*.parquet"
    for name, count in ((str(root / "data" / "faces.parquet"), 2), (str(root), 3), (pattern, 1)):
        (part,) = open_source(name).parts
        assert (part.split, part.total, len(every(part))) == ("train", count, count)


def test_missing_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [7, 8], paths=False, Smiling=[True, False])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").drop_columns(["celeb_id"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (part,) = open_source(str(tmp_path / "a.parquet")).parts
    keys = ["train/0000000", "train/0000001"]
    assert [(item.key, item.identity) for item in every(part)] == list(zip(keys, keys, strict=True))
    pyarrow.parquet.write_table(table.drop_columns(["image"]), tmp_path / "b.parquet")
    with pytest.raises(
        UserError, match=r"b\.parquet: column 'image': no such column; it has Smiling \(bool\); .*--image-col"
    ):
        open_source(str(tmp_path))


def write_table(path: Path, **columns: pa.Array) -> Path:
    images = pa.array([png(number) for number in range(4)], pa.binary())
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table({"image": images} | columns), path)
    return path


def identities(source: Source) -> list[str]:
    return [item.identity for part in source.parts for item in every(part)]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"label": pa.array([1, 1, 2, 2])}, "label"),
        ({"identity": pa.array(["a", "a", "b", "b"]), "label": pa.array([1, 2, 3, 4])}, "identity"),
        ({"person": pa.array(["a", "a", "b", "b"]).dictionary_encode(), "label": pa.array([1, 2, 3, 4])}, "person"),
        ({"subject_id": pa.array([7, 7, 8, 8])}, "subject_id"),
        ({"celeb_id": pa.array([7, 7, 8, 8]), "identity": pa.array(["a", "b", "c", "d"])}, "celeb_id"),
        ({"identity": pa.array([[1.0], [1.0], [2.0], [2.0]]), "label": pa.array([1, 1, 2, 2])}, "label"),
    ],
)
def test_columns_that_are_taken_for_the_identity(tmp_path: Path, columns: dict[str, pa.Array], chosen: str) -> None:
    source = open_source(str(write_table(tmp_path / "a.parquet", **columns)))
    assert source.identities == f"column {chosen}"
    found = identities(source)
    assert (found[0], found[2]) == (found[1], found[3])
    assert found[0] != found[2]


def test_named_columns(tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(write_table(tmp_path / "a.parquet", who=pa.array(["a", "a", "b", "b"])))
    pyarrow.parquet.write_table(table.rename_columns(["face", "who"]), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), image_column="face", id_column="who")
    assert identities(source) == ["a", "a", "b", "b"]
    assert every(source.parts[0])[1].read() == png(1)
    assert_resumes_from_everywhere(source.parts[0])
    with pytest.raises(
        UserError, match=r"column 'image': no such column; it has face \(binary\), who \(string\); name"
    ):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"id_column": "who"},
            r"--id-column who: no such column; it has image \(binary\), gap \(int64\), list \(list\)",
        ),
        ({"id_column": "gap"}, r"--id-column gap has no value in 2 rows \(the first: row 1\); it has image"),
        ({"id_column": "list"}, r"--id-column list does not hold numbers or text; it has image"),
        ({"id_column": "image"}, r"--id-column image does not hold numbers or text; it has image"),
        ({"image_column": "photo"}, r"--image-column photo: no such column; it has image"),
        ({"image_column": "gap"}, r"--image-column gap does not hold images, which are bytes or .* it has image"),
    ],
)
def test_named_columns_that_cannot_be_used(tmp_path: Path, options: dict[str, str], message: str) -> None:
    columns = {"gap": pa.array([1, None, 2, None]), "list": pa.array([[1], [2], [3], [4]])}
    path = write_table(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(path), **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_rows_without_identity_are_counted(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", celeb_id=pa.array([1.0, 1.0, None, float("nan")]))
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.notes == ("2 rows without celeb_id, each counted as a person of its own",)
    assert identities(source) == ["1.0", "1.0", "train/0000002", "train/0000003"]


def test_identities_that_only_some_files_have(tmp_path: Path) -> None:
    write_table(tmp_path / "test-0.parquet", celeb_id=pa.array([1, 1, 2, 2]))
    write_table(tmp_path / "train-0.parquet", other=pa.array([1, 1, 2, 2]))
    with pytest.raises(
        UserError, match=r"train-0\.parquet: has no column 'celeb_id', by which .*test-0\.parquet names"
    ):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), "test").identities == "column celeb_id"


def test_a_source_that_names_nobody(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", smile=pa.array([True, True, False, False]))
    assert open_source(str(tmp_path / "a.parquet")).identities == ONE_PER_IMAGE
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(png(1))
    assert open_source(str(tmp_path / "flat")).identities == ONE_PER_IMAGE
    (tmp_path / "flat" / "ada").mkdir()
    (tmp_path / "flat" / "ada" / "1.png").write_bytes(png(1))
    assert open_source(str(tmp_path / "flat")).identities == f"sub-folders, and {ONE_PER_IMAGE} outside of them"
    (tmp_path / "flat" / "1.png").unlink()
    assert open_source(str(tmp_path / "flat")).identities == "sub-folders"
    with pytest.raises(UserError, match="a folder of photos has no columns; leave --id-column out"):
        open_source(str(tmp_path / "flat"), id_column="ada")


def test_plain_bytes_and_empty_cells(tmp_path: Path) -> None:
    images = pa.array([png(1), None, png(2)], pa.binary())
    pyarrow.parquet.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    items = every(open_source(str(tmp_path)).parts[0])
    assert [items[0].read(), items[2].read()] == [png(1), png(2)]
    with pytest.raises(BadImage, match="no image in this row"):
        items[1].read()


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not a table PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: can't be read as Parquet") as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_parquet_with_text_that_is_not_utf8(tmp_path: Path) -> None:
    offsets, text = np.array([0, 3, 5], np.int32), b"ann\xff\xfe"
    names = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(text)])
    table = pa.table({"image": [b"1", b"2"], "identity": names})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"broke off at row 0 of train .*codec can't decode"):
        list(open_source(str(tmp_path / "a.parquet")).parts[0].items(None))


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, list(range(40)), rows_per_group=10)
    whole = list(open_source(str(file)).parts[0].items(None))
    start = pyarrow.parquet.read_metadata(file).row_group(2).column(0).dictionary_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + 400] = bytes(400)
    file.write_bytes(bytes(data))
    taken = []
    with pytest.raises(UserError, match=r"broke off at row \d+ of train .* run the same command again") as caught:
        taken.extend(open_source(str(file)).parts[0].items(None))
    assert "\n" not in str(caught.value)
    # pyarrow reads ahead in threads, so the error may come before the first rows; none is lost without notice.
    assert f"broke off at row {len(taken)} of train" in str(caught.value)
    assert [item.key for item in taken] == [item.key for item in whole[: len(taken)]]
    assert len(taken) <= 20


def test_revision_follows_the_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2])
    before = open_source(str(tmp_path)).revision
    assert open_source(str(tmp_path)).revision == before
    write_parquet(tmp_path / "a.parquet", [1, 2, 3])
    assert open_source(str(tmp_path)).revision != before


@pytest.mark.parametrize(
    ("file", "name", "use"),
    [
        ("train-00000-of-00008.parquet", "train", "train"),
        ("test-00000-of-00002.parquet", "test", "test"),
        ("valid-00000-of-00002.parquet", "valid", "test"),
        ("validation.parquet", "validation", "test"),
        ("Test_1.parquet", "test", "test"),
        ("testimonials.parquet", "train", "train"),
        ("faces.parquet", "train", "train"),
    ],
)
def test_split_names(file: str, name: str, use: str) -> None:
    assert split_name(Path(file)) == name
    assert split_of(name) == use


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Address of a stand-in hub that has user/faces."""
    root = tmp_path / "hub"
    write_parquet(root / "data" / "train-00000-of-00001.parquet", [1, 1, 2, 2, 3], rows_per_group=2)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", [4, 5], first=5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("RootedHub", (Hub,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def read_hub(forks: Forks, tmp_path: Path, address: str, *names: str) -> list[dict]:
    """In a separate process, because huggingface_hub reads its address when it is imported."""
    script = """
import json, sys
from vultus.errors import UserError
from vultus.data.sources import open_source
for name in sys.argv[1:]:
    try:
        name, _, id_column = name.partition("#")
        source = open_source(name, id_column=id_column or None)
        parts = []
        for part in source.parts:
            items = part.items(None)
            first = next(items)
            position = json.loads(json.dumps(part.position()))
            items.close()
            again = open_source(name, part.name, revision=source.revision, id_column=id_column or None)
            rest = again.parts[0].items(position)
            keys = [(item.key, item.identity, len(item.read())) for item in (first, *rest)]
            parts.append([part.split, keys])
        print(json.dumps({"parts": parts, "revision": source.revision, "identities": source.identities}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment = {**known, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")}
    done = forks.run(script, *names, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_streams_resumes_and_reports_in_one_line(forks: Forks, tmp_path: Path, hub: str) -> None:
    names = ("user/faces", "user/wrong", "user/gated", "user/faces#who", f"hf://user/faces@{SHA}")
    faces, wrong, gated, column, address = read_hub(forks, tmp_path, hub, *names)
    assert address == faces
    assert faces["identities"] == "column celeb_id"
    assert column["error"].startswith(
        "user/faces, split test: --id-column who: no such column; it has image (struct), "
    )
    size = len(png(0))
    assert faces["revision"] == SHA
    assert [[split, [key[:2] for key in keys]] for split, keys in faces["parts"]] == [
        ["test", [["000005.png", "4"], ["000006.png", "5"]]],
        ["train", [[f"{number:06d}.png", person] for number, person in enumerate("11223")]],
    ]
    assert all(abs(key[2] - size) < 20 for _, keys in faces["parts"] for key in keys)
    assert "no such data set on the hub" in wrong["error"]
    assert "restricted" in gated["error"] or "gated" in gated["error"]
    for answer in (wrong, gated):
        assert answer["error"].startswith("user/")
        assert "\n" not in answer["error"]


def test_hub_that_cannot_be_reached(forks: Forks, tmp_path: Path) -> None:
    (answer,) = read_hub(forks, tmp_path, "http://127.0.0.1:9", "user/faces")
    assert answer["error"].startswith("user/faces: no such local folder, and as a Hugging Face data set it can't be")
    assert "check the name, the network" in answer["error"]
    assert "\n" not in answer["error"]

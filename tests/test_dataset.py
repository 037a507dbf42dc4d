import hashlib
import io
import itertools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from vultus._files import sha256_file, write_json
from vultus._prefetch import Prefetch
from vultus.cli.main import main
from vultus.data import dataset as module
from vultus.data import integrity
from vultus.data.dataset import Order, PreparedDataset, batches, decoded
from vultus.errors import UserError
from vultus.images.io import encode_jpeg, to_pil
from vultus.sampling.embedding_files import open_embeddings


def test_rows_are_those_of_the_split(tiny_dataset: Callable[..., Path]) -> None:
    folder = tiny_dataset(people={"train": 3, "test": 2}, photos=2)
    train, test, both = (PreparedDataset(folder, split) for split in ("train", "test", None))
    assert (len(train), len(test), len(both)) == (6, 4, 10)
    assert set(train.identities).isdisjoint(test.identities)
    batch = test.batch([3, 0])
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.keys == ["test-1/1.jpg", "test-0/0.jpg"] == [test.keys[row] for row in (3, 0)]
    assert test.with_split("train").keys == train.keys
    assert torch.equal(batch.c, test.embeddings([3, 0]))
    assert torch.allclose(test.embeddings().norm(dim=1), torch.ones(4), atol=1e-5)
    assert test.people(2) == [0, 2]


def test_order_is_a_function_of_seed_and_images_seen() -> None:
    order = Order(10, seed=3)
    whole = order(0, 40)
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert not np.array_equal(whole[:10], whole[10:20])
    pieces = np.concatenate([Order(10, seed=3)(start, 4) for start in range(0, 40, 4)])
    assert np.array_equal(whole, pieces)
    assert not np.array_equal(whole, Order(10, seed=4)(0, 40))


def test_batches_start_anywhere_and_leave_no_thread(tiny_dataset: Callable[..., Path]) -> None:
    dataset = PreparedDataset(tiny_dataset(people={"train": 4, "test": 1}))
    with Prefetch(batches(dataset, batch=5, cur_nimg=0, seed=0), 3) as source:
        first = list(itertools.islice(source, 4))
    assert [nimg for nimg, _ in first] == [0, 5, 10, 15]
    again = next(batches(dataset, batch=5, cur_nimg=10, seed=0))[1]
    assert again.keys == first[2][1].keys
    assert torch.equal(again.images, first[2][1].images)
    assert not [thread for thread in threading.enumerate() if thread.name == "vultus-prefetch"]


def test_a_damaged_shard_is_named(tiny_dataset: Callable[..., Path]) -> None:
    folder = tiny_dataset()
    shard = folder / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"shard-00000\.arrow: damaged"):
        PreparedDataset(folder)


def flip(path: Path, *, keep_mtime: bool = False) -> None:
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_mtime:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--preset", "tiny", "--images", "4", "--out", "OUT"],
        ["generate", "default", "--embeddings", "DATA", "--out", "OUT"],
        ["evaluate", "default", "--out", "OUT"],
    ],
)
def test_a_flipped_byte_stops_every_command(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    folder = tiny_dataset()
    PreparedDataset(folder)  # the check of this process is not taken for the changed file
    flip(folder / "shard-00000.arrow", keep_mtime=True)
    words = [{"DATA": str(folder), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    data = [] if command[0] == "generate" else ["--data", str(folder)]
    assert main([*words, *data]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"vultus: error: {folder}/shard-00000.arrow: damaged: not the bytes of manifest.json; ")
    assert not (tmp_path / "out").exists()


def test_shards_are_read_once_by_a_process(tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = tiny_dataset(), []
    sha256 = integrity.sha256_file
    monkeypatch.setattr(integrity, "sha256_file", lambda path: read.append(path.name) or sha256(path))
    for _ in range(3):
        PreparedDataset(folder)
    assert read == ["shard-00000.arrow"]
    os.utime(folder / "shard-00000.arrow", ns=(1, 1))
    PreparedDataset(folder)
    assert len(read) == 2


def test_shards_of_a_large_data_set_are_read_once_by_a_machine(
    tiny_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As new processes would, the process forgets here what it knows."""
    folder, read = tiny_dataset(), []
    sha256 = integrity.sha256_file
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(integrity, "RECORDED_FROM", 1)
    monkeypatch.setattr(integrity, "sha256_file", lambda path: read.append(path.name) or sha256(path))
    for _ in range(2):
        integrity._hashes.clear()
        PreparedDataset(folder)
    assert read == ["shard-00000.arrow"]
    (record,) = (tmp_path / "cache" / "shards").iterdir()
    record.write_text("[]")  # damaged: not used
    integrity._hashes.clear()
    PreparedDataset(folder)
    assert len(read) == 2
    integrity._hashes.clear()
    flip(folder / "shard-00000.arrow", keep_mtime=True)
    with pytest.raises(UserError, match="damaged"):
        PreparedDataset(folder)
    monkeypatch.setenv("VULTUS_CACHE", str(record / "a file stands here"))  # cannot be written
    integrity._hashes.clear()
    with pytest.raises(UserError, match="damaged"):
        PreparedDataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"id": "tiny-test", "dim": 128}}, r"encoder\.dim is 128, but shard-00000\.arrow holds 512"),
        ({"encoder": {"id": "tiny-test", "dim": "512"}}, r"encoder\.dim is '512', a number from 1 to 65536 is needed"),
        ({"encoder": None}, r"encoder\.id is missing"),
        ({"encoder": {"id": "tiny-test", "dim": 0}}, r"encoder\.dim is '0'"),
        ({"resolution": 64}, r"resolution is 64, but the images are 32x32"),
        ({"resolution": -1}, r"resolution is '-1', a number of pixels from 16 to 1024"),
        ({"shards": [{"file": "../a.arrow", "rows": 1, "sha256": "0"}]}, "shards is "),
        ({"shards": "all"}, "shards is 'all'"),
        ({"counts": {}}, r"counts\.splits is missing"),
        ({"crop": None}, "crop is missing"),
        ({"content_sha256": None}, "content_sha256 is missing"),
    ],
)
@pytest.mark.parametrize("kind", ["data set", "embeddings"])
def test_a_damaged_manifest_is_refused_in_one_line(
    tiny_dataset: Callable[..., Path], change: dict[str, Any], message: str, kind: str
) -> None:
    folder = tiny_dataset(manifest=change)
    if kind == "embeddings" and "resolution is 64" in message:
        return  # embeddings have no resolution

    def read() -> None:
        if kind == "data set":
            PreparedDataset(folder, None)
        else:
            open_embeddings(folder, 128 if "128" in message else 512).check()

    with pytest.raises(UserError, match=message) as caught:
        read()
    assert str(caught.value).startswith(f"{folder / 'manifest.json'}: ")
    assert "\n" not in str(caught.value)


def test_rows_that_the_manifest_does_not_have(tiny_dataset: Callable[..., Path]) -> None:
    folder = tiny_dataset()
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"rows": 24', '"rows": 23'))
    with pytest.raises(UserError, match=r"rows is 23, but shard-00000\.arrow holds 24"):
        PreparedDataset(folder)


def test_subset_is_drawn_by_seed(tiny_dataset: Callable[..., Path]) -> None:
    folder = tiny_dataset(people={"train": 20, "test": 1})
    one, two = (PreparedDataset(folder, max_images=10, seed=5) for _ in range(2))
    other = PreparedDataset(folder, max_images=10, seed=6)
    keys = [dataset.batch(range(10)).keys for dataset in (one, two, other)]
    assert keys[0] == keys[1] != keys[2]
    assert len(set(keys[0])) == 10


def test_another_split_opens_no_file_again(tiny_dataset: Callable[..., Path]) -> None:
    folder = tiny_dataset(people={"train": 3, "test": 2}, photos=2)
    expected = PreparedDataset(folder, "test", max_images=3, seed=5)
    keys, c = expected.batch(range(3)).keys, expected.embeddings()
    train = PreparedDataset(folder, "train")
    identities = train.identities
    for path in folder.iterdir():
        path.unlink()
    test = train.with_split("test", max_images=3, seed=5)
    assert (test.split, len(test), test.resolution, test.folder) == ("test", 3, 32, folder)
    assert test.batch(range(3)).keys == keys
    assert torch.equal(test.embeddings(), c)
    assert set(test.identities).isdisjoint(identities)
    assert len(train.with_split(None)) == 10
    assert (train.split, len(train), train.identities) == ("train", 6, identities)


def test_a_split_that_is_empty(tiny_dataset: Callable[..., Path]) -> None:
    folder = tiny_dataset(people={"train": 2})
    dataset = PreparedDataset(folder)
    messages = []
    for select in (lambda: PreparedDataset(folder, "test"), lambda: dataset.with_split("test")):
        with pytest.raises(
            UserError, match="the test split holds no image; prepare more people, or with a larger --test_fraction"
        ) as caught:
            select()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert dataset.split == "train"


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_another_manifest_is_refused(tiny_dataset: Callable[..., Path], text: str) -> None:
    folder = tiny_dataset()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a prepared data set"):
        PreparedDataset(folder)


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="create one with `vultus prepare"):
        PreparedDataset(tmp_path)
    (tmp_path / "progress").mkdir()
    with pytest.raises(UserError, match="not finished"):
        PreparedDataset(tmp_path)


# --- data sets of which every value is known --------------------------------------------------------------------------

REMEDY = "prepare the data set into another --out"


def grey(level: int, width: int = 16, height: int = 16) -> bytes:
    return encode_jpeg(to_pil(torch.full((3, height, width), level, dtype=torch.uint8)))


def table(number: int, splits: str, *, facenet: bool = False) -> pa.Table:
    """A row for each letter of `splits`: train or test. Row r of shard n: embedding (n, r), image of the grey level
    40 n + 10 r, person n-(r // 2), FaceNet's embedding (n, r, -1)."""
    count = len(splits)
    columns: dict[str, Any] = {
        "embedding": pa.array([[number, row] for row in range(count)], pa.list_(pa.float32(), 2)),
        "image": pa.array([grey(40 * number + 10 * row) for row in range(count)], pa.binary()),
        "identity": pa.array([f"{number}-{row // 2}" for row in range(count)], pa.string()),
        "key": pa.array([f"{number}/{row}.jpg" for row in range(count)], pa.string()),
        "split": pa.array([{"r": "train", "e": "test"}[letter] for letter in splits], pa.string()),
    }
    if facenet:
        columns["facenet"] = pa.array([[number, row, -1] for row in range(count)], pa.list_(pa.float32(), 3))
    return pa.table(columns)


def write(folder: Path, tables: list[pa.Table], **entries: Any) -> Path:
    """A prepared data set of these shards. Its earlier states are those of the first shard, of the first two, ..., with
    the content "1", "2", ...; that of all shards is "now"."""
    folder.mkdir(exist_ok=True)
    shards, states, images = [], [], 0
    for number, one in enumerate(tables):
        path = folder / f"shard-{number:05d}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, one.schema) as writer:
            writer.write_table(one)
        shards.append({"file": path.name, "rows": len(one), "sha256": sha256_file(path)})
        images += len(one)
        counts = {"images": images, "skipped": 0, "splits": {"train": {"images": images, "people": 1}}}
        states.append({"counts": counts, "content_sha256": str(number + 1), "shards": number + 1})
    manifest = {
        "schema": 1,
        "resolution": 16,
        "crop": {"kind": "centre"},
        "encoder": {"id": "known", "dim": 2},
        "counts": counts,
        "shards": shards,
        "content_sha256": "now",
        "earlier": states[:-1],
    }
    write_json(folder / "manifest.json", manifest | entries)
    return folder


def known(folder: Path, *, facenet: bool = False) -> Path:
    """Three shards of 3, 2 and 4 rows."""
    extra = {"facenet": {"id": "facenet-vggface2", "dim": 3}} if facenet else {}
    return write(folder, [table(0, "rer", facenet=facenet), table(1, "er", facenet=facenet),
                          table(2, "rree", facenet=facenet)], **extra)  # fmt: skip


def test_rows_of_several_shards(tmp_path: Path) -> None:
    data = PreparedDataset(known(tmp_path / "data"))
    assert (data.split, data.resolution, data.name, data.random_access) == ("train", 16, str(tmp_path / "data"), True)
    assert data.keys == ["0/0.jpg", "0/2.jpg", "1/1.jpg", "2/0.jpg", "2/1.jpg"]
    assert data.identities == ["0-0", "0-1", "1-0", "2-0", "2-0"]
    assert data.people(3) == [0, 1, 2]
    assert data.people(9) == [0, 1, 2, 3]
    assert data.embeddings().tolist() == [[0, 0], [0, 2], [1, 1], [2, 0], [2, 1]]
    assert data.embeddings([4, 0, 2, 0]).tolist() == [[2, 1], [0, 0], [1, 1], [0, 0]]
    assert data.embeddings().dtype == torch.float32
    batch = data.batch([4, 0, 2])
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.images.float().mean((1, 2, 3)).tolist() == pytest.approx([90, 0, 50], abs=1)
    assert batch.c.tolist() == [[2, 1], [0, 0], [1, 1]]
    assert (batch.identities, batch.keys) == (["2-0", "0-0", "1-0"], ["2/1.jpg", "0/0.jpg", "1/1.jpg"])
    assert batch.facenet is None
    assert batch.second is None
    rows = np.array([[0, 0], [0, 2], [1, 1], [2, 0], [2, 1]], dtype=np.int64)
    assert data.rows_sha256() == hashlib.sha256(rows.tobytes()).hexdigest()
    assert PreparedDataset(tmp_path / "data", "test").keys == ["0/1.jpg", "1/0.jpg", "2/2.jpg", "2/3.jpg"]


def test_facenets_embeddings_beside_those_of_the_condition(tmp_path: Path) -> None:
    data = PreparedDataset(known(tmp_path / "data", facenet=True))
    assert (data.facenet_column, data.facenet_entry) == ("facenet", {"id": "facenet-vggface2", "dim": 3})
    assert data.embeddings([1, 3], "facenet").tolist() == [[0, 2, -1], [2, 0, -1]]
    batch = data.batch([3])
    assert batch.c.tolist() == [[2, 0]]
    assert batch.facenet is not None
    assert batch.facenet.tolist() == [[2, 0, -1]]
    alone = PreparedDataset(known(tmp_path / "alone"))
    assert (alone.facenet_column, alone.facenet_entry) == ("embedding", {"id": "known", "dim": 2})


def test_a_subset_keeps_the_order_of_the_rows(tmp_path: Path) -> None:
    folder = known(tmp_path / "data")
    whole = PreparedDataset(folder, None).keys
    for number in (1, 8):
        keys = PreparedDataset(folder, None, max_images=number).keys
        assert len(keys) == number
        assert keys == sorted(keys, key=whole.index)
        other = PreparedDataset(folder, None)
        assert keys == other.with_split(None, max_images=number).keys
        assert keys == other.with_split(None, max_images=number, seed=0).keys
    assert [PreparedDataset(folder, None, max_images=number).keys for number in (0, 9, 10)] == [whole] * 3
    drawn = {tuple(PreparedDataset(folder, None, max_images=4, seed=seed).keys) for seed in range(8)}
    assert len(drawn) > 1


def test_embeddings_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PreparedDataset(known(tmp_path / "data"))
    assert [len(chunk) for chunk in data.embedding_chunks()] == [5]
    for size, lengths in ((2, [2, 2, 1]), (5, [5]), (1, [1] * 5)):
        monkeypatch.setattr(module, "CHUNK", size)
        chunks = list(data.embedding_chunks())
        assert [len(chunk) for chunk in chunks] == lengths
        assert torch.equal(torch.cat(chunks), data.embeddings())


def test_the_data_set_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = known(tmp_path / "data"), tmp_path / "run"
    data = PreparedDataset(folder, "test")
    assert data.as_of("now") is data
    keys = data.keys
    before = data.as_of("2")
    assert before.split is None
    assert before.keys == ["0/0.jpg", "0/1.jpg", "0/2.jpg", "1/0.jpg", "1/1.jpg"]
    assert before.embeddings().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    manifest = before.manifest
    assert (manifest["content_sha256"], manifest["counts"]["images"], len(manifest["shards"])) == ("2", 5, 2)
    assert [state["content_sha256"] for state in manifest["earlier"]] == ["1"]
    assert before.as_of("1").keys == ["0/0.jpg", "0/1.jpg", "0/2.jpg"]
    assert before.with_split("test").keys == ["0/1.jpg", "1/0.jpg"]
    assert (data.keys, len(data.manifest["shards"]), data.manifest["content_sha256"]) == (keys, 3, "now")
    with pytest.raises(UserError) as caught:
        before.as_of("0123456789abcdef")
    assert str(caught.value) == f"{folder}: never had the content 0123456789ab"

    assert data.begun_with(out) is data  # no run is there yet
    out.mkdir()
    for content in ("now", "other"):
        write_json(out / "config.json", {"config": {}, "data": {"content_sha256": content}})
        assert data.begun_with(out) is data
    write_json(out / "config.json", {"config": {}, "data": {}})
    assert data.begun_with(out) is data
    assert capsys.readouterr().err == ""
    write_json(out / "config.json", {"config": {}, "data": {"content_sha256": "1"}})
    assert data.begun_with(out).keys == ["0/0.jpg", "0/1.jpg", "0/2.jpg"]
    assert capsys.readouterr().err == (
        f"note: {folder} has grown from 3 to 9 images since this run began; it goes on with those 3. To train on all "
        "of them, begin a new run in another --out, or with --fresh\n"
    )


def test_a_data_set_that_never_grew_is_as_it_is(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = PreparedDataset(tiny_dataset())
    write_json(tmp_path / "config.json", {"config": {}, "data": {"content_sha256": "1"}})
    assert data.begun_with(tmp_path) is data
    with pytest.raises(UserError, match=r"never had the content 1$"):
        data.as_of("1")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_of_a_part_and_with_the_targets_of_a_second_encoder(tmp_path: Path) -> None:
    data = PreparedDataset(known(tmp_path / "data"), None)
    second, own = torch.arange(18.0).reshape(9, 2), np.array([0, 3])
    whole = list(itertools.islice(batches(data, batch=4, cur_nimg=6, seed=1, second=second), 3))
    part = list(itertools.islice(batches(data, batch=4, cur_nimg=6, seed=1, second=second, own=own), 3))
    order = Order(9, seed=1)
    for (nimg, batch), (nimg_of_part, of_part), expected in zip(whole, part, (6, 10, 14), strict=True):
        assert nimg == nimg_of_part == expected
        rows = order(nimg, 4)
        assert batch.keys == [data.keys[row] for row in rows]
        assert torch.equal(batch.c, data.embeddings()[rows])
        assert batch.second is not None
        assert of_part.second is not None
        assert torch.equal(batch.second, second[rows])
        assert of_part.keys == [batch.keys[0], batch.keys[3]]
        assert torch.equal(of_part.second, second[rows[own]])
    assert next(batches(data, batch=4, cur_nimg=0, seed=1))[1].second is None


def test_tensors_of_a_batch_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU no memory can be page-locked; copies stand for it."""
    copies: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.append(tensor.clone()) or copies[-1])
    data = PreparedDataset(known(tmp_path / "data", facenet=True))
    _, plain = next(batches(data, batch=2, cur_nimg=0, seed=0, second=torch.ones(5, 4)))
    assert not copies
    _, pinned = next(batches(data, batch=2, cur_nimg=0, seed=0, second=torch.ones(5, 4), pin=True))
    for name in ("images", "c", "facenet", "second"):
        one = getattr(pinned, name)
        assert any(one is copy for copy in copies), name
        assert torch.equal(one, getattr(plain, name))
    assert (pinned.keys, pinned.identities) == (plain.keys, plain.identities)
    _, alone = next(batches(PreparedDataset(known(tmp_path / "alone")), batch=2, cur_nimg=0, seed=0, pin=True))
    assert (alone.facenet, alone.second, len(copies)) == (None, None, 6)


def test_an_order_draws_each_pass_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that a batch began in and the next one, at most; not one for each batch."""
    drawn = []
    generator = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or generator(seed))
    order = Order(10, seed=3)
    for start in range(0, 40, 4):
        order(start, 4)
    assert drawn == [[3, 0], [3, 1], [3, 2], [3, 3]]
    order(16, 4)  # long ago: drawn again, two permutations are kept
    assert drawn[4:] == [[3, 1]]
    assert Order(3, seed=0)(7, 2).tolist() == Order(3, seed=0)(6, 3).tolist()[1:]


# --- damaged data sets ------------------------------------------------------------------------------------------------


def refused(folder: Path, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        PreparedDataset(folder, split)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def test_images_of_the_right_size_only() -> None:
    assert decoded([grey(9), grey(200)]).float().mean((1, 2, 3)).tolist() == pytest.approx([9, 200], abs=1)
    assert decoded([grey(9)], 16).shape == (1, 3, 16, 16)
    assert decoded([grey(9, 1024, 1024)]).shape == (1, 3, 1024, 1024)
    for image, side, said in (
        (grey(9), 17, "16x16 pixels"),
        (grey(9, 16, 15), None, "16x15 pixels"),
        (grey(9, 16, 15), 16, "16x15 pixels"),
        (grey(9, 15, 16), 16, "15x16 pixels"),
        (grey(9, 1025, 1025), None, "1025x1025 pixels"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$"):
            decoded([grey(9, side or 16, side or 16), image], side)
    png = io.BytesIO()
    to_pil(torch.zeros(3, 16, 16, dtype=torch.uint8)).save(png, "PNG")
    with pytest.raises(OSError, match="cannot identify"):  # other decoders of Pillow are not reached
        decoded([png.getvalue()])


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    one = table(0, "rr")
    one = one.set_column(1, "image", pa.array([grey(0), b"no image"], pa.binary()))
    data = PreparedDataset(write(tmp_path / "data", [one]))
    with pytest.raises(UserError) as caught:
        data.batch([0, 1])
    assert str(caught.value).startswith(f"{tmp_path / 'data'}: an image in its shards is damaged (cannot identify ")
    assert str(caught.value).endswith(f"); {REMEDY}")
    other = table(0, "rr").set_column(1, "image", pa.array([grey(0), grey(0, 32, 32)], pa.binary()))
    data = PreparedDataset(write(tmp_path / "other", [other]))
    with pytest.raises(UserError, match=r"damaged \(32x32 pixels\)"):
        data.batch([0, 1])


def replaced(name: str, column: Any) -> pa.Table:
    one = table(0, "rr")
    return one.set_column(one.column_names.index(name), name, column)


@pytest.mark.parametrize(
    "one",
    [
        replaced("image", pa.array(["a", "b"], pa.string())),
        replaced("key", pa.array(["a", None], pa.string())),
        replaced(  # the first text is said to end far behind the last one
            "key",
            pa.Array.from_buffers(
                pa.string(), 2, [None, pa.py_buffer(np.array([0, 9_000, 2], np.int32)), pa.py_buffer(b"ab")]
            ),
        ),
        replaced("embedding", pa.array([[0, 0], None], pa.list_(pa.float32(), 2))),
        replaced("embedding", pa.array([[0, 0], [0, 1]], pa.list_(pa.float32()))),
        table(0, "rr").drop_columns(["split"]),
        table(0, "rr").drop_columns(["embedding"]),
    ],
)
def test_a_shard_of_other_columns_is_refused(tmp_path: Path, one: pa.Table) -> None:
    folder = write(tmp_path / "data", [one])
    assert refused(folder) == f"{folder / 'shard-00000.arrow'}: not a shard that can be read; {REMEDY}"


def test_a_shard_without_facenets_embeddings_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [table(0, "rr")], facenet={"id": "facenet-vggface2", "dim": 3})
    assert refused(folder) == f"{folder / 'shard-00000.arrow'}: not a shard that can be read; {REMEDY}"


def test_a_file_that_is_no_shard_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [table(0, "rr")])
    path, manifest = folder / "shard-00000.arrow", json.loads((folder / "manifest.json").read_text())
    path.write_bytes(b"no Arrow file")
    manifest["shards"][0]["sha256"] = sha256_file(path)
    write_json(folder / "manifest.json", manifest)
    assert refused(folder) == f"{path}: not a shard that can be read; {REMEDY}"


def test_what_the_manifest_says_wrongly_is_named(tmp_path: Path) -> None:
    shards = [table(0, "rr", facenet=True), table(1, "rr", facenet=True)]
    facenet = {"id": "facenet-vggface2", "dim": 3}
    folder = write(tmp_path / "data", shards, facenet=facenet | {"dim": 512})
    path, restore = folder / "manifest.json", "restore the file from a copy, or prepare the data set into another --out"
    assert refused(folder) == f"{path}: facenet.dim is 512, but shard-00000.arrow holds 3; {restore}"
    write(folder, shards, facenet=facenet, encoder={"id": "known", "dim": 3})
    assert refused(folder) == f"{path}: encoder.dim is 3, but shard-00000.arrow holds 2; {restore}"
    write(folder, shards, facenet=facenet, resolution=32)
    assert refused(folder) == f"{path}: resolution is 32, but the images are 16x16; {restore}"
    write(folder, shards, facenet=facenet)
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["rows"] = 3
    write_json(path, manifest)
    assert refused(folder) == f"{path}: rows is 3, but shard-00001.arrow holds 2; {restore}"


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("train", "the train split holds no image; prepare more people, or with a smaller --test_fraction"),
        ("test", "the test split holds no image; prepare more people, or with a larger --test_fraction"),
        ("other", "the other split holds no image; prepare more people"),
        (None, "the data set holds no image; prepare more people"),
    ],
)
def test_a_selection_without_a_row_says_what_to_do(tmp_path: Path, split: str | None, said: str) -> None:
    folder = write(tmp_path / "data", [table(0, "")])
    assert refused(folder, split) == f"{folder}: {said}, into another --out"

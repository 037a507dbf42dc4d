import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vultus._prefetch import Prefetch
from vultus.cli.main import main
from vultus.data import integrity
from vultus.data.dataset import Order, PreparedDataset, batches
from vultus.errors import UserError
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

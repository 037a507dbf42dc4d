"""Training from a stream: the order, resuming, the cache, the network and its faults, files that break or change."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from forked import Forks
from range_server import RangeServer
from stand_in_hub import Hub
from test_prepare import TinyEncoder
from test_sources import png, write_parquet
from test_train import assert_same, losses, state
from vultus._files import read_json
from vultus.config import merged
from vultus.data.crops import in_test
from vultus.data.dataset import Batch, PreparedDataset, batches
from vultus.data.prepare import prepare
from vultus.data.stream import remote
from vultus.data.stream.cache import Cache
from vultus.data.stream.dataset import StreamedDataset
from vultus.data.stream.options import StreamOptions
from vultus.data.stream.order import EpochOrder, Skips, StreamOrder
from vultus.errors import UserError
from vultus.training import launch
from vultus.training.processes import joined
from vultus.training.run_log import read_stats

SRC = Path(remote.__file__).resolve().parents[3]
TESTS = Path(__file__).resolve().parent
TINY = {
    "generator": {"base_width": 8, "max_width": 16, "c_dim": 8},
    "discriminator": {"base_width": 8, "max_width": 16, "c_dim": 8},
    "optim.batch": 4,
    "dtype": "float32",
    "log_every_nimg": 4,
    "sample_every_nimg": 800,
    "checkpoint_every_nimg": 8,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VULTUS_WEIGHTS", "")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("https_proxy", "HTTPS_PROXY"):  # no download of FaceNet
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "cache" / "stream"


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """40 photos of 10 people to train on in 4 files of 3 row groups, 8 photos of 4 others in a test split."""
    for number in range(4):
        people = [number * 2 + row // 5 for row in range(10)]
        file = tmp_path / "faces" / f"train-{number}.parquet"
        write_parquet(file, people, first=number * 10, rows_per_group=4)
    write_parquet(tmp_path / "faces" / "test-0.parquet", [20, 20, 21, 21, 22, 22, 23, 23], first=40, rows_per_group=4)
    return tmp_path / "faces"


def stream(source: Path | str, encoder: TinyEncoder | None = None, **options: Any) -> StreamedDataset:
    begun = options.pop("begun", None)
    given = StreamOptions(**{"resolution": 32, "mix": 3, "pause": 0.01, "timeout": 1.0, "retries": 2} | options)
    return StreamedDataset(source, given, encoder=encoder or TinyEncoder(), begun=begun)


def read(dataset: PreparedDataset, count: int, *, cur_nimg: int = 0, batch: int = 4, seed: int = 1) -> list[Batch]:
    source = batches(dataset, batch=batch, cur_nimg=cur_nimg, seed=seed)
    try:
        return [item for _, item in itertools.islice(source, count)]
    finally:
        source.close()


def keys(dataset: PreparedDataset, count: int, **options: Any) -> list[str]:
    return [key for item in read(dataset.with_split("train", seed=1), count, **options) for key in item.keys]


def of_files(*numbers: int) -> set[str]:
    return {f"{number * 10 + row:06d}.png" for number in numbers for row in range(10)}


# --- the order -------------------------------------------------------------------------------------------------------


def sequence(order: EpochOrder) -> list[tuple[int, int]]:
    pairs = np.concatenate([order.step(step) for step in range(order.steps)])
    return [(int(order.blocks[position]), int(row)) for position, row in pairs]


@pytest.mark.parametrize("mix", [1, 3, 7, 16])
@pytest.mark.parametrize("rows", [[5], [1, 2, 3], [4, 9, 1, 7, 7, 30, 2, 12], [10] * 40])
def test_every_row_once_in_each_epoch_in_another_order(rows: list[int], mix: int) -> None:
    orders = [sequence(EpochOrder(rows, 3, epoch, mix)) for epoch in (0, 1)]
    every = [(block, row) for block, count in enumerate(rows) for row in range(count)]
    for order in orders:
        assert sorted(order) == every
    assert orders[0] != orders[1]
    assert sequence(EpochOrder(rows, 3, 0, mix)) == orders[0]
    assert sequence(EpochOrder(rows, 4, 0, mix)) != orders[0]
    sizes = EpochOrder(rows, 3, 0, mix).sizes
    assert sizes.tolist() == [len(EpochOrder(rows, 3, 0, mix).step(step)) for step in range(len(sizes))]


def test_neighbours_in_the_order_are_far_apart_in_the_source() -> None:
    """As far as in a permutation of all rows, but for the share of neighbours in one row group."""
    rows = [500] * 60
    starts = np.cumsum([0, *rows])[:-1]
    order = sequence(EpochOrder(rows, 0, 0, 16))
    places = np.asarray([starts[block] + row for block, row in order])
    mean = np.abs(np.diff(places)).mean() / (sum(rows) / 3)  # of a permutation: a third of the length
    assert mean > 0.93
    blocks = np.asarray([block for block, _ in order])
    assert (np.diff(blocks) == 0).mean() < 0.08
    batch = [len(set(blocks[start : start + 64])) for start in range(0, len(blocks) - 64, 64)]
    assert np.mean(batch) > 14


def test_memory_holds_the_window_only() -> None:
    order = EpochOrder([10] * 40, 0, 0, 8)
    for step in range(order.steps):
        assert len(set(order.step(step)[:, 0].tolist())) <= 8


def reference(order: StreamOrder, shards: list[int], epochs: int) -> list[tuple[int, int, int]]:
    """(epoch, step, row) of each image of a run, straightforwardly."""
    found = []
    for epoch in range(epochs):
        plan = order.epoch(epoch)
        for step in range(plan.steps):
            for row, (position, number) in enumerate(plan.step(step)):
                block = int(plan.blocks[position])
                out = number in order.skips.rows.get(block, ())
                for shard, since, first, place in order.skips.shards:
                    if shards[block] == shard:
                        out |= epoch > since or (epoch == since and position >= first and (step, row) >= place)
                if not out:
                    found.append((epoch, step, row))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_place_after_any_number_of_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 9, 12).tolist()
    shards = [block // 3 for block in range(12)]
    skips = Skips(shards)
    skips.rows = {2: {0}, 7: set(range(rows[7]))}
    skips.shards = [(1, 1, 2, (0, 0)), (3, 0, 1, (2, 3))]
    order = StreamOrder(rows, seed, 4, skips)
    expected = reference(order, shards, 3)
    assert [order.locate(nimg) for nimg in range(len(expected))] == expected


# --- the same as a prepared data set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("own_split", [True, False])
def test_photos_and_embeddings_are_those_of_a_prepared_data_set(faces: Path, tmp_path: Path, own_split: bool) -> None:
    if not own_split:
        (faces / "test-0.parquet").unlink()
    prepare(faces, tmp_path / "prepared", resolution=32, test_fraction=0.3, encoder=TinyEncoder(), device="cpu")
    dataset = stream(faces, test_fraction=0.3)
    for split in ("train", "test"):
        prepared = PreparedDataset(tmp_path / "prepared", split)
        expected = prepared.batch(range(len(prepared)))
        train = dataset.with_split(split, seed=1)
        assert len(train) == len(prepared)
        items = read(train, len(prepared), batch=1) if split == "train" else [train.batch(range(len(train)))]
        found = {key: (item, row) for item in items for row, key in enumerate(item.keys)}
        assert sorted(found) == sorted(expected.keys)
        for row, key in enumerate(expected.keys):
            item, at = found[key]
            assert torch.equal(item.images[at], expected.images[row])
            # The encoder gets other batches, of which some processors sum in another order: the last bit may differ.
            assert torch.allclose(item.c[at], expected.c[row], rtol=0, atol=1e-6)
            assert item.identities[at] == expected.identities[row]
            assert own_split or in_test(item.identities[at], 0.3) == (split == "test")
    assert dataset.manifest["counts"]["splits"] == PreparedDataset(tmp_path / "prepared").manifest["counts"]["splits"]


def test_a_person_of_the_test_split_is_not_trained_on(tmp_path: Path) -> None:
    write_parquet(tmp_path / "faces" / "train-0.parquet", [1, 2, 1, 3])
    write_parquet(tmp_path / "faces" / "test-0.parquet", [2, 4], first=4)
    dataset = stream(tmp_path / "faces")
    assert set(dataset.with_split("train").identities) == {"1", "3"}
    assert set(keys(dataset, 3, batch=1)) == {"000000.png", "000002.png", "000003.png"}


@pytest.mark.parametrize("plain", [True, False])
def test_rows_without_identity_or_path(tmp_path: Path, plain: bool) -> None:
    images = [png(number) for number in range(6)]
    column = pa.array(images, pa.binary()) if plain else pa.array([{"bytes": image, "path": None} for image in images])
    table = pa.table({"image": column, "celeb_id": pa.array([1.0, 1.0, None, 2.0, float("nan"), 2.0])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    dataset = stream(tmp_path / "a.parquet", test_fraction=0.0)
    expected = ["1.0", "1.0", "train/0000002", "2.0", "train/0000004", "2.0"]
    items = read(dataset.with_split("train"), 6, batch=1)
    assert sorted((item.keys[0], item.identities[0]) for item in items) == [
        (f"train/{row:07d}", identity) for row, identity in enumerate(expected)
    ]
    with pytest.raises(UserError, match=r"a\.parquet: --id-column celeb_id has no value in 2 rows"):
        stream(tmp_path / "a.parquet", id_column="celeb_id")


# --- resuming, threads, subsets --------------------------------------------------------------------------------------


def test_the_order_does_not_depend_on_workers_and_resumes_from_anywhere(faces: Path) -> None:
    whole = {workers: keys(stream(faces, workers=workers), 30) for workers in (0, 2, 4)}
    assert whole[0] == whole[2] == whole[4]
    assert sorted(whole[0][:40]) == sorted(of_files(0, 1, 2, 3))
    assert sorted(whole[0][40:80]) == sorted(whole[0][:40])
    assert whole[0][40:80] != whole[0][:40]
    for number, workers in enumerate((0, 2, 4)):
        for start in range(number, 28, 7):
            assert keys(stream(faces, workers=workers), 3, cur_nimg=4 * start) == whole[0][4 * start : 4 * start + 12]


def test_a_subset_reads_some_row_groups_only(faces: Path) -> None:
    with RangeServer(faces) as server:
        dataset = stream(f"{server.address}/*.parquet")
        subset = dataset.with_split("train", max_images=10, seed=3)
        assert len(subset) == 10
        found = [key for item in read(subset, 10, batch=2, seed=3) for key in item.keys]
    assert len(set(found[:10])) == 10
    assert set(found) == set(found[:10])
    assert len(set(subset.identities)) <= 5


# --- the cache -------------------------------------------------------------------------------------------------------


def test_an_embedding_is_computed_once(faces: Path, cache: Path) -> None:
    first, second = TinyEncoder(), TinyEncoder()
    train = stream(faces, first).with_split("train", seed=1)
    one = read(train, 20)
    assert sum(first.batches) == 40
    again = stream(faces, second, resolution=64)  # does not change the embeddings
    two = read(again.with_split("train", seed=1), 20)
    assert again.with_split("test").batch([0, 1]).images.shape[-1] == 64
    assert sum(second.batches) == 8  # of the held-out photos, which the first did not need
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.c, b.c)
    third = TinyEncoder()
    third.weights_sha256 = "1" * 64
    read(stream(faces, third).with_split("train", seed=1), 10)
    assert sum(third.batches) == 40


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_cache_is_bounded(faces: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = keys(stream(faces), 20)
    whole = size(cache)
    for path in cache.rglob("*.safetensors"):
        path.unlink()
    encoder = TinyEncoder()
    bounded = stream(faces, encoder, cache_gb=whole / 2e9)
    assert keys(bounded, 20) == expected
    assert whole / 4 < size(cache) <= whole / 2
    assert 40 < sum(encoder.batches) < 80  # in two passes
    message = capsys.readouterr().err
    assert message.count("the cache of the stream is full (--cache_gb ") == 1
    for path in cache.rglob("*.safetensors"):
        path.unlink()
    without = TinyEncoder()
    assert keys(stream(faces, without, cache_gb=0), 20) == expected
    assert sum(without.batches) >= 80


def test_the_cache_drops_what_others_left(tmp_path: Path) -> None:
    folder = tmp_path / "values"
    value = {"a": np.zeros(1000, np.float32)}
    old = Cache(10_000, folder=folder)
    assert old.put("aa-first", value)
    assert old.put("aa-second", value)
    os.utime(next(folder.rglob("*first*")), (0, 0))
    new = Cache(9_500, folder=folder)
    assert new.put("bb-third", value)
    assert new.get("aa-first") is None  # the least recently used
    assert new.get("aa-second") is not None  # now it is one of its own
    assert not new.put("bb-fourth", value)
    assert new.full
    next(folder.rglob("*third*")).write_bytes(b"damaged")
    assert new.get("bb-third") is None


# --- the network -----------------------------------------------------------------------------------------------------


def test_faults_are_named_and_tried_again(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = keys(stream(faces), 20)
    faults = ["reset", "503", "stall", "truncated"]
    with RangeServer(faces, stall=1.0) as server:
        dataset = stream(f"{server.address}/*.parquet", timeout=0.2, cache_gb=0)
        server.faults = {f"train-{number}.parquet": [fault, "", fault] for number, fault in enumerate(faults)}
        # Files of so few bytes are read with their end; here they are not.
        for place in dataset._shards.places:
            place.file._tail = b""
        assert keys(dataset, 20) == expected
        address = server.address
    lines = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    for number, reason in enumerate(("connection lost", "HTTP 503 Service Unavailable", "no data for 0.2 s", "trunc")):
        found = [line for line in lines if line.startswith(f"{address}/train-{number}.parquet: {reason}")]
        assert len(found) == 2, (reason, lines)
        assert "trying again in 0.0" in found[0]
        assert "(1 of 2)" in found[0]


def test_a_body_that_trickles_is_a_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(4000))
    monkeypatch.setattr(remote, "TAIL", 10)
    with RangeServer(tmp_path) as server:
        file = remote.RemoteFile(f"{server.address}/a.bin", remote.Attempts(0.2, 0, 0))
        file.open()
        server.always["a.bin"] = "trickle"
        start = time.monotonic()
        with pytest.raises(remote.Broken, match=r"stalled: \d+ bytes in 0.2 s"):
            file.read(0, 3000)
        assert time.monotonic() - start < 2


def run(dataset: StreamedDataset, out: Path, images: int, **settings: Any) -> None:
    config = merged(launch.base_config("tiny", out=out, resolution=32, images=images), TINY | settings, "settings")
    launch.run(config, dataset, out=out, images=images, hours=None, device="cpu", track=(), project="vultus")


def test_a_file_that_stays_broken_is_skipped_and_listed(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From some request on, so part of it has been seen. The resumed run goes on as the one that was not stopped."""
    monkeypatch.setattr(remote, "TAIL", 1000)
    seen: dict[str, list[str]] = {}
    with RangeServer(faces) as server:
        source = f"{server.address}/*.parquet"
        for name in ("whole", "parts"):
            server.always, server.requests = {}, server.requests.__class__()
            dataset = stream(source, mix=2, cache_gb=0)
            server.always["train-2.parquet"] = "503"
            server.after["train-2.parquet"] = server.requests["train-2.parquet"] + 1  # the first row group is read
            budgets = [48] if name == "whole" else [24, 48]
            for images in budgets:
                run(dataset, tmp_path / name, images)
                if images != 48:
                    server.always = {}  # it would work again, but the run has left it out
                    dataset = stream(source, mix=2, cache_gb=0, begun=tmp_path / name)
            server.always = {}
            again = stream(source, mix=2, cache_gb=0, begun=tmp_path / name)
            again.record.folder = tmp_path / name
            seen[name] = keys(again, 20)
            skipped = read_json(tmp_path / name / "stream.json")["skipped"]
            (entry,) = skipped["files"]
            assert entry["name"] == "train-2.parquet"
            assert entry["reason"] == "HTTP 503 Service Unavailable"
            message = capsys.readouterr().err
            assert f"note: {server.address}/train-2.parquet: HTTP 503 Service Unavailable; skipped" in message
            assert f"note: 1 file of {source} skipped (" in message.splitlines()[-1]
    assert seen["whole"] == seen["parts"]
    assert_same(state(tmp_path / "whole")["gan"], state(tmp_path / "parts")["gan"])
    epoch = len(set(seen["whole"]))
    assert 30 <= epoch < 40
    assert set(seen["whole"][epoch : epoch + 30]) == of_files(0, 1, 3)


def test_a_file_with_text_that_is_not_utf8_is_skipped(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pyarrow.parquet.read_table(faces / "train-1.parquet")
    images = table["image"].combine_chunks()
    paths = pa.array([b"\xff\xfe"] * len(table)).cast(pa.string(), safe=False)
    damaged = pa.StructArray.from_arrays([images.field("bytes"), paths], names=["bytes", "path"])
    pyarrow.parquet.write_table(table.set_column(0, "image", damaged), faces / "train-1.parquet")
    assert set(keys(stream(faces), 10)) == of_files(0, 2, 3)
    assert "train-1.parquet: not Parquet that can be read (" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_skipped(faces: Path, tmp_path: Path, capsys: Any) -> None:
    (faces / "train-1.parquet").write_bytes(b"PAR1 no Parquet PAR1")
    dataset = stream(faces)
    assert set(keys(dataset, 10)) == of_files(0, 2, 3)
    run(dataset, tmp_path / "run", 8)
    (entry,) = read_json(tmp_path / "run" / "stream.json")["skipped"]["unopened"]
    assert entry["name"] == "train-1.parquet"
    assert "train-1.parquet: not Parquet that can be read" in capsys.readouterr().err
    write_parquet(faces / "train-1.parquet", [2] * 10, first=10)  # repaired; the run goes on without it
    resumed = stream(faces, begun=tmp_path / "run")
    run(resumed, tmp_path / "run", 16)
    assert set(keys(resumed, 10)) == of_files(0, 2, 3)
    (faces / "test-0.parquet").write_bytes(b"PAR1 no Parquet PAR1")
    with pytest.raises(UserError, match=r"test-0\.parquet: .*; it holds the people for validation"):
        stream(faces)


def test_a_network_that_is_gone_ends_the_run_which_resumes(faces: Path, tmp_path: Path) -> None:
    expected = keys(stream(faces, mix=2), 12)
    with RangeServer(faces) as server:
        dataset = stream(f"{server.address}/*.parquet", mix=2, retries=0)
        for place in dataset._shards.places:
            place.file._tail = b""
        taken: list[str] = []

        def take() -> None:
            for _, item in batches(dataset.with_split("train", seed=1), batch=4, cur_nimg=0, seed=1):
                taken.extend(item.keys)
                server.always = {f"train-{number}.parquet": "503" for number in range(4)}

        with pytest.raises(UserError, match=r"no other file of http.* can be read either: check the network"):
            take()
        assert 0 < len(taken) < 40
        assert taken == expected[: len(taken)]
        assert not dataset.record.shards


def test_photos_that_cannot_be_used_are_skipped_and_listed(faces: Path, tmp_path: Path, capsys: Any) -> None:
    images = [{"bytes": png(7) if row % 4 else b"no image", "path": f"bad-{row}.png"} for row in range(12)]
    table = pa.table({"image": images, "celeb_id": [30 + row % 3 for row in range(12)]})
    pyarrow.parquet.write_table(table, faces / "train-9.parquet", row_group_size=5)
    dataset = stream(faces)
    found = keys(dataset, 49, batch=1)
    usable = of_files(0, 1, 2, 3) | {f"bad-{row}.png" for row in range(12) if row % 4}
    assert sorted(found) == sorted(usable)
    assert keys(stream(faces), 49, batch=1, cur_nimg=0) == found
    run(dataset, tmp_path / "run", 56)
    skipped = read_json(tmp_path / "run" / "stream.json")["skipped"]["photos"]
    assert sorted(entry["key"] for entry in skipped) == ["bad-0.png", "bad-4.png", "bad-8.png"]
    assert "3 photos of " in capsys.readouterr().err.splitlines()[-1]
    # From the record, the place in the second pass is known.
    resumed = stream(faces, begun=tmp_path / "run")
    resumed.record.folder = tmp_path / "run"
    assert keys(resumed, 8, batch=1, cur_nimg=56) == keys(dataset, 64, batch=1)[56:]


# --- files that change -----------------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read_is_refused(faces: Path) -> None:
    with RangeServer(faces) as server:
        dataset = stream(f"{server.address}/*.parquet", mix=2)
        for place in dataset._shards.places:
            place.file._tail = b""
        server.etags["train-3.parquet"] = '"other"'
        with pytest.raises(UserError, match=r"train-3\.parquet: has changed since it was first read .*\"other\""):
            keys(dataset, 20)
    local = stream(faces)
    os.utime(faces / "train-0.parquet", (1, 1))
    with pytest.raises(UserError, match=r"train-0\.parquet: has changed"):
        keys(local, 20)


def test_a_run_is_not_resumed_on_other_files_or_options(faces: Path, tmp_path: Path) -> None:
    run(stream(faces), tmp_path / "run", 8)
    with pytest.raises(UserError, match=r"run: was begun with --mix 3, now it is 4; give the same options"):
        run(stream(faces, mix=4), tmp_path / "run", 16)
    os.utime(faces / "train-2.parquet", (1, 1))
    with pytest.raises(UserError, match=r"train-2\.parquet: has changed since it was first read"):
        run(stream(faces), tmp_path / "run", 16)
    os.rename(faces / "train-2.parquet", faces / "train-7.parquet")
    with pytest.raises(UserError, match=r"train-2\.parquet is no longer in "):
        run(stream(faces), tmp_path / "run", 16)


# --- a run -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from test_stream import run, stream
source, out, images, workers = sys.argv[1:]
from pathlib import Path
run(stream(source, workers=int(workers), begun=out), Path(out), int(images))
"""


@pytest.mark.slow
def test_killed_in_mid_stream_it_goes_on_as_if_it_had_not_been(faces: Path, tmp_path: Path) -> None:
    """kill -9 of a process that reads over HTTP; in the second pass, with another number of workers."""
    paths = os.pathsep.join([str(SRC), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "VULTUS_WEIGHTS": ""}
    run(stream(faces, workers=0), tmp_path / "whole", 96)
    with RangeServer(faces) as server:

        def command(images: int, workers: int) -> list[str]:
            arguments = [f"{server.address}/*.parquet", str(tmp_path / "killed"), str(images), str(workers)]
            return [sys.executable, "-c", SCRIPT, *arguments]

        process = subprocess.Popen(command(4000, 2), env=environment, stderr=subprocess.DEVNULL)
        try:
            while not (tmp_path / "killed" / "checkpoint-0000000056.pt").exists():
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        nimg = state(tmp_path / "killed")["cur_nimg"]
        server.etags = {}
        if nimg < 96:
            subprocess.run(command(96, 4), env=environment, check=True, capture_output=True, timeout=120)
    if nimg <= 96:
        assert_same(state(tmp_path / "whole")["gan"], state(tmp_path / "killed")["gan"])
    lines = [[line for line in losses(tmp_path / name) if line["cur_nimg"] <= 96] for name in ("whole", "killed")]
    assert lines[0] == lines[1]


def test_what_a_run_records(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vultus.cli.main import main

    run(stream(faces, licence="for tests"), tmp_path / "run", 8)
    data = read_json(tmp_path / "run" / "config.json")["data"]
    assert data["stream"]["source"] == str(faces)
    assert data["stream"]["split"] == "of the source"
    assert data["encoder"]["id"] == "tiny"
    assert data["licence"] == "for tests"
    assert data["counts"]["splits"] == {"train": {"images": 40, "people": 8}, "test": {"images": 8, "people": 4}}
    files = read_json(tmp_path / "run" / "stream.json")["files"]
    assert [file[0] for file in files] == ["test-0.parquet", *(f"train-{number}.parquet" for number in range(4))]
    assert main(["report", str(tmp_path / "run")]) == 0
    assert f"--data {faces}" in (tmp_path / "run" / "report.md").read_text()
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) >= 2


def test_fresh_forgets_what_was_left_out(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(stream(faces), out, 8)
    record = read_json(out / "stream.json")
    record["skipped"]["files"] = [
        {
            "file": "x",
            "name": "train-1.parquet",
            "epoch": 0,
            "position": 0,
            "place": [0, 0],
            "photos": 10,
            "reason": "x",
        }
    ]
    (out / "stream.json").write_text(json.dumps(record))
    resumed = stream(faces, begun=out)
    resumed.record.folder = out
    assert set(keys(resumed, 8)) == of_files(0, 2, 3)
    config = merged(launch.base_config("tiny", out=None, resolution=32, images=16), TINY, "settings")
    fresh = stream(faces)
    launch.run(config, fresh, out=out, images=40, hours=None, device="cpu", track=(), project="v", fresh=True)
    assert read_json(out / "stream.json")["skipped"]["files"] == []
    assert (out / "old-1" / "stream.json").exists()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "PREPARED", "--mix", "4"], r"--mix is an option of a stream, but .* is not one; leave it out"),
        (["--data", "FACES", "--mix", "0"], r"--mix must be a whole number from 1 to 4096, not 0"),
        (["--data", "FACES", "--resolution", "48"], r"--resolution must be one of 32, 64, 128"),
        (["--data", "FACES", "--id-column", "who"], r"test-0\.parquet: --id-column who: no such column; it has image"),
        (["--data", "FACES", "--split", "dev"], r"has no split 'dev'; it has test, train"),
        (["--data", "hf://a/b/c"], r"hf://a/b/c: not the address of a data set; give hf://user/name"),
        (
            ["--data", "http://127.0.0.1:9/a.parquet", "--retries", "0"],
            r"1 file of 1 can't be read .*connection refused",
        ),
        (
            ["--data", "http://127.0.0.1:9/*.parquet", "--retries", "0"],
            r"127.0.0.1:9/: connection refused; check the a",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_a_line(
    faces: Path, tmp_path: Path, tiny_dataset: Callable[..., Path], capsys: Any, arguments: list[str], message: str
) -> None:
    from vultus.cli.main import main

    names = {"PREPARED": lambda: tiny_dataset(), "FACES": lambda: faces}
    given = [str(names[word]()) if word in names else word for word in arguments]
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path / "run"), *given]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("vultus: error: ")
    assert re.search(message, error), error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_web_folder_a_list_and_a_file(faces: Path) -> None:
    (faces / "files.txt").write_text("# faces\ntrain-1.parquet\ntest-0.parquet\n")
    (faces / "wrong.txt").write_text("ftp://host/train-1.parquet\n")
    with RangeServer(faces) as server:
        counts = {
            name: stream(f"{server.address}/{name}").manifest["counts"]["splits"]["train"]["images"]
            for name in ("", "train-*.parquet", "files.txt")
        }
        assert counts[""] == 40
        assert counts["files.txt"] == 10
        assert 30 < counts["train-*.parquet"] <= 40
        assert stream(f"{server.address}/train-3.parquet", split="train", test_fraction=0.0).name.endswith("t")
        with pytest.raises(UserError, match=r"wrong\.txt: not a Parquet file and not a list of them"):
            stream(f"{server.address}/wrong.txt")
        with pytest.raises(UserError, match=r"links no file that matches x\*\.parquet"):
            stream(f"{server.address}/x*.parquet")
        with pytest.raises(UserError, match=r"nothing\.parquet: HTTP 404"):
            stream(f"{server.address}/nothing.parquet")


HUB = """
import contextlib, io, json, sys
import huggingface_hub
from test_stream import keys, stream
from vultus.cli.main import main

def error(data):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(["train", "--preset", "tiny", "--data", data, "--out", "run", "--retries", "0"])
    return [code, stderr.getvalue()]

dataset = stream("hf://user/faces")
held = dataset.with_split("test")
print(json.dumps([dataset.manifest["stream"], sorted(keys(dataset, 10)), held.batch(range(len(held))).keys]))
print(json.dumps(stream("hf://datasets/user/faces@" + "a" * 40).manifest["counts"]))
print(json.dumps([error("hf://user/wrong"), error("hf://user/gated"), error("hf://user/photos")]))
print("ready", flush=True)
sys.stdin.readline()
# Its connections are still open.
(huggingface_hub.close_session if hasattr(huggingface_hub, "close_session") else huggingface_hub.utils.reset_sessions)()
print(json.dumps([error("hf://user/faces")]))
"""


@pytest.mark.slow
def test_the_hub(faces: Path, tmp_path: Path) -> None:
    """In a separate process, because huggingface_hub reads its address when it is imported."""
    for file in faces.glob("*.parquet"):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        number = file.stem.partition("-")[2]
        file.rename(tmp_path / "hub" / "data" / file.name.replace(number, f"{int(number):05d}-of-00004"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("RootedHub", (Hub,), {"root": tmp_path / "hub"}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment = known | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join([str(SRC), str(TESTS)]),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", HUB]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = list(iter(process.stdout.readline, "ready\n"))
        server.shutdown()
        server.server_close()
        process.stdin.write("\n")
        process.stdin.flush()
        lines += list(process.stdout)
    described, counts, refused, offline = [json.loads(line) for line in lines]
    entry, found, held = described
    assert (entry["revision"], entry["files"], entry["split"]) == ("a" * 40, 5, "of the source")
    assert found == sorted(of_files(0, 1, 2, 3))
    assert sorted(held) == [f"{40 + row:06d}.png" for row in range(8)]
    assert counts["splits"]["train"]["images"] == 40
    reasons = ["no such data set on the hub", "access to this data set is restricted", "no such data set", "can't be o"]
    for (code, message), reason in zip([*refused, *offline], reasons, strict=True):
        assert code == 2
        assert message.startswith("vultus: error: hf://user/")
        assert reason in message
        assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- several processes -----------------------------------------------------------------------------------------------


def run_in_processes(source: str, out: str, images: str) -> None:
    """A training in this process, alone or one of several."""
    with joined():
        run(stream(Path(source), mix=2), Path(out), int(images))


@pytest.mark.slow
def test_two_processes_train_on_the_photos_that_the_first_one_reads(faces: Path, tmp_path: Path, forks: Forks) -> None:
    """Also where a photo cannot be used, which only the process that reads it knows."""
    table = pyarrow.parquet.read_table(faces / "train-1.parquet")
    images = table.column("image").to_pylist()
    images[3]["bytes"] = b"no image"
    table = table.set_column(0, "image", pa.array(images, table.schema.field("image").type))
    pyarrow.parquet.write_table(table, faces / "train-1.parquet", row_group_size=4)
    for out, count in (("one", 1), ("two", 2)):
        program = "import sys, test_stream; test_stream.run_in_processes(*sys.argv[1:])"
        for done in forks.run_together(program, str(faces), str(tmp_path / out), "48", count=count):
            assert done.returncode == 0, done.stderr
    one, two = (
        [line for line in read_stats(tmp_path / out / "stats.jsonl") if "G_mse" in line] for out in ("one", "two")
    )
    names = ("D_adversarial", "G_adversarial", "G_mse")
    for a, b in zip(one, two, strict=True):
        assert [b[name] for name in names] == pytest.approx([a[name] for name in names], rel=1e-3)
    records = [json.loads((tmp_path / out / "stream.json").read_text()) for out in ("one", "two")]
    assert records[0] == records[1]
    assert len(records[0]["skipped"]["photos"]) == 1

"""`vultus prepare` with several workers: the bytes of one process, also after `kill -9` and on Ray. Workers are real
processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from forked import PATHS, Forks
from test_prepare import TinyEncoder, content, jpeg, rows, skipped, write_photos
from test_sources import write_parquet
from vultus.cli.main import main
from vultus.data.prepare import prepare
from vultus.errors import UserError

OPTIONS: dict[str, Any] = {"resolution": 32, "batch": 4, "shard_items": 10}


class Deadly(TinyEncoder):
    """Kills its process with SIGKILL in its second batch, once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def embed_crop(self, x: Tensor) -> Tensor:
        if len(self.batches) == 1:
            with contextlib.suppress(FileExistsError):
                (self.folder / "died").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_crop(x)


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Parquet with two splits, people in both, and a row without an image that can be used."""
    source = tmp_path / "in"
    write_parquet(source / "test-0.parquet", [7, 8, 9] * 3)
    write_parquet(source / "train-0.parquet", list(range(23)), first=15, rows_per_group=8)  # 7, 8, 9 are in both
    write_parquet(source / "train-1.parquet", list(range(20, 33)), first=38, rows_per_group=8)
    return source


@pytest.mark.slow
def test_parquet_with_splits(splits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(splits, out, encoder=TinyEncoder(), workers=2, **OPTIONS, limit=40)
    assert not multiprocessing.active_children()
    assert prepare(splits, tmp_path / "whole", encoder=TinyEncoder(), **OPTIONS, limit=40) == manifest
    assert content(out) == content(tmp_path / "whole")
    assert list(skipped(out).values()) == ["this person is in the test split"] * 3


# Runs `prepare` with two workers and kills itself before the sidecar of a shard gets its final name.
PARENT = """
import os, signal, sys
from test_prepare import TinyEncoder, prepare
source, out, moment = sys.argv[1:]
def watch(event, arguments):
    if event == "os.rename" and os.path.basename(arguments[1]) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
prepare(source, out, resolution=32, batch=4, encoder=TinyEncoder(), shard_items=10, workers=2)
"""


@pytest.mark.slow
def test_other_numbers_of_workers_go_on(tmp_path: Path, forks: Forks) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, people=12, photos=3)
    (photos / "person 03" / "text.jpg").write_text("not an image")
    assert forks.run(PARENT, str(photos), str(out), "shard-00001.json").returncode == -signal.SIGKILL
    (photos / "person 00" / "4.jpg").write_bytes(jpeg(900))  # before photos that are written, and read as the next one
    (out / "shard-00009.arrow").write_bytes(b"of a worker that was ahead")
    encoder = TinyEncoder()
    prepare(photos, out, encoder=encoder, **OPTIONS)
    assert sum(encoder.batches) == 27
    assert sorted(path.name for path in out.glob("*shard-*")) == [f"shard-0000{number}.arrow" for number in range(4)]
    whole = tmp_path / "whole"
    prepare(photos, whole, encoder=TinyEncoder(), **OPTIONS)
    assert [len(rows(folder)) for folder in (out, whole)] == [37, 37]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_of_a_worker(tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path / "photos", people=12, photos=3)
    options = OPTIONS | {"resolution": 64, "shard_items": 6, "workers": 1}
    with pytest.raises(OSError, match="No space left") as caught:
        prepare(tmp_path / "photos", small_disk / "out", encoder=TinyEncoder(), **options)
    assert str(caught.value.filename).startswith(f"{small_disk}/out/shard-")
    assert not multiprocessing.active_children()
    assert not list(small_disk.rglob(".*.tmp"))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray warns of its own settings
def test_ray_with_two_workers(
    splits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'vultus[scale]'")
    out = tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", PATHS)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        prepare(splits, out, encoder=Deadly(tmp_path), workers=2, engine="ray", split="train", **OPTIONS)
        assert (tmp_path / "died").exists()
        with pytest.raises(UserError, match=r"--workers 3: the Ray cluster has 2 CPUs"):
            prepare(splits, tmp_path / "3", encoder=TinyEncoder(), workers=3, engine="ray", **OPTIONS)
    finally:
        ray.shutdown()
    assert "Traceback" not in capfd.readouterr().err
    prepare(splits, tmp_path / "whole", encoder=TinyEncoder(), split="train", **OPTIONS)
    assert content(out) == content(tmp_path / "whole")


def test_ray_needs_a_number_of_workers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["prepare", str(tmp_path), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert capsys.readouterr().err == "vultus: error: --engine ray needs --workers, the number of processes\n"

"""Tasks in several processes: order, memory, and workers that die. A worker is a real process."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vultus._engines import ATTEMPTS, run_tasks
from vultus.errors import UserError

Task = tuple[int, str]  # a number, and what happens


def make(folder: Path) -> Callable[[Task], tuple[int, int]]:
    """The function of a worker: number and name of the task -> ten times the number, and the id of the process."""
    (folder / f"made-{os.getpid()}").touch(exist_ok=False)

    def work(task: Task) -> tuple[int, int]:
        number, what = task
        mark = folder / f"died-{number}"
        if what == "dies" or (what == "dies once" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "waits":
            deadline = time.monotonic() + 60
            while not (folder / "go").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        if what == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
        return 10 * number, os.getpid()

    return work


def refuse() -> Callable[[Task], None]:
    raise UserError("no weights")


def tasks(read: list[int], names: dict[int, str], count: int) -> Iterator[Task]:
    for number in range(count):
        read.append(number)
        yield number, names.get(number, "")


def test_a_killed_worker_s_task_is_done_again(tmp_path: Path) -> None:
    read: list[int] = []
    found: list[tuple[int, tuple[int, int]]] = []
    names = {0: "waits", 5: "dies once"}
    for number, result in run_tasks(functools.partial(make, tmp_path), tasks(read, names, 9), workers=2):
        found.append((number, result))
        assert len(read) <= len(found) + 4  # tasks are not read far ahead of the results
        if len(found) == 6:
            (tmp_path / "go").touch()
    assert found[0][0] == 1  # in the order of completion
    assert sorted((number, ten) for number, (ten, _) in found) == [(number, 10 * number) for number in range(9)]
    made = {int(path.name.removeprefix("made-")) for path in tmp_path.glob("made-*")}
    assert len(made) == 3  # two, and one in the place of the one that died
    assert {worker for _, (_, worker) in found} <= made
    assert not multiprocessing.active_children()


def test_ctrl_c_is_for_the_parent_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Iterator[Task]:
        yield 0, ""
        for worker in multiprocessing.active_children():  # the terminal sends it to all; this one is being started
            os.kill(worker.pid or 0, signal.SIGINT)
        yield 1, ""

    assert sorted(number for number, _ in run_tasks(functools.partial(make, tmp_path), interrupted(), workers=2)) == [
        0,
        1,
    ]
    assert capfd.readouterr().err == ""


def test_a_task_that_kills_every_worker(tmp_path: Path) -> None:
    results = run_tasks(functools.partial(make, tmp_path), [(0, ""), (1, "dies")], workers=1)
    assert next(results)[0] == 0
    with pytest.raises(UserError, match=r"a worker process died 3 times in \(1, 'dies'\) .* lower --workers"):
        next(results)
    assert len(list(tmp_path.glob("made-*"))) == ATTEMPTS
    assert not multiprocessing.active_children()


def test_an_error_ends_all_workers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        list(run_tasks(functools.partial(make, tmp_path), [(0, "waits"), (1, "full disk")], workers=2))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "shard")
    with pytest.raises(UserError, match="no weights"):
        list(run_tasks(refuse, [(0, "")], workers=1))
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""


def test_workers_end_with_the_generator_and_with_the_parent(tmp_path: Path) -> None:
    results = run_tasks(functools.partial(make, tmp_path), [(0, ""), (1, "waits")], workers=2)
    next(results)
    results.close()
    assert not multiprocessing.active_children()

    folder = tmp_path / "of another parent"
    folder.mkdir()
    parent = multiprocessing.get_context("spawn").Process(target=_consume, args=(folder,))
    parent.start()
    deadline = time.monotonic() + 60
    while not (made := list(folder.glob("made-*"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.join()
    worker = int(made[0].name.removeprefix("made-"))
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(worker)


def _consume(folder: Path) -> None:
    list(run_tasks(functools.partial(make, folder), [(0, "waits")], workers=1))


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_task_starts_no_worker() -> None:
    assert list(run_tasks(refuse, [], workers=2)) == []
    assert list(run_tasks(refuse, [], workers=2, engine="ray")) == []


def test_ray_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'--engine ray needs the extra: pip install "vultus\[scale\]"'):
        list(run_tasks(refuse, [(0, "")], workers=2, engine="ray"))

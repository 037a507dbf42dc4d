"""Run independent tasks in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

from vultus._files import processors
from vultus.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

Engine = Literal["processes", "ray"]
ATTEMPTS = 3  # workers that may die of a task


def run_tasks(
    make: Callable[[], Callable[[T], R]], tasks: Iterable[T], *, workers: int, engine: Engine = "processes"
) -> Generator[tuple[int, R], None, None]:
    """Yield (number of the task, its result) in the order of completion. The end of the generator ends the workers.

    Args:
        make: called once by each worker, for the function that it calls with each task. It is pickled, as are the tasks
            and results.
        tasks: read while the results are consumed, at most 2 * `workers` tasks ahead of them. Messages name a task by
            its `str`.
        workers: number of processes; the processors are divided among them, at least one thread each.
        engine: "processes" of this machine, or "ray": actors of Ray Data, on the cluster that the environment variable
            RAY_ADDRESS names, or else on this machine.

    A task whose worker process dies is given to another one. Raises UserError if ATTEMPTS of them died of one task, the
    exception of a task, or that of `make`.
    """
    if engine == "ray":
        from vultus._ray_engine import run_on_ray

        return run_on_ray(make, tasks, workers)
    return _run_in_processes(make, tasks, workers)


def check_workers(workers: int | None, engine: Engine) -> None:
    """Raise UserError for an engine other than this process without a number of workers."""
    if engine == "ray" and workers is None:
        raise UserError("--engine ray needs --workers, the number of processes")


def died(task: object) -> UserError:
    """The error for a task of which ATTEMPTS workers died."""
    return UserError(
        f"a worker process died {ATTEMPTS} times in {str(task)[:100]} (killed, or out of memory); lower --workers, or "
        "free some memory, then run the same command again"
    )


@dataclass(slots=True)
class _Pool:
    """A process, and its tasks: the first is computed, the second waits."""

    executor: ProcessPoolExecutor
    tasks: collections.deque[tuple[int, Any]] = field(default_factory=collections.deque)
    futures: collections.deque[Future[Any]] = field(default_factory=collections.deque)

    def submit(self, number: int, task: Any) -> None:
        self.tasks.append((number, task))
        try:
            with _without_ctrl_c():
                self.futures.append(self.executor.submit(_call, task))  # starts the process, if there is none
        except BrokenProcessPool as error:  # it died after its last task
            self.futures.append(Future())
            self.futures[-1].set_exception(error)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Hold SIGINT back. A process that is started here never gets it, also not before `_begin`; Windows has no mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_in_processes(
    make: Callable[[], Callable[[T], R]], tasks: Iterable[T], workers: int
) -> Generator[tuple[int, R], None, None]:
    # A pool of one process each: of a larger one, the death of a process ends all, and does not tell the task.
    context = multiprocessing.get_context("spawn")
    ended, running = context.Pipe(duplex=False)
    threads = max(1, processors() // workers)

    def start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, context, _begin, (make, ended, threads))

    pools: list[_Pool] = []
    attempts: collections.Counter[int] = collections.Counter()
    numbered = enumerate(tasks)
    try:
        for number, task in itertools.islice(numbered, workers):
            pools.append(_Pool(start()))
            pools[-1].submit(number, task)
        for pool, (number, task) in zip(pools, itertools.islice(numbered, workers), strict=False):
            pool.submit(number, task)
        while any(pool.tasks for pool in pools):
            concurrent.futures.wait(
                [pool.futures[0] for pool in pools if pool.futures], return_when=concurrent.futures.FIRST_COMPLETED
            )
            for pool in pools:
                if not pool.futures or not pool.futures[0].done():
                    continue
                number, task = pool.tasks[0]
                try:
                    result = pool.futures[0].result()
                except BrokenProcessPool:
                    attempts[number] += 1
                    if attempts[number] == ATTEMPTS:
                        raise died(task) from None
                    pool.executor.shutdown()
                    again, pool.executor = list(pool.tasks), start()
                    pool.tasks.clear()
                    pool.futures.clear()
                    for number, task in again:
                        pool.submit(number, task)
                    continue
                pool.tasks.popleft()
                pool.futures.popleft()
                yield number, result
                for number, task in itertools.islice(numbered, 1):
                    pool.submit(number, task)
    finally:
        running.close()
        for pool in pools:
            pool.executor.shutdown(cancel_futures=True)
        ended.close()


# --- in the worker ---------------------------------------------------------------------------------------------------

_make: Callable[[], Callable[[Any], Any]]
_function: Callable[[Any], Any] | None = None


def _begin(make: Callable[[], Callable[[Any], Any]], ended: Connection, threads: int) -> None:
    """Initialize a worker process."""
    global _make
    _make = make
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    threading.Thread(target=_end_with_parent, args=(ended,), daemon=True).start()
    set_threads(threads)


def set_threads(count: int) -> None:
    """Set the number of threads of this process's computations."""
    os.environ["OMP_NUM_THREADS"] = str(count)  # is read when torch is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def _end_with_parent(ended: Connection) -> None:
    """End the process when the parent closes its end of the pipe, or dies."""
    with contextlib.suppress(OSError):  # how Windows says so
        ended.poll(None)
    os._exit(1)


def _call(task: Any) -> Any:
    global _function
    if _function is None:
        _function = _make()
    return _function(task)

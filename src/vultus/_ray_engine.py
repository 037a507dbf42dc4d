"""The engine "ray" of _engines.py: Ray Data, whose actors hold the function.

Ray Data reads its input ahead of the results, and knows no input that the driver makes bit by bit. Its input is
therefore the numbers of the tasks, which a first operator yields as they come. The tasks themselves are in an actor.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from vultus._engines import ATTEMPTS, died, set_threads
from vultus._files import processors
from vultus.errors import UserError, in_one_line

T = TypeVar("T")
R = TypeVar("R")


class _Feed:
    """The tasks that have no result yet, as an actor."""

    def __init__(self) -> None:
        self._tasks: dict[int, bytes] = {}
        self._attempts: collections.Counter[int] = collections.Counter()
        self._count = 0
        self._ended = False
        self._changed = asyncio.Event()

    async def put(self, number: int, task: bytes) -> None:
        """Add a task."""
        self._tasks[number] = task
        self._count = number + 1
        self._changed.set()

    async def end(self) -> None:
        """There is no further task."""
        self._ended = True
        self._changed.set()

    async def has(self, number: int) -> bool:
        """Wait until the task is there. False if there is none."""
        while number >= self._count and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        return number < self._count

    async def begin(self, number: int) -> tuple[bytes, bool]:
        """The task, and whether fewer than ATTEMPTS workers have begun it before."""
        self._attempts[number] += 1
        return self._tasks[number], self._attempts[number] <= ATTEMPTS

    async def drop(self, number: int) -> None:
        """Forget a task that has a result."""
        del self._tasks[number], self._attempts[number]


def _numbers(_: Any, feed: Any) -> Iterator[dict[str, Any]]:
    import ray

    for number in itertools.count():
        if not ray.get(feed.has.remote(number)):
            return
        yield {"number": np.array([number])}


class _Worker:
    """An actor: makes the function once and calls it for each task."""

    def __init__(self, make: bytes, feed: Any, threads: int) -> None:
        set_threads(threads)
        self._make, self._feed = make, feed
        self._function: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"number": [1]} -> {"result": [1]}, the pickled (number, result, exception)."""
        import ray

        number = int(batch["number"][0])
        result, error = None, None
        pickled, again = ray.get(self._feed.begin.remote(number))
        try:
            task = pickle.loads(pickled)
            if not again:
                raise died(task)
            if self._function is None:
                self._function = pickle.loads(self._make)()
            result = self._function(task)
        except Exception as raised:  # Ray would print it with its traceback
            error = raised
        return {"result": [pickle.dumps((number, result, error))]}


def run_on_ray(
    make: Callable[[], Callable[[T], R]], tasks: Iterable[T], workers: int
) -> Generator[tuple[int, R], None, None]:
    """See run_tasks."""
    numbered = enumerate(tasks)
    ahead = list(itertools.islice(numbered, 2 * workers))
    if not ahead:
        return
    workers = min(workers, len(ahead))
    with _cluster(workers) as (ray, cpus, gpus):
        feed = ray.remote(_Feed).options(num_cpus=0).remote()
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = 1  # bytes: a block for each row
        try:
            for number, task in ahead:
                ray.get(feed.put.remote(number, ray.cloudpickle.dumps(task)))
            with ray.data.DataContext.current(context):
                results = iter(
                    ray.data.from_items([0])
                    .map_batches(_numbers, fn_kwargs={"feed": feed}, num_cpus=0)
                    .map_batches(
                        _Worker,
                        fn_constructor_args=(ray.cloudpickle.dumps(make), feed, cpus),
                        batch_size=1,
                        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
                        num_cpus=cpus,
                        num_gpus=gpus,
                    )
                    .iter_batches(batch_size=None, prefetch_batches=0)
                )
            count = len(ahead)
            ahead.clear()
            for done in itertools.count(1):
                number, result, error = pickle.loads(next(results)["result"][0])
                if error is not None:
                    raise error
                ray.get(feed.drop.remote(number))
                yield number, result
                for number, task in itertools.islice(numbered, 1):
                    ray.get(feed.put.remote(number, ray.cloudpickle.dumps(task)))
                    count += 1
                if done == count:
                    return
        except ray.exceptions.RayError as error:
            raise UserError(f"the Ray cluster failed ({in_one_line(error)}); run the same command again") from None
        finally:
            ray.get(feed.end.remote())
            results = None
            ray.kill(feed)


@contextlib.contextmanager
def _cluster(workers: int) -> Iterator[tuple[Any, int, float | None]]:
    """(ray, CPUs, GPUs of a worker) of a cluster that runs, or of a new one on this machine, which ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError('--engine ray needs the extra: pip install "vultus[scale]"') from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        new: dict[str, Any] = {} if address else {"num_cpus": max(workers, processors()), "include_dashboard": False}
        try:
            ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **new)
        except (ConnectionError, RuntimeError, ValueError) as error:
            place = f"RAY_ADDRESS {address}" if address else "--engine ray"
            raise UserError(f"{place}: no Ray cluster can be used ({in_one_line(error)})") from None
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        gpus = sum(node.get("GPU", 0) for node in nodes)
        if sum(cpus) < workers:
            raise UserError(f"--workers {workers}: the Ray cluster has {sum(cpus)} CPUs; give at most as many")
        # The most with which all workers find a place.
        share = next(n for n in range(sum(cpus) // workers, 0, -1) if sum(count // n for count in cpus) >= workers)
        yield ray, share, min(1.0, gpus / workers) if gpus else None
    finally:
        if ours:
            ray.shutdown()

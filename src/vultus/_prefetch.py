"""An iterator that runs in a thread of its own, a bounded number of steps ahead of its reader."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterate over `source` at most `count` values ahead; an error in `source` is raised where the values are taken.

    Use it as a context: at the end the thread is stopped and `source` closed, whatever was left in it.
    """

    def __init__(self, source: Generator[T, None, None], count: int) -> None:
        """Nothing runs before the context is entered."""
        self._source = source
        self._queue: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(count)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vultus-ahead", daemon=True)

    def __enter__(self) -> Iterator[T]:
        """Start the thread; the values of `source`, once."""
        self._thread.start()
        return self._values()

    def __exit__(self, *_: object) -> None:
        """Stop the thread, which closes `source`."""
        self._stopped.set()
        # A read that hangs in the network is left to die with the process.
        self._thread.join(timeout=5)

    def _values(self) -> Iterator[T]:
        while (taken := self._queue.get()) is not None:
            if isinstance(taken, BaseException):
                raise taken
            yield taken[0]

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            with contextlib.closing(self._source):
                for value in self._source:
                    if not self._put((value,)):
                        return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, value: tuple[T] | BaseException | None) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(value, timeout=0.2)
                return True
        return False

"""Prefetch: run an iterator in a thread, a bounded number of values ahead of its consumer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterate over `source` at most `count` values ahead. An exception of `source` is raised in the consumer.

    A context manager: its end stops the thread and closes `source`, also if values remain.
    """

    def __init__(
        self, source: Generator[T, None, None], count: int, *, ended: Callable[[], bool] | None = None
    ) -> None:
        """The thread starts when the context is entered. When `ended` is true while the consumer waits, it gets no more
        values."""
        self._ended = ended
        self._source = source
        self._queue: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(count)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vultus-prefetch", daemon=True)

    def __enter__(self) -> Iterator[T]:
        """Start the thread and return an iterator over the values of `source`."""
        self._thread.start()
        return self._values()

    def __exit__(self, *_: object) -> None:
        """Stop the thread, which closes `source`."""
        self._stopped.set()
        # A thread that hangs in a network read is a daemon: it ends with the process.
        self._thread.join(timeout=5)

    def _values(self) -> Iterator[T]:
        while (entry := self._get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]

    def _get(self) -> tuple[T] | BaseException | None:
        while self._ended is not None:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=0.2)
            if self._ended():
                return None
        return self._queue.get()

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

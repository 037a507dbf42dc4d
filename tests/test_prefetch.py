"""Prefetch: order, bound, errors, and the end of its thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from vultus._prefetch import Prefetch


def test_order_is_kept() -> None:
    with Prefetch((number for number in range(1000)), 7) as values:
        assert list(values) == list(range(1000))


def test_it_runs_ahead_within_its_bound() -> None:
    produced = 0

    def source() -> Generator[int, None, None]:
        nonlocal produced
        for number in range(10_000):
            produced += 1
            yield number

    with Prefetch(source(), 5) as values:
        for consumed in range(1, 50):
            next(values)
            assert produced <= consumed + 5 + 1  # the queue, and one value that does not fit into it
        deadline = time.monotonic() + 10
        while produced < consumed + 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert produced in (consumed + 5, consumed + 6)


def test_an_error_comes_after_the_values_before_it() -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    values_read = []
    with Prefetch(source(), 5) as values, pytest.raises(OSError, match="the disk is gone"):
        values_read.extend(values)
    assert values_read == [1, 2]


def test_leaving_early_closes_the_source_and_ends_the_thread() -> None:
    closed = threading.Event()

    def source() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    with Prefetch(source(), 3) as values:
        next(values)
    assert closed.is_set()
    assert threading.active_count() == before


def test_a_consumer_that_waits_can_be_released() -> None:
    """The values that are there already come first."""
    release = threading.Event()

    def source() -> Generator[int, None, None]:
        yield from (1, 2)
        release.wait(10)

    ended = [False]
    with Prefetch(source(), 5, ended=lambda: ended[0]) as values:
        assert next(values) == 1
        ended[0] = True
        assert list(values) == [2]
        release.set()

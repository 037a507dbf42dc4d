"""The memory that the allocator keeps after a crowd of requests goes back to the system when no work is in progress."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
import torch

from vultus.serving import memory
from vultus.serving.limits import LoadLimiter

pytestmark = pytest.mark.skipif(not memory.available, reason="the C library is not glibc")


def mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


async def true_within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        await asyncio.sleep(0.01)
    return condition()


@contextlib.asynccontextmanager
async def releasing(limiter: LoadLimiter, quiet: float, longest: float) -> AsyncIterator[None]:
    task = asyncio.create_task(memory.release_when_idle(limiter, quiet, longest))
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_free_memory_is_given_back_when_no_work_is_in_progress() -> None:
    blocks = [torch.ones(16384) for _ in range(4096)]  # of 64 KiB each: too small for pages of their own
    full = mib()
    kept = blocks[::64]
    del blocks
    assert full - mib() < 50, "the allocator keeps what lies between tensors in use"

    async def run() -> bool:
        limiter = LoadLimiter(10)
        async with releasing(limiter, quiet=0.05, longest=0.1):
            with limiter.reserve(1):
                assert not await true_within(0.5, lambda: full - mib() > 50)
            return await true_within(10, lambda: full - mib() > 200)

    assert asyncio.run(run())
    assert all(block[0] == 1 for block in kept)


@pytest.mark.parametrize("longest", [60.0, 0.0])
def test_steady_work_is_disturbed_at_long_intervals_only(longest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(memory, "release_free_memory", lambda: calls.append(time.monotonic()))

    async def run() -> None:
        limiter = LoadLimiter(10)
        pauses = 0  # of this process, on a busy machine
        async with releasing(limiter, quiet=0.2, longest=longest):
            for _ in range(200):
                with limiter.reserve(1):
                    pass
                await asyncio.sleep(0.01)
                pauses += time.monotonic() - limiter.ended >= 0.2
            during = len(calls)
            assert during >= 2 if longest == 0 else during <= pauses
            assert await true_within(10, lambda: len(calls) > during), "once work has ended"
            assert not await true_within(0.6, lambda: len(calls) > during + 1), "not again without work in between"

    asyncio.run(run())

"""The memory that the allocator keeps after a crowd of requests goes back to the system when no work is in progress."""

from __future__ import annotations

import asyncio
import contextlib

import psutil
import pytest
import torch

from vultus.serving import memory
from vultus.serving.limits import LoadLimiter


@pytest.mark.skipif(not memory.available, reason="the C library is not glibc")
def test_free_memory_is_given_back_while_no_work_is_in_progress() -> None:
    process = psutil.Process()

    def mib() -> float:
        return process.memory_info().rss / 2**20

    blocks = [torch.ones(16384) for _ in range(4096)]  # of 64 KiB each: too small for pages of their own
    full = mib()
    kept = blocks[::64]
    del blocks
    assert full - mib() < 50, "the allocator keeps what lies between tensors in use"

    async def while_working_and_then() -> tuple[float, float]:
        limiter = LoadLimiter(10)
        releasing = asyncio.create_task(memory.release_when_idle(limiter, interval=0.01))
        with limiter.reserve(1):
            await asyncio.sleep(0.2)
            working = mib()
        deadline = asyncio.get_running_loop().time() + 10
        while full - mib() < 200 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        releasing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await releasing
        return working, mib()

    working, idle = asyncio.run(while_working_and_then())
    assert full - working < 50
    assert full - idle > 200
    assert all(block[0] == 1 for block in kept)

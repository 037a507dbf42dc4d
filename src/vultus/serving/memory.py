"""Memory that the allocator keeps after its use, given back to the system.

The tensors of a call are freed after it, but glibc's `malloc` keeps most of their pages: requests that come in crowds
of changing size leave holes between them, and the resident memory of a server with the embedded snapshot creeps from
0.8 to 1.4 GB. `malloc_trim` gives back every free page, in 20 to 30 ms after such a crowd, else in less than 1 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Callable

from vultus.serving.limits import LoadLimiter

QUIET = 4.0  # seconds without work
LONGEST = 60.0  # seconds between two releases where there is always some work: pages that come back must be cleared


def _find_trim() -> Callable[[int], int] | None:
    if os.name != "posix":
        return None
    with contextlib.suppress(OSError, AttributeError):
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    return None


_trim = _find_trim()
available = _trim is not None  # with glibc; other allocators are left alone


def release_free_memory() -> None:
    """Give the free pages of the C library's allocator back to the system. Does nothing without glibc.

    Other threads that allocate may wait for it. The interpreter does not: ctypes releases its lock.
    """
    if _trim is not None:
        _trim(0)


async def release_when_idle(limiter: LoadLimiter, quiet: float = QUIET, longest: float = LONGEST) -> None:
    """Call `release_free_memory` after work, until it is cancelled.

    It is called when no work has been in progress for `quiet` to 2 `quiet` seconds, and after `longest` seconds in any
    case at the next look at which none is in progress.
    """
    released = time.monotonic()
    while available:
        await asyncio.sleep(quiet)
        now = time.monotonic()
        if limiter.load or limiter.ended <= released:
            continue
        if now - limiter.ended >= quiet or now - released >= longest:
            released = now
            await asyncio.to_thread(release_free_memory)

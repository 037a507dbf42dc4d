"""Limits that keep the server responsive: work in progress and bytes of request bodies. For the event loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator

from fastapi import Request

from vultus.serving.errors import ApiError


class Overloaded(ApiError):
    """429: the server has too much work. `seconds`: when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(429, f"the server is overloaded; try again in {seconds} s", {"Retry-After": str(seconds)})
        self.seconds = seconds


class LoadLimiter:
    """Limits the work that waits or is in progress, over all requests.

    The unit of work is the cost of one generated face. A request that costs more than the limit is admitted when
    nothing else is in progress.

    Args:
        limit: work that may wait or be in progress.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.load = 0
        self.ended = time.monotonic()  # of the last work
        self._seconds_per_unit = 0.05  # moving average of a request's duration, divided by the load at its start

    @contextlib.contextmanager
    def reserve(self, cost: int) -> Iterator[None]:
        """Count `cost` as in progress inside the block. Raises Overloaded if the limit would be exceeded."""
        if self.load and self.load + cost > self.limit:
            raise Overloaded(max(1, math.ceil(self.load * self._seconds_per_unit)))
        self.load += cost
        load, started = self.load, time.monotonic()
        try:
            yield
        finally:
            self.load -= cost
            self.ended = time.monotonic()
            self._seconds_per_unit += 0.1 * ((self.ended - started) / load - self._seconds_per_unit)


class BodyReader:
    """Reads request bodies, with a limit for each and one for all that are in memory.

    Args:
        limit: bytes of all bodies together.
        timeout: seconds for a body to arrive.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self.limit, self.timeout, self.held = limit, timeout, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """The body, at most `limit` bytes, which count as held inside the block.

        Raises ApiError: 408 too slow, 413 too large (while it arrives), 422 empty, 429 too many bytes in memory.
        """
        body = bytearray()
        too_large = ApiError(413, f"the body is larger than the limit of {limit} bytes", {"Connection": "close"})
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            try:
                async with asyncio.timeout(self.timeout):
                    async for chunk in request.stream():
                        if len(body) + len(chunk) > limit:
                            raise too_large
                        if self.held + len(chunk) > self.limit:
                            raise ApiError(429, "too many uploads at once; try again", {"Retry-After": "1"})
                        body += chunk
                        self.held += len(chunk)
            except TimeoutError:
                detail = f"the body did not arrive within {self.timeout:g} s"
                raise ApiError(408, detail, {"Connection": "close"}) from None
            if not body:
                raise ApiError(422, "the body is empty")
            yield bytes(body)
        finally:
            self.held -= len(body)

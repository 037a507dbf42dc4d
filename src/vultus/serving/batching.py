"""Faces of many requests in few calls of the generator, and a bound on how many may wait.

On a CPU 16 faces in one call take two fifths of the time of 16 calls (the embedded snapshot, one core: 95 against 38
faces/s); on a graphics card far less. So what is asked for within a few milliseconds is drawn together, in calls of 1,
2, 4, 8 or 16 faces, filled up to the next of these sizes.

What this means for the last bit: libraries choose other kernels for other sizes, float32 sums then differ in their last
bits, and about one pixel value in 30,000 to 100,000 rounds to the next integer. A face is therefore the same function
of (snapshot, embedding, seed, variant) for whoever asks, except that such a pixel value may differ by 1 with the size
of the call that it came in. One size alone, `sizes=(16,)`, leaves no such difference, neither from request to request
nor from generate.py, and a single face takes six times as long.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vultus.images.io import to_images
from vultus.models.generators import GeneratorNetwork

SIZES = (1, 2, 4, 8, 16)  # faces to a call
WINDOW = 0.003  # seconds that a face waits for others


class Busy(Exception):
    """No room for more work. `seconds` from now there should be."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"busy; try again in {seconds} s")
        self.seconds = seconds


class Gate:
    """A bound on the work that is in the house: waiting or being done. For one thread.

    Work is counted in faces, whatever else it is. One piece of work larger than the bound may pass alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._seconds = 0.05  # for each face in the house until one's own is done: a moving average

    @contextmanager
    def hold(self, faces: int) -> Iterator[None]:
        """Hold room for so many faces. Raises Busy if there is none."""
        if self.held and self.held + faces > self.limit:
            raise Busy(max(1, math.ceil(self.held * self._seconds)))
        self.held += faces
        among, begun = self.held, time.monotonic()
        try:
            yield
        finally:
            self.held -= faces
            self._seconds += 0.1 * ((time.monotonic() - begun) / among - self._seconds)


@dataclass
class _Job:
    z: Tensor  # [n, z_dim]
    c: Tensor  # [n, c_dim]
    images: Tensor  # uint8 [n, 3, R, R], filled face by face
    left: int
    done: Future[Tensor] = field(default_factory=Future)


class Batcher:
    """Threads that share the generator. Each takes what has waited longest, as many faces as fit in one call.

    With several `calls`, the next one begins beside those under way only once it is full; else what waits would be
    drawn in many small calls, which costs more in all.

    Args:
        sizes: faces to a call.
        window: seconds that a face waits for others while nothing is being drawn.
        calls: how many may be under way at a time.
        after: what to do with the faces of a call, uint8 [n, 3, R, R], before they are handed out.
        observe: told the faces and the seconds of each call.
    """

    def __init__(
        self,
        generator: GeneratorNetwork,
        *,
        sizes: Sequence[int] = SIZES,
        window: float = WINDOW,
        calls: int = 1,
        after: Callable[[Tensor], Tensor] | None = None,
        observe: Callable[[int, float], None] = lambda faces, seconds: None,
    ) -> None:
        self.generator, self.sizes, self.window = generator, sorted(sizes), window
        self.after, self.observe = after, observe
        self._device = next(generator.parameters()).device
        self._waiting: deque[tuple[_Job, int]] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._under_way = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"generator-{number}", daemon=True) for number in range(calls)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, z: Tensor, c: Tensor) -> Future[Tensor]:
        """z [n, z_dim], c [n, c_dim] -> a future of uint8 [n, 3, R, R]. Cancelling it takes back what waits."""
        side = self.generator.resolution
        job = _Job(z, c, torch.empty(len(z), 3, side, side, dtype=torch.uint8), len(z))
        with self._change:
            if self._closing:
                raise RuntimeError("the generator is closed")
            self._waiting.extend((job, row) for row in range(len(z)))
            self._change.notify_all()
        return job.done

    def warm_up(self) -> None:
        """One call of each size, so that the first request finds everything loaded."""
        for size in self.sizes:
            self._draw(torch.zeros(size, self.generator.z_dim), torch.ones(size, self.generator.c_dim))

    def close(self) -> None:
        """Draw what waits, then end the threads."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while rows := self._next():
            error, images = None, None
            try:
                begun = time.perf_counter()
                z, c = (torch.stack([getattr(job, name)[row] for job, row in rows]) for name in ("z", "c"))
                drawn = self._draw(z, c)
                self.observe(len(rows), time.perf_counter() - begun)
                images = self.after(drawn) if self.after else drawn
            except Exception as raised:
                error = raised
            with self._change:
                self._under_way -= 1
                self._hand_out(rows, images, error)
                self._change.notify_all()

    def _hand_out(self, rows: list[tuple[_Job, int]], images: Tensor | None, error: Exception | None) -> None:
        """Faces into the jobs that they belong to, or the error. The faces of a job may come from several calls."""
        for number, (job, row) in enumerate(rows):
            if images is not None:
                job.images[row] = images[number]
            job.left -= 1
            if job.done.done():
                continue
            if error is not None:
                job.done.set_exception(error)
            elif not job.left:
                job.done.set_result(job.images)

    def _next(self) -> list[tuple[_Job, int]]:
        """The faces of the next call; none when all is done and the house closes."""
        most = self.sizes[-1]
        with self._change:
            while True:
                while not self._waiting or (self._under_way and len(self._waiting) < most and not self._closing):
                    if self._closing:
                        return []
                    self._change.wait()
                self._under_way += 1
                until = time.monotonic() + self.window
                while len(self._waiting) < most and not self._closing and (left := until - time.monotonic()) > 0:
                    self._change.wait(left)
                rows: list[tuple[_Job, int]] = []
                while self._waiting and len(rows) < most:
                    job, row = self._waiting.popleft()
                    # A job may be cancelled, or have failed with its first faces. Once under way it can't be cancelled.
                    if not job.done.done() and (job.done.running() or job.done.set_running_or_notify_cancel()):
                        rows.append((job, row))
                if rows:
                    return rows
                self._under_way -= 1

    @torch.inference_mode()
    def _draw(self, z: Tensor, c: Tensor) -> Tensor:
        count = len(z)
        spare = next(size for size in self.sizes if size >= count) - count
        z, c = (torch.cat([part, part.new_zeros(spare, part.shape[1])]) for part in (z, c))
        return to_images(self.generator(z.to(self._device), c.to(self._device))[:count]).cpu()

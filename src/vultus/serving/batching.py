"""Dynamic batching: the faces of several requests are generated in one call of the generator.

On a CPU 16 faces in one call take 40 % of the time of 16 calls (embedded snapshot, one core: 95 against 38 faces/s); on
a GPU far less. So requests that arrive within a few milliseconds share a call. Calls have a batch of 1, 2, 4, 8 or 16
and are padded to the next of these sizes.

Rounding: libraries choose different kernels for different batch sizes, whose float32 sums differ in the last bits, and
about one pixel value in 30,000 to 100,000 rounds to the neighbouring integer. A face is therefore a function of
(snapshot, embedding, seed, variant), except that such pixel values may differ by 1 with the batch size. A single batch
size, `sizes=(16,)`, avoids the difference, between requests and to `vultus generate`, but a single face then takes six
times as long.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vultus.images.io import to_images
from vultus.models.generators import GeneratorNetwork

BATCH_SIZES = (1, 2, 4, 8, 16)
MAX_WAIT = 0.003  # seconds that a face waits for others to share its call


@dataclass
class _Job:
    z: Tensor  # [n, z_dim]
    c: Tensor  # [n, c_dim]
    images: Tensor  # uint8 [n, 3, R, R], filled face by face
    remaining: int  # faces that are not in `images` yet
    future: Future[Tensor] = field(default_factory=Future)


_Row = tuple[_Job, int]  # one face: its job and its index in it


class Batcher:
    """Threads that share the generator. Each takes the faces that have waited longest, as many as fit into one call.

    With `concurrent_calls` > 1 a further call starts beside those in progress only when it is full: many small calls
    would cost more than waiting.

    Args:
        generator: in eval mode, on the device that generates.
        sizes: batch sizes of a call.
        max_wait: seconds that a face waits for others while no call is in progress.
        concurrent_calls: calls that may be in progress at the same time.
        postprocess: applied to the images of a call, uint8 [n, 3, R, R] -> the same.
        observe: called with the number of faces and the seconds of each call.
    """

    def __init__(
        self,
        generator: GeneratorNetwork,
        *,
        sizes: Sequence[int] = BATCH_SIZES,
        max_wait: float = MAX_WAIT,
        concurrent_calls: int = 1,
        postprocess: Callable[[Tensor], Tensor] | None = None,
        observe: Callable[[int, float], None] = lambda faces, seconds: None,
    ) -> None:
        self.generator, self.sizes, self.max_wait = generator, sorted(sizes), max_wait
        self.postprocess, self.observe = postprocess, observe
        self._device = next(generator.parameters()).device
        self._waiting: deque[_Row] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._in_progress = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"generator-{number}", daemon=True)
            for number in range(concurrent_calls)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, z: Tensor, c: Tensor) -> Future[Tensor]:
        """z [n, z_dim], c [n, c_dim] -> a future of uint8 [n, 3, R, R]. Cancelling it removes what still waits.

        Raises RuntimeError after `close`.
        """
        resolution = self.generator.resolution
        job = _Job(z, c, torch.empty(len(z), 3, resolution, resolution, dtype=torch.uint8), len(z))
        with self._condition:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._waiting.extend((job, index) for index in range(len(z)))
            self._condition.notify_all()
        return job.future

    def warm_up(self) -> None:
        """Run one call of each batch size, so that the first request does not pay for initialisation."""
        for size in self.sizes:
            self._generate(torch.zeros(size, self.generator.z_dim), torch.ones(size, self.generator.c_dim))

    def close(self) -> None:
        """Generate what still waits, then end the threads."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while rows := self._next_batch():
            error, images = None, None
            try:
                started = time.perf_counter()
                z, c = (torch.stack([getattr(job, name)[index] for job, index in rows]) for name in ("z", "c"))
                images = self._generate(z, c)
                self.observe(len(rows), time.perf_counter() - started)
                if self.postprocess:
                    images = self.postprocess(images)
            except Exception as raised:
                error, images = raised, None
            with self._condition:
                self._in_progress -= 1
                self._deliver(rows, images, error)
                self._condition.notify_all()

    def _deliver(self, rows: list[_Row], images: Tensor | None, error: Exception | None) -> None:
        """Store the images of a call in their jobs, or fail the jobs. A job's faces may come from several calls."""
        for number, (job, index) in enumerate(rows):
            if images is not None:
                job.images[index] = images[number]
            job.remaining -= 1
            if job.future.done():
                continue
            if error is not None:
                job.future.set_exception(error)
            elif not job.remaining:
                job.future.set_result(job.images)

    def _next_batch(self) -> list[_Row]:
        """Wait for the faces of the next call; empty when the batcher is closed and nothing waits."""
        largest = self.sizes[-1]
        with self._condition:
            while True:
                while not self._waiting or (self._in_progress and len(self._waiting) < largest and not self._closing):
                    if self._closing:
                        return []
                    self._condition.wait()
                self._in_progress += 1
                deadline = time.monotonic() + self.max_wait
                while len(self._waiting) < largest and not self._closing and (left := deadline - time.monotonic()) > 0:
                    self._condition.wait(left)
                rows: list[_Row] = []
                while self._waiting and len(rows) < largest:
                    job, index = self._waiting.popleft()
                    # Skip faces of a job that was cancelled, or that failed with its first faces.
                    # A running future can't be cancelled.
                    if not job.future.done() and (job.future.running() or job.future.set_running_or_notify_cancel()):
                        rows.append((job, index))
                if rows:
                    return rows
                self._in_progress -= 1

    @torch.inference_mode()
    def _generate(self, z: Tensor, c: Tensor) -> Tensor:
        count = len(z)
        padding = next(size for size in self.sizes if size >= count) - count
        z, c = (torch.cat([part, part.new_zeros(padding, part.shape[1])]) for part in (z, c))
        return to_images(self.generator(z.to(self._device), c.to(self._device))[:count]).cpu()

"""Dynamic batching: the same faces in few calls of fixed sizes, none lost; and the load limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_parts import DIM, TinyGenerator, Z
from vultus.images.io import to_images
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.latents import noise
from vultus.serving.batching import Batcher
from vultus.serving.limits import LoadLimiter, Overloaded


class RecordingGenerator(TinyGenerator):
    """Records the batch size of each call, can be paused, and fails for noise that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.running = threading.Event()
        self.running.set()
        self.started = threading.Event()

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        self.started.set()
        assert self.running.wait(10)
        self.calls.append(len(z))
        if not z.isfinite().all():
            raise FloatingPointError("noise")
        return super().forward(z, c)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    generator = RecordingGenerator()
    batcher = Batcher(generator, max_wait=0.02)
    yield batcher
    generator.running.set()
    batcher.close()


def faces(seed: int, count: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, Z, generator=random), torch.randn(count, DIM, generator=random)


def test_every_request_gets_its_own_faces(batcher: Batcher) -> None:
    """40 threads request 1 to 20 faces each, at the same time."""
    requests = [faces(number, 1 + number % 20) for number in range(40)]
    with ThreadPoolExecutor(40) as pool:
        results = list(pool.map(lambda request: batcher.submit(*request).result(10), requests))
    for (z, c), images in zip(requests, results, strict=True):
        expected = to_images(TinyGenerator()(z, c))
        assert images.shape == expected.shape
        assert images.dtype == torch.uint8
        assert int((images.int() - expected.int()).abs().max()) <= 1
    calls = batcher.generator.calls  # type: ignore[attr-defined]
    assert set(calls) <= {1, 2, 4, 8, 16}
    assert len(calls) <= 40, "the requests share calls"


def test_waiting_faces_share_one_call(batcher: Batcher) -> None:
    generator: Any = batcher.generator
    generator.running.clear()
    first = batcher.submit(*faces(0, 1))
    assert generator.started.wait(10)
    others = [batcher.submit(*faces(number, 1)) for number in range(1, 12)]
    generator.running.set()
    for future in (first, *others):
        assert future.result(10).shape == (1, 3, 32, 32)
    assert generator.calls == [1, 16], "the first alone, then 11 in one call, padded to 16"


def test_second_call_starts_only_when_full() -> None:
    generator = RecordingGenerator()
    batcher = Batcher(generator, max_wait=0.02, concurrent_calls=2, postprocess=lambda images: 255 - images)
    generator.running.clear()
    first = batcher.submit(*faces(0, 1))
    assert generator.started.wait(10)
    generator.started.clear()
    others = [batcher.submit(*faces(number, 5)) for number in range(1, 4)]
    assert not generator.started.wait(0.2), "15 faces wait for the call in progress"
    others.append(batcher.submit(*faces(4, 3)))
    assert generator.started.wait(10), "16 do not"
    generator.running.set()
    for number, future in enumerate((first, *others)):
        z, c = faces(number, len(future.result(10)))
        expected = 255 - to_images(TinyGenerator()(z, c))
        assert int((future.result().int() - expected.int()).abs().max()) <= 1
    batcher.close()
    assert sorted(generator.calls) == [1, 2, 16]


def test_cancelled_faces_are_not_generated(batcher: Batcher) -> None:
    generator: Any = batcher.generator
    generator.running.clear()
    first = batcher.submit(*faces(0, 1))
    assert generator.started.wait(10)
    cancelled = batcher.submit(*faces(1, 30))
    kept = batcher.submit(*faces(2, 2))
    assert cancelled.cancel()
    assert not first.cancel(), "its call is in progress"
    generator.running.set()
    assert kept.result(10).shape[0] == 2
    assert generator.calls == [1, 2]


def test_error_fails_only_its_own_request(batcher: Batcher) -> None:
    z, c = faces(0, 20)
    bad = batcher.submit(z * float("nan"), c)
    with pytest.raises(FloatingPointError):
        bad.result(10)
    assert batcher.submit(z, c).result(10).shape[0] == 20


def test_close_finishes_waiting_faces() -> None:
    generator = RecordingGenerator()
    batcher = Batcher(generator, max_wait=5)
    generator.running.clear()
    futures = [batcher.submit(*faces(number, 3)) for number in range(9)]
    threading.Timer(0.05, generator.running.set).start()
    batcher.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(*faces(0, 1))


def test_batch_size_changes_rounding_only() -> None:
    """One batch size gives the faces of render exactly; with several sizes few pixel values differ, by at most 1."""
    snapshot = load_snapshot(default_snapshot())
    c = gallery()[:5]
    z = noise(3, 0, 5, snapshot.network.z_dim)
    expected = render(snapshot.network, z, c)
    exact, default = Batcher(snapshot.network, sizes=(16,)), Batcher(snapshot.network)
    for batcher in (exact, default):
        batcher.warm_up()
    assert torch.equal(torch.cat([exact.submit(z[i : i + 1], c[i : i + 1]).result(30) for i in range(5)]), expected)
    for parts in ([5], [1, 4], [1, 1, 1, 2]):
        futures = [default.submit(a, b) for a, b in zip(z.split(parts), c.split(parts), strict=True)]
        difference = (torch.cat([future.result(30) for future in futures]).int() - expected.int()).abs()
        assert int(difference.max()) <= 1
        assert float((difference > 0).float().mean()) < 1e-3
    exact.close()
    default.close()


def test_load_limiter() -> None:
    limiter = LoadLimiter(10)
    with limiter.reserve(50):  # more than the limit, but nothing else is in progress
        assert limiter.load == 50
        with pytest.raises(Overloaded) as overloaded, limiter.reserve(1):
            pass
    assert overloaded.value.seconds >= 1
    assert limiter.load == 0
    with limiter.reserve(4), limiter.reserve(6):
        with pytest.raises(Overloaded), limiter.reserve(1):
            pass
        assert limiter.load == 10
    with pytest.raises(ZeroDivisionError), limiter.reserve(3):
        raise ZeroDivisionError
    assert limiter.load == 0

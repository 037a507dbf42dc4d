"""Faces of many requests in few calls: the same faces, in calls of fixed sizes, none lost."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_parts import DIM, TinyGenerator, Z
from vultus.images.io import to_images
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.population import noise
from vultus.serving.batching import Batcher, Busy, Gate


class Watched(TinyGenerator):
    """Notes how many faces each call has, and can be held up, or fail for noise that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Event()

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        self.begun.set()
        assert self.open.wait(10)
        self.calls.append(len(z))
        if not z.isfinite().all():
            raise FloatingPointError("noise")
        return super().forward(z, c)


@pytest.fixture
def watched() -> Any:
    batcher = Batcher(Watched(), window=0.02)
    yield batcher
    batcher.generator.open.set()
    batcher.close()


def faces(seed: int, count: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, Z, generator=random), torch.randn(count, DIM, generator=random)


def test_everybody_gets_their_own_faces(watched: Batcher) -> None:
    """40 threads ask for 1 to 20 faces each, at once."""
    asked = [faces(number, 1 + number % 20) for number in range(40)]
    with ThreadPoolExecutor(40) as pool:
        made = list(pool.map(lambda one: watched.submit(*one).result(10), asked))
    for (z, c), images in zip(asked, made, strict=True):
        expected = to_images(TinyGenerator()(z, c))
        assert images.shape == expected.shape
        assert images.dtype == torch.uint8
        assert int((images.int() - expected.int()).abs().max()) <= 1
    calls = watched.generator.calls  # type: ignore[attr-defined]
    assert set(calls) <= {1, 2, 4, 8, 16}
    assert len(calls) <= 40, "asked for at once, drawn one by one"


def test_what_waits_is_drawn_in_one_call(watched: Batcher) -> None:
    generator: Any = watched.generator
    generator.open.clear()
    first = watched.submit(*faces(0, 1))
    assert generator.begun.wait(10)
    others = [watched.submit(*faces(number, 1)) for number in range(1, 12)]
    generator.open.set()
    for future in (first, *others):
        assert future.result(10).shape == (1, 3, 32, 32)
    assert generator.calls == [1, 16], "the first alone, then 11 in one call, filled up to 16"


def test_a_second_call_begins_once_it_is_full() -> None:
    generator = Watched()
    batcher = Batcher(generator, window=0.02, calls=2, after=lambda images: 255 - images)
    generator.open.clear()
    first = batcher.submit(*faces(0, 1))
    assert generator.begun.wait(10)
    generator.begun.clear()
    others = [batcher.submit(*faces(number, 5)) for number in range(1, 4)]
    assert not generator.begun.wait(0.2), "15 faces wait for the call under way"
    others.append(batcher.submit(*faces(4, 3)))
    assert generator.begun.wait(10), "16 do not"
    generator.open.set()
    for number, future in enumerate((first, *others)):
        z, c = faces(number, len(future.result(10)))
        expected = 255 - to_images(TinyGenerator()(z, c))
        assert int((future.result().int() - expected.int()).abs().max()) <= 1
    batcher.close()
    assert sorted(generator.calls) == [1, 2, 16]


def test_what_is_cancelled_is_not_drawn(watched: Batcher) -> None:
    generator: Any = watched.generator
    generator.open.clear()
    first = watched.submit(*faces(0, 1))
    assert generator.begun.wait(10)
    gone = watched.submit(*faces(1, 30))
    stays = watched.submit(*faces(2, 2))
    assert gone.cancel()
    assert not first.cancel(), "it is under way"
    generator.open.set()
    assert stays.result(10).shape[0] == 2
    assert generator.calls == [1, 2]


def test_an_error_reaches_those_that_it_concerns_only(watched: Batcher) -> None:
    z, c = faces(0, 20)
    bad = watched.submit(z * float("nan"), c)
    with pytest.raises(FloatingPointError):
        bad.result(10)
    assert watched.submit(z, c).result(10).shape[0] == 20


def test_close_draws_what_waits() -> None:
    generator = Watched()
    batcher = Batcher(generator, window=5)
    generator.open.clear()
    futures = [batcher.submit(*faces(number, 3)) for number in range(9)]
    threading.Timer(0.05, generator.open.set).start()
    batcher.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(*faces(0, 1))


def test_the_last_bit() -> None:
    """With one size, faces are those of generate.py; with all, a pixel value in thousands differs by 1 at most."""
    snapshot = load_snapshot(default_snapshot())
    c = gallery()[:5]
    z = noise(3, 0, 5, snapshot.network.z_dim)
    expected = render(snapshot.network, z, c)
    exact, quick = Batcher(snapshot.network, sizes=(16,)), Batcher(snapshot.network)
    for batcher in (exact, quick):
        batcher.warm_up()
    assert torch.equal(torch.cat([exact.submit(z[i : i + 1], c[i : i + 1]).result(30) for i in range(5)]), expected)
    for parts in ([5], [1, 4], [1, 1, 1, 2]):
        futures = [quick.submit(a, b) for a, b in zip(z.split(parts), c.split(parts), strict=True)]
        difference = (torch.cat([future.result(30) for future in futures]).int() - expected.int()).abs()
        assert int(difference.max()) <= 1
        assert float((difference > 0).float().mean()) < 1e-3
    exact.close()
    quick.close()


def test_gate() -> None:
    gate = Gate(10)
    with gate.hold(50):  # larger than the bound, but alone
        assert gate.held == 50
        with pytest.raises(Busy) as busy, gate.hold(1):
            pass
    assert busy.value.seconds >= 1
    assert gate.held == 0
    with gate.hold(4), gate.hold(6):
        with pytest.raises(Busy), gate.hold(1):
            pass
        assert gate.held == 10
    with pytest.raises(ZeroDivisionError), gate.hold(3):
        raise ZeroDivisionError
    assert gate.held == 0

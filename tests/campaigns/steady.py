"""The steady load of the server campaign: mixed requests at random moments, each with the answer that is due.

Requests arrive at the moments of a Poisson process, whether or not earlier ones were answered, and latency counts from
the moment of arrival: a server that stands still delays the requests of the whole pause, not only one of each client.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

ADDRESS = "127.0.0.2"  # of the steady clients; faults come from other addresses, so limits of a client are apart
TIMEOUT = 90.0
ROUNDING = 2  # greatest difference of a pixel value between two answers: batch size and watermark (serving/batching.py)
OVERLOADED = (429, 503)


@dataclass(frozen=True)
class Kind:
    """A request of the load and what is compared between its answers.

    Attributes:
        name: in the report.
        weight: share of the requests.
        method, path, options: of httpx2.
        same: body -> what must be equal at any time; None: the body only has to be valid.
        valid: body -> whether it is an answer of this kind.
    """

    name: str
    weight: float
    method: str
    path: str
    valid: Callable[[bytes], bool]
    options: dict[str, Any] = field(default_factory=dict)
    same: Callable[[bytes], Any] | None = None


@dataclass(frozen=True)
class Sample:
    """An answered request: arrival (seconds of time.monotonic), seconds until its answer, name of its kind, status."""

    start: float
    seconds: float
    kind: str
    status: int


class Overloads:
    """The intervals in which requests may be refused because of too much work."""

    def __init__(self) -> None:
        self._intervals: list[tuple[float, float]] = []
        self._open: list[float] = []

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        self._open.append(time.monotonic())
        try:
            yield
        finally:
            self._intervals.append((self._open.pop(), time.monotonic()))

    def meets(self, start: float, end: float) -> bool:
        return any(end >= begun for begun in self._open) or any(
            start <= last and end >= first for first, last in self._intervals
        )


class Load:
    """The load of one server.

    Args:
        url: of the server.
        token: that every request carries.
        kinds: the requests.
        rate: requests per second, on average.
        seed: of the moments and of the order.
        keep_alive: seconds for which an idle connection is used again; less than the server's limit, so that it is not
            closed at that moment.
    """

    def __init__(
        self, url: str, token: str, kinds: Sequence[Kind], rate: float, seed: int, *, keep_alive: float = 2.0
    ) -> None:
        self.kinds, self.rate = list(kinds), rate
        self.random = random.Random(f"{seed} steady")
        self.samples: list[Sample] = []
        self.findings: list[str] = []
        self.counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
        self.largest_difference = 0
        self.overloads = Overloads()
        self._first: dict[str, Any] = {}
        self._running = asyncio.Event()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=keep_alive)
        transport = httpx2.AsyncHTTPTransport(local_address=ADDRESS, limits=limits, trust_env=False)
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx2.AsyncClient(base_url=url, headers=headers, transport=transport, timeout=TIMEOUT)

    async def run(self) -> None:
        """Send until cancelled, except while paused; then wait for the answers."""
        tasks: set[asyncio.Task[None]] = set()
        weights = [kind.weight for kind in self.kinds]
        try:
            following = time.monotonic()
            while True:
                if not self._running.is_set():
                    if tasks:
                        await asyncio.wait(tasks)
                    await self._running.wait()
                    following = time.monotonic()
                following += self.random.expovariate(self.rate)
                await asyncio.sleep(max(0.0, following - time.monotonic()))
                kind = self.random.choices(self.kinds, weights)[0]
                task = asyncio.create_task(self.request(kind, following))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            if tasks:
                await asyncio.wait(tasks)

    def resume(self) -> None:
        self._running.set()

    def pause(self) -> None:
        self._running.clear()

    async def request(self, kind: Kind, start: float) -> None:
        """Send a request and check its answer."""
        try:
            response = await self.client.request(kind.method, kind.path, **kind.options)
        except httpx2.HTTPError as error:
            self.counts[kind.name][type(error).__name__] += 1
            self._finding(f"{kind.name}: no answer ({type(error).__name__}: {error})")
            return
        end, status = time.monotonic(), response.status_code
        self.samples.append(Sample(start, end - start, kind.name, status))
        self.counts[kind.name][str(status)] += 1
        if status == 200:
            self._compare(kind, response.content)
        elif status not in OVERLOADED or not self.overloads.meets(start, end):
            self._finding(f"{kind.name}: status {status} is not due: {response.text[:200]}")
        elif "retry-after" not in response.headers:
            self._finding(f"{kind.name}: status {status} without Retry-After: {response.text[:200]}")

    def _compare(self, kind: Kind, body: bytes) -> None:
        if not kind.valid(body):
            self._finding(f"{kind.name}: the body is not valid: {body[:60]!r}")
            return
        if kind.same is None:
            return
        found = kind.same(body)
        first = self._first.setdefault(kind.name, found)
        if isinstance(found, np.ndarray) and found.shape == first.shape:
            difference = int(np.abs(found.astype(int) - first).max())
            self.largest_difference = max(self.largest_difference, difference)
            if difference <= ROUNDING:
                return
            self._finding(f"{kind.name}: a pixel value differs by {difference} from that of the first answer")
        elif isinstance(found, np.ndarray) or found != first:
            self._finding(f"{kind.name}: another answer than the first one")

    def _finding(self, text: str) -> None:
        self.findings.append(text)


# --- the requests -----------------------------------------------------------------------------------------------------


def pixels(data: bytes) -> np.ndarray:
    """An image file, or the images in JSON, as integers."""
    if data.startswith(b"{"):
        files = [base64.b64decode(face["image"].partition(",")[2]) for face in json.loads(data)["faces"]]
        return np.stack([pixels(file) for file in files])
    if data.startswith(b"\x93NUMPY"):
        return np.asarray(np.load(io.BytesIO(data)))
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def _starts(start: bytes) -> Callable[[bytes], bool]:
    return lambda body: body.startswith(start)


def _has(*texts: bytes) -> Callable[[bytes], bool]:
    return lambda body: all(text in body for text in texts)


PNG, FACES = _starts(b"\x89PNG\r\n"), _starts(b'{"model":')


def basic_kinds(embeddings: np.ndarray, edits: Sequence[str]) -> list[Kind]:
    """Requests that need no FaceNet.

    Args:
        embeddings: [N, c_dim], N >= 4.
        edits: names of the attributes that the server edits.
    """
    rows = embeddings.tolist()
    kinds = [
        Kind("page", 3, "GET", "/", _has(b"<!doctype html>", b"</html>")),
        Kind("health", 4, "GET", "/healthz", _starts(b'{"status":"ok"}')),
        Kind("metrics", 2, "GET", "/metrics", _has(b"vultus_requests_total", b"vultus_waiting_faces")),
        Kind("model", 1, "GET", "/v1/model", _has(b'"limits"'), same=json.loads),
        Kind("random-npy", 1, "GET", "/v1/random?num=2&seed=31&format=npy", _starts(b"\x93NUMPY"), same=pixels),
        Kind("random-jpeg", 1, "GET", "/v1/random?seed=5&format=jpeg", _starts(b"\xff\xd8")),
        Kind("random-webp", 1, "GET", "/v1/random?seed=6&format=webp", _starts(b"RIFF")),
        Kind("random-json", 1, "GET", "/v1/random?num=3&seed=8", FACES, same=pixels),
        Kind("between", 1, "POST", "/v1/between", FACES, {"json": {"a": rows[0], "b": rows[1], "steps": 5}}, pixels),
    ]
    for seed in (1, 2, 3):
        kinds.append(Kind(f"random-{seed}", 1, "GET", f"/v1/random?seed={seed}", PNG, same=pixels))
        body: dict[str, Any] = {"embeddings": rows[seed : seed + 1], "seed": seed}
        kinds.append(Kind(f"faces-json-{seed}", 1, "POST", "/v1/faces", PNG, {"json": body}, pixels))
    binary = {
        "content": embeddings[2:3].astype("<f4").tobytes(),
        "headers": {"Content-Type": "application/octet-stream"},
    }
    kinds.append(Kind("faces-binary", 1, "POST", "/v1/faces?seed=4", PNG, binary, pixels))
    blended = {"embeddings": rows[:3], "weights": [1, 0.5, 0.25]}
    kinds.append(Kind("blend", 1, "POST", "/v1/faces", PNG, {"json": blended}, pixels))
    for name in edits[:2]:
        body = {"embeddings": rows[3:4], "edit": f"{name}=1.5"}
        kinds.append(Kind(f"edit-{name}", 0.5, "POST", "/v1/faces", PNG, {"json": body}, pixels))
    return kinds


def photo_kinds(photos: Sequence[Path]) -> list[Kind]:
    """Uploads of photos."""
    kinds = []
    valid, same = _starts(b'{"embedding":'), json.loads
    for number, path in enumerate(photos):
        data, media = path.read_bytes(), f"image/{path.suffix[1:].lower().replace('jpg', 'jpeg')}"
        form, plain = (
            {"files": {"photo": (path.name, data, media)}},
            {"content": data, "headers": {"Content-Type": media}},
        )
        share = 0.3 / len(photos)
        kinds += [
            Kind(f"embedding-{number}", share, "POST", "/v1/embeddings", valid, plain, same),
            Kind(f"embedding-form-{number}", share, "POST", "/v1/embeddings", valid, form, same),
            Kind(f"photo-{number}", share, "POST", f"/v1/faces?seed={number}", PNG, plain, pixels),
            Kind(f"photo-form-{number}", share, "POST", f"/v1/faces?seed={number}&num=2", FACES, form, pixels),
            Kind(f"similarity-{number}", share / 2, "POST", "/v1/faces?similarity=true", FACES, form, pixels),
        ]
    return kinds


# --- latency ----------------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile; NaN without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def rolling_p99(samples: Sequence[Sample], start: float, end: float, window: float, step: float = 0.5) -> list[float]:
    """The p99 of the requests that arrived in each window of some seconds that begins in [start, end - window]."""
    found = []
    for number in range(max(0, int((end - window - start) / step + 1e-9) + 1)):
        first = start + number * step
        inside = [sample.seconds for sample in samples if first <= sample.start < first + window]
        found.append(quantile(inside, 0.99))
    return found


def recovery(p99s: Sequence[float], bound: float, step: float = 0.5) -> float | None:
    """Seconds from the start of the first window to that of the first one whose p99 is at most `bound`, or None."""
    return next((number * step for number, value in enumerate(p99s) if value <= bound), None)

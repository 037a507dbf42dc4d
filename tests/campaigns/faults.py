"""The faults of the server campaign: what misbehaving clients do, and the answer that each must get.

Each fault has an address of its own (127.0.0.x), so that the server's limits of one client act on it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .steady import OVERLOADED, Overloads

SLACK = 10.0  # seconds that a time limit of the server may be exceeded: it checks them up to once in 2 s
NO_ANSWER = ("closed", "reset")  # without a byte of an answer


@dataclass(frozen=True)
class Limits:
    """The options of the server that the faults exceed (seconds, connections, bytes), and the size of a burst."""

    seconds: float
    header_seconds: float
    idle_seconds: float
    client_connections: int
    burst: int  # requests at the same moment
    photo_bytes: int
    json_bytes: int


@dataclass
class Target:
    """A server under faults, and what they found."""

    port: int
    token: str
    wrong_token: str
    limits: Limits
    embeddings: np.ndarray
    photo: bytes | None
    overloads: Overloads
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)  # of "fault: what: outcome"
    findings: list[str] = field(default_factory=list)

    def note(self, fault: str, what: str, outcome: object, due: tuple[object, ...], detail: object = "") -> None:
        """Count an outcome; it is a finding if it is not one of those that are due."""
        self.counts[f"{fault}: {what}: {outcome}"] += 1
        if outcome not in due:
            text = str(detail)[:200]
            self.findings.append(f"{fault}: {what}: {outcome}, due: {', '.join(map(str, due))}; {text}")

    def request(self, method: str, path: str, body: bytes = b"", kind: str = "", **headers: str) -> bytes:
        """With the token, if no other Authorization is given; the connection is closed after it."""
        from wrong_requests import request

        return request(method, path, body, kind, **{"Authorization": f"Bearer {self.token}"} | headers)

    def faces(self, rows: int, seed: int) -> bytes:
        body = {"embeddings": self.embeddings[:rows].tolist(), "seed": seed}
        return self.request("POST", "/v1/faces", json.dumps(body).encode(), "application/json")


@dataclass
class Answer:
    """What a client received: status, or how the connection ended without one."""

    status: int | str
    headers: bytes
    body: bytes
    complete: bool
    seconds: float


def parse(received: bytes, ended: str, seconds: float) -> Answer:
    head, separator, body = received.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
    if not match or not separator:
        return Answer(f"part, then {ended}" if received else ended, b"", b"", False, seconds)
    headers = head.lower() + b"\r\n"
    length = re.search(rb"\ncontent-length: (\d+)\r", headers)
    complete = length is None or len(body) >= int(length[1])
    return Answer(int(match[1]), headers, body, complete, seconds)


class Connection:
    """A connection from an address of a fault."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.started = reader, writer, time.monotonic()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def drip(self, data: bytes, pause: float, end: float) -> Answer:
        """Send a byte now and then until the server closes the connection or the time is up; what it answered."""
        answer, position = asyncio.create_task(self.answer(end)), 0
        while not answer.done():
            self.writer.write(data[position % len(data) :][:1])
            position += 1
            await asyncio.wait({answer}, timeout=pause)
        return answer.result()

    async def answer(self, end: float) -> Answer:
        """What arrives until the server closes the connection; status "open" if it has not by `end`."""
        received, ended = b"", "open"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, end - time.monotonic())):
                try:
                    while data := await self.reader.read(1 << 16):
                        received += data
                    ended = "closed"
                except ConnectionError:
                    ended = "reset"
        return parse(received, ended, time.monotonic() - self.started)

    def reset(self) -> None:
        """Close with RST in the place of FIN."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(target: Target, address: str, receive_buffer: int | None = None):  # type: ignore[no-untyped-def]
    plain = socket.socket()
    plain.setblocking(False)
    if receive_buffer:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        plain.bind((address, 0))
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", target.port))
        reader, writer = await asyncio.open_connection(sock=plain, limit=receive_buffer or 1 << 16)
    except BaseException:
        plain.close()
        raise
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def exchange(target: Target, address: str, data: bytes, seconds: float) -> Answer:
    """Send a request and read the answer."""
    async with connected(target, address) as connection:
        await connection.send(data)
        return await connection.answer(time.monotonic() + seconds)


def exchange_blocking(target: Target, address: str, data: bytes, seconds: float) -> Answer:
    """The same as a program that first sends all, then reads: what the server sent before it closed is not lost."""
    started = time.monotonic()
    with socket.socket() as connection:
        connection.bind((address, 0))
        connection.settimeout(seconds)
        connection.connect(("127.0.0.1", target.port))
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        received, ended = b"", "open"
        try:
            while part := connection.recv(1 << 16):
                received += part
            ended = "closed"
        except ConnectionError:
            ended = "reset"
        except TimeoutError:
            pass
    return parse(received, ended, time.monotonic() - started)


def turns(end: float, pause: float) -> Iterator[int]:
    """0, 1, ... until the time is up; the caller pauses."""
    number = 0
    while number == 0 or time.monotonic() + pause < end:
        yield number
        number += 1


# --- the faults -------------------------------------------------------------------------------------------------------


async def slow_clients(target: Target, end: float) -> None:
    """A byte per second of a header or of a body, and answers that are not read, or slowly."""
    limits, address = target.limits, "127.0.0.3"
    until = time.monotonic() + max(limits.seconds, limits.header_seconds) + SLACK
    half_json = target.request("POST", "/v1/faces", b"", "application/json", **{"Content-Length": "9999"})
    chunked = target.request(
        "POST", "/v1/faces", b"", "application/json", **{"Content-Length": "", "Transfer-Encoding": "chunked"}
    )
    photo = target.request("POST", "/v1/embeddings", b"", "image/jpeg", **{"Content-Length": "9999"})
    cases = [
        ("header", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"a", limits.header_seconds),
        ("header after a line", b"GET /v1/random HTTP/1.1\r\n", b"X: a\r\n", limits.header_seconds),
        ("body", half_json, b'{"embeddings": [[', limits.seconds),
        ("chunks", chunked, b"1\r\n{\r\n", limits.seconds),
        ("photo", photo, b"\xff\xd8", limits.seconds),
    ]

    async def writer(name: str, begun: bytes, rest: bytes, limit: float) -> None:
        async with connected(target, address) as connection:
            await connection.send(begun)
            answer = await connection.drip(rest, 1.0, until)
        target.note("slow", name, answer.status, (408,), answer.body)
        if answer.seconds > limit + SLACK:
            target.findings.append(f"slow: {name}: open for {answer.seconds:.1f} s, the limit is {limit:g} s")

    file = "/static-offline-docs/swagger-ui-bundle.js"
    many = target.request("GET", file, Connection="keep-alive") * 5 + target.request("GET", file)

    async def reader(name: str, size: int) -> None:
        """Read some bytes a second, and at the end what the system still holds: less than all answers."""
        async with connected(target, address, 4096) as connection:
            await connection.send(many)
            received, last = 0, time.monotonic() + limits.seconds + min(2 * SLACK, limits.seconds)
            while time.monotonic() < last:
                received += len(await connection.reader.read(size)) if size else 0
                await asyncio.sleep(1.0)
            try:
                async with asyncio.timeout(SLACK):
                    while data := await connection.reader.read(1 << 16):
                        received += len(data)
                outcome = "cut off" if received < 6_000_000 else "all"
            except ConnectionError:
                outcome = "cut off"
            except TimeoutError:
                outcome = "open"
        target.note("slow", name, outcome, ("cut off",), f"{received} bytes")

    async def steady_reader() -> None:
        """128 KiB at a time, well above the least rate: gets all."""
        async with connected(target, address) as connection:
            await connection.send(target.request("GET", file))
            received, pause = 0, min(0.5, limits.seconds / 8)
            while data := await connection.reader.read(1 << 17):
                received += len(data)
                await asyncio.sleep(pause * len(data) / (1 << 17))
        target.note("slow", "reader above the least rate", "all" if received > 1_000_000 else "cut off", ("all",))

    copies = 4
    await asyncio.gather(
        *(writer(*case) for case in cases for _ in range(copies)),
        *(reader(f"reader of {size} bytes a second", size) for size in (0, 100) for _ in range(copies)),
        *(steady_reader() for _ in range(copies)),
    )
    await asyncio.sleep(max(0.0, end - time.monotonic()))


async def half_open(target: Target, end: float, *, count: int | None = None) -> None:
    """Connections that send nothing, half a header or half a body, and stay: more than one client may have."""
    limits, address = target.limits, "127.0.0.4"
    count = limits.client_connections + 100 if count is None else count
    until = time.monotonic() + limits.seconds + SLACK
    body = target.request("POST", "/v1/embeddings", b"\x89PNG", "image/png", **{"Content-Length": "9999"})
    crowd = count > limits.client_connections  # then the oldest make room
    refused: tuple[object, ...] = (503,) if crowd else ()
    cases: list[tuple[str, bytes, tuple[object, ...]]] = [
        ("nothing", b"", ("closed", *refused)),
        ("half a header", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", (408, *refused)),
        # A connection that has to make room before its first bytes were read has asked for nothing.
        ("half a body", body, (408, *refused)),
    ]

    async def one(name: str, data: bytes, due: tuple[object, ...]) -> None:
        async with connected(target, address) as connection:
            await connection.send(data)
            answer = await connection.answer(until)
        target.note("half-open", name, answer.status, (*due, *NO_ANSWER) if crowd else due, answer.body)

    await asyncio.gather(*(one(*cases[number % 3]) for number in range(count)))
    await asyncio.sleep(max(0.0, end - time.monotonic()))


async def disconnects(target: Target, end: float) -> None:
    """Clients that leave in the middle of a request or of an answer, with FIN or with RST."""
    address, kinds = "127.0.0.5", ("half a header", "half a body", "before the answer", "in the answer")
    file = target.request("GET", "/static-offline-docs/swagger-ui-bundle.js")

    async def leave(name: str, how: str) -> None:
        rows = target.random.randint(1, 4)
        data = file if name == "in the answer" else target.faces(rows, target.random.randrange(2**32))
        if target.photo is not None and name != "in the answer" and target.random.random() < 0.3:
            data = target.request("POST", "/v1/embeddings", target.photo, "image/jpeg")
        header = data.index(b"\r\n\r\n") + 4
        shown = {"half a header": data[: header // 2], "half a body": data[: (header + len(data)) // 2]}
        try:
            async with connected(target, address, 4096) as connection:
                await connection.send(shown.get(name, data))
                if name == "in the answer":
                    await connection.reader.read(100)
                else:
                    await asyncio.sleep(target.random.uniform(0, 0.05))
                if how == "RST":
                    connection.reset()
        except ConnectionError:
            how = "refused"
        target.note("disconnect", name, how, ("FIN", "RST"))

    for number in turns(end, 0.1):
        await leave(kinds[number % 4], ("FIN", "RST")[number // 4 % 2])
        await asyncio.sleep(0.08)


async def oversized(target: Target, end: float) -> None:
    """Bodies and headers above the limits, announced by Content-Length or in chunks without an announcement."""
    limits, address = target.limits, "127.0.0.6"

    def chunks(size: int) -> bytes:
        piece = b"10000\r\n" + b"1" * 0x10000 + b"\r\n"
        return piece * (size // 0x10000 + 1) + b"0\r\n\r\n"

    no_length = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    large = bytes(limits.photo_bytes + 1)
    form = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="me.jpg"\r\n\r\n' + large + b"\r\n--x--\r\n"
    multipart = "multipart/form-data; boundary=x"
    huge = {"Content-Length": str(10**15)}
    cases = [
        ("JSON", target.request("POST", "/v1/faces", b" " * (limits.json_bytes + 1), "application/json"), 413),
        ("JSON in chunks", target.request("POST", "/v1/faces", b"", "application/json", **no_length) + chunks(limits.json_bytes), 413),
        ("photo", target.request("POST", "/v1/embeddings", large, "image/jpeg"), 413),
        ("photo in chunks", target.request("POST", "/v1/embeddings", b"", "image/jpeg", **no_length) + chunks(limits.photo_bytes), 413),
        ("form", target.request("POST", "/v1/faces", form, multipart), 413),
        ("a petabyte", target.request("POST", "/v1/faces", b"{}", "application/json", **huge), 413),
        ("header", target.request("GET", "/healthz", A="a" * 5_000_000), 431),
    ]  # fmt: skip
    for _ in turns(end, 2.0):
        for name, data, status in cases:
            answer = await asyncio.to_thread(exchange_blocking, target, address, data, limits.seconds + SLACK)
            target.note("oversized", name, answer.status, (status,), answer.body)
        await asyncio.sleep(0.5)


async def wrong_tokens(target: Target, end: float) -> None:
    """No token, a wrong one, the right one in a wrong place or form."""
    address, right, wrong = "127.0.0.7", target.token, target.wrong_token
    given = {
        "none": "",
        "wrong": f"Bearer {wrong}",
        "a part": f"Bearer {right[:-1]}",
        "longer": f"Bearer {right}x",
        "another scheme": f"Basic {right}",
        "no scheme": right,
        "empty": "Bearer ",
        "8 KB": "Bearer " + wrong * (8000 // len(wrong)),
        "not ASCII": f"Bearer {wrong}\xe9",
    }
    body = json.dumps({"embeddings": target.embeddings[:1].tolist()}).encode()
    paths = [("GET", "/v1/random", b"", ""), ("GET", "/metrics", b"", ""), ("POST", "/v1/faces", body, "application/json"),
             ("POST", "/v1/embeddings", target.photo or b"\xff\xd8", "image/jpeg"),
             ("GET", f"/v1/random?token={right}", b"", ""), ("GET", f"/v1/model?access_token={wrong}", b"", "")]  # fmt: skip
    for number in turns(end, 0.5):
        method, path, data, kind = paths[number % len(paths)]
        for name, value in given.items():
            answer = await exchange(
                target, address, target.request(method, path, data, kind, Authorization=value), SLACK
            )
            target.note("token", name, answer.status, (401,), answer.body)
            if answer.status == 401 and b"\nwww-authenticate: bearer" not in answer.headers:
                target.findings.append(f"token: {name}: 401 without WWW-Authenticate")
            if right.encode() in answer.body or wrong.encode() in answer.body:
                target.findings.append(f"token: {name}: the answer repeats a token")
        for scheme in ("Bearer", "bearer"):
            answer = await exchange(
                target, address, target.request("GET", "/v1/model", Authorization=f"{scheme} {right}"), SLACK
            )
            target.note("token", scheme, answer.status, (200,), answer.body)
        await asyncio.sleep(0.2)


async def malformed(target: Target, end: float) -> None:
    """The wrong requests and photos of the tests (wrong_requests.py)."""
    from wrong_requests import HOSTILE, PHOTOS, check_answer

    address = "127.0.0.8"
    authorised = f"Host: x\r\nAuthorization: Bearer {target.token}\r\n".encode()
    cases = {name: (data.replace(b"Host: x\r\n", authorised, 1), status) for name, (data, status) in HOSTILE.items()}
    if target.photo is not None:
        for name, (data, status) in PHOTOS.items():
            cases[f"photo: {name}"] = (target.request("POST", "/v1/embeddings", data, "image/png"), status)
    for name in ("no host", "HTTP/0.9"):
        assert cases[name][0] == HOSTILE[name][0]

    async def one(name: str, data: bytes, status: int) -> None:
        start = time.monotonic()
        answer = await asyncio.to_thread(exchange_blocking, target, address, data, target.limits.seconds + SLACK)
        detail: object = answer.body
        if answer.status == status:
            try:
                check_answer(f"HTTP/1.1 {status} ".encode() + answer.headers + b"\r\n" + answer.body, status)
            except (AssertionError, ValueError) as error:
                target.findings.append(f"malformed: {name}: the body of status {status}: {type(error).__name__}")
        overloaded = name.startswith("photo: ") and target.overloads.meets(start, time.monotonic())
        target.note("malformed", name, answer.status, (status, *(OVERLOADED if overloaded else ())), detail)

    for _ in turns(end, 4.0):
        names = list(cases)
        target.random.shuffle(names)
        for start in range(0, len(names), 6):
            await asyncio.gather(*(one(name, *cases[name]) for name in names[start : start + 6]))


async def bursts(target: Target, end: float) -> None:
    """Many requests at the same moment, again and again. More work than the queue holds is refused: 429."""
    address = "127.0.0.9"

    def wish(number: int) -> tuple[str, bytes, tuple[object, ...]]:
        seed, refused = target.random.randrange(2**32), (200, 429, 503)
        if number % 10 < 6:
            return "random", target.request("GET", f"/v1/random?seed={seed}"), refused
        if number % 10 < 8:
            return "faces", target.faces(1, seed), refused
        return (
            ("page", target.request("GET", "/"), (200,))
            if number % 2
            else ("health", target.request("GET", "/healthz"), (200,))
        )

    async def one(name: str, data: bytes, due: tuple[object, ...]) -> None:
        try:
            answer = await exchange(target, address, data, 2 * target.limits.seconds + 60)
        except ConnectionError as error:
            answer = Answer(f"not connected: {type(error).__name__}", b"", b"", False, 0.0)
        if not answer.complete and isinstance(answer.status, int):
            answer.status = "incomplete"
        target.note("burst", name, answer.status, due, answer.body)
        if answer.status in (429, 503) and b"\nretry-after: " not in answer.headers:
            target.findings.append(f"burst: {name}: {answer.status} without Retry-After")
        if answer.status == 200 and name in ("random", "faces") and not answer.body.startswith(b"\x89PNG"):
            target.findings.append(f"burst: {name}: 200 without an image")

    for _ in turns(end, 3.0):
        wishes = [wish(number) for number in range(target.limits.burst)]
        with target.overloads.during():
            await asyncio.gather(*(one(*each) for each in wishes))
        await asyncio.sleep(1.0)


async def together(target: Target, end: float) -> None:
    """All at once, with fewer half-open connections: in all, fewer than the server may have."""
    with target.overloads.during():
        await asyncio.gather(
            half_open(target, end, count=target.limits.client_connections // 3),
            *(fault(target, end) for fault in (slow_clients, disconnects, oversized, wrong_tokens, malformed, bursts)),
        )


FAULTS: dict[str, Callable[[Target, float], Awaitable[None]]] = {
    "slow": slow_clients,
    "half-open": half_open,
    "disconnect": disconnects,
    "oversized": oversized,
    "token": wrong_tokens,
    "malformed": malformed,
    "burst": bursts,
    "together": together,
}

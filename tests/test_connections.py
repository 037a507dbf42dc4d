"""`vultus serve` against clients that send nothing, too slowly or too much, or do not read, and wrong requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from served import ServerProcess, ServerThread, serving_process, serving_thread
from vultus.cli import main as cli
from vultus.errors import UserError
from vultus.serving.connections import ConnectionLimits, client_key, connection_limits
from wrong_requests import HOSTILE, JSON, PNG, check_answer, request

pytestmark = pytest.mark.xdist_group("connections")

MAX_FILES = 1024
Served = ServerProcess | ServerThread


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With the default limits, in a process that may open 1024 files."""
    folder = tmp_path_factory.mktemp("connections") / "default"
    with serving_process(folder, "--device", "cpu", weights="", max_files=MAX_FILES) as served:
        yield served


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With short time limits, and for few connections."""
    limits = ["--seconds", "1.5", "--header-seconds", "0.4", "--idle-seconds", "0.3", "--connections", "30"]
    with serving_process(tmp_path_factory.mktemp("connections") / "hasty", *limits, weights="") as served:
        yield served


def connect(
    served: ServerProcess | ServerThread, data: bytes = b"", receive_buffer: int | None = None
) -> socket.socket:
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
    connection.sendall(data)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            received += data
    return received


def read_health(connection: socket.socket) -> None:
    received = b""
    while not received.endswith(b'{"status":"ok"}'):
        received += connection.recv(1)


def open_files(served: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{served.process.pid}/fd"))


def wait_for_open_files(served: ServerProcess, at_most: int, seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while open_files(served) > at_most:
        assert time.monotonic() < deadline, f"{open_files(served)} open files, expected {at_most}"
        time.sleep(0.02)


def seconds_of(served: ServerProcess, path: str) -> float:
    started = time.perf_counter()
    with served.client() as client:
        assert client.get(path).status_code == 200
    return time.perf_counter() - started


# --- more connections than descriptors --------------------------------------------------------------------------------


HALF_OPEN = {
    "nothing": (1100, b""),
    "half a header": (3000, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: "),
    "no body": (1100, request("POST", "/v1/faces", b"", PNG, **{"Content-Length": "9"})),
}


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open 3,200 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3200:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3200), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the files of a process in /proc")
@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(("count", "sent"), HALF_OPEN.values(), ids=HALF_OPEN)
def test_half_open_connections(default: ServerProcess, count: int, sent: bytes) -> None:
    """A client gets its answers while they are held; then as many files are open as before."""
    wait_for_open_files(default, 20)
    before = open_files(default)
    with contextlib.ExitStack() as held:
        for _ in range(count):
            # The server may have closed it already.
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                held.enter_context(connect(default, sent))
        assert open_files(default) < MAX_FILES
        times = [seconds_of(default, f"/v1/random?seed={seed}") for seed in range(8)]
        assert max(times) < 5, times
    wait_for_open_files(default, before)
    assert "more than 3" in default.stderr
    assert "(--client-connections)" in default.stderr
    assert len(default.stderr.splitlines()) < 12, "one line in ten seconds"
    assert "Traceback" not in default.stderr


def test_oldest_connection_gives_way(hasty: ServerProcess) -> None:
    """The limit of one client is half of 30: the 16th takes the place of the first, which is told why."""
    with contextlib.ExitStack() as held:
        first, *others = (held.enter_context(connect(hasty, b"GET /heal")) for _ in range(15))
        assert seconds_of(hasty, "/healthz") < 3
        head, _, body = read_to_end(first).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"Retry-After: 1" in head
        assert json.loads(body) == {"detail": "more than 15 connections of one client (--client-connections)"}
        others[-1].sendall(b"thz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 200 OK" in read_to_end(others[-1])


def test_refused_while_all_are_in_work() -> None:
    with serving_thread(weights="", connections=ConnectionLimits(2, 1)) as served:
        working, finish = threading.Event(), threading.Event()

        def wait(images: torch.Tensor) -> torch.Tensor:
            working.set()
            assert finish.wait(20)
            return images

        served.engine.batcher.postprocess = wait
        with connect(served, request("GET", "/v1/random")) as first:
            assert working.wait(20)
            with connect(served, request("GET", "/healthz")) as second:
                answer = read_to_end(second)
            assert answer.startswith(b"HTTP/1.1 503 "), answer[:99]
            assert b"Retry-After: 1" in answer
            assert b"more than 1 connections of one client (--client-connections)" in answer
            finish.set()
            assert b" 200 OK" in read_to_end(first)


def test_limits_follow_the_limit_of_open_files(capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    times = {"header": 1.0, "idle": 1.0, "transfer": 1.0}
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 600), hard))
        assert connection_limits(None, None, **times).total > 50
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 600 or hard <= 600, "raised to the hard limit"
        with pytest.raises(UserError, match="--connections 100000000: this process can hold at most"):
            connection_limits(10**8, None, **times)
        assert connection_limits(9, None, **times) == ConnectionLimits(9, 4, 1.0, 1.0, 1.0)
        assert connection_limits(9, 50, **times).per_client == 9
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for option in ("--connections", "--client-connections", "--header-seconds", "--idle-seconds"):
        assert cli.main(["serve", option, "0"]) == 2
        assert f"error: {option} must be a" in capsys.readouterr().err


def test_one_client() -> None:
    assert client_key(("10.0.0.1", 99)) == "10.0.0.1" == client_key(("::ffff:10.0.0.1", 1, 0, 0))
    assert client_key(("2001:db8::1", 1, 0, 0)) == client_key(("2001:db8::ffff:2", 1, 0, 0))
    assert client_key(("fe80::1%eth0", 1, 0, 2)) != client_key(("2001:db8::1", 1, 0, 0))


# --- time limits ------------------------------------------------------------------------------------------------------


def drip(connection: socket.socket, data: bytes, seconds: float) -> None:
    """Send a byte every 20 ms until the server closes the connection, or for some seconds."""
    deadline, rest = time.monotonic() + seconds, iter(data * 1000)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            connection.sendall(bytes([next(rest)]))
            time.sleep(0.02)


def test_slow_header(hasty: ServerProcess) -> None:
    for begun in (b"", request("GET", "/healthz", Connection="keep-alive")):  # the first request and a later one
        with connect(hasty, begun) as connection:
            if begun:
                read_health(connection)
            started = time.monotonic()
            drip(connection, b"GET /healthz HTTP/1.1\r\nX-Slow: ", 0.7)
            answer = read_to_end(connection)
            assert time.monotonic() - started < 4
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert json.loads(body) == {"detail": "the header of the request did not arrive within 0.4 s"}
    assert "(--header-seconds)" in hasty.stderr


def test_slow_body(hasty: ServerProcess) -> None:
    with connect(hasty, request("POST", "/v1/faces", b"", JSON, **{"Content-Length": "9999"})) as connection:
        drip(connection, b"1", 1.6)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 1.5 s" in answer


def test_body_that_nobody_waits_for(hasty: ServerProcess) -> None:
    """The response is sent at once, and the rest of the request is not waited for longer than the limit."""
    with connect(hasty, request("GET", "/healthz", Connection="", **{"Content-Length": "9999"})) as connection:
        read_health(connection)
        started = time.monotonic()
        drip(connection, b"1", 3.5)
        assert 1.4 < time.monotonic() - started < 3.4
        assert read_to_end(connection) == b""


@pytest.mark.parametrize("begun", [b"", request("GET", "/healthz", Connection="")], ids=["unused", "used"])
def test_idle_connection(hasty: ServerProcess, begun: bytes) -> None:
    with connect(hasty, begun) as connection:
        started = time.monotonic()
        assert read_to_end(connection).count(b"HTTP/1.1 ") == bool(begun)
        assert 0.25 < time.monotonic() - started < 4


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the files of a process in /proc")
def test_client_that_does_not_read(hasty: ServerProcess) -> None:
    wait_for_open_files(hasty, 20)
    before = open_files(hasty)
    # Six times 1.4 MB: more than the buffers of the system hold.
    file = "/static-offline-docs/swagger-ui-bundle.js"
    requests = request("GET", file, Connection="keep-alive") * 5 + request("GET", file)
    with connect(hasty, requests, receive_buffer=4096) as connection:
        deadline = time.monotonic() + 20
        while "the response was not read within 1.5 s (--seconds)" not in hasty.stderr:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        wait_for_open_files(hasty, before)
        assert len(read_to_end(connection)) < 1_000_000, "the rest is dropped, not kept by the system"
    with connect(hasty, requests) as reader:
        assert len(read_to_end(reader)) > 6_000_000, "who reads gets all"


def test_pipelined_requests(hasty: ServerProcess) -> None:
    many = request("GET", "/healthz", Connection="keep-alive") * 300
    with connect(hasty, many + request("GET", "/v1/random?num=0")) as connection:
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 300
    assert answer.endswith(b'{"detail":"num: Input should be greater than or equal to 1"}')


def test_connection_after_an_unexpected_error() -> None:
    """The server closes it, and says so in the response: a client that uses connections again gets its answer."""
    with serving_thread(weights="") as served:
        served.engine.generator_inputs = None  # type: ignore[assignment, method-assign]
        client = http.client.HTTPConnection("127.0.0.1", int(served.url.rpartition(":")[2]), timeout=30)
        with contextlib.closing(client):
            for _ in range(5):
                for path, status in (("/v1/random", 500), ("/healthz", 200)):
                    client.request("GET", path)
                    response = client.getresponse()
                    response.read()
                    assert response.status == status
                    assert (response.getheader("Connection") == "close") == (status == 500)


# --- requests that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_wrong_request(hasty: ServerProcess, name: str) -> None:
    """The status, and one line of JSON; the server goes on."""
    data, status = HOSTILE[name]
    with connect(hasty) as connection:
        with contextlib.suppress(ConnectionError):  # the server may answer and close before all is sent
            connection.sendall(data)
        answer = read_to_end(connection)
    check_answer(answer, status)
    assert "Traceback" not in hasty.stderr
    assert "Warning" not in hasty.stderr


@pytest.mark.parametrize("name", ["GET", "HEAD"])
@pytest.mark.parametrize("target", ["/healthz", "http://other/healthz", "/", "HTTP://other"])
def test_unusual_but_valid_request(hasty: ServerProcess, name: str, target: str) -> None:
    with connect(hasty, request(name, target)) as connection:
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert bool(body) == (name == "GET")

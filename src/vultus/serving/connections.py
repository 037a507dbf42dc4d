"""Limits on connections, so that clients that send or read nothing cannot stop the server for the others.

uvicorn has a time limit for idle connections only after a response, and none for headers, for clients that do not read,
or on the number of open connections. `LimitedProtocol` adds them to its HTTP protocol, the one based on h11, which is
part of every installation of uvicorn.

A connection is in one of five phases. In `work` the server has to act, and such a connection is never closed. In the
others it waits for the client, and each has a time limit:

- `header`: nothing, or a part of a request's header, has arrived: status 408 if it was a part;
- `body`: the body is incomplete: status 408, from `limits.BodyReader`; closed if the response was already sent;
- `read`: the client has not read the response: closed, unless it has read at least 64 KiB since the last check;
- `idle`: between two requests: closed.

When a connection more than the limit is opened, the one that the server has waited for the longest is closed, of the
client address with the most connections. Only if the server has work on all others is the new one refused: status 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import struct
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vultus.errors import UserError

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

Phase = Literal["header", "body", "read", "idle", "work"]

BACKLOG = 128  # connections that the event loop accepts at once, before a limit can act
REFUSED = 32  # connections above the limit that may wait for their status 503
RESERVE = 64  # descriptors for files, libraries and threads
MAX_CONNECTIONS = 1000
STALL = 64 << 10  # bytes that a client has to read in the time limit for a response
LOG_SECONDS = 10.0  # between two log lines of one kind
MAX_DESCRIPTORS = 1 << 16  # enough; some systems allow billions, or name a limit that they do not allow


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on connections.

    Attributes:
        total: open connections.
        per_client: open connections of one client address (IPv6: of one /64 network).
        header: seconds for a request's header to arrive.
        idle: seconds between a response and the next request on the same connection.
        transfer: seconds for a body to arrive, and for each 64 KiB of a response to be read.
    """

    total: int = MAX_CONNECTIONS
    per_client: int = MAX_CONNECTIONS // 2
    header: float = 10.0
    idle: float = 5.0
    transfer: float = 30.0


def connections_possible() -> int:
    """How many connections this process can hold, after raising its soft limit of open files (RLIMIT_NOFILE)."""
    if resource is None:
        return MAX_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    for wanted in (MAX_DESCRIPTORS, 10240):  # macOS allows no more than 10240, whatever its hard limit says
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft < allowed:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
                soft = allowed
    folder = Path("/dev/fd")
    in_use = sum(1 for _ in folder.iterdir()) if folder.is_dir() else RESERVE
    # Descriptors of closed connections are free one pass of the event loop later, so twice the backlog may be on top.
    return soft - in_use - RESERVE - REFUSED - 2 * BACKLOG


def connection_limits(
    total: int | None, per_client: int | None, *, header: float, idle: float, transfer: float
) -> ConnectionLimits:
    """Limits that this process can keep. None: the default. Raises UserError where its number of open files is too low.

    The defaults: 1000 connections, or as many as possible; half of them for one client address.
    """
    possible = connections_possible()
    remedy = "raise the limit of open files (ulimit -n)"
    if possible < 1:
        raise UserError(f"this process may open too few files for any connection; {remedy}")
    if total is not None and total > possible:
        raise UserError(f"--connections {total}: this process can hold at most {possible}; {remedy}")
    total = total or min(MAX_CONNECTIONS, possible)
    return ConnectionLimits(total, min(total, per_client or max(1, total // 2)), header, idle, transfer)


class RateLimit(logging.Filter):
    """Lets each message of a logger through once in LOG_SECONDS: clients must not be able to fill a log."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged. Errors always are."""
        now = time.monotonic()
        if record.levelno < logging.ERROR and now - self._last.get(str(record.msg), -LOG_SECONDS) < LOG_SECONDS:
            return False
        if record.levelno < logging.ERROR:
            self._last[str(record.msg)] = now
        return True


class Connections:
    """The open connections of a server, by client address. For the event loop's thread."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        # Of each client in the order of `since`: the connection that has been waited for the longest is the first.
        self._clients: dict[str, OrderedDict[LimitedProtocol, None]] = {}
        self._refused: OrderedDict[LimitedProtocol, None] = OrderedDict()
        self._count = 0
        self._closed: Counter[str] = Counter()  # reasons that are not logged yet
        self._logged: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._count + len(self._refused)

    def add(self, connection: LimitedProtocol) -> None:
        """Count a new connection; at a limit close another one, or refuse this one."""
        self._watch(connection.loop)
        limits = self.limits
        own: OrderedDict[LimitedProtocol, None] = self._clients.get(connection.client_key, OrderedDict())
        if len(own) >= limits.per_client:
            reason = f"more than {limits.per_client} connections of one client (--client-connections)"
            possible = [own]
        elif self._count >= limits.total:
            reason = f"more than {limits.total} connections (--connections)"
            possible = sorted(self._clients.values(), key=len, reverse=True)
        else:
            self._insert(connection)
            return
        waiting = (other for of_client in possible for other in of_client if other.phase() != "work")
        oldest = next(waiting, None)
        self._note(reason)
        if oldest is None:
            while len(self._refused) >= REFUSED:
                next(iter(self._refused)).end()
            self._refused[connection] = None
            connection.refused = reason
        else:
            oldest.end(503, reason)
            self._insert(connection)

    def remove(self, connection: LimitedProtocol) -> None:
        """Forget a connection that is closed, or about to be."""
        self._refused.pop(connection, None)
        own = self._clients.get(connection.client_key)
        if own is not None and connection in own:
            del own[connection]
            self._count -= 1
            if not own:
                del self._clients[connection.client_key]

    def _insert(self, connection: LimitedProtocol) -> None:
        self._clients.setdefault(connection.client_key, OrderedDict())[connection] = None
        self._count += 1

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None:
            limits = self.limits
            interval = max(0.05, min(2.0, limits.header, limits.idle, limits.transfer) / 4)
            self._timer = loop.call_later(interval, self._check, loop)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the connections that were waited for too long. Runs as long as there are connections."""
        self._timer = None
        now = time.monotonic()
        for connection in [*self._refused, *(one for own in self._clients.values() for one in own)]:
            if connection.update(now) and connection not in self._refused:
                self._clients[connection.client_key].move_to_end(connection)
            self._close_if_late(connection, now)
        self._log(now)
        if len(self) or self._closed:
            self._watch(loop)

    def _close_if_late(self, connection: LimitedProtocol, now: float) -> None:
        limits, waited = self.limits, now - connection.since
        phase = connection.last_phase
        if phase == "header" and waited > limits.header:
            reason = f"the header of the request did not arrive within {limits.header:g} s"
            self._note(f"{reason} (--header-seconds)")
            connection.end(408, reason)
        elif phase == "idle" and waited > limits.idle:
            connection.end()
        elif phase == "body" and connection.responded() and waited > limits.transfer:
            self._note(f"the body of the request did not arrive within {limits.transfer:g} s (--seconds)")
            connection.end()
        elif phase == "read" and waited > limits.transfer:
            self._note(f"the response was not read within {limits.transfer:g} s (--seconds)")
            connection.end()

    def _note(self, reason: str) -> None:
        self._closed[reason] += 1

    def _log(self, now: float) -> None:
        for reason, count in list(self._closed.items()):
            if now - self._logged.get(reason, -LOG_SECONDS) >= LOG_SECONDS:
                logging.getLogger(__name__).warning("note: %d connection(s) closed: %s", count, reason)
                self._logged[reason] = now
                del self._closed[reason]


class LimitedProtocol(H11Protocol):
    """One connection. Use the subclass that `protocol_class` makes."""

    registry: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.client_key = client_key(transport.get_extra_info("peername"))
        self.since = time.monotonic()  # when waiting for the client began
        self.refused: str | None = None  # the reason
        self.last_phase: Phase = "header"
        self._last_cycle: Any = None
        self._unread = 0
        self.registry.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self.registry.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self.transport.is_closing():
            return
        if self.refused is not None:
            self.end(503, self.refused)
        else:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that is not HTTP; here as JSON, and 431 for a header that is too long."""
        too_long = self.conn.their_state is h11.ERROR and len(self.conn.trailing_data[0]) > 1 << 14
        if self._can_respond():
            self._respond(
                431 if too_long else 400, "the header is too long" if too_long else "not a valid HTTP request"
            )
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # no WebSockets; uvicorn would log two lines for each request that asks for one

    def phase(self) -> Phase:
        """What the connection waits for now."""
        if self.flow.write_paused or (self.responded() and self.transport.get_write_buffer_size()):
            return "read"
        if self.conn.their_state is h11.IDLE:
            return "header" if self.cycle is None or self.conn.trailing_data[0] else "idle"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        return "read" if self.transport.is_closing() else "work"

    def responded(self) -> bool:
        """Whether the response to the latest request is complete, or the connection about to be closed."""
        return self.transport.is_closing() or self.cycle is None or self.cycle.response_complete

    def update(self, now: float) -> bool:
        """Set `since` to `now` if the phase has changed since the last update, or the client has read enough."""
        phase, unread = self.phase(), self.transport.get_write_buffer_size()
        changed = phase != self.last_phase or self.cycle is not self._last_cycle
        if changed or (phase == "read" and unread <= self._unread - STALL):
            self.since, self.last_phase, self._last_cycle, self._unread = now, phase, self.cycle, unread
            return True
        self._unread = max(self._unread, unread)
        return False

    def end(self, status: int | None = None, detail: str = "") -> None:
        """Close at once. `status`: of a response, if the client has sent a part of a request and had no response."""
        asked = self.refused or self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if status is not None and asked and self._can_respond():
            self._respond(status, detail)
        self.registry.remove(self)
        if self.transport.get_write_buffer_size():
            # Without RST the system would keep up to megabytes that it has accepted, and offer them for minutes.
            plain = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    def _can_respond(self) -> bool:
        """Whether nothing of the response to the latest request was sent, and the client reads."""
        unread = self.transport.is_closing() or self.transport.get_write_buffer_size()
        return self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not unread

    def _respond(self, status: int, detail: str) -> None:
        body = json.dumps({"detail": detail}).encode()
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(["Retry-After: 1"] if status == 503 else []),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)


def protocol_class(registry: Connections) -> type[LimitedProtocol]:
    """The protocol whose connections are in `registry`, for the option `http` of uvicorn.Config."""
    return type("RegisteredProtocol", (LimitedProtocol,), {"registry": registry})


def client_key(peer: Any) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 network of /64, which one customer usually has."""
    if not isinstance(peer, tuple) or not peer:
        return ""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            mapped = address.ipv4_mapped
            return str(mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(peer[0])

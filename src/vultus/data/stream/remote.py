"""Files that are read in ranges, over HTTP or from a disk, with the faults of a network.

A fault (connection lost, 5xx, no data for a while, a body that is too short) is named in one line and tried again, each
time after twice the pause. A file that changes between two reads is refused: its rows would not be those of the index.
"""

from __future__ import annotations

import http.client
import io
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vultus._progress import message
from vultus.errors import UserError

TAIL = 1 << 16  # bytes at the end that are read at once: they hold the footer of most Parquet files
CHUNK = 1 << 16
GAP = 1 << 16  # bytes between two spans, up to which one request fetches both
SLOWEST = 1 << 14  # bytes in the time limit, below which a connection counts as stalled
LONGEST = 60.0  # seconds between two attempts, at most
AGAIN = frozenset([408, 425, 429, 500, 502, 503, 504])  # statuses that may pass


class Broken(Exception):
    """A file cannot be read, after all attempts. `reason` says why, in words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class _Fault(Exception):
    """An attempt that failed and may succeed later, after `wait` seconds if the server says so."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Attempts:
    """How long to wait for data, and how often to try again; see StreamOptions."""

    timeout: float = 30.0
    retries: int = 5
    pause: float = 0.5
    stopped: threading.Event = field(default_factory=threading.Event)  # when set, nothing is tried again


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Keeps the ETag that the hub sends with a redirect: that of the file, whichever server holds its bytes."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            seen = req.seen
            seen |= {"redirected": True, "etag": headers.get("X-Linked-Etag") or seen.get("etag")}
            setattr(new, "seen", seen)  # noqa: B010
        return new


_opener = urllib.request.build_opener(_Redirect)


class RemoteFile:
    """A file on an HTTP server that answers range requests.

    Attributes:
        size: in bytes, known after open().
        etag: changes with the content: the server's ETag, or its time of modification; "" where it sends neither.
    """

    def __init__(
        self,
        url: str,
        attempts: Attempts,
        *,
        name: str | None = None,
        headers: Callable[[], Mapping[str, str]] = dict,
        revision: str = "",
    ) -> None:
        """`name` is what messages call it; `headers` are sent to its server and to no other. A file of a `revision`
        never changes, so that takes the place of an ETag that is not sent."""
        self.url, self.name, self.attempts, self._revision = url, name or url, attempts, revision
        self._headers = headers
        self.size, self.etag = -1, ""
        self._tail = b""

    def open(self) -> None:
        """Ask for size and ETag. Raises Broken, and UserError for a server that does not answer range requests."""
        self._retried(lambda: self._fetch(0, 1))
        start = max(0, self.size - TAIL)
        self._tail = self.read(start, self.size) if self.size else b""

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`. Raises Broken, and UserError if the file has changed."""
        end = min(end, self.size)
        if start >= end:
            return b""
        at = start - (self.size - len(self._tail))
        if at >= 0:
            return self._tail[at : at + end - start]
        return self._retried(lambda: self._fetch(start, end))

    def probe(self) -> None:
        """Ask for a byte, once. Raises Broken, and UserError if the file has changed."""
        try:
            self._fetch(0, 1)
        except _Fault as fault:
            raise Broken(self.name, str(fault)) from None

    def whole(self, limit: int) -> bytes:
        """The content of a page of at most `limit` bytes, from a server that need not answer range requests.

        Raises Broken.
        """
        return self._retried(lambda: self._fetch_whole(limit))

    def _retried(self, fetch: Callable[[], bytes]) -> bytes:
        pause = self.attempts.pause
        for attempt in range(self.attempts.retries + 1):
            try:
                return fetch()
            except _Fault as fault:
                if attempt == self.attempts.retries or self.attempts.stopped.is_set():
                    raise Broken(self.name, str(fault)) from None
                # The pause varies, so that many readers do not come back at the same moment.
                wait = min(LONGEST, max(fault.wait, pause * random.uniform(0.8, 1.2)))
                again = f"trying again in {wait:.2g} s ({attempt + 1} of {self.attempts.retries})"
                message(f"{self.name}: {fault}; {again}")
                self.attempts.stopped.wait(wait)
                pause *= 2
        raise AssertionError

    def _fetch(self, start: int, end: int) -> bytes:
        return self._answer(
            {"Range": f"bytes={start}-{end - 1}"}, lambda answer, seen: self._body(answer, seen, start, end)
        )

    def _fetch_whole(self, limit: int) -> bytes:
        def body(response: Any, _: Mapping[str, Any]) -> bytes:
            length = response.headers.get("Content-Length")
            data: bytes = response.read(limit)
            if length is not None and len(data) < min(int(length), limit):
                raise _Fault(f"truncated: {len(data)} of {length} bytes")
            return data

        return self._answer({}, body)

    def _answer(self, headers: Mapping[str, str], body: Callable[[Any, Mapping[str, Any]], bytes]) -> bytes:
        """What `body` makes of the response to a request. Raises _Fault where another attempt may succeed."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "vultus", **headers})
        for name, value in self._headers().items():
            request.add_unredirected_header(name, value)
        seen: dict[str, Any] = {}
        request.seen = seen  # type: ignore[attr-defined]
        try:
            with _opener.open(request, timeout=self.attempts.timeout) as response:
                return body(response, seen)
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error)
            raise AssertionError from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _Fault(_words(error, self.attempts.timeout)) from None

    def _body(self, response: Any, seen: Mapping[str, Any], start: int, end: int) -> bytes:
        if response.status != 206:
            raise UserError(
                f"{self.name}: its server does not answer range requests, which a stream needs; use another server, or "
                "fetch the files and prepare them with `vultus prepare`"
            )
        _, _, size = response.headers.get("Content-Range", "").rpartition("/")
        self._check(seen, response.headers, int(size) if size.isdigit() else None)
        end = min(end, self.size)
        parts, length = [], 0
        window, in_window = time.monotonic(), 0
        while length < end - start and not self.attempts.stopped.is_set() and (chunk := response.read1(CHUNK)):
            parts.append(chunk)
            length, in_window = length + len(chunk), in_window + len(chunk)
            if time.monotonic() - window > self.attempts.timeout:
                if in_window < SLOWEST and length < end - start:
                    raise _Fault(f"stalled: {in_window} bytes in {self.attempts.timeout:g} s")
                window, in_window = time.monotonic(), 0
        if length != end - start:
            raise _Fault(f"truncated: {length} of {end - start} bytes")
        return b"".join(parts)

    def _check(self, seen: Mapping[str, Any], headers: Any, size: int | None) -> None:
        """Take size and ETag from the first answer; raise UserError if a later one has others."""
        if seen.get("redirected"):  # the server of the bytes may have an ETag of its own, or several
            etag = seen.get("etag") or ""
        else:
            etag = headers.get("X-Linked-Etag") or headers.get("ETag") or headers.get("Last-Modified") or ""
        etag = etag or self._revision
        if size is None:
            raise _Fault("an answer without the size of the file")
        if self.size < 0:
            self.size, self.etag = size, etag
        elif (size, etag) != (self.size, self.etag):
            raise changed(self.name, f"{self.size} bytes, ETag {self.etag}", f"{size} bytes, ETag {etag}")

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        if error.code == 416 and self.size >= 0:
            raise changed(self.name, f"{self.size} bytes", "fewer")
        reason = f"HTTP {error.code} {error.reason}".strip()
        if error.code in AGAIN:
            wait = error.headers.get("Retry-After") or ""
            raise _Fault(reason, float(wait) if wait.isdigit() else 0.0)
        raise Broken(self.name, reason)


class LocalFile:
    """A file on a disk, with the interface of RemoteFile."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self.size, self.etag = -1, ""

    def open(self) -> None:
        """Ask for size and time of modification. Raises Broken."""
        try:
            self._check(self.path.stat())
        except OSError as error:
            raise Broken(self.name, error.strerror or str(error)) from None

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`. Raises Broken, and UserError if the file has changed."""
        try:
            with open(self.path, "rb") as file:
                self._check(os.fstat(file.fileno()))
                file.seek(start)
                return file.read(max(0, end - start))
        except OSError as error:
            raise Broken(self.name, error.strerror or str(error)) from None

    def probe(self) -> None:
        """As that of RemoteFile."""
        self.read(0, 1)

    def _check(self, status: os.stat_result) -> None:
        etag = f"{status.st_size}-{status.st_mtime_ns}"
        if self.size < 0:
            self.size, self.etag = status.st_size, etag
        elif etag != self.etag:
            raise changed(self.name, f"{self.size} bytes", f"{status.st_size} bytes, modified since")


class Reader(io.RawIOBase):
    """A file of ranges as a file object, which pyarrow reads. `error` is what its last read raised.

    Args:
        file: see above.
        spans: (start, end) of what will be read. They are fetched at once, those near one another by one request, so
            that no request is made from within pyarrow, whose threads must not wait when the program ends.
    """

    def __init__(self, file: RemoteFile | LocalFile, spans: Sequence[tuple[int, int]] = ()) -> None:
        self._file = file
        self._position = 0
        self._held: list[tuple[int, bytes]] = []
        merged: list[list[int]] = []
        for start, end in sorted(spans):
            if merged and start - merged[-1][1] <= GAP:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        for start, end in merged:
            self._held.append((start, file.read(start, end)))
        self._lock = threading.Lock()
        self.error: Exception | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As in io."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        """As in io."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """As in io; the whole of the range that is asked for."""
        with self._lock:
            end = self._file.size if size < 0 else self._position + size
            try:
                data = self._read(self._position, end)
            except Exception as error:
                self.error = error
                raise
            self._position += len(data)
            return data

    def _read(self, start: int, end: int) -> bytes:
        for first, data in self._held:
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        return self._file.read(start, end)


def changed(name: str, before: str, now: str) -> UserError:
    """The error for a file that has changed."""
    return UserError(
        f"{name}: has changed since it was first read ({before}; now {now}), so its rows may be others; put the former "
        "file back and run the same command again, or begin a new run with --fresh or in another --out"
    )


def _words(error: BaseException, timeout: float) -> str:
    """What went wrong, without the name of the file."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError | socket.timeout):
        return f"no data for {timeout:g} s"
    if isinstance(cause, ConnectionResetError | http.client.RemoteDisconnected | BrokenPipeError):
        return "connection lost"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    text = getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__
    return f"no connection ({text})" if isinstance(error, urllib.error.URLError) else str(text)

"""A file server on loopback that answers range requests, and fails as a network does.

with RangeServer(folder) as server:
    server.faults["train-0.parquet"] = ["reset", "503"]   # of the next requests for this file, one each
    server.always["train-1.parquet"] = "503"              # of all requests for this file
    server.address                                        # http://127.0.0.1:PORT
"""

from __future__ import annotations

import html
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class RangeServer(ThreadingHTTPServer):
    """Faults: reset, stall (nothing more is sent), trickle (a byte at a time), truncated, or a status (503, 404)."""

    daemon_threads = True

    def __init__(self, root: Path, *, stall: float = 5.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.stall = stall
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.etags: dict[str, str] = {}
        self.after: dict[str, int] = {}  # requests for a file after which its `always` holds
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()  # bytes
        self.ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> RangeServer:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        pass

    def fault(self, name: str) -> str:
        with self._lock:
            self.requests[name] += 1
            if self.faults.get(name):
                return self.faults[name].pop(0)
            return self.always.get(name, "") if self.requests[name] > self.after.get(name, 0) else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        file = self.server.root / path.lstrip("/")
        if file.is_dir():
            links = "".join(f'<a href="{urllib.parse.quote(each.name)}">{html.escape(each.name)}</a>\n'
                            for each in sorted(file.iterdir()))  # fmt: skip
            self.reply(200, links.encode())
        elif not file.is_file():
            self.reply(404, b"")
        else:
            self.reply_file(file, self.server.fault(file.name))

    def reply_file(self, file: Path, fault: str) -> None:
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault.isdigit():
            self.reply(int(fault), b"")
            return
        data = file.read_bytes()
        etag = self.server.etags.get(file.name) or f'"{len(data)}-{file.stat().st_mtime_ns}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        status = 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found:
            first, size = int(found[1]), len(data)
            data = data[first : int(found[2]) + 1 if found[2] else None]
            headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{size}"
            status = 206
        self.reply(status, data, headers, file.name, fault)

    def reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, name: str = "", fault: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if fault == "truncated":
            self.close_connection = True
            body = body[: len(body) // 2]
        elif fault == "stall":
            self.close_connection = True
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.ended.wait(self.server.stall)
            return
        elif fault == "trickle":
            self.close_connection = True
            end = time.monotonic() + self.server.stall
            for index in range(len(body)):
                if time.monotonic() > end or self.server.ended.wait(0.02):
                    return
                self.wfile.write(body[index : index + 1])
        self.wfile.write(body)
        self.server.sent[name] += len(body)

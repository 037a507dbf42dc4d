"""A stand-in for the Hugging Face hub: the requests that streaming a Parquet data set needs.

It serves `user/faces` from a folder; access to `user/gated` is restricted; nothing else exists.
"""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

SHA = "a" * 40


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: ClassVar[Path]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = urllib.parse.urlparse(self.path).path
        api, files = "/api/datasets/user/faces", "/datasets/user/faces/resolve/"
        if path == "/api/datasets/user/gated":
            self.reply_json({"id": "user/gated", "sha": SHA, "gated": "auto", "tags": [], "siblings": []})
        elif "/user/gated" in path:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif path == api or path.startswith(f"{api}/revision/"):
            names = [{"rfilename": self.entry(file)["path"]} for file in self.root.rglob("*") if file.is_file()]
            self.reply_json({"id": "user/faces", "sha": SHA, "gated": False, "tags": [], "siblings": names})
        elif path.startswith(f"{api}/tree/"):
            folder = self.root / path.removeprefix(f"{api}/tree/").partition("/")[2]
            if folder.is_dir():
                self.reply_json([self.entry(file) for file in sorted(folder.iterdir())])
            else:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif path.startswith(f"{api}/paths-info/"):
            paths = json.loads(body)["paths"] if body[:1] == "{" else urllib.parse.parse_qs(body)["paths"]
            self.reply_json([self.entry(self.root / name) for name in paths if (self.root / name).exists()])
        elif path.startswith(files):
            self.reply_file(self.root / path.removeprefix(files).partition("/")[2])
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, file: Path) -> dict[str, object]:
        name = file.relative_to(self.root).as_posix()
        kind, size = ("directory", 0) if file.is_dir() else ("file", file.stat().st_size)
        return {"type": kind, "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}

    def reply_file(self, file: Path) -> None:
        if not file.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, size = file.read_bytes(), file.stat().st_size
        headers = {"ETag": f'"{self.entry(file)["oid"]}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        requested = self.headers.get("Range")
        if not requested:
            self.reply(200, data, headers)
            return
        first, last = requested.removeprefix("bytes=").split("-")
        data = data[int(first) : int(last) + 1 if last else None]
        self.reply(206, data, {**headers, "Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{size}"})

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

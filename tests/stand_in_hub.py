"""A stand-in for the Hugging Face hub on this machine: just what streaming a Parquet data set asks of it.

It serves `user/faces` from a folder, answers for `user/gated` that access is restricted, and knows nothing else.
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
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
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
            paths = json.loads(asked)["paths"] if asked[:1] == "{" else urllib.parse.parse_qs(asked)["paths"]
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
        data, whole = file.read_bytes(), file.stat().st_size
        headers = {"ETag": f'"{self.entry(file)["oid"]}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if not asked:
            self.reply(200, data, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        data = data[int(first) : int(last) + 1 if last else None]
        self.reply(206, data, {**headers, "Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{whole}"})

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

"""A stand-in for the models of the Hugging Face hub on this machine: what publishing and loading ask of it, in memory.

Only the token `hf_right` may write, and only for the user `ada`; `hf_down` gets an error of the server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Models(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, dict[str, Any]]]  # {name: {"private": bool, "commits": [{path: bytes}]}}
    blobs: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.blobs[oid] = data
        self.reply(200)

    def answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        writes = self.command == "POST" and path != "/api/validate-yaml"
        if token == "hf_down":
            self.reply(500)
        elif writes and token != "hf_right":
            self.reply(401, {"error": "Invalid username or password."})
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self.action(item) for item in json.loads(body)["objects"]]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif path.startswith("/api/models/"):
            user, name, *rest = path.removeprefix("/api/models/").split("/")
            self.api(f"{user}/{name}", rest, body)
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            self.file(name, *rest.split("/", 1))
        else:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "ada":
            self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
            return
        known = name in self.repos
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repos.setdefault(name, {"private": bool(private), "commits": [{}]})
        self.reply(409 if known else 200, {"url": f"{self.here}/{name}"})

    def action(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.blobs:
            return item
        return item | {"actions": {"upload": {"href": f"{self.here}/blobs/{item['oid']}"}}}

    def api(self, name: str, rest: list[str], body: bytes) -> None:
        if name not in self.repos:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        repo = self.repos[name]
        if rest[:1] in ([], ["revision"]):
            files = [{"rfilename": path} for path in repo["commits"][-1]]
            info = {"id": name, "sha": sha(repo), "private": repo["private"], "tags": [], "siblings": files}
            self.reply(200, info)
        elif rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            self.reply(200, {"files": modes})
        elif rest[0] == "commit":
            files = dict(repo["commits"][-1])
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            repo["commits"].append(files)
            self.reply(200, {"commitUrl": f"{self.here}/{name}/commit/{sha(repo)}", "commitOid": sha(repo)})
        else:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound"})

    def file(self, name: str, revision: str, path: str) -> None:
        if name not in self.repos:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        repo = self.repos[name]
        data = repo["commits"][-1].get(path)
        assert revision in ("main", sha(repo))
        if data is None:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha(repo)})
            return
        etag = hashlib.sha256(data).hexdigest()
        self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha(repo)})

    @property
    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    def reply(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def sha(repo: dict[str, Any]) -> str:
    return f"{len(repo['commits']):040x}"


def mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".jpg")) else "regular"


@contextmanager
def serve_models():
    """Serve; yield (address, handler class): its repos and what was asked are there to look at."""
    handler = type("OwnModels", (Models,), {"repos": {}, "blobs": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

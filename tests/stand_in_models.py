"""A local, in-memory stand-in for the model API of the Hugging Face hub: the requests of publishing and loading.

Only the token `hf_right` may write, and only for the user `ada`; with `hf_down` every request gets status 500.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, dict[str, Any]]]  # {name: {"private": bool, "commits": [{path: bytes}]}}
    blobs: ClassVar[dict[str, bytes]]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_request(b"")

    def do_GET(self) -> None:
        self.handle_request(b"")

    def do_POST(self) -> None:
        self.handle_request(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.blobs[oid] = data
        self.reply(200)

    def handle_request(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
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
            self.create_repo(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self.lfs_action(item) for item in json.loads(body)["objects"]]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif path.startswith("/api/models/"):
            user, name, *rest = path.removeprefix("/api/models/").split("/")
            self.model_api(f"{user}/{name}", rest, body)
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            self.download(name, *rest.split("/", 1))
        else:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})

    def create_repo(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        if request["organization"] != "ada":
            self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
            return
        exists = name in self.repos
        private = request.get("private") or request.get("visibility") == "private"
        self.repos.setdefault(name, {"private": bool(private), "commits": [{}]})
        self.reply(409 if exists else 200, {"url": f"{self.base_url}/{name}"})

    def lfs_action(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.blobs:
            return item
        return item | {"actions": {"upload": {"href": f"{self.base_url}/blobs/{item['oid']}"}}}

    def model_api(self, name: str, rest: list[str], body: bytes) -> None:
        if name not in self.repos:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        repo = self.repos[name]
        if rest[:1] in ([], ["revision"]):
            files = [{"rfilename": path} for path in repo["commits"][-1]]
            info = {"id": name, "sha": commit_id(repo), "private": repo["private"], "tags": [], "siblings": files}
            self.reply(200, info)
        elif rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": upload_mode(f["path"]), "shouldIgnore": False} for f in files]
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
            self.reply(
                200, {"commitUrl": f"{self.base_url}/{name}/commit/{commit_id(repo)}", "commitOid": commit_id(repo)}
            )
        else:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound"})

    def download(self, name: str, revision: str, path: str) -> None:
        if name not in self.repos:
            self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        repo = self.repos[name]
        data = repo["commits"][-1].get(path)
        assert revision in ("main", commit_id(repo))
        if data is None:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_id(repo)})
            return
        etag = hashlib.sha256(data).hexdigest()
        self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit_id(repo)})

    @property
    def base_url(self) -> str:
        return f"http://{self.headers['Host']}"

    def reply(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def commit_id(repo: dict[str, Any]) -> str:
    return f"{len(repo['commits']):040x}"


def upload_mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".jpg")) else "regular"


@contextmanager
def serve_models():
    """Run the server; yield (address, handler class), whose `repos` and `blobs` are its state."""
    handler = type("OwnHubHandler", (HubHandler,), {"repos": {}, "blobs": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

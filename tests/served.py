"""Servers for tests: the command `vultus serve` as a process, or its application in a thread of this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conftest import SHARED
from vultus.images import align
from vultus.models.snapshot import default_snapshot, load_snapshot
from vultus.serving.engine import Engine, open_engine
from vultus.serving.server import Server, bind
from vultus.serving.settings import ServerSettings

FACENET = (SHARED / "weights").is_dir()
WEIGHTS = str(SHARED / "weights") if FACENET else ""
needs_facenet = pytest.mark.skipif(not FACENET, reason=f"{SHARED} with FaceNet's weights is not here")
needs_dlib = pytest.mark.skipif(not align.available(), reason="the extra `align` is not installed")


@dataclass
class ServerThread:
    """A server in a thread: its address, its engine, and how to stop it."""

    url: str
    engine: Engine = field(repr=False)
    stop: Callable[[], None] = field(repr=False)

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **options)


@dataclass
class ServerProcess:
    """A server process, its address, and the only folder that it may write to."""

    process: subprocess.Popen[str]
    url: str
    folder: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def stderr(self) -> str:
        return self.folder.with_suffix(".err").read_text()

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **options)


@contextlib.contextmanager
def serving_thread(*, weights: str, **settings: Any) -> Iterator[ServerThread]:
    """The embedded snapshot, with FaceNet if `weights` names its folder. `settings` are those of ServerSettings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VULTUS_WEIGHTS", weights)
        patch.setenv("VULTUS_CACHE", os.devnull)
        engine = open_engine(load_snapshot(default_snapshot()))
    listener = bind("127.0.0.1", 0)
    server = Server(engine, ServerSettings(**settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})

    def stop() -> None:
        server.should_exit = server.force_exit = True
        thread.join()

    thread.start()
    served = ServerThread(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, stop)
    try:
        wait_until_ready(served.client)
        yield served
    finally:
        stop()
        listener.close()
        engine.close()


@contextlib.contextmanager
def serving_process(
    folder: Path,
    *arguments: str,
    weights: str,
    max_files: int | None = None,
    program: Sequence[str] = ("-m", "vultus"),
    **environment: str,
) -> Iterator[ServerProcess]:
    """`vultus serve` with these arguments on a free port. `folder` is its working, home and temporary folder.

    `max_files` is its limit of open files, soft and hard; `program` is what Python runs instead of vultus. At the end
    it must stop with exit code 0 at SIGTERM.
    """
    folder.mkdir()
    own_folders = {name: str(folder) for name in ("HOME", "TMPDIR", "VULTUS_CACHE", "XDG_CACHE_HOME")}
    no_network = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    limited = [] if max_files is None else ["sh", "-c", f'ulimit -n {max_files} && exec "$@"', "sh"]
    with open(folder.with_suffix(".err"), "w") as stderr:
        process = subprocess.Popen(
            [*limited, sys.executable, *program, "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder,
            env=os.environ | own_folders | no_network | {"VULTUS_WEIGHTS": weights, **environment},
        )
    assert process.stdout is not None
    served = ServerProcess(process, process.stdout.readline().strip(), folder)
    try:
        assert served.url.startswith("http://127.0.0.1:"), served.stderr
        wait_until_ready(served.client)
        yield served
        process.terminate()
        assert process.wait(60) == 0, served.stderr
        assert "Traceback" not in served.stderr or program != ("-m", "vultus")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until_ready(connect: Callable[[], httpx2.Client], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    with connect() as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.TransportError):
                if client.get("/readyz").status_code == 200:
                    return
            time.sleep(0.02)
        raise TimeoutError(f"{client.base_url} is not ready after {seconds} s")

"""The verb of the command line that stays: serve."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from vultus._files import processors
from vultus.cli.common import device_named, open_snapshot
from vultus.errors import UserError

MISSING = "serving needs FastAPI and others: pip install 'vultus[serve]'"


def serve_command(arguments: Sequence[str]) -> int:
    """A web page and an HTTP API."""
    parser = ArgumentParser(prog="vultus serve", exit_on_error=False, description="A web page and an HTTP API.")
    parser.add_argument(
        "snapshot", type=str, nargs="?", default="default", help="snapshot, run or published folder, hf://user/name"
    )
    parser.add_argument("--host", type=str, default="127.0.0.1", help="0.0.0.0: for other machines too")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--token", type=str | None, help="requests must carry it; better in VULTUS_TOKEN")
    parser.add_argument("--faces", type=int, default=64, help="that one request may ask for")
    parser.add_argument("--queue", type=int, default=256, help="faces that may wait; then 429")
    parser.add_argument("--megabytes", type=float, default=16.0, help="of a photo")
    parser.add_argument("--megapixels", type=float, default=50.0, help="of a photo")
    parser.add_argument("--seconds", type=float, default=30.0, help="for a body to come in, and for the answer")
    parser.add_argument("--align", type=bool | None, help="find the face in photos; default: where the extra is there")
    parser.add_argument("--exact", action="store_true", help="the same faces to the last bit, always; slower for one")
    parser.add_argument("--no-mark", action="store_true", help="no invisible watermark: pixels for metrics")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    options = parser.parse_args(list(arguments))
    for name in ("faces", "queue", "megabytes", "megapixels", "seconds"):
        if not options[name] > 0:
            raise UserError(f"--{name} {options[name]}: must be more than 0")
    if not 0 <= options.port < 65536:
        raise UserError(f"--port {options.port}: ports are 1 to 65535, or 0 for a free one")
    token = options.token or os.environ.get("VULTUS_TOKEN") or None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UserError("--token: letters, digits and signs of ASCII only, no spaces; that is what HTTP carries")
    # A call of the generator takes half of the processors; two may be under way. Where every matrix product takes all
    # of them, its threads wait for one another and for HTTP, marks and PNG, and the whole is slower (docs/log.md).
    # Torch and numpy read this when they are imported, which nothing has done yet.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors() // 2)))
    try:
        import uvicorn

        from vultus.serving.app import create_app
        from vultus.serving.handlers import ServerSettings
    except ImportError as error:
        raise UserError(f"{MISSING} ({error.name} is not installed)") from None
    from vultus.serving.engine import open_engine

    listener = _listener(options.host, options.port)  # a port in use is said before anything is loaded
    with listener:
        device = device_named(options.device)
        snapshot = open_snapshot(options.snapshot, device)
        hub = options.snapshot if options.snapshot.startswith("hf://") else None
        how: dict[str, Any] = {"name": hub, "exact": options.exact, "mark": not options.no_mark}
        engine = open_engine(snapshot, align=options.align, device=device, **how)
        for line in engine.missing.values():
            print(f"note: {line}", file=sys.stderr)
        settings = ServerSettings(
            faces=options.faces,
            queue=options.queue,
            body_bytes=int(options.megabytes * 1e6),
            megapixels=options.megapixels,
            seconds=options.seconds,
            token=token,
        )
        config = uvicorn.Config(
            create_app(engine, settings),
            access_log=False,
            log_level="warning",
            server_header=False,
            lifespan="on",
            backlog=1024,
            timeout_graceful_shutdown=int(2 * options.seconds) + 1,
        )
        address = listener.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        print(f"http://{host}:{address[1]}", flush=True)
        try:
            _run(uvicorn.Server(config), listener)
        finally:
            engine.close()
    return 0


def _listener(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError if there is no such address or the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "in use; choose another --port, or stop what uses it" if taken else f"cannot be had ({error})"
        raise UserError(f"{host}:{port}: {reason}") from None
    return listener


def _run(server: Any, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was begun. A second SIGINT ends it at once."""

    def stop(*_: Any) -> None:
        # Uvicorn raises the signal that stopped it once more; this is the handler that it meets then. So the verb ends
        # as any other that did its work, not as one that was killed.
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The server process: bind the port, run uvicorn, shut down on a signal."""

from __future__ import annotations

import errno
import signal
import socket
from typing import Any

import uvicorn

from vultus.errors import UserError
from vultus.serving.app import create_app
from vultus.serving.engine import Engine
from vultus.serving.settings import ServerSettings


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises UserError if the address is invalid or the port in use."""
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
        in_use = error.errno == errno.EADDRINUSE
        reason = (
            "in use; choose another --port, or stop the program that uses it" if in_use else f"not usable ({error})"
        )
        raise UserError(f"{host}:{port}: {reason}") from None
    return listener


def serve(engine: Engine, settings: ServerSettings, listener: socket.socket) -> None:
    """Print the URL and serve until SIGTERM or SIGINT; then finish the requests in progress and close the engine.

    Runs in the main thread. A second SIGINT stops at once.
    """
    config = uvicorn.Config(
        create_app(engine, settings),
        access_log=False,
        log_level="warning",
        server_header=False,
        lifespan="on",
        backlog=1024,
        timeout_graceful_shutdown=int(2 * settings.timeout) + 1,
    )
    address = listener.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"http://{host}:{address[1]}", flush=True)
    try:
        _run(uvicorn.Server(config), listener)
    finally:
        engine.close()


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    def stop(*_: Any) -> None:
        # After shutdown uvicorn raises the signal again, and this handler receives it: the process then ends with exit
        # code 0 instead of being killed by the signal.
        server.should_exit = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""The server process: bind the port, run uvicorn, shut down on a signal."""

from __future__ import annotations

import errno
import logging
import math
import signal
import socket
from typing import Any

import uvicorn

from vultus.errors import UserError
from vultus.serving.app import create_app
from vultus.serving.connections import BACKLOG, Connections, RateLimit, protocol_class
from vultus.serving.engine import Engine
from vultus.serving.logs import redact_errors
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


class Server(uvicorn.Server):
    """The server of an engine, with limits on connections (see connections.py)."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        config = uvicorn.Config(
            create_app(engine, settings),
            # Chosen, not left to what is installed: the limits work with h11, and are tested with this event loop.
            http=protocol_class(Connections(settings.connections)),
            loop="asyncio",
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            lifespan="on",
            backlog=BACKLOG,
            timeout_keep_alive=math.ceil(settings.connections.idle),
            timeout_graceful_shutdown=int(2 * settings.timeout) + 1,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(RateLimit())
        redact_errors()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        for listener in sockets or []:
            # asyncio's backlog is both the queue of the system and the connections that are accepted at once. The queue
            # may be longer, so that no client of a crowd has to try again.
            listener.listen(1024)


def serve(engine: Engine, settings: ServerSettings, listener: socket.socket) -> None:
    """Print the URL and serve until SIGTERM or SIGINT; then finish the requests in progress and close the engine.

    Runs in the main thread. A second SIGINT stops at once. Raises UserError if the generator's output is not finite.
    """
    address = listener.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    try:
        engine.check()
        server = Server(engine, settings)
        print(f"http://{host}:{address[1]}", flush=True)
        _run(server, listener)
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

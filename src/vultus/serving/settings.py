"""Limits and authentication of a server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from vultus.errors import UserError
from vultus.serving.connections import ConnectionLimits


@dataclass(frozen=True)
class ServerSettings:
    """Limits and authentication of a server.

    Attributes:
        max_faces: faces of one request.
        max_body_bytes: bytes of a photo.
        max_megapixels: 10^6 pixels of a photo.
        max_queue: faces that may wait or be in progress, over all requests.
        timeout: seconds for the request body to arrive, and the same again for the response.
        connections: how many may be open, and how long they may wait for a client.
        token: bearer token that requests must carry; None: no authentication.
        cors: origins whose pages may read answers (see checked_origins); none: only the server's own page.
    """

    max_faces: int = 64
    max_body_bytes: int = 16 << 20
    max_megapixels: float = 50.0
    max_queue: int = 256
    timeout: float = 30.0
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    token: str | None = None
    cors: tuple[str, ...] = ()


def checked_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Origins for cross-origin requests (CORS), as browsers write them: `scheme://host` or `scheme://host:port`.

    "*" alone stands for every origin. Raises UserError for anything else that is not an origin: it would never be equal
    to what a browser sends.
    """
    for origin in origins:
        if origin == "*":
            if len(origins) > 1:
                raise UserError("--cors: * is every origin; leave out the others")
        elif origin != (origin_of := _origin(origin)):
            hint = f"did you mean {origin_of}?" if origin_of else "give scheme://host or scheme://host:port"
            raise UserError(f"--cors: {origin} is not an origin as browsers send it; {hint}")
    return tuple(origins)


def _origin(address: str) -> str | None:
    """The origin of an http address (RFC 6454): in lower case, without the scheme's own port. None: it has none."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host or not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in (None, {"http": 80, "https": 443}[parts.scheme]) else f":{port}")

"""Limits and authentication of a server."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    max_faces: int = 64
    max_body_bytes: int = 16 << 20
    max_megapixels: float = 50.0
    max_queue: int = 256
    timeout: float = 30.0
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    token: str | None = None

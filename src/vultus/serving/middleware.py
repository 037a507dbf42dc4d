"""Around every route: authentication, metrics for Prometheus, and security headers."""

import hmac
import re
import time
from typing import Annotated, Any

from fastapi import Depends, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vultus.serving.batching import BATCH_SIZES
from vultus.serving.errors import ApiError
from vultus.serving.limits import LoadLimiter

# The pages of this server load nothing from other hosts. Only Swagger UI (/docs) needs inline scripts and styles.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
INLINE = "; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
OTHER = "other"  # label of unknown methods and of paths without a route: clients must not create labels


def bearer(token: str | None) -> list[Any]:
    """FastAPI dependencies that reject requests without the bearer token (401). None: no authentication."""
    if token is None:
        return []
    scheme = HTTPBearer(auto_error=False, description="the token that the server was started with")

    async def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Security(scheme)]) -> None:
        # compare_digest takes constant time: the response time reveals nothing about the token.
        if credentials is None or not hmac.compare_digest(credentials.credentials.encode(), token.encode()):
            raise ApiError(401, "the token is missing or wrong; send Authorization: Bearer TOKEN", CHALLENGE)

    return [Depends(check)]


class ServerMetrics:
    """The metrics at /metrics: requests, faces, calls of the generator, and the process."""

    def __init__(self, limiter: LoadLimiter) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "vultus_requests", "Responses sent", ["route", "method", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "vultus_request_seconds", "Seconds until the response was sent", ["route"], registry=self.registry
        )
        self.call_faces = Histogram(
            "vultus_call_faces", "Faces generated in one call", registry=self.registry, buckets=BATCH_SIZES
        )
        self.call_seconds = Histogram("vultus_call_seconds", "Seconds of one generator call", registry=self.registry)
        waiting = Gauge(
            "vultus_waiting_faces", "Work waiting or in progress, in units of one face", registry=self.registry
        )
        waiting.set_function(lambda: limiter.load)

    def observe_call(self, faces: int, seconds: float) -> None:
        """Record one call of the generator."""
        self.call_faces.observe(faces)
        self.call_seconds.observe(seconds)

    def response(self) -> Response:
        """All metrics in Prometheus' text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class MetricsMiddleware:
    """ASGI middleware that counts and times responses."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)
            method = scope["method"] if scope["method"] in METHODS else OTHER
            self.metrics.requests.labels(route, method, status).inc()
            self.metrics.request_seconds.labels(route).observe(time.perf_counter() - started)


class MessageMiddleware:
    """ASGI middleware for what HTTP/1.1 requires of servers beyond the checks of h11.

    A target may be a whole URL. A body of two lengths, by `Content-Length` and in chunks, is an error (400): a reverse
    proxy in front might read the other one, and take a part of one request for the next. A path with a null character
    is that of no file (404): the file system's functions raise ValueError for it, which Starlette 0.49.1 lets pass.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            detail = "the body has both Content-Length and Transfer-Encoding"
            await JSONResponse({"detail": detail}, 400, {"Connection": "close"})(scope, receive, send)
            return
        if "\0" in scope["path"]:
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
            return
        if target := re.match(r"https?://[^/]*(?=/|$)", scope["path"], re.IGNORECASE):
            scope = {**scope, "path": scope["path"][target.end() :] or "/"}
        await self.app(scope, receive, send)


class HeadersMiddleware:
    """ASGI middleware that adds security headers, and forbids caching of /v1."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_headers(scope["path"]))
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _headers(path: str) -> dict[str, str]:
    policy = POLICY + (INLINE if path == "/docs" else "")
    headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Content-Security-Policy": policy}
    return headers | ({"Cache-Control": "no-store"} if path.startswith("/v1/") else {})

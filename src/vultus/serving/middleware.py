"""What lies around every route of the HTTP API: the token, errors in one line, headers, and figures for Prometheus."""

import hmac
import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
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
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vultus.images.io import BadImage, TooLarge
from vultus.serving.batching import SIZES, Busy, Gate
from vultus.serving.schemas import Problem

DESCRIPTIONS = {
    400: "The body is not what its Content-Type says",
    401: "The token is missing or wrong",
    408: "The body came in too slowly",
    413: "The body, or the photo in it, is too large",
    415: "Content-Type is not one that this takes",
    422: "What was sent cannot be used: a name, a number, an embedding, a photo without a face",
    429: "Too much work is waiting; Retry-After says when to come back",
    503: "Not possible here (the detail says what is missing), or not in time",
}
# No page of this server loads anything from elsewhere. Only the description of the API has scripts and styles inside.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
INLINE = "; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
UNKNOWN = "other"  # paths without a route, in the figures


class Refusal(Exception):
    """An answer that is an error: its status and one line."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document."""
    return {status: {"model": Problem, "description": DESCRIPTIONS[status]} for status in statuses}


def refused_in_json(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route whose good answers are not JSON."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}}
    return {status: {"description": DESCRIPTIONS[status], "content": content} for status in statuses}


def answer_errors(app: FastAPI) -> None:
    """Answer every error as {"detail": line}, and never with what was sent."""

    def problem(status: int, detail: str, headers: Any = None) -> Response:
        return JSONResponse({"detail": detail}, status, headers)

    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> Response:
        return problem(error.status, error.detail, error.headers)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        return problem(429, str(error), {"Retry-After": str(error.seconds)})

    @app.exception_handler(BadImage)
    async def bad_image(_: Request, error: BadImage) -> Response:
        return problem(413 if isinstance(error, TooLarge) else 422, f"the photo: {error}")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(422, f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}")

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; the figures do

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return problem(500, f"an error of the server ({type(error).__name__}); its log says where")


def bearer(token: str | None) -> list[Any]:
    """Dependencies that refuse requests without the token; none without a token."""
    if token is None:
        return []
    scheme = HTTPBearer(auto_error=False, description="the token that the server was started with")

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Security(scheme)]) -> None:
        # In constant time: how long it takes tells nothing about the token.
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise Refusal(401, "the token is missing or wrong; send Authorization: Bearer TOKEN", CHALLENGE)

    return [Depends(check)]


class Figures:
    """What /metrics tells: requests, faces, calls of the generator, memory."""

    def __init__(self, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.answers = Counter(
            "vultus_requests", "Requests answered", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "vultus_request_seconds", "Until the answer was complete", ["route"], registry=self.registry
        )
        self.call_faces = Histogram("vultus_call_faces", "Faces to a call", registry=self.registry, buckets=SIZES)
        self.call_seconds = Histogram("vultus_call_seconds", "Seconds of a call", registry=self.registry)
        waiting = Gauge("vultus_waiting_faces", "Work in the house, in faces", registry=self.registry)
        waiting.set_function(lambda: gate.held)

    def observe_call(self, faces: int, seconds: float) -> None:
        """A call of the generator is done."""
        self.call_faces.observe(faces)
        self.call_seconds.observe(seconds)

    def text(self) -> Response:
        """In Prometheus' text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Edge:
    """ASGI middleware: counts answers, and puts headers on them."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self.app, self.figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_headers(scope["path"]))
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", UNKNOWN)
            method = scope["method"] if scope["method"] in METHODS else UNKNOWN
            self.figures.answers.labels(route, method, status).inc()
            self.figures.seconds.labels(route).observe(time.perf_counter() - begun)


def _headers(path: str) -> dict[str, str]:
    policy = POLICY + (INLINE if path == "/docs" else "")
    headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Content-Security-Policy": policy}
    return headers | ({"Cache-Control": "no-store"} if path.startswith("/v1/") else {})

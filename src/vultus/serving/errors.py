"""Errors of the HTTP API: `{"detail": "one line"}`, which never repeats what the client sent."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vultus.images.io import BadImage, TooLarge
from vultus.serving.batching import NotFinite
from vultus.serving.schemas import Problem

DESCRIPTIONS = {
    400: "The body is not valid for its Content-Type",
    401: "The token is missing or wrong",
    408: "The body arrived too slowly",
    413: "The body, or the photo in it, is too large",
    415: "The Content-Type is not supported",
    422: "A parameter, an embedding or a photo is invalid",
    429: "The server is overloaded; Retry-After says when to try again",
    503: "Not available on this server (the detail says what is missing), or not finished in time",
}
CLIENT_CLOSED_REQUEST = 499  # nginx's status code; no client reads it, but the metrics count it


class ApiError(Exception):
    """An error response: its status code, one line of detail, and headers."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that returns JSON, for the OpenAPI document."""
    return {status: {"model": Problem, "description": DESCRIPTIONS[status]} for status in statuses}


def json_error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route whose successful responses are not JSON."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}}
    return {status: {"description": DESCRIPTIONS[status], "content": content} for status in statuses}


def add_error_handlers(app: FastAPI) -> None:
    """Return every error as {"detail": line}."""

    def problem(status: int, detail: str, headers: Any = None) -> Response:
        return JSONResponse({"detail": detail}, status, headers)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return problem(error.status, error.detail, error.headers)

    @app.exception_handler(BadImage)
    async def bad_image(_: Request, error: BadImage) -> Response:
        return problem(413 if isinstance(error, TooLarge) else 422, f"the photo: {error}")

    @app.exception_handler(NotFinite)
    async def not_finite(_: Request, error: NotFinite) -> Response:
        return problem(500, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(422, f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}")

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def internal_error(_: Request, error: Exception) -> Response:
        # After this response the error is raised again, and uvicorn closes the connection: the client must know.
        close = {"Connection": "close"}
        return problem(500, f"internal server error ({type(error).__name__}); see the log of the server", close)

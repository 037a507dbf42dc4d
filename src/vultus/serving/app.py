"""The ASGI application: routes, OpenAPI document and the files of the page.

Privacy: no request is stored, cached or logged; responses of /v1 forbid caching; the page loads nothing from other
hosts.
"""

import asyncio
import contextlib
import importlib.metadata
import importlib.resources
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from vultus.serving.batching import NotFinite
from vultus.serving.engine import Engine
from vultus.serving.errors import ApiError, add_error_handlers, error_responses, json_error_responses
from vultus.serving.forms import FIELD, FORM
from vultus.serving.handlers import BINARY, JSON, NPY, PHOTO_TYPES, UPLOAD_TYPES, Api
from vultus.serving.memory import release_when_idle
from vultus.serving.middleware import HeadersMiddleware, MessageMiddleware, MetricsMiddleware, ServerMetrics, bearer
from vultus.serving.saved_files import reads_saved_files
from vultus.serving.schemas import Embedding, Faces, Model, PhotoOptions, request_models
from vultus.serving.settings import ServerSettings

# A page of another origin may send these headers, and read those. No cookies: the server has none.
CORS_HEADERS: dict[str, Any] = {
    "allow_methods": ("GET", "POST"),
    "allow_headers": ("Authorization", "Content-Type"),
    "expose_headers": ("Vultus-Model", "Vultus-Seed", "Vultus-Note", "Retry-After"),
}


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI application of an engine, which the caller closes."""
    settings = settings or ServerSettings()
    ready = asyncio.Event()
    failure: list[str] = []  # of the warm-up, one line

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def warm_up() -> None:
            try:
                await asyncio.to_thread(engine.warm_up)
            except Exception as error:
                known = isinstance(error, NotFinite)
                failure.append(str(error) if known else f"the warm-up failed ({type(error).__name__}); see the log")
                logging.getLogger(__name__).exception("warm-up failed; the server is not ready")
            else:
                ready.set()

        warming_up = asyncio.create_task(warm_up())
        releasing = asyncio.create_task(release_when_idle(api.limiter))
        yield
        releasing.cancel()
        await warming_up

    app = FastAPIOffline(
        redoc_url=None,
        title="vultus",
        version=importlib.metadata.version("vultus"),
        summary="Faces from face embeddings",
        lifespan=lifespan,
        separate_input_output_schemas=False,
        swagger_ui_parameters={"validatorUrl": None},
    )
    api = Api(engine, settings)
    metrics = ServerMetrics(api.limiter)
    engine.batcher.observe = metrics.observe_call
    if settings.cors:
        # The innermost: the answers to preflight requests get the security headers, and are counted, too.
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, **CORS_HEADERS)
    app.add_middleware(HeadersMiddleware)
    app.add_middleware(MessageMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    add_error_handlers(app)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Liveness: the process runs, and its generator works", responses=error_responses(503))
    async def healthz() -> dict[str, str]:
        if failure:
            raise ApiError(503, failure[0])
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Readiness: requests are answered without delay", responses=error_responses(503))
    async def readyz() -> dict[str, str]:
        if not ready.is_set():
            raise ApiError(503, failure[0] if failure else "not ready: the server is warming up", {"Retry-After": "1"})
        return {"status": "ready"}

    app.include_router(_routes(api, settings))

    # The function's name is part of the operation id in the OpenAPI document.
    @app.get(
        "/metrics",
        name="metrics",
        summary="Metrics for Prometheus",
        dependencies=bearer(settings.token),
        response_class=PlainTextResponse,
        responses=json_error_responses(401),
    )
    async def metrics_text() -> Response:
        return metrics.response()

    _add_page(app)
    return app


def _routes(api: Api, settings: ServerSettings) -> APIRouter:
    # Function names are part of the operation ids in the OpenAPI document: renaming one breaks generated clients.
    c_dim = api.engine.snapshot.network.c_dim
    options_type, faces_type, between_type, random_type = request_models(
        c_dim, settings.max_faces, list(api.engine.directions.vectors) if api.engine.directions else ()
    )
    faces_type = reads_saved_files(faces_type, api.engine.snapshot.metadata.get("encoder", {}).get("id"))
    router = APIRouter(prefix="/v1", dependencies=bearer(settings.token), responses=error_responses(401))
    with_body = error_responses(408, 413, 422, 429, 503)
    images = _image_responses()

    @router.post(
        "/faces",
        summary="Faces of embeddings, or of a photo",
        responses=images | with_body | error_responses(400, 415),
        openapi_extra=_request_body(faces_type, BINARY, NPY, *UPLOAD_TYPES, form=True),
    )
    async def faces(request: Request, options: Annotated[options_type, Query()]) -> Response:  # type: ignore[valid-type]
        """Options are query parameters; with JSON they may also stand beside the embeddings, and then take precedence.

        A single face is returned as an image file, unless the Accept header contains application/json or `similarity`
        is set; several faces are returned as JSON. `format=npy` returns one array, uint8 [N, R, R, 3]. Binary
        embeddings (application/octet-stream) are rows of little-endian float32. A JSON file of `vultus embed` or of the
        page is a request, too; it is refused if it names another encoder than that of the model.
        """
        return await api.faces(request, options, faces_type)

    @router.post(
        "/embeddings",
        summary="The embedding of a face in a photo, or of all",
        responses={200: {"model": Embedding}} | with_body | error_responses(400, 415),
        openapi_extra=_request_body(None, *UPLOAD_TYPES, form=True),
    )
    async def embeddings(request: Request, options: Annotated[PhotoOptions, Query()]) -> Response:
        return await api.embeddings(request, options)

    @router.post(
        "/between",
        summary="Faces along the arc from one embedding to another",
        responses={200: {"model": Faces}} | with_body | error_responses(400, 415),
        openapi_extra=_request_body(between_type),
    )
    async def between(request: Request) -> Response:
        return await api.between(request, between_type)

    @router.get("/random", summary="People who do not exist", responses=images | error_responses(422, 429, 503))
    async def random(request: Request, options: Annotated[random_type, Query()]) -> Response:  # type: ignore[valid-type]
        return await api.random(request, options)

    @router.get("/model", summary="The model, available features and limits", responses={200: {"model": Model}})
    async def model() -> Response:
        return JSONResponse(api.model())

    return router


# --- the OpenAPI document ---------------------------------------------------------------------------------------------


def _image_responses() -> dict[int | str, dict[str, Any]]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = dict.fromkeys((*PHOTO_TYPES, NPY), binary)
    return {200: {"model": Faces, "description": "The image, an array, or JSON", "content": content}}


def _request_body(model: type[BaseModel] | None, *binary_types: str, form: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {name: {"schema": {"type": "string", "format": "binary"}} for name in binary_types}
    if model is not None:
        content = {JSON: {"schema": model.model_json_schema()}} | content
    if form:
        file = {"type": "string", "format": "binary", "description": "the photo's file"}
        fields = {"type": "object", "properties": {FIELD: file}, "required": [FIELD], "additionalProperties": False}
        content[FORM] = {"schema": fields, "encoding": {FIELD: {"contentType": ", ".join(UPLOAD_TYPES)}}}
    return {"requestBody": {"required": True, "content": content}}


# --- the page ---------------------------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    """One route for each file of the page, so that no other path can reach a file."""
    folder = Path(str(importlib.resources.files("vultus"))) / "assets" / "page"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        for path in ["/", "/index.html"] if name == "index.html" else [f"/{name}"]:
            app.add_api_route(path, _file_route(file), methods=["GET", "HEAD"], include_in_schema=False)


def _file_route(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send_file() -> FileResponse:
        return FileResponse(file, headers={"Cache-Control": "no-cache"})

    return send_file

"""The HTTP API and the page: routes over an Engine. Extra `serve`.

Nothing that comes in is kept, cached or logged; answers of /v1 forbid caching, and the page may load nothing from
elsewhere. What is refused is refused early: the token before the body is read, the body while it comes in, the work
before it begins.
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

from vultus.serving.engine import Engine
from vultus.serving.handlers import BINARY, JSON, NPY, PHOTOS, Api, ServerSettings
from vultus.serving.middleware import Edge, Figures, Refusal, answer_errors, bearer, refusals, refused_in_json
from vultus.serving.schemas import Embedding, Faces, Model, requests


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI application. The engine stays the caller's to close."""
    settings = settings or ServerSettings()
    ready = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def warm_up() -> None:
            try:
                await asyncio.to_thread(engine.warm_up)
            except Exception:
                logging.getLogger(__name__).exception("the first faces could not be drawn; the server is not ready")
            else:
                ready.set()

        warming = asyncio.create_task(warm_up())
        yield
        await warming

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
    figures = Figures(api.gate)
    engine.batcher.observe = figures.observe_call
    app.add_middleware(Edge, figures=figures)
    answer_errors(app)

    @app.get("/healthz", summary="The process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Requests are answered at once", responses=refusals(503))
    async def readyz() -> dict[str, str]:
        if not ready.is_set():
            raise Refusal(503, "not ready: warming up, or broken as the log says", {"Retry-After": "1"})
        return {"status": "ready"}

    app.include_router(_routes(api, settings))

    @app.get(
        "/metrics",
        summary="Figures for Prometheus",
        dependencies=bearer(settings.token),
        response_class=PlainTextResponse,
        responses=refused_in_json(401),
    )
    async def metrics() -> Response:
        return figures.text()

    _add_page(app)
    return app


def _routes(api: Api, settings: ServerSettings) -> APIRouter:
    generator = api.engine.snapshot.network
    options_type, faces_type, between_type, random_type = requests(generator.c_dim, settings.faces)
    router = APIRouter(prefix="/v1", dependencies=bearer(settings.token), responses=refusals(401))
    work = refusals(408, 413, 422, 429, 503)
    pictures = _pictures()

    @router.post(
        "/faces",
        summary="Faces of embeddings, or of a photo",
        responses=pictures | work | refusals(400, 415),
        openapi_extra=_body(faces_type, BINARY, NPY, *PHOTOS),
    )
    async def faces(request: Request, options: Annotated[options_type, Query()]) -> Response:  # type: ignore[valid-type]
        """Options come as query parameters, or with the embeddings in the JSON, which go before.

        One face comes as the picture itself unless JSON is accepted or the similarity asked for; `npy` as one array
        uint8 [N, R, R, 3]. Binary embeddings are rows of little-endian float32.
        """
        return await api.faces(request, options, faces_type)

    @router.post(
        "/embeddings",
        summary="The embedding of a photo",
        responses={200: {"model": Embedding}} | work | refusals(415),
        openapi_extra=_body(None, *PHOTOS),
    )
    async def embeddings(request: Request) -> Response:
        return await api.embeddings(request)

    @router.post(
        "/between",
        summary="Faces along the arc from one embedding to another",
        responses={200: {"model": Faces}} | work | refusals(400, 415),
        openapi_extra=_body(between_type),
    )
    async def between(request: Request) -> Response:
        return await api.between(request, between_type)

    @router.get("/random", summary="People who do not exist", responses=pictures | refusals(422, 429, 503))
    async def random(request: Request, options: Annotated[random_type, Query()]) -> Response:  # type: ignore[valid-type]
        return await api.random(request, options)

    @router.get("/model", summary="What is served, and what can be done", responses={200: {"model": Model}})
    async def model() -> Response:
        return JSONResponse(api.model())

    return router


# --- the OpenAPI document ---------------------------------------------------------------------------------------------


def _pictures() -> dict[int | str, dict[str, Any]]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = dict.fromkeys((*PHOTOS, NPY), binary)
    return {200: {"model": Faces, "description": "The picture, or JSON", "content": content}}


def _body(model: type[BaseModel] | None, *binary: str) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in binary}
    if model is not None:
        content = {JSON: {"schema": model.model_json_schema()}} | content
    return {"requestBody": {"required": True, "content": content}}


# --- the page ---------------------------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    """One route for each file of the page, so that no other path leads to a file."""
    folder = Path(str(importlib.resources.files("vultus"))) / "assets" / "page"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        for path in ["/", "/index.html"] if name == "index.html" else [f"/{name}"]:
            app.add_api_route(path, _serve(file), include_in_schema=False)


def _serve(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def serve() -> FileResponse:
        return FileResponse(file, headers={"Cache-Control": "no-cache"})

    return serve

"""The work behind the routes of the HTTP API: read a request, draw, answer. Extra `serve`.

What is refused is refused early: a body while it comes in, work before it begins.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from torch import Tensor

from vultus.sampling.conditioning import EmbeddedPhoto
from vultus.sampling.population import slerp
from vultus.serving.batching import Gate
from vultus.serving.engine import KINDS, NATURAL, BadEmbedding, Engine, data_uri, npy, png, read_npy, unit_rows
from vultus.serving.middleware import Refusal
from vultus.serving.schemas import one_line

T = TypeVar("T")

JSON, NPY, BINARY = "application/json", "application/x-npy", "application/octet-stream"
PHOTOS = ("image/png", "image/jpeg", "image/webp")
# What work costs, in faces drawn among others: on one core 7 ms a face, 87 a photo, 47 a face that is compared.
PHOTO_COST, COMPARE_COST = 12, 7


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows.

    Attributes:
        faces: of one request.
        body_bytes: of a photo.
        megapixels: of a photo.
        queue: faces that may be waiting or being drawn, of all requests together.
        seconds: that a body may take to come in, and then the answer to be ready.
        token: that requests must carry, or None.
    """

    faces: int = 64
    body_bytes: int = 16 << 20
    megapixels: float = 50.0
    queue: int = 256
    seconds: float = 30.0
    token: str | None = None


class Api:
    """One engine and what it may be asked for."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.gate = Gate(settings.queue)
        self.bodies = Bodies(8 * settings.body_bytes, settings.seconds)
        c_dim = engine.snapshot.network.c_dim
        self.c_dim = c_dim
        # A number takes 25 characters as text at most, and a comma and a space.
        limits = {JSON: settings.faces * c_dim * 32 + 4096, BINARY: settings.faces * c_dim * 4}
        self.limits = limits | {NPY: settings.faces * c_dim * 8 + 4096} | dict.fromkeys(PHOTOS, settings.body_bytes)

    async def faces(self, request: Request, options: Any, faces_type: type[BaseModel]) -> Response:
        """Faces of embeddings or of a photo. `options` are those of the query."""
        kind = self._kind(request, JSON, BINARY, NPY, *PHOTOS)
        async with self.bodies.read(request, self.limits[kind]) as data:
            if kind in PHOTOS:
                self._need("photos")
                c = None
            elif kind == JSON:
                body: Any = _parse(faces_type, data)
                c = _rows(lambda: unit_rows(np.array(body.embeddings), self.c_dim))
                given = body.model_dump(exclude_unset=True, exclude={"embeddings"})
                options = options.model_copy(update=given)
            else:
                c = self._binary(kind, data)
            count = (1 if c is None else len(c)) * options.num
            if count > self.settings.faces:
                raise Refusal(
                    422, f"{count // options.num} x {options.num} faces; the limit is {self.settings.faces} a request"
                )
            if options.similarity and options.format == "npy":
                raise Refusal(422, "similarity: goes with pictures, not with npy")
            cost = count * (1 + COMPARE_COST * options.similarity) + (PHOTO_COST if c is None else 0)
            with self.gate.hold(cost):
                return await self._finish(request, self._faces(request, data, c, options))

    async def _faces(self, request: Request, data: bytes, c: Tensor | None, options: Any) -> Response:
        seen = await self._look(data) if c is None else None
        c = seen.c[None] if seen is not None else c
        assert c is not None
        z, c, places = self.engine.rows(c, options.num, options.seed, options.noise_strength)
        return await self._answer(request, options, z, c, places, seen=seen, similarity=options.similarity)

    async def embeddings(self, request: Request) -> Response:
        """The embedding of a photo."""
        kind = self._kind(request, *PHOTOS)
        async with self.bodies.read(request, self.limits[kind]) as data:
            self._need("photos")
            with self.gate.hold(PHOTO_COST):
                return await self._finish(request, self._embeddings(data))

    async def _embeddings(self, data: bytes) -> Response:
        seen = await self._look(data)
        crop = await _run(self.engine.encoders, png, seen.crop)
        found = {"embedding": seen.c.tolist(), "crop": data_uri(crop, "png"), "faces_found": seen.faces}
        return JSONResponse(found | {"note": self._note(seen)})

    async def between(self, request: Request, between_type: type[BaseModel]) -> Response:
        """Faces along the arc, all with the same noise."""
        kind = self._kind(request, JSON)
        async with self.bodies.read(request, self.limits[kind]) as data:
            body: Any = _parse(between_type, data)
            a, b = _rows(lambda: unit_rows(np.array([body.a, body.b]), self.c_dim))
            c = slerp(a, b, torch.linspace(0, 1, body.steps))
            with self.gate.hold(body.steps):
                z = self.engine.rows(c[:1], 1, body.seed, body.noise_strength)[0].expand(body.steps, -1)
                places = [(step, 0) for step in range(body.steps)]
                return await self._finish(request, self._answer(request, body, z, c, places, as_json=True))

    async def random(self, request: Request, options: Any) -> Response:
        """People who do not exist."""
        self._need("random")
        with self.gate.hold(options.num):
            return await self._finish(request, self._random(request, options))

    async def _random(self, request: Request, options: Any) -> Response:
        people = await _run(self.engine.encoders, self.engine.random, options.seed, options.num)
        z, c, places = self.engine.rows(people, 1, options.seed, options.noise_strength)
        return await self._answer(request, options, z, c, places, embeddings=people.tolist())

    async def _answer(
        self,
        request: Request,
        options: Any,
        z: Tensor,
        c: Tensor,
        places: list[tuple[int, int]],
        *,
        seen: EmbeddedPhoto | None = None,
        similarity: bool = False,
        embeddings: list[list[float]] | None = None,
        as_json: bool = False,
    ) -> Response:
        """Draw, and answer as the options and the Accept header say."""
        engine, note = self.engine, self._note(seen)
        images = await asyncio.wrap_future(engine.draw(z, c))
        about = {"Vultus-Model": engine.name, "Vultus-Seed": str(options.seed)}
        about |= {"Vultus-Note": note} if note else {}

        if options.format == "npy":
            return Response(await _run(engine.encoders, npy, images), media_type=NPY, headers=about)
        files = await _run(engine.encoders, engine.encode, images, places, options.format, options.seed)
        if len(files) == 1 and not (similarity or as_json or JSON in request.headers.get("accept", "")):
            return Response(files[0], media_type=f"image/{options.format}", headers=about)
        faces: list[dict[str, Any]] = [
            {"index": index, "variant": variant, "seed": options.seed, "image": data_uri(file, options.format)}
            for (index, variant), file in zip(places, files, strict=True)
        ]
        if similarity:
            for face, scores in zip(faces, await _run(engine.reader, engine.compare, images, c, seen), strict=True):
                face["similarity"] = scores
        for face, embedding in zip(faces, embeddings or [], strict=False):
            face["embedding"] = embedding
        return JSONResponse({"model": engine.name, "faces": faces, "note": note})

    def model(self) -> dict[str, Any]:
        """What is served, and what can be done."""
        engine, settings = self.engine, self.settings
        generator, metadata, missing = engine.snapshot.network, engine.snapshot.metadata, engine.missing

        def part(key: str) -> dict[str, Any]:
            return {"available": key not in missing, "missing": missing.get(key)}

        def scale(key: str, of: str) -> dict[str, Any]:
            measure = "cosine" if key == "facenet" else "minus euclidean distance"
            ranges = {
                who: dict(zip(("low", "mean", "high"), values, strict=True)) for who, values in NATURAL[key].items()
            }
            return part(of) | {"measure": measure} | ranges

        return {
            "id": engine.name,
            "resolution": generator.resolution,
            "c_dim": generator.c_dim,
            "z_dim": generator.z_dim,
            "encoder": metadata.get("encoder", {}).get("id"),
            "licence": metadata.get("licence"),
            "formats": [*KINDS, "npy"],
            "photos": part("photos") | {"aligned": engine.align, "note": missing.get("align")},
            "random": part("random"),
            "similarity": {"facenet": scale("facenet", "photos"), "dlib": scale("dlib", "dlib")},
            "limits": {
                "faces": settings.faces,
                "body_bytes": settings.body_bytes,
                "megapixels": settings.megapixels,
                "queue": settings.queue,
                "seconds": settings.seconds,
            },
        }

    # --- steps --------------------------------------------------------------------------------------------------------

    def _kind(self, request: Request, *known: str) -> str:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in known:
            raise Refusal(415, f"Content-Type {kind or '(none)'}: this takes {', '.join(known)}")
        return kind

    def _need(self, what: str) -> None:
        if what in self.engine.missing:
            raise Refusal(503, self.engine.missing[what])

    def _binary(self, kind: str, data: bytes) -> Tensor:
        if kind == BINARY:
            if not data or len(data) % (4 * self.c_dim):
                raise Refusal(422, f"{len(data)} bytes; an embedding is {self.c_dim} float32 numbers, little-endian")
            return _rows(lambda: unit_rows(np.frombuffer(data, "<f4").reshape(-1, self.c_dim), self.c_dim))
        try:
            return _rows(lambda: read_npy(data, self.c_dim))
        except Exception as error:
            if isinstance(error, Refusal):
                raise
            raise Refusal(400, f"not a .npy file of numbers ({' '.join(str(error).split())[:100]})") from None

    async def _look(self, data: bytes) -> EmbeddedPhoto:
        return await _run(self.engine.reader, self.engine.look, data, int(self.settings.megapixels * 1e6))

    def _note(self, seen: EmbeddedPhoto | None) -> str | None:
        if seen is None:
            return None
        if seen.faces is None:
            return self.engine.missing.get("align", "nobody looked for a face: the centre square is taken")
        return f"{seen.faces} faces found; the largest is taken" if seen.faces > 1 else None

    async def _finish(self, request: Request, work: Awaitable[T]) -> T:
        """Wait for the work as long as the client waits, and not too long."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.settings.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            seconds = f"{self.settings.seconds:g}"
            raise Refusal(503, f"not ready within {seconds} s; ask for less, or later", {"Retry-After": "5"})
        finally:
            task.cancel()
            gone.cancel()


class Bodies:
    """Reads bodies, each of a limited size, all of them together of another."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit, self.seconds, self.held = limit, seconds, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """The body of a request. What is too large is refused before it has all come in."""
        data = bytearray()
        too_large = Refusal(413, f"larger than {limit} bytes, the limit", {"Connection": "close"})
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            try:
                async with asyncio.timeout(self.seconds):
                    async for chunk in request.stream():
                        if len(data) + len(chunk) > limit:
                            raise too_large
                        if self.held + len(chunk) > self.limit:
                            raise Refusal(429, "too much is coming in; try again", {"Retry-After": "1"})
                        data += chunk
                        self.held += len(chunk)
            except TimeoutError:
                close = {"Connection": "close"}
                raise Refusal(408, f"the body did not come in within {self.seconds:g} s", close) from None
            if not data:
                raise Refusal(422, "the body is empty")
            yield bytes(data)
        finally:
            self.held -= len(data)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _run(where: Executor, call: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(where, call, *arguments)


def _parse(kind: type[BaseModel], data: bytes) -> BaseModel:
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        malformed = error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid"
        raise Refusal(400 if malformed else 422, one_line(error)) from None


def _rows(read: Callable[[], Tensor]) -> Tensor:
    try:
        return read()
    except BadEmbedding as error:
        raise Refusal(422, str(error)) from None

"""What each route of the HTTP API does: read and check the request, generate, respond.

Requests are rejected as early as possible: a body while it arrives, work before it starts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from torch import Tensor

from vultus.errors import UserError
from vultus.images.io import photo_media_types
from vultus.models.encoders import FACENET_ID
from vultus.sampling.directions import Directions, describe, parse_edits
from vultus.sampling.latents import blend, slerp
from vultus.sampling.photos import EmbeddedPhoto
from vultus.serving.engine import IMAGE_FORMATS, REAL_PAIRS, Engine, Place
from vultus.serving.errors import ApiError
from vultus.serving.forms import FORM, photo_of_form
from vultus.serving.limits import BodyReader, LoadLimiter
from vultus.serving.payloads import BadEmbedding, data_uri, npy_file, png_file, read_npy, unit_rows
from vultus.serving.schemas import one_line
from vultus.serving.settings import ServerSettings

T = TypeVar("T")

JSON, NPY, BINARY = "application/json", "application/x-npy", "application/octet-stream"
PHOTO_TYPES = ("image/png", "image/jpeg", "image/webp")
UPLOAD_TYPES = tuple(photo_media_types())  # of photos
# Cost of an embedded photo and of a compared face, in generated faces: on one core 87 and 47 ms, against 7 ms a face.
PHOTO_COST, SIMILARITY_COST = 12, 7
# Of all faces of a photo: each further one takes 53 ms. Counted as six, because their number is not known before.
GROUP_COST = PHOTO_COST + 5 * SIMILARITY_COST


class Api:
    """The request handlers of one engine.

    Args:
        engine: generates faces and embeds photos.
        settings: limits.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.limiter = LoadLimiter(settings.max_queue)
        self.bodies = BodyReader(8 * settings.max_body_bytes, settings.timeout)
        self.c_dim = engine.snapshot.network.c_dim
        numbers = settings.max_faces * self.c_dim
        # As text a float32 has at most 25 characters, plus a comma and spaces.
        self.max_bytes = {JSON: numbers * 32 + 4096, BINARY: numbers * 4, NPY: numbers * 8 + 4096}
        self.max_bytes |= dict.fromkeys((FORM, *UPLOAD_TYPES), settings.max_body_bytes)

    async def faces(self, request: Request, options: Any, faces_type: type[BaseModel]) -> Response:
        """Faces of embeddings or of a photo. `options` come from the query; those in a JSON body override them."""
        content_type = self._content_type(request, JSON, BINARY, NPY, *UPLOAD_TYPES, FORM)
        async with self.bodies.read(request, self.max_bytes[content_type]) as data:
            mean = None
            if content_type == FORM or content_type in UPLOAD_TYPES:
                data, c = await self._photo(request, data, content_type), None
                self._require("photos")
            elif content_type == JSON:
                body: Any = _parse(faces_type, data)
                c = _valid_rows(lambda: unit_rows(np.array(body.embeddings), self.c_dim))
                if body.weights is not None:
                    c = mean = _blend(c, body.weights)
                in_body = body.model_dump(exclude_unset=True, exclude={"embeddings", "weights"})
                options = options.model_copy(update=in_body)
            else:
                c = self._binary_rows(content_type, data)
            if options.similarity and options.format == "npy":
                raise ApiError(422, "similarity: not available with format npy; use png, webp or jpeg")
            count = self._count(1 if c is None else len(c), options)
            cost = count * (1 + SIMILARITY_COST * options.similarity) + (_photo_cost(options) if c is None else 0)
            with self.limiter.reserve(cost):
                return await self._run_request(request, self._faces(request, data, c, options, mean))

    def _count(self, rows: int, options: Any) -> int:
        """The number of faces of a request. Raises ApiError if they are too many."""
        if rows * options.num > self.settings.max_faces:
            limit = self.settings.max_faces
            raise ApiError(422, f"{rows} x {options.num} faces; the limit is {limit} per request")
        return int(rows * options.num)

    async def _faces(
        self, request: Request, data: bytes, c: Tensor | None, options: Any, mean: Tensor | None
    ) -> Response:
        photos: list[EmbeddedPhoto] = []
        if c is None:
            photos = await self._embed(data, options)
            self._count(len(photos), options)
            c = torch.stack([photo.c for photo in photos])
        z, c, places = self.engine.generator_inputs(c, options.num, options.seed, options.noise_strength, options.start)
        embeddings = None if mean is None else mean.tolist() * options.num
        more: dict[str, Any] = {"similarity": options.similarity, "embeddings": embeddings}
        return await self._respond(request, options, z, c, places, photos=photos, **more)

    async def embeddings(self, request: Request, options: Any) -> Response:
        """The embeddings of faces in a photo."""
        content_type = self._content_type(request, *UPLOAD_TYPES, FORM)
        async with self.bodies.read(request, self.max_bytes[content_type]) as data:
            data = await self._photo(request, data, content_type)
            self._require("photos")
            with self.limiter.reserve(_photo_cost(options)):
                return await self._run_request(request, self._embeddings(data, options))

    async def _embeddings(self, data: bytes, options: Any) -> Response:
        photos = await self._embed(data, options)
        crops = [await _run(self.engine.encode_threads, png_file, photo.crop) for photo in photos]
        faces = [
            {"embedding": photo.c.tolist(), "crop": data_uri(crop, "png"), "box": photo.box}
            for photo, crop in zip(photos, crops, strict=True)
        ]
        first = {"embedding": faces[0]["embedding"], "crop": faces[0]["crop"]}
        note = self._note(photos, options)
        return JSONResponse(first | {"faces_found": photos[0].faces, "faces": faces, "note": note})

    async def between(self, request: Request, between_type: type[BaseModel]) -> Response:
        """Faces along the arc between two embeddings, all with the same noise."""
        content_type = self._content_type(request, JSON)
        async with self.bodies.read(request, self.max_bytes[content_type]) as data:
            body: Any = _parse(between_type, data)
            a, b = _valid_rows(lambda: unit_rows(np.array([body.a, body.b]), self.c_dim))
            # As `vultus generate --between`; torch.linspace rounds differently.
            c = slerp(a, b, torch.from_numpy(np.linspace(0, 1, body.steps, dtype=np.float32)))
            with self.limiter.reserve(body.steps):
                z = self.engine.generator_inputs(c[:1], 1, body.seed, body.noise_strength)[0].expand(body.steps, -1)
                places = [(step, 0) for step in range(body.steps)]
                return await self._run_request(request, self._respond(request, body, z, c, places, as_json=True))

    async def random(self, request: Request, options: Any) -> Response:
        """Faces of random identities."""
        self._require("random")
        with self.limiter.reserve(options.num):
            return await self._run_request(request, self._random(request, options))

    async def _random(self, request: Request, options: Any) -> Response:
        engine = self.engine
        which = (options.seed, options.start, options.num)
        identities = await _run(engine.encode_threads, engine.random_identities, *which)
        z, c, places = engine.generator_inputs(identities, 1, options.seed, options.noise_strength, options.start)
        return await self._respond(request, options, z, c, places, embeddings=identities.tolist())

    async def _respond(
        self,
        request: Request,
        options: Any,
        z: Tensor,
        c: Tensor,
        places: list[Place],
        *,
        photos: Sequence[EmbeddedPhoto] = (),
        similarity: bool = False,
        embeddings: list[list[float]] | None = None,
        as_json: bool = False,
    ) -> Response:
        """Generate, and return an image, an array or JSON, as the options and the Accept header ask for."""
        engine, note = self.engine, self._note(photos, options)
        # Similarities are those to the embedding as it was given: they say what an edit costs.
        images = await asyncio.wrap_future(engine.generate(z, self._edited(c, options.edit)))
        headers = {"Vultus-Model": engine.name, "Vultus-Seed": str(options.seed)}
        headers |= {"Vultus-Note": note} if note else {}

        if options.format == "npy":
            return Response(await _run(engine.encode_threads, npy_file, images), media_type=NPY, headers=headers)
        files = await _run(engine.encode_threads, engine.encode, images, places, options.format, options.seed)
        if len(files) == 1 and not (similarity or as_json or JSON in request.headers.get("accept", "")):
            return Response(files[0], media_type=f"image/{options.format}", headers=headers)
        faces: list[dict[str, Any]] = [
            {"index": index, "variant": variant, "seed": options.seed, "image": data_uri(file, options.format)}
            for (index, variant), file in zip(places, files, strict=True)
        ]
        if similarity:
            scores = await _run(engine.photo_thread, engine.similarities, images, c, photos)
            for face, of_face in zip(faces, scores, strict=True):
                face["similarity"] = of_face
        for face, embedding in zip(faces, embeddings or [], strict=False):
            face["embedding"] = embedding
        return JSONResponse({"model": engine.name, "faces": faces, "note": note})

    def _edited(self, c: Tensor, text: str) -> Tensor:
        try:
            return self.engine.edit(c, parse_edits(text.split(",") if text else (), "edit"))
        except UserError as error:
            raise ApiError(422, str(error)) from None

    def model(self) -> dict[str, Any]:
        """The model, the features that are available, and the limits."""
        engine, settings = self.engine, self.settings
        generator, metadata, missing = engine.snapshot.network, engine.snapshot.metadata, engine.missing

        def feature(key: str) -> dict[str, Any]:
            return {"available": key not in missing, "missing": missing.get(key)}

        def scale(key: str, needs: str) -> dict[str, Any]:
            measure = "cosine" if key == "facenet" else "minus euclidean distance"
            ranges = {
                pair: dict(zip(("low", "mean", "high"), values, strict=True))
                for pair, values in REAL_PAIRS[key].items()
            }
            given, encoder = feature(needs), engine.encoder
            if key == "facenet" and encoder is not None and encoder.id != FACENET_ID:
                given = {"available": False, "missing": f"the embeddings are of {encoder.id}, not FaceNet's"}
            return given | {"measure": measure} | ranges

        return {
            "id": engine.name,
            "resolution": generator.resolution,
            "c_dim": generator.c_dim,
            "z_dim": generator.z_dim,
            "encoder": metadata.get("encoder", {}).get("id"),
            "licence": metadata.get("licence"),
            "formats": [*IMAGE_FORMATS, "npy"],
            "photos": feature("photos") | {"aligned": engine.align, "note": missing.get("align")},
            "random": feature("random"),
            "edits": _edits(engine.directions),
            "similarity": {"facenet": scale("facenet", "photos"), "dlib": scale("dlib", "dlib")},
            "limits": {
                "faces": settings.max_faces,
                "body_bytes": settings.max_body_bytes,
                "megapixels": settings.max_megapixels,
                "queue": settings.max_queue,
                "seconds": settings.timeout,
            },
        }

    # --- steps --------------------------------------------------------------------------------------------------------

    def _content_type(self, request: Request, *supported: str) -> str:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in supported:
            name = content_type or "(none)"
            if not re.fullmatch(r"[\w.+-]{1,60}/[\w.+-]{1,60}|\(none\)", name, re.ASCII):
                name = "(not valid)"
            raise ApiError(415, f"Content-Type {name} is not supported; use {', '.join(supported)}")
        return content_type

    def _require(self, feature: str) -> None:
        if feature in self.engine.missing:
            raise ApiError(503, self.engine.missing[feature])

    def _binary_rows(self, content_type: str, data: bytes) -> Tensor:
        if content_type == BINARY:
            if not data or len(data) % (4 * self.c_dim):
                raise ApiError(422, f"{len(data)} bytes; an embedding is {self.c_dim} float32 numbers, little-endian")
            return _valid_rows(lambda: unit_rows(np.frombuffer(data, "<f4").reshape(-1, self.c_dim), self.c_dim))
        try:
            return _valid_rows(lambda: read_npy(data, self.c_dim))
        except Exception as error:
            if isinstance(error, ApiError):
                raise
            raise ApiError(400, f"not a .npy file of numbers ({' '.join(str(error).split())[:100]})") from None

    async def _photo(self, request: Request, data: bytes, content_type: str) -> bytes:
        """The photo's file in a body that has arrived, which is that file or a form."""
        if content_type != FORM:
            return data
        return await _run(self.engine.encode_threads, photo_of_form, data, request.headers["content-type"])

    async def _embed(self, data: bytes, options: Any) -> list[EmbeddedPhoto]:
        max_pixels = int(self.settings.max_megapixels * 1e6)
        return await _run(self.engine.photo_thread, self.engine.embed, data, options.face, max_pixels)

    def _note(self, photos: Sequence[EmbeddedPhoto], options: Any) -> str | None:
        if not photos:
            return None
        found = photos[0].faces
        if found is None:
            return self.engine.missing.get("align", "faces were not detected; the centre square of the photo is used")
        used = {"largest": "the largest is used", "central": "the central one is used", "all": "all are used"}
        return f"{found} faces found; {used[options.face]}" if found > 1 else None

    async def _run_request(self, request: Request, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the client disconnects or the time is up."""
        task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, disconnect}, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if disconnect.done():
                raise ClientDisconnect
            detail = f"not finished within {self.settings.timeout:g} s; request fewer faces, or try again later"
            raise ApiError(503, detail, {"Retry-After": "5"})
        finally:
            task.cancel()
            disconnect.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _run(executor: Executor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)


def _parse(body_type: type[BaseModel], data: bytes) -> BaseModel:
    try:
        return body_type.model_validate_json(data, strict=True)
    except ValidationError as error:
        malformed = error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid"
        raise ApiError(400 if malformed else 422, one_line(error)) from None


def _edits(directions: Directions | None) -> list[dict[str, Any]]:
    """What /v1/model says of the attributes that can be edited."""
    about = directions.metadata["attributes"] if directions is not None else {}
    return [
        {
            "name": name,
            "meaning": about.get(name, {}).get("meaning", name),
            "costs": {key: describe(edit) for key, edit in about.get(name, {}).get("edits", {}).items()},
        }
        for name in (directions.vectors if directions is not None else ())
    ]


def _photo_cost(options: Any) -> int:
    return GROUP_COST if options.face == "all" else PHOTO_COST


def _blend(c: Tensor, weights: list[float]) -> Tensor:
    """The weighted mean [1, c_dim] of embeddings c [N, c_dim]."""
    if len(weights) != len(c):
        raise ApiError(422, f"weights: {len(weights)} weights of {len(c)} embeddings; give one for each")
    try:
        return blend(c, torch.tensor(weights))[None]
    except UserError as error:
        raise ApiError(422, f"weights: {error}") from None


def _valid_rows(read: Callable[[], Tensor]) -> Tensor:
    try:
        return read()
    except BadEmbedding as error:
        raise ApiError(422, str(error)) from None

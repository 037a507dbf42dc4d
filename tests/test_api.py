"""The HTTP API in this process, with a tiny generator: every route, every error, and its OpenAPI document."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import logging
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
import schemathesis
import torch
from fastapi import FastAPI
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from starlette.testclient import TestClient
from torch import Tensor

from tiny_exports import write_snapshot
from tiny_parts import DIM, SIDE, TinyEncoder, TinyGenerator, Z
from vultus.cli.main import main
from vultus.errors import UserError
from vultus.images.io import photo_media_types, to_images
from vultus.images.xmp import read_metadata
from vultus.models.facenet import FaceNet
from vultus.models.snapshot import Snapshot, load_snapshot, save_snapshot
from vultus.sampling.directions import Directions
from vultus.sampling.latents import noise, sample_identities, slerp
from vultus.sampling.population import fit_population
from vultus.serving.app import create_app
from vultus.serving.engine import Engine
from vultus.serving.settings import ServerSettings, checked_origins

JSON, NPY, BINARY = "application/json", "application/x-npy", "application/octet-stream"
FORM = "multipart/form-data"
C = torch.nn.functional.normalize(torch.randn(6, DIM, generator=torch.Generator().manual_seed(0)), dim=1)


class PhotoEncoder(TinyEncoder):
    """TinyEncoder that also embeds crops, and passes for FaceNet."""

    id = FaceNet.id

    def __init__(self) -> None:
        super().__init__()
        self.on_device = torch.nn.Parameter(torch.zeros(1))

    def embed_crop(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(x, 6)
        return torch.nn.functional.normalize(x.flatten(1) @ self.weight, dim=1)


class BlockedGenerator(TinyGenerator):
    """Waits for an event."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        assert self.release.wait(20)
        return super().forward(z, c)


class BrokenGenerator(TinyGenerator):
    """Always fails."""

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: device lost")


class NanGenerator(TinyGenerator):
    """Returns a number that is not finite in each image."""

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        x = super().forward(z, c).clone()
        x[:, 0, 0, 0] = float("nan")
        return x


def engine(generator: TinyGenerator | None = None, **options: Any) -> Engine:
    population = fit_population(torch.randn(400, DIM, generator=torch.Generator().manual_seed(1)))
    metadata = {"encoder": {"id": "tiny-test"}, "licence": "none"}
    snapshot = Snapshot((generator or TinyGenerator()).eval().requires_grad_(False), population, metadata)
    options = {"encoder": PhotoEncoder(), "name": "0123456789abcdef", "exact": True, **options}
    return Engine(snapshot, **options)


SMILE = Directions({"smile": torch.eye(DIM)[0]}, {"attributes": {"smile": {"meaning": "wider", "edits": {}}}})


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(engine(), ServerSettings(max_faces=12, max_body_bytes=200_000, max_megapixels=1.0))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        while client.get("/readyz").status_code != 200:
            pass
        yield client


def photo(kind: str = "JPEG", size: tuple[int, int] = (90, 60), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes | str) -> np.ndarray:
    if isinstance(data, str):
        data = base64.b64decode(data.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def npy_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def expected(c: Tensor, seed: int, variant: int, strength: float = 1.0, index: int = 0) -> np.ndarray:
    """The face that the generator gives in a batch of 16."""
    z = torch.zeros(16, Z)
    z[0] = noise(seed, index, 1, Z, variant=variant)[0] * strength
    batch = torch.zeros(16, DIM)
    batch[0] = c
    return to_images(TinyGenerator()(z, batch).detach())[0].permute(1, 2, 0).numpy()


# --- generated faces --------------------------------------------------------------------------------------------------


def test_face_depends_only_on_embedding_number_seed_and_variant(client: TestClient) -> None:
    together = client.post("/v1/faces", json={"embeddings": C[:3].tolist(), "num": 3, "seed": 7}).json()
    assert [(face["index"], face["variant"], face["seed"]) for face in together["faces"]] == [
        (index, variant, 7) for index in range(3) for variant in range(3)
    ]
    for face in together["faces"]:
        index = face["index"]
        difference = pixels(face["image"]).astype(int) - expected(C[index], 7, face["variant"], index=index)
        assert int(np.abs(difference).max()) <= 1
    alone = client.post("/v1/faces", json={"embeddings": [C[2].tolist()], "seed": 7, "start": 2})
    assert alone.headers["content-type"] == "image/png"
    assert np.array_equal(pixels(alone.content), expected(C[2], 7, 0, index=2))
    assert not np.array_equal(pixels(alone.content), expected(C[2], 8, 0, index=2))
    assert "embedding 2, noise 0" in str(Image.open(io.BytesIO(alone.content)).info)


def test_weighted_mean_of_embeddings(client: TestClient) -> None:
    """One person of several embeddings; with a weight of 0 an embedding does not count."""
    weights = [1.0, 0.5, 0.0]
    body = {"embeddings": C[:3].tolist(), "weights": weights, "num": 2, "seed": 4}
    faces = client.post("/v1/faces", json=body).json()["faces"]
    mean = torch.nn.functional.normalize(C[0] + 0.5 * C[1], dim=0)
    for variant, face in enumerate(faces):
        assert (face["index"], face["variant"]) == (0, variant)
        assert torch.allclose(torch.tensor(face["embedding"]), mean, atol=1e-6)
        assert np.array_equal(pixels(face["image"]), expected(torch.tensor(face["embedding"]), 4, variant))
    assert len(faces) == 2
    check_problem(client.post("/v1/faces", json=body | {"weights": [1]}), 422, "weights: 1 weights of 3 embeddings")
    opposite = {"embeddings": [ROW, (-C[0]).tolist()], "weights": [1, 1]}
    check_problem(client.post("/v1/faces", json=opposite), 422, "weights: .* cancel")


def saved_file(rows: np.ndarray) -> bytes:
    """A JSON file of `vultus embed`."""
    faces = [{"key": "a.jpg", "faces_found": 2, "box": [1, 2, 3, 4], "embedding": row} for row in rows.tolist()]
    header = {"format": 1, "encoder": {"id": "tiny-test"}, "skipped": []}
    return json.dumps({"vultus": header, "encoder": "tiny-test", "faces": faces}).encode()


def test_every_encoding_of_embeddings_gives_the_same_faces(client: TestClient) -> None:
    rows = C[:2].numpy()
    bodies: list[tuple[bytes, str]] = [
        (rows.astype("<f4").tobytes(), BINARY),
        (npy_file(rows), NPY),
        (npy_file(np.asfortranarray(rows.astype(np.float64))), NPY),
        (npy_file(rows * 1e-30), NPY),  # only the direction of an embedding counts
        (json.dumps({"embeddings": rows.tolist()}).encode(), JSON),
        (saved_file(rows), JSON),
    ]
    responses = [
        client.post("/v1/faces?seed=3&format=npy&noise_strength=0.5", content=data, headers={"Content-Type": kind})
        for data, kind in bodies
    ]
    arrays = [np.load(io.BytesIO(response.content)) for response in responses]
    assert arrays[0].shape == (2, SIDE, SIDE, 3)
    assert arrays[0].dtype == np.uint8
    assert np.array_equal(arrays[0][1], expected(C[1], 3, 0, 0.5, index=1))
    for array in arrays:
        assert int(np.abs(array.astype(int) - arrays[0]).max()) <= 1  # rows were normalised again
    single = client.post("/v1/faces", content=npy_file(rows[0]), headers={"Content-Type": NPY})
    assert np.array_equal(pixels(single.content), expected(C[0], 0, 0))
    for encoder in ("tiny-test", None):  # as the page saves it
        single = client.post("/v1/faces", json={"embedding": rows[0].tolist(), "encoder": encoder})
        assert np.array_equal(pixels(single.content), expected(C[0], 0, 0))


def test_options_in_json_override_the_query(client: TestClient) -> None:
    body = {"embeddings": C[:1].tolist(), "seed": 5}
    response = client.post("/v1/faces?seed=9&format=npy", json=body)
    assert np.array_equal(np.load(io.BytesIO(response.content))[0], expected(C[0], 5, 0))


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_images_are_marked_as_synthetic(client: TestClient, image_format: str) -> None:
    body = {"embeddings": C[:1].tolist(), "seed": 4, "format": image_format}
    response = client.post("/v1/faces", json=body)
    assert response.headers["content-type"] == f"image/{image_format}"
    assert response.headers["vultus-model"] == "0123456789abcdef"
    image = Image.open(io.BytesIO(response.content))
    assert image.format == image_format.upper()
    marks = read_metadata(image)
    assert (marks.synthetic, marks.model, marks.seed) == (True, "0123456789abcdef", 4)
    as_json = client.post("/v1/faces", json=body, headers={"Accept": "application/json"}).json()
    assert as_json["faces"][0]["image"].startswith(f"data:image/{image_format};base64,")
    assert base64.b64decode(as_json["faces"][0]["image"].partition(",")[2]) == response.content


def test_photo(client: TestClient) -> None:
    embedded = client.post("/v1/embeddings", content=photo(), headers={"Content-Type": "image/jpeg"}).json()
    assert pixels(embedded["crop"]).shape == (PhotoEncoder.size, PhotoEncoder.size, 3)
    assert embedded["faces_found"] is None
    assert "centre square" in embedded["note"]
    response = client.post("/v1/faces?seed=2", content=photo(), headers={"Content-Type": "image/jpeg; charset=x"})
    assert "centre square" in response.headers["vultus-note"]
    assert np.array_equal(pixels(response.content), expected(torch.tensor(embedded["embedding"]), 2, 0))
    scored = client.post(
        "/v1/faces?num=2&similarity=true", content=photo("WEBP"), headers={"Content-Type": "image/webp"}
    ).json()
    for face in scored["faces"]:
        assert -1 <= face["similarity"]["facenet"] <= 1
        assert face["similarity"]["dlib"] is None, "dlib is not loaded"


def test_photo_in_a_form(client: TestClient) -> None:
    """As the body itself, however the form names the file and its type; also a photo above the size of a spool file."""
    raw = client.post("/v1/embeddings", content=photo(), headers={"Content-Type": "image/jpeg"}).json()
    for file in (("me.jpg", photo(), "image/jpeg"), ("顔 🙂", photo()), (None, photo())):
        assert client.post("/v1/embeddings", files={"photo": file}).json() == raw
    response = client.post("/v1/faces?seed=2", files={"photo": ("me.jpg", photo())})
    assert np.array_equal(pixels(response.content), expected(torch.tensor(raw["embedding"]), 2, 0))


def test_photo_in_a_form_touches_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.__init__", refuse)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    data = photo("PNG", (900, 900), compress_level=0)
    assert len(data) > 2_000_000
    with TestClient(create_app(engine())) as client:
        assert client.post("/v1/embeddings", files={"photo": ("me.png", data)}).status_code == 200


def form(*parts: tuple[str, bytes], end: bytes = b"--limit--\r\n") -> bytes:
    """A form of (Content-Disposition, data) with the boundary `limit`."""
    lines = (f"--limit\r\nContent-Disposition: {header}\r\n\r\n".encode() + data + b"\r\n" for header, data in parts)
    return b"".join(lines) + end


A_PHOTO = 'form-data; name="photo"; filename="a.jpg"'
BAD_FORMS: dict[str, tuple[bytes, str, int, str]] = {
    "no boundary": (form((A_PHOTO, b"x")), "multipart/form-data", 400, "no boundary"),
    "another boundary": (form((A_PHOTO, b"x")), "multipart/form-data; boundary=other", 400, "not valid"),
    "no bytes": (b"", "", 422, "empty"),
    "no field": (form(), "", 422, "no field photo"),
    "two photos": (form((A_PHOTO, b"x"), (A_PHOTO, b"x")), "", 422, "more than once"),
    "another field": (form((A_PHOTO, b"x"), ('form-data; name="seed"', b"3")), "", 422, "options are query param"),
    "a wrong name": (form(('form-data; name="file"; filename="a.jpg"', b"x")), "", 422, "only the field photo"),
    "no name": (form(("form-data", b"x")), "", 422, "only the field photo"),
    "an empty file": (form((A_PHOTO, b"")), "", 422, "photo is empty"),
    "not a photo": (form((A_PHOTO, b"%PDF-1.7")), "", 422, "not a JPEG"),
    "cut off": (form((A_PHOTO, photo()), end=b""), "", 400, "last boundary"),
    "no header": (b"--limit\r\n\r\nx\r\n--limit--\r\n", "", 422, "only the field photo"),
    "a header of 9 kB": (form((A_PHOTO + "x" * 9000, b"x")), "", 400, "not valid"),
    "not a form": (b"abc", "", 400, "not valid"),
    "many bytes": (form((A_PHOTO, bytes(200_000))), "", 413, "larger than the limit of 200000 bytes"),
}


@pytest.mark.parametrize("path", ["/v1/faces", "/v1/embeddings"])
@pytest.mark.parametrize("name", BAD_FORMS)
def test_bad_form_gives_one_line(client: TestClient, name: str, path: str) -> None:
    body, kind, status, words = BAD_FORMS[name]
    headers = {"Content-Type": kind or 'multipart/form-data; boundary="limit"'}
    check_problem(client.post(path, content=body, headers=headers), status, words)


def test_long_form_is_rejected_while_it_arrives(client: TestClient) -> None:
    chunks = (bytes(50_000) for _ in range(100))
    headers = {"Content-Type": "multipart/form-data; boundary=limit"}
    check_problem(client.post("/v1/faces", content=chunks, headers=headers), 413, "200000 bytes")


def test_similarity_is_the_cosine_to_the_given_embedding(client: TestClient) -> None:
    response = client.post("/v1/faces", json={"embeddings": C[:2].tolist(), "similarity": True}).json()
    for face, c in zip(response["faces"], C, strict=False):
        x = torch.from_numpy(pixels(face["image"]).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        assert face["similarity"]["facenet"] == pytest.approx(float(PhotoEncoder().embed(x)[0] @ c), abs=1e-5)


def test_between(client: TestClient) -> None:
    body = {"a": C[0].tolist(), "b": C[1].tolist(), "steps": 5, "seed": 1}
    response = client.post("/v1/between", json=body).json()
    arc = slerp(C[0], C[1], torch.linspace(0, 1, 5))
    for step, face in enumerate(response["faces"]):
        assert (face["index"], face["variant"]) == (step, 0)
        assert int(np.abs(pixels(face["image"]).astype(int) - expected(arc[step], 1, 0)).max()) <= 1
    assert len(response["faces"]) == 5


def test_random_people_are_reproducible(client: TestClient) -> None:
    response = client.get("/v1/random?seed=11&num=3", headers={"Accept": JSON}).json()
    embeddings = [face["embedding"] for face in response["faces"]]
    assert torch.equal(torch.tensor(embeddings), sample_identities(engine().snapshot.population, 3, seed=11))
    third = base64.b64decode(response["faces"][2]["image"].partition(",")[2])
    assert client.post("/v1/faces", json={"embeddings": embeddings[2:], "seed": 11, "start": 2}).content == third
    assert client.get("/v1/random?seed=11&start=2").content == third
    assert client.get("/v1/random").headers["content-type"] == "image/png"
    assert np.load(io.BytesIO(client.get("/v1/random?format=npy&num=2").content)).shape == (2, SIDE, SIDE, 3)


def test_model(client: TestClient) -> None:
    about = client.get("/v1/model").json()
    assert (about["id"], about["resolution"], about["c_dim"], about["z_dim"]) == ("0123456789abcdef", SIDE, DIM, Z)
    assert about["limits"] == {"faces": 12, "body_bytes": 200_000, "megapixels": 1.0, "queue": 256, "seconds": 30.0}
    assert about["photos"]["available"]
    assert about["similarity"]["facenet"]["same_person"]["mean"] > about["similarity"]["facenet"]["same_person"]["low"]


# --- invalid requests -------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A decompression bomb: a PNG of 900 megapixels in one kilobyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def npy_with_huge_shape() -> bytes:
    """A .npy file whose header claims terabytes."""
    data = npy_file(C.numpy())
    return data.replace(b"(6, 16)", b"(9999999999999, 16)"[:7], 1).replace(b"(999999", b"(99999999999, 16)", 1)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


ROW = C[0].tolist()
JPEG, PNG = "image/jpeg", "image/png"
BAD: dict[str, tuple[Any, str, int, str]] = {
    "a number too few": ({"embeddings": [ROW[:-1]]}, JSON, 422, r"embeddings\.0: .*16 items.* 15"),
    "a number too many": ({"embeddings": [ROW, [*ROW, 1.0]]}, JSON, 422, r"embeddings\.1: .*16 items.* 17"),
    "NaN": (b'{"embeddings": [[' + b"NaN, " * 15 + b"0]]}", JSON, 422, r"embeddings\.0\.0: .*finite"),
    "infinity": (b'{"embeddings": [[' + b"1e999, " * 15 + b"0]]}", JSON, 422, r"embeddings\.0\.0"),
    "null": ({"embeddings": [[*ROW[:-1], None]]}, JSON, 422, r"embeddings\.0\.15: .*valid number"),
    "text": ({"embeddings": [["a"] * DIM]}, JSON, 422, r"embeddings\.0\.0"),
    "all zeros": ({"embeddings": [ROW, [0] * DIM]}, JSON, 422, "embedding 1 is all zeros"),
    "no rows": ({"embeddings": []}, JSON, 422, "embeddings"),
    "no embeddings": ({"num": 2}, JSON, 422, "embeddings: Field required"),
    "a misspelt option": ({"embeddings": [ROW], "nun": 2}, JSON, 422, "nun: Extra inputs"),
    "another encoder": ({"embedding": ROW, "encoder": "other"}, JSON, 422, "those of other, .* those of tiny-test"),
    "two forms": ({"embedding": ROW, "embeddings": [ROW]}, JSON, 422, "only one of embeddings, embedding"),
    "a saved number too few": ({"embedding": ROW[:-1]}, JSON, 422, r"embeddings\.0: .*16 items.* 15"),
    "a face without embedding": ({"faces": [{"key": "a.jpg"}]}, JSON, 422, r"embeddings\.0: .*valid array"),
    "num 0": ({"embeddings": [ROW], "num": 0}, JSON, 422, "num: .*greater"),
    "seed -1": ({"embeddings": [ROW], "seed": -1}, JSON, 422, "seed: "),
    "too many faces": ({"embeddings": [ROW] * 5, "num": 3}, JSON, 422, "5 x 3 faces; the limit is 12"),
    "an unknown format": ({"embeddings": [ROW], "format": "gif"}, JSON, 422, "format: .*png"),
    "weights of zero": ({"embeddings": [ROW], "weights": [0]}, JSON, 422, "weights: .*cancel"),
    "a negative weight": ({"embeddings": [ROW], "weights": [-1]}, JSON, 422, "weights.0: .*greater"),
    "similarity of an array": ({"embeddings": [ROW], "format": "npy", "similarity": True}, JSON, 422, "similarity"),
    "half a JSON": (b'{"embeddings": [[1, 2', JSON, 400, "Invalid JSON"),
    "JSON of another kind": (b"[]", JSON, 422, "an object"),
    "deep JSON": (b"[" * 9_000, JSON, 400, "Invalid JSON"),
    "not UTF-8": (b'{"embeddings": "\xff\xfe"}', JSON, 400, "Invalid JSON"),
    "no bytes": (b"", JSON, 422, "empty"),
    "half a number": (C.numpy().tobytes()[:-2], BINARY, 422, "16 float32 numbers"),
    "binary NaN": (np.full(DIM, np.nan, "<f4").tobytes(), BINARY, 422, "embedding 0 .*not finite"),
    "npy of another length": (npy_file(C.numpy()[:, :15]), NPY, 422, "16 numbers"),
    "npy of three dimensions": (npy_file(np.ones((2, 2, DIM))), NPY, 422, "16 numbers"),
    "npy of text": (npy_file(np.array(["a"] * DIM)), NPY, 400, "not numbers"),
    "npy without rows": (npy_file(np.ones((0, DIM))), NPY, 422, "16 numbers"),
    "npy cut short": (npy_file(C.numpy())[:-8], NPY, 400, "does not fit"),
    "npy that claims terabytes": (npy_with_huge_shape(), NPY, 400, "does not fit"),
    "npy with a pickle": (pickled(), NPY, 400, "not numbers"),
    "npy of nothing": (b"\x93NUMPY", NPY, 400, "not a .npy file"),
    "zip called npy": (b"PK\x03\x04" + bytes(99), NPY, 400, "not a .npy file"),
    "a PDF": (
        b"%PDF-1.7\n" + bytes(99),
        "application/pdf",
        415,
        "application/pdf is not supported; use",
    ),
    "a PDF called JPEG": (b"%PDF-1.7\n" + bytes(99), JPEG, 422, "not a JPEG, PNG or WebP"),
    "a photo of no bytes": (b"", JPEG, 422, "empty"),
    "half a photo": (photo()[:700], JPEG, 422, "damaged"),
    "a tiny photo": (photo(size=(40, 20)), JPEG, 422, "too small"),
    "a large photo": (photo("PNG", (1200, 900), compress_level=9)[:150_000], PNG, 413, "1200x900, the limit is 1 mega"),
    "a decompression bomb": (bomb(), PNG, 413, "too large"),
    "a drawing": (b"<svg/>", "image/svg+xml", 415, r"image/svg\+xml"),
    "a drawing called PNG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", PNG, 422, "not a JPEG"),
    "many bytes": (bytes(200_001), JPEG, 413, "larger than the limit of 200000 bytes"),
    "many bytes of JSON": (b" " * 50_000, JSON, 413, "larger than"),
    "no type": (b"x", "", 415, r"\(none\)"),
    "a type that is not ASCII": (b"x", "image/pngé", 415, "not supported"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_body_gives_one_line(client: TestClient, name: str) -> None:
    body, kind, status, words = BAD[name]
    headers = {"Content-Type": kind.encode("latin-1")} if kind else {}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/faces", content=data, headers=headers)
    check_problem(response, status, words)


def check_problem(response: Any, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["detail"]
    detail = response.json()["detail"]
    assert "\n" not in detail
    assert len(detail) < 300
    assert re.search(words, detail), detail


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/random?num=13", 422, "num: .*12"),
        ("GET", "/v1/random?seed=a", 422, "seed: .*integer"),
        ("GET", "/v1/random?sed=1", 422, "sed: Extra"),
        ("GET", "/v1/random?noise_strength=nan", 422, "noise_strength"),
        ("POST", "/v1/faces?num=x", 422, "num: "),
        ("POST", "/v1/embeddings?face=left", 422, "face: .*central"),
        ("POST", "/v1/embeddings", 415, "not supported; use image/png"),
        ("POST", "/v1/between", 415, "not supported; use application/json"),
        ("GET", "/v1/faces", 405, "Method"),
        ("GET", "/v1/other", 404, "Not Found"),
        ("GET", "/../pyproject.toml", 404, "Not Found"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404, "Not Found"),
    ],
)
def test_bad_request_gives_one_line(client: TestClient, method: str, path: str, status: int, words: str) -> None:
    check_problem(client.request(method, path), status, words)


def test_chunked_body_is_rejected_while_it_arrives(client: TestClient) -> None:
    """It has no Content-Length."""
    chunks = (bytes(50_000) for _ in range(100))
    check_problem(client.post("/v1/faces", content=chunks, headers={"Content-Type": JPEG}), 413, "200000 bytes")


def test_unicode_names(client: TestClient) -> None:
    """A photo's name may be in a header, which is ignored."""
    headers = {"Content-Type": JPEG, "Content-Disposition": "attachment; filename*=UTF-8''%E9%A1%94%F0%9F%99%82.jpg"}
    assert client.post("/v1/faces", content=photo(), headers=headers).status_code == 200


@pytest.mark.parametrize("size", [(64, 64), (400, 50), (50, 400)])
@pytest.mark.parametrize(("media_type", "kind"), photo_media_types().items())
def test_photos_of_any_shape_and_format(client: TestClient, size: tuple[int, int], media_type: str, kind: str) -> None:
    headers = {"Content-Type": media_type}
    assert client.post("/v1/embeddings", content=photo(kind, size), headers=headers).status_code == 200


# --- load limits and timeouts -----------------------------------------------------------------------------------------


def test_overload() -> None:
    """One request is in progress, a second waits, a third gets 429; the first two are answered."""
    generator = BlockedGenerator()
    with TestClient(create_app(engine(generator), ServerSettings(max_faces=4, max_queue=6))) as client:
        body = {"embeddings": C[:1].tolist(), "num": 3}
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(client.post("/v1/faces", json=body).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while "vultus_waiting_faces 6.0" not in client.get("/metrics").text:
            pass
        rejected = client.post("/v1/faces", json=body)
        check_problem(rejected, 429, "overloaded; try again in")
        assert int(rejected.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        generator.release.set()
        for thread in threads:
            thread.join(20)
        assert statuses == [200, 200]
        assert client.post("/v1/faces", json=body).status_code == 200, "there is room again"


def test_timeout() -> None:
    generator = BlockedGenerator()
    with TestClient(create_app(engine(generator), ServerSettings(timeout=0.2))) as client:
        response = client.get("/v1/random")
        check_problem(response, 503, "not finished within 0.2 s")
        assert response.headers["retry-after"]
        assert client.get("/readyz").status_code == 503, "the warm-up still waits"
        generator.release.set()


def test_body_that_does_not_arrive() -> None:
    """408 after the timeout, and the connection is closed."""

    async def send_a_part() -> list[dict[str, Any]]:
        app = create_app(one, ServerSettings(timeout=0.1))
        headers = {"content-type": BINARY, "content-length": str(4 * DIM)}
        scope = {"type": "http", "method": "POST", "path": "/v1/faces", "query_string": b"", "scheme": "http"}
        scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
        parts = [{"type": "http.request", "body": bytes(10), "more_body": True}]
        messages: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        await asyncio.wait_for(app(scope, receive, send), 20)
        return messages

    one = engine()
    start, body = asyncio.run(send_a_part())
    one.close()
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"]) == {"detail": "the body did not arrive within 0.1 s"}


def test_internal_error_reveals_no_embedding(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged without the content of the request, and the response is one line."""
    app = create_app(engine(BrokenGenerator()))
    with caplog.at_level(logging.DEBUG), TestClient(app, raise_server_exceptions=False) as client:
        response = client.post("/v1/faces", json={"embeddings": [[0.123456789] * DIM], "num": 2})
        check_problem(response, 500, "RuntimeError")
        assert client.get("/readyz").status_code == 503
    assert "0.1234" not in caplog.text
    assert "0.25" not in caplog.text, "the normalised embedding"


def test_output_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No image of it is sent, the server is not healthy, and the command does not start with it."""
    one = engine(NanGenerator())
    with pytest.raises(UserError, match="not finite"):
        one.check()
    with TestClient(create_app(one), raise_server_exceptions=False) as client:
        response = client.post("/v1/faces", json={"embeddings": [[0.5] * DIM]})
        check_problem(response, 500, "not finite")
        while client.get("/healthz").status_code == 200:
            time.sleep(0.01)
        check_problem(client.get("/healthz"), 503, "not finite")
        check_problem(client.get("/readyz"), 503, "not finite")
    one.close()

    # The weights are finite, and so is whatever is checked when the file is read; the sums are not.
    snapshot = load_snapshot(write_snapshot(tmp_path / "overflow.safetensors", "dcgan"))
    for parameter in snapshot.network.parameters():
        parameter.data.sign_().mul_(3e38)
    path = tmp_path / "overflow.safetensors"
    save_snapshot(path, network=snapshot.network, population=snapshot.population, metadata=snapshot.metadata)
    assert main(["serve", str(path), "--port", "0"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.splitlines()[-1]
    assert line.startswith("vultus: error: ")
    assert "overflow.safetensors" in line
    assert "not finite" in line


def test_errors_leave_no_load_behind(client: TestClient) -> None:
    for name in ("NaN", "half a photo", "too many faces"):
        body, kind, status, _ = BAD[name]
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        assert client.post("/v1/faces", content=data, headers={"Content-Type": kind}).status_code == status
    assert "vultus_waiting_faces 0.0" in client.get("/metrics").text


# --- token, metrics, page ---------------------------------------------------------------------------------------------


WRONG_TOKENS: list[dict[str, Any]] = [
    {},
    {"Authorization": "Bearer geheim"},
    {"Authorization": "Bearer geheim-ä".encode()},
    {"Authorization": "Basic Z2VoZWltOg=="},
]


def test_token() -> None:
    with TestClient(create_app(engine(), ServerSettings(token="geheim-7"))) as client:
        for path in ("/v1/random", "/v1/model", "/metrics"):
            for headers in WRONG_TOKENS:
                response = client.get(path, headers=headers)
                check_problem(response, 401, "token")
                assert response.headers["www-authenticate"] == "Bearer"
            assert client.get(path, headers={"Authorization": "Bearer geheim-7"}).status_code == 200, path
        check_problem(client.post("/v1/faces", content=b"", headers={"Content-Type": JSON}), 401, "token")
        for path in ("/healthz", "/", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        described = client.get("/openapi.json").json()
        assert described["paths"]["/v1/faces"]["post"]["security"]
        assert "security" not in described["paths"]["/healthz"]["get"]


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def test_cors_is_off_unless_asked_for(client: TestClient) -> None:
    response = client.get("/v1/model", headers={"Origin": "https://a.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    check_problem(client.options("/v1/faces", headers=PREFLIGHT | {"Origin": "https://a.example"}), 405, "Method")


def test_cors() -> None:
    """Only the origins that are named; the token is needed as ever, and a page can read why it was refused."""
    settings = ServerSettings(token="geheim-7", cors=checked_origins(["https://a.example", "http://localhost:5173"]))
    with TestClient(create_app(engine(), settings)) as client:
        for origin in settings.cors:
            preflight = client.options("/v1/faces", headers=PREFLIGHT | {"Origin": origin})
            assert preflight.status_code == 200, "a preflight request carries no token"
            assert preflight.headers["access-control-allow-origin"] == origin
            assert "POST" in preflight.headers["access-control-allow-methods"]
            assert "Authorization" in preflight.headers["access-control-allow-headers"]
            refused = client.get("/v1/model", headers={"Origin": origin})
            check_problem(refused, 401, "token")
            assert refused.headers["access-control-allow-origin"] == origin
            response = client.get("/v1/random", headers={"Origin": origin, "Authorization": "Bearer geheim-7"})
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin
            assert "Vultus-Seed" in response.headers["access-control-expose-headers"]
            assert "Origin" in response.headers["vary"]
            assert "access-control-allow-credentials" not in response.headers
        for origin in ("https://b.example", "https://a.example.b.example", "http://a.example", "null"):
            preflight = client.options("/v1/faces", headers=PREFLIGHT | {"Origin": origin})
            response = client.get("/v1/random", headers={"Origin": origin, "Authorization": "Bearer geheim-7"})
            for answer in (preflight, response):
                assert "access-control-allow-origin" not in answer.headers
        wrong = PREFLIGHT | {"Origin": "https://a.example", "Access-Control-Request-Method": "DELETE"}
        assert client.options("/v1/faces", headers=wrong).status_code == 400


def test_cors_of_every_origin() -> None:
    with TestClient(create_app(engine(), ServerSettings(cors=checked_origins(["*"])))) as client:
        response = client.get("/v1/model", headers={"Origin": "https://anybody.example"})
        assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("origins", "words"),
    [
        (["https://a.example/"], "did you mean https://a.example[?]"),
        (["https://a.example/app?x=1"], "did you mean https://a.example[?]"),
        (["https://A.example:443"], "did you mean https://a.example[?]"),
        (["http://a.example:80"], "did you mean http://a.example[?]"),
        (["https://me:secret@a.example"], "did you mean https://a.example[?]"),
        (["a.example"], "scheme://host"),
        (["runs/mine"], "scheme://host"),
        (["ftp://a.example"], "scheme://host"),
        (["https://"], "scheme://host"),
        (["https://*.example"], "scheme://host"),
        (["https://a.example:99999"], "scheme://host"),
        (["null"], "scheme://host"),
        ([""], "scheme://host"),
        (["https://a.example", "*"], "leave out the others"),
    ],
)
def test_wrong_cors_origin(origins: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--cors", *origins]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vultus: error: --cors: ")
    assert re.search(words, line), line


def test_cors_origins_of_addresses() -> None:
    origins = ["http://127.0.0.1:8080", "https://[::1]:8443", "http://localhost"]
    assert checked_origins(origins) == tuple(origins)


def test_metrics(client: TestClient) -> None:
    before = {sample.name + str(sample.labels): sample.value for sample in samples(client)}
    client.post("/v1/faces", json={"embeddings": C[:2].tolist(), "num": 2})
    client.get("/nowhere/at/all")
    after = {sample.name + str(sample.labels): sample.value for sample in samples(client)}
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    key = "vultus_requests_total" + str({"method": "POST", "route": "/v1/faces", "status": "200"})
    assert grown[key] == 1
    assert grown["vultus_call_faces_sum{}"] == 4
    assert sum(value for key, value in grown.items() if "'route': 'other'" in key and "_total" in key) == 1
    assert after["process_resident_memory_bytes{}"] > 1e6


def samples(client: TestClient) -> list[Any]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [sample for family in families for sample in family.samples]


def test_pages_load_nothing_from_other_hosts(client: TestClient) -> None:
    for path in ("/", "/docs"):
        response = client.get(path)
        assert response.status_code == 200
        assert "default-src 'self'" in response.headers["content-security-policy"]
        for address in re.findall(r"""(?:src|href)=["']([^"']+)["']""", response.text):
            assert "://" not in address, address
            if not address.startswith(("#", "data:")):
                assert client.get(address if address.startswith("/") else f"/{address}").status_code == 200, address


def test_responses_are_not_cached(client: TestClient) -> None:
    assert client.get("/v1/random").headers["cache-control"] == "no-store"


def test_without_facenet_and_population_prior() -> None:
    """Embeddings still give faces; every other route says what is missing."""
    missing = {"photos": "photos need FaceNet: put it into a folder", "dlib": "identity needs dlib: pip install it"}
    one = engine(encoder=None, missing=missing)
    one.missing["random"] = "this snapshot has no population prior"
    with TestClient(create_app(one)) as client:
        assert client.post("/v1/faces", json={"embeddings": C[:1].tolist()}).status_code == 200
        for path in ("/v1/faces", "/v1/embeddings"):
            check_problem(client.post(path, content=photo(), headers={"Content-Type": JPEG}), 503, "need FaceNet")
        check_problem(client.get("/v1/random"), 503, "no population prior")
        about = client.get("/v1/model").json()
        assert about["photos"] == {"available": False, "missing": missing["photos"], "aligned": False, "note": None}
        assert about["similarity"]["dlib"]["missing"] == missing["dlib"]
        response = client.post("/v1/faces", json={"embeddings": C[:1].tolist(), "similarity": True}).json()
        assert response["faces"][0]["similarity"] == {"facenet": None, "dlib": None}


# --- edits ------------------------------------------------------------------------------------------------------------


def test_edits() -> None:
    """Every route moves the embedding; similarities are those to the given one."""
    with TestClient(create_app(engine(directions=SMILE))) as client:
        assert client.get("/v1/model").json()["edits"] == [{"name": "smile", "meaning": "wider", "costs": {}}]
        moved = torch.nn.functional.normalize(C[:1] + 2 * torch.eye(DIM)[:1])
        body = {"embeddings": C[:1].tolist()}
        expected = client.post("/v1/faces", json={"embeddings": moved.tolist()}).content
        assert client.post("/v1/faces", json=body).content != expected
        assert client.post("/v1/faces", json=body | {"edit": "smile=+2"}).content == expected
        assert client.post("/v1/faces?edit=smile%3D2", json=body).content == expected
        upload = {"content": photo(), "headers": {"Content-Type": JPEG}}
        assert client.post("/v1/faces?edit=smile%3D2", **upload).content != client.post("/v1/faces", **upload).content
        assert client.get("/v1/random?edit=smile%3D2").content != client.get("/v1/random").content
        pair = {"a": C[0].tolist(), "b": C[1].tolist(), "steps": 2}
        changed, plain = (client.post("/v1/between", json=pair | more).json() for more in ({"edit": "smile=1"}, {}))
        assert changed["faces"][0]["image"] != plain["faces"][0]["image"]
        for edit in ("age=1", "smile=4", "smile", "smile=x"):
            check_problem(client.post("/v1/faces", json=body | {"edit": edit}), 422, "edit: ")
        check_problem(client.post("/v1/faces", json=body | {"edit": "smile=1,smile=2"}), 422, "given twice")
    with TestClient(create_app(engine())) as client:
        assert client.get("/v1/model").json()["edits"] == []
        check_problem(client.post("/v1/faces", json=body | {"edit": "smile=1"}), 422, "edit: ")


# --- the OpenAPI document ---------------------------------------------------------------------------------------------

floats = hypothesis.extra.numpy.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.just(DIM)), elements=st.floats(0.5, 2, width=32)
)
for media_type, kind in photo_media_types().items():
    sizes = st.tuples(st.integers(32, 99), st.integers(32, 99))
    schemathesis.openapi.media_type(media_type, sizes.map(functools.partial(photo, kind)))
schemathesis.openapi.media_type(BINARY, floats.map(lambda rows: rows.astype("<f4").tobytes()))
schemathesis.openapi.media_type(NPY, floats.map(npy_file))

app_with_token = create_app(
    engine(directions=SMILE), ServerSettings(max_faces=12, max_body_bytes=200_000, max_megapixels=1.0, token="geheim-7")
)
schema = schemathesis.openapi.from_asgi("/openapi.json", app_with_token)
# Rules that JSON Schema cannot express, because each concerns two fields.
CROSS_FIELD = re.compile(
    r"edit: .* is given twice; give one strength|"
    r"\d+ x \d+ faces; the limit is 12 per request|similarity: not available with format npy.*|weights: .*"
)


@schema.parametrize()
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
def test_responses_conform_to_the_openapi_document(case: schemathesis.Case) -> None:
    """For valid and invalid requests that are generated from the document."""
    response = case.call(headers={"Authorization": "Bearer geheim-7"})
    cross_field = response.status_code == 422 and CROSS_FIELD.fullmatch(response.json()["detail"])
    excluded = [positive_data_acceptance] if cross_field else []
    # A generated parameter without a value (null or an empty list) is not a part of the URL: nothing can reject it.
    sent = dict(parse_qsl(urlsplit(str(response.request.url)).query, keep_blank_values=True))
    if not set(case.query or {}) <= set(sent):
        excluded.append(negative_data_rejection)
    case.validate_response(response, excluded_checks=excluded)


def test_unknown_query_parameters_are_rejected() -> None:
    with TestClient(create_app(engine())) as client:
        for query in ("x=1", "x=", "="):
            response = client.post(f"/v1/embeddings?{query}", content=photo(), headers={"Content-Type": JPEG})
            check_problem(response, 422, "Extra inputs")


def test_openapi_document_has_every_route() -> None:
    described = app_with_token.openapi()["paths"]
    assert {path for path in described if not path.startswith("/v1")} == {"/healthz", "/readyz", "/metrics"}
    assert {path for path in described if path.startswith("/v1")} == {
        f"/v1/{name}" for name in ("faces", "embeddings", "between", "random", "model")
    }
    assert set(described["/v1/faces"]["post"]["requestBody"]["content"]) == {
        JSON,
        BINARY,
        NPY,
        FORM,
        *photo_media_types(),
    }
    assert {PNG, JPEG, "image/webp", "image/gif", "image/tiff"} <= set(photo_media_types())

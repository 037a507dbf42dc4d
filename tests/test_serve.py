"""`vultus serve` as a process: the embedded snapshot, real photos, many clients, misbehaving clients, signals."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import SHARED
from served import WEIGHTS, ServerProcess, needs_dlib, needs_facenet, serving_process, wait_until_ready
from vultus.cli import main as cli
from vultus.evaluation.backbones.face_recognition import judge_available
from vultus.images.watermark import mark_pixels
from vultus.images.xmp import model_id, read_metadata
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.latents import noise
from vultus.serving.server import bind
from wrong_requests import PHOTOS, PNG, check_answer, of_faces

EMBEDDINGS = gallery()
pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With FaceNet and dlib, if they are available."""
    with serving_process(tmp_path_factory.mktemp("serve") / "full", weights=WEIGHTS) as served:
        yield served


@pytest.fixture
def client(served: ServerProcess) -> Iterator[httpx2.Client]:
    with served.client() as client:
        yield client


def pixels(data: bytes | str) -> np.ndarray:
    if isinstance(data, str):
        data = base64.b64decode(data.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


# --- faces ------------------------------------------------------------------------------------------------------------


def test_faces_are_those_of_generate(client: httpx2.Client) -> None:
    snapshot = load_snapshot(default_snapshot())
    z = noise(5, 0, 1, snapshot.network.z_dim)
    expected = mark_pixels(render(snapshot.network, z, EMBEDDINGS[3:4]).numpy())[0].transpose(1, 2, 0)
    response = client.post("/v1/faces", json={"embeddings": EMBEDDINGS[3:4].tolist(), "seed": 5})
    image = pixels(response.content)
    assert image.shape == (128, 128, 3)
    assert int(np.abs(image.astype(int) - expected).max()) <= 2  # the watermark rounds again
    marks = read_metadata(Image.open(io.BytesIO(response.content)))
    assert (marks.synthetic, marks.model, marks.seed) == (True, model_id(default_snapshot()), 5)


def test_random_faces_are_those_of_generate(client: httpx2.Client, tmp_path: Path) -> None:
    """Face k of a seed, whether two are asked for, four, or that one alone."""
    assert cli.main(["generate", "default", "--random", "2", "--seed", "7", "--out", str(tmp_path)]) == 0
    files = [np.asarray(Image.open(path)).astype(int) for path in sorted(tmp_path.glob("*.png"))]
    faces = client.get("/v1/random?num=4&seed=7").json()["faces"]
    alone = client.get("/v1/random?start=1&seed=7").content
    for image, other in ((faces[0]["image"], files[0]), (faces[1]["image"], files[1]), (alone, files[1])):
        assert int(np.abs(pixels(image) - other).max()) <= 2  # the watermark rounds again


def test_embedding_of_511_numbers(client: httpx2.Client) -> None:
    response = client.post("/v1/faces", json={"embeddings": EMBEDDINGS[:1, :511].tolist()})
    assert response.status_code == 422
    assert "512" in response.json()["detail"]
    assert "511" in response.json()["detail"]


def test_page_is_served(client: httpx2.Client) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Image.Image]:
    """Real faces of different people."""
    file = pq.ParquetFile(shared / "celeba" / "test-00001-of-00002.parquet")
    batch = next(file.iter_batches(200, columns=["celeb_id", "image"]))
    rows = {row["celeb_id"]: row["image"]["bytes"] for row in batch.to_pylist()}
    return [Image.open(io.BytesIO(rows[key])).convert("RGB") for key in sorted(rows)[:5]]


def upload(image: Image.Image, kind: str = "PNG") -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return {"content": buffer.getvalue(), "headers": {"Content-Type": f"image/{kind.lower()}"}}


@needs_dlib
def test_photo_gives_the_face_of_generate(
    client: httpx2.Client, photos: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VULTUS_WEIGHTS", str(SHARED / "weights"))
    path = tmp_path / "Gesicht 顔 🙂.png"
    photos[0].save(path)
    assert cli.main(["generate", "default", "--photos", str(path), "--seed", "3", "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.png")
    response = client.post("/v1/faces?seed=3", **upload(photos[0]))
    assert response.status_code == 200
    difference = np.abs(pixels(response.content).astype(int) - pixels(file.read_bytes()))
    assert int(difference.max()) <= 2  # the watermark rounds again


@needs_dlib
def test_photo_with_similarity(client: httpx2.Client, photos: list[Image.Image]) -> None:
    embedded = client.post("/v1/embeddings", **upload(photos[1], "JPEG")).json()
    assert pixels(embedded["crop"]).shape == (160, 160, 3)
    assert (embedded["faces_found"], embedded["note"]) == (1, None)
    response = client.post("/v1/faces?num=2&similarity=true", **upload(photos[1], "JPEG")).json()
    again = client.post("/v1/faces", json={"embeddings": [embedded["embedding"]], "num": 2, "similarity": True}).json()
    about = client.get("/v1/model").json()["similarity"]
    for one, other in zip(response["faces"], again["faces"], strict=True):
        assert one["similarity"]["facenet"] == pytest.approx(other["similarity"]["facenet"], abs=1e-3)
        assert one["similarity"]["facenet"] > about["facenet"]["different_people"]["mean"]
        assert other["similarity"]["dlib"] is None, "dlib compares with a photo only"
        if judge_available():
            assert one["similarity"]["dlib"] > about["dlib"]["different_people"]["mean"]


@needs_dlib
def test_largest_of_five_faces_is_used(client: httpx2.Client, photos: list[Image.Image]) -> None:
    crowd = Image.new("RGB", (900, 420), "grey")
    for place, image in enumerate(photos[1:5]):
        crowd.paste(image, (40 + 220 * place % 440, 20 + 200 * (place // 2)))
    crowd.paste(photos[0].resize((380, 380)), (500, 20))
    embedded = client.post("/v1/embeddings", **upload(crowd)).json()
    assert embedded["faces_found"] == 5
    assert embedded["note"] == "5 faces found; the largest is used"
    alone = client.post("/v1/embeddings", **upload(photos[0])).json()
    assert np.dot(embedded["embedding"], alone["embedding"]) > 0.9
    every = client.post("/v1/embeddings?face=all", **upload(crowd)).json()
    assert (every["note"], len(every["faces"])) == ("5 faces found; all are used", 5)
    assert every["faces"][0]["embedding"] == embedded["embedding"] == embedded["faces"][0]["embedding"]
    centres = [(left + right) / 2 for left, _, right, _ in (face["box"] for face in every["faces"])]
    assert centres[0] == pytest.approx(690, abs=40)
    people = client.post("/v1/faces?face=all&similarity=true", **upload(crowd)).json()["faces"]
    assert [face["index"] for face in people] == list(range(5))
    assert min(face["similarity"]["facenet"] for face in people) > 0.3
    response = client.post("/v1/faces", **upload(crowd))
    assert response.headers["vultus-note"] == embedded["note"]
    assert client.post("/v1/faces?num=2", **upload(crowd)).json()["note"] == embedded["note"]


@needs_facenet
@needs_dlib
def test_no_face(client: httpx2.Client) -> None:
    response = client.post("/v1/faces", **upload(Image.new("RGB", (500, 300), "green")))
    assert (response.status_code, response.json()["detail"]) == (422, "the photo: no face found")


@needs_facenet
@pytest.mark.parametrize("name", PHOTOS)
def test_wrong_photo(served: ServerProcess, name: str) -> None:
    data, status = PHOTOS[name]
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(of_faces(data, PNG))
        with connection.makefile("rb") as answer:
            check_answer(answer.read(), status)
    assert "Traceback" not in served.stderr


# --- load and misbehaving clients -------------------------------------------------------------------------------------


def test_200_clients_at_once(served: ServerProcess) -> None:
    """Every client gets its own face, and the requests share generator calls."""

    async def send_all() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(base_url=served.url, timeout=60, limits=limits, trust_env=False) as client:
            rows = EMBEDDINGS.repeat(200 // len(EMBEDDINGS) + 1, 1)[:200].numpy().astype("<f4")
            headers = {"Content-Type": "application/octet-stream"}
            return await asyncio.gather(
                *(
                    client.post(f"/v1/faces?format=npy&seed={number}", content=row.tobytes(), headers=headers)
                    for number, row in enumerate(rows)
                )
            )

    responses = asyncio.run(send_all())
    assert [response.status_code for response in responses] == [200] * 200
    images = np.concatenate([np.load(io.BytesIO(response.content)) for response in responses])
    snapshot = load_snapshot(default_snapshot())
    some = range(0, 200, 13)
    z = torch.cat([noise(number, 0, 1, snapshot.network.z_dim) for number in some])
    c = torch.stack([EMBEDDINGS[number % len(EMBEDDINGS)] for number in some])
    expected = mark_pixels(render(snapshot.network, z, c).numpy()).transpose(0, 2, 3, 1)
    assert int(np.abs(images[list(some)].astype(int) - expected).max()) <= 2  # the watermark rounds again
    with served.client() as client:
        metrics = dict(
            line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")
        )
    assert float(metrics["vultus_call_faces_sum"]) / float(metrics["vultus_call_faces_count"]) > 3


def test_50_megabytes(served: ServerProcess) -> None:
    """Rejected by Content-Length, and without one while it arrives; the client can read the response in both cases."""
    with served.client() as client:
        response = client.post("/v1/faces", content=bytes(50_000_000), headers={"Content-Type": "image/jpeg"})
        assert response.status_code == 413
        assert "16000000 bytes" in response.json()["detail"]
        chunks = (bytes(1_000_000) for _ in range(50))
        response = client.post("/v1/faces", content=chunks, headers={"Content-Type": "image/jpeg"})
        assert response.status_code == 413


def test_clients_that_disconnect(served: ServerProcess) -> None:
    rows = EMBEDDINGS[:1].numpy().astype("<f4").tobytes()
    lines = ["POST /v1/faces?num=64 HTTP/1.1", "Host: x", f"Content-Length: {len(rows)}"]
    head = "\r\n".join([*lines, "Content-Type: application/octet-stream", "", ""])
    for data in (head.encode() + rows, head.encode() + rows[:99], b"POST /v1/fa", b"\x16\x03\x01" + bytes(99)):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(data)
                time.sleep(0.01)
    with served.client() as client:
        assert client.get("/v1/random").status_code == 200
        while "vultus_waiting_faces 0.0" not in (text := client.get("/metrics").text):
            time.sleep(0.05)
    assert 'status="499"' in text
    assert "Traceback" not in served.stderr


def test_port_in_use(served: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", str(served.port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vultus: error: 127.0.0.1:{served.port}: in use; choose another --port")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "--port must be a whole number from 0 to 65535, not 99999"),
        (["--host", "no.such.host.invalid", "--port", "0"], "no.such.host.invalid"),
        (["--queue", "0"], "--queue must be a whole number from 1 to 1e9, not 0"),
        (["--seconds", "nan"], "seconds"),
        (["--token", "with space"], "--token"),
        (["no/such/snapshot", "--port", "0"], "no/such/snapshot: no such snapshot"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


# --- shutdown ---------------------------------------------------------------------------------------------------------


def test_nothing_is_stored_or_logged(served: ServerProcess) -> None:
    """Late in this file, after photos, embeddings and errors: no file in its folders, only notes on stderr."""
    files = [path.name for path in served.folder.rglob("*") if path.is_file()]
    assert set(files) <= {"_remote_module_non_scriptable.py"}, files  # PyTorch 2.8 writes it when it is imported
    lines = served.stderr.splitlines()
    assert all(line.startswith("note: ") or "Invalid HTTP request" in line for line in lines), lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_after_requests_in_progress(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in this process, without FaceNet and with a token; its clients are in other threads."""
    environment = {"VULTUS_TOKEN": "abc", "VULTUS_WEIGHTS": "", "VULTUS_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    running = threading.Event()
    running.set()

    def connect(**options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, **options)

    def generate() -> httpx2.Response:
        with connect(headers={"Authorization": "Bearer abc"}) as client:
            return client.post("/v1/faces", json={"embeddings": EMBEDDINGS[:1].tolist(), "num": 20})

    def visit() -> tuple[httpx2.Response, ...]:
        try:
            wait_until_ready(connect)
            with connect() as client:
                without_token = client.get("/v1/random")
            with connect(headers={"Authorization": "Bearer abc"}) as client, ThreadPoolExecutor(1) as pool:
                photo = client.post("/v1/faces", **upload(Image.new("RGB", (500, 300))))
                model = client.get("/v1/model")
                in_progress = pool.submit(generate)
                while "vultus_waiting_faces 0.0" in client.get("/metrics").text and not in_progress.done():
                    pass
                os.kill(os.getpid(), number)
                running.clear()
                return without_token, photo, model, in_progress.result()
        finally:
            if running.is_set():  # the server still waits for the signal
                os.kill(os.getpid(), number)

    with ThreadPoolExecutor(1) as pool:
        visitor = pool.submit(visit)
        try:
            assert cli.main(["serve", "--port", str(port), "--queue", "20"]) == 0
        finally:
            running.clear()
        without_token, photo, model, in_progress = visitor.result()
    assert in_progress.status_code == 200
    assert len(in_progress.json()["faces"]) == 20
    with pytest.raises(httpx2.ConnectError), connect() as client:
        client.get("/healthz")
    assert without_token.status_code == 401
    assert photo.status_code == 503
    assert "VULTUS_WEIGHTS" in photo.json()["detail"]
    assert model.json()["photos"]["missing"] == photo.json()["detail"]
    assert model.json()["limits"]["queue"] == 20
    output = capsys.readouterr()
    assert output.out == f"http://127.0.0.1:{port}\n"
    assert f"note: {photo.json()['detail']}\n" in output.err

"""`vultus serve` as a process: real snapshot, real photos, many clients, clients that misbehave, signals."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import SHARED
from vultus.cli import main as cli
from vultus.evaluation.backbones.face_recognition import judge_available
from vultus.images import align as faces
from vultus.images.watermark import mark_pixels
from vultus.images.xmp import model_id, read_marks
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.population import noise

FACENET = (SHARED / "weights").is_dir()
EMBEDDINGS = gallery()
needs_facenet = pytest.mark.skipif(not FACENET, reason=f"{SHARED} with FaceNet's weights is not here")
needs_dlib = pytest.mark.skipif(not faces.available(), reason="the extra `align` is not installed")


@dataclass
class Served:
    """A server process, where it listens, and the only folder that it may write to."""

    process: subprocess.Popen[str]
    url: str
    folder: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **how: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **how)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, weights: str, **environment: str) -> Iterator[Served]:
    folder.mkdir()
    here = {name: str(folder) for name in ("HOME", "TMPDIR", "VULTUS_CACHE", "XDG_CACHE_HOME")}
    nowhere = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    with open(folder.with_suffix(".err"), "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "vultus", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env=os.environ | here | nowhere | {"VULTUS_WEIGHTS": weights, **environment},
        )
    assert process.stdout is not None
    served = Served(process, process.stdout.readline().strip(), folder)
    try:
        assert served.url.startswith("http://127.0.0.1:"), folder.with_suffix(".err").read_text()
        with served.client() as client:
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.05)
        yield served
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With all that is at hand."""
    folder = tmp_path_factory.mktemp("serve") / "full"
    with serving(folder, weights=str(SHARED / "weights") if FACENET else "") as served:
        yield served


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Without FaceNet, with a token, and of little patience."""
    folder = tmp_path_factory.mktemp("serve") / "bare"
    with serving(folder, "--seconds", "4", "--queue", "20", weights="", VULTUS_TOKEN="abc") as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[httpx2.Client]:
    with served.client() as client:
        yield client


def pixels(data: bytes | str) -> np.ndarray:
    if isinstance(data, str):
        data = base64.b64decode(data.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def errors(served: Served) -> str:
    return served.folder.with_suffix(".err").read_text()


# --- faces ------------------------------------------------------------------------------------------------------------


def test_faces_are_those_of_generate(client: httpx2.Client) -> None:
    snapshot = load_snapshot(default_snapshot())
    z = noise(5, 0, 1, snapshot.network.z_dim)
    expected = mark_pixels(render(snapshot.network, z, EMBEDDINGS[3:4]).numpy())[0].transpose(1, 2, 0)
    answer = client.post("/v1/faces", json={"embeddings": EMBEDDINGS[3:4].tolist(), "seed": 5})
    picture = pixels(answer.content)
    assert picture.shape == (128, 128, 3)
    assert int(np.abs(picture.astype(int) - expected).max()) <= 2  # rounded once more with the watermark
    said = read_marks(Image.open(io.BytesIO(answer.content)))
    assert (said.synthetic, said.model, said.seed) == (True, model_id(default_snapshot()), 5)


def test_511_numbers(client: httpx2.Client) -> None:
    answer = client.post("/v1/faces", json={"embeddings": EMBEDDINGS[:1, :511].tolist()})
    assert answer.status_code == 422
    assert "512" in answer.json()["detail"]
    assert "511" in answer.json()["detail"]


def test_the_page_comes(client: httpx2.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Image.Image]:
    """Real faces of different people."""
    table = pq.read_table(shared / "celeba" / "test-00001-of-00002.parquet")
    rows = {row["celeb_id"]: row["image"]["bytes"] for row in table.slice(0, 200).to_pylist()}
    return [Image.open(io.BytesIO(rows[key])).convert("RGB") for key in sorted(rows)[:5]]


def sent(image: Image.Image, kind: str = "PNG") -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return {"content": buffer.getvalue(), "headers": {"Content-Type": f"image/{kind.lower()}"}}


@needs_dlib
def test_a_photo_gives_what_generate_gives(
    client: httpx2.Client, photos: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VULTUS_WEIGHTS", str(SHARED / "weights"))
    path = tmp_path / "Gesicht 顔 🙂.png"
    photos[0].save(path)
    assert cli.main(["generate", "default", "--photos", str(path), "--seed", "3", "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.png")
    answer = client.post("/v1/faces?seed=3", **sent(photos[0]))
    assert answer.status_code == 200
    difference = np.abs(pixels(answer.content).astype(int) - pixels(file.read_bytes()))
    assert int(difference.max()) <= 2  # rounded once more with the watermark


@needs_dlib
def test_a_photo_seen_and_judged(client: httpx2.Client, photos: list[Image.Image]) -> None:
    seen = client.post("/v1/embeddings", **sent(photos[1], "JPEG")).json()
    assert pixels(seen["crop"]).shape == (160, 160, 3)
    assert (seen["faces_found"], seen["note"]) == (1, None)
    begun = time.monotonic()
    answer = client.post("/v1/faces?num=2&similarity=true", **sent(photos[1], "JPEG")).json()
    assert time.monotonic() - begun < 20
    again = client.post("/v1/faces", json={"embeddings": [seen["embedding"]], "num": 2, "similarity": True}).json()
    about = client.get("/v1/model").json()["similarity"]
    for one, other in zip(answer["faces"], again["faces"], strict=True):
        assert one["similarity"]["facenet"] == pytest.approx(other["similarity"]["facenet"], abs=1e-3)
        assert one["similarity"]["facenet"] > about["facenet"]["different_people"]["mean"]
        assert other["similarity"]["dlib"] is None, "no photo to compare with"
        if judge_available():
            assert one["similarity"]["dlib"] > about["dlib"]["different_people"]["mean"]


@needs_dlib
def test_of_five_faces_the_largest_is_taken_and_said_so(client: httpx2.Client, photos: list[Image.Image]) -> None:
    crowd = Image.new("RGB", (900, 420), "grey")
    for place, image in enumerate(photos[1:5]):
        crowd.paste(image, (40 + 220 * place % 440, 20 + 200 * (place // 2)))
    crowd.paste(photos[0].resize((380, 380)), (500, 20))
    found = client.post("/v1/embeddings", **sent(crowd)).json()
    assert found["faces_found"] == 5
    assert found["note"] == "5 faces found; the largest is taken"
    alone = client.post("/v1/embeddings", **sent(photos[0])).json()
    assert np.dot(found["embedding"], alone["embedding"]) > 0.9
    answer = client.post("/v1/faces", **sent(crowd))
    assert answer.headers["vultus-note"] == found["note"]
    assert client.post("/v1/faces?num=2", **sent(crowd)).json()["note"] == found["note"]


@needs_facenet
@needs_dlib
def test_no_face(client: httpx2.Client) -> None:
    answer = client.post("/v1/faces", **sent(Image.new("RGB", (500, 300), "green")))
    assert (answer.status_code, answer.json()["detail"]) == (422, "the photo: no face found")


def test_without_facenet(bare: Served) -> None:
    with bare.client(headers={"Authorization": "Bearer abc"}) as client:
        answer = client.post("/v1/faces", **sent(Image.new("RGB", (500, 300))))
        assert answer.status_code == 503
        assert "VULTUS_WEIGHTS" in answer.json()["detail"]
        assert client.get("/v1/model").json()["photos"]["missing"] == answer.json()["detail"]
        assert client.get("/v1/random?num=2&seed=1").status_code == 200
    assert answer.json()["detail"] in errors(bare)
    with bare.client() as client:
        assert client.get("/v1/random").status_code == 401
        assert client.get("/readyz").status_code == 200


# --- many, and bad ones -----------------------------------------------------------------------------------------------


def test_200_clients_at_once(served: Served) -> None:
    """Everybody gets their own face, and most of them come out of calls for many."""

    async def all_of_them() -> list[httpx2.Response]:
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

    answers = asyncio.run(all_of_them())
    assert [answer.status_code for answer in answers] == [200] * 200
    made = np.concatenate([np.load(io.BytesIO(answer.content)) for answer in answers])
    snapshot = load_snapshot(default_snapshot())
    some = range(0, 200, 13)
    z = torch.cat([noise(number, 0, 1, snapshot.network.z_dim) for number in some])
    c = torch.stack([EMBEDDINGS[number % len(EMBEDDINGS)] for number in some])
    expected = mark_pixels(render(snapshot.network, z, c).numpy()).transpose(0, 2, 3, 1)
    assert int(np.abs(made[list(some)].astype(int) - expected).max()) <= 2  # rounded once more with the watermark
    with served.client() as client:
        figures = dict(
            line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")
        )
    assert float(figures["vultus_call_faces_sum"]) / float(figures["vultus_call_faces_count"]) > 3


def test_when_it_is_full_it_says_when_to_come_back(bare: Served) -> None:
    body = {"embeddings": EMBEDDINGS[:1].tolist(), "num": 8}
    statuses: list[tuple[int, str]] = []

    def ask() -> None:
        with bare.client(headers={"Authorization": "Bearer abc"}) as client:
            answer = client.post("/v1/faces", json=body)
            statuses.append((answer.status_code, answer.headers.get("retry-after", "")))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in statuses} == {200, 429}
    assert (200, "") in statuses
    refused = [int(after) for status, after in statuses if status == 429]
    assert refused
    assert min(refused) >= 1


def test_50_megabytes(served: Served) -> None:
    """Said by the length at once, and without a length while it comes in; the answer can be read all the same."""
    with served.client() as client:
        answer = client.post("/v1/faces", content=bytes(50_000_000), headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 413
        assert "16000000 bytes" in answer.json()["detail"]
        pieces = (bytes(1_000_000) for _ in range(50))
        answer = client.post("/v1/faces", content=pieces, headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 413


def test_clients_that_hang_up(served: Served) -> None:
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
    assert "Traceback" not in errors(served)


def test_a_body_that_does_not_come(bare: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", bare.port, timeout=10)
    connection.putrequest("POST", "/v1/faces")
    for name, value in (
        ("Authorization", "Bearer abc"),
        ("Content-Type", "application/octet-stream"),
        ("Content-Length", "2048"),
    ):
        connection.putheader(name, value)
    connection.endheaders(b"\0" * 10)
    answer = connection.getresponse()
    assert answer.status == 408
    assert b"within 4 s" in answer.read()
    connection.close()


def test_port_in_use(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", str(served.port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vultus: error: 127.0.0.1:{served.port}: in use; choose another --port")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "--port 99999: ports are"),
        (["--host", "no.such.host.invalid", "--port", "0"], "no.such.host.invalid"),
        (["--queue", "0"], "--queue 0: must be more than 0"),
        (["--seconds", "nan"], "seconds"),
        (["--token", "mit Leerzeichen"], "--token"),
        (["no/such/snapshot", "--port", "0"], "no/such/snapshot: no such snapshot"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


# --- the end ----------------------------------------------------------------------------------------------------------


def test_nothing_is_stored_or_logged(served: Served) -> None:
    """Late in this file, after photos, embeddings and errors: no file anywhere it may write, nothing but notes said."""
    assert [path for path in served.folder.rglob("*") if path.is_file()] == []
    said = errors(served).splitlines()
    assert all(line.startswith("note: ") or "Invalid HTTP request" in line for line in said), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_what_was_begun_is_done(number: int, served: Served, bare: Served) -> None:
    ending = served if number == signal.SIGTERM else bare
    body = {"embeddings": EMBEDDINGS[:1].tolist(), "num": 20}
    answers: list[httpx2.Response] = []

    def ask() -> None:
        with ending.client(headers={"Authorization": "Bearer abc"}) as client:
            answers.append(client.post("/v1/faces", json=body))

    asking = threading.Thread(target=ask)
    asking.start()
    with ending.client(headers={"Authorization": "Bearer abc"}) as client:
        while "vultus_waiting_faces 0.0" in client.get("/metrics").text and asking.is_alive():
            pass
    ending.process.send_signal(number)
    asking.join(30)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["faces"]) == 20
    assert ending.process.wait(30) == 0
    assert "Traceback" not in errors(ending)
    with pytest.raises(httpx2.ConnectError), ending.client() as client:
        client.get("/healthz")

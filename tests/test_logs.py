"""The log of a real server: after every kind of request and failure, nothing of a photo, an embedding or a token."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from failing_server import SEED
from served import WEIGHTS, serving_process
from vultus.models.snapshot import gallery
from vultus.serving.logs import RedactErrors, redacted
from wrong_requests import HOSTILE, of_faces

BINARY = "application/octet-stream"
TOKEN, WRONG_TOKEN = "geheimer-Schluessel-7281", "falscher-Schluessel-9035"
PROGRAM = (str(Path(__file__).with_name("failing_server.py")),)
pytestmark = pytest.mark.xdist_group("serve")


def noise_photo() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 160, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def traces_of_bytes(data: bytes, length: int = 12) -> set[str]:
    """Parts of data as base64 (of any alignment), as hex digits, as Python's escapes and as Latin-1 text."""
    traces = set()
    for start in range(0, len(data) - 3 * length, 3 * length):
        for shift in range(3):
            piece = data[start + shift :][: 3 * length // 4 + 3]
            traces.add(base64.b64encode(piece).decode()[:length])
        piece = data[start : start + length]
        traces |= {piece.hex(), repr(piece)[2:-1], piece.decode("latin-1")}
    return traces


def traces_of_numbers(values: np.ndarray) -> set[str]:
    """The first four significant digits of each number, as they are in decimal notation."""
    texts = (f"{abs(value):.9f}" for value in values.ravel() if abs(value) > 1e-3)
    return {match.group(1) for text in texts if (match := re.search(r"\.(0*[1-9]\d{3})", text))}


@pytest.mark.slow
@pytest.mark.parametrize("photos", ["read", "failing"])
def test_no_photo_embedding_or_token_is_logged(tmp_path: Path, photos: str) -> None:
    """`failing`: errors whose messages quote the photo; every run: errors whose messages quote the embedding."""
    fail = ["--fail-photos"] if photos == "failing" else []
    photo, c = noise_photo(), gallery()[:2].numpy()
    authorised = {"Authorization": f"Bearer {TOKEN}"}
    with serving_process(
        tmp_path / "server", *fail, weights=WEIGHTS, program=PROGRAM, VULTUS_TOKEN=TOKEN, OMP_NUM_THREADS="1"
    ) as served:
        with served.client(headers=authorised) as client:
            statuses: list[int] = []

            def post(path: str, **options: Any) -> None:
                statuses.append(client.post(path, **options).status_code)

            jpeg = {"Content-Type": "image/jpeg"}
            for path in ("/v1/embeddings", "/v1/faces?num=2&similarity=true"):
                post(path, content=photo, headers=jpeg)
                post(path, content=photo[:-900], headers=jpeg)
                post(path, files={"photo": ("me.jpg", photo)})
                post(path, files={"photo": ("me.jpg", photo[:99])})
            for seed in (1, SEED):
                post(f"/v1/faces?seed={seed}", content=c.astype("<f4").tobytes(), headers={"Content-Type": BINARY})
                post("/v1/faces", json={"embeddings": c.tolist(), "seed": seed})
                post("/v1/faces", json={"embeddings": c.tolist(), "seed": seed, "weights": [1, 0.5]})
            post("/v1/faces", json={"embeddings": c[:, :511].tolist()})
            post("/v1/faces", content=json.dumps({"embeddings": c.tolist()})[:-3])
            post("/v1/faces", json={"embeddings": c.tolist()}, headers={"Authorization": f"Bearer {WRONG_TOKEN}"})
            post("/v1/faces", json={"embeddings": c.tolist()}, headers={"Authorization": f"Basic {TOKEN}"})
            statuses.append(client.get(f"/v1/random?seed={SEED}").status_code)
            statuses.append(client.get(f"/v1/random?token={TOKEN}").status_code)
        with_token = f"Bearer {TOKEN}"
        hostile = [data for data, _ in HOSTILE.values() if len(data) < 200_000 and b"99\r\n" not in data]
        raw = [of_faces(photo[:300], "image/jpeg", Authorization=with_token, A="\0"), photo, c.tobytes()]
        for data in [*raw, *hostile[:40]]:
            with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                with connection.makefile("rb") as answer:
                    answer.read()
        log = served.stderr
    assert {401, 422, 500} <= set(statuses)
    assert log.count("Traceback") >= 4
    assert "injected" in log
    assert "failing_inputs" in log, "where the error was raised is logged"
    found = {trace for trace in traces_of_bytes(photo) | traces_of_bytes(c.astype("<f4").tobytes()) if trace in log}
    assert not found
    assert not {digits for digits in traces_of_numbers(c) if f".{digits}" in log}
    for secret in (TOKEN, WRONG_TOKEN):
        assert secret not in log
        assert base64.b64encode(secret.encode()).decode() not in log
    assert not [path for path in served.folder.rglob("*") if path.is_file()], "nothing is stored"


def test_redacted_message() -> None:
    assert redacted("CUDA error: device lost (1x512 and 16x4)") == "CUDA error: device lost (1x512 and 16x4)"
    assert redacted("could not use [0.25, -1.5e-3]") == "could not use [...]"
    assert redacted("bytes b'\\xff\\xd8' and " + "QUJD" * 20) == "bytes [...] and [...]"
    assert redacted("line\nÿØÿà\nend") == "line [...] end"
    assert len(redacted("word " * 1000)) <= 300


def test_redacted_record(caplog: pytest.LogCaptureFixture) -> None:
    """As asyncio logs an error of a task: its message repeats the error."""
    logger, number = logging.getLogger("test_logs"), 0.123456789
    logger.addFilter(RedactErrors())
    try:
        try:
            raise ValueError(f"not usable: {number}")
        except ValueError as inner:
            raise KeyError("a" * 50) from inner
    except KeyError as error:
        logger.error("Task exception was never retrieved\nfuture: %r", error, exc_info=error)
    assert "never retrieved" in caplog.text
    assert "test_redacted_record" in caplog.text
    assert caplog.text.index("ValueError: not usable: [...]") < caplog.text.index("KeyError: [...]")
    assert "0.1234" not in caplog.text
    assert "aaaa" not in caplog.text


def test_traces_are_found() -> None:
    """The test above could fail."""
    photo, c = noise_photo(), gallery()[:1].numpy()
    for log in (repr(photo), base64.b64encode(b"x" + photo).decode(), photo.hex(), photo.decode("latin-1")):
        assert any(trace in log for trace in traces_of_bytes(photo))
    assert any(f".{digits}" in str(c.tolist()) for digits in traces_of_numbers(c))

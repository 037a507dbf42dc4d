"""Requests to `vultus serve` that are wrong, as bytes, each with the status that it must get, and what checks it."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

EMBEDDING = np.random.default_rng(0).normal(size=512)
JSON, PNG, NPY, BINARY = "application/json", "image/png", "application/x-npy", "application/octet-stream"


def request(method: str, path: str, body: bytes | dict | list = b"", kind: str = "", **headers: str) -> bytes:
    """A request after whose response the connection is closed."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "x", "Connection": "close", "Content-Length": str(len(data)), "Content-Type": kind} | headers
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items() if value)])
    return f"{head}\r\n\r\n".encode("latin1") + data


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    return buffer.getvalue()


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + bytes(99)


def of_faces(body: bytes | dict | list, kind: str = JSON, **headers: str) -> bytes:
    return request("POST", "/v1/faces", body, kind, **headers)


def with_values(**values: object) -> bytes:
    return of_faces({"embeddings": [EMBEDDING.tolist()], **values})


def of_lines(*lines: str, body: str = "") -> bytes:
    return ("\r\n".join([*lines, "", ""]) + body).encode("latin1")


POST = ("POST /v1/faces HTTP/1.1", "Host: x", "Connection: close", f"Content-Type: {JSON}")
PIXELS = chunk(b"IDAT", zlib.compress(bytes(10_000_000), 1))
NUMBERS = "[[1e999" + ",1" * 511 + "]]"
HOSTILE = {
    "JSON string": (of_faces(b'"x"'), 422),
    "JSON null": (of_faces(b"null"), 422),
    "JSON list": (of_faces([]), 422),
    "JSON of other types": (of_faces({"embeddings": {"a": 1}}), 422),
    "number as string": (with_values(num="2"), 422),
    "embedding of booleans": (of_faces({"embeddings": [[True] * 512]}), 422),
    "embedding of NaN": (of_faces({"embeddings": [[float("nan")] * 512]}), 422),
    "embedding of infinity": (of_faces({"embeddings": [[float("-inf")] * 512]}), 422),
    "embedding of 1e999": (of_faces(f'{{"embeddings": {NUMBERS}}}'.encode()), 422),
    "embedding of 5000 digits": (of_faces(b'{"embeddings": [[' + b"9" * 5000 + b"]]}"), 400),
    "seed -1": (request("GET", "/v1/random?seed=-1"), 422),
    "seed 2^53": (request("GET", f"/v1/random?seed={2**53}"), 422),
    "seed 2^64": (with_values(seed=2**64), 422),
    "seed of 5000 digits": (request("GET", "/v1/random?seed=" + "9" * 5000), 422),
    "seed 1e300": (with_values(seed=1e300), 422),
    "seed NaN": (with_values(seed=float("nan")), 422),
    "noise_strength 1e30": (request("GET", "/v1/random?noise_strength=1e30"), 422),
    "noise_strength 1e30, JSON": (with_values(noise_strength=1e30), 422),
    "noise_strength NaN": (with_values(noise_strength=float("nan")), 422),
    "noise_strength -1": (request("GET", "/v1/random?noise_strength=-1"), 422),
    "num 0": (request("GET", "/v1/random?num=0"), 422),
    "num 1e9": (with_values(num=10**9), 422),
    "unknown parameter": (request("GET", "/v1/random?nun=1"), 422),
    "5000 parameters": (request("GET", "/v1/random?" + "&".join(f"a{n}=1" for n in range(5000))), 422),
    "unknown format": (request("GET", "/v1/random?format=gif"), 422),
    "steps 1e9": (request("POST", "/v1/between", {"a": [1] * 512, "b": [1] * 512, "steps": 10**9}, JSON), 422),
    "deep JSON": (of_faces(b"[" * 100_000), 400),
    "deep JSON in a field": (of_faces(b'{"embeddings":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 400),
    "JSON not in UTF-8": (of_faces(b'{"\xff": 1}'), 400),
    "half of JSON": (of_faces(b'{"embeddings": [[1'), 400),
    "gzip": (of_faces(zlib.compress(b"{}"), **{"Content-Encoding": "gzip"}), 400),
    "no type": (of_faces({}, ""), 415),
    "odd type": (of_faces({}, "\xe9" * 5000), 415),
    "multipart": (of_faces(b"--x\r\nContent-Disposition: form-data", "multipart/form-data"), 400),
    "half of a form": (of_faces(b"--x\r\nContent-Disposition: form-data", "multipart/form-data; boundary=x"), 400),
    "form": (of_faces(b"a=1", "application/x-www-form-urlencoded"), 415),
    **{f"type {kind}": (of_faces(b"xx", f"image/{kind}"), 415) for kind in ("svg+xml", "x-photoshop")},
    ".npy of objects": (of_faces(npy("{'descr': '|O', 'fortran_order': False, 'shape': (512,)}"), NPY), 400),
    ".npy of a huge shape": (of_faces(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1<<60,)}"), NPY), 400),
    ".npy with a deep header": (of_faces(npy("(" * 9000), NPY), 400),
    ".npy of wide numbers": (of_faces(npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"), NPY), 400),
    "binary NaN": (of_faces(np.full(512, np.nan, "<f4").tobytes(), BINARY), 422),
    "binary of 511 numbers": (of_faces(bytes(511 * 4), BINARY), 422),
    "path traversal": (request("GET", "/../../etc/passwd"), 404),
    "path traversal, escaped": (request("GET", "/static-offline-docs/%2e%2e%2f%2e%2e%2fetc/passwd"), 404),
    "path with NUL": (request("GET", "/static-offline-docs/a%00b"), 404),
    "path of bad escapes": (request("GET", "/%zz%ff%"), 404),
    "path of 60,000 characters": (request("GET", "/" + "a" * 60_000), 404),
    **{f"method {name}": (request(name, "/v1/faces"), 405) for name in ("PUT", "DELETE", "OPTIONS", "TRACE", "FOO")},
    "CONNECT": (request("CONNECT", "other:443"), 404),
    "URL as target": (request("GET", "http://other/v1/random?num=0"), 422),
    "FTP URL as target": (request("GET", "ftp://other/healthz"), 404),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", 400),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two hosts": (of_lines("GET /healthz HTTP/1.1", "Host: a", "Host: b"), 400),
    "TLS": (b"\x16\x03\x01\x02\0" + bytes(99), 400),
    "NUL in a header": (of_lines("GET / HTTP/1.1", "Host: x", "A: \0"), 400),
    "header of 5 MB": (request("GET", "/healthz", A="a" * 5_000_000), 431),
    "20,000 headers": (of_lines("GET / HTTP/1.1", "Host: x", *(f"A{n}: 1" for n in range(20_000))), 431),
    "two lengths": (of_lines(*POST, "Content-Length: 2", "Content-Length: 3", body="{}a"), 400),
    "negative length": (of_lines(*POST, "Content-Length: -1"), 400),
    "huge length": (of_lines(*POST, f"Content-Length: {'9' * 19}", body="{}"), 413),
    "length of 5000 digits": (of_lines(*POST, f"Content-Length: {'9' * 5000}", body="{}"), 400),
    "length too short": (of_lines(*POST, "Content-Length: 1", body="{}"), 400),
    "length too long": (of_lines(*POST, "Content-Length: 99", body="{}"), 408),
    "chunk of another length": (of_lines(*POST, "Transfer-Encoding: chunked", "", "5", "{}", "0"), 400),
    "chunk of no length": (of_lines(*POST, "Transfer-Encoding: chunked", body="zz\r\n{}\r\n0\r\n\r\n"), 400),
    "chunk of a huge length": (of_lines(*POST, "Transfer-Encoding: chunked", body="ffffffffffff\r\n{}"), 408),
    "a length and chunks": (
        of_lines(*POST, "Content-Length: 2", "Transfer-Encoding: chunked", "", "2", "{}", "0"),
        400,
    ),
    "unknown encoding": (of_lines(*POST, "Transfer-Encoding: gzip", body="xx"), 400),
}
PHOTOS = {
    "no bytes": (b"", 422),
    "noise": (bytes(range(256)) * 20, 422),
    "half of a PNG": (image("PNG")[:90], 422),
    "half of a JPEG": (image("JPEG")[:500], 422),
    "GIF": (image("GIF"), 422),
    "TIFF": (image("TIFF"), 422),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422),
    "3,600 megapixels": (png((60_000, 60_000), PIXELS), 413),
    "text of 100 MB": (png((64, 64), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 1)), PIXELS), 422),
    "1 pixel": (png((1, 1), PIXELS), 422),
}


def check_answer(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    detail = json.loads(body[: int(head.lower().partition(b"content-length: ")[2].split()[0])])["detail"]
    assert detail
    assert "\n" not in detail
    assert len(detail) < 300, "what was sent is not repeated"

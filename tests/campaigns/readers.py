"""Every reader of bytes that may come from somebody else, with valid files to begin with."""

from __future__ import annotations

import contextlib
import io
import lzma
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .scenes import TESTS

GOLDEN = TESTS / "golden"
DIM = 4  # of the embeddings in GOLDEN
Files = dict[str, bytes]  # by name in the folder of a case


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        name: of the reader.
        seeds: valid inputs; a case damages one file of one of them.
        read: reads the folder that holds the damaged input, the name of the damaged file is given too.
        needs: packages without which it cannot run.
    """

    name: str
    seeds: list[Files]
    read: Callable[[Path, str], Any]
    needs: tuple[str, ...] = ()
    fixed: Callable[[Path, str], None] = lambda folder, name: None
    damaged: Callable[[str], bool] = lambda name: True


def readers() -> Iterator[Reader]:
    """All of them; those whose packages are missing too."""
    from vultus.cli.main import main
    from vultus.data.dataset import PreparedDataset
    from vultus.data.embedding_table import read_table
    from vultus.data.sources import open_source
    from vultus.data.stream.record import read_record
    from vultus.errors import UserError
    from vultus.evaluation.compare import format_comparison
    from vultus.evaluation.results import read_results
    from vultus.images.detect import describe, examine
    from vultus.images.io import BadImage, decode_image
    from vultus.models.encoders import OnnxEncoder
    from vultus.models.snapshot import load_snapshot
    from vultus.reporting.run_folder import read_run
    from vultus.sampling.embedding_files import open_embeddings
    from vultus.sampling.face_files import read_faces
    from vultus.synthesis.folder import SynthesisFolder
    from vultus.training.checkpoint import load_checkpoint
    from vultus.training.sample_files import read_sample

    def decoded(folder: Path, name: str) -> None:
        try:
            decode_image((folder / name).read_bytes())
        except BadImage as error:  # the caller adds the name of the file
            raise UserError(str(error)) from None

    def embeddings(folder: Path, name: str) -> None:
        for chunk in open_embeddings(folder / name, dim=DIM).chunks():
            assert chunk.isfinite().all()

    def command(*arguments: str) -> Callable[[Path, str], None]:
        def read(folder: Path, name: str) -> None:
            given = [
                argument.replace("FOLDER", str(folder)).replace("FILE", str(folder / name)) for argument in arguments
            ]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                code = main(given)
            if code not in (0, 2) or (code == 2 and "vultus: error:" not in errors.getvalue()):
                raise AssertionError(f"exit code {code}: {errors.getvalue()[-300:]}")
            if code == 2:
                raise UserError(errors.getvalue().strip())

        return read

    def dataset(folder: Path, name: str) -> None:
        data = PreparedDataset(folder, None)
        data.batch(range(min(len(data), 4)))
        assert len(data.embeddings()) == len(data)
        assert len(data.identities) == len(data)

    def photos(folder: Path, name: str) -> None:
        source = open_source(str(folder / name))
        for part in source.parts:
            for item in part.items(None):
                assert isinstance(item.key, str)

    images = list(_images())
    yield Reader("image", images, decoded)
    yield Reader("detect", images, lambda folder, name: describe(examine(folder / name)))
    snapshot = (GOLDEN / "snapshot-float16.safetensors").read_bytes()
    yield Reader("snapshot", [{"a.safetensors": snapshot}], lambda folder, name: load_snapshot(folder / name))
    published = _folder(GOLDEN / "published")
    yield Reader(
        "published", [published], lambda folder, name: load_snapshot(folder),
        damaged=lambda name: name.endswith((".json", ".safetensors")),
    )  # fmt: skip
    onnx = (GOLDEN / "generator.onnx").read_bytes()
    yield Reader("onnx", [{"a.onnx": onnx}], lambda folder, name: load_snapshot(folder / name), needs=("onnxruntime",))
    encoder = _onnx_encoder()
    if encoder:
        yield Reader("encoder", [encoder], lambda folder, name: OnnxEncoder(folder / "e.onnx"), needs=("onnxruntime",))
    prepared = _folder(GOLDEN / "prepared")
    yield Reader("prepared", [prepared], dataset, fixed=_with_right_hash)
    files = [
        {f"e.{suffix}": (GOLDEN / f"embeddings.{suffix}").read_bytes()} for suffix in ("npz", "csv", "json", "parquet")
    ]
    yield Reader("embeddings", [*files, *_arrays()], embeddings)
    tables = [seed for seed in files if next(iter(seed)).endswith(("csv", "parquet"))]
    yield Reader("table", tables, lambda folder, name: read_table(folder / name))
    yield Reader("photos", [{"p.parquet": _photo_table()}], photos)
    config = b"preset: tiny\noptim:\n  lr: 1e-4\n  batch: 8\nloss:\n  mse_weight: 2\nseed: 3\ndtype: float32\n"
    yield Reader("config", [{"c.yaml": config}], command("train", "--config", "FILE", "--print_config"))
    run = _folder(GOLDEN / "run-gan")
    run["checkpoint-0000000008.pt"] = lzma.decompress(run.pop("checkpoint-0000000008.pt.xz"))
    text = {name: data for name, data in run.items() if name.endswith((".json", ".jsonl", ".safetensors"))}
    yield Reader("run", [text], lambda folder, name: read_run(folder))
    checkpoint = {"checkpoint-0000000008.pt": run["checkpoint-0000000008.pt"]}
    yield Reader("checkpoint", [checkpoint], lambda folder, name: load_checkpoint(folder))
    samples = [
        {name.rpartition("/")[2]: data} for name, data in run.items() if name.endswith(("0.npz", "0.png", "8.npz"))
    ]
    yield Reader("samples", samples, lambda folder, name: read_sample(folder / name, 32))
    results = {"results.json": run["evaluation/results.json"]}
    yield Reader("results", [results], lambda folder, name: format_comparison(read_results(folder)))
    faces = {"faces.jsonl": (GOLDEN / "faces.jsonl").read_bytes()}
    yield Reader("faces", [faces], lambda folder, name: read_faces(folder / name))
    stream = {"stream.json": b'{"format": 1, "source": "s", "revision": null, "options": {}, "files": [["a", 1, "x", [4]]], '
                             b'"skipped": {"photos": [], "files": [], "unopened": []}}'}  # fmt: skip
    yield Reader("stream", [stream], lambda folder, name: read_record(folder))
    synthesis = {"synthesis.json": b'{"format": 1, "options": {"a": 1, "b": "x"}, "counts": {"images": 3}}'}
    yield Reader("synthesis", [synthesis], lambda folder, name: SynthesisFolder(folder).open({"a": 1, "b": "x"}))
    yield from _api()


def _folder(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _images() -> Iterator[Files]:
    """A marked image of each format that can be written here."""
    import numpy as np
    from PIL import Image

    from vultus.images.xmp import Origin, encode_marked

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"), ("TIFF", "tif"),
                         ("AVIF", "avif")):  # fmt: skip
        with contextlib.suppress(Exception):  # Pillow is built without it
            yield {f"i.{suffix}": encode_marked(image, kind, Origin("0" * 16, 3, "x"))}  # type: ignore[arg-type]
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    for kind, suffix in (("BMP", "bmp"), ("JPEG2000", "jp2"), ("PPM", "ppm"), ("QOI", "qoi"), ("HEIF", "heic")):
        buffer = io.BytesIO()
        with contextlib.suppress(Exception):
            image.save(buffer, kind)
            yield {f"i.{suffix}": buffer.getvalue()}
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert("CMYK").save(buffer, "JPEG", exif=exif, icc_profile=b"profile", progressive=True)
    yield {"i.jpg": buffer.getvalue()}
    buffer = io.BytesIO()
    image.convert("P").save(buffer, "PNG", transparency=3)
    yield {"i.png": buffer.getvalue()}


def _arrays() -> Iterator[Files]:
    import numpy as np
    import safetensors.numpy

    rows = np.random.default_rng(0).standard_normal((4, DIM)).astype(np.float32)
    buffer = io.BytesIO()
    np.save(buffer, rows)
    yield {"e.npy": buffer.getvalue()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, embeddings=rows)
    yield {"e.npz": buffer.getvalue()}
    yield {"e.safetensors": safetensors.numpy.save({"embeddings": rows}, {"a": "{}"})}


def _photo_table() -> bytes:
    import tempfile

    from test_sources import write_parquet

    with tempfile.TemporaryDirectory() as folder:
        write_parquet(Path(folder) / "p.parquet", list(range(6)))
        return (Path(folder) / "p.parquet").read_bytes()


def _onnx_encoder() -> Files:
    """A tiny face encoder with its JSON; nothing where onnx is not installed."""
    import tempfile

    try:
        import onnx  # noqa: F401
    except ImportError:
        return {}
    from test_encoders import write_onnx

    with tempfile.TemporaryDirectory() as folder:
        data = write_onnx(Path(folder) / "e.onnx").read_bytes()
    return {
        "e.onnx": data,
        "e.json": b'{"id": "x", "size": 112, "crop": [0.1, 0.1, 0.8], "mean": 127.5, "std": [1, 2, 3]}',
    }


def _with_right_hash(folder: Path, name: str) -> None:
    """Give a damaged shard the hash that the manifest records, as somebody would who damages it on purpose."""
    import hashlib
    import json

    if not name.endswith(".arrow"):
        return
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["file"] == name:
            shard["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _api() -> Iterator[Reader]:
    """The bodies of requests to the HTTP API."""
    try:
        from starlette.testclient import TestClient

        from test_api import app as _app  # noqa: F401
        from test_api import create_app, engine, npy_file, photo
        from vultus.errors import UserError
        from vultus.serving.settings import ServerSettings
    except ImportError:
        yield Reader("api", [], lambda folder, name: None, needs=("fastapi", "httpx"))
        return
    import json

    import numpy as np

    clients: list[Any] = []

    def send(folder: Path, name: str) -> None:
        if not clients:
            app = create_app(engine(), ServerSettings(max_faces=12, max_body_bytes=200_000, max_megapixels=1.0))
            clients.append(TestClient(app, raise_server_exceptions=True).__enter__())
            while clients[0].get("/readyz").status_code != 200:
                pass
        place, kind = KINDS[name]
        answer = clients[0].post(place, content=(folder / name).read_bytes(), headers={"content-type": kind})
        if answer.status_code >= 500:
            raise AssertionError(f"status {answer.status_code}: {answer.text[:300]}")
        if answer.status_code >= 400:
            raise UserError(answer.json()["detail"])

    rows = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    body = {"embeddings": rows.tolist(), "num": 2, "seed": 3, "noise_strength": 0.5, "format": "png"}
    bodies = {
        "faces.json": json.dumps(body).encode(),
        "faces.npy": npy_file(rows),
        "faces.bin": rows.tobytes(),
        "embed.jpg": photo(),
        "faces.jpg": photo(),
        "between.json": json.dumps({"a": rows[0].tolist(), "b": rows[1].tolist(), "steps": 3}).encode(),
    }
    yield Reader("api", [{name: data} for name, data in bodies.items()], send, needs=("fastapi", "httpx"))


KINDS = {
    "faces.json": ("/v1/faces", "application/json"),
    "faces.npy": ("/v1/faces", "application/x-npy"),
    "faces.bin": ("/v1/faces", "application/octet-stream"),
    "faces.jpg": ("/v1/faces", "image/jpeg"),
    "embed.jpg": ("/v1/embeddings", "image/jpeg"),
    "between.json": ("/v1/between", "application/json"),
}


def write(folder: Path, files: Files) -> None:
    """The files, and nothing else, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

"""Fixtures that several tests share: the real photos and the real FaceNet, where they are at hand."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with a thread for each core, on the same cores, wait for each other: slower than a thread each.
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the commands that tests start have it too

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from vultus._files import sha256_file, write_json
from vultus.images.io import decode_image, encode_jpeg, from_pil, to_pil, to_x
from vultus.models.facenet import FaceNet, load_facenet

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project that holds CelebA faces (`celeba/`) and the FaceNet weights (`weights/`)."""
    if not (SHARED / "weights").is_dir() or not (SHARED / "celeba").is_dir():
        pytest.skip(f"{SHARED} with celeba/ and weights/ is not here")
    return SHARED


@pytest.fixture(scope="session")
def facenet(shared: Path) -> Iterator[FaceNet]:
    """FaceNet with its real weights, in float32."""
    before = os.environ.get("VULTUS_WEIGHTS")
    os.environ["VULTUS_WEIGHTS"] = str(shared / "weights")
    yield load_facenet(dtype=torch.float32)
    if before is None:
        del os.environ["VULTUS_WEIGHTS"]
    else:
        os.environ["VULTUS_WEIGHTS"] = before


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """See tiny_exports.Models."""
    from tiny_exports import export_all

    return export_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small prepared data set of drawn pictures and returns its folder.

    Each person is a smooth field of colour, each photo of a person a small change of it, unless `pictures` are given
    (uint8 [people * photos, 3, R, R]). Embeddings are those given, or come from `embed` (x [N, 3, R, R] -> [N, dim] of
    unit norm), or are random ones near the person's. Keywords given as `manifest` replace entries of the manifest.
    """

    def write(
        name: str = "data",
        *,
        resolution: int = 32,
        people: dict[str, int] | None = None,
        photos: int = 3,
        dim: int = 512,
        pictures: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        seed: int = 0,
        manifest: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        random = torch.Generator().manual_seed(seed)
        rows: dict[str, list[Any]] = {key: [] for key in ("image", "embedding", "identity", "key", "split")}
        splits = {}
        for split, count in (people or {"train": 4, "test": 4}).items():
            splits[split] = {"images": count * photos, "people": count}
            for person in range(count):
                base = torch.rand(1, 3, 4, 4, generator=random)
                centre = torch.randn(dim, generator=random)
                for photo in range(photos):
                    field = (base + 0.1 * torch.randn(1, 3, 4, 4, generator=random)).clamp(0, 1)
                    field = F.interpolate(field, size=(resolution, resolution), mode="bilinear")
                    row = len(rows["key"])
                    picture = (field[0] * 255).round().to(torch.uint8) if pictures is None else pictures[row]
                    data = encode_jpeg(to_pil(picture))
                    c = F.normalize(centre + 0.5 * torch.randn(dim, generator=random), dim=0)
                    if embeddings is not None:
                        c = embeddings[row]
                    elif embed is not None:
                        c = embed(to_x(from_pil([decode_image(data)])))[0]
                    rows["image"].append(data)
                    rows["embedding"].append(c.tolist())
                    rows["identity"].append(f"{split}-{person}")
                    rows["key"].append(f"{split}-{person}/{photo}.jpg")
                    rows["split"].append(split)
        columns = {"embedding": pa.array(rows.pop("embedding"), pa.list_(pa.float32(), dim))}
        columns["image"] = pa.array(rows.pop("image"), pa.binary())
        table = pa.table(columns | {key: pa.array(values, pa.string()) for key, values in rows.items()})
        path = folder / "shard-00000.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        digest = sha256_file(path)
        entries: dict[str, Any] = {
            "schema": 1,
            "source": "drawn by a test",
            "licence": None,
            "resolution": resolution,
            "crop": {"kind": "centre", "encoder_fraction": 0.8},
            "encoder": {"id": "tiny-test", "dim": dim, "weights_sha256": "0" * 64, "dtype": "float32"},
            "counts": {"images": len(table), "skipped": 0, "splits": splits},
            "shards": [{"file": path.name, "rows": len(table), "sha256": digest}],
            "content_sha256": digest,
        }
        write_json(folder / "manifest.json", entries | (manifest or {}))
        return folder

    return write

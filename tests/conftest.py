"""Fixtures that several test files share, and the markers that follow from them.

What needs the real FaceNet or real photos uses `shared` or `facenet`, or carries the marker `weights`; what needs a
browser uses `chromium` or carries the marker `browser`. Both are skipped, with the reason, where those are absent.
Session fixtures are read-only: a test that changes a run folder or a data set copies it first.
"""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Worker processes with one thread per core each would compete for the same cores: slower than one thread each.
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; commands that tests start inherit it

import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vultus._files import processors

if TYPE_CHECKING:
    import torch

    from forked import Forks
    from vultus.models.facenet import FaceNet
    from vultus.models.snapshot import Snapshot

SHARED = Path(__file__).resolve().parents[2] / "shared"
for name in [name for name in os.environ if name.startswith("VULTUS_")]:
    del os.environ[name]  # the results do not depend on the user's settings

FACENET = (SHARED / "weights").is_dir()
NO_SHARED = f"{SHARED} with celeba/ (photos) and weights/ (FaceNet) is not here"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than there are cores: many tests wait for processes that they started, or for a browser."""
    return processors() + 1


# --- markers ----------------------------------------------------------------------------------------------------------

FIXTURES_OF_MARKER = {"weights": {"shared", "facenet"}, "browser": {"chromium", "browser", "page"}}


@functools.cache
def no_browser() -> str | None:
    """Why no test can drive a browser here, or None."""
    if chromium_path() is None:
        return "chromium is not installed"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install 'vultus[dev]'"
    return None


def chromium_path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Markers follow from the fixtures that a test uses. Slow tests start first, so that none runs alone at the end."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        for marker, names in FIXTURES_OF_MARKER.items():
            if fixtures & names:
                item.add_marker(marker)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here. Only tests with the marker `weights` find FaceNet, in whatever order tests run."""
    weights = item.get_closest_marker("weights") is not None
    if weights and not FACENET:
        pytest.skip(NO_SHARED)
    os.environ["VULTUS_WEIGHTS"] = str(SHARED / "weights") if weights else ""
    if item.get_closest_marker("browser") is not None and (reason := no_browser()) is not None:
        pytest.skip(reason)


# --- real networks and photos -----------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of torch's threads."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout that holds CelebA faces (`celeba/`) and the FaceNet weights (`weights/`)."""
    if not FACENET or not (SHARED / "celeba").is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def facenet(shared: Path) -> FaceNet:
    """FaceNet with its real weights, in float32."""
    import torch

    from vultus.models.facenet import load_facenet

    return load_facenet(dtype=torch.float32)


@pytest.fixture(scope="session")
def random_facenet() -> FaceNet:
    """FaceNet with random weights, in float32: enough where only the computation is tested."""
    import torch

    from vultus.models.facenet import FaceNet, InceptionResnetV1

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FaceNet(InceptionResnetV1(), dtype=torch.float32)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser. Start it with `playwright`, headless."""
    if (reason := no_browser()) is not None:
        pytest.skip(reason)
    path = chromium_path()
    assert path is not None
    return path


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs programs in processes of their own; see forked.py."""
    from forked import Forks

    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


# --- small data sets, runs and models ---------------------------------------------------------------------------------

Build = Callable[[Path], object]


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Build], Path]:
    """A function (name, build) -> folder that calls `build(folder)` once, whichever worker process needs it first."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers

    def get(name: str, build: Build) -> Path:
        folder = base / f"once-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                new = base / f"new-{name}"
                shutil.rmtree(new, ignore_errors=True)  # of a build that failed
                new.mkdir()
                build(new)
                new.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def models(built_once: Callable[[str, Build], Path]) -> Any:
    """See tiny_exports.Models."""
    import pickle

    from tiny_exports import export_all

    def build(folder: Path) -> None:
        models = export_all(folder)
        (folder / "models.pickle").write_bytes(pickle.dumps({kind: parity for kind, (*_, parity) in models.items()}))

    folder = built_once("models", build)
    parities = pickle.loads((folder / "models.pickle").read_bytes())
    return {
        kind: (folder / f"{kind}.safetensors", folder / f"{kind}.onnx", parity) for kind, parity in parities.items()
    }


@pytest.fixture(scope="session")
def embedded() -> Snapshot:
    """The snapshot that comes with the package."""
    from vultus.models.snapshot import default_snapshot, load_snapshot

    return load_snapshot(default_snapshot())


@pytest.fixture(scope="session")
def tiny_data(built_once: Callable[[str, Build], Path]) -> Path:
    """A prepared data set at 32x32: 8 people to train on and 4 for test, 4 images each, embeddings [512]."""
    return built_once("tiny-data", lambda folder: write_dataset(folder, people={"train": 8, "test": 4}, photos=4))


@pytest.fixture(scope="session")
def tiny_run(built_once: Callable[[str, Build], Path], tiny_data: Path) -> Path:
    """A run folder: the preset `tiny` trained on `tiny_data` for 64 images, validated on the people for test."""

    def build(folder: Path) -> None:
        from vultus.presets import get_preset
        from vultus.training.trainer import Budget, train
        from vultus.training.validation import unseen_validation

        validation = unseen_validation(tiny_data, None)
        assert validation is not None
        train(
            get_preset("tiny"),
            data=tiny_data,
            out=folder,
            budget=Budget(total_nimg=64),
            evaluators=[("unseen", validation, 32)],
        )

    return built_once("tiny-run", build)


@pytest.fixture(scope="session")
def tiny_snapshot(built_once: Callable[[str, Build], Path]) -> Path:
    """A snapshot file: a DCGAN generator at 32x32 with random weights, c_dim 512, z_dim 20."""
    from tiny_exports import write_snapshot

    folder = built_once("tiny-snapshot", lambda folder: write_snapshot(folder / "snapshot.safetensors", "dcgan"))
    return folder / "snapshot.safetensors"


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Callable[..., Path]:
    """A function (name="data", **options of `write_dataset`) that writes a small prepared data set and returns it."""

    def write(name: str = "data", **options: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return write_dataset(folder, **options)

    return write


def write_dataset(
    folder: Path,
    *,
    resolution: int = 32,
    people: dict[str, int] | None = None,
    photos: int = 3,
    dim: int = 512,
    pictures: torch.Tensor | None = None,
    embeddings: torch.Tensor | None = None,
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    encoder: str = "tiny-test",
    manifest: dict[str, Any] | None = None,
) -> Path:
    """A small prepared data set of random images, in an empty folder.

    Each person is a smooth field of colour, each photo of a person a small change of it, unless `pictures` are given
    (uint8 [people * photos, 3, R, R]). Embeddings are those given, or come from `embed` (x [N, 3, R, R] -> [N, dim] of
    unit norm), or are random ones near the person's; `encoder` is the id that they are said to be of. Keywords given as
    `manifest` replace entries of the manifest.
    """
    import pyarrow as pa
    import torch
    import torch.nn.functional as F

    from vultus._files import sha256_file, write_json
    from vultus.images.io import decode_image, encode_jpeg, from_pil, to_pil, to_x

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
                image = (field[0] * 255).round().to(torch.uint8) if pictures is None else pictures[row]
                data = encode_jpeg(to_pil(image))
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
        "source": "generated by a test",
        "licence": None,
        "resolution": resolution,
        "crop": {"kind": "centre", "encoder_fraction": 0.8},
        "encoder": {"id": encoder, "dim": dim, "weights_sha256": "0" * 64, "dtype": "float32"},
        "counts": {"images": len(table), "skipped": 0, "splits": splits},
        "shards": [{"file": path.name, "rows": len(table), "sha256": digest}],
        "content_sha256": digest,
    }
    write_json(folder / "manifest.json", entries | (manifest or {}))
    return folder

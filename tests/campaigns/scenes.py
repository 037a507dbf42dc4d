"""The commands that are disturbed, each on tiny inputs, and the small networks that stand in for FaceNet and others.

Import this module before any other part of vultus: it replaces functions that they import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [entry for entry in (str(TESTS.parent / "src"), str(TESTS)) if entry not in sys.path]

# A process with a pool of OpenMP threads must not be forked: the child waits for threads that it does not have.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from vultus.models import facenet  # noqa: E402

OUT = "disk/out"  # the folder that the commands write to, relative to their working directory
COMMANDS = ("prepare", "train", "stream", "generate", "evaluate", "export", "publish")
REPO = "ada/faces"


class StandIn:
    """A fixed random projection in the place of FaceNet: its id, its length, its input size."""

    id = facenet.FaceNet.id
    dim = facenet.FaceNet.dim
    size = facenet.FaceNet.size
    crop = facenet.FaceNet.crop
    dtype = torch.float32
    weights_sha256 = facenet.FACENET_WEIGHTS[1].sha256

    def __init__(self) -> None:
        self.weight = torch.randn(3 * 36, self.dim, generator=torch.Generator().manual_seed(1))

    def embed(self, x: Tensor, size: int | None = None) -> Tensor:
        return self.embed_crop(facenet.crop_x(x, size or 48, self.crop))

    def embed_crop(self, x: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(x.float(), 6).flatten(1) @ self.weight, dim=1)


def stand_in(**_: Any) -> StandIn:
    return StandIn()


# Those that import these names afterwards get the replacements.
facenet.load_facenet = stand_in  # type: ignore[assignment]
facenet.fastest_dtype = lambda device: torch.float32  # a measurement, so not the same in each process


@dataclass(frozen=True)
class Scene:
    """A command and what it needs.

    Attributes:
        name: of the command in COMMANDS.
        arguments: of vultus.cli.main.main(); paths are relative to the working directory.
        needs: packages without which it cannot run.
    """

    name: str
    arguments: list[str]
    needs: tuple[str, ...] = ()


@dataclass
class Stage:
    """All scenes, their inputs, and the servers that some of them talk to."""

    folder: Path
    scenes: dict[str, Scene]
    uploads: dict[str, Any] = field(default_factory=dict)  # of the stand-in for the hub: {repo: {"commits": [...]}}

    def uploaded(self) -> dict[str, bytes]:
        """What the hub holds after the last commit."""
        return dict(self.uploads[REPO]["commits"][-1]) if REPO in self.uploads else {}


@contextmanager
def imported() -> Iterator[None]:
    """The environment of both campaigns, with what the commands need imported."""
    for name in [name for name in os.environ if name.startswith("VULTUS_") or name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ |= {"VULTUS_WEIGHTS": "", "HF_TOKEN": "hf_right", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    _import_commands()
    yield


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Write the inputs into `folder`, start the servers, import what the commands need."""
    from range_server import RangeServer
    from stand_in_models import serve_models

    with ExitStack() as stack:
        address, hub = stack.enter_context(serve_models())
        os.environ["HF_ENDPOINT"] = address  # read when huggingface_hub is imported
        stack.enter_context(imported())
        _write_inputs(folder)
        source = stack.enter_context(RangeServer(folder / "faces"))
        yield Stage(folder, {scene.name: scene for scene in _scenes(folder, source.address)}, hub.repos)


def _scenes(folder: Path, address: str) -> Iterator[Scene]:
    tiny = ["--preset", "tiny", "--generator.base_width", "8", "--generator.max_width", "16",
            "--discriminator.base_width", "8", "--discriminator.max_width", "16", "--optim.batch", "4", "--dtype",
            "float32", "--device", "cpu", "--log_every_nimg", "4", "--sample_every_nimg", "8",
            "--checkpoint_every_nimg", "8", "--out", OUT]  # fmt: skip
    data, run = str(folder / "data"), str(folder / "run")
    yield Scene("prepare", ["prepare", str(folder / "photos"), "--resolution", "32", "--device", "cpu", "--out", OUT])
    yield Scene("train", ["train", "--data", data, "--images", "32", *tiny])
    stream = ["--data", f"{address}/*.parquet", "--resolution", "32", "--mix", "3", "--retries", "2", "--pause", "0.01"]
    yield Scene("stream", ["train", *stream, "--images", "24", *tiny])
    faces = ["--random", "12", "--num", "2", "--seed", "3", "--device", "cpu", "--batch", "4", "--scores"]
    yield Scene("generate", ["generate", run, *faces, "--out", OUT])
    measured = ["--data", data, "--split", "both", "--device", "cpu", "--batch", "8", "--out", OUT]
    yield Scene("evaluate", ["evaluate", run, *measured], needs=("matplotlib",))
    yield Scene("export", ["export", run, "--onnx", "--out", f"{OUT}/model.onnx"], needs=("onnx", "onnxruntime"))
    yield Scene("publish", ["publish", run, "--repo", REPO, "--out", OUT])


def _write_inputs(folder: Path) -> None:
    from conftest import write_dataset
    from test_prepare import write_photos
    from test_sources import write_parquet
    from vultus.models.generators import build_generator
    from vultus.models.snapshot import save_snapshot
    from vultus.sampling.population import fit_population

    write_photos(folder / "photos", people=12, photos=3)
    (folder / "photos" / "person 03" / "bad.jpg").write_text("not an image")
    (folder / "data").mkdir()
    entry = {"id": StandIn.id, "dim": StandIn.dim, "weights_sha256": StandIn.weights_sha256, "dtype": "float32"}
    crop = {"kind": "centre", "encoder_fraction": 0.8}
    write_dataset(
        folder / "data",
        people={"train": 8, "test": 6},
        photos=4,
        embed=StandIn().embed,
        manifest={"encoder": entry, "crop": crop},
    )
    for number in range(3):
        people = [number * 2 + row // 5 for row in range(10)]
        write_parquet(folder / "faces" / f"train-{number}.parquet", people, first=number * 10, rows_per_group=4)
    write_parquet(folder / "faces" / "test-0.parquet", [20, 20, 21, 21, 22, 22], first=40, rows_per_group=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"resolution": 32, "z_dim": 20, "c_dim": 512, "base_width": 8, "max_width": 16, "projection": 32}
        generator = build_generator(kind="dcgan", **sizes)
        population = fit_population(F.normalize(torch.randn(40, 512)))
    metadata = {"generator": generator.settings(), "cur_nimg": 800, "encoder": entry, "crop": crop}
    metadata |= {"data": {"content_sha256": "0" * 64, "images": 5000}, "licence": "for tests", "hours": 0.01}
    (folder / "run").mkdir()
    save_snapshot(folder / "run" / "snapshot.safetensors", network=generator, population=population, metadata=metadata)


def _import_commands() -> None:
    """Import what the commands import, so that a forked child does not; and give an evaluation small networks."""
    import importlib

    from tiny_parts import TinyFeatures, TinyJudge, TinyPerceptual
    from vultus.cli import main as cli
    from vultus.evaluation import compare
    from vultus.evaluation.backbones.loading import Backbones
    from vultus.models import encoders

    encoders.load_facenet = stand_in  # type: ignore[assignment]
    for command in {"prepare", "train", "generate", "evaluate", "export", "publish"}:
        importlib.import_module(f"vultus.cli.{command}")
    for name in ("data.prepare", "data.stream.dataset", "training.launch", "sampling.generate", "export.publish",
                 "export.onnx_export", "evaluation.plots", "sampling.conditioning", "models.onnx_runtime"):  # fmt: skip
        importlib.import_module(f"vultus.{name}")
    for name in ("onnx", "onnxruntime", "onnxscript", "matplotlib.figure", "huggingface_hub.hf_api", "datasets"):
        try:
            importlib.import_module(name)
        except ImportError:  # an extra that is not installed
            continue
    assert cli.COMMANDS

    def small(encoder: Any, **_: Any) -> Backbones:
        return Backbones(encoder, (TinyJudge(),), (TinyFeatures(),), (TinyPerceptual(),))

    compare.load_backbones = small

"""What a run folder holds, whether a training may go on in it, and how an old run is moved aside."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vultus._files import is_locked, read_json
from vultus._ranges import SIDES
from vultus._run_config import read_run_config
from vultus.config import TrainConfig, differences, to_dict, train_config
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.models.facenet import FaceNet, LossEncoder
from vultus.training.checkpoint import PATTERN, checkpoints

SNAPSHOT = "snapshot.safetensors"
MAY_CHANGE = frozenset(
    {"epochs", "keep", "log_every_nimg", "sample_every_nimg", "checkpoint_every_nimg", "preset", "dtype"}
)
# Of a run and of what other commands derive from it. Anything else in the folder stays where it is.
OF_A_RUN = (
    PATTERN,
    SNAPSHOT,
    "config.json",
    "run.json",
    "stream.json",
    "stats.jsonl",
    "samples",
    "diverged.json",
    "tracking.json",
    "tensorboard",
    "wandb",
    "wandb-report.json",
    "trackio",
    "evaluation",
    "evaluations",
    "publish",
    "report.html",
    "report.md",
    "report-files",
    "vultus.onnx",
)
SHOWN = 4  # settings named in a message


@dataclass(frozen=True)
class Begun:
    """A run that is in a folder already: its settings, and its data as in config.json."""

    config: dict[str, Any]
    data: dict[str, Any]


def check_side(dataset: PreparedDataset) -> None:
    """Raise UserError unless networks can be built for the size of the images in `dataset`."""
    if dataset.resolution not in SIDES:
        raise UserError(
            f"{dataset.name}: holds images of {dataset.resolution} pixels; the side of images to train on must be "
            f"{SIDES.describe(int)}: prepare the photos at such a --resolution into another --out"
        )


def check_data(
    config: TrainConfig, dataset: PreparedDataset, encoder: LossEncoder | type[LossEncoder] | None = None
) -> None:
    """Raise UserError if the networks of `config` or the encoder (or its class) do not fit the photos, or these are too
    few."""
    check_side(dataset)
    if dataset.resolution != config.generator.resolution:
        raise UserError(
            f"--generator.resolution is {config.generator.resolution} but {dataset.name} holds images of "
            f"{dataset.resolution} pixels; leave it out, or prepare the data at that size"
        )
    dim = dataset.manifest["encoder"]["dim"]
    if dim != config.generator.c_dim:
        raise UserError(
            f"--generator.c_dim is {config.generator.c_dim} but {dataset.name} holds embeddings of {dim} numbers; "
            f"give --generator.c_dim {dim} --discriminator.c_dim {dim}"
        )
    held = dataset.facenet_entry
    if encoder is not None and (encoder.dim != held["dim"] or (encoder.id == FaceNet.id != held["id"])):
        raise UserError(
            f"{dataset.name} holds embeddings of {held['id']} ({dim} numbers), but the losses compare with those of "
            f"{encoder.id}, which have {encoder.dim}; prepare the photos again without --no-facenet, or use --preset "
            "reference-dcgan, which has no such loss"
        )
    if len(dataset) < config.optim.batch:
        raise UserError(
            f"{dataset.name}: {len(dataset)} training images are fewer than a batch; set --optim.batch "
            f"{max(1, len(dataset) // 2)} or less"
        )


def check_place(out: Path) -> None:
    """Raise UserError if the run folder `out` cannot be written to, or another process is at work in it."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place}: a file stands where a folder is needed; choose another --out")
    if not os.access(place, os.W_OK):
        raise UserError(f"{place}: no permission to write here; choose another --out")
    if (out / "manifest.json").is_file():
        raise UserError(f"{out}: a prepared data set is in this folder; choose another --out")
    if is_locked(out):
        raise UserError(
            f"{out}: another process is at work in this folder; wait until it ends, or train into another --out"
        )


def check_folder(out: Path, config: TrainConfig, dataset: PreparedDataset) -> Begun | None:
    """The run that `out` holds, which `config` and `dataset` continue; None if there is none.

    Raises UserError if the run there is another one, or if a part is missing without which it cannot be continued.
    """
    path, snapshot = out / "config.json", out / SNAPSHOT
    remedy = "move that run aside with --fresh, or choose another --out"
    saved = checkpoints(out)
    if not saved and snapshot.exists():
        raise UserError(f"{snapshot}: a snapshot is here, but no checkpoint from which its run could go on; {remedy}")
    if not path.is_file():
        parts = [*saved, *(file for file in (out / "stats.jsonl", out / "run.json") if file.exists())]
        if parts:
            raise UserError(f"{path} is missing beside {parts[0].name}; restore it, {remedy}")
        return None
    if not saved and (nimg := _saved(out)):
        raise UserError(f"{out}: the checkpoint of {nimg} images that was saved here is missing; restore it, {remedy}")
    record = read_run_config(path)
    before = to_dict(train_config(record["config"], str(path)))  # with the defaults of settings added since
    now = to_dict(config)
    changed = [key for key in differences(before, now) if key.split(".")[0] not in MAY_CHANGE]
    if changed:
        shown = [f"{key} was {_at(before, key)}, now {_at(now, key)}" for key in changed[:SHOWN]]
        more = [f"{len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        raise UserError(f"{out} was begun with other settings ({'; '.join(shown + more)}); use those, {remedy}")
    if record["data"].get("content_sha256") != dataset.manifest["content_sha256"]:
        raise UserError(f"{out} was begun on other data than {dataset.name}; {remedy}")
    return Begun(before, record["data"])


def _saved(out: Path) -> int:
    """Images seen by the last checkpoint that a session recorded in run.json."""
    path = out / "run.json"
    record = read_json(path) if path.is_file() else {}
    sessions = record.get("sessions", []) if isinstance(record, dict) else []
    return max((int(session.get("cur_nimg", 0)) for session in sessions), default=0)


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, "unset")
        if not isinstance(values, dict):
            break
    return values


def aside(out: Path) -> Path | None:
    """The sub-folder `old-N` that move_aside() would make; None if `out` holds no run."""
    if not any(next(out.glob(pattern), None) for pattern in (PATTERN, SNAPSHOT, "config.json", "stats.jsonl")):
        return None
    number = 1
    while (out / f"old-{number}").exists():
        number += 1
    return out / f"old-{number}"


def move_aside(out: Path) -> Path | None:
    """Move the files of the run in `out` into a new sub-folder, which is returned; None if there is no run.

    The sub-folder is on the same disk, so that nothing is copied; each file is moved by one rename.
    """
    folder = aside(out)
    if folder is not None:
        files = [path for pattern in OF_A_RUN for path in sorted(out.glob(pattern))]
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
    return folder

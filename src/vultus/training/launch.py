"""Start a training as the command line does: preset, resolution, budget, FaceNet and validation are settled here.

`vultus train` and `vultus.train` run this code; trainer.py has the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vultus._device import resolve_device
from vultus._progress import message
from vultus.config import TrainConfig, check_config, merged, read_run_config, train_config, with_method
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.models.facenet import Encoder, load_facenet
from vultus.presets import fitted, get_preset
from vultus.training.grown_data import begun_with
from vultus.training.run_log import check_trackers
from vultus.training.trainer import Budget
from vultus.training.trainer import train as run_training
from vultus.training.validation import unseen_validation

DEFAULT_PRESET = "vultus-cpu"


def train(
    preset: str = DEFAULT_PRESET,
    *,
    data: str | Path,
    out: str | Path,
    images: int | None = None,
    hours: float | None = None,
    epochs: float | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    track: Sequence[str] = (),
    project: str = "vultus",
) -> Path:
    """Train a generator; the same run as `vultus train` with these options, bit for bit on a CPU.

    The preset is adapted to the resolution of the data and to a budget of `images`. The same call again resumes.

    Args:
        preset: a name in vultus.presets.
        data: folder of a prepared data set.
        out: run folder.
        images, hours, epochs: the budget, at most one of them: images seen, hours of training or passes over the data,
            all sessions of the run together; default is the preset's number of epochs.
        settings: other settings of the run, nested or by dotted keys: {"optim.lr": 1e-4, "seed": 1}.
        device: auto, cuda, mps or cpu.
        track: tensorboard, wandb, trackio.
        project: the trackers' project.

    Returns the path of the snapshot. Raises UserError as trainer.train() does, and for an unknown preset or setting, a
    folder that is no prepared data set, and missing FaceNet weights where the losses need them; Stopped after SIGINT or
    SIGTERM.
    """
    given = dict(settings or {})
    passes = epochs if epochs is not None else given.get("epochs")
    budgets = (("images", images), ("hours", hours), ("epochs", passes))
    check_budgets([name for name, value in budgets if value is not None])
    if "preset" in given:
        raise UserError("settings: preset is an argument of its own")
    if epochs is not None:
        given["epochs"] = float(epochs)
    get_preset(preset)  # a wrong name is reported before a wrong folder
    dataset = PreparedDataset(data, None)
    config = base_config(preset, out=out, resolution=dataset.resolution, images=images)
    config = merged(config, given, "settings")
    return run(config, dataset, out=out, images=images, hours=hours, device=device, track=track, project=project)


def base_config(
    preset: str | None,
    *,
    method: str | None = None,
    out: str | Path | None,
    resolution: int | None,
    images: int | None,
) -> TrainConfig:
    """The settings that a run starts from, before the user's own.

    Those of the run folder `out` if it exists and is of this preset (or `preset` is None), else the preset at this
    resolution and for this budget (where they are known), trained by `method` if that is given.
    """
    start = get_preset(preset or DEFAULT_PRESET)
    path = Path(out or "") / "config.json"
    if path.is_file():
        config = train_config(read_run_config(path)["config"], str(path))
        if preset in (None, config.preset):
            return with_method(config, method or config.method)
    start = with_method(start, method or start.method)
    return start if resolution is None else fitted(start, resolution, images)


def check_budgets(names: Sequence[str]) -> None:
    """Raise UserError if more than one budget is given."""
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are both budgets; give one")


def run(
    config: TrainConfig,
    dataset: PreparedDataset,
    *,
    out: str | Path,
    images: int | None,
    hours: float | None,
    device: str,
    track: Sequence[str],
    project: str,
) -> Path:
    """Train with these settings on `dataset` (all rows): loads FaceNet, validates on unseen people if it can."""
    check_config(config)
    check_trackers(track)
    dataset = begun_with(out, dataset)
    device = resolve_device(device)
    encoder = _facenet(device, needed=config.loss.needs_encoder())
    validation = unseen_validation(dataset, encoder) if encoder is not None else None
    budget = None if images is None and hours is None else Budget(total_nimg=images, hours=hours)
    return run_training(
        config,
        data=dataset,
        out=out,
        budget=budget,
        device=device,
        encoder=encoder if config.loss.needs_encoder() else None,
        evaluators=[("unseen", validation, config.sample_every_nimg)] if validation is not None else [],
        track=track,
        project=project,
    )


def _facenet(device: str, *, needed: bool) -> Encoder | None:
    """FaceNet; None with a note where it is neither available nor `needed`."""
    try:
        return load_facenet(device=device)
    except UserError as error:
        if needed:
            raise
        message(f"note: no FaceNet ({error}); the training is not validated on unseen people")
        return None

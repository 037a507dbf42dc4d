"""Start a training as the command line does: preset, resolution, budget, FaceNet and validation are settled here.

`vultus train` and `vultus.train` run this code; trainer.py has the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vultus._device import resolve_device
from vultus._download import weights_available
from vultus._progress import message
from vultus._ranges import Epochs, Hours, Images, checks_arguments
from vultus._run_config import read_run_config
from vultus.config import TrainConfig, check_config, merged, train_config, with_method
from vultus.data.dataset import PreparedDataset
from vultus.data.sources import is_on_hub
from vultus.data.stream.dataset import StreamedDataset
from vultus.data.stream.options import StreamOptions, option_name
from vultus.data.stream.places import is_streamed
from vultus.errors import UserError
from vultus.models.encoders import difference
from vultus.models.facenet import FACENET_WEIGHTS, FaceNet, LossEncoder, dtype_name, fastest_dtype, load_facenet
from vultus.models.generators import GeneratorNetwork
from vultus.models.second_encoder import SecondEncoder, load_second_encoder
from vultus.presets import fitted, get_preset
from vultus.training.checkpoint import Init, checkpoints, load_checkpoint, load_init
from vultus.training.processes import current, joined
from vultus.training.resume import SNAPSHOT, aside, check_data, check_folder, check_place, check_side
from vultus.training.run_log import check_trackers
from vultus.training.trainer import Budget, Evaluator, check_processes, default_budget
from vultus.training.trainer import train as run_training
from vultus.training.validation import unseen_validation

DEFAULT_PRESET = "vultus-cpu"


@checks_arguments
def train(
    preset: str = DEFAULT_PRESET,
    *,
    data: str | Path,
    out: str | Path,
    stream: Mapping[str, Any] | None = None,
    images: Images | None = None,
    hours: Hours | None = None,
    epochs: Epochs | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    track: Sequence[str] = (),
    project: str = "vultus",
    fresh: bool = False,
    dry_run: bool = False,
    init: str | Path | None = None,
) -> Path:
    """Train a generator; the same run as `vultus train` with these options, bit for bit on a CPU.

    The preset is adapted to the resolution of the data and to a budget of `images`. The same call again resumes. In a
    program that torchrun started, all its processes train together.

    Args:
        preset: a name in vultus.presets.
        data: folder of a prepared data set, or a source to stream: hf://user/name, https://host/path/*.parquet, or
            Parquet files on a disk.
        stream: options of a stream, see StreamOptions: {"resolution": 64, "cache_gb": 4}.
        out: run folder.
        images, hours, epochs: the budget, at most one of them: images seen, hours of training or passes over the data,
            all sessions of the run together; default is the preset's number of epochs.
        settings: other settings of the run, nested or by dotted keys: {"optim.lr": 1e-4, "seed": 1}.
        device: auto, cuda, mps or cpu.
        track: tensorboard, wandb, trackio.
        project: the trackers' project.
        fresh: start over; a run that is in `out` is moved into the sub-folder `old-1` (2, 3, ...) of it.
        init: run folder whose newest checkpoint gives the weights to begin with; parts of the networks that have
            another shape start afresh. No effect on a run that is resumed.
        dry_run: print what would be done, and write nothing. What would be refused, raises UserError.

    Returns the path of the snapshot. Raises UserError as trainer.train() does, for a budget out of range, an unknown
    preset or setting, a folder that is no prepared data set, and missing FaceNet weights where the losses need them;
    Stopped after SIGINT or SIGTERM.
    """
    with joined():
        given = dict(settings or {})
        passes = epochs if epochs is not None else given.get("epochs")
        budgets = (("images", images), ("hours", hours), ("epochs", passes))
        check_budgets([name for name, value in budgets if value is not None])
        if "preset" in given:
            raise UserError("settings: preset is an argument of its own")
        if epochs is not None:
            given["epochs"] = float(epochs)
        get_preset(preset)  # a wrong name is reported before a wrong folder
        dataset = open_data(data, stream or {}, preset=preset, out=None if fresh else out, device=device)
        check_side(dataset)
        config = base_config(
            preset,
            out=None if fresh else out,
            resolution=dataset.resolution,
            images=images,
            c_dim=dataset.manifest["encoder"]["dim"],
        )
        return run(
            merged(config, given, "settings"),
            dataset,
            out=out,
            images=images,
            hours=hours,
            device=device,
            track=track,
            project=project,
            fresh=fresh,
            dry_run=dry_run,
            init=init,
        )


def open_data(
    data: str | Path, stream: Mapping[str, Any], *, preset: str | None, out: str | Path | None, device: str
) -> PreparedDataset:
    """The data set of a run: prepared, or a stream at the resolution given, that of the run in `out`, or the preset's.

    Args:
        stream: options of a stream, see StreamOptions.
        preset, out: as those of base_config().
        device: where a stream computes embeddings; auto, cuda, mps or cpu.
    """
    if not is_streamed(data):
        for name in stream:
            raise UserError(f"{option_name(name)} is an option of a stream, but {data} is not one; leave it out")
        try:
            return PreparedDataset(data, None)
        except UserError as error:
            if not Path(data).exists() and is_on_hub(str(data)):
                raise UserError(f"{error}; for a data set on the hub, give --data hf://{data}") from None
            raise
    options = StreamOptions.of(stream)
    if options.resolution is None:
        config = base_config(preset, out=out, resolution=None, images=None)
        options = replace(options, resolution=config.generator.resolution)
    return StreamedDataset(data, options, device=resolve_device(device), begun=out)


def base_config(
    preset: str | None,
    *,
    method: str | None = None,
    out: str | Path | None,
    resolution: int | None,
    images: int | None,
    c_dim: int | None = None,
) -> TrainConfig:
    """The settings that a run starts from, before the user's own.

    Those of the run folder `out` if it exists and is of this preset (or `preset` is None), else the preset at this
    resolution, for this budget and for embeddings of c_dim numbers (where they are known), trained by `method` if that
    is given.
    """
    start = get_preset(preset or DEFAULT_PRESET)
    path = Path(out or "") / "config.json"
    if path.is_file():
        config = train_config(read_run_config(path)["config"], str(path))
        if preset in (None, config.preset):
            return with_method(config, method or config.method)
    start = with_method(start, method or start.method)
    return start if resolution is None else fitted(start, resolution, images, c_dim)


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
    fresh: bool = False,
    dry_run: bool = False,
    init: str | Path | None = None,
) -> Path:
    """Train with these settings on `dataset` (all rows): loads FaceNet, validates on unseen people if it can.

    What can be refused is refused before anything is loaded or written. `dry_run` ends there, and prints the plan.
    """
    out, processes = Path(out), current()
    check_trackers(track)
    dataset = dataset if fresh else dataset.begun_with(out)
    device = resolve_device(device)
    budget = None if images is None and hours is None else Budget(total_nimg=images, hours=hours)
    photos = dataset.with_split("train", max_images=config.loader.max_images, seed=config.seed)
    check_data(config, photos, FaceNet if config.loss.needs_encoder() else None)
    check_config(config)
    check_processes(config, photos, processes)
    begun = start = None
    if processes.main:  # the others may not see the run folder, which can be on another machine
        check_place(out)
        begun = None if fresh else check_folder(out, config, photos)
        start = load_init(init) if init is not None and (fresh or not checkpoints(out)) else None
    elif dry_run:
        return out / SNAPSHOT
    if start is not None:
        _note_other_encoder(start, photos)
    if dry_run:
        dtype = begun.config["dtype"] if begun else dtype_name(config.dtype, device)
        lines = {"would": _action(out, budget or default_budget(config, photos), fresh=fresh)}
        lines |= _facts(config, photos, dtype=dtype, device=device, images=images, hours=hours) | {
            "run folder": str(out)
        }
        if start is not None:
            lines["weights"] = f"of {start.folder} after {start.cur_nimg} images"
        print("\n".join(f"{key + ':':<12} {value}" for key, value in lines.items()))
        return out / SNAPSHOT
    # By one process: what is the faster dtype in one may not be in another.
    dtype = processes.broadcast(fastest_dtype(device) if processes.main else None)
    needed, encoder = config.loss.needs_encoder(), None
    with processes.first_alone():
        if needed or processes.main:  # which validates
            encoder = _facenet(device, dtype, needed=needed)
        second = _second_encoder(config, device, dtype)
    evaluators: list[Evaluator] = []
    if processes.main:
        dataset.begin(out, encoder)
        validation = _validation(dataset, encoder)
        evaluators = [("unseen", validation, config.sample_every_nimg)] if validation is not None else []
    try:
        return run_training(
            config,
            data=dataset,
            out=out,
            budget=budget,
            device=device,
            encoder=encoder if needed else None,
            second=second,
            evaluators=evaluators,
            track=track,
            project=project,
            fresh=fresh,
            init=start,
        )
    finally:
        dataset.close()


def _second_encoder(config: TrainConfig, device: str, dtype: torch.dtype | None = None) -> SecondEncoder | None:
    try:
        return load_second_encoder(config.loss.second_encoder_name(), device=device, dtype=dtype)
    except UserError as error:
        raise UserError(f"{error}; or train without it: --loss.second_encoder none") from None


def _note_other_encoder(start: Init, photos: PreparedDataset) -> None:
    """Tell that the weights to begin with belong to embeddings of another encoder than the data hold."""
    path = start.folder / "config.json"
    before = read_run_config(path)["data"].get("encoder", {}) if path.is_file() else {}
    if differs := difference(before, photos.manifest["encoder"]):
        message(
            f"note: --init {start.folder}: {photos.name} holds embeddings of {differs}, to which the weights of "
            "that run belong; the layers that read embeddings have to learn anew"
        )


def _action(out: Path, budget: Budget, *, fresh: bool) -> str:
    """What a training in the run folder `out` would do."""
    old = aside(out) if fresh else None
    checkpoint = None if fresh else load_checkpoint(out)
    if checkpoint is None:
        return (f"move the run that is there into {old}, then " if old else "") + "start at image 0"
    state, path = checkpoint
    if budget.used(state["cur_nimg"], state["seconds"]) >= 1:
        return f"do nothing: the budget is used up ({state['cur_nimg']} images)"
    return f"resume at image {state['cur_nimg']}, from {path.name}"


def _facts(
    config: TrainConfig, photos: PreparedDataset, *, dtype: str, device: str, images: int | None, hours: float | None
) -> dict[str, str]:
    """The main settings of a training in words."""
    total = default_budget(config, photos).total_nimg
    length = f"{config.epochs:g} passes over the data, {total} images"
    if hours is not None or images is not None:
        length = f"{hours:g} hours" if hours is not None else f"{images} images"
    people = len(set(photos.identities))
    facts = {
        "preset": f"{config.preset}, method {config.method}",
        "budget": f"{length}, in batches of {config.optim.batch}",
        "resolution": f"{config.generator.resolution} pixels",
        "device": f"{device}, {dtype}",
        "seed": str(config.seed),
        "data set": f"{photos.name}: {len(photos)} photos of {people} people to train on",
    }
    if config.loss.needs_encoder():
        found = weights_available(*FACENET_WEIGHTS)
        facts["FaceNet"] = "needed, the weights are here" if found else "needed, the weights would be downloaded"
    return facts


def _validation(
    dataset: PreparedDataset, encoder: LossEncoder | None
) -> Callable[[GeneratorNetwork], dict[str, float]] | None:
    """The validation on unseen people; None without an encoder of the embeddings in the data set."""
    if encoder is None:
        return None
    held = dataset.facenet_entry
    if encoder.dim != held["dim"]:
        message(f"note: the data hold embeddings of {held['id']}, not FaceNet's; no validation on unseen people")
        return None
    return unseen_validation(dataset, encoder)


def _facenet(device: str, dtype: torch.dtype | None, *, needed: bool) -> LossEncoder | None:
    """FaceNet; None with a note where it is neither available nor `needed`."""
    try:
        return load_facenet(device=device, dtype=dtype)
    except UserError as error:
        if needed:
            raise
        message(f"note: no FaceNet ({error}); the training is not validated on unseen people")
        return None

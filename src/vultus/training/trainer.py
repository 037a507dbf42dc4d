"""The training loop, and the run folder.

Run folder:
    config.json            the settings and the data set that they were used on
    run.json               versions, git revision, hardware and command of every session
    stats.jsonl            a line of statistics or of a validation per `*_every_nimg`
    tracking.json          how far each tracker has received the log
    samples/<nimg>.png     fixed unseen people (photo first) x fixed noise, with every checkpoint
    samples/<nimg>.npz     the same as arrays
    samples/progress.png   the same people over time
    checkpoint-<nimg>.pt   the last `keep`
    snapshot.safetensors   what `generate`, `evaluate` and a program load
    diverged.json          the step and the photos at which a loss diverged

The same command run again resumes from the last checkpoint; on a CPU the result is that of an uninterrupted run,
bit for bit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vultus._files import folder_lock, make_folder
from vultus._prefetch import Prefetch
from vultus._progress import Progress, message, progress
from vultus._ranges import Hours, Images, checked
from vultus.config import TrainConfig, check_config
from vultus.data.dataset import PreparedDataset, batches
from vultus.errors import Stopped
from vultus.models.facenet import Encoder
from vultus.models.generators import GeneratorNetwork
from vultus.models.second_encoder import SecondEncoder
from vultus.training.checkpoint import Init
from vultus.training.environment import Session, peak_memory
from vultus.training.grown_data import begun_with
from vultus.training.resume import SNAPSHOT, check_data, move_aside
from vultus.training.run_log import RunLog, check_trackers
from vultus.training.run_state import RunState
from vultus.training.sample_grid import SampleGrid
from vultus.training.signals import collect_signals
from vultus.training.statistics import StatisticsWindow
from vultus.training.validation import failure

Evaluator = tuple[str, Callable[[GeneratorNetwork], dict[str, float]], int]  # name, function, every_nimg
PREFETCHED = 3  # batches that are decoded ahead
FAILED = 3  # validations one after the other that say that a training fails, before it is said
SETTLED = 5000  # images, before which a network is not called failed; `tiny` follows its embeddings from 2,400 on


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many images, or after so many hours of training, all sessions of the run together.

    Raises UserError for a number that is not above 0, or beyond what a training can last.
    """

    total_nimg: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        checked(self.total_nimg, Images | None, "--images")
        checked(self.hours, Hours | None, "--hours")

    def used(self, cur_nimg: int, seconds: float) -> float:
        """The share of the budget that is used up, of the part that is used up first."""
        parts = [(cur_nimg, self.total_nimg), (seconds, self.hours and self.hours * 3600)]
        return max((used / whole if whole else 1.0 for used, whole in parts if whole is not None), default=0.0)


def train(
    config: TrainConfig,
    *,
    data: str | Path | PreparedDataset,
    out: str | Path,
    budget: Budget | None = None,
    device: str = "cpu",
    encoder: Encoder | None = None,
    second: SecondEncoder | None = None,
    evaluators: Sequence[Evaluator] = (),
    track: Sequence[str] = (),
    project: str = "vultus",
    fresh: bool = False,
    init: Init | None = None,
) -> Path:
    """Train into the run folder `out` until the budget is used up; resume if the run began earlier.

    Args:
        config: the run. Its `generator.resolution` must be that of the data.
        data: a prepared data set, or its folder.
        budget: default is config.epochs passes over the data.
        device: cuda, mps or cpu.
        encoder: FaceNet, needed where config.loss.needs_encoder().
        second: a second face encoder, needed where config has a loss for one.
        evaluators: (name, function of the averaged generator that returns named metrics, every_nimg).
        track: trackers to report to besides stats.jsonl: tensorboard, wandb, trackio.
        project: the trackers' project; the run is named as the folder `out`.
        fresh: start over; a run that is in `out` is moved into a sub-folder of it.
        init: weights to begin with (see load_init). No effect on a run that is resumed.

    Returns the path of the snapshot. Raises UserError for a folder in use or of another run, a tracker that is not
    installed, and a loss that is not finite; Stopped after SIGINT or SIGTERM.
    """
    check_trackers(track)
    check_config(config)
    opened = data if isinstance(data, PreparedDataset) else PreparedDataset(data, None)
    opened = opened if fresh else begun_with(out, opened)
    photos = opened.with_split("train", max_images=config.loader.max_images, seed=config.seed)
    check_data(config, photos, encoder)
    budget = budget or default_budget(config, photos)
    out = make_folder(out)
    with folder_lock(out, "train"):
        if fresh and (moved := move_aside(out)):
            message(f"{out}: starting over; the run that was here is in {moved}")
        run = RunState(config, photos, out, device, encoder, second, init)
        if budget.used(run.cur_nimg, run.seconds) < 1:
            _loop(run, budget, evaluators, track, project, again="the same command" + " without --fresh" * fresh)
        else:
            message(f"{out}: the budget is used up ({run.cur_nimg} images); nothing to do")
            if not (out / SNAPSHOT).exists():
                run.save_snapshot()
    return out / SNAPSHOT


def default_budget(config: TrainConfig, photos: PreparedDataset) -> Budget:
    """The epochs of `config` as a number of images."""
    return Budget(total_nimg=max(1, round(config.epochs * len(photos))))


def _loop(
    run: RunState, budget: Budget, evaluators: Sequence[Evaluator], track: Sequence[str], project: str, *, again: str
) -> None:
    """Train until the budget is used up or a signal comes; `again` is the command that resumes the run."""
    config, batch, device = run.config, run.config.optim.batch, run.device
    earlier = run.seconds
    start = time.monotonic() - earlier
    failed = _Failed(run)
    samples = SampleGrid.of_dataset(run.dataset, run.out / "samples", config.generator.z_dim)
    session = _session(run, track)
    source = batches(
        run.dataset, batch=batch, cur_nimg=run.cur_nimg, seed=config.seed, pin=device == "cuda", second=run.second
    )
    with (
        collect_signals() as received,
        Prefetch(source, PREFETCHED, ended=lambda: bool(received)) as prefetched,
        _run_log(run, session, track, project) as log,
        progress(budget.total_nimg, title="training", initial=run.cur_nimg) as bar,
    ):
        if run.cur_nimg == 0:
            _draw(run, samples, log)
            _validate(run, evaluators, log, failed)
        window = StatisticsWindow(run.cur_nimg)
        for nimg, item in window.waiting(prefetched):
            run.model.budget_used = budget.used(run.cur_nimg, run.seconds)
            losses = run.model.step(item.images, item.c, nimg, item.second)
            run.cur_nimg = nimg + batch
            run.seconds = time.monotonic() - start
            window.add(nimg, item.keys, losses)
            if device == "cpu" or run.due(config.log_every_nimg):  # on a GPU the check waits for the step
                run.check_losses(window)
            bar.update(batch)
            if run.due(config.log_every_nimg):
                line = {"seconds": round(run.seconds, 2)} | window.close(run.cur_nimg)
                line |= {"lr": config.optim.lr} | peak_memory(device)
                log.log(line, run.cur_nimg)
                _show(run, line, budget, bar)
            last = bool(received) or budget.used(run.cur_nimg, run.seconds) >= 1
            save = last or run.due(config.checkpoint_every_nimg)
            if save:
                run.check_losses(window)
                metadata = run.save()
                session.update(run.cur_nimg, run.seconds - earlier)
            if save or run.due(config.sample_every_nimg):
                _draw(run, samples, log)
            if not received:
                _validate(run, [each for each in evaluators if last or run.due(each[2])], log, failed)
            if last:
                if not received:
                    log.artifact(run.out / SNAPSHOT, metadata, run.cur_nimg)
                break
        else:  # a signal came while it waited for data, from a network that stalls
            if run.cur_nimg:
                run.check_losses(window)
                run.save()
                session.update(run.cur_nimg, run.seconds - earlier)
    if received:
        print(f"{run.out}: stopped at {run.cur_nimg} images; {again} resumes", file=sys.stderr)
        raise Stopped(received[0])


def _session(run: RunState, track: Sequence[str]) -> Session:
    recorded = run.record["data"]
    data = {key: recorded[key] for key in ("content_sha256", "counts", "licence", "identities") if key in recorded}
    return Session(
        run.out, data=data, device=run.device, dtype=run.config.dtype, cur_nimg=run.cur_nimg, trackers=list(track)
    )


def _run_log(run: RunState, session: Session, track: Sequence[str], project: str) -> RunLog:
    config = {"config": run.record["config"], "data": run.record["data"], "session": session.entry}
    return RunLog(run.out, trackers=track, project=project, config=config, cur_nimg=run.cur_nimg)


def _draw(run: RunState, samples: SampleGrid, log: RunLog) -> None:
    path = samples.draw(run.model.G_ema, run.cur_nimg, run.device, run.model.dtype)
    log.image("samples", path, run.cur_nimg)
    log.image("progress", samples.strip(run.cur_nimg), run.cur_nimg)


class _Failed:
    """The warning that a training fails, printed once."""

    def __init__(self, run: RunState) -> None:
        self._run, self._said, self._count = run, False, dict[str, int]()

    def check(self, name: str, metrics: dict[str, float], every_nimg: int) -> None:
        """Warn if these metrics and those of the validations before say so."""
        reason = failure(metrics)
        self._count[name] = self._count.get(name, 0) + 1 if reason else 0
        settled = self._run.cur_nimg >= max(FAILED * every_nimg, SETTLED)
        if not self._said and settled and self._count[name] >= FAILED:
            self._said = True
            message(
                f"vultus: warning: {self._run.out}: after {self._run.cur_nimg} images, {reason}; lower --optim.lr in a "
                f"new --out"
            )


def _validate(run: RunState, evaluators: Sequence[Evaluator], log: RunLog, failed: _Failed) -> None:
    for name, function, every_nimg in evaluators:
        metrics = function(run.model.G_ema)
        log.log(metrics, run.cur_nimg, name)
        failed.check(name, metrics, every_nimg)


def _show(run: RunState, line: dict[str, float], budget: Budget, bar: Progress) -> None:
    total = None
    if budget.hours is not None:
        rate = run.cur_nimg / max(run.seconds, 1e-9)
        total = round(run.cur_nimg + rate * max(budget.hours * 3600 - run.seconds, 0))
    names = {"D_adversarial": "D", "G_adversarial": "G", "G_mse": "mse", "G_identity": "identity"}
    shown = {short: f"{line[name]:.3f}" for name, short in names.items() if name in line}
    every = run.config.checkpoint_every_nimg
    bar.show(shown | {"checkpoint in": every - run.cur_nimg % every}, total=total)

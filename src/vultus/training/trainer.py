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
bit for bit. Of several processes (processes.py), the first writes all of this.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vultus._files import folder_lock, make_folder
from vultus._prefetch import Prefetch
from vultus._progress import Progress, message, progress
from vultus._ranges import Hours, Images, checked
from vultus.config import TrainConfig, check_config, flat, to_dict
from vultus.data.dataset import Batch, PreparedDataset, batches
from vultus.errors import Stopped, UserError
from vultus.models.facenet import LossEncoder
from vultus.models.generators import GeneratorNetwork
from vultus.models.second_encoder import SecondEncoder
from vultus.training.checkpoint import Init
from vultus.training.environment import Session, peak_memory
from vultus.training.processes import Processes, current
from vultus.training.resume import SNAPSHOT, check_data, move_aside
from vultus.training.run_log import RunLog, check_trackers
from vultus.training.run_state import RunState
from vultus.training.sample_grid import STRIP, SampleGrid
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
    encoder: LossEncoder | None = None,
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

    Of several processes (see processes.joined), each calls this with the same arguments.

    Returns the path of the snapshot. Raises UserError for a folder in use or of another run, a tracker that is not
    installed, and a loss that is not finite; Stopped after SIGINT or SIGTERM.
    """
    processes = current()
    check_trackers(track)
    check_config(config)
    out = Path(out)
    opened = data if isinstance(data, PreparedDataset) else PreparedDataset(data, None)
    opened = opened if fresh else opened.begun_with(out)
    photos = opened.with_split("train", max_images=config.loader.max_images, seed=config.seed)
    check_data(config, photos, encoder)
    check_processes(config, photos, processes)
    budget = budget or default_budget(config, photos)
    with _folder(out, fresh) if processes.main else contextlib.nullcontext():
        run = RunState(config, photos, out, device, encoder, second, init, processes)
        if budget.used(run.cur_nimg, run.seconds) < 1:
            _loop(run, budget, evaluators, track, project, again="the same command" + " without --fresh" * fresh)
        elif processes.main:
            _complete(run, budget, evaluators, track, project)
    return out / SNAPSHOT


@contextlib.contextmanager
def _folder(out: Path, fresh: bool) -> Iterator[None]:
    """Create and lock the run folder; with `fresh`, move the run that is there aside."""
    make_folder(out)
    with folder_lock(out, "train"):
        if fresh and (moved := move_aside(out)):
            message(f"{out}: starting over; the run that was here is in {moved}")
        yield


def check_processes(config: TrainConfig, photos: PreparedDataset, processes: Processes) -> None:
    """Raise UserError if batches cannot be dealt to the processes, or these have other settings or photos."""
    if config.optim.batch % processes.count:
        raise UserError(
            f"--optim.batch is {config.optim.batch}, which cannot be dealt to {processes.count} processes; give a "
            f"multiple of {processes.count}"
        )
    values = flat(to_dict(config)) | {"the content of --data": photos.manifest["content_sha256"][:12]}
    processes.check_same(values)


def default_budget(config: TrainConfig, photos: PreparedDataset) -> Budget:
    """The epochs of `config` as a number of images."""
    return Budget(total_nimg=max(1, round(config.epochs * len(photos))))


def _complete(
    run: RunState, budget: Budget, evaluators: Sequence[Evaluator], track: Sequence[str], project: str
) -> None:
    """Write what the last session of a run, whose budget is used up, was ended before."""
    samples = _samples(run)
    if run.snapshot_is_current() and samples.complete(run.cur_nimg) and not run.unlogged(evaluators, last=True):
        message(f"{run.out}: the budget is used up ({run.cur_nimg} images); nothing to do")
        return
    message(f"{run.out}: the budget is used up ({run.cur_nimg} images); writing what an interruption left out")
    with _records(run, budget, evaluators, track, project, last=True) as records:
        records.artifact()


def _loop(
    run: RunState, budget: Budget, evaluators: Sequence[Evaluator], track: Sequence[str], project: str, *, again: str
) -> None:
    """Train until the budget is used up or a signal comes; `again` is the command that resumes the run."""
    config, batch, processes = run.config, run.config.optim.batch, run.processes
    start = time.monotonic() - run.seconds
    writes = _records(run, budget, evaluators, track, project) if processes.main else contextlib.nullcontext()
    with collect_signals() as received, _source(run, received) as source, writes as records:
        window = StatisticsWindow(run.cur_nimg)
        used, stop = budget.used(run.cur_nimg, run.seconds), 0
        for nimg, item in window.waiting(source):
            run.model.budget_used = used
            losses = run.model.step(item.images, item.c, nimg, item.second, item.facenet)
            run.cur_nimg = nimg + batch
            run.seconds = time.monotonic() - start
            window.add(nimg, item.keys, losses)
            # The clock is that of the first process; a signal may have come to any.
            own = budget.used(run.cur_nimg, run.seconds) if processes.main else 0.0
            used, number = processes.largest([own, received[0] if received else 0])
            stop, last = int(number), bool(number) or used >= 1
            save = last or run.due(config.checkpoint_every_nimg)
            if run.device == "cpu" or save or run.due(config.log_every_nimg):  # on a GPU the check waits for the step
                run.check_losses(window)
            if records is not None:
                records.after_step(window, save=save, last=last, stopped=bool(stop))
            if last:
                break
        else:  # a signal came while it waited for data, from a network that stalls
            stop = received[0]
            if records is not None and run.cur_nimg:
                run.check_losses(window)
                records.save()
    if stop:
        if processes.main:
            print(f"{run.out}: stopped at {run.cur_nimg} images; {again} resumes", file=sys.stderr)
        raise Stopped(stop)


@contextlib.contextmanager
def _source(run: RunState, received: list[int]) -> Iterator[Iterator[tuple[int, Batch]]]:
    """The batches of the run, of each the own part. They end when a signal comes while one waits for data."""
    config, processes = run.config, run.processes
    several = processes.count > 1
    scattered = several and not run.dataset.random_access
    if scattered and not processes.main:
        yield _scattered(run, None)
        return
    source = batches(
        run.dataset,
        batch=config.optim.batch,
        cur_nimg=run.cur_nimg,
        seed=config.seed,
        pin=run.device == "cuda" and not scattered,
        second=run.second,
        own=run.part.own.numpy() if several and not scattered else None,
    )
    # One of several processes cannot leave alone: the others would wait for it.
    ended = None if several else lambda: bool(received)
    with Prefetch(source, PREFETCHED, ended=ended) as prefetched:
        yield _scattered(run, prefetched) if scattered else prefetched


def _scattered(run: RunState, source: Iterator[tuple[int, Batch]] | None) -> Iterator[tuple[int, Batch]]:
    """The own part of each batch of `source`, which only the first process reads; it sends the others theirs."""
    part, side, nimg = run.part, run.dataset.resolution, run.cur_nimg
    images = torch.empty(len(part.own), 3, side, side, dtype=torch.uint8)
    c = torch.empty(len(part.own), run.config.generator.c_dim)
    while True:
        item = None if source is None else next(source)[1]
        run.processes.scatter(None if item is None else [item.images[rows] for rows in part.dealt], images)
        run.processes.scatter(None if item is None else [item.c[rows] for rows in part.dealt], c)
        yield nimg, Batch(images.clone(), c.clone(), [], item.keys if item else [])
        nimg += part.batch


@contextlib.contextmanager
def _records(
    run: RunState,
    budget: Budget,
    evaluators: Sequence[Evaluator],
    track: Sequence[str],
    project: str,
    *,
    last: bool = False,
) -> Iterator[_Records]:
    """What is written about a run. At its beginning these are samples and a validation; later, what the session before
    was ended before. `last`: the budget is used up."""
    recorded = run.record["data"]
    data = {key: recorded[key] for key in ("content_sha256", "counts", "licence", "identities") if key in recorded}
    session = Session(
        run.out,
        data=data,
        device=run.device,
        dtype=run.config.dtype,
        cur_nimg=run.cur_nimg,
        trackers=list(track),
        processes=run.processes.count,
    )
    described = {"config": run.record["config"], "data": recorded, "session": session.entry}
    with (
        RunLog(run.out, trackers=track, project=project, config=described, cur_nimg=run.cur_nimg) as log,
        progress(budget.total_nimg, title="training", initial=run.cur_nimg) as bar,
    ):
        records = _Records(run, budget, evaluators, session, log, bar)
        records.catch_up(last)
        yield records


def _samples(run: RunState) -> SampleGrid:
    return SampleGrid.of_dataset(run.dataset, run.out / "samples", run.config.generator.z_dim)


class _Records:
    """What the first process writes about a run: statistics, samples, validations, checkpoints."""

    def __init__(
        self,
        run: RunState,
        budget: Budget,
        evaluators: Sequence[Evaluator],
        session: Session,
        log: RunLog,
        bar: Progress,
    ) -> None:
        self._run, self._budget, self._evaluators = run, budget, evaluators
        self._session, self._log, self._bar = session, log, bar
        self._before = run.seconds  # of earlier sessions
        self._failed = _Failed(run)
        self._samples = _samples(run)

    def catch_up(self, last: bool) -> None:
        """Write what is due after the images seen so far and is not there; see _records()."""
        run, config = self._run, self._run.config
        if run.cur_nimg and not run.snapshot_is_current():
            run.save_snapshot()
            self._session.update(run.cur_nimg, 0.0)
        due = last or run.due(config.checkpoint_every_nimg) or run.due(config.sample_every_nimg)
        if run.cur_nimg == 0 or (due and not self._samples.complete(run.cur_nimg)):
            self.draw()
        self.validate(run.unlogged(self._evaluators, last=last))

    def after_step(self, window: StatisticsWindow, *, save: bool, last: bool, stopped: bool) -> None:
        """Write what is due. `last`: the run ends here, or is `stopped` by a signal."""
        run = self._run
        self._bar.update(run.config.optim.batch)
        if run.due(run.config.log_every_nimg):
            line = {"seconds": round(run.seconds, 2)} | window.close(run.cur_nimg)
            line |= {"lr": run.config.optim.lr} | peak_memory(run.device)
            self._log.log(line, run.cur_nimg)
            self._show(line)
        if save:
            self.save()
        # Not of a stop by a signal: a run that was stopped and resumed has the samples of one that was not.
        scheduled = run.due(run.config.checkpoint_every_nimg) or run.due(run.config.sample_every_nimg)
        if scheduled or (last and not stopped):
            self.draw()
        if not stopped:
            self.validate([each for each in self._evaluators if last or run.due(each[2])])
            if last:
                self.artifact()

    def save(self) -> None:
        """Write checkpoint and snapshot."""
        self._run.save()
        self._session.update(self._run.cur_nimg, self._run.seconds - self._before)

    def artifact(self) -> None:
        """Log the snapshot."""
        self._log.artifact(self._run.out / SNAPSHOT, self._run.metadata(), self._run.cur_nimg)

    def draw(self) -> None:
        """Write the samples."""
        run = self._run
        path = self._samples.draw(run.model.G_ema, run.cur_nimg, run.device, run.model.dtype)
        self._log.image("samples", path, run.cur_nimg)
        self._log.image("progress", path.with_name(STRIP), run.cur_nimg)

    def validate(self, evaluators: Sequence[Evaluator]) -> None:
        """Log what these evaluators measure."""
        for name, function, every_nimg in evaluators:
            metrics = function(self._run.model.G_ema)
            self._log.log(metrics, self._run.cur_nimg, name)
            self._failed.check(name, metrics, every_nimg)

    def _show(self, line: dict[str, float]) -> None:
        run, hours, total = self._run, self._budget.hours, None
        if hours is not None:
            rate = run.cur_nimg / max(run.seconds, 1e-9)
            total = round(run.cur_nimg + rate * max(hours * 3600 - run.seconds, 0))
        names = {"D_adversarial": "D", "G_adversarial": "G", "G_mse": "mse", "G_identity": "identity"}
        shown = {short: f"{line[name]:.3f}" for name, short in names.items() if name in line}
        every = run.config.checkpoint_every_nimg
        self._bar.show(shown | {"checkpoint in": every - run.cur_nimg % every}, total=total)


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

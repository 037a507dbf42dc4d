"""`vultus train`: the loop around the training step, and the run folder.

Run folder:
    config.json            the resolved config and the data set it belongs to
    run.json               versions, git revision, hardware and command of every session
    stats.jsonl            a line of statistics or of a measurement per `*_every_nimg`
    tracking.json          how far each tracker was told
    samples/<nimg>.png     fixed unseen people (real photo first) x fixed noise, with every checkpoint
    samples/progress.png   the same people over time
    checkpoint-<nimg>.pt   the last `keep`
    snapshot.safetensors   what `generate`, `evaluate` and a program load

The same command run again goes on from the last checkpoint; on a CPU the result is that of an uninterrupted run, bit
for bit.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from vultus._files import folder_lock, make_folder, read_json, write_json
from vultus._prefetch import Prefetch
from vultus.config import TrainConfig, check_method, differences, from_dict, to_dict
from vultus.data.dataset import PreparedDataset, batches
from vultus.errors import Stopped, UserError
from vultus.models.facenet import DTYPES, Encoder, fastest_dtype
from vultus.models.generators import GeneratorNetwork
from vultus.models.snapshot import save_snapshot
from vultus.sampling.population import fit_population, noise
from vultus.training.checkpoint import load_checkpoint, save_checkpoint
from vultus.training.cvae_gan import CVAEGAN
from vultus.training.environment import Session, peak_memory
from vultus.training.gan import GAN
from vultus.training.run_log import RunLog, check_trackers, cut_stats
from vultus.training.sample_grid import Samples
from vultus.training.validation import failure

T = TypeVar("T")
Evaluator = tuple[str, Callable[[GeneratorNetwork], dict[str, float]], int]
MAY_CHANGE = frozenset(
    {"epochs", "keep", "log_every_nimg", "sample_every_nimg", "checkpoint_every_nimg", "preset", "dtype"}
)
METHODS: dict[str, type[GAN]] = {"gan": GAN, "coded": CVAEGAN}
CALIBRATION = 64  # photos that a method may look at before the first step
DIVERGED = 1e8  # no loss here is above 100 in a sound run
YOUNG = 3  # measurements: until then no network has learnt enough to be called failed
SAMPLE_PEOPLE, SAMPLE_NOISES, SAMPLE_SEED = 8, 5, 1


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many images, or after so many hours of training, all sessions of the run together."""

    total_nimg: int | None = None
    hours: float | None = None


def train(
    config: TrainConfig,
    *,
    data: str | Path,
    out: str | Path,
    budget: Budget | None = None,
    device: str = "cpu",
    encoder: Encoder | None = None,
    evaluators: Sequence[Evaluator] = (),
    track: Sequence[str] = (),
    project: str = "vultus",
) -> Path:
    """Train into the run folder `out` until the budget is used up; go on if it was begun before.

    Args:
        config: the run. Its `generator.resolution` must be that of the data.
        data: a prepared data set.
        budget: default is config.epochs passes over the data.
        device: cuda, mps or cpu.
        encoder: FaceNet, needed where config.loss.needs_encoder().
        evaluators: (name, function of the averaged generator giving named figures, every_nimg).
        track: trackers to report to besides stats.jsonl: tensorboard, wandb, trackio.
        project: what they file the run under; the run bears the name of `out`.

    Returns the path of the snapshot. Raises UserError for a folder in use or of another run, a tracker that is not
    installed, and a loss that is not finite; Stopped after SIGINT or SIGTERM.
    """
    check_trackers(track)
    check_method(config)
    out = make_folder(out)
    with ExitStack() as stack:
        stack.enter_context(folder_lock(out, "train"))
        run = _Run(config, PreparedDataset(data, "train", **_subset(config)), out, device, encoder)
        run.resume()
        run.loop(budget or Budget(total_nimg=round(config.epochs * len(run.dataset))), evaluators, track, project)
    return out / "snapshot.safetensors"


def _subset(config: TrainConfig) -> dict[str, int]:
    return {"max_images": config.loader.max_images, "seed": config.seed}


class _Run:
    """One training in one folder."""

    def __init__(
        self, config: TrainConfig, dataset: PreparedDataset, out: Path, device: str, encoder: Encoder | None
    ) -> None:
        if dataset.resolution != config.generator.resolution or dataset.resolution != config.discriminator.resolution:
            raise UserError(
                f"generator.resolution is {config.generator.resolution} but {dataset.folder} holds images of "
                f"{dataset.resolution}; leave it out or prepare the data at that size"
            )
        if len(dataset) < config.optim.batch:
            raise UserError(
                f"{dataset.folder}: {len(dataset)} training images are fewer than a batch; set --optim.batch "
                f"{max(1, len(dataset) // 2)} or less"
            )
        self.dataset, self.out, self.device = dataset, out, device
        self.config = self._settle(config)
        method = METHODS[self.config.method]
        self.gan = method(self.config, device=device, dtype=DTYPES[self.config.dtype], encoder=encoder)
        self.cur_nimg = 0
        self.seconds = 0.0
        chunks = (dataset.embeddings(range(i, min(i + 8192, len(dataset)))) for i in range(0, len(dataset), 8192))
        self.population = fit_population(chunks)
        self._samples = Samples(out / "samples", *self._fixed_samples())

    def _settle(self, config: TrainConfig) -> TrainConfig:
        """Resolve `auto`, and hold the run to the config and data that its folder was begun with."""
        path = self.out / "config.json"
        data = {key: self.dataset.manifest[key] for key in ("content_sha256", "encoder", "crop", "counts", "licence")}
        if path.is_file():
            begun = read_json(path)
            before = to_dict(from_dict(TrainConfig, begun["config"], str(path)))  # with settings that came later
            changed = [k for k in differences(before, to_dict(config)) if k.split(".")[0] not in MAY_CHANGE]
            if changed:
                raise UserError(
                    f"{self.out} was begun with other settings ({', '.join(changed)} differ); "
                    f"use those or another --out"
                )
            if begun["data"]["content_sha256"] != data["content_sha256"]:
                raise UserError(f"{self.out} was begun on other data than {self.dataset.folder}; choose another --out")
            dtype = begun["config"]["dtype"]
        else:
            if next(self.out.glob("checkpoint-*.pt"), None):
                raise UserError(f"{path} is missing beside the checkpoints; restore it or choose another --out")
            dtype = config.dtype
            if dtype == "auto":
                dtype = next(name for name, value in DTYPES.items() if value == fastest_dtype(self.device))
        config = replace(config, dtype=dtype)
        write_json(path, {"config": to_dict(config), "data": data})
        return config

    def _fixed_samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """(photos uint8 [P, 3, R, R], c [P, 512], z [P * noises, z_dim]) of people never trained on, if there are."""
        try:
            unseen = PreparedDataset(self.dataset.folder, "test")
        except UserError:
            unseen = self.dataset
        batch = unseen.batch(unseen.people(SAMPLE_PEOPLE))
        z = noise(SAMPLE_SEED, 0, SAMPLE_NOISES, self.config.generator.z_dim)
        return batch.images, batch.c, z

    # --- going on -----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one, and forget statistics written after it."""
        for leftover in self.out.glob(".*.tmp"):
            leftover.unlink()
        found = load_checkpoint(self.out)
        if found is None:
            (self.out / "stats.jsonl").unlink(missing_ok=True)
            self.gan.calibrate(self.dataset.batch(range(min(CALIBRATION, len(self.dataset)))).images)
            return
        state, path = found
        try:
            self.gan.load_state_dict(state["gan"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{path}: belongs to other networks ({reason}); choose another --out") from None
        self.cur_nimg, self.seconds = int(state["cur_nimg"]), float(state["seconds"])
        cut_stats(self.out / "stats.jsonl", self.cur_nimg)
        print(f"{self.out}: going on from {path.name}", file=sys.stderr)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def loop(self, budget: Budget, evaluators: Sequence[Evaluator], track: Sequence[str], project: str) -> None:
        """Train until the budget is used up or a signal comes."""
        config, batch = self.config, self.config.optim.batch
        before = self.seconds
        began = time.monotonic() - before
        if self._done(budget):
            print(f"{self.out}: the budget is used up ({self.cur_nimg} images); nothing to do", file=sys.stderr)
            return
        source = batches(self.dataset, batch=batch, cur_nimg=self.cur_nimg, seed=config.seed, pin=self.device == "cuda")
        with (
            _signals() as received,
            Prefetch(source, 3) as decoded,
            self._sink(track, project) as sink,
            tqdm(total=budget.total_nimg, initial=self.cur_nimg, unit="img", dynamic_ncols=True) as bar,
        ):
            if self.cur_nimg == 0:
                self._draw(sink)
                self._measure(sink, evaluators, every=False)
            window = _Window(self.cur_nimg)
            for nimg, item in window.waiting(decoded):
                self.gan.used = self._used(budget)
                losses = self.gan.step(item.images, item.c, nimg)
                self.cur_nimg = nimg + batch
                self.seconds = time.monotonic() - began
                window.add(nimg, item.keys, losses)
                if self.device == "cpu" or self._due(config.log_every_nimg):
                    self._refuse_diverged(window)
                bar.update(batch)
                if self._due(config.log_every_nimg):
                    line = {"seconds": round(self.seconds, 2)} | window.close(self.cur_nimg)
                    line |= {"lr": self.gan.G_optim.param_groups[0]["lr"]} | peak_memory(self.device)
                    sink.log(line, self.cur_nimg)
                    self._show(bar, line, budget)
                last = self._done(budget) or bool(received)
                save = last or self._due(config.checkpoint_every_nimg)
                if save:
                    self._refuse_diverged(window)
                    metadata = self._save()
                    self._session.update(self.cur_nimg, self.seconds - before)
                if save or self._due(config.sample_every_nimg):
                    self._draw(sink)
                if not received:
                    self._measure(sink, evaluators, every=not last)
                if last:
                    if not received:
                        sink.artifact(self.out / "snapshot.safetensors", metadata, self.cur_nimg)
                    break
        if received:
            print(f"{self.out}: stopped at {self.cur_nimg} images; the same command goes on", file=sys.stderr)
            raise Stopped(received[0])

    def _sink(self, track: Sequence[str], project: str) -> RunLog:
        record = read_json(self.out / "config.json")
        data = {key: record["data"].get(key) for key in ("content_sha256", "counts", "licence")}
        self._session = Session(
            self.out,
            data=data,
            device=self.device,
            dtype=self.config.dtype,
            cur_nimg=self.cur_nimg,
            trackers=list(track),
        )
        config = record | {"session": self._session.entry}
        return RunLog(self.out, trackers=track, project=project, config=config, cur_nimg=self.cur_nimg)

    def _done(self, budget: Budget) -> bool:
        return self._used(budget) >= 1

    def _used(self, budget: Budget) -> float:
        """The share of the budget that is used up: of whichever of its parts runs out first."""
        parts = [(self.cur_nimg, budget.total_nimg), (self.seconds, budget.hours and budget.hours * 3600)]
        return max((used / whole if whole else 1.0 for used, whole in parts if whole is not None), default=0.0)

    def _due(self, every: int) -> bool:
        return self.cur_nimg // every != (self.cur_nimg - self.config.optim.batch) // every

    def _show(self, bar: tqdm, line: dict[str, Any], budget: Budget) -> None:
        if budget.hours is not None:
            rate = self.cur_nimg / max(self.seconds, 1e-9)
            bar.total = round(self.cur_nimg + rate * max(budget.hours * 3600 - self.seconds, 0))
        names = {"D_adversarial": "D", "G_adversarial": "G", "G_mse": "mse", "G_identity": "identity"}
        shown = {short: f"{line[name]:.3f}" for name, short in names.items() if name in line}
        every = self.config.checkpoint_every_nimg
        bar.set_postfix(shown | {"checkpoint in": every - self.cur_nimg % every})

    def _refuse_diverged(self, window: _Window) -> None:
        found = window.first_diverged()
        if found is None:
            return
        nimg, keys, names = found
        write_json(self.out / "diverged.json", {"cur_nimg": nimg, "losses": names, "keys": keys})
        good = sorted(self.out.glob("checkpoint-*.pt"))
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more in diverged.json" if len(keys) > 4 else "")
        raise UserError(
            f"{self.out}: {', '.join(names)} not finite or beyond 1e8 at step {nimg // self.config.optim.batch} "
            f"({nimg} images), batch keys {shown}; last good checkpoint: "
            f"{good[-1].name if good else 'none'}; lower --optim.lr in a new --out"
        )

    # --- what is written ----------------------------------------------------------------------------------------------

    def _save(self) -> dict[str, Any]:
        """Write checkpoint and snapshot; return the snapshot's metadata."""
        if not all(bool(torch.isfinite(p).all()) for net in self.gan.networks().values() for p in net.parameters()):
            raise UserError(
                f"{self.out}: weights are not finite at {self.cur_nimg} images; lower --optim.lr in a new --out"
            )
        state = {"gan": self.gan.state_dict(), "cur_nimg": self.cur_nimg, "seconds": self.seconds}
        save_checkpoint(self.out, state, self.cur_nimg, self.config.keep)
        manifest = self.dataset.manifest
        metadata = {
            "generator": to_dict(self.config.generator),
            "preset": self.config.preset,
            "cur_nimg": self.cur_nimg,
            "hours": round(self.seconds / 3600, 3),
            "encoder": {key: manifest["encoder"][key] for key in ("id", "dim", "weights_sha256")},
            "crop": manifest["crop"],
            "data": {"content_sha256": manifest["content_sha256"], "images": len(self.dataset)},
            "licence": manifest.get("licence"),
        }
        save_snapshot(
            self.out / "snapshot.safetensors", network=self.gan.G_ema, population=self.population, metadata=metadata
        )
        return metadata

    def _draw(self, sink: RunLog) -> None:
        sink.image(
            "samples", self._samples.draw(self.gan.G_ema, self.cur_nimg, self.device, self.gan.dtype), self.cur_nimg
        )
        sink.image("progress", self._samples.strip(self.cur_nimg), self.cur_nimg)

    def _measure(self, sink: RunLog, evaluators: Sequence[Evaluator], *, every: bool) -> None:
        """Run the evaluators that are due (all of them unless `every`)."""
        for name, function, every_nimg in evaluators:
            if not every or self._due(every_nimg):
                found = function(self.gan.G_ema)
                sink.log(found, self.cur_nimg, name)
                wrong = failure(found)
                if wrong and self.cur_nimg >= YOUNG * every_nimg:
                    self._warn(wrong)

    def _warn(self, what: str) -> None:
        tqdm.write(f"vultus: warning: {self.out}: {what}; lower --optim.lr in a new --out", file=sys.stderr)


class _Window:
    """Figures since the last line of statistics, kept on the device until the line is written."""

    def __init__(self, cur_nimg: int) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.unchecked: list[tuple[int, list[str], dict[str, Tensor]]] = []
        self.start_nimg, self.start, self.waited = cur_nimg, time.monotonic(), 0.0

    def waiting(self, source: Iterator[T]) -> Iterator[T]:
        """The values of `source`, with the time that they are waited for counted."""
        while True:
            asked = time.monotonic()
            try:
                value = next(source)
            except StopIteration:
                return
            self.waited += time.monotonic() - asked
            yield value

    def add(self, nimg: int, keys: list[str], losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        # A norm has no size that is too large: Adam divides by it.
        checked = {name: value for name, value in losses.items() if not name.endswith("_grad_norm")}
        self.unchecked.append((nimg, keys, checked))

    def first_diverged(self) -> tuple[int, list[str], list[str]] | None:
        """(images seen, keys, names of the losses) of the first step since the last call with a diverged loss."""
        steps, self.unchecked = self.unchecked, []
        if not steps or bool(torch.stack([_sound(torch.stack([*step[2].values()])).all() for step in steps]).all()):
            return None
        for nimg, keys, losses in steps:
            names = [name for name, value in losses.items() if not bool(_sound(value))]
            if names:
                return nimg, keys, names
        return None

    def close(self, cur_nimg: int) -> dict[str, float]:
        """Means, the rate and the share of time without data since the window was opened; open the next."""
        now = time.monotonic()
        passed = max(now - self.start, 1e-9)
        line = {"images_per_s": round((cur_nimg - self.start_nimg) / passed, 2)}
        line["data_wait"] = round(self.waited / passed, 4)
        line |= {name: round(float(total) / self.counts[name], 6) for name, total in self.sums.items()}
        self.sums, self.counts, self.start_nimg, self.start, self.waited = {}, {}, cur_nimg, now, 0.0
        return line


def _sound(losses: Tensor) -> Tensor:
    """Finite and of a size that a training can come back from."""
    return losses.abs() < DIVERGED  # false for nan


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them. A second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

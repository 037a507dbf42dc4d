"""The state of a run: its settings, its networks, how many images it has seen; kept in the run folder to resume."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vultus._files import write_json
from vultus._formats import VERSIONS
from vultus._progress import message
from vultus._run_config import read_run_config
from vultus.config import TrainConfig, to_dict, train_config
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.models.facenet import DTYPES, LossEncoder, dtype_name
from vultus.models.second_encoder import SecondEncoder
from vultus.models.snapshot import save_snapshot, saved_cur_nimg
from vultus.sampling.population import fit_population
from vultus.training.checkpoint import Init, checkpoints, load_checkpoint, remove_old, save_checkpoint
from vultus.training.methods import METHODS
from vultus.training.processes import ALONE, Processes
from vultus.training.resume import SNAPSHOT, check_data, check_folder
from vultus.training.run_log import cut_stats, read_stats
from vultus.training.second_targets import second_targets
from vultus.training.statistics import StatisticsWindow

Evaluator = TypeVar("Evaluator", bound=tuple[Any, ...])
CALIBRATION = 64  # photos for Method.calibrate


class RunState:
    """A run in its folder, at the newest checkpoint or at the beginning.

    Args:
        config: the run, as given by the user.
        dataset: the training photos.
        out: the run folder; this process, or the first one of several, holds its lock, and alone reads and writes it.
        device: cuda, mps or cpu.
        encoder: FaceNet, needed where config.loss.needs_encoder().
        second: a second face encoder, needed where config has a loss for one.
        init: weights to begin a new run with; see Method.take_weights(). Not used if there is a checkpoint.
        processes: those that train the run together. All of them create a RunState, of the same settings and photos.

    Raises UserError if settings, data and folder do not fit together.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: PreparedDataset,
        out: Path,
        device: str,
        encoder: LossEncoder | None,
        second: SecondEncoder | None = None,
        init: Init | None = None,
        processes: Processes = ALONE,
    ) -> None:
        check_data(config, dataset, encoder)
        self.dataset, self.out, self.device, self.processes = dataset, out, device, processes
        start = init if processes.main and not checkpoints(out) else None
        record: dict[str, Any] = _settle(config, dataset, out, device, start) if processes.main else {}
        self.record = processes.broadcast(record)
        self.config = train_config(self.record["config"], str(out / "config.json"))
        method, dtype = METHODS[self.config.method], DTYPES[self.config.dtype]
        self.model = method(
            self.config, device=device, dtype=dtype, encoder=encoder, second=second, processes=processes
        )
        self.part = self.model.part(self.config.optim.batch)
        self.second: Tensor | None = None
        # A stream cannot be read ahead; each step then computes the targets of its own photos.
        if second is not None and dataset.random_access:
            with processes.first_alone():
                self.second = second_targets(dataset, second, device)
        self.cur_nimg = 0
        self.seconds = 0.0  # of training, all sessions together
        self.population = fit_population(dataset.embedding_chunks()) if processes.main else {}
        self._resume()
        if start is not None:
            self._begin_from(start)
        self.model.connect()

    def _begin_from(self, start: Init) -> None:
        left = self.model.take_weights(start.networks)
        if not start.networks or all(f"G.{name}" in left for name, _ in self.model.G.named_parameters()):
            raise UserError(f"--init {start.folder}: its generator has no weights of these shapes; leave --init out")
        rest = f"; {len(left)} tensors have other shapes or names and start afresh" if left else ""
        message(f"{self.out}: weights of {start.folder} after {start.cur_nimg} images{rest}")

    def _resume(self) -> None:
        """Load the newest checkpoint, if there is one, and drop statistics written after it."""
        main = self.processes.main
        for leftover in self.out.glob(".*.tmp") if main else ():
            leftover.unlink()
        checkpoint = self.processes.broadcast(load_checkpoint(self.out) if main else None)
        if checkpoint is None and main:
            (self.out / "stats.jsonl").unlink(missing_ok=True)
            self.model.calibrate(self.dataset.batch(range(min(CALIBRATION, len(self.dataset)))).images)
        if checkpoint is None:
            return
        state, path = checkpoint
        try:
            self.model.load_state_dict(state["gan"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{path}: belongs to other networks ({reason}); choose another --out") from None
        self.cur_nimg, self.seconds = int(state["cur_nimg"]), float(state["seconds"])
        if main:
            remove_old(self.out, self.config.keep)
            cut_stats(self.out / "stats.jsonl", self.cur_nimg)
            print(f"{self.out}: resuming from {path.name}", file=sys.stderr)

    def due(self, every_nimg: int) -> bool:
        """Whether the last step passed a multiple of `every_nimg`."""
        return self.cur_nimg // every_nimg != (self.cur_nimg - self.config.optim.batch) // every_nimg

    def snapshot_is_current(self) -> bool:
        """Whether the snapshot is there, and of the newest checkpoint: a killed process may have written only that."""
        return saved_cur_nimg(self.out / SNAPSHOT) == self.cur_nimg

    def unlogged(self, evaluators: Sequence[Evaluator], *, last: bool) -> list[Evaluator]:
        """Which of these (name, function, every_nimg) are due now, or at the end, and have no line in the log yet."""
        lines = read_stats(self.out / "stats.jsonl", self.cur_nimg)
        logged = {line.get("evaluator") for line in lines if line["cur_nimg"] == self.cur_nimg}
        due = [each for each in evaluators if last or self.cur_nimg == 0 or self.due(each[2])]
        return [each for each in due if each[0] not in logged]

    def check_losses(self, window: StatisticsWindow) -> None:
        """Raise UserError, and write diverged.json, if a loss of the window has diverged."""
        diverged = window.first_diverged()
        if diverged is None:
            return
        nimg, keys, names = diverged
        keys = [key for part in self.processes.gather(keys) for key in part]
        if self.processes.main:
            write_json(self.out / "diverged.json", {"cur_nimg": nimg, "losses": names, "keys": keys})
        good = checkpoints(self.out)
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more in diverged.json" if len(keys) > 4 else "")
        raise UserError(
            f"{self.out}: {', '.join(names)} not finite or beyond 1e8 at step {nimg // self.config.optim.batch} "
            f"({nimg} images), batch keys {shown}; last good checkpoint: "
            f"{good[-1].name if good else 'none'}; lower --optim.lr in a new --out"
        )

    def save(self) -> None:
        """Write checkpoint and snapshot. Raises UserError if weights are not finite."""
        if not all(bool(torch.isfinite(p).all()) for net in self.model.networks().values() for p in net.parameters()):
            raise UserError(
                f"{self.out}: weights are not finite at {self.cur_nimg} images; lower --optim.lr in a new --out"
            )
        state = {"gan": self.model.state_dict(), "cur_nimg": self.cur_nimg, "seconds": self.seconds}
        save_checkpoint(self.out, state, self.cur_nimg, self.config.keep)
        self.save_snapshot()

    def metadata(self) -> dict[str, Any]:
        """The metadata of the snapshot."""
        manifest = self.dataset.manifest
        return {
            "generator": self.model.G_ema.settings(),
            "preset": self.config.preset,
            "cur_nimg": self.cur_nimg,
            "hours": round(self.seconds / 3600, 3),
            "encoder": {
                key: value for key, value in manifest["encoder"].items() if key not in ("dtype", "table_sha256")
            },
            "crop": manifest["crop"],
            "data": {"content_sha256": manifest["content_sha256"], "images": len(self.dataset)},
            "licence": manifest.get("licence"),
            "loss_encoders": self.config.loss.encoders(),
        }

    def save_snapshot(self) -> None:
        """Write the snapshot."""
        path, metadata = self.out / SNAPSHOT, self.metadata()
        save_snapshot(path, network=self.model.G_ema, population=self.population, metadata=metadata)


def _settle(
    config: TrainConfig, dataset: PreparedDataset, out: Path, device: str, start: Init | None
) -> dict[str, Any]:
    """Write config.json, with dtype `auto` resolved, and return what it holds; see check_folder()."""
    path = out / "config.json"
    keys = ("content_sha256", "encoder", "facenet", "crop", "counts", "licence", "identities", "stream")
    data = {key: dataset.manifest[key] for key in keys if key in dataset.manifest}  # older versions have fewer
    begun = check_folder(out, config, dataset)
    dtype: Any = begun.config["dtype"] if begun is not None else dtype_name(config.dtype, device)
    record = {"format": VERSIONS["run config"], "config": to_dict(replace(config, dtype=dtype)), "data": data}
    if start is not None:
        record["init"] = {"run": start.folder.name, "cur_nimg": start.cur_nimg}
    elif checkpoints(out):
        record |= {key: value for key, value in read_run_config(path).items() if key == "init"}
    write_json(path, record)
    return record

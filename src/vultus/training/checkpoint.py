"""Training checkpoints: everything that the next step depends on.

A checkpoint is a dictionary of `format`, `gan` (state of networks, moving average and optimizers), `cur_nimg` and
`seconds`. The order of the data and every random number are functions of (seed, images seen), so no random state is
stored. It is read with weights_only.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from vultus._files import atomic_path
from vultus._formats import VERSIONS, upgrade, upgrades
from vultus.errors import UserError

PATTERN = "checkpoint-*.pt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest one last."""
    return sorted(folder.glob(PATTERN))


def save_checkpoint(folder: Path, state: dict[str, Any], cur_nimg: int, keep: int) -> Path:
    """Write folder/checkpoint-<cur_nimg>.pt atomically and delete all but the last `keep`, if that is not 0."""
    path = folder / f"checkpoint-{cur_nimg:010d}.pt"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        writer = _Writer(file)
        torch.save({"format": VERSIONS["checkpoint"]} | state, writer)  # type: ignore[arg-type]
        writer.check()
    remove_old(folder, keep)
    return path


def remove_old(folder: Path, keep: int) -> None:
    """Delete all checkpoints of a run folder but the last `keep`, if that is not 0."""
    for old in checkpoints(folder)[:-keep] if keep else ():
        old.unlink()


class _Writer:
    """A file for torch.save(), which would hide the OSError of a full disk behind a RuntimeError of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write; after an error, only pretend to."""
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:
            self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: `check` does it."""

    def check(self) -> None:
        """Write what is buffered. Raises the first OSError."""
        if self._error is not None:
            raise self._error
        self._file.flush()


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run folder as the current version has it, with its path; None if there is none.

    Raises UserError that names the file if it cannot be read.
    """
    paths = checkpoints(folder)
    if not paths:
        return None
    try:
        with zipfile.ZipFile(paths[-1]) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed")  # torch does not compress: what unpacks to far more is no checkpoint
        state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        version = state.get("format", 1)
    except Exception as error:  # torch.load raises many kinds of errors on damaged files
        remedy = (
            "delete it to resume from the one before"
            if len(paths) > 1
            else "it is the only one: start over with --fresh"
        )
        raise UserError(f"{paths[-1]}: cannot be read ({type(error).__name__}); {remedy}") from None
    return upgrade("checkpoint", version, state, paths[-1]), paths[-1]


@dataclass(frozen=True)
class Init:
    """The weights that another run has reached: states of networks by their names, of its newest checkpoint."""

    folder: Path
    cur_nimg: int
    networks: dict[str, Any]


def load_init(folder: str | Path) -> Init:
    """The newest checkpoint of the run folder `folder`, for another run to begin from.

    Raises UserError that names the folder if it has no checkpoint.
    """
    folder = Path(folder)
    found = load_checkpoint(folder)
    if found is None:
        raise UserError(f"--init {folder}: no checkpoint-*.pt is in this folder; give a run folder that has one")
    state, _ = found
    networks = {name: part for name, part in state["gan"].items() if not name.endswith("_optim")}
    return Init(folder, int(state["cur_nimg"]), networks)


@upgrades("checkpoint", 1)
def _upgrade_from_1(state: dict[str, Any]) -> dict[str, Any]:
    """The same without `format`."""
    return state | {"format": 2}

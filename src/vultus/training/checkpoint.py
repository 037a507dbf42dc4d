"""Training checkpoints: everything that the next step depends on.

Networks, EMA, optimizers, images seen. The order of the data and every random number are functions of (seed, images
seen), so no random state is stored. A checkpoint is read with weights_only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vultus._files import atomic_path
from vultus.errors import UserError

PATTERN = "checkpoint-*.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], cur_nimg: int, keep: int) -> Path:
    """Write folder/checkpoint-<cur_nimg>.pt atomically and delete all but the last `keep`."""
    path = folder / f"checkpoint-{cur_nimg:010d}.pt"
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run folder, or None if there is none. Raises UserError if it cannot be read."""
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        return None
    try:
        return torch.load(paths[-1], map_location="cpu", weights_only=True), paths[-1]
    except Exception as error:
        raise UserError(
            f"{paths[-1]}: cannot be read ({type(error).__name__}); delete it to go on from the one before"
        ) from None

"""What several verbs of the command line need: the device, the snapshot and FaceNet that the user asks for."""

from __future__ import annotations

import sys
from typing import Any

from vultus.errors import UserError


def device_named(name: str) -> str:
    """Resolve `auto`: cuda, then mps, then cpu. Raises UserError if a device that is asked for is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, present in there.items() if present)
    if not there.get(name.split(":")[0], False):
        raise UserError(
            f"--device {name}: not on this machine; there are {', '.join(k for k, v in there.items() if v)}"
        )
    return name


def open_snapshot(name: str, device: str) -> Any:
    """The snapshot of a file, folder or hub name, or `default`: the embedded one."""
    from vultus.models.snapshot import default_snapshot, load_snapshot

    return load_snapshot(default_snapshot() if name == "default" else name, device)


def open_facenet(device: str, *, needed: bool) -> Any:
    """FaceNet, or None with a note where it is neither there nor `needed`."""
    from vultus.models.facenet import load_facenet

    try:
        return load_facenet(device=device)
    except UserError as error:
        if needed:
            raise
        print(f"note: no FaceNet ({error}); unseen people are not measured during training", file=sys.stderr)
        return None

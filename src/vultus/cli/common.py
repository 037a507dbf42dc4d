"""What several verbs of the command line need: the device, the snapshot and FaceNet that the user asks for."""

from __future__ import annotations

import sys
from typing import Any

from vultus._device import device_named as device_named
from vultus.errors import UserError


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

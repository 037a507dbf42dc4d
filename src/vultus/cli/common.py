"""What several commands need: the device, the generator, and FaceNet, by the user's options."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vultus.errors import UserError

if TYPE_CHECKING:
    from vultus.sampling.generator import Generator


def open_snapshot(name: str, device: str) -> Generator:
    """The generator of a file, folder or hub name, or `default`: the embedded one."""
    from vultus.sampling.generator import load

    return load(name, device=device)


def open_facenet(device: str, *, needed: bool) -> Any:
    """FaceNet. Without its weights: None and a note, or a UserError if it is `needed`."""
    from vultus.models.facenet import load_facenet

    try:
        return load_facenet(device=device)
    except UserError as error:
        if needed:
            raise
        print(f"note: no FaceNet ({error}); there is no validation on unseen identities", file=sys.stderr)
        return None

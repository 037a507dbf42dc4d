"""The device to compute on."""

from __future__ import annotations

from vultus.errors import UserError


def device_named(name: str) -> str:
    """Resolve `auto` to cuda, mps or cpu, the first that is available. Raises UserError if a named device is not."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, present in available.items() if present)
    if not available.get(name.split(":")[0], False):
        raise UserError(
            f"--device {name}: not on this machine; there are {', '.join(k for k, v in available.items() if v)}"
        )
    return name

"""Which device runs the networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vultus.errors import UserError


def resolve_device(name: str = "auto") -> str:
    """The device of this name; `auto` is cuda, else mps, else cpu.

    Raises UserError if the device is not available on this machine.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, present in available.items() if present)
    if not available.get(name.split(":")[0], False):
        usable = ", ".join(kind for kind, present in available.items() if present)
        raise UserError(f"--device {name}: not available on this machine; use auto or one of: {usable}")
    return name


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread within: a small batch is rounded differently by other numbers of threads.

    Of torch's numbers of threads only that of the calling thread changes, and that of threads that start within.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

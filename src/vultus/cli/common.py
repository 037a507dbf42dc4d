"""What several commands need: the generator that the user names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vultus.sampling.generator import Generator


def open_snapshot(name: str, device: str) -> Generator:
    """The generator of a file, folder or hub name, or `default`: the embedded one."""
    from vultus.sampling.generator import load

    return load(name, device=device)

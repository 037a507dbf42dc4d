"""The options of a preparation, which determine the content of the data set."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vultus.errors import UserError
from vultus.models.facenet import DTYPES

# Options that older versions did not record; their default is None.
SINCE = ("image_column", "id_column", "encoder", "embeddings", "facenet")


@dataclass(frozen=True)
class Options:
    """The options that determine the content of a prepared data set; see `prepare`.

    `encoder` is None for FaceNet, and for one that the caller gives; `facenet` is None where it says nothing new.
    """

    source: str
    resolution: int
    split: str | None
    test_fraction: float
    align: bool
    licence: str | None
    limit: int | None
    batch: int
    device: str
    dtype: str
    shard_items: int
    image_column: str | None = None
    id_column: str | None = None
    encoder: str | None = None
    embeddings: str | None = None
    facenet: bool | None = None

    def __post_init__(self) -> None:
        """Raise UserError that names the first option out of range."""
        if not 16 <= self.resolution <= 1024:
            raise UserError(f"--resolution {self.resolution}: from 16 to 1024 pixels")
        if not 0 <= self.test_fraction < 1:
            raise UserError(f"--test_fraction {self.test_fraction}: from 0 to below 1")
        for name in ("limit", "batch", "shard_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{'--limit' if name == 'limit' else name} {value}: at least 1")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"--dtype {self.dtype!r}: one of auto, {', '.join(DTYPES)}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {self.device!r}: not usable here ({str(error).splitlines()[0]})") from None

    def check_same(self, out: Path, begun: dict[str, Any]) -> None:
        """Raise UserError that names the first option that differs from `begun`, the options of an earlier run."""
        for name, value in vars(self).items():
            known = name in begun or name in SINCE
            paths = name in ("source", "encoder", "embeddings") and None not in (begun.get(name), value)
            if known and (begun.get(name) == value or (paths and _same_place(begun[name], value))):
                continue
            option = "source" if name == "source" else f"--{name.replace('_column', '-column')}"
            raise UserError(
                f"{out}: was begun with {option} {json.dumps(begun.get(name))}, now it is {json.dumps(value)}; "
                "give the same options or choose another --out"
            )


def _same_place(a: str, b: str) -> bool:
    """Whether two spellings lead to the same file or folder."""
    with contextlib.suppress(OSError):
        return Path(a).samefile(b)
    return False

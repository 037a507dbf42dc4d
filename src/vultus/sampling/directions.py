"""Directions in the space of face embeddings along which one attribute changes: `--edit smile=+1.5`.

`vultus probe` fits them (audit/probes.py) and writes them as directions.safetensors: tensors `direction.NAME` [c_dim],
the metadata entries `format`, the version, and `vultus`, JSON with

| key | value |
|---|---|
| `encoder` | of the embeddings, as snapshots record it |
| `data_sha256`, `snapshot` | what the directions were fitted to, and whose faces were measured |
| `attributes` | {name: {`meaning`, `explained`, `edits`: {strength: what was measured}}}, as `vultus probe` gives it |

An edit of strength s moves an embedding so far that the linear probe of the attribute reads s standard deviations more,
as they are between photos of the training split: c' = (c + s d) / |c + s d|.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._files import atomic_path
from vultus._formats import VERSIONS, upgrade
from vultus.errors import UserError
from vultus.models.encoders import difference
from vultus.models.integrity import parse_json
from vultus.models.snapshot import Snapshot, asset, read_safetensors
from vultus.sampling.conditioning import ConditionSource

MOST = 4.0  # standard deviations of an edit, in either direction
PREFIX = "direction."


@dataclass(frozen=True)
class Directions:
    """Directions of attributes.

    Attributes:
        vectors: name -> float32 [c_dim].
        metadata: see above.
        path: the file that they were read from.
    """

    vectors: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path | None = None

    def edit(self, c: Tensor, edits: Mapping[str, float]) -> Tensor:
        """Embeddings c [N, c_dim] moved by `edits`, {name: strength from -4 to 4}, and normalised.

        Raises UserError for an unknown name or a strength out of range, and where the moved embedding is zero.
        """
        self.check(edits)
        step = torch.zeros(c.shape[-1])
        for name, strength in edits.items():
            step += float(strength) * self.vectors[name]
        if not edits or not step.any():
            return c
        moved = c.float().cpu() + step
        if (moved.norm(dim=-1) < 1e-6).any():
            raise UserError("the edits move an embedding to zero, which is no direction; give smaller strengths")
        return F.normalize(moved, dim=-1)

    def check(self, edits: Mapping[str, float]) -> None:
        """Raise UserError for an unknown name or a strength that is not a number from -4 to 4."""
        for name, strength in edits.items():
            if name not in self.vectors:
                raise UserError(f"edit {name[:40]}: no such attribute; known are {', '.join(self.vectors)}")
            if not math.isfinite(strength) or abs(strength) > MOST:
                raise UserError(f"edit {name}={strength:g}: the strength is a number from {-MOST:g} to {MOST:g}")

    def cost(self, name: str, strength: float) -> str:
        """What the nearest measured edit of this attribute did, in words; "" if none was measured."""
        measured: Mapping[str, Any] = self.metadata["attributes"].get(name, {}).get("edits", {})
        known = [text for text in measured if float(text) * strength > 0]
        if not known:
            return ""
        nearest = min(known, key=lambda text: abs(float(text) - strength))
        return f"{name} {nearest}: {describe(measured[nearest])}"


def describe(edit: Mapping[str, Any]) -> str:
    """A measured edit in words: what it changes in the faces, and how much of the identity it costs."""
    parts = []
    if edit.get("change"):
        parts.append(f"changes the attribute by {edit['change']['value']:+.2f} standard deviations")
    for judge, rates in edit.get("accepted", {}).items():
        before, after = (100 * rates[key]["value"] for key in ("before", "after"))
        parts.append(f"{judge} accepts {after:.0f} instead of {before:.0f} % of the faces")
    return "; ".join(parts)


def parse_edits(texts: Sequence[str], option: str = "--edit") -> dict[str, float]:
    """["smile=+1.5", ...] -> {"smile": 1.5, ...}. Raises UserError for other forms, and for a name given twice."""
    edits: dict[str, float] = {}
    for text in texts:
        match = re.fullmatch(r"([a-z_]+)=([+-]?(?:\d+\.?\d*|\.\d+))", text)
        if match is None:
            raise UserError(f"{option} {text[:60]}: give NAME=STRENGTH, for instance smile=+1.5")
        if match[1] in edits:
            raise UserError(f"{option}: {match[1]} is given twice; give one strength")
        edits[match[1]] = float(match[2])
    return edits


def save_directions(path: Path, directions: Directions) -> None:
    """Write a file of directions."""
    tensors = {f"{PREFIX}{name}": vector.float().contiguous() for name, vector in directions.vectors.items()}
    values = {
        "format": str(VERSIONS["directions"]),
        "vultus": json.dumps(directions.metadata, ensure_ascii=False, sort_keys=True),
    }
    data = safetensors.torch.save(tensors, metadata=values)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_directions(path: str | Path | None, snapshot: Snapshot) -> Directions:
    """The directions in a file, or None for those of the package; for the embeddings of `snapshot`.

    Raises UserError that names the file if it is missing, damaged, of a newer version, or of another encoder than the
    snapshot's.
    """
    given = Path(path) if path is not None else asset("directions.safetensors")
    directions = read_directions(given)
    wanted = snapshot.metadata.get("encoder") or {}
    differs = difference(wanted, directions.metadata["encoder"])
    dims = {len(vector) for vector in directions.vectors.values()}
    if not differs and dims != {snapshot.network.c_dim}:
        differs = f"{snapshot.network.c_dim} numbers"
    if differs:
        where = f"{given}" if path is not None else "the directions of the package"
        raise UserError(
            f"{snapshot.path or 'the snapshot'}: takes embeddings of {differs}, {where} are for others; fit "
            f"directions with vultus probe, and give them with --directions FILE"
        )
    return directions


def read_directions(path: Path) -> Directions:
    """The directions in a file. Raises UserError that names it if it is missing, damaged or of a newer version."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; vultus probe writes directions.safetensors")
    values, tensors = read_safetensors(path, remedy="copy it again")
    if not {"format", "vultus"} <= values.keys() or not all(key.startswith(PREFIX) for key in tensors):
        raise UserError(f"{path}: not a file of directions; give one that vultus probe wrote")
    metadata = upgrade("directions", values["format"], parse_json(values["vultus"], path), path)
    vectors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    good = bool(vectors) and all(each.ndim == 1 and bool(each.isfinite().all()) for each in vectors.values())
    parts = [metadata.get(key) for key in ("encoder", "attributes")] if isinstance(metadata, Mapping) else [None]
    if not good or not all(isinstance(part, Mapping) for part in parts):
        raise UserError(f"{path}: damaged; copy it again, or fit the directions again with vultus probe")
    return Directions(vectors, dict(metadata), path)


def edited(source: ConditionSource, directions: Directions, edits: Mapping[str, float]) -> ConditionSource:
    """`source` with every embedding moved by `edits`, which faces.jsonl lists as `edit`.

    Raises UserError as Directions.check does, before anything is read.
    """
    directions.check(edits)
    chunks = ((names, directions.edit(c, edits)) for names, c in source.chunks)

    def origin(number: int) -> dict[str, Any]:
        return source.origin(number) | {"edit": dict(edits)}

    return replace(source, chunks=chunks, origin=origin)

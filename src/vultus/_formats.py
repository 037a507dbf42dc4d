"""The version of every file format that vultus writes, and the upgrades from older versions.

A reader calls `upgrade(kind, version, value, where)`: it gets the value as the current version has it, or a UserError
that names the file. A module that owns a format registers an upgrade for each older version with `@upgrades(kind,
version)`. A golden file of each released version is in tests/golden/ and is read by tests/test_formats.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vultus.errors import UserError

VERSIONS = {
    "prepared data set": 1,  # manifest.json, key `schema`
    "run config": 2,  # config.json of a run folder, key `format`; 1 had none
    "checkpoint": 2,  # checkpoint-*.pt, key `format`; 1 had none
    "snapshot": 1,  # snapshot.safetensors, metadata key `format`
    "model folder": 1,  # config.json of a published folder, key `vultus.format`
    "onnx": 1,  # an exported generator, metadata key `vultus`, `format` in it
    "samples": 2,  # samples/*.png of a run folder, with samples/*.npz beside them from 2 on
    "evaluation": 2,  # results.json, key `format` of each result
    "feature cache": 2,  # counted up when what is computed from the same images and networks changes
}

Upgrade = Callable[[Any], Any]
_UPGRADES: dict[tuple[str, int], Upgrade] = {}


def upgrades(kind: str, version: int) -> Callable[[Upgrade], Upgrade]:
    """Register a function that turns a value of `version` into one of `version` + 1."""

    def register(function: Upgrade) -> Upgrade:
        _UPGRADES[kind, version] = function
        return function

    return register


def upgrade(kind: str, version: Any, value: Any, where: object) -> Any:
    """`value` of format `kind` as its current version has it.

    `version` is what the file says; `where` names the file in messages. Raises UserError for a version that this
    program does not know, newer ones above all.
    """
    current = VERSIONS[kind]
    try:
        found = int(version)
    except (TypeError, ValueError):
        found = 0
    if found > current:
        raise UserError(
            f"{where}: {kind} of version {found}, this vultus reads up to {current}; install a newer vultus"
        )
    while found < current:
        if (kind, found) not in _UPGRADES:
            raise UserError(f"{where}: {kind} of version {version!r}, which this vultus cannot read; write it again")
        value = _UPGRADES[kind, found](value)
        found += 1
    return value

"""The version of every file format that vultus writes, and the upgrades from older versions.

A reader calls `upgrade(kind, version, value, where)` and gets the value in the form of the current version, or a
UserError that names the file. The module that owns a format registers an upgrade from each older version with
`@upgrades(kind, version)`. tests/golden/ holds a file of each released version, which tests/test_formats.py reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vultus.errors import UserError

VERSIONS = {
    "prepared data set": 1,  # manifest.json, key `schema`
    "shard check": 1,  # shards/*.json of the user's cache folder, key `format`; of another version it is not used
    "stream record": 1,  # stream.json of a run folder, key `format`
    "stream cache": 1,  # increased when the values that the same photos have in the cache of a stream change
    "run config": 2,  # config.json of a run folder, key `format`; 1 had none
    "checkpoint": 2,  # checkpoint-*.pt, key `format`; 1 had none
    "snapshot": 1,  # snapshot.safetensors, metadata key `format`
    "model folder": 1,  # config.json of a published folder, key `vultus.format`
    "onnx": 1,  # an exported generator, metadata key `vultus`, `format` in it
    "samples": 2,  # samples/*.png of a run folder, with samples/*.npz beside them from 2 on
    "evaluation": 2,  # results.json, key `format` of each result
    "face list": 1,  # faces.jsonl of a folder of generated faces, key `format` of each line
    "embeddings": 1,  # .npz, .parquet and .json files of `vultus embed`, `format` in `vultus`
    "directions": 1,  # directions.safetensors of `vultus probe`, metadata key `format`
    "probes": 1,  # probe.json, key `format`
    "audit": 1,  # audit.json, key `format`
    "synthetic data set": 1,  # synthesis.json, key `format`
    "feature cache": 2,  # increased when the features of the same images and networks change
}

Upgrade = Callable[[Any], Any]
_UPGRADES: dict[tuple[str, int], Upgrade] = {}


def upgrades(kind: str, version: int) -> Callable[[Upgrade], Upgrade]:
    """Decorator: register a function that turns a value of `version` into one of `version + 1`."""

    def register(function: Upgrade) -> Upgrade:
        _UPGRADES[kind, version] = function
        return function

    return register


def upgrade(kind: str, version: Any, value: Any, where: object) -> Any:
    """`value` of the format `kind` in the form of its current version.

    `version` is what the file states, a number or its digits; `where` names the file in error messages. Raises
    UserError for a newer version, for no version and for one from which there is no upgrade.
    """
    current = VERSIONS[kind]
    try:
        known = int(version)
    except (TypeError, ValueError, OverflowError):
        known = 0  # not a version of any release
    if known > current:
        raise UserError(
            f"{where}: {kind} of version {known}, this vultus reads up to version {current}; install a newer vultus"
        )
    while known < current:
        if (kind, known) not in _UPGRADES:
            raise UserError(f"{where}: {kind} of version {version!r}, which this vultus cannot read; create it again")
        value = _UPGRADES[kind, known](value)
        known += 1
    return value

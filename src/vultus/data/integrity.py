"""Are the shards of a prepared data set the bytes that its manifest records?

The sha256 of each shard is computed once per process. For a data set from RECORDED_FROM bytes on, the results are kept
in the user's cache folder, so that a later process has nothing to read. A result holds as long as number, size, and
times of modification and of change of the file stay the same. The last of them is set by the system, so it also tells
of a file that was changed and given its former time of modification.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vultus._download import cache_folder
from vultus._files import json_value, processors, sha256_file, write_json
from vultus._formats import VERSIONS
from vultus._progress import progress
from vultus.errors import UserError

RECORDED_FROM = 1 << 28  # bytes; less is read in a third of a second (0.7 GB/s on a core that has SHA instructions)

_State = tuple[int, int, int, int]  # of a file: number, size, mtime and ctime in ns
_hashes: dict[tuple[str, _State], str] = {}  # by absolute path


def checked_sha256(temporary: Path, path: Path, expected: str | None, *, changed: str, remedy: str) -> str:
    """The sha256 of `temporary`, which is about to become the shard `path`.

    Raises UserError if that is not `expected`, the one of a shard that is made again (None: it is new); `changed` is
    what may be the reason.
    """
    sha256 = sha256_file(temporary)
    if expected not in (None, sha256):
        raise UserError(f"{path}: made again, but not with the same bytes: {changed} have changed; {remedy}")
    return sha256


def check_shards(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise UserError, which names the first one and the remedy, if shards are missing, truncated or changed."""
    lost = lost_shards(folder, manifest["shards"])
    if lost:
        name, reason = next(iter(lost.items()))
        more = f", and {len(lost) - 1} more shards" if len(lost) > 1 else ""
        # Only a data set that `vultus prepare` wrote says with which options.
        remedy = (
            "run the same `vultus prepare` again, which makes only what is lost"
            if "options" in manifest
            else "delete the folder and create the data set again"
        )
        raise UserError(f"{folder / name}: {reason}{more}; {remedy}")


def lost_shards(folder: Path, shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{file: reason} of the `shards` of a manifest (file, sha256) that are not as recorded, in their order."""
    lost: dict[str, str] = {}
    states: dict[str, _State] = {}
    for shard in shards:
        try:
            status = (folder / shard["file"]).stat()
            states[shard["file"]] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError as error:
            lost[shard["file"]] = "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    hashes = _hashes_of(folder, states)
    for shard in shards:
        name = shard["file"]
        if name in states and hashes[name] != shard["sha256"]:
            lost[name] = hashes[name] if hashes[name].startswith("can't") else "damaged: not the bytes of manifest.json"
    return {shard["file"]: lost[shard["file"]] for shard in shards if shard["file"] in lost}


def _hashes_of(folder: Path, states: Mapping[str, _State]) -> dict[str, str]:
    """The sha256 of each file, or "can't be read (...)"."""
    place = str(folder.absolute())
    keys = {name: (f"{place}/{name}", state) for name, state in states.items()}
    large = sum(state[1] for state in states.values()) >= RECORDED_FROM
    if large and not all(key in _hashes for key in keys.values()):
        _hashes.update(_recorded(place))
    unknown = [name for name, key in keys.items() if key not in _hashes]
    found = {name: _hashes[key] for name, key in keys.items() if key in _hashes}
    if unknown:
        size = sum(states[name][1] for name in unknown)
        # A line or bar only where one has to wait.
        shown = progress(size >> 20, title="checking the shards", unit="MiB") if size >= RECORDED_FROM else None
        with ThreadPoolExecutor(processors()) as pool, shown or contextlib.nullcontext():
            for name, value in zip(unknown, pool.map(lambda name: _hash(folder / name), unknown), strict=True):
                found[name] = value
                if not value.startswith("can't"):
                    _hashes[keys[name]] = value
                if shown:
                    shown.update(states[name][1] >> 20)
        if large:
            _record(place, {keys[name]: found[name] for name in keys if keys[name] in _hashes})
    return found


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        return f"can't be read ({error.strerror})"


def _record_file(place: str) -> Path:
    return cache_folder() / "shards" / f"{hashlib.sha256(place.encode('utf-8', 'backslashreplace')).hexdigest()}.json"


def _recorded(place: str) -> dict[tuple[str, _State], str]:
    """The results of earlier processes for the folder `place`; empty if there are none or they cannot be read."""
    try:
        record = json_value(_record_file(place).read_text(encoding="utf-8"))
        if record["format"] != VERSIONS["shard check"]:
            return {}
        return {(f"{place}/{name}", _state(state)): str(value) for name, state, value in record["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _state(values: Sequence[int]) -> _State:
    number, size, modified, changed = (int(value) for value in values)
    return number, size, modified, changed


def _record(place: str, hashes: Mapping[tuple[str, _State], str]) -> None:
    """Keep the results for later processes, if the cache folder can be written."""
    shards = [[path[len(place) + 1 :], list(state), value] for (path, state), value in hashes.items()]
    with contextlib.suppress(OSError):
        _record_file(place).parent.mkdir(parents=True, exist_ok=True)
        write_json(_record_file(place), {"format": VERSIONS["shard check"], "folder": place, "shards": shards})

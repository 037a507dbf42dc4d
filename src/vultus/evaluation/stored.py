"""Where evaluations are stored, and which of them belongs to a snapshot. It loads no torch.

RUN/evaluations/<HASH>-<SPLIT>...   the folder of one evaluation (see artifacts.py). HASH is the beginning of the sha256
                                    of the snapshot's file, and settings other than the defaults follow the split
RUN/evaluation                      what `vultus evaluate --out RUN/evaluation` wrote; the default of earlier versions

An evaluation is found by the hash that its results record, so a run folder may be renamed, moved, copied, or named by
any path. Results of earlier versions record no hash: they are found by the path of the snapshot and its images seen.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vultus._download import HUB
from vultus._files import sha256_file
from vultus.errors import UserError
from vultus.evaluation.results import FILE, read_results

SNAPSHOT = "snapshot.safetensors"
DEFAULT = "default"  # the name of the embedded snapshot, which belongs to no run
FOLDER = "evaluations"
EARLIER_FOLDER = "evaluation"
ASIDE = "earlier"  # OUT/earlier-1, ...: evaluations that were in OUT before
DIGITS = 12  # of a hash in the name of a folder
USUAL = {"noises": 2, "noise_strength": 1.0, "best_of": 1, "seed": 0}  # not part of the name of a folder


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_file(path)


def snapshot_sha256(path: str | Path) -> str:
    """The sha256 of a snapshot's file; read once in a process while size and time of change stay the same."""
    path = Path(path).resolve()
    state = path.stat()
    return _sha256(path, state.st_mtime_ns, state.st_size)


def run_folder(snapshot: str | Path) -> Path | None:
    """The run folder that holds this file of a snapshot, given as it is or through a symlink; None without one."""
    snapshot = Path(snapshot)
    for folder in dict.fromkeys((snapshot.parent, snapshot.resolve().parent)):
        published = (folder / "model.safetensors").is_file()
        if (folder / SNAPSHOT).is_file() or ((folder / "config.json").is_file() and not published):
            return folder
    return None


# --- storing ----------------------------------------------------------------------------------------------------------


def identity_of(context: Mapping[str, Any]) -> str | None:
    """Faces, photos and settings of a result as one text: the same for an evaluation that is repeated.

    None for results of earlier versions, which do not record the faces.
    """
    if not context.get("faces"):
        return None
    values = [context.get(key) for key in ("faces", "data_sha256", "split", "n_images", "noises", "seed", "networks")]
    return json.dumps(values, sort_keys=True)


def place_for(run: Path, split: str, contexts: Iterable[Mapping[str, Any]]) -> Path:
    """The folder in the run folder `run` for an evaluation of these planned results, of one snapshot.

    It holds nothing yet, or the same evaluation. `split` is test, train or both.
    """
    planned = list(contexts)
    first = planned[0]
    parts = [str(first["snapshot_sha256"])[:DIGITS], split]
    if first["n_images"] < first["n_split"]:
        parts += ["limit", str(first["n_images"])]
    for key, usual in USUAL.items():
        if first[key] != usual:
            parts += [key, f"{first[key]:g}"]
    if first.get("trained_on_this_data") is False:
        parts += ["data", str(first["data_sha256"])[:8]]
    name = "-".join(parts)
    identities = {identity_of(context) for context in planned}
    number = 1
    while True:
        folder = run / FOLDER / (name if number == 1 else f"{name}-{number}")
        if not (folder / FILE).exists() or _identities(folder) <= identities:
            return folder
        number += 1


def set_aside(out: Path, contexts: Iterable[Mapping[str, Any]]) -> Path | None:
    """Move an earlier evaluation in the folder `out` into OUT/earlier-<number>, unless it is one of these results.

    Returns where it was moved, or None if nothing was in the way.
    """
    identities = {identity_of(context) for context in contexts}
    names = ["table.md", FILE, "identity.png", "nearest.png"]
    there = [out / name for name in names if (out / name).exists()]
    there += [path for kind in ("faces", "extremes", "nearest") for path in out.glob(f"*-{kind}.jpg")]
    if not there or ((out / FILE).exists() and _identities(out) <= identities):
        return None
    number = 1
    while (out / f"{ASIDE}-{number}").exists():
        number += 1
    target = out / f"{ASIDE}-{number}"
    target.mkdir()
    for path in there:
        path.rename(target / path.name)
    return target


def _identities(folder: Path) -> set[str | None]:
    try:
        results = read_results(folder)
    except UserError:  # of something else, or of a newer version
        return {None, ""}
    return {identity_of(result["context"]) or "" for result in results.values()}


# --- finding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredEvaluation:
    """The results of one snapshot in a folder.

    Attributes:
        folder: that `vultus evaluate` wrote.
        columns: names in its results.json, that of unseen people first.
        results: {column: result}.
        current: whether they belong to the snapshot; False for another snapshot of the same run.
    """

    folder: Path
    columns: tuple[str, ...]
    results: dict[str, dict[str, Any]]
    current: bool

    @property
    def result(self) -> dict[str, Any]:
        """The result on unseen people, if there is one."""
        return self.results[self.columns[0]]


def find_evaluations(run: Path, sha256: str | None, cur_nimg: int | None) -> list[StoredEvaluation]:
    """The evaluations of the snapshots of a run folder, the one to show first.

    Those of the snapshot with this hash (or, for results without a hash, of this number of images) come before those of
    its other snapshots; then those on unseen people, on the data that it was trained with, on more photos, with the
    usual settings, and the latest. Raises UserError for a damaged results.json.
    """
    found = []
    for path in _result_files(run):
        stored = own_columns(path.parent, read_results(path), run, sha256, cur_nimg, own=True)
        if stored is not None:
            found.append((_rank(stored, path), stored))
    return [stored for _, stored in sorted(found, key=lambda pair: pair[0], reverse=True)]


def own_columns(
    folder: Path,
    results: Mapping[str, dict[str, Any]],
    snapshot: Path,
    sha256: str | None,
    cur_nimg: int | None,
    *,
    own: bool = False,
) -> StoredEvaluation | None:
    """Which columns of these results belong to a snapshot, given by its path or its run folder; None if none do.

    Columns with its hash, else those named by its path. `own`: the results are in its run folder, so that results of
    one snapshot only belong to this run, whatever they are called.
    """
    shas = {column: result["context"].get("snapshot_sha256") for column, result in results.items()}
    matching = [column for column, stored in shas.items() if sha256 is not None and stored == sha256]
    if not matching:
        bases = {base_name(column) for column in results}
        [*only] = bases if own and len(bases) == 1 else []
        base = only[0] if only and only[0] != DEFAULT and not only[0].startswith(HUB) else _named(bases, snapshot)
        matching = [column for column in results if base_name(column) == base]
    if not matching:
        return None
    columns = tuple(sorted(matching, key=lambda column: results[column]["context"].get("split") == "train"))
    one = results[columns[0]]["context"]
    recorded = one.get("snapshot_sha256")
    if recorded is not None and sha256 is not None:
        current = recorded == sha256
    else:
        current = None in (one.get("cur_nimg"), cur_nimg) or one["cur_nimg"] == cur_nimg
    return StoredEvaluation(folder, columns, {column: results[column] for column in columns}, current)


def base_name(column: str) -> str:
    """The snapshot of a column: "runs/mine" of "runs/mine (test)"."""
    return re.sub(r" \((?:test|train)\)$", "", column)


def _named(bases: Iterable[str], snapshot: Path) -> str | None:
    """The base that is a path of this snapshot: the same file or folder, or the only one of the folder's name."""
    folder = snapshot.parent if snapshot.name == SNAPSHOT else snapshot
    paths = {base: Path(base.removesuffix(f"/{SNAPSHOT}")) for base in bases}
    same = [base for base, path in paths.items() if path.resolve() == folder.resolve()]
    same = same or [base for base, path in paths.items() if path.resolve().name == folder.resolve().name]
    return same[0] if len(same) == 1 else None


def _result_files(run: Path) -> list[Path]:
    patterns = (f"{FOLDER}/*/{FILE}", f"{EARLIER_FOLDER}/{FILE}", f"{EARLIER_FOLDER}/{ASIDE}-*/{FILE}")
    return [path for pattern in patterns for path in sorted(run.glob(pattern)) if path.is_file()]


def _rank(stored: StoredEvaluation, path: Path) -> tuple[Any, ...]:
    context = stored.result["context"]
    usual = all(context.get(key, value) == value for key, value in USUAL.items())
    return (
        stored.current,
        context.get("cur_nimg") or 0,
        context.get("split") == "test",
        context.get("trained_on_this_data") is not False,
        context.get("n_images") or 0,
        usual,
        path.stat().st_mtime_ns,
    )

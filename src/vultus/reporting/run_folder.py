"""The one reader of run folders, and of the evaluations that belong to them. It writes nothing and loads no torch.

A report, a comparison or a page asks here, so that training needs no hooks for them. What is optional may be missing or
damaged: it is left out, and `remarks` says so in a line each.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from vultus._files import read_json
from vultus.errors import UserError

EVALUATION = "evaluation"  # sub-folder of a run folder for `vultus evaluate --out`


@dataclass(frozen=True)
class Run:
    """A run folder as it is now.

    Attributes:
        name: of the folder; made longer where two runs of one report share it.
        config, data: the two halves of config.json.
        steps: the trainer's own lines of stats.jsonl, in order.
        measured: {evaluator: its lines}.
        sheets: (images seen, path) of the sample sheets.
        snapshot: metadata of snapshot.safetensors, or empty.
        parameters: numbers in the snapshot's generator, or 0.
        sessions: of run.json, or empty.
        trackers: of tracking.json, or empty.
        running: a training holds the folder.
        diverged: what diverged.json says, or empty.
        remarks: what was missing or damaged, a line each.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sheets: list[tuple[int, Path]] = field(default_factory=list)
    snapshot: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    sessions: list[dict[str, Any]] = field(default_factory=list)
    trackers: dict[str, Any] = field(default_factory=dict)
    running: bool = False
    diverged: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def cur_nimg(self) -> int:
        """Images seen, as far as the folder tells."""
        lines = [*self.steps, *(line for lines in self.measured.values() for line in lines)]
        told = [line["cur_nimg"] for line in lines] + [nimg for nimg, _ in self.sheets]
        return max([*told, int(self.snapshot.get("cur_nimg", 0))])

    @property
    def hours(self) -> float:
        """Hours of training, all sessions together."""
        logged = max((line["seconds"] for line in self.steps if number(line.get("seconds"))), default=0.0)
        kept = self.snapshot.get("hours")
        sat = sum(session["seconds"] for session in self.sessions if number(session.get("seconds")))
        return max(logged / 3600, sat / 3600, kept if number(kept) else 0.0)

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return int(self.config["generator"]["resolution"])

    def series(self, key: str, evaluator: str | None = None) -> list[tuple[int, float]]:
        """(images seen, value) of one figure, finite values only."""
        lines = self.steps if evaluator is None else self.measured.get(evaluator, [])
        return [(line["cur_nimg"], float(line[key])) for line in lines if number(line.get(key))]


def number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several run folders, with names that differ. Raises UserError for one that is none, or is given twice."""
    places = [Path(folder).resolve() for folder in folders]
    for row, place in enumerate(places):
        if place in places[:row]:
            raise UserError(f"{folders[row]}: given twice; name every run once")
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [f"{place.parent.name}/{place.name}" for place in places]
    if len(set(names)) < len(names):
        names = [str(place) for place in places]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read a run folder. Raises UserError if it is none."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder}: no such run folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run folder (no config.json); give the --out of vultus train")
    record = read_json(folder / "config.json")
    try:
        config, data = record["config"], record["data"]
        int(config["generator"]["resolution"])
        dict(data)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder}/config.json: not the config of a run; give the --out of vultus train") from None
    remarks: list[str] = []
    steps, measured = _stats(folder / "stats.jsonl", remarks)
    snapshot, parameters = _snapshot(folder / "snapshot.safetensors", remarks)
    sheets = [(int(path.stem), path) for path in sorted((folder / "samples").glob("*.png")) if path.stem.isdigit()]
    if not sheets:
        remarks.append("no sample sheets (samples/*.png)")
    sessions = _optional(folder / "run.json", remarks).get("sessions", [])
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        config=config,
        data=data,
        steps=steps,
        measured=measured,
        sheets=sheets,
        snapshot=snapshot,
        parameters=parameters,
        sessions=[session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else [],
        trackers=_optional(folder / "tracking.json", remarks),
        running=_held(folder / ".lock"),
        diverged=_optional(folder / "diverged.json", remarks),
        remarks=remarks,
    )


def _stats(path: Path, remarks: list[str]) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    steps: list[dict[str, Any]] = []
    measured: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        remarks.append("no stats.jsonl, so no curves")
        return steps, measured
    damaged = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            sound = isinstance(line["cur_nimg"], int)
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            damaged += 1
        elif isinstance(line.get("evaluator"), str):
            measured.setdefault(line["evaluator"], []).append(line)
        else:
            steps.append(line)
    if damaged:
        remarks.append(f"stats.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return steps, measured


def _snapshot(path: Path, remarks: list[str]) -> tuple[dict[str, Any], int]:
    if not path.is_file():
        remarks.append("no snapshot.safetensors yet")
        return {}, 0
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {})["vultus"])
            names = [name for name in file.keys() if name.startswith("generator.")]  # noqa: SIM118
            return dict(metadata), sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except Exception as error:  # safetensors has no public class for all of its errors
        remarks.append(f"snapshot.safetensors cannot be read ({' '.join(str(error).split())[:80]})")
        return {}, 0


def _optional(path: Path, remarks: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except UserError:
        found = None
    if isinstance(found, dict):
        return found
    remarks.append(f"{path.name} cannot be read and is left out")
    return {}


def _held(lock: Path) -> bool:
    """Whether a process is at work in the folder (files.folder_lock)."""
    try:
        with open(lock, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# --- evaluations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Results of `vultus evaluate --out`, put together.

    Attributes:
        columns: {name: result as evaluate() returns it}; a run's own column bears the run's name.
        sources: {name: (folder, what the evaluation called the column)}.
        of_run: {run's name: its column}, the one of unseen people where there are two.
    """

    columns: dict[str, dict[str, Any]]
    sources: dict[str, tuple[Path, str]]
    of_run: dict[str, str]


def read_evaluations(runs: Sequence[Run], given: Iterable[str | Path] = ()) -> Evaluation:
    """The results in `given`, or else in the `evaluation` folder of every run.

    Raises UserError for a given folder without results, or a results.json that is not one.
    """
    columns: dict[str, dict[str, Any]] = {}
    sources: dict[str, tuple[Path, str]] = {}
    of_run: dict[str, str] = {}
    places: list[tuple[Path, Run | None]] = [(Path(folder), None) for folder in given]
    for folder, _ in places:
        if not (folder / "results.json").is_file():
            raise UserError(f"{folder}: no results.json here; give a folder that vultus evaluate --out wrote")
    places = places or [(run.folder / EVALUATION, run) for run in runs]
    for folder, owner in places:
        if not (folder / "results.json").is_file():
            continue
        found = read_json(folder / "results.json")
        if not isinstance(found, dict) or not all(_is_result(result) for result in found.values()):
            raise UserError(f"{folder}/results.json: not the results of vultus evaluate; run it again")
        bases = {_base(column)[0] for column in found}
        for column, result in found.items():
            base, part = _base(column)
            run = owner if owner is not None and len(bases) == 1 else _of_name(base, runs)
            name = run.name + part if run else column
            if name in columns:
                if columns[name] == result:
                    continue  # the same baseline beside several runs
                name = f"{name} [{folder}]"
            columns[name], sources[name] = result, (folder, column)
            if run and part != " (train)":
                of_run.setdefault(run.name, name)
    return Evaluation(columns, sources, of_run)


def _base(column: str) -> tuple[str, str]:
    """("runs/mine", " (test)") of "runs/mine (test)"."""
    found = re.fullmatch(r"(.*?)( \((?:test|train)\))?", column, re.DOTALL)
    assert found is not None
    return found[1], found[2] or ""


def _of_name(base: str, runs: Sequence[Run]) -> Run | None:
    """The run that an evaluation called by this path, as far as names tell."""
    path = Path(base.removesuffix("/snapshot.safetensors"))
    fitting = [run for run in runs if run.folder.resolve() == path.resolve()]
    fitting = fitting or [run for run in runs if run.folder.resolve().name == path.name]
    return fitting[0] if len(fitting) == 1 else None


def _is_result(result: Any) -> bool:
    if not isinstance(result, Mapping) or not isinstance(result.get("metrics"), Mapping):
        return False
    rows = result["metrics"].values()
    shaped = all(isinstance(result.get(key), Mapping) for key in ("context", "distributions", "missing"))
    shaped = shaped and all(isinstance(result.get(key), list) for key in ("alarms", "notes"))
    return shaped and all(isinstance(row, Mapping) and {"value", "low", "high"} <= row.keys() for row in rows)

"""Reader of run folders and of the evaluations that belong to them. It writes nothing and loads no torch.

Reports read a run from its folder alone, so training needs no hooks for them. Optional files may be missing or damaged:
they are left out, with a line in `remarks` for each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from vultus._files import is_locked, json_value, read_json
from vultus._run_config import read_run_config
from vultus.errors import UserError
from vultus.evaluation.headlines import with_training_data
from vultus.evaluation.results import FILE, read_results
from vultus.evaluation.stored import (
    EARLIER_FOLDER,
    SNAPSHOT,
    StoredEvaluation,
    base_name,
    find_evaluations,
    own_columns,
    snapshot_sha256,
)
from vultus.training.sample_files import Samples, read_samples


@dataclass(frozen=True)
class Run:
    """The state of a run folder.

    Attributes:
        name: of the folder; with parts of its path where two runs of one report have the same name.
        config, data: the two parts of config.json. Fields depend on the version that wrote them.
        steps: the trainer's own lines of stats.jsonl, in order.
        measured: {evaluator: its lines}.
        samples: the sample sheets, in order.
        snapshot: metadata of snapshot.safetensors, or empty.
        parameters: number of parameters of the snapshot's generator, or 0.
        sessions: of run.json, or empty.
        trackers: of tracking.json, or empty.
        running: a training process holds the folder.
        diverged: diverged.json, or empty.
        remarks: a line for each missing or damaged file.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    snapshot: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    sessions: list[dict[str, Any]] = field(default_factory=list)
    trackers: dict[str, Any] = field(default_factory=dict)
    running: bool = False
    diverged: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @functools.cached_property
    def sha256(self) -> str | None:
        """The sha256 of the snapshot's file; None without one."""
        return snapshot_sha256(self.folder / SNAPSHOT) if self.snapshot else None

    @property
    def cur_nimg(self) -> int:
        """Images seen, according to all files of the folder."""
        lines = [*self.steps, *(line for lines in self.measured.values() for line in lines)]
        counts = [line["cur_nimg"] for line in lines] + [samples.cur_nimg for samples in self.samples]
        return max([*counts, int(self.snapshot.get("cur_nimg", 0))])

    @property
    def hours(self) -> float:
        """Hours of training, all sessions together."""
        logged = max((line["seconds"] for line in self.steps if number(line.get("seconds"))), default=0.0)
        saved = self.snapshot.get("hours")
        total = sum(session["seconds"] for session in self.sessions if number(session.get("seconds")))
        return max(logged / 3600, total / 3600, saved if number(saved) else 0.0)

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return int(self.config["generator"]["resolution"])

    def series(self, key: str, evaluator: str | None = None) -> list[tuple[int, float]]:
        """(images seen, value) of one statistic, finite values only."""
        lines = self.steps if evaluator is None else self.measured.get(evaluator, [])
        return [(line["cur_nimg"], float(line[key])) for line in lines if number(line.get(key))]


def number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several run folders, with distinct names. Raises UserError for a folder that is no run or is given twice."""
    places = [Path(folder).resolve() for folder in folders]
    for row, place in enumerate(places):
        if place in places[:row]:
            raise UserError(f"{folders[row]}: given twice; name each run once")
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [f"{place.parent.name}/{place.name}" for place in places]
    if len(set(names)) < len(names):
        names = [str(place) for place in places]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read a run folder. Raises UserError if it is not one."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder}: no such run folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run folder (no config.json); give the --out of vultus train")
    remarks: list[str] = []
    config, data = _config(folder / "config.json", remarks)
    steps, measured = _stats(folder / "stats.jsonl", remarks)
    snapshot, parameters = _snapshot(folder / SNAPSHOT, remarks)
    samples, unreadable = read_samples(folder / "samples", int(config["generator"]["resolution"]))
    remarks += [text.removeprefix(f"{folder / 'samples'}/") for text in unreadable]  # a report names no machine's paths
    if not samples and not unreadable:
        remarks.append("no sample sheets (samples/*.png)")
    sessions = _optional(folder / "run.json", remarks).get("sessions", [])
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        config=config,
        data=data,
        steps=steps,
        measured=measured,
        samples=samples,
        snapshot=snapshot,
        parameters=parameters,
        sessions=[session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else [],
        trackers=_optional(folder / "tracking.json", remarks),
        running=is_locked(folder),
        diverged=_optional(folder / "diverged.json", remarks),
        remarks=remarks,
    )


def _config(path: Path, remarks: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two parts of config.json, as the current version has them where it can."""
    record = read_json(path)
    try:
        record = read_run_config(path)
    except UserError as error:  # of a setting that no longer exists: a report can show it all the same
        remarks.append(str(error).removeprefix(f"{path.parent}/"))
    try:
        config, data = dict(record["config"]), dict(record["data"])
        int(config["generator"]["resolution"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not the config of a run; give the --out of vultus train") from None
    return config, data


def _stats(path: Path, remarks: list[str]) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    steps: list[dict[str, Any]] = []
    measured: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        remarks.append("no stats.jsonl, so no curves")
        return steps, measured
    damaged = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json_value(text)
            valid = isinstance(line["cur_nimg"], int)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
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
            metadata = json_value((file.metadata() or {})["vultus"])
            names = [name for name in file.keys() if name.startswith("generator.")]  # noqa: SIM118
            return dict(metadata), sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except Exception as error:  # safetensors has no public class for all of its errors
        remarks.append(f"snapshot.safetensors cannot be read ({' '.join(str(error).split())[:80]})")
        return {}, 0


def _optional(path: Path, remarks: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except UserError:
        value = None
    if isinstance(value, dict):
        return value
    remarks.append(f"{path.name} cannot be read and is left out")
    return {}


# --- evaluations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Results of one or more evaluations.

    Attributes:
        columns: {name: result as evaluate() returns it}; a run's own column has the run's name.
        sources: {name: (folder, name of the column in that folder's results.json)}.
        of_run: {name of a run: its column}, the one of unseen people where there are two.
        older: names of runs whose columns were measured on another snapshot than the one in the folder now.
    """

    columns: dict[str, dict[str, Any]]
    sources: dict[str, tuple[Path, str]]
    of_run: dict[str, str]
    older: frozenset[str] = frozenset()


def read_evaluations(runs: Sequence[Run], given: Iterable[str | Path] = ()) -> Evaluation:
    """The results in the folders `given`; default: those of each run's snapshot in its folder (evaluation/stored.py).

    Where a run folder has several evaluations of its snapshot, the one on most photos of unseen people is read.

    Raises UserError for a given folder without results and for a damaged results.json.
    """
    places = [Path(folder) for folder in given]
    for folder in places:
        if not (folder / FILE).is_file():
            remedy = "give the --out of vultus evaluate, or a folder in RUN/evaluations"
            raise UserError(f"{folder}: no {FILE} in it; {remedy}")
    found: list[tuple[Path, dict[str, dict[str, Any]], list[tuple[Run, StoredEvaluation]]]] = []
    for folder in places:
        results = read_results(folder)
        own = [(run, stored) for run in runs if (stored := _columns_of(run, runs, folder, results)) is not None]
        found.append((folder, results, own))
    for run in runs if not places else ():
        first = find_evaluations(run.folder, run.sha256, run.snapshot.get("cur_nimg"))[:1]
        found += [(stored.folder, stored.results, [(run, stored)]) for stored in first]
        folder = run.folder / EARLIER_FOLDER  # there may be baselines beside the run's own columns
        if (folder / FILE).is_file():
            results = read_results(folder)
            mine = own_columns(folder, results, run.folder, run.sha256, None, own=True)
            others = {name: one for name, one in results.items() if mine is None or name not in mine.columns}
            found.append((folder, others, []))
    columns: dict[str, dict[str, Any]] = {}
    sources: dict[str, tuple[Path, str]] = {}
    of_run: dict[str, str] = {}
    older = set()
    for folder, results, own in found:
        owners = {column: (run, stored) for run, stored in own for column in stored.columns}
        for column, result in results.items():
            owner = owners.get(column)
            if owner:
                result = with_training_data(result, owner[0].data.get("content_sha256"))
            name = owner[0].name + column.removeprefix(base_name(column)) if owner else column
            if name in columns:
                if columns[name] == result:
                    continue  # the same baseline beside several runs
                name = f"{name} [{folder}]"
            columns[name], sources[name] = result, (folder, column)
            if owner and column == owner[1].columns[0]:
                of_run.setdefault(owner[0].name, name)
                if not owner[1].current:
                    older.add(owner[0].name)
    return Evaluation(columns, sources, of_run, frozenset(older))


def _columns_of(
    run: Run, runs: Sequence[Run], folder: Path, results: dict[str, dict[str, Any]]
) -> StoredEvaluation | None:
    """The columns of a run in a given folder; None where their name fits several runs and no hash decides."""
    stored = own_columns(folder, results, run.folder, run.sha256, run.snapshot.get("cur_nimg"))
    if stored is None or stored.result["context"].get("snapshot_sha256") == run.sha256 is not None:
        return stored
    path = Path(base_name(stored.columns[0]).removesuffix(f"/{SNAPSHOT}"))
    alike = [other for other in runs if other.folder.resolve().name == path.resolve().name]
    return stored if path.resolve() == run.folder.resolve() or len(alike) == 1 else None

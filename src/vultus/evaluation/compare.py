"""Evaluation of several snapshots, on unseen people, on training people, or on both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vultus._device import resolve_device
from vultus._files import make_folder
from vultus._progress import message
from vultus._ranges import Count, Limit, NoiseStrength, Seed, checks_arguments
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.artifacts import write_grids, write_results
from vultus.evaluation.backbones.loading import Backbones, load_backbones
from vultus.evaluation.evaluate import EvaluationSettings, check_settings, evaluate, gap, planned_context
from vultus.evaluation.matching import check_match, trained_on
from vultus.evaluation.stored import FOLDER, SNAPSHOT, place_for, run_folder, set_aside, snapshot_sha256
from vultus.evaluation.tables import Results, format_gap, format_table
from vultus.models.facenet import Encoder, load_facenet
from vultus.models.hub import MODEL
from vultus.models.snapshot import Snapshot
from vultus.sampling.generator import load

Split = Literal["test", "train", "both"]
Source = str | Path | Snapshot  # "default", a file, a folder, hf://user/name, or a snapshot that is loaded already


@checks_arguments
def evaluate_snapshots(
    snapshots: Source | Sequence[Source] | Mapping[str, Source],
    *,
    data: str | Path,
    split: Split = "test",
    out: str | Path | None = None,
    noises: Count = 2,
    noise_strength: NoiseStrength = 1.0,
    best_of: Count = 1,
    limit: Limit | None = None,
    judges: Sequence[str] = ("dlib",),
    fetch: bool = False,
    seed: Seed = 0,
    batch: Count = 32,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Evaluate one or several snapshots on a prepared data set: {name: result}, as `vultus evaluate --json` prints it.

    Args:
        snapshots: "default" (the embedded snapshot), a snapshot file, a run folder, hf://user/name, an exported model
            or a loaded Snapshot (which is moved to the device); or several of them, or {name: one}.
        data: folder of a data set that was prepared with FaceNet.
        split: "test" holds people that were never used in training. With "both" each snapshot has two results,
            "name (test)" and "name (train)".
        out: folder for results.json, table, plots and grids of faces. By default each snapshot in a run folder has a
            folder of its own in RUN/evaluations, and of others nothing is written. An evaluation that is in `out`
            already is moved to OUT/earlier-<number>, unless it is the same.
        noises: generated faces of each embedding.
        noise_strength: factor of the noise, 0 to 4; below 1 faces are more alike and nearer to the average.
        limit: use this many photos, evenly spread over the split; None uses all.
        judges: face recognition networks that no loss contains: "dlib", or FILE.onnx or FILE.onnx:raw.
        fetch: download the weights of FID and LPIPS (340 MB) if they are missing.
        best_of: measure the faces that `vultus generate --best-of` keeps: the best of so many times as many noises, by
            FaceNet, whose own rows are marked then.
        seed: of the noise and of the resampled people.
        batch: photos at a time; changes memory and speed, not results.
        device: "auto", "cuda", "mps" or "cpu".

    Returns: see `vultus.evaluation.evaluate.evaluate`; `format_comparison` formats it as a table.

    Raises UserError where a snapshot does not fit the data set, or something is missing or damaged.
    """
    if split not in get_args(Split):
        raise UserError(f"--split {split}: must be one of {', '.join(get_args(Split))}")
    device = resolve_device(device)
    PreparedDataset(data, None)  # a wrong folder is reported before FaceNet is downloaded
    sources = _named(snapshots)
    opened: dict[str, Snapshot] = {}
    files: dict[str, SnapshotFile] = {}
    for name, source in sources.items():
        if isinstance(source, Snapshot):
            opened[name], file = source, _file_of(source)
            source.network.to(device)
        else:
            opened[name], file = _open(source, device)
        if file is not None:
            files[name] = file
    _, results = compare(
        opened,
        data,
        encoder=load_facenet(device=device, dtype=torch.float32),  # the same on every machine and in every run
        judges=(judges,) if isinstance(judges, str) else tuple(judges),
        fetch=fetch,
        split=split,
        out=out,
        noises=noises,
        limit=limit,
        batch=batch,
        seed=seed,
        noise_strength=noise_strength,
        best_of=best_of,
        device=device,
        files=files,
    )
    return results


def compare(
    snapshots: Mapping[str, Snapshot],
    data: str | Path,
    *,
    encoder: Encoder,
    judges: tuple[str, ...] = ("dlib",),
    fetch: bool = False,
    split: Split = "test",
    out: str | Path | None = None,
    noises: int = 2,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
    noise_strength: float = 1.0,
    best_of: int = 1,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    backbones: Backbones | None = None,
    files: Mapping[str, SnapshotFile] | None = None,
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Evaluate every snapshot; return the table as Markdown and the results by column.

    With `both`, every snapshot has a column for unseen people and one for as many photos of training people, and a
    second table holds the gap. `out` is a folder for table, JSON, plots and grids; it is written after every snapshot,
    so that an interruption loses no finished result. `files` are the files that snapshots were read from: results
    record their hashes, and without `out` they are stored in the run folders of these files (see stored.py). For the
    rest see `evaluate` and `load_backbones`.
    """
    if out is not None:
        make_folder(out)
    test = None if split == "train" else PreparedDataset(data, "test")
    train = _or_none(data, "train") if split == "test" else PreparedDataset(data, "train")
    sides = {"test": (test, train), "train": (train, test or _or_none(data, "test"))}
    for snapshot in snapshots.values():
        check_match(snapshot, next(side for side in (test, train) if side is not None), encoder)
    backbones = backbones or load_backbones(encoder, judges=judges, device=device, fetch=fetch)
    settings = EvaluationSettings(
        noises, limit, batch, seed, device, noise_strength=noise_strength, candidates=best_of, cache=cache
    )
    check_settings(settings)
    # As many photos of training people as of unseen ones: some metrics depend on their number.
    most = limit if test is None else min(limit or len(test), len(test))
    parts: dict[str, list[_Part]] = {}
    for name, snapshot in snapshots.items():
        parts[name] = []
        for side in ("test", "train") if split == "both" else (split,):
            dataset, other = sides[side]
            assert dataset is not None
            counted = replace(settings, limit=most if side == "train" else limit)
            faces = counted.faces(snapshot, backbones.encoder)
            planned = planned_context(faces, dataset, backbones, counted, trained_on(snapshot, dataset))
            planned["snapshot_sha256"] = files[name].sha256 if files and name in files else None
            suffix = f" ({side})" if split == "both" else ""
            parts[name].append(_Part(name + suffix, name + suffix, dataset, other, counted, planned))
    if out is not None:
        places = dict.fromkeys(snapshots, Path(out))
        moved = set_aside(Path(out), [part.planned for own in parts.values() for part in own])
        if moved:
            message(f"vultus: note: {out}: an earlier evaluation in this folder was moved to {moved}")
    else:
        places = _places_in_runs(files or {}, split, parts)
    results: dict[str, dict[str, Any]] = {}
    for name, snapshot in snapshots.items():
        for part in parts[name]:
            result = evaluate(snapshot, part.dataset, backbones=backbones, other=part.other, settings=part.settings)
            result["context"]["snapshot_sha256"] = part.planned["snapshot_sha256"]
            results[part.column] = result
            for alarm in result["alarms"]:
                message(f"vultus: alarm: {part.column}: {alarm}")
        if name not in places:
            continue
        own = results if out is not None else {part.stored: results[part.column] for part in parts[name]}
        try:
            # The results come first: the same command, after an interruption, knows the folder by them.
            write_results(places[name], own, format_comparison(own))
            for part in parts[name]:
                faces = part.settings.faces(snapshot, backbones.encoder)
                known = part.planned["trained_on_this_data"]
                keywords: dict[str, Any] = {"backbones": backbones, "other": part.other, "settings": part.settings}
                write_grids(places[name], part.stored, faces, part.dataset, trained_on_this_data=known, **keywords)
        except OSError as error:
            if out is not None:
                raise
            message(f"vultus: note: {places[name]}: not stored ({error.strerror}); --out FOLDER keeps the results")
        else:
            if out is None:
                message(f"vultus: {name}: stored in {places[name]}")
    return format_comparison(results), results


@dataclass(frozen=True)
class SnapshotFile:
    """The file that a snapshot was read from, and its hash."""

    path: Path
    sha256: str


@dataclass
class _Part:
    """One result to be measured, and what is known of its context before.

    `column` is its name in what is returned, `stored` its name in the folder where it is stored.
    """

    column: str
    stored: str
    dataset: PreparedDataset
    other: PreparedDataset | None
    settings: EvaluationSettings
    planned: dict[str, Any]


def _places_in_runs(
    files: Mapping[str, SnapshotFile], split: Split, parts: Mapping[str, list[_Part]]
) -> dict[str, Path]:
    """The folder in its run folder for each snapshot that has one; a note says so for the others."""
    places = {}
    for name, file in files.items():
        remedy = "its results are printed only; --out FOLDER keeps them"
        run = run_folder(file.path)
        if run is None:
            message(f"vultus: note: {name}: not in a run folder, so {remedy}")
            continue
        try:
            with tempfile.TemporaryFile(dir=make_folder(run / FOLDER)):  # an error is reported before the work
                places[name] = place_for(run, split, [part.planned for part in parts[name]])
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else "a file stands where a folder is needed"
            message(f"vultus: note: {run / FOLDER}: cannot be written ({reason}), so {remedy}")
            continue
        for part in parts[name]:
            # Called as the folder, not as the user spelled its path.
            short = run.resolve().name if file.path.name == SNAPSHOT else file.path.name
            part.stored = short + part.column.removeprefix(name)
    return places


def format_comparison(results: Results) -> str:
    """The table of the results as Markdown, and below it the gaps of snapshots that were measured on both splits."""
    gaps = {}
    for column in results:
        name = column.removesuffix(" (train)")
        if column != name and f"{name} (test)" in results:
            gaps[name] = gap(results[column], results[f"{name} (test)"])
    return format_table(results) + (f"\n\n{format_gap(gaps)}" if gaps else "")


def _or_none(data: str | Path, split: str) -> PreparedDataset | None:
    try:
        return PreparedDataset(data, split)
    except UserError:
        return None


def _named(snapshots: Source | Sequence[Source] | Mapping[str, Source]) -> dict[str, Source]:
    """{name: snapshot}; a snapshot is named as it was given, a loaded one by its file."""
    if isinstance(snapshots, Mapping):
        return dict(snapshots)
    several = [snapshots] if isinstance(snapshots, str | Path | Snapshot) else list(snapshots)
    named: dict[str, Source] = {}
    for source in several:
        name = str(source.path or "snapshot") if isinstance(source, Snapshot) else str(source)
        if isinstance(named.get(name), Snapshot) and named[name] is not source:
            raise UserError(f"two snapshots are called {name}; give them as a dictionary {{name: snapshot}}")
        named[name] = source
    if not named:
        raise UserError("no snapshot to evaluate; name one, such as default")
    return named


def _open(source: str | Path, device: str) -> tuple[Snapshot, SnapshotFile]:
    while True:  # a training may replace the file while it is read, but the hash must be that of what was read
        before = _state(source)
        opened = load(source, device=device)
        assert opened.path is not None
        file = SnapshotFile(opened.path, snapshot_sha256(opened.path))
        if before == _state(source):
            return opened, file


def _file_of(snapshot: Snapshot) -> SnapshotFile | None:
    """The file of a loaded snapshot; None if its weights are no longer those of the file."""
    if snapshot.path is None or not snapshot.path.is_file():
        return None
    again, file = _open(snapshot.path.parent if snapshot.path.name == MODEL else snapshot.path, "cpu")
    ours, theirs = snapshot.network.state_dict(), again.network.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key].cpu(), theirs[key]) for key in theirs)
    return file if same else None


def _state(source: str | Path) -> tuple[int, int] | None:
    path = Path(source)
    try:
        state = (path / SNAPSHOT if path.is_dir() else path).stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size

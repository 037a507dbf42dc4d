"""Evaluation of several snapshots, on unseen people, on training people, or on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vultus._device import resolve_device
from vultus._files import make_folder
from vultus._progress import message
from vultus._ranges import Count, Limit, Seed, checks_arguments
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.artifacts import write_grids, write_results
from vultus.evaluation.backbones.loading import Backbones, load_backbones
from vultus.evaluation.evaluate import EvaluationSettings, check_match, evaluate, gap
from vultus.evaluation.tables import Results, format_gap, format_table
from vultus.models.facenet import Encoder, load_facenet
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
    noise_strength: float = 1.0,
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
        out: folder for results.json, table, plots and grids of faces; None writes nothing.
        noises: generated faces of each embedding.
        noise_strength: factor of the noise; below 1 faces are more alike and nearer to the average.
        limit: use this many photos, evenly spread over the split; None uses all.
        judges: face recognition networks that no loss contains: "dlib", or FILE.onnx or FILE.onnx:raw.
        fetch: download the weights of FID and LPIPS (340 MB) if they are missing.
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
    opened = {name: _open(source, device) for name, source in sources.items()}
    _, results = compare(
        opened,
        data,
        encoder=load_facenet(device=device),
        judges=(judges,) if isinstance(judges, str) else tuple(judges),
        fetch=fetch,
        split=split,
        out=out,
        noises=noises,
        limit=limit,
        batch=batch,
        seed=seed,
        noise_strength=noise_strength,
        device=device,
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
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    backbones: Backbones | None = None,
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Evaluate every snapshot; return the table as Markdown and the results by column.

    With `both`, every snapshot has a column for unseen people and one for as many photos of training people, and a
    second table holds the gap. `out` is a folder for table, JSON, plots and grids; it is written after every snapshot,
    so that an interruption loses no finished result. For the rest see `evaluate` and `load_backbones`.
    """
    if out is not None:
        make_folder(out)
    test = None if split == "train" else PreparedDataset(data, "test")
    train = _or_none(data, "train") if split == "test" else PreparedDataset(data, "train")
    sides = {"test": (test, train), "train": (train, test or _or_none(data, "test"))}
    for snapshot in snapshots.values():
        check_match(snapshot, next(side for side in (test, train) if side is not None), encoder)
    backbones = backbones or load_backbones(encoder, judges=judges, device=device, fetch=fetch)
    results: dict[str, dict[str, Any]] = {}
    settings = EvaluationSettings(noises, limit, batch, seed, device, noise_strength=noise_strength, cache=cache)
    for name, snapshot in snapshots.items():
        for part in ("test", "train") if split == "both" else (split,):
            dataset, other = sides[part]
            assert dataset is not None
            # As many photos of training people as of unseen ones: some metrics depend on their number.
            most = limit if test is None else min(limit or len(test), len(test))
            counted = replace(settings, limit=most if part == "train" else limit)
            column = f"{name} ({part})" if split == "both" else name
            results[column] = evaluate(snapshot, dataset, backbones=backbones, other=other, settings=counted)
            for alarm in results[column]["alarms"]:
                message(f"vultus: alarm: {column}: {alarm}")
            if out is not None:
                faces = counted.faces(snapshot)
                write_grids(out, column, faces, dataset, backbones=backbones, other=other, settings=counted)
        if out is not None:
            write_results(out, results, format_comparison(results))
    return format_comparison(results), results


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


def _open(source: Source, device: str) -> Snapshot:
    if isinstance(source, Snapshot):
        source.network.to(device)
        return source
    return load(source, device=device)

"""Several snapshots under one evaluation, side by side, on unseen people, training people, or both."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from vultus._files import make_folder
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.artifacts import write_pictures, write_results
from vultus.evaluation.backbones.loading import Backbones, load_backbones
from vultus.evaluation.evaluate import EvaluationSettings, check_match, evaluate, gap
from vultus.evaluation.tables import format_gap, format_table
from vultus.models.facenet import Encoder
from vultus.models.snapshot import Snapshot


def compare(
    snapshots: Mapping[str, Snapshot],
    data: str | Path,
    *,
    encoder: Encoder,
    judges: tuple[str, ...] = ("dlib",),
    fetch: bool = False,
    split: Literal["test", "train", "both"] = "test",
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
    second table holds the gap. `out` is a folder for table, JSON, plots and pictures; it is written after every
    snapshot, so that an interruption loses nothing that was done. For the rest see `evaluate`, `load_backbones`.
    """
    if out is not None:
        make_folder(out)
    test = None if split == "train" else PreparedDataset(data, "test")
    train = _or_none(data, "train") if split == "test" else PreparedDataset(data, "train")
    sides = {"test": (test, train), "train": (train, test or _or_none(data, "test"))}
    chosen = ["test", "train"] if split == "both" else [split]
    for snapshot in snapshots.values():
        check_match(snapshot, next(side for side in (test, train) if side is not None), encoder)
    backbones = backbones or load_backbones(encoder, judges=judges, device=device, fetch=fetch)
    results: dict[str, dict[str, Any]] = {}
    gaps: dict[str, dict[str, Any]] = {}
    settings = EvaluationSettings(noises, limit, batch, seed, device, noise_strength=noise_strength, cache=cache)
    text = ""
    for name, snapshot in snapshots.items():
        for part in chosen:
            dataset, other = sides[part]
            assert dataset is not None
            # As many photos of training people as of unseen ones: some figures depend on how many there are.
            most = limit if test is None else min(limit or len(test), len(test))
            counted = replace(settings, limit=most if part == "train" else limit)
            column = f"{name} ({part})" if split == "both" else name
            results[column] = evaluate(snapshot, dataset, backbones=backbones, other=other, settings=counted)
            for alarm in results[column]["alarms"]:
                print(f"vultus: alarm: {column}: {alarm}", file=sys.stderr)
            if out is not None:
                faces = counted.faces(snapshot)
                write_pictures(out, column, faces, dataset, backbones=backbones, other=other, settings=counted)
        if split == "both":
            gaps[name] = gap(results[f"{name} (train)"], results[f"{name} (test)"])
        second = format_gap(gaps) if gaps else ""
        if out is not None:
            write_results(out, results, second)
        text = format_table(results) + (f"\n\n{second}" if second else "")
    return text, results


def _or_none(data: str | Path, split: str) -> PreparedDataset | None:
    try:
        return PreparedDataset(data, split)
    except UserError:
        return None

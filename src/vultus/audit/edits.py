"""What an edit along a direction does: how far the attribute of the face changes, and what identity it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus.audit.attributes import ATTRIBUTES, attribute_column
from vultus.audit.probes import Probe
from vultus.audit.protocol import InvertedFaces, checked_threshold
from vultus.data.dataset import PreparedDataset
from vultus.evaluation.backbones.face_recognition import Judge
from vultus.evaluation.bootstrap import PersonBootstrap
from vultus.evaluation.extract import GeneratedFaces, RealFaces, extract, vectors
from vultus.evaluation.verification import pair_scores, row_scores
from vultus.models.snapshot import Snapshot

STRENGTHS = (-1.5, 1.5)  # at which edits are measured
FAR = 1e-3


def measure_edits(
    probes: Mapping[str, Probe],
    snapshot: Snapshot,
    dataset: PreparedDataset,
    rows: np.ndarray,
    *,
    judges: Sequence[Judge],
    seed: int,
    batch: int,
    device: torch.device | str,
    cache: Path,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure the edits of STRENGTHS on faces generated from the embeddings of `rows`.

    Both faces of a pair, before and after the edit, have the same noise. Returns {attribute: {"+1.5": {`change`: of the
    attribute in standard deviations, `cosine`: of the edited embedding to the original one, `accepted`: {judge:
    {`before`, `after`: share of the faces that it accepts against the photo at a FAR of 1e-3}}}}}; values are
    dictionaries of value, low, high. Thresholds are those of the pairs of different people of these rows.

    Raises UserError if there are too few such pairs.
    """
    people = [dataset.identities[row] for row in rows]
    bootstrap = PersonBootstrap(people, seed=seed)
    c = dataset.embeddings(rows)
    columns = [attribute_column(), *(vectors(judge.short, judge, 1) for judge in judges)]
    options: dict[str, Any] = {"batch": batch, "cache": cache, "device": device}
    real = extract(RealFaces(), dataset, rows, columns[1:], **options)
    before = extract(GeneratedFaces(snapshot, seed=seed, device=device), dataset, rows, columns, **options)
    thresholds = {}
    for judge in judges:
        different = pair_scores(real[judge.short][:, 0], people, judge.similarity)[1]
        thresholds[judge.short] = checked_threshold(different, FAR, dataset)

    def accepted(faces: Mapping[str, Tensor], judge: Judge) -> dict[str, Any]:
        own = row_scores(faces[judge.short][:, 0], real[judge.short][:, 0], judge.similarity)
        estimate = bootstrap.mean((own > thresholds[judge.short]).double())
        assert estimate is not None
        return estimate.to_dict()

    result: dict[str, dict[str, dict[str, Any]]] = {}
    for name, probe in probes.items():
        place = list(ATTRIBUTES).index(name)
        result[name] = {}
        for strength in STRENGTHS:
            moved = F.normalize(c + strength * probe.direction, dim=1)
            by_row = dict(zip(rows.tolist(), moved, strict=True))
            title = f"{name} {strength:+g}"
            faces = InvertedFaces(snapshot, by_row, seed=seed, device=device, title=title)
            after = extract(faces, dataset, rows, columns, **options)
            change = (after["attributes"] - before["attributes"])[:, 0, place].double() / probe.std
            estimates = {"change": bootstrap.mean(change), "cosine": bootstrap.mean(row_scores(moved, c, "cosine"))}
            result[name][f"{strength:+g}"] = {
                **{key: estimate.to_dict() for key, estimate in estimates.items() if estimate is not None},
                "accepted": {
                    judge.short: {"before": accepted(before, judge), "after": accepted(after, judge)}
                    for judge in judges
                },
            }
    return result

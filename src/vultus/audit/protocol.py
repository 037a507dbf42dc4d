"""The protocol: protect the templates of unseen people, invert them, and count how often the faces are accepted.

Type I compares a face with the photo that its template came from, type II with other photos of that person (Mai et al.
2018, arXiv:1703.00832). Thresholds come from the pairs of different people of the same photos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping as Map
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vultus._download import cache_folder
from vultus._formats import VERSIONS
from vultus.audit.attack import BATCH, STEPS, Mapping, train_mapping
from vultus.audit.protections import Protection
from vultus.data.dataset import Batch, PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import Judge
from vultus.evaluation.bootstrap import PersonBootstrap
from vultus.evaluation.extract import GeneratedFaces, RealFaces, extract, vectors
from vultus.evaluation.headlines import loss_encoders
from vultus.evaluation.scores import spread
from vultus.evaluation.verification import (
    Similarity,
    accepted_against_others,
    pair_scores,
    row_scores,
    threshold_at_far,
)
from vultus.models.facenet import Encoder
from vultus.models.snapshot import Snapshot

FARS = (1e-2, 1e-3)
MIN_TRAINING = 64  # embeddings that a mapping is trained on


class InvertedFaces(GeneratedFaces):
    """The faces of other embeddings `c` [N, D] than those of the data set, row by row."""

    def __init__(self, snapshot: Snapshot, c: Map[int, Tensor], *, seed: int, device: torch.device | str) -> None:
        super().__init__(snapshot, seed=seed, device=device)
        self._c = c
        digest = hashlib.sha256(torch.stack(list(c.values())).numpy().tobytes()).hexdigest()
        self.id = f"{self.id}-{digest[:32]}"
        self.title = "inverted"

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet."""
        return super().__call__(rows, number, replace(photos, c=torch.stack([self._c[row] for row in rows.tolist()])))


@dataclass(frozen=True)
class Attacked:
    """A protection with the mapping that was trained on it; None for the plain template, which needs none."""

    protection: Protection
    mapping: Mapping | None
    seed: int

    def invert(self, c: Tensor, people: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Protect embeddings c [N, D] of these people and invert them: (templates [N, K], embeddings [N, D])."""
        keys = _keys(self.protection, people, self.seed, attacked=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed + 1) % 2**63)
            templates = self.protection.protect(c, keys)
        return templates, self.mapping(self.protection.seen(templates, keys)) if self.mapping else templates


def attack(name: str, protection: Protection, training: PreparedDataset, *, seed: int) -> Attacked:
    """Fit a protection and train the attack on it, on the training split alone.

    Raises UserError if the templates are constant or not finite, which leaves nothing to attack, or for less than 64
    training photos.
    """
    c = training.embeddings()
    if len(c) < MIN_TRAINING:
        raise UserError(f"{training.folder}: {len(c)} training photos; the attack needs {MIN_TRAINING} or more")
    protection.fit(c)
    keys = _keys(protection, training.identities, seed, attacked=protection.pairs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        templates = protection.protect(c, keys)
    if not templates.isfinite().all() or bool((templates == templates[0]).all()):
        raise UserError(
            f"--protect {name}: all templates are equal or not finite, which leaves nothing to attack and nothing to "
            f"verify; choose a weaker protection"
        )
    if name == "plain":
        return Attacked(protection, None, seed)
    return Attacked(protection, train_mapping(protection.seen(templates, keys), c, seed=seed), seed)


def audit_people(
    attacks: Map[str, Attacked],
    snapshot: Snapshot,
    dataset: PreparedDataset,
    *,
    encoder: Encoder,
    judges: Sequence[Judge],
    limit: int | None,
    seed: int,
    batch: int,
    device: torch.device | str,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Measure attacks on the people of `dataset`: {"format": 1, "context": ..., "protections": {name: ...}}.

    Each protection has `attacker`, `dim`, `cosine` (of the inverted to the true embedding), `tar` (of pairs of one
    person's templates at FAR 1e-3) and `success`: {encoder: {"type1@0.01": ..., ...}}; values are dictionaries of
    value, low, high.
    """
    rows = spread(len(dataset), limit)
    people = [dataset.identities[row] for row in rows]
    bootstrap = PersonBootstrap(people, seed=seed)
    c = dataset.embeddings(rows)
    short = encoder.id.partition("-")[0]
    networks: list[tuple[str, Similarity, Any]] = [(short, "cosine", encoder)]
    networks += [(judge.short, judge.similarity, judge) for judge in judges]
    columns = [vectors(name, network, 1) for name, _, network in networks]
    options: dict[str, Any] = {"batch": batch, "cache": cache or cache_folder() / "features", "device": device}
    real = {name: array[:, 0] for name, array in extract(RealFaces(), dataset, rows, columns, **options).items()}
    thresholds: dict[str, dict[float, float]] = {}
    for name, similarity, _ in networks:
        _, different = pair_scores(real[name], people, similarity)
        thresholds[name] = {far: _threshold(different, far, dataset) for far in FARS}
    result: dict[str, Any] = {}
    for title, attacked in attacks.items():
        templates, inverted = attacked.invert(c, people)
        faces = InvertedFaces(snapshot, dict(zip(rows.tolist(), inverted, strict=True)), seed=seed, device=device)
        generated = extract(faces, dataset, rows, columns, **options)
        success: dict[str, dict[str, Any]] = {}
        for name, similarity, _ in networks:
            own, success[name] = generated[name][:, 0], {}
            for far, threshold in thresholds[name].items():
                first = (row_scores(own, real[name], similarity) > threshold).double()
                second = accepted_against_others(own, real[name], people, similarity, threshold)
                for kind, values in (("type1", first), ("type2", second)):
                    estimate = bootstrap.mean(values)
                    success[name][f"{kind}@{far:g}"] = estimate.to_dict() if estimate else None
        verified = _verification_templates(attacked, c, people, templates)
        _, different = pair_scores(verified, people, "cosine")
        threshold = _threshold(different, FARS[-1], dataset)
        tar = bootstrap.mean(accepted_against_others(verified, verified, people, "cosine", threshold))
        cosine = bootstrap.mean(row_scores(inverted, c, "cosine"))
        assert cosine is not None
        result[title] = {
            "attacker": attacked.protection.attacker,
            "dim": templates.shape[1],
            "cosine": cosine.to_dict(),
            "tar": tar.to_dict() if tar else None,
            "success": success,
        }
    context = {
        "data_sha256": dataset.manifest["content_sha256"],
        "n_images": len(rows),
        "n_people": bootstrap.count,
        "seed": seed,
        "device": str(device),
        "attacked": encoder.id,
        "loss_encoders": loss_encoders(snapshot.metadata),
        "judges": [judge.id for judge in judges],
        "mapping": f"{STEPS} steps of {BATCH} templates",
    }
    return {"format": VERSIONS["audit"], "context": context, "protections": result}


def _threshold(different: Tensor, far: float, dataset: PreparedDataset) -> float:
    try:
        return threshold_at_far(different, far)
    except ValueError as error:
        raise UserError(f"{dataset.folder}: {error}; prepare more people or raise --limit") from None


def _verification_templates(attacked: Attacked, c: Tensor, people: Sequence[str], templates: Tensor) -> Tensor:
    """Templates for the honest use. Where keys are known, an impostor uses the victim's key: all keys are equal."""
    if attacked.protection.keys != "person" or not attacked.protection.key_known:
        return templates
    return attacked.protection.protect(c, torch.zeros(len(people), dtype=torch.int64))


def _keys(protection: Protection, people: Sequence[str], seed: int, *, attacked: bool) -> Tensor:
    """The key of each row; for a system key, the attacked system has another one than the attacker's own."""
    if protection.keys != "person":
        return torch.full((len(people),), _key(f"{seed} system {attacked}"), dtype=torch.int64)
    return torch.tensor([_key(f"{seed} {person}") for person in people], dtype=torch.int64)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

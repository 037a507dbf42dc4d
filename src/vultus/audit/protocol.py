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
from vultus.audit.groups import Groups, group_rows
from vultus.audit.honest import check_information, stolen_key_scores
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

    def __init__(
        self,
        snapshot: Snapshot,
        c: Map[int, Tensor],
        *,
        seed: int,
        device: torch.device | str,
        title: str = "inverted",
    ) -> None:
        super().__init__(snapshot, seed=seed, device=device)
        self._c = c
        digest = hashlib.sha256(torch.stack(list(c.values())).numpy().tobytes()).hexdigest()
        self.id = f"{self.id}-{digest[:32]}"
        self.title = title

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

    Raises UserError if the templates are constant, not finite or no more alike for one person than for two, which
    leaves nothing to attack, or for less than 64 training photos.
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
    check_information(name, templates, training.identities)
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
    groups: Groups | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Measure attacks on the people of `dataset`: {"format", "context", "real", "protections": {name: ...}}.

    `real` has what real photos of the people reach in place of the faces: {encoder: {"type2@0.01": ..., ...}}.
    Each protection has `attacker`, `dim`, `cosine` (of the inverted to the true embedding), `tar` (of pairs of one
    person's templates at FAR 1e-3), `success`: {encoder: {"type1@0.01": ..., ...}}, and `groups`: {group: {"n_images",
    "n_people", "tar", "success"}}, empty without groups. With a key for each person it also has `tar_cases`:
    {"own_keys", "stolen_key"} (see honest.py), and `tar_case`, the one that is `tar`: "stolen_key" where the attacker
    has the keys. Values are dictionaries of value, low, high, or None where nothing was to be compared. All groups have
    the same thresholds.
    """
    rows = spread(len(dataset), limit)
    people = [dataset.identities[row] for row in rows]
    parts = {} if groups is None else group_rows(groups, [dataset.keys[row] for row in rows], people)
    bootstrap = PersonBootstrap(people, seed=seed)
    c = dataset.embeddings(rows)
    networks: list[tuple[str, Similarity, Any]] = [(short_name(encoder), "cosine", encoder)]
    networks += [(judge.short, judge.similarity, judge) for judge in judges]
    columns = [vectors(name, network, 1) for name, _, network in networks]
    options: dict[str, Any] = {"batch": batch, "cache": cache or cache_folder() / "features", "device": device}
    real = {name: array[:, 0] for name, array in extract(RealFaces(), dataset, rows, columns, **options).items()}
    thresholds: dict[str, dict[float, float]] = {}
    photos: dict[str, dict[str, Any]] = {}
    for name, similarity, _ in networks:
        _, different = pair_scores(real[name], people, similarity)
        thresholds[name], photos[name] = {far: checked_threshold(different, far, dataset) for far in FARS}, {}
        for far, threshold in thresholds[name].items():
            accepted = accepted_against_others(real[name], real[name], people, similarity, threshold)
            photos[name][f"type2@{far:g}"] = _estimate(bootstrap, accepted)
    result: dict[str, Any] = {}
    for title, attacked in attacks.items():
        templates, inverted = attacked.invert(c, people)
        faces = InvertedFaces(snapshot, dict(zip(rows.tolist(), inverted, strict=True)), seed=seed, device=device)
        generated = extract(faces, dataset, rows, columns, **options)
        success: dict[str, dict[str, Tensor]] = {}
        for name, similarity, _ in networks:
            own, success[name] = generated[name][:, 0], {}
            for far, threshold in thresholds[name].items():
                first = (row_scores(own, real[name], similarity) > threshold).double()
                success[name][f"type1@{far:g}"] = first
                second = accepted_against_others(own, real[name], people, similarity, threshold)
                success[name][f"type2@{far:g}"] = second
        cases = _verified(attacked, c, people, templates, dataset)
        protection = attacked.protection
        case = "stolen_key" if protection.key_known else "own_keys"
        tar = cases[case]
        result[title] = {
            "attacker": protection.attacker,
            "dim": templates.shape[1],
            "cosine": _estimate(bootstrap, row_scores(inverted, c, "cosine").double()),
            **_estimates(bootstrap, tar, success),
            "groups": {
                group: {"n_images": len(part), "n_people": len({people[row] for row in part})}
                | _estimates(bootstrap, tar, success, part)
                for group, part in parts.items()
            },
        }
        if len(cases) > 1:
            each = {name: _estimate(bootstrap, values) for name, values in cases.items()}
            result[title] |= {"tar_case": case, "tar_cases": each}
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
        "groups": list(parts),
        "thresholds": {name: {f"{far:g}": value for far, value in each.items()} for name, each in thresholds.items()},
    }
    return {"format": VERSIONS["audit"], "context": context, "real": photos, "protections": result}


def short_name(encoder: Encoder) -> str:
    """The attacked encoder in tables: `facenet` of `facenet-vggface2`."""
    return encoder.id.partition("-")[0]


def _estimate(bootstrap: PersonBootstrap, values: Tensor, rows: np.ndarray | None = None) -> dict[str, Any] | None:
    """The mean over people of `values` [N], or of some of its rows. One person has no interval, so gives None."""
    part = bootstrap if rows is None else bootstrap.part(rows)
    values = values if rows is None else values[rows]
    if len(part.codes[values.isfinite()].unique()) < 2:
        return None
    estimate = part.mean(values)
    return estimate.to_dict() if estimate else None


def _estimates(
    bootstrap: PersonBootstrap, tar: Tensor, success: Map[str, Map[str, Tensor]], rows: np.ndarray | None = None
) -> dict[str, Any]:
    return {
        "tar": _estimate(bootstrap, tar, rows),
        "success": {
            name: {key: _estimate(bootstrap, values, rows) for key, values in each.items()}
            for name, each in success.items()
        },
    }


def checked_threshold(different: Tensor, far: float, dataset: PreparedDataset) -> float:
    """threshold_at_far; raises UserError that names the data set if there are too few pairs of different people."""
    try:
        return threshold_at_far(different, far)
    except ValueError as error:
        raise UserError(f"{dataset.folder}: {error}; prepare more people or raise --limit") from None


def _verified(
    attacked: Attacked, c: Tensor, people: Sequence[str], templates: Tensor, dataset: PreparedDataset
) -> dict[str, Tensor]:
    """{case: share of the other templates of that person that accept each template [N]} at FAR 1e-3; see honest.py."""
    protection = attacked.protection
    impostors = {"own_keys": pair_scores(templates, people, "cosine")[1]}
    if protection.keys == "person":
        keys = _keys(protection, people, attacked.seed, attacked=True)
        impostors["stolen_key"] = stolen_key_scores(protection, c, keys, people)
    return {
        case: accepted_against_others(
            templates, templates, people, "cosine", checked_threshold(different, FARS[-1], dataset)
        )
        for case, different in impostors.items()
    }


def _keys(protection: Protection, people: Sequence[str], seed: int, *, attacked: bool) -> Tensor:
    """The key of each row; for a system key, the attacked system has another one than the attacker's own."""
    if protection.keys != "person":
        return torch.full((len(people),), _key(f"{seed} system {attacked}"), dtype=torch.int64)
    return torch.tensor([_key(f"{seed} {person}") for person in people], dtype=torch.int64)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

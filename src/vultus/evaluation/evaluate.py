"""Measure a snapshot on people it has never seen.

Every figure is about what a user would save: generated faces are rounded to 8 bits first. Networks see whole frames and
take their own crop. The noise of a face is a function of (seed, row of the photo, number of the noise), so no result
depends on the batch size. What the rows mean is in docs/metrics.md; how they are computed from arrays in assess.py.
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vultus._download import cache_folder
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation import scores as assess
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.bootstrap import LEVEL, REPLICATES, Estimate, PersonBootstrap, difference
from vultus.evaluation.extract import (
    FaceSet,
    GeneratedFaces,
    OtherFaces,
    RealFaces,
    apart,
    measure,
    pairs_of,
    perceptual,
    pixels,
    vectors,
)
from vultus.evaluation.metrics import cosine
from vultus.evaluation.scores import spread
from vultus.evaluation.verification import Similarity
from vultus.models.facenet import FACENET_WEIGHTS, Encoder
from vultus.models.snapshot import Snapshot
from vultus.sampling.latents import check_strength

FORMAT = 2  # of the results
FEW = 100  # photos below which distances of distributions say nothing
MAX_OTHER = 512  # pairs of real photos for what two photos of one person differ by
MAX_BEST = 128  # photos of the best-of rows
CHECKED = 64  # photos whose stored embedding is compared with the encoder's


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is measured, and where.

    Attributes:
        noises: faces of each embedding; from 2 on their diversity is measured.
        limit: use this many photos, evenly spread over the split; None uses all.
        batch: photos at a time; it decides about memory and speed, not about results.
        seed: of the noise and of the resampled people.
        device, dtype: of the generator.
        noise_strength: the noise is multiplied by it; below 1 faces are more alike and nearer to the average.
        best_of: noises of the rows that take the best one, on 128 photos; below 2 there are no such rows.
        cache: folder for what was measured on faces; by default in the cache folder of the user.
    """

    noises: int = 2
    limit: int | None = None
    batch: int = 32
    seed: int = 0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    noise_strength: float = 1.0
    best_of: int = 8
    cache: Path | None = None

    @property
    def how(self) -> dict[str, Any]:
        """Keywords of `measure.measure`."""
        return {"batch": self.batch, "cache": self.cache or cache_folder() / "features", "device": self.device}

    def faces(self, snapshot: Snapshot) -> GeneratedFaces:
        """What the snapshot makes with these settings."""
        return GeneratedFaces(
            snapshot, seed=self.seed, device=self.device, dtype=self.dtype, noise_strength=self.noise_strength
        )


def evaluate(
    snapshot: Snapshot,
    dataset: PreparedDataset,
    *,
    backbones: Backbones,
    other: PreparedDataset | None = None,
    settings: EvaluationSettings | None = None,
) -> dict[str, Any]:
    """Measure a generator on the people of `dataset`; the result fits into JSON.

    Args:
        snapshot: the generator and where it comes from, on the device of the settings.
        dataset: a split of a prepared data set; "test" holds people that no training has seen.
        backbones: what to measure with; its encoder is the one that the data set was made with.
        other: the other split: the floor of distances of distributions, and (if it is "train") what could be copied.
        settings: how much, and where.

    Returns: `context` (circumstances), `metrics` ({row: value, low, high and where they exist std, real}),
    `distributions` (histograms), `people` ({judge: [person, mean score, photos], best first}), `missing` ({rows: why
    not measured}), `alarms`, `notes`.

    Raises UserError where snapshot, data set and encoder do not belong together, or there are fewer than 2 people.
    """
    settings = settings or EvaluationSettings()
    check_match(snapshot, dataset, backbones.encoder)
    result = evaluate_faces(settings.faces(snapshot), dataset, backbones=backbones, other=other, settings=settings)
    dtype = str(settings.dtype).removeprefix("torch.")
    result["context"] |= {"cur_nimg": snapshot.metadata.get("cur_nimg"), "generator_dtype": dtype}
    return result


def evaluate_faces(
    faces: FaceSet,
    dataset: PreparedDataset,
    *,
    backbones: Backbones,
    other: PreparedDataset | None = None,
    settings: EvaluationSettings | None = None,
) -> dict[str, Any]:
    """As `evaluate`, for any set of faces that belong to the photos of `dataset`."""
    settings = settings or EvaluationSettings()
    start = time.perf_counter()
    _check_arguments(settings)
    rows = spread(len(dataset), settings.limit)
    names = [dataset.identities[row] for row in rows]
    people = PersonBootstrap(names, seed=settings.seed)
    split = dataset.split or "all"
    if people.count < 2:
        raise UserError(
            f"{dataset.folder}: {len(rows)} images of {people.count} person in split {split}; an evaluation needs 2 "
            f"people or more: prepare more photos or raise --limit"
        )
    notes: list[str] = []
    _check_encoder(dataset, rows, backbones.encoder, settings, notes)
    work = _Work(faces, dataset, other, rows, names, people, backbones, settings)
    found, distributions, missing = _identity(work)
    known = {
        judge.short: assess.by_person(work.made[judge.short], work.real[judge.short], names, judge.similarity)
        for judge in backbones.judges
    }
    missing |= backbones.missing
    _realism(work, found, missing, notes)
    _pictures(work, found, notes)
    encoder = backbones.short
    if other is not None and other.split == "train":
        made = work.made[encoder][:, 0]
        copied, distributions["nearest"] = assess.copies(encoder, made, work.asked, other.embeddings(), people)
        found |= copied
    judge, distance = (parts[0].short if parts else None for parts in (backbones.judges, backbones.perceptual))
    result = {
        "format": FORMAT,
        "context": {
            "data_sha256": dataset.manifest["content_sha256"],
            "split": split,
            "n_images": len(rows),
            "n_people": people.count,
            "noises": settings.noises,
            "seed": settings.seed,
            "noise_strength": settings.noise_strength,
            "resolution": dataset.resolution,
            "device": str(settings.device),
            "networks": backbones.ids,
            "intervals": f"{LEVEL:.0%}, people resampled {REPLICATES} times",
            "seconds": round(time.perf_counter() - start, 1),
        },
        "metrics": {name: row.to_dict() for name, row in found.items()},
        "distributions": distributions,
        "people": {judge: [list(entry) for entry in entries] for judge, entries in known.items()},
        "missing": missing,
        "alarms": assess.alarms(found, encoder=encoder, judge=judge, perceptual=distance),
        "notes": notes,
    }
    return result


def gap(train: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    """Train people minus unseen people, for every row that both results have: {row: value, low, high}."""
    mine, theirs = train["metrics"], test["metrics"]
    pairs = {name: [_estimate(part[name]) for part in (mine, theirs)] for name in mine if name in theirs}
    return {name: difference(*pair).to_dict() for name, pair in pairs.items()}


def _estimate(row: dict[str, float]) -> Estimate:
    return Estimate(row["value"], row["low"], row["high"])


# --- what belongs together ----------------------------------------------------------------------------------------


def check_match(snapshot: Snapshot, dataset: PreparedDataset, encoder: Encoder) -> None:
    """Raise UserError, naming both sides, unless snapshot, data set and encoder belong together."""
    theirs, ours = snapshot.metadata.get("encoder") or {}, dataset.manifest["encoder"]
    named = f"{snapshot.path or 'the snapshot'}", f"{dataset.folder}"
    for key, shown in (("id", "encoder"), ("dim", "embedding length"), ("weights_sha256", "encoder weights")):
        if _same(theirs.get(key)) != _same(ours.get(key)):
            raise UserError(
                f"{named[0]} has {shown} {theirs.get(key)}, {named[1]} has {ours.get(key)}; prepare the data set with "
                f"the encoder that the snapshot was trained on"
            )
    if ours["id"] != encoder.id or _same(ours.get("weights_sha256")) != _same(encoder.weights_sha256):
        raise UserError(
            f"{named[1]} was prepared with {ours['id']} ({ours.get('weights_sha256')}), the encoder at hand is "
            f"{encoder.id} ({encoder.weights_sha256}); set VULTUS_WEIGHTS to the weights it was prepared with"
        )
    crops = snapshot.metadata.get("crop"), dataset.manifest["crop"]
    if crops[0] != crops[1]:
        raise UserError(
            f"{named[0]} was trained on crop {json.dumps(crops[0])}, {named[1]} has {json.dumps(crops[1])}; prepare "
            f"the data set with the same crop"
        )
    if snapshot.network.resolution != dataset.resolution:
        side, made = dataset.resolution, snapshot.network.resolution
        raise UserError(
            f"{named[0]} makes {made}x{made} pictures, {named[1]} has {side}x{side}; prepare with --resolution {made}"
        )


def _same(value: Any) -> Any:
    """All pinned files of FaceNet hold one network (float16 and float32), so their hashes count as one."""
    return FACENET_WEIGHTS[0].sha256 if value in {weights.sha256 for weights in FACENET_WEIGHTS} else value


def _check_arguments(settings: EvaluationSettings) -> None:
    for name, least in (("noises", 1), ("limit", 2), ("batch", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    check_strength(settings.noise_strength)


@torch.inference_mode()
def _check_encoder(
    dataset: PreparedDataset, rows: np.ndarray, encoder: Encoder, settings: EvaluationSettings, notes: list[str]
) -> None:
    """Note it if the encoder does not find in the stored photos what the data set says it found in the originals."""
    some = rows[spread(len(rows), CHECKED)]
    vector = [vectors("check", encoder, 1)]
    found = measure(RealFaces(), dataset, some, vector, **settings.how)["check"][:, 0]
    agreement = cosine(found, dataset.embeddings(some)).mean().item()
    if agreement < 0.9:
        notes.append(
            f"the encoder finds embeddings in the stored photos that have cosine {agreement:.2f} to the stored ones "
            f"(0.99 is usual): the data set's embeddings may come from another crop or encoder"
        )


# --- passes over the data ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What the parts of one evaluation share."""

    faces: FaceSet
    dataset: PreparedDataset
    other: PreparedDataset | None
    rows: np.ndarray
    names: list[str]
    people: PersonBootstrap
    backbones: Backbones
    settings: EvaluationSettings

    @functools.cached_property
    def asked(self) -> Tensor:
        """The embeddings of the photos, [N, D]."""
        return self.dataset.embeddings(self.rows)

    def measure(
        self, faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, columns: list[Any]
    ) -> dict[str, Tensor]:
        """`measure.measure` as the settings have it."""
        return measure(faces, dataset, rows, columns, **self.settings.how)

    @functools.cached_property
    def made(self) -> dict[str, Tensor]:
        """Everything about the faces."""
        noises, parts = self.settings.noises, self.backbones
        columns = [vectors(parts.short, parts.encoder, noises)]
        columns += [vectors(judge.short, judge, noises) for judge in parts.judges]
        columns += [vectors(network.short, network, 1) for network in parts.features]
        columns += [pixels(noises), *(perceptual(network, noises) for network in parts.perceptual)]
        if noises > 1:
            columns.append(apart(parts.perceptual[0] if parts.perceptual else None, noises))
        return self.measure(self.faces, self.dataset, self.rows, columns)

    @functools.cached_property
    def real(self) -> dict[str, Tensor]:
        """Vectors of the photos."""
        networks: list[Any] = [*self.backbones.judges, *self.backbones.features]
        columns = [vectors(network.short, network, 1) for network in networks]
        found = self.measure(RealFaces(), self.dataset, self.rows, columns)
        return {name: array[:, 0] for name, array in found.items()}


def _identity(work: _Work) -> tuple[assess.Rows, dict[str, Any], dict[str, str]]:
    rows: assess.Rows = {}
    distributions: dict[str, Any] = {}
    missing: dict[str, str] = {}
    sides: list[tuple[str, Similarity, Tensor]] = [(work.backbones.short, "cosine", work.asked)]
    sides += [(judge.short, judge.similarity, work.real[judge.short]) for judge in work.backbones.judges]
    made = work.made
    for short, similarity, real in sides:
        found, distributions[short], lacking = assess.identity(
            short, similarity, made[short], real, work.names, work.people
        )
        rows |= found
        missing |= lacking
    return rows, distributions, missing


def _realism(work: _Work, rows: assess.Rows, missing: dict[str, str], notes: list[str]) -> None:
    networks = work.backbones.features
    if not networks:
        return
    if len(work.rows) < FEW:
        missing["fd, kd, precision, recall"] = f"they need {FEW} photos or more, there are {len(work.rows)}"
        return
    natural: dict[str, Tensor] = {}
    if work.other is not None and len(work.other) >= FEW:
        some = spread(len(work.other), len(work.rows))
        columns = [vectors(network.short, network, 1) for network in networks]
        natural = {key: array[:, 0] for key, array in work.measure(RealFaces(), work.other, some, columns).items()}
    made, real = work.made, work.real
    for network in networks:
        short, split = network.short, work.dataset.split or "all"
        found, remarks = assess.realism(short, split, made[short][:, 0], real[short], natural.get(short), work.people)
        rows |= found
        notes += remarks


def _pictures(work: _Work, rows: assess.Rows, notes: list[str]) -> None:
    """Reconstruction and diversity."""
    parts, settings, made = work.backbones, work.settings, work.made
    network = parts.perceptual[0] if parts.perceptual else None
    others = OtherFaces(work.dataset)
    paired = work.rows[others.following[work.rows] >= 0]
    natural: dict[str, Tensor] = {}
    if len(paired):
        paired = paired[spread(len(paired), MAX_OTHER)]
        columns = [pixels(1), *(perceptual(one, 1) for one in parts.perceptual)]
        natural = work.measure(others, work.dataset, paired, columns)
    errors = [key for key in made if key == "pixels" or key in {one.short for one in parts.perceptual}]
    side = work.dataset.resolution
    rows |= assess.reconstruction({key: made[key] for key in errors}, natural, work.people, side)
    if settings.best_of > 1:
        best = spread(len(work.rows), MAX_BEST)
        columns = [pixels(settings.best_of), *(perceptual(one, settings.best_of) for one in parts.perceptual)]
        found = work.measure(work.faces, work.dataset, work.rows[best], columns)
        rows |= assess.reconstruction(found, natural, work.people.part(best), side, best=True)

    rows |= assess.diversity(made[parts.short][:, 0], work.asked, work.people)
    if settings.noises < 2:
        notes.append("diversity_noise: left out, it needs 2 noises or more")
        return
    held = None
    if parts.judges:
        judge = parts.judges[0]
        held = assess.accepted(made[judge.short], work.real[judge.short], work.names, judge.similarity, assess.FARS[-1])
    between = None
    if natural:
        rms = natural["pixels"][:, :, 0].sqrt()
        shown = natural[network.short][:, :, 0] if network else torch.full_like(rms, torch.nan)
        between = torch.stack([rms, shown], 2)
    short = network.short if network else None
    rows |= assess.noise_diversity(made["apart"], pairs_of(settings.noises), held, between, short, work.people)

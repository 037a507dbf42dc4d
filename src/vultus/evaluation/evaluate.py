"""Measure one generator on the people of a data set.

Generated faces are rounded to 8 bits first, as they are saved. Backbones get whole images and take their own crop. The
noise of a face is a function of (seed, row of the photo, number of the noise), so no result depends on the batch size.
docs/metrics.md says what the metrics mean; scores.py computes them from arrays; compare.py evaluates several snapshots.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from vultus._download import cache_folder
from vultus._formats import VERSIONS
from vultus._ranges import Count, Limit, NoiseStrength, Seed, checked
from vultus.data.dataset import PreparedDataset
from vultus.data.items import ONE_PER_IMAGE
from vultus.errors import UserError
from vultus.evaluation import scores
from vultus.evaluation.alarms import find_alarms
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.bootstrap import LEVEL, REPLICATES, Estimate, PersonBootstrap, difference
from vultus.evaluation.extract import (
    NOISE_PAIRS,
    ChosenFaces,
    Column,
    FaceSet,
    GeneratedFaces,
    OtherFaces,
    RealFaces,
    extract,
    noise_pairs,
    pairs_of,
    perceptual,
    pixels,
    vectors,
)
from vultus.evaluation.headlines import OTHER_DATA, loss_encoders
from vultus.evaluation.matching import check_match, trained_on
from vultus.evaluation.metrics import cosine
from vultus.evaluation.registry import MIN_PHOTOS
from vultus.evaluation.scores import Rows, spread
from vultus.evaluation.verification import Similarity
from vultus.models.encoders import load_condition_encoder
from vultus.models.facenet import Encoder
from vultus.models.snapshot import Snapshot
from vultus.sampling.best import check_candidates

MAX_OTHER = 512  # pairs of real photos from which the difference of two photos of one person is measured
MAX_BEST = 128  # photos of the best-of metrics
CHECKED = 64  # photos whose stored embedding is compared with the encoder's


@dataclass(frozen=True)
class EvaluationSettings:
    """Options of an evaluation.

    Attributes:
        noises: generated faces of each embedding; diversity over noise needs 2.
        limit: use this many photos, evenly spread over the split; None uses all.
        batch: photos at a time; changes memory and speed, not results.
        seed: of the noise and of the resampled people.
        device, dtype: of the generator.
        noise_strength: factor of the noise; below 1 faces are more alike and nearer to the average.
        best_of: noises of the metrics that take the best one, on 128 photos; below 2 they are left out.
        candidates: for each face, of which the encoder of the condition keeps the best, as `vultus generate --best-of`.
        cache: folder for the arrays computed from faces; None: `features` in the user's cache folder.
    """

    noises: Count = 2
    limit: Limit | None = None
    batch: Count = 32
    seed: Seed = 0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    noise_strength: NoiseStrength = 1.0
    best_of: int = 8
    candidates: Count = 1
    cache: Path | None = None

    @property
    def extraction(self) -> dict[str, Any]:
        """Keyword arguments of `extract`."""
        return {"batch": self.batch, "cache": self.cache or cache_folder() / "features", "device": self.device}

    def faces(self, snapshot: Snapshot, encoder: Encoder) -> GeneratedFaces:
        """The faces that the snapshot generates with these settings; `encoder` chooses them if there are candidates."""
        how: dict[str, Any] = {"seed": self.seed, "device": self.device, "dtype": self.dtype}
        how["noise_strength"] = self.noise_strength
        if self.candidates == 1:
            return GeneratedFaces(snapshot, **how)
        return ChosenFaces(snapshot, encoder=encoder, num=self.noises, best_of=self.candidates, **how)


def evaluate(
    snapshot: Snapshot,
    dataset: PreparedDataset,
    *,
    backbones: Backbones,
    other: PreparedDataset | None = None,
    settings: EvaluationSettings | None = None,
) -> dict[str, Any]:
    """Measure a generator on the people of `dataset`; the result can be written as JSON.

    Args:
        snapshot: the generator, on the device of the settings.
        dataset: a split of a prepared data set; "test" holds people that were never used in training.
        backbones: the networks to measure with; their encoder is the one that the data set was prepared with.
        other: the other split: it gives the distance between real photos, and (if it is "train") the photos that could
            be copied.
        settings: by default EvaluationSettings().

    Returns: `format`, `context` (how it was measured; `trained_on_this_data` is whether the snapshot was trained on
    this data set, None if it does not record that; `loss_encoders` are the face encoders in its losses), `metrics`
    ({metric: value, low, high and where they exist std, real}), `distributions` (histograms), `people` ({judge:
    [person, mean score, photos], best first}), `missing` ({metrics: reason}), `alarms`, `notes`.

    Raises UserError where snapshot, data set and encoder do not fit together, or there are fewer than 2 people.
    """
    settings = settings or EvaluationSettings()
    check_match(snapshot, dataset, backbones.encoder)
    chooser = backbones.encoder
    if settings.candidates > 1 and "facenet" in dataset.manifest:
        where = snapshot.path or "the snapshot"
        chooser = load_condition_encoder(snapshot.metadata, where, device=settings.device)
    result = evaluate_faces(
        settings.faces(snapshot, chooser),
        dataset,
        backbones=backbones,
        other=other,
        settings=settings,
        trained_on_this_data=trained_on(snapshot, dataset),
    )
    dtype = str(settings.dtype).removeprefix("torch.")
    in_loss = loss_encoders(snapshot.metadata)
    result["context"] |= {
        "cur_nimg": snapshot.metadata.get("cur_nimg"),
        "generator_dtype": dtype,
        "loss_encoders": in_loss,
    }
    judges = [judge.short for judge in backbones.judges]
    if judges and set(judges) <= set(in_loss):
        result["notes"].append(
            f"the losses of this snapshot contain {' and '.join(judges)}, so nobody judges it who is not part of its "
            f"training; add a --judge"
        )
    return result


def evaluate_faces(
    faces: FaceSet,
    dataset: PreparedDataset,
    *,
    backbones: Backbones,
    other: PreparedDataset | None = None,
    settings: EvaluationSettings | None = None,
    trained_on_this_data: bool | None = None,
) -> dict[str, Any]:
    """As `evaluate`, for any set of faces that belong to the photos of `dataset`.

    `trained_on_this_data`: whether the generator was trained on this data set; None if that is not known.
    """
    settings = settings or EvaluationSettings()
    start = time.perf_counter()
    check_settings(settings)
    rows = spread(len(dataset), settings.limit)
    identities = [dataset.identities[row] for row in rows]
    bootstrap = PersonBootstrap(identities, seed=settings.seed)
    split = dataset.split or "all"
    if bootstrap.count < 2:
        raise UserError(
            f"{dataset.folder}: {len(rows)} images of {bootstrap.count} person in split {split}; an evaluation needs 2 "
            f"people or more: prepare more photos or raise --limit"
        )
    notes: list[str] = []
    if dataset.manifest.get("identities") == ONE_PER_IMAGE:
        notes.append(
            "the data set names no identities, so every image counts as a person of its own; the people of the test "
            "split may be in the training data"
        )
    if settings.candidates > 1:
        drawn = settings.noises * settings.candidates
        notes.append(
            f"{backbones.short} chose {settings.noises} of {drawn} faces of each photo, so its own rows say what it "
            f"selected for, not how alike the faces are; see those of a judge"
        )
    _check_encoder(dataset, rows, backbones.encoder, settings, notes)
    work = _Evaluation(faces, dataset, other, rows, identities, bootstrap, backbones, settings)
    metrics, distributions, missing = _identity(work)
    people = {
        judge.short: scores.by_person(work.generated[judge.short], work.real[judge.short], identities, judge.similarity)
        for judge in backbones.judges
    }
    missing |= backbones.missing
    metrics |= _realism(work, missing, notes)
    metrics |= _reconstruction(work, missing)
    metrics |= _diversity(work, notes)
    encoder = backbones.short
    if other is not None and other.split == "train":
        embeddings = work.generated[encoder][:, 0]
        nearest, distributions["nearest"] = scores.memorization(
            encoder, embeddings, work.target, other.embeddings(column=other.facenet_column), bootstrap
        )
        metrics |= nearest
        if trained_on_this_data is False:
            notes.append(f"{', '.join(nearest)}: {OTHER_DATA}")
    judge, distance = (parts[0].short if parts else None for parts in (backbones.judges, backbones.perceptual))
    return {
        "format": VERSIONS["evaluation"],
        "context": planned_context(faces, dataset, backbones, settings, trained_on_this_data)
        | {
            "n_people": bootstrap.count,
            "intervals": f"{LEVEL:.0%}, people resampled {REPLICATES} times",
            "seconds": round(time.perf_counter() - start, 1),
        },
        "metrics": {name: row.to_dict() for name, row in metrics.items()},
        "distributions": distributions,
        "people": {judge: [list(entry) for entry in entries] for judge, entries in people.items()},
        "missing": missing,
        "alarms": find_alarms(
            metrics, encoder=encoder, judge=judge, perceptual=distance, copies=trained_on_this_data is not False
        ),
        "notes": notes,
    }


def planned_context(
    faces: FaceSet,
    dataset: PreparedDataset,
    backbones: Backbones,
    settings: EvaluationSettings,
    trained_on_this_data: bool | None = None,
) -> dict[str, Any]:
    """The part of the `context` of a result that is known before anything is measured."""
    return {
        "data_sha256": dataset.manifest["content_sha256"],
        "split": dataset.split or "all",
        **({"identities": dataset.manifest["identities"]} if "identities" in dataset.manifest else {}),
        "n_images": len(spread(len(dataset), settings.limit)),
        "n_split": len(dataset),
        "noises": settings.noises,
        "seed": settings.seed,
        "noise_strength": settings.noise_strength,
        "best_of": settings.candidates,
        **({"chosen_by": [backbones.short]} if settings.candidates > 1 else {}),
        "resolution": dataset.resolution,
        "device": str(settings.device),
        "networks": backbones.ids,
        "faces": faces.id,
        "trained_on_this_data": trained_on_this_data,
    }


def gap(train: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    """Training people minus unseen people, for every metric that both results have: {metric: value, low, high}."""
    both = train["metrics"], test["metrics"]
    pairs = {name: [_estimate(part[name]) for part in both] for name in both[0] if name in both[1]}
    return {name: difference(*pair).to_dict() for name, pair in pairs.items()}


def _estimate(row: dict[str, float]) -> Estimate:
    return Estimate(row["value"], row["low"], row["high"])


# --- checks -------------------------------------------------------------------------------------------------------


def check_settings(settings: EvaluationSettings) -> None:
    """Raise UserError that names the option for a value out of range."""
    hints = get_type_hints(EvaluationSettings, include_extras=True)
    for name in ("noises", "limit", "batch", "seed", "noise_strength"):
        checked(getattr(settings, name), hints[name], f"--{name}")
    checked(settings.candidates, hints["candidates"], "--best-of")
    check_candidates(settings.candidates, settings.noises)


@torch.inference_mode()
def _check_encoder(
    dataset: PreparedDataset, rows: np.ndarray, encoder: Encoder, settings: EvaluationSettings, notes: list[str]
) -> None:
    """Add a note if the encoder's embeddings of the stored photos differ from the stored embeddings."""
    some = rows[spread(len(rows), CHECKED)]
    columns = [vectors("check", encoder, 1)]
    embeddings = extract(RealFaces(), dataset, some, columns, **settings.extraction)["check"][:, 0]
    agreement = cosine(embeddings, dataset.embeddings(some, dataset.facenet_column)).mean().item()
    if agreement < 0.9:
        notes.append(
            f"the encoder's embeddings of the stored photos have a mean cosine of {agreement:.2f} to the stored "
            f"embeddings (0.99 is usual): these may come from another crop or encoder"
        )


# --- passes over the data ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluation:
    """What the parts of one evaluation share; arrays are computed at first use."""

    faces: FaceSet
    dataset: PreparedDataset
    other: PreparedDataset | None
    rows: np.ndarray
    identities: list[str]
    bootstrap: PersonBootstrap
    backbones: Backbones
    settings: EvaluationSettings

    @functools.cached_property
    def target(self) -> Tensor:
        """The encoder's embeddings of the photos, [N, D]."""
        return self.dataset.embeddings(self.rows, self.dataset.facenet_column)

    def extract(
        self, faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, columns: list[Column]
    ) -> dict[str, Tensor]:
        """`extract` with the settings of the evaluation."""
        return extract(faces, dataset, rows, columns, **self.settings.extraction)

    @functools.cached_property
    def generated(self) -> dict[str, Tensor]:
        """Every column of the generated faces, [N, K, D] each."""
        noises, parts = self.settings.noises, self.backbones
        columns = [vectors(parts.short, parts.encoder, noises)]
        columns += [vectors(judge.short, judge, noises) for judge in parts.judges]
        columns += [vectors(network.short, network, 1) for network in parts.features]
        columns += [pixels(noises), *(perceptual(network, noises) for network in parts.perceptual)]
        if noises > 1:
            columns.append(noise_pairs(parts.perceptual[0] if parts.perceptual else None, noises))
        return self.extract(self.faces, self.dataset, self.rows, columns)

    @functools.cached_property
    def real(self) -> dict[str, Tensor]:
        """Embeddings and features of the photos, [N, D] each."""
        networks: list[Any] = [*self.backbones.judges, *self.backbones.features]
        columns = [vectors(network.short, network, 1) for network in networks]
        arrays = self.extract(RealFaces(), self.dataset, self.rows, columns)
        return {name: array[:, 0] for name, array in arrays.items()}

    @functools.cached_property
    def natural(self) -> dict[str, Tensor]:
        """Pixel and perceptual differences between two photos of one person, [M, 1, D] each; empty without pairs."""
        others = OtherFaces(self.dataset)
        paired = self.rows[others.following[self.rows] >= 0]
        if not len(paired):
            return {}
        paired = paired[spread(len(paired), MAX_OTHER)]
        columns = [pixels(1), *(perceptual(network, 1) for network in self.backbones.perceptual)]
        return self.extract(others, self.dataset, paired, columns)


def _identity(work: _Evaluation) -> tuple[Rows, dict[str, Any], dict[str, str]]:
    rows: Rows = {}
    distributions: dict[str, Any] = {}
    missing: dict[str, str] = {}
    encoders: list[tuple[str, Similarity, Tensor]] = [(work.backbones.short, "cosine", work.target)]
    encoders += [(judge.short, judge.similarity, work.real[judge.short]) for judge in work.backbones.judges]
    for short, similarity, real in encoders:
        measured, distributions[short], lacking = scores.identity(
            short, similarity, work.generated[short], real, work.identities, work.bootstrap
        )
        rows |= measured
        missing |= lacking
    return rows, distributions, missing


def _realism(work: _Evaluation, missing: dict[str, str], notes: list[str]) -> Rows:
    networks = work.backbones.features
    if not networks:
        return {}
    if len(work.rows) < MIN_PHOTOS:
        missing["fd, kd, precision, recall"] = f"they need {MIN_PHOTOS} photos or more, there are {len(work.rows)}"
        return {}
    natural: dict[str, Tensor] = {}
    if work.other is not None and len(work.other) >= MIN_PHOTOS:
        some = spread(len(work.other), len(work.rows))
        columns = [vectors(network.short, network, 1) for network in networks]
        natural = {key: array[:, 0] for key, array in work.extract(RealFaces(), work.other, some, columns).items()}
    rows: Rows = {}
    for network in networks:
        short, split = network.short, work.dataset.split or "all"
        measured, remarks = scores.realism(
            short, split, work.generated[short][:, 0], work.real[short], natural.get(short), work.bootstrap
        )
        rows |= measured
        notes += remarks
    return rows


def _reconstruction(work: _Evaluation, missing: dict[str, str]) -> Rows:
    networks, settings, resolution = work.backbones.perceptual, work.settings, work.dataset.resolution
    names = {"pixels", *(network.short for network in networks)}
    errors = {name: array for name, array in work.generated.items() if name in names}
    rows = scores.reconstruction(errors, work.natural, work.bootstrap, resolution)
    if settings.best_of > 1 and settings.candidates > 1:
        missing[f"mse_best{settings.best_of} and the other rows _best{settings.best_of}"] = (
            "with --best-of the faces are chosen already"
        )
    elif settings.best_of > 1:
        best = spread(len(work.rows), MAX_BEST)
        columns = [pixels(settings.best_of), *(perceptual(network, settings.best_of) for network in networks)]
        errors = work.extract(work.faces, work.dataset, work.rows[best], columns)
        rows |= scores.reconstruction(errors, work.natural, work.bootstrap.part(best), resolution, best=True)
    return rows


def _diversity(work: _Evaluation, notes: list[str]) -> Rows:
    parts, generated = work.backbones, work.generated
    rows = scores.diversity(generated[parts.short][:, 0], work.target, work.bootstrap)
    if work.settings.noises < 2:
        notes.append("diversity_noise: left out, it needs 2 noises or more")
        return rows
    held = None
    if parts.judges:
        judge = parts.judges[0]
        held = scores.accepted(
            generated[judge.short], work.real[judge.short], work.identities, judge.similarity, scores.FARS[-1]
        )
    network = parts.perceptual[0] if parts.perceptual else None
    between = None
    if work.natural:
        rms = work.natural["pixels"][:, :, 0].sqrt()
        distance = work.natural[network.short][:, :, 0] if network else torch.full_like(rms, torch.nan)
        between = torch.stack([rms, distance], 2)
    short, pairs = network.short if network else None, pairs_of(work.settings.noises)
    return rows | scores.noise_diversity(generated[NOISE_PAIRS], pairs, held, between, short, work.bootstrap)

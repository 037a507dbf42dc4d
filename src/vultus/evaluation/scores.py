"""From arrays to metrics: every row of an evaluation as a function of the arrays that extract.py computed.

Pure functions: no network, no file; random numbers only where a metric is defined by random subsets, with a fixed seed.
docs/metrics.md says what each metric means, with its paper and how it reacts to worse faces. registry.py has the names.

Shape legend: generated [N, K, D], K faces of each of N photos; real [N, D], the photos; identities, the person of each
photo; `bootstrap` resamples these people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vultus.evaluation import metrics, registry
from vultus.evaluation.bootstrap import Estimate, PersonBootstrap
from vultus.evaluation.metrics import FeatureStatistics, FrechetReference, KernelPairs
from vultus.evaluation.verification import (
    Similarity,
    accepted_against_others,
    pair_scores,
    person_rows,
    ranks,
    row_scores,
    scores,
    threshold_at_far,
)

FARS = (1e-2, 1e-3)
COLLAPSE = 0.9  # cosine above which two faces of different embeddings count as one
MAX_PAIRED = 4000  # rows from which all pairs are formed: 8 million pairs, 100 to 400 MB
FD_REPLICATES = 20
KD_REPLICATES = 200
COPY_QUANTILE = 0.99

Rows = dict[str, Estimate]


def spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` rows evenly spread over `count`, or all. Neighbouring rows are often photos of one person."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


# --- identity -----------------------------------------------------------------------------------------------------


def identity(
    short: str,
    similarity: Similarity,
    generated: Tensor,
    real: Tensor,
    identities: Sequence[str],
    bootstrap: PersonBootstrap,
) -> tuple[Rows, dict[str, Any], dict[str, str]]:
    """Verification and identification of generated faces by one encoder.

    Args:
        short: the encoder in the names of the metrics.
        similarity: how it compares two embeddings.
        generated, real: its embeddings, [N, K, D] and [N, D].
        identities: the person of each photo.
        bootstrap: of these people.

    Returns: the metrics; histograms of the scores of same and different people, type I and type II, with the
    thresholds; and the metrics that could not be measured, with the reason.
    """
    rows: Rows = {}
    missing: dict[str, str] = {}
    thresholds: dict[str, float] = {}
    some = spread(len(real), MAX_PAIRED)
    same, different = pair_scores(real[some], [identities[row] for row in some], similarity)
    own = _own_scores(generated, real, similarity)
    paired = len(same) > 0
    rows[f"identity_{short}"] = _defined(bootstrap.mean(own, spread=True, real=same.mean().item() if paired else None))
    if not paired:
        missing[f"type2_{short}, rank1_{short}, rank5_{short}"] = "no person of this split has a second photo"
    for far in FARS:
        label = far_label(far)
        if len(different) * far < 1:
            reason = f"{len(different)} pairs of different people are too few for a false accept rate of {far:g}"
            missing[f"type1_{short}_far{label}, type2_{short}_far{label}"] = reason
            continue
        threshold = thresholds[label] = threshold_at_far(different, far)
        rows[f"type1_{short}_far{label}"] = _defined(bootstrap.mean(own > threshold))
        if paired:
            success = [
                accepted_against_others(generated[:, k], real, identities, similarity, threshold)
                for k in range(generated.shape[1])
            ]
            ceiling = (same > threshold).double().mean().item()
            _add(rows, f"type2_{short}_far{label}", bootstrap.mean(torch.stack(success, 1), real=ceiling))
    if paired:
        places = [ranks(generated[:, k], real, identities, similarity) for k in range(generated.shape[1])]
        both = torch.stack(places, 1), ranks(real, real, identities, similarity)
        for rank in (1, 5):
            hits, real_hits = (torch.where(place.isnan(), place, (place < rank).double()) for place in both)
            _add(rows, f"rank{rank}_{short}", bootstrap.mean(hits, real=real_hits.nanmean().item()))
    parts = {"same person": same, "different people": different, "generated, type I": own.flatten()}
    if paired:
        parts["generated, type II"] = _other_scores(generated[:, 0], real, identities, similarity)
    return rows, _histograms(parts) | {"thresholds": thresholds}, missing


def far_label(far: float) -> str:
    """A false accept rate as names of metrics have it: 1e-3."""
    return f"{far:.0e}".replace("e-0", "e-")


def by_person(
    generated: Tensor, real: Tensor, identities: Sequence[str], similarity: Similarity
) -> list[tuple[str, float, int]]:
    """(person, mean score of the faces against their source photos, photos), the best person first."""
    own = _own_scores(generated, real, similarity).mean(1)
    people = [
        (identities[int(rows[0])], round(own[rows].mean().item(), 4), len(rows)) for rows in person_rows(identities)
    ]
    return sorted(people, key=lambda entry: -entry[1])


def accepted(
    generated: Tensor, real: Tensor, identities: Sequence[str], similarity: Similarity, far: float
) -> Tensor | None:
    """Type I success of every face: bool [N, K]; None if there are too few pairs for that false accept rate."""
    some = spread(len(real), MAX_PAIRED)
    _, different = pair_scores(real[some], [identities[row] for row in some], similarity)
    if len(different) * far < 1:
        return None
    threshold = threshold_at_far(different, far)
    return _own_scores(generated, real, similarity) > threshold


def _defined(estimate: Estimate | None) -> Estimate:
    """For values that are never all undefined."""
    assert estimate is not None
    return estimate


def _add(rows: Rows, name: str, estimate: Estimate | None) -> None:
    if estimate is not None:
        rows[name] = estimate


def _own_scores(generated: Tensor, real: Tensor, similarity: Similarity) -> Tensor:
    """The score of every face against its source photo, [N, K]."""
    return torch.stack([row_scores(generated[:, k], real, similarity) for k in range(generated.shape[1])], 1)


def _other_scores(generated: Tensor, real: Tensor, identities: Sequence[str], similarity: Similarity) -> Tensor:
    """The scores of every face [N, D] against the other photos of its person, [P]."""
    parts = []
    for rows in person_rows(identities):
        matrix = scores(generated[rows], real[rows], similarity)
        parts.append(matrix[~torch.eye(len(rows), dtype=torch.bool)])
    return torch.cat(parts)


def _histograms(parts: dict[str, Tensor], bins: int = 80) -> dict[str, Any]:
    """Densities of several sets of scores over the same bins."""
    low = min(values.min().item() for values in parts.values() if len(values))
    high = max(values.max().item() for values in parts.values() if len(values))
    high = high if high > low else low + 1e-6
    edges = np.linspace(low, high, bins + 1)
    histograms: dict[str, Any] = {"edges": [round(edge, 5) for edge in edges.tolist()]}
    for name, values in parts.items():
        if len(values):
            density, _ = np.histogram(values.numpy(), edges, density=True)
            histograms[name] = [round(value, 5) for value in density.tolist()]
    return histograms


# --- realism ------------------------------------------------------------------------------------------------------


def realism(
    short: str, split: str, generated: Tensor, real: Tensor, other: Tensor | None, bootstrap: PersonBootstrap
) -> tuple[Rows, list[str]]:
    """Distances between distributions, fidelity and coverage in the features of one network; and notes on small N.

    Args:
        short: the network in the names of the metrics; those of `inception` are called FID and KID.
        split: of the data set, in the names of the metrics.
        generated, real: features [N, D], one face of each photo.
        other: features of real photos of other people, for the values that a perfect generator would reach.
        bootstrap: of the people of the photos.
    """
    count, dim = real.shape
    fd, kd = ("fid", "kid") if short == "inception" else (f"fd_{short}", f"kd_{short}")
    fd, kd = f"{fd}_{count}_{split}", f"{kd}_{count}_{split}"
    rows: Rows = {}
    reference = FrechetReference(*_normal(real))
    floor = None if other is None else reference.distance(*_normal(other))
    mean, cov = _normal(generated)
    rows[fd] = bootstrap.statistic(
        reference.distance(mean, cov),
        lambda weights: reference.distance_of(generated, weights),
        replicates=FD_REPLICATES,
        real=floor,
    )
    some = spread(count, MAX_PAIRED)
    a, b = generated[some], real[some]
    pairs = KernelPairs(a, b)
    value, std = pairs.subsets()
    draws = bootstrap.draws[:KD_REPLICATES][:, bootstrap.codes[some]]
    half = 1.96 * pairs.distances(draws, draws).std().item()
    c = None if other is None else other[spread(len(other), MAX_PAIRED)]
    rows[kd] = Estimate(value, value - half, value + half, std, None if c is None else KernelPairs(c, b).subsets()[0])
    resampled = bootstrap.part(some)
    for names, function in (
        ((f"precision_{short}", f"recall_{short}"), metrics.precision_recall),
        ((f"density_{short}", f"coverage_{short}"), metrics.density_coverage),
    ):
        ceilings = [None, None] if c is None else [part.mean().item() for part in function(c, b)]
        for name, values, ceiling in zip(names, function(a, b), ceilings, strict=True):
            rows[name] = _defined(resampled.mean(values, real=ceiling))
    notes = []
    if count <= dim:
        notes.append(
            f"{fd}: {count} images give singular covariances of {dim} features; the distance is biased "
            f"upwards, the more the fewer the images (arXiv:1911.07023): compare it at this N only"
        )
    return rows, notes


def _normal(features: Tensor) -> tuple[Tensor, Tensor]:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(metrics.BLOCK):
        statistics.update(part)
    return statistics.mean, statistics.cov


# --- reconstruction -------------------------------------------------------------------------------------------------


def reconstruction(
    generated: dict[str, Tensor],
    other: dict[str, Tensor],
    bootstrap: PersonBootstrap,
    resolution: int,
    *,
    best: bool = False,
) -> Rows:
    """Errors against the source photo: the mean over noises, or with `best` that of the best noise by each metric.

    Args:
        generated: `pixels` [N, K, 2] and perceptual distances [N, K, 1] by their names.
        other: the same between two photos of one person, for what another photo of the person would have.
        bootstrap: of the people of the photos.
        resolution: of the images in pixels; it limits the scales of MS-SSIM.
    """
    scales = metrics.ms_ssim_scales(resolution)
    structure = "ms_ssim" if scales == len(metrics.SCALE_WEIGHTS) else f"ms_ssim_{scales}"
    suffix = f"_best{next(iter(generated.values())).shape[1]}" if best else ""
    errors: list[tuple[str, tuple[Tensor, Tensor | None]]] = [
        ("mse", _values(generated, other, "pixels", 0)),
        ("psnr", _values(generated, other, "pixels", 0, metrics.decibel)),
        (structure, _values(generated, other, "pixels", 1)),
        *((key, _values(generated, other, key, 0)) for key in generated if key != "pixels"),
    ]
    rows: Rows = {}
    for name, (values, natural) in errors:
        if best:
            metric = registry.find(name)
            higher = metric is not None and metric.family.direction == "higher"
            values = values.amax(1) if higher else values.amin(1)
        real = None if natural is None or best else natural.mean().item()
        rows[name + suffix] = _defined(bootstrap.mean(values, spread=True, real=real))
    return rows


def _values(
    generated: dict[str, Tensor],
    other: dict[str, Tensor],
    name: str,
    place: int,
    change: Callable[[Tensor], Tensor] = abs,
) -> tuple[Tensor, Tensor | None]:
    """One value of every face [N, K], and of other photos [M, 1] or None, in float64."""
    values, natural = (part[name][:, :, place].double() if name in part else None for part in (generated, other))
    assert values is not None
    return change(values), None if natural is None else change(natural)


# --- diversity ----------------------------------------------------------------------------------------------------


def diversity(embeddings: Tensor, target: Tensor, bootstrap: PersonBootstrap) -> Rows:
    """Diversity between faces of different embeddings, and the share of near-equal pairs, a sign of collapse.

    Args:
        embeddings: [N, D] of generated faces.
        target: [N, D], the embeddings that they were generated from.
        bootstrap: of the people of the photos.
    """
    some = spread(len(embeddings), MAX_PAIRED)
    draws = bootstrap.draws[:KD_REPLICATES][:, bootstrap.codes[some]]
    natural = metrics.pair_cosines(target[some]).double()
    natural_mean, natural_share = natural.mean().item(), (natural > COLLAPSE).double().mean().item()
    unit = torch.nn.functional.normalize(embeddings[some].float(), dim=1)
    cosines = unit @ unit.T
    rows: Rows = {}
    for name, matrix, real in (
        ("diversity_identity", 1 - cosines, 1 - natural_mean),
        (f"pairs_above_{COLLAPSE}", (cosines > COLLAPSE).float(), natural_share),
    ):
        matrix = matrix.fill_diagonal_(0).double()
        ones = torch.ones(1, len(some), dtype=torch.float64)
        value = _pair_mean(matrix, ones)[0].item()
        replicates = _pair_mean(matrix, draws)
        low, high = torch.quantile(replicates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        rows[name] = Estimate(value, low, high, None, real)
    return rows


def _pair_mean(matrix: Tensor, weights: Tensor) -> Tensor:
    """Mean of matrix[i, j] over i != j with rows counted `weights` [B, N] times: [B]."""
    return ((weights @ matrix) * weights).sum(1) / (weights.sum(1).square() - weights.square().sum(1))


def noise_diversity(
    differences: Tensor,
    pairs: Sequence[tuple[int, int]],
    held: Tensor | None,
    other: Tensor | None,
    short: str | None,
    bootstrap: PersonBootstrap,
) -> Rows:
    """Diversity between faces of one embedding with different noise; 0 where the noise has no effect.

    Args:
        differences: [N, pairs, 2], RMS and perceptual distance (NaN without a network) of each pair of faces.
        pairs: the two noises of each pair.
        held: bool [N, K], whether the judge accepts each face as the person of the photo. In
            `diversity_noise_<short>_held` a pair counts as 0 unless both are accepted: noise that changes the identity
            is not diversity.
        other: [M, 1, 2], the same between two real photos of one person.
        short: name of the perceptual distance.
        bootstrap: of the people of the photos.
    """
    rows: Rows = {}
    natural = [None, None] if other is None else [part.nanmean().item() for part in other[:, 0].T]
    for place, name in ((0, "rms"), (1, short)):
        if name is not None:
            _add(rows, f"diversity_noise_{name}", bootstrap.mean(differences[:, :, place], real=natural[place]))
    if short is not None and held is not None:
        both = torch.stack([held[:, i] & held[:, j] for i, j in pairs], 1)
        rows[f"diversity_noise_{short}_held"] = _defined(bootstrap.mean(differences[:, :, 1] * both, real=natural[1]))
    return rows


# --- memorization -------------------------------------------------------------------------------------------------


def memorization(
    short: str, generated: Tensor, target: Tensor, train: Tensor, bootstrap: PersonBootstrap
) -> tuple[Rows, dict[str, Any]]:
    """The nearest training photo of every generated face, against that of real faces of unseen people.

    Args:
        short: the encoder in the names of the metrics.
        generated: embeddings [N, D] of generated faces.
        target: embeddings [N, D] of the photos of unseen people that they were generated from.
        train: embeddings [M, D] of all training photos.
        bootstrap: of the unseen people.

    Returns: `nearest_train_<short>`, the mean cosine to the nearest training photo; `copied_<short>`, the share of
    generated faces that are nearer to one than all but 1 % of real unseen faces are; histograms of both cosines.
    """
    cosines, _ = metrics.nearest(generated, train)
    natural, _ = metrics.nearest(target, train)
    limit = torch.quantile(natural.double(), COPY_QUANTILE)
    near = bootstrap.mean(cosines, real=natural.mean().item(), spread=True)
    copied = bootstrap.mean(cosines > limit, real=(natural > limit).double().mean().item())
    rows = {f"nearest_train_{short}": _defined(near), f"copied_{short}": _defined(copied)}
    return rows, _histograms({"real unseen faces": natural, "generated": cosines})

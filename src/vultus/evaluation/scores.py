"""From arrays to figures: every row of an evaluation as a function of what was measured on faces.

Pure functions: no network, no file; random numbers only where a figure is defined by random subsets, with a fixed seed.
What each row means, with its paper and how it moves when faces get worse, is in docs/metrics.md.

Shape legend: made [N, K, D], K faces of each of N photos; real [N, D], the photos; rows belong to `people.codes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vultus.evaluation import metrics
from vultus.evaluation.bootstrap import Estimate, PersonBootstrap
from vultus.evaluation.metrics import FeatureStatistics, FrechetReference, KernelPairs
from vultus.evaluation.verification import (
    Similarity,
    accepted_against_others,
    groups,
    pair_scores,
    ranks,
    row_scores,
    scores,
    threshold_at_far,
)

FARS = (1e-2, 1e-3)
COLLAPSE = 0.9  # cosine above which two faces of different embeddings count as one
MAX_PAIRED = 4000  # rows of which all pairs are formed: 8 million pairs, 100 to 400 MB
FD_REPLICATES = 20
KD_REPLICATES = 200
COPY_QUANTILE = 0.99

Rows = dict[str, Estimate]


def spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` rows evenly spread over `count`, or of all. Neighbours are often photos of one person."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


# --- identity -----------------------------------------------------------------------------------------------------


def identity(
    short: str, similarity: Similarity, made: Tensor, real: Tensor, names: Sequence[str], people: PersonBootstrap
) -> tuple[Rows, dict[str, Any], dict[str, str]]:
    """Verification and identification of made faces by one encoder.

    Args:
        short: the encoder in the names of the rows.
        made, real: its embeddings.
        names: the person of each row.

    Returns: the rows; histograms of the scores of same and different people, type I and type II, with the thresholds;
    and what could not be measured, with the reason.
    """
    rows: Rows = {}
    missing: dict[str, str] = {}
    thresholds: dict[str, float] = {}
    some = spread(len(real), MAX_PAIRED)
    same, different = pair_scores(real[some], [names[row] for row in some], similarity)
    own = _own_scores(made, real, similarity)
    second = len(same) > 0
    row = people.mean(own, spread=True, real=same.mean().item() if second else None)
    assert row is not None
    rows[f"identity_{short}"] = row
    if not second:
        missing[f"type2_{short}, rank1_{short}, rank5_{short}"] = "no person of this split has a second photo"
    for far in FARS:
        label = f"{short}_far{far:.0e}".replace("e-0", "e-")
        if len(different) * far < 1:
            reason = f"{len(different)} pairs of different people are too few for a false accept rate of {far:g}"
            missing[f"type1_{label}, type2_{label}"] = reason
            continue
        threshold = thresholds[label.partition("far")[2]] = threshold_at_far(different, far)
        real_rate = (same > threshold).double().mean().item() if second else None
        accepted = people.mean(own > threshold)
        assert accepted is not None
        rows[f"type1_{label}"] = accepted
        if second:
            against = [
                accepted_against_others(made[:, k], real, names, similarity, threshold) for k in range(made.shape[1])
            ]
            found = people.mean(torch.stack(against, 1), real=real_rate)
            if found is not None:
                rows[f"type2_{label}"] = found
    if second:
        place = torch.stack([ranks(made[:, k], real, names, similarity) for k in range(made.shape[1])], 1)
        natural = ranks(real, real, names, similarity)
        for rank in (1, 5):
            hit, ceiling = (torch.where(p.isnan(), p, (p < rank).double()) for p in (place, natural))
            found = people.mean(hit, real=ceiling.nanmean().item())
            if found is not None:
                rows[f"rank{rank}_{short}"] = found
    parts = {"same person": same, "different people": different, "generated, type I": own.flatten()}
    if second:
        parts["generated, type II"] = _against_others(made[:, 0], real, names, similarity)
    return rows, _histograms(parts) | {"thresholds": thresholds}, missing


def by_person(made: Tensor, real: Tensor, names: Sequence[str], similarity: Similarity) -> list[tuple[str, float, int]]:
    """(person, mean score of the faces against their very photos, photos), the best person first."""
    own = _own_scores(made, real, similarity).mean(1)
    found = [(names[int(rows[0])], round(own[rows].mean().item(), 4), len(rows)) for rows in groups(names)]
    return sorted(found, key=lambda entry: -entry[1])


def accepted(made: Tensor, real: Tensor, names: Sequence[str], similarity: Similarity, far: float) -> Tensor | None:
    """Type I success of every face: bool [N, K]; None if there are too few pairs for that false accept rate."""
    some = spread(len(real), MAX_PAIRED)
    _, different = pair_scores(real[some], [names[row] for row in some], similarity)
    if len(different) * far < 1:
        return None
    threshold = threshold_at_far(different, far)
    return _own_scores(made, real, similarity) > threshold


def _own_scores(made: Tensor, real: Tensor, similarity: Similarity) -> Tensor:
    """The score of every face against its very photo, [N, K]."""
    return torch.stack([row_scores(made[:, k], real, similarity) for k in range(made.shape[1])], 1)


def _against_others(made: Tensor, real: Tensor, names: Sequence[str], similarity: Similarity) -> Tensor:
    found = []
    for rows in groups(names):
        matrix = scores(made[rows], real[rows], similarity)
        found.append(matrix[~torch.eye(len(rows), dtype=torch.bool)])
    return torch.cat(found)


def _histograms(parts: dict[str, Tensor], bins: int = 80) -> dict[str, Any]:
    """Densities of several sets of scores over the same bins."""
    low = min(values.min().item() for values in parts.values() if len(values))
    high = max(values.max().item() for values in parts.values() if len(values))
    high = high if high > low else low + 1e-6
    edges = np.linspace(low, high, bins + 1)
    found: dict[str, Any] = {"edges": [round(edge, 5) for edge in edges.tolist()]}
    for name, values in parts.items():
        if len(values):
            density, _ = np.histogram(values.numpy(), edges, density=True)
            found[name] = [round(value, 5) for value in density.tolist()]
    return found


# --- realism ------------------------------------------------------------------------------------------------------


def realism(
    short: str, split: str, made: Tensor, real: Tensor, other: Tensor | None, people: PersonBootstrap
) -> tuple[Rows, list[str]]:
    """Distances of distributions, fidelity and coverage in the features of one network; and what N means for them.

    Args:
        short: the network in the names of the rows; `inception` gives FID and KID their names.
        made, real: features [N, D], one face of each photo.
        other: features of real photos of other people, the floor that a perfect generator would reach.
    """
    count, dim = real.shape
    fd, kd = ("fid", "kid") if short == "inception" else (f"fd_{short}", f"kd_{short}")
    fd, kd = f"{fd}_{count}_{split}", f"{kd}_{count}_{split}"
    rows: Rows = {}
    reference = FrechetReference(*_normal(real))
    floor = None if other is None else reference.distance(*_normal(other))
    mean, cov = _normal(made)
    rows[fd] = people.statistic(
        reference.distance(mean, cov),
        lambda weights: reference.distance_of(made, weights),
        replicates=FD_REPLICATES,
        real=floor,
    )
    some = spread(count, MAX_PAIRED)
    a, b = made[some], real[some]
    pairs = KernelPairs(a, b)
    value, std = pairs.subsets()
    draws = people.draws[:KD_REPLICATES][:, people.codes[some]]
    half = 1.96 * pairs.distances(draws, draws).std().item()
    c = None if other is None else other[spread(len(other), MAX_PAIRED)]
    rows[kd] = Estimate(value, value - half, value + half, std, None if c is None else KernelPairs(c, b).subsets()[0])
    resampled = people.part(some)
    for names, function in (
        ((f"precision_{short}", f"recall_{short}"), metrics.precision_recall),
        ((f"density_{short}", f"coverage_{short}"), metrics.density_coverage),
    ):
        natural = [None, None] if c is None else [part.mean().item() for part in function(c, b)]
        for name, values, ceiling in zip(names, function(a, b), natural, strict=True):
            found = resampled.mean(values, real=ceiling)
            assert found is not None
            rows[name] = found
    notes = []
    if count <= dim:
        notes.append(
            f"{fd}: {count} images give singular covariances of {dim} features; the distance comes out too large, by "
            f"more the fewer the images (arXiv:1911.07023): compare it at this N only"
        )
    return rows, notes


def _normal(features: Tensor) -> tuple[Tensor, Tensor]:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(metrics.BLOCK):
        statistics.update(part)
    return statistics.mean, statistics.cov


# --- reconstruction -------------------------------------------------------------------------------------------------


def reconstruction(
    made: dict[str, Tensor], other: dict[str, Tensor], people: PersonBootstrap, side: int, *, best: bool = False
) -> Rows:
    """Errors against the very photo: the mean over noises, or with `best` of the best noise by each measure.

    Args:
        made: `pixels` [N, K, 2] and perceptual distances [N, K, 1] by their names.
        other: the same between two photos of one person, what a different picture of the person would have.
        side: of the pictures in pixels; it decides how many scales MS-SSIM has.
    """
    scales = metrics.ms_ssim_scales(side)
    structure = "ms_ssim" if scales == len(metrics.SCALE_WEIGHTS) else f"ms_ssim_{scales}"
    suffix = f"_best{next(iter(made.values())).shape[1]}" if best else ""
    measures: list[tuple[str, Plane, bool]] = [
        ("mse", _plane(made, other, "pixels", 0), True),
        ("psnr", _plane(made, other, "pixels", 0, metrics.decibel), False),
        (structure, _plane(made, other, "pixels", 1), False),
        *((key, _plane(made, other, key, 0), True) for key in made if key != "pixels"),
    ]
    rows: Rows = {}
    for name, (values, natural), lower in measures:
        if best:
            values = values.amin(1) if lower else values.amax(1)
        real = None if natural is None or best else natural.mean().item()
        found = people.mean(values, spread=True, real=real)
        assert found is not None
        rows[name + suffix] = found
    return rows


Plane = tuple[Tensor, Tensor | None]


def _plane(
    made: dict[str, Tensor], other: dict[str, Tensor], name: str, place: int, change: Callable[[Tensor], Tensor] = abs
) -> Plane:
    """One value of every face, made [N, K] and of other photos [M, 1] (or None), in float64."""
    mine, natural = (part[name][:, :, place].double() if name in part else None for part in (made, other))
    assert mine is not None
    return change(mine), None if natural is None else change(natural)


# --- diversity ----------------------------------------------------------------------------------------------------


def diversity(embeddings: Tensor, asked: Tensor, people: PersonBootstrap) -> Rows:
    """Between faces of different embeddings, [N, D] each: the reference systems' own score, and a sign of collapse."""
    some = spread(len(embeddings), MAX_PAIRED)
    draws = people.draws[:KD_REPLICATES][:, people.codes[some]]
    natural = [metrics.pair_cosines(asked[some]).double()]
    natural_mean, natural_share = natural[0].mean().item(), (natural[0] > COLLAPSE).double().mean().item()
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
    apart: Tensor,
    pairs: Sequence[tuple[int, int]],
    held: Tensor | None,
    other: Tensor | None,
    short: str | None,
    people: PersonBootstrap,
) -> Rows:
    """Between faces of one embedding with different noise; zero is noise ignored.

    Args:
        apart: [N, pairs, 2], RMS and perceptual distance (NaN without a network).
        held: bool [N, K], whether the judge accepts each face as the person of the photo. A pair counts for
            `diversity_noise_<short>_held` only if both are accepted, as 0 otherwise: noise that changes who it is
            is no gain.
        other: [M, 1, 2], the same between two real photos of one person.
        short: name of the perceptual distance.
    """
    rows: Rows = {}
    natural = [None, None] if other is None else [part.nanmean().item() for part in other[:, 0].T]
    for place, name in ((0, "rms"), (1, short)):
        if name is None:
            continue
        found = people.mean(apart[:, :, place], real=natural[place])
        if found is not None:
            rows[f"diversity_noise_{name}"] = found
    if short is not None and held is not None:
        both = torch.stack([held[:, i] & held[:, j] for i, j in pairs], 1)
        found = people.mean(apart[:, :, 1] * both, real=natural[1])
        assert found is not None
        rows[f"diversity_noise_{short}_held"] = found
    return rows


# --- honesty ------------------------------------------------------------------------------------------------------


def copies(
    short: str, made: Tensor, asked: Tensor, train: Tensor, people: PersonBootstrap
) -> tuple[Rows, dict[str, Any]]:
    """Does it copy? The nearest training face of every made one, against that of real faces of unseen people.

    Args:
        made: embeddings [N, D] of made faces; asked: of the photos of unseen people; train: of all training photos.

    Returns: `nearest_train_<short>`, the mean cosine to the nearest training photo; `copied_<short>`, the share of made
    faces that are nearer to one than all but 1 % of real unseen faces are; histograms of both cosines.
    """
    mine, _ = metrics.nearest(made, train)
    natural, _ = metrics.nearest(asked, train)
    limit = torch.quantile(natural.double(), COPY_QUANTILE)
    near = people.mean(mine, real=natural.mean().item(), spread=True)
    copied = people.mean(mine > limit, real=(natural > limit).double().mean().item())
    assert near is not None
    assert copied is not None
    rows = {f"nearest_train_{short}": near, f"copied_{short}": copied}
    return rows, _histograms({"real unseen faces": natural, "generated": mine})


def alarms(rows: Rows, *, encoder: str, judge: str | None, perceptual: str | None) -> list[str]:
    """What a reader must not miss: collapse, idle noise, a fooled encoder, copies. Each names its figures."""
    found = []

    def natural(name: str) -> tuple[float, float] | None:
        row = rows.get(name)
        return None if row is None or row.real is None else (row.value, row.real)

    share = natural(f"pairs_above_{COLLAPSE}")
    if share and share[0] > 0.01 + 2 * share[1]:
        found.append(f"collapse: {share[0]:.1%} of faces of different embeddings look like one (real: {share[1]:.1%})")
    varied = natural("diversity_identity")
    if varied and varied[0] < 0.5 * varied[1]:
        found.append(
            f"collapse: faces of different people are alike, diversity {varied[0]:.2f} (real: {varied[1]:.2f})"
        )
    for row in (name for name in rows if name.startswith("recall_")):
        limits = natural(row)
        if limits and limits[0] < 0.02 < 0.1 < limits[1]:
            found.append(f"collapse: {row} {limits[0]:.3f}, hardly a real face lies among the made ones")
    noise = natural(f"diversity_noise_{perceptual}") or natural("diversity_noise_rms")
    if noise and noise[0] < 0.1 * noise[1]:
        found.append(
            f"idle noise: faces of one embedding differ by {noise[0]:.3f}, photos of one person by {noise[1]:.3f}"
        )
    far = f"far{FARS[-1]:.0e}".replace("e-0", "e-")
    theirs, ours = rows.get(f"type1_{encoder}_{far}"), rows.get(f"type1_{judge}_{far}")
    if theirs and ours and theirs.value > 0.2 and ours.value < 0.5 * theirs.value:
        found.append(
            f"{encoder} flatters: it accepts {theirs.value:.0%} of the faces as the person, {judge} {ours.value:.0%}"
        )
    copied = rows.get(f"copied_{encoder}")
    if copied and copied.low > 0.05:
        found.append(f"copies: {copied.value:.0%} of the faces are nearer to a training photo than 99 % of real faces")
    return found

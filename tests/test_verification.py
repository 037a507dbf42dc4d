"""Verification against brute force, and intervals against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vultus.evaluation.bootstrap import REPLICATES, Estimate, PersonBootstrap, difference
from vultus.evaluation.verification import (
    Similarity,
    accepted_against_others,
    pair_scores,
    ranks,
    row_scores,
    scores,
    threshold_at_far,
)


def crowd(
    people: int = 12, photos: int = 5, dim: int = 16, noise: float = 0.6, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """Embeddings around a centre for each person, in shuffled order."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, dim, generator=random)
    rows = centres.repeat_interleave(photos, 0) + noise * torch.randn(people * photos, dim, generator=random)
    order = torch.randperm(len(rows), generator=random)
    return rows[order], [f"p{int(place) // photos:02d}" for place in order]


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_pair_scores_are_every_pair_once(similarity: Similarity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vultus.evaluation.verification._BLOCK", 7)
    rows, people = crowd()
    same, different = pair_scores(rows, people, similarity)
    expected: dict[bool, list[float]] = {True: [], False: []}
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            expected[people[i] == people[j]].append(row_scores(rows[i : i + 1], rows[j : j + 1], similarity).item())
    assert sorted(same.tolist()) == pytest.approx(sorted(expected[True]), abs=1e-5)
    assert sorted(different.tolist()) == pytest.approx(sorted(expected[False]), abs=1e-5)
    assert len(same) == 12 * 10
    with pytest.raises(ValueError, match="60 embeddings, but 59 identities"):
        pair_scores(rows, people[1:], similarity)


def test_a_larger_score_is_more_alike() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert scores(a, a, "cosine").tolist() == [[1, 0], [0, 1]]
    assert scores(a, a, "euclidean")[0].tolist() == pytest.approx([0, -math.sqrt(5)])


def test_threshold_has_the_rate_it_is_named_for() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    for far in (1e-2, 1e-3):
        threshold = threshold_at_far(values, far)
        assert (values > threshold).double().mean().item() == pytest.approx(far, rel=1e-9)
    tied = torch.tensor([0.0] * 900 + [1.0] * 100)
    assert (tied > threshold_at_far(tied, 0.05)).double().mean() <= 0.05  # never more than asked for
    assert threshold_at_far(torch.ones(10), 1.0) == float("-inf")
    with pytest.raises(ValueError, match="needs 1000 pairs or more, not 999"):
        threshold_at_far(values[:999], 1e-3)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_type_ii_and_ranks_by_brute_force(similarity: Similarity) -> None:
    rows, people = crowd(noise=1.5)
    rows, people = torch.cat([rows, torch.randn(1, 16)]), [*people, "alone"]
    made = rows + torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    threshold = -8.0 if similarity == "euclidean" else 0.4
    found = accepted_against_others(made, rows, people, similarity, threshold)
    place = ranks(made, rows, people, similarity)
    assert found[-1].isnan()
    assert place[-1].isnan()
    unit = torch.nn.functional.normalize(rows, dim=1) if similarity == "cosine" else rows
    for i in range(len(rows) - 1):
        others = [j for j in range(len(rows)) if people[j] == people[i] and j != i]
        share = np.mean([row_scores(made[i : i + 1], rows[j : j + 1], similarity).item() > threshold for j in others])
        assert found[i].item() == pytest.approx(share)
        gallery = {}
        for name in set(people):
            mine = [j for j in range(len(rows)) if people[j] == name and j != i]
            gallery[name] = row_scores(made[i : i + 1], unit[mine].mean(0, keepdim=True), similarity).item()
        better = sum(value >= gallery[people[i]] for name, value in gallery.items() if name != people[i])
        assert place[i].item() == better
    assert 0 < found.nanmean() < 1
    assert 0 < (place == 0).double().mean() < 1


def test_the_source_photo_is_not_in_the_gallery() -> None:
    """A probe equal to its source photo is not identified by it: people whose photos differ are not recognised."""
    rows, people = (
        torch.randn(60, 64, generator=torch.Generator().manual_seed(0)),
        [f"p{i % 20:02d}" for i in range(60)],
    )
    assert (ranks(rows, rows, people, "cosine") == 0).double().mean() < 0.3


# --- intervals --------------------------------------------------------------------------------------------------------


def test_people_are_resampled_not_photos() -> None:
    """Ten copies of each person's value hold no more information than one: the interval must not shrink."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=random)
    names = [f"p{i}" for i in range(50)]
    one = PersonBootstrap(names).mean(values)
    ten = PersonBootstrap([name for name in names for _ in range(10)]).mean(values.repeat_interleave(10))
    assert one is not None
    assert ten is not None
    assert ten.value == pytest.approx(one.value)
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))
    half = 1.96 * values.std().item() / math.sqrt(50)
    assert one.high - one.low == pytest.approx(2 * half, rel=0.15)


def test_intervals_cover_the_truth() -> None:
    """Of 200 samples with mean 0, the 95 % interval holds 0 in some 95 %."""
    random = torch.Generator().manual_seed(1)
    hits = 0
    for sample in range(200):
        effects = torch.randn(60, 1, generator=random) + torch.randn(60, 4, generator=random)
        found = PersonBootstrap([f"p{i}" for i in range(60) for _ in range(4)], seed=sample).mean(effects.flatten())
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_undefined_values_are_left_out() -> None:
    people = PersonBootstrap(["a", "a", "b", "c"])
    found = people.mean(torch.tensor([1.0, 3.0, float("nan"), 5.0]), spread=True, real=2.0)
    assert found is not None
    assert found.value == 3
    assert found.std == pytest.approx(math.sqrt(8 / 3))
    assert found.to_dict()["real"] == 2
    assert people.mean(torch.full((4,), float("nan"))) is None
    several = people.mean(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]))
    assert several == Estimate(1.5, 1.5, 1.5)


def test_a_statistic_keeps_its_value_and_takes_the_spread() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(2))
    people = PersonBootstrap([f"p{i}" for i in range(300)])
    found = people.statistic(5.0, lambda w: float((w @ values.double()) / w.sum()) + 100, replicates=200)
    assert found.value == 5
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std().item() / math.sqrt(300), rel=0.15)
    assert people.draws.shape == (REPLICATES, 300)
    assert people.draws.sum(1).unique().tolist() == [300]
    part = people.part(np.array([3, 5]))
    assert torch.equal(part.weights(0), people.weights(0)[[3, 5]])


def test_difference_adds_in_squares() -> None:
    found = difference(Estimate(10, 7, 13), Estimate(4, 0, 8))
    assert (found.value, found.low, found.high) == (6, 1, 11)

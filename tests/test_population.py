"""Random people: a function of (seed, index), spread as the embeddings that they were fitted to."""

import pytest
import torch
import torch.nn.functional as F

from vultus.errors import UserError
from vultus.sampling.population import fit_population, noise, sample_identities, slerp


def embeddings(count: int, dim: int = 512, seed: int = 0) -> torch.Tensor:
    """Unit vectors with a common direction and very different spreads per axis, as face embeddings have."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 2, dim)
    return F.normalize(torch.randn(count, dim, generator=random) * spread + 0.15, dim=1)


def mean_cosine(x: torch.Tensor) -> float:
    """Of two different rows."""
    total = x.sum(0).square().sum() - len(x)
    return float(total / len(x) / (len(x) - 1))


def test_samples_have_the_mean_and_spread_of_the_embeddings() -> None:
    real = embeddings(4000)
    drawn = sample_identities(fit_population(real), 4000, seed=0)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(4000))
    assert mean_cosine(drawn) == pytest.approx(mean_cosine(real), abs=2e-3)
    # 4,000 samples know a variance to 3 % each; five times that for the worst of 512.
    ratio = drawn.var(0) / real.var(0)
    assert ratio.mean() == pytest.approx(1, abs=0.01)
    assert float((ratio[50:] - 1).abs().max()) < 0.16


def test_person_depends_on_seed_and_index_alone() -> None:
    people = fit_population(embeddings(300))
    many = sample_identities(people, 150, seed=5)
    for start, count in ((0, 1), (63, 1), (64, 1), (60, 10), (149, 1), (1, 149)):
        assert torch.equal(sample_identities(people, count, seed=5, start=start), many[start : start + count])
    assert not torch.equal(sample_identities(people, 1, seed=6), many[:1])
    far = sample_identities(people, 2, seed=5, start=10**9)
    assert torch.equal(far[1:], sample_identities(people, 1, seed=5, start=10**9 + 1))
    assert sample_identities(people, 0, seed=5).shape == (0, 512)


def test_fit_does_not_depend_on_chunks_and_takes_two_rows() -> None:
    real = embeddings(700)
    whole, chunked = fit_population(real), fit_population(iter(real.split(33)))
    torch.testing.assert_close(chunked["mean"], whole["mean"])
    torch.testing.assert_close(chunked["factor"] @ chunked["factor"].T, whole["factor"] @ whole["factor"].T)
    two = sample_identities(fit_population(real[:2]), 50, seed=0)
    assert torch.isfinite(two).all()
    # Not the same face again and again, and not a line between the two.
    assert torch.linalg.matrix_rank(two, rtol=1e-3) == 50
    for few in (real[:1], real[:1].expand(5, -1), real[:0]):
        with pytest.raises(UserError, match="two different"):
            fit_population(few)


def clusters(count: int, seed: int) -> torch.Tensor:
    """Embeddings in 24 of 64 directions that crowd around six places, as a single Gaussian cannot."""
    random = torch.Generator().manual_seed(seed)
    places = torch.randn(6, 64, generator=torch.Generator().manual_seed(9))
    spread = (torch.arange(64) < 24) * 0.99 + 0.01
    which = torch.randint(0, 6, (count,), generator=random)
    return F.normalize((0.8 * places[which] + torch.randn(count, 64, generator=random)) * spread, dim=1)


def test_people_crowd_where_real_ones_do() -> None:
    real, unseen = clusters(11_000, 0), clusters(500, 1)
    mixture = fit_population(iter(real.split(3000)))
    assert len(mixture["weights"]) == 6

    def nearest(x: torch.Tensor) -> float:
        return float((x @ real.T).amax(1).median())

    expected = nearest(unseen)
    one = {key: mixture[key] for key in ("mean", "factor")}
    drawn = sample_identities(mixture, 500, seed=0)
    assert nearest(drawn) == pytest.approx(expected, abs=0.01)
    assert nearest(sample_identities(one, 500, seed=0)) < expected - 0.02
    assert mean_cosine(drawn) == pytest.approx(mean_cosine(real), abs=0.02)
    assert torch.equal(sample_identities(mixture, 3, seed=0, start=70), drawn[70:73])


def test_weights_count_rows() -> None:
    real = embeddings(40, dim=16)
    counts = torch.randint(1, 4, (40,), generator=torch.Generator().manual_seed(0))
    weighted = fit_population(real, weights=counts)
    repeated = fit_population(real.repeat_interleave(counts, 0))
    # The direction of the mean and the leading axes agree; the shrinkage differs, for repeated rows are not new ones.
    assert torch.cosine_similarity(weighted["mean"], repeated["mean"], dim=0) > 0.999
    assert not torch.allclose(fit_population(real)["mean"], weighted["mean"], atol=1e-3)


def test_noise_depends_on_seed_index_and_variant_alone() -> None:
    many = noise(1, 0, 40, 100)
    assert torch.equal(noise(1, 7, 3, 100), many[7:10])
    assert not torch.equal(noise(1, 7, 1, 100, variant=1), many[7:8])
    assert not torch.equal(noise(2, 7, 1, 100), many[7:8])
    assert torch.isfinite(noise(-1, 2**40, 1, 5)).all()
    wide = noise(0, 0, 500, 200)
    assert float(wide.mean()) == pytest.approx(0, abs=0.02)
    assert float(wide.std()) == pytest.approx(1, abs=0.02)
    # Rows are independent: 500 of them in 200 dimensions have cosines of standard deviation 1 / sqrt(200).
    cosines = F.normalize(wide) @ F.normalize(wide).T - torch.eye(500)
    assert float(cosines.abs().max()) < 0.5


def test_slerp_walks_the_arc_at_even_speed() -> None:
    a, b = embeddings(2)
    path = slerp(a, b, torch.linspace(0, 1, 6))
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path.norm(dim=1), torch.ones(6))
    steps = (path[1:] * path[:-1]).sum(1)
    torch.testing.assert_close(steps, steps[:1].expand(5))
    pairs = slerp(torch.stack([a, b]), torch.stack([b, a]), 0.25)
    torch.testing.assert_close(pairs[0], slerp(a, b, 0.25))
    torch.testing.assert_close(pairs[1], slerp(a, b, 0.75))


def test_slerp_between_equal_and_opposite_vectors() -> None:
    a = embeddings(1)[0]
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.0, 0.3, 1.0])), a.expand(3, -1))
    around = slerp(a, -a, torch.linspace(0, 1, 5))
    torch.testing.assert_close(around.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(around[2] @ a, torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(around[-1], -a)
    near = slerp(a, F.normalize(-a + 1e-9, dim=0), 0.5)
    assert float(near.norm()) == pytest.approx(1, abs=1e-5)

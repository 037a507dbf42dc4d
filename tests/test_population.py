"""Random identities: a function of (seed, index), distributed like the embeddings that the prior was fitted to."""

import pytest
import torch
import torch.nn.functional as F

from vultus.errors import UserError
from vultus.sampling.latents import noise, sample_identities, slerp
from vultus.sampling.population import fit_population


def embeddings(count: int, dim: int = 512, seed: int = 0) -> torch.Tensor:
    """Unit vectors with a common direction and very different variances per axis, like face embeddings."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 2, dim)
    return F.normalize(torch.randn(count, dim, generator=random) * spread + 0.15, dim=1)


def mean_cosine(x: torch.Tensor) -> float:
    """Of two different rows."""
    total = x.sum(0).square().sum() - len(x)
    return float(total / len(x) / (len(x) - 1))


def test_samples_have_the_mean_and_variance_of_the_embeddings() -> None:
    real = embeddings(4000)
    samples = sample_identities(fit_population(real), 4000, seed=0)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples.norm(dim=1), torch.ones(4000))
    assert mean_cosine(samples) == pytest.approx(mean_cosine(real), abs=2e-3)
    # The standard error of a variance from 4,000 samples is 3 %; the largest of 512 errors is below five times that.
    ratio = samples.var(0) / real.var(0)
    assert ratio.mean() == pytest.approx(1, abs=0.01)
    assert float((ratio[50:] - 1).abs().max()) < 0.16


def test_identity_depends_on_seed_and_index_alone() -> None:
    population = fit_population(embeddings(300))
    many = sample_identities(population, 150, seed=5)
    for start, count in ((0, 1), (63, 1), (64, 1), (60, 10), (149, 1), (1, 149)):
        assert torch.equal(sample_identities(population, count, seed=5, start=start), many[start : start + count])
    assert not torch.equal(sample_identities(population, 1, seed=6), many[:1])
    far = sample_identities(population, 2, seed=5, start=10**9)
    assert torch.equal(far[1:], sample_identities(population, 1, seed=5, start=10**9 + 1))
    assert sample_identities(population, 0, seed=5).shape == (0, 512)


def test_fit_does_not_depend_on_chunks_and_takes_two_rows() -> None:
    real = embeddings(700)
    whole, chunked = fit_population(real), fit_population(iter(real.split(33)))
    torch.testing.assert_close(chunked["mean"], whole["mean"])
    torch.testing.assert_close(chunked["factor"] @ chunked["factor"].T, whole["factor"] @ whole["factor"].T)
    two = sample_identities(fit_population(real[:2]), 50, seed=0)
    assert torch.isfinite(two).all()
    # Different faces, and not only the arc between the two.
    assert torch.linalg.matrix_rank(two, rtol=1e-3) == 50
    for few in (real[:1], real[:1].expand(5, -1), real[:0]):
        with pytest.raises(UserError, match="two different"):
            fit_population(few)


def clusters(count: int, seed: int) -> torch.Tensor:
    """Embeddings in 24 of 64 directions, in six clusters, which a single Gaussian cannot represent."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 64, generator=torch.Generator().manual_seed(9))
    spread = (torch.arange(64) < 24) * 0.99 + 0.01
    which = torch.randint(0, 6, (count,), generator=random)
    return F.normalize((0.8 * centres[which] + torch.randn(count, 64, generator=random)) * spread, dim=1)


def test_identities_are_in_the_clusters_of_the_embeddings() -> None:
    real, unseen = clusters(11_000, 0), clusters(500, 1)
    mixture = fit_population(iter(real.split(3000)))
    assert len(mixture["weights"]) == 6

    def nearest(x: torch.Tensor) -> float:
        return float((x @ real.T).amax(1).median())

    expected = nearest(unseen)
    one = {key: mixture[key] for key in ("mean", "factor")}
    samples = sample_identities(mixture, 500, seed=0)
    assert nearest(samples) == pytest.approx(expected, abs=0.01)
    assert nearest(sample_identities(one, 500, seed=0)) < expected - 0.02
    assert mean_cosine(samples) == pytest.approx(mean_cosine(real), abs=0.02)
    assert torch.equal(sample_identities(mixture, 3, seed=0, start=70), samples[70:73])


def test_weights_equal_repeated_rows() -> None:
    real = embeddings(40, dim=16)
    counts = torch.randint(1, 4, (40,), generator=torch.Generator().manual_seed(0))
    weighted = fit_population(real, weights=counts)
    repeated = fit_population(real.repeat_interleave(counts, 0))
    # The direction of the mean agrees; the shrinkage differs, because repeated rows are not independent.
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


def test_slerp_follows_the_arc_in_equal_steps() -> None:
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

"""Metrics against closed forms, brute force and an independent implementation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vultus.evaluation.metrics import (
    SCALE_WEIGHTS,
    FeatureStatistics,
    FrechetReference,
    KernelPairs,
    cosine,
    density_coverage,
    ms_ssim,
    ms_ssim_scales,
    mse,
    nearest,
    neighbourhood_radii,
    pair_cosines,
    precision_recall,
    psnr,
)


def normal(count: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Correlated samples: neighbouring dimensions share noise, spreads differ by dimension."""
    noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise + 0.5 * noise.roll(1, 1)) * torch.linspace(0.1, 1, dim, dtype=torch.float64) * scale + shift


def frechet(mu1: torch.Tensor, cov1: torch.Tensor, mu2: torch.Tensor, cov2: torch.Tensor) -> float:
    return FrechetReference(mu1, cov1).distance(mu2, cov2)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    first, second = FeatureStatistics(a.shape[1]).update(a), FeatureStatistics(b.shape[1]).update(b)
    return frechet(first.mean, first.cov, second.mean, second.cov)


# --- Fréchet distance -------------------------------------------------------------------------------------------------


def test_distance_of_diagonal_normals_is_the_closed_form() -> None:
    mu1, mu2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, -1.0])
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.0])  # standard deviations, one of them 0
    expected = (mu1 - mu2).square().sum() + (s1 - s2).square().sum()
    found = frechet(mu1, torch.diag(s1**2), mu2, torch.diag(s2**2))
    assert found == pytest.approx(expected.item(), rel=1e-7)


def test_distance_of_normals_that_do_not_commute_is_the_closed_form() -> None:
    """In two dimensions tr sqrt(AB) = sqrt(tr(AB) + 2 sqrt(det(AB))): no matrix root needed."""
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.6], [-0.6, 3.0]], dtype=torch.float64)
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root).item()
    zero = torch.zeros(2)
    assert frechet(zero, a, zero, b) == pytest.approx(expected, rel=1e-10)
    assert frechet(zero, b, zero, a) == pytest.approx(expected, rel=1e-10)


def test_distance_agrees_with_torchmetrics() -> None:
    """The same features through torchmetrics' FID: another accumulation, and a non-symmetric eigenvalue solve."""
    fid = pytest.importorskip("torchmetrics.image.fid", reason="needs the extra: pip install 'vultus[dev]'")

    class Pass(nn.Module):
        num_features = 48

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    real, fake = normal(300, 48, 1), normal(250, 48, 2, shift=0.3, scale=1.4)
    metric = fid.FrechetInceptionDistance(feature=Pass(), normalize=True).set_dtype(torch.float64)
    for part in real.split(64):
        metric.update(part.view(-1, 3, 4, 4), real=True)
    for part in fake.split(50):
        metric.update(part.view(-1, 3, 4, 4), real=False)
    assert distance(real, fake) == pytest.approx(metric.compute().item(), rel=1e-3)


def test_distance_is_stable_below_the_feature_size() -> None:
    """40 samples of 128 features, covariances of rank 39: finite, 0 against itself, and exact where it is known."""
    few = normal(40, 128, 3).float()
    assert distance(few, few) == pytest.approx(0, abs=1e-5)
    assert distance(few, few + 2) == pytest.approx(4 * 128, rel=1e-6)
    expected = 4 * FeatureStatistics(128).update(few).cov.trace() + (2 * few.double().mean(0)).square().sum()
    assert distance(few, few * 3) == pytest.approx(expected.item(), rel=1e-6)


def test_distance_grows_as_samples_shrink() -> None:
    """The bias that the evaluation notes: small samples of one distribution have a larger distance."""
    small = distance(normal(60, 64, 4), normal(60, 64, 5))
    large = distance(normal(4000, 64, 4), normal(4000, 64, 5))
    assert small > 5 * large > 0


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_statistics_do_not_depend_on_the_batch_size() -> None:
    features = normal(101, 24, 6, shift=1000.0).float()
    whole = FeatureStatistics(24).update(features)
    for size in (1, 7, 100):
        parts = FeatureStatistics(24)
        for part in features.split(size):
            parts.update(part)
        assert parts.count == 101
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.cov, whole.cov, rtol=1e-9, atol=1e-11)
    # A mean of 1,000 against a spread of 1 costs a sum of squares six digits; the covariance is still exact.
    torch.testing.assert_close(whole.cov, features.double().T.cov(), rtol=1e-10, atol=1e-12)


def test_statistics_refuse_values_that_are_not_finite() -> None:
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"^features hold a value that is not finite$"):
        statistics.update(torch.tensor([[0.0, math.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"\[B, 3\]"):
        statistics.update(torch.zeros(2, 4))
    statistics.update(torch.zeros(0, 3)).update(torch.ones(1, 3))
    assert statistics.count == 1
    with pytest.raises(ValueError, match="at least 2"):
        _ = statistics.cov


# --- images and pairs -------------------------------------------------------------------------------------------------


def test_mse_and_psnr_of_known_images() -> None:
    x = torch.zeros(3, 3, 4, 4)
    y = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 2.0)])
    assert mse(x, y).tolist() == [0.0, 0.25, 4.0]
    assert psnr(x, y).tolist() == pytest.approx([100.0, 10 * math.log10(16), 0.0])
    assert mse(x + 0.5, y).tolist() == [0.25, 0.0, 2.25]


def test_cosine_of_known_rows() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    assert cosine(a, b).tolist() == pytest.approx([0.0, math.sqrt(0.5), -1.0])


def test_pairs_agree_with_brute_force() -> None:
    rows = normal(9, 5, 7)
    brute = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i in range(9) for j in range(i + 1, 9)]
    assert pair_cosines(rows).tolist() == pytest.approx(brute)
    assert pair_cosines(torch.tensor([[3.0, 0.0], [1.0, 1.0]])).tolist() == pytest.approx([math.sqrt(0.5)])
    with pytest.raises(ValueError, match=r"^pairs need at least 2 rows$"):
        pair_cosines(rows[:1])


def test_frechet_of_collapsed_features() -> None:
    """Most features never fire: a solver may not converge on such a covariance, the distance is that of the rest."""
    random = torch.Generator().manual_seed(0)
    few = torch.rand(12, 80, generator=random, dtype=torch.float64) * torch.logspace(-5, -2, 80, dtype=torch.float64)
    wide = torch.zeros(12, 1280, dtype=torch.float64)
    wide[:, ::16] = few
    real = torch.rand(40, 80, generator=random, dtype=torch.float64)
    full = torch.zeros(40, 1280, dtype=torch.float64)
    full[:, ::16] = real
    small, large = (
        frechet(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T)) for a, b in ((few, real), (wide, full))
    )
    assert abs(small - large) < 1e-9 * small


def test_frechet_where_the_solver_of_torch_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it does depends on the build of LAPACK, so it is made to fail here."""

    def fails(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("failed to converge")

    zero, spread = torch.zeros(4), torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    cases = [normal(50, 4, 1).T.cov(), normal(50, 4, 2).T.cov(), spread]
    pairs = [(zero, a, zero + 1, b) for a in cases for b in cases]
    expected = [frechet(*pair) for pair in pairs]
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fails)
    assert [frechet(*pair) for pair in pairs] == pytest.approx(expected, abs=1e-6)
    assert frechet(zero, spread, zero, spread) == pytest.approx(0, abs=1e-6)


# --- resampling, kernel distance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [512, 3])
def test_weighted_rows_are_rows_repeated(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """What a bootstrap computes from weights equals what it would compute from the drawn rows themselves."""
    monkeypatch.setattr("vultus.evaluation.metrics.BLOCK", block)
    a, b = normal(60, 8, 1), normal(50, 8, 2, shift=0.2)
    draw = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0))
    drawn = a.repeat_interleave(draw, 0)
    statistics = FeatureStatistics(8).update(b)
    reference = FrechetReference(statistics.mean, statistics.cov)
    assert reference.distance_of(a, draw.double()) == pytest.approx(distance(drawn, b), rel=1e-9)
    assert reference.distance_of(a, torch.ones(60)) == pytest.approx(distance(a, b), rel=1e-9)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The unbiased estimate by its definition."""
    kernel = lambda x, y: (float(x @ y) / len(x) + 1) ** 3  # noqa: E731
    within = [sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) for x in (a, b)]
    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    return within[0] / (len(a) * (len(a) - 1)) + within[1] / (len(b) * (len(b) - 1)) - 2 * between


def test_kernel_distance_by_definition_and_by_torchmetrics() -> None:
    a, b = normal(40, 12, 1), normal(30, 12, 2, shift=0.5)
    pairs = KernelPairs(a, b)
    ones = torch.ones(1, 40), torch.ones(1, 30)
    assert pairs.distances(*ones)[0].item() == pytest.approx(kernel_distance(a, b), rel=1e-9)
    kid = pytest.importorskip("torchmetrics.image.kid", reason="needs the extra: pip install 'vultus[dev]'")
    assert kid.poly_mmd(a[:30], b).item() == pytest.approx(kernel_distance(a[:30], b), rel=1e-3)


def test_kernel_distance_of_subsets_has_the_right_mean() -> None:
    """Unbiased: the mean over subsets is the value of the whole, whatever their size; equal distributions give 0."""
    a, b = normal(300, 12, 1), normal(300, 12, 2, shift=0.5)
    whole = KernelPairs(a, b).distances(torch.ones(1, 300), torch.ones(1, 300))[0].item()
    mean, std = KernelPairs(a, b).subsets(count=400, size=50)
    assert mean == pytest.approx(whole, abs=4 * std / 20)
    assert std > 0
    same, spread = KernelPairs(normal(300, 12, 3), normal(300, 12, 4)).subsets(size=100)
    assert abs(same) < spread
    assert KernelPairs(a, b).subsets(size=1000)[1] == pytest.approx(0, abs=1e-12)  # all rows: no subset differs


def test_kernel_subsets_have_one_size_and_are_drawn_by_the_seed() -> None:
    a, b = normal(1100, 4, 1), normal(1050, 4, 2, shift=0.5)
    pairs = KernelPairs(a, b)
    assert pairs.subsets() == pairs.subsets(count=100, size=1000, seed=0)  # as published
    few = {"count": 3, "size": 50}
    assert pairs.subsets(**few) == pairs.subsets(**few, seed=0) != pairs.subsets(**few, seed=1)
    torch.rand(1)
    assert pairs.subsets(**few) == pairs.subsets(**few)  # the global generator has no part in it
    for one, other in ((a[:30], b[:40]), (a[:40], b[:30])):
        assert KernelPairs(one, other).subsets(size=1000)[1] > 1e-6  # 30 of the 40, always others
    assert pairs.subsets(count=1, size=50)[1] == 0


def test_a_row_drawn_twice_is_not_paired_with_itself() -> None:
    a, b = normal(20, 6, 1), normal(20, 6, 2)
    twice = KernelPairs(a, b).distances(torch.full((1, 20), 2.0), torch.ones(1, 20))[0].item()
    assert twice == pytest.approx(kernel_distance(a, b), rel=1e-9)


# --- fidelity and coverage --------------------------------------------------------------------------------------------


def test_neighbourhoods_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vultus.evaluation.metrics.BLOCK", 7)
    made, real = normal(40, 5, 1).float(), normal(50, 5, 2, shift=0.4).float()
    apart = [[(x - y).norm().item() for y in real] for x in real]
    radii = [sorted(row)[3] for row in apart]  # the nearest is itself
    assert neighbourhood_radii(real, 3).tolist() == pytest.approx(radii, rel=1e-4)
    precision, recall = precision_recall(made, real, k=3)
    inside = [[(x - y).norm().item() <= radius for y, radius in zip(real, radii, strict=True)] for x in made]
    assert precision.tolist() == [float(any(row)) for row in inside]
    assert recall.tolist() == precision_recall(real, made, k=3)[0].tolist()  # recall is precision the other way round
    density, coverage = density_coverage(made, real, k=3)
    assert density.tolist() == pytest.approx([sum(row) / 3 for row in inside])
    assert coverage.tolist() == [float(any(column)) for column in zip(*inside, strict=True)]
    with pytest.raises(ValueError, match="more than 40 rows"):
        neighbourhood_radii(made, 40)


def test_a_neighbourhood_contains_its_border() -> None:
    line = torch.arange(5.0)[:, None]  # the nearest other row is 1 away, the third one 2 or 3 away
    assert neighbourhood_radii(line, 1).tolist() == [1] * 5
    assert neighbourhood_radii(line, 4).tolist() == [4, 3, 2, 3, 4]
    outside = torch.tensor([[-1.0], [-2.0], [5.0], [6.0], [7.0]])
    assert precision_recall(outside, line, k=1)[0].tolist() == [1, 0, 1, 0, 0]
    assert precision_recall(line, outside, k=1)[1].tolist() == [1, 0, 1, 0, 0]
    density, coverage = density_coverage(outside, line, k=1)
    assert density.tolist() == [1, 0, 1, 0, 0]
    assert coverage.tolist() == [1, 0, 0, 0, 1]


def test_precision_and_recall_use_three_neighbours_and_coverage_five() -> None:
    made, real = normal(40, 5, 1).float(), normal(50, 5, 2, shift=0.4).float()
    for function, k in ((precision_recall, 3), (density_coverage, 5)):
        usual, given, more = function(made, real), function(made, real, k=k), function(made, real, k=k + 1)
        assert [torch.equal(one, two) for one, two in zip(usual, given, strict=True)] == [True, True]
        assert not torch.equal(usual[0], more[0])


def test_precision_and_recall_of_two_modes() -> None:
    """One mode of two: precise, half recalled. Noise around everything: recalled, not precise."""
    real = torch.cat([normal(200, 4, 1), normal(200, 4, 2, shift=20)]).float()
    one_mode = normal(400, 4, 3).float()
    precision, recall = (part.mean().item() for part in precision_recall(one_mode, real))
    assert precision > 0.8
    assert 0.4 < recall < 0.55
    assert 0.35 < density_coverage(one_mode, real)[1].mean() < 0.55
    scattered = torch.randn(400, 4, generator=torch.Generator().manual_seed(4)) * 30
    precision, recall = (part.mean().item() for part in precision_recall(scattered, real))
    assert precision < 0.1
    assert recall > 0.8
    assert density_coverage(real, real)[0].mean() == pytest.approx(1.2, abs=0.02)  # itself and five neighbours, over 5


def test_nearest() -> None:
    rows, others = torch.tensor([[2.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [5.0, 0.0], [-1.0, 0.0]])
    value, place = nearest(rows, others)
    assert place.tolist() == [1, 0]
    assert value.tolist() == pytest.approx([2 / math.sqrt(4.01), 1.0])


# --- structural similarity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "scales"), [(64, 3), (128, 4), (256, 5)])
def test_ms_ssim_agrees_with_torchmetrics(side: int, scales: int) -> None:
    image = pytest.importorskip("torchmetrics.functional.image", reason="needs the extra: pip install 'vultus[dev]'")
    random = torch.Generator().manual_seed(0)
    x = nn.functional.interpolate(torch.rand(3, 3, 16, 16, generator=random), size=side, mode="bilinear")
    y = (x + 0.1 * torch.randn(x.shape, generator=random)).clamp(0, 1)
    assert ms_ssim_scales(side) == scales
    betas = torch.tensor(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    expected = image.multiscale_structural_similarity_index_measure(
        x, y, data_range=1.0, betas=tuple(betas.tolist()), reduction="none"
    )
    assert ms_ssim(x * 2 - 1, y * 2 - 1).tolist() == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("side", "scales"),
    [(8, 1), (11, 1), (21, 1), (22, 2), (43, 2), (44, 3), (87, 3), (88, 4), (175, 4), (176, 5), (1024, 5)],
)
def test_ms_ssim_uses_the_scales_that_fit(side: int, scales: int) -> None:
    assert ms_ssim_scales(side) == scales


@pytest.mark.parametrize("side", [16, 32, 64])
def test_ms_ssim_of_plain_images_is_the_luminance_term(side: int) -> None:
    """Wang, Bovik, Sheikh and Simoncelli 2004, equation 6; only the coarsest scale has it. Nothing has a contrast."""
    a, b = 0.25, 0.75  # of [0, 1]
    luminance = (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    weights = SCALE_WEIGHTS[: ms_ssim_scales(side)]
    x = torch.full((1, 3, side, side), 2 * a - 1)
    y = torch.full((1, 3, side, side), 2 * b - 1)
    expected = luminance ** (weights[-1] / sum(weights))
    assert ms_ssim(x, y).tolist() == pytest.approx([expected], rel=1e-3)
    dark = torch.full((1, 3, side, side), -1.0)  # against black only K1 is left: the term is 1e-4 / (b² + 1e-4)
    expected = (1e-4 / (b**2 + 1e-4)) ** (weights[-1] / sum(weights))
    assert ms_ssim(dark, y).tolist() == pytest.approx([expected], rel=1e-3)


def test_ms_ssim_of_one_scale_by_definition() -> None:
    """SSIM of Wang, Bovik, Sheikh and Simoncelli 2004: weighted moments of each window of 11 pixels, in float64."""
    random = torch.Generator().manual_seed(0)
    x, noise = torch.rand(2, 1, 3, 16, 16, generator=random, dtype=torch.float64)
    y = (x + noise) / 2
    gauss = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    weights = torch.outer(gauss, gauss).flatten() / gauss.sum() ** 2
    a, b = (nn.functional.unfold(image[0][:, None], 11) for image in (x, y))  # [3, 121, 36]
    mean = lambda values: (weights[:, None] * values).sum(1)  # noqa: E731
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    expected = (luminance * (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)).mean()
    assert ms_ssim(x * 2 - 1, y * 2 - 1).tolist() == pytest.approx([expected.item()], abs=1e-5)


def test_ms_ssim_limits() -> None:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ms_ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert ms_ssim(x, -x).max() < 0.1

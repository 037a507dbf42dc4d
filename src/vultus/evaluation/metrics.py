"""Pure functions of feature arrays and of pairs of images. No network, no file; random subsets have a fixed seed.

Shape legend: features [N, D]; x [N, 3, R, R] float in [-1, 1]. Sums over many images are in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # rows of a distance matrix that exist at once


class FeatureStatistics:
    """Mean [D] and covariance [D, D] of features in batches; memory does not grow with their number.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque 1979 ("Updating formulae and a pairwise
    algorithm for computing sample variances"), which loses no digits where the mean is large against the spread.
    In float64, so the batch size changes the last digits only.
    """

    def __init__(self, dim: int) -> None:
        """`dim` is D."""
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (f - mean) (f - mean)^T

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add features [B, D] of any float type and device. Raises ValueError for another D or a value not finite."""
        batch = features.detach().to("cpu", torch.float64)
        if batch.ndim != 2 or batch.shape[1] != len(self.mean):
            raise ValueError(f"features must be [B, {len(self.mean)}], not {list(batch.shape)}")
        if not len(batch):
            return self
        if not batch.isfinite().all():
            raise ValueError("features hold a value that is not finite")
        mean = batch.mean(0)
        centred, step = batch - mean, mean - self.mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(batch) / total)
        self.mean += step * (len(batch) / total)
        self.count = total
        return self

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance [D, D] (divided by count - 1). Raises ValueError below 2 features."""
        if self.count < 2:
            raise ValueError("a covariance needs at least 2 features")
        return self._scatter / (self.count - 1)


class FrechetReference:
    """One normal distribution, mean [D] and covariance [D, D], to compare with many others.

    d² = |mu1 - mu2|² + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), Dowson and Landau 1982; used on network features by
    Heusel et al. 2017 (arXiv:1706.08500). The trace of the root needs no root of the non-symmetric product: with the
    symmetric S = cov1^(1/2) it is the sum of the square roots of the eigenvalues of S cov2 S. Two symmetric solves take
    seconds where one non-symmetric takes half a minute, and never give complex numbers. Covariances of fewer than D
    samples are singular; eigenvalues that rounding makes negative count as 0.
    """

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        self.mean, self.cov = (value.to("cpu", torch.float64) for value in (mean, cov))
        values, vectors = _eigh(self.cov)
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, mean: Tensor, cov: Tensor) -> float:
        """Squared Fréchet (2-Wasserstein) distance to the normal distribution of this mean and covariance."""
        mean, cov = (value.to("cpu", torch.float64) for value in (mean, cov))
        product = self._root @ cov @ self._root
        overlap = _eigh((product + product.T) / 2, vectors=False)[0].clamp(min=0).sqrt().sum()
        distance = (mean - self.mean).square().sum() + cov.trace() + self.cov.trace() - 2 * overlap
        return max(0.0, float(distance))

    def distance_of(self, features: Tensor, weights: Tensor) -> float:
        """The same for features [N, D], row i counted weights[i] times, for a bootstrap."""
        total = weights.sum()
        chosen = weights.nonzero()[:, 0]
        mean = torch.zeros_like(self.mean)
        scatter = torch.zeros_like(self.cov)
        for rows in chosen.split(BLOCK * 4):
            mean += weights[rows].double() @ features[rows].double() / total
        for rows in chosen.split(BLOCK * 4):
            centred = (features[rows].double() - mean) * weights[rows].double().sqrt()[:, None]
            scatter += centred.T @ centred
        return self.distance(mean, scatter / (total - 1))


def _eigh(matrix: Tensor, *, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues [D] and eigenvectors [D, D] (or []) of a symmetric matrix, by numpy where torch does not converge.

    torch's divide-and-conquer solver does not converge on some covariances of few, nearly equal samples. numpy uses
    another build of LAPACK, and a shift of 1e-12 of the trace separates eigenvalues that rounding made equal.
    """
    try:
        if not vectors:
            return torch.linalg.eigvalsh(matrix), matrix.new_empty(0)
        values, basis = torch.linalg.eigh(matrix)
        return values, basis
    except RuntimeError:  # torch.linalg.LinAlgError is one
        shift = matrix.trace() * 1e-12
        eigenvalues, basis = np.linalg.eigh((matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype)).numpy())
        return torch.from_numpy(eigenvalues) - shift, torch.from_numpy(basis)


# --- kernel distance ------------------------------------------------------------------------------------------------


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a . b / D + 1)³, the kernel of KID: [N, D], [M, D] -> [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


class KernelPairs:
    """Squared maximum mean discrepancy between features a [N, D] and b [M, D] with the polynomial kernel.

    All kernel values are kept in memory: 8 (N² + M² + N M) bytes, 150 MB for N = M = 2,527.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        a, b = a.double(), b.double()
        self.aa, self.bb, self.ab = polynomial_kernel(a, a), polynomial_kernel(b, b), polynomial_kernel(a, b)
        self.aa.fill_diagonal_(0)
        self.bb.fill_diagonal_(0)

    def distances(self, v: Tensor, w: Tensor) -> Tensor:
        """The unbiased estimate with the rows of `a` counted v [B, N] times, those of `b` w [B, M] times: [B].

        A row is not paired with itself, however often it is counted.
        """
        v, w = v.double(), w.double()
        within_a = ((v @ self.aa) * v).sum(1) / (v.sum(1).square() - v.square().sum(1))
        within_b = ((w @ self.bb) * w).sum(1) / (w.sum(1).square() - w.square().sum(1))
        return within_a + within_b - 2 * ((v @ self.ab) * w).sum(1) / (v.sum(1) * w.sum(1))

    def subsets(self, *, count: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Mean over random subsets, and their standard deviation.

        As KID on Inception features (Bińkowski et al. 2018, arXiv:1801.01401): 100 subsets of 1,000 rows, or of all
        where there are fewer. Unlike a Fréchet distance, its expectation does not depend on N; it may be below 0.
        """
        random = torch.Generator().manual_seed(seed)
        chosen = []
        for rows in (len(self.aa), len(self.bb)):
            weights = torch.zeros(count, rows)
            for row in weights:
                row[torch.randperm(rows, generator=random)[: min(size, len(self.aa), len(self.bb))]] = 1
            chosen.append(weights)
        distances = self.distances(*chosen)
        return distances.mean().item(), distances.std(correction=0).item()


# --- fidelity and coverage ------------------------------------------------------------------------------------------


def neighbourhood_radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row: [N, D] -> [N]. Raises ValueError for N of k or less."""
    if len(features) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} rows")
    nearest = [torch.cdist(part, features).topk(k + 1, largest=False).values[:, k] for part in features.split(BLOCK)]
    return torch.cat(nearest)


def precision_recall(generated: Tensor, real: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), face by face.

    Args:
        generated, real: features [N, D] and [M, D].

    Returns: float64 [N], 1 where a generated face lies within the neighbourhood of a real one; float64 [M], 1 where a
    real face lies within the neighbourhood of a generated one. Their means are precision and recall.
    """
    real_radii, generated_radii = neighbourhood_radii(real, k), neighbourhood_radii(generated, k)
    precision = [(torch.cdist(part, real) <= real_radii).any(1) for part in generated.split(BLOCK)]
    recall = [(torch.cdist(part, generated) <= generated_radii).any(1) for part in real.split(BLOCK)]
    return torch.cat(precision).double(), torch.cat(recall).double()


def density_coverage(generated: Tensor, real: Tensor, *, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797), face by face: robust to single outliers.

    Returns: float64 [N], the number of neighbourhoods of real faces that a generated one lies in, over k (may exceed
    1); float64 [M], 1 where the neighbourhood of a real face holds a generated one. Their means are density and
    coverage.
    """
    radii = neighbourhood_radii(real, k)
    density = [(torch.cdist(part, real) <= radii).sum(1) / k for part in generated.split(BLOCK)]
    nearest = [torch.cdist(part, generated).amin(1) for part in real.split(BLOCK)]
    return torch.cat(density).double(), (torch.cat(nearest) <= radii).double()


def nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the most similar row of `others` [M, D], and its index: [N, D] -> float32 [N], int64 [N]."""
    others = F.normalize(others.float(), dim=1)
    best = [(F.normalize(part.float(), dim=1) @ others.T).max(1) for part in rows.split(BLOCK)]
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


# --- images ---------------------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity row by row: [N, D], [N, D] -> [N] float64 in [-1, 1].

    On FaceNet embeddings this is the face-verification score (Schroff et al. 2015, arXiv:1503.03832: for unit vectors
    their squared distance is 2 - 2 cosine).
    """
    return F.cosine_similarity(a.double(), b.double(), dim=1)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each image, in the units of x in [-1, 1]: [N, 3, R, R] twice -> [N] float64."""
    return (x.double() - y.double()).square().mean((1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: [N, 3, R, R] twice -> [N] float64.

    For its limits see Huynh-Thu and Ghanbari 2008, "Scope of validity of PSNR in image/video quality assessment": it
    compares renderings of one image, not different images.
    """
    return decibel(mse(x, y))


def decibel(error: Tensor) -> Tensor:
    """10 log10(peak² / mse) with peak 2, the width of [-1, 1].

    Equal images get 100 dB, not infinity, so that a mean stays finite; 8-bit images that differ stay below 100.
    """
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003, from fine to coarse


def ms_ssim_scales(side: int) -> int:
    """How many of the five scales of MS-SSIM fit: the coarsest must be at least 11 pixels wide."""
    return max(1, min(len(SCALE_WEIGHTS), int(math.log2(max(side, 11) / 11)) + 1))


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity: [N, 3, R, R] in [-1, 1] twice -> [N] float64, 1 for equal images.

    Wang, Simoncelli and Bovik 2003, "Multiscale structural similarity for image quality assessment": Gaussian window of
    11 pixels (sigma 1.5), K1 0.01, K2 0.03, per channel, negative contrast terms counted as 0. Five scales need 176
    pixels: below, the first `ms_ssim_scales` weights are used, scaled to sum to 1, and the name of the metric says so.
    """
    scales = ms_ssim_scales(x.shape[-1])
    weights = torch.tensor(SCALE_WEIGHTS[:scales], dtype=torch.float64)
    weights /= weights.sum()
    result = torch.ones(len(x), x.shape[1], dtype=torch.float64)
    x, y = (x.float() + 1) / 2, (y.float() + 1) / 2
    for scale, weight in enumerate(weights):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        luminance, contrast = _ssim_terms(x, y)
        term = contrast if scale < scales - 1 else luminance * contrast
        result *= term.mean((2, 3)).double().clamp(min=0).cpu() ** weight
    return result.mean(1)


def _ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure terms at every place where the window fits, of images in [0, 1]."""
    offsets = torch.arange(11, dtype=torch.float32, device=x.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    side = x.shape[-1]
    # The window as a band matrix: two small matrix products are far faster on a CPU than a depthwise convolution.
    band = torch.zeros(side - 10, side, device=x.device)
    for place in range(side - 10):
        band[place, place : place + 11] = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        return band @ image @ band.T

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x * mean_x, blur(y * y) - mean_y * mean_y
    cov = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance, (2 * cov + c2) / (var_x + var_y + c2)


# --- diversity ------------------------------------------------------------------------------------------------------


def pair_cosines(features: Tensor) -> Tensor:
    """Cosine of every unordered pair of rows: [N, D] -> [N (N - 1) / 2]. Raises ValueError below 2 rows."""
    if len(features) < 2:
        raise ValueError("pairs need at least 2 rows")
    unit = F.normalize(features, dim=1)
    row, column = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[row, column]

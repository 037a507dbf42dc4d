"""Pure functions of feature arrays and of pairs of pictures. No network, no file, no random number.

Shape legend: features [N, D]; x [N, 3, R, R] float in [-1, 1]. What is summed over many images is summed in float64.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class FeatureStatistics:
    """Mean [D] and covariance [D, D] of features that arrive in batches; memory does not grow with their number.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque 1979 ("Updating formulae and a pairwise
    algorithm for computing sample variances"), which does not cancel where the mean is large against the spread. All
    in float64: the size of the batches changes the last digits only.
    """

    def __init__(self, dim: int) -> None:
        """`dim` is D. Nothing is known before the first update."""
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


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two normal distributions, means [D] and covariances [D, D].

    d² = |mu1 - mu2|² + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), Dowson and Landau 1982; used on network features by
    Heusel et al. 2017 (arXiv:1706.08500). The trace of the root needs no root of the non-symmetric product: with the
    symmetric S = cov1^(1/2) it is the sum of the roots of the eigenvalues of S cov2 S. Two symmetric solves take
    seconds where one non-symmetric takes half a minute, and never give complex numbers. Covariances of fewer than D
    samples are singular; eigenvalues that rounding puts below 0 count as 0.
    """
    mu1, cov1, mu2, cov2 = (value.to("cpu", torch.float64) for value in (mu1, cov1, mu2, cov2))
    values, vectors = _eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ cov2 @ root
    overlap = _eigh((product + product.T) / 2)[0].clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(0.0, float(distance))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [D] and eigenvectors [D, D] of a symmetric matrix, also where one library gives up.

    The divide-and-conquer solver behind torch fails to converge on some covariances of few, nearly equal samples; the
    one behind numpy is another build, and a shift of 1e-12 of the trace separates what rounding made coincide.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    except RuntimeError:  # torch.linalg.LinAlgError is one
        shift = matrix.trace() * 1e-12
        found = np.linalg.eigh((matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype)).numpy())
        return torch.from_numpy(found[0]) - shift, torch.from_numpy(found[1])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity row by row: [N, D], [N, D] -> [N] float64 in [-1, 1].

    On FaceNet embeddings this is the face-verification score (Schroff et al. 2015, arXiv:1503.03832: for unit vectors
    their squared distance is 2 - 2 cosine).
    """
    return F.cosine_similarity(a.double(), b.double(), dim=1)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each picture, in the units of x in [-1, 1]: [N, 3, R, R] twice -> [N] float64."""
    return (x.double() - y.double()).square().mean((1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: [N, 3, R, R] twice -> [N] float64.

    10 log10(peak² / mse) with peak 2, the width of [-1, 1]. Equal pictures get 100 dB, not infinity, so that a mean
    stays finite; 8-bit pictures that differ stay below 100. What it is worth: Huynh-Thu and Ghanbari 2008, "Scope of
    validity of PSNR in image/video quality assessment" (it compares renderings of one picture, not of different ones).
    """
    return 10 * torch.log10(4 / mse(x, y).clamp(min=4e-10))


def pair_cosines(features: Tensor) -> Tensor:
    """Cosine of every unordered pair of rows: [N, D] -> [N (N - 1) / 2]. Raises ValueError below 2 rows."""
    if len(features) < 2:
        raise ValueError("pairs need at least 2 rows")
    unit = F.normalize(features, dim=1)
    row, column = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[row, column]


def mean_pairwise_distance(groups: Tensor) -> Tensor:
    """Mean of 1 - cosine over the pairs in each group: [G, K, D] -> [G] float64, K from 2.

    Diversity of K outputs for one input as in Zhu et al. 2017 (arXiv:1711.11586), who measure it in LPIPS.
    The pairs need not be formed: for unit vectors, |sum|² = K + 2 sum of the cosines.
    """
    count = _group_size(groups)
    unit = F.normalize(groups.double(), dim=2)
    return 1 - (unit.sum(1).square().sum(1) - count) / (count * (count - 1))


def mean_pairwise_rms(groups: Tensor) -> Tensor:
    """Mean over the pairs in each group of the root mean squared difference: [G, K, ...] -> [G] float64, K from 2."""
    count = _group_size(groups)
    flat = groups.double().flatten(2)
    pairs = [(flat[:, i] - flat[:, j]).square().mean(1).sqrt() for i in range(count) for j in range(i)]
    return torch.stack(pairs).mean(0)


def _group_size(groups: Tensor) -> int:
    if groups.shape[1] < 2:
        raise ValueError("pairs need at least 2 members in a group")
    return groups.shape[1]

"""Confidence intervals by resampling people.

Photos of one person are not independent, so whole people are drawn with replacement (the cluster bootstrap: Davison and
Hinkley 1997, "Bootstrap Methods and their Application", section 3.8; for face recognition Bolle, Ratha and Pankanti
2004, "Error analysis of pattern recognition systems: the subsets bootstrap"). Thresholds and reference sets are not
resampled: an interval covers the choice of people, not the choice of judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPLICATES = 1000
LEVEL = 0.95
_NORMAL = 1.96  # half-width of the 95 % interval of a normal distribution in standard deviations


@dataclass(frozen=True)
class Estimate:
    """A value with its interval at LEVEL; `std` is the spread of single faces, `real` what real photos reach."""

    value: float
    low: float
    high: float
    std: float | None = None
    real: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class PersonBootstrap:
    """The cluster bootstrap over people.

    Attributes:
        codes: [N] int64, the number of the person of each row.
        count: of people.
        draws: [REPLICATES, count] float64, how often each person is in each replicate.
    """

    def __init__(self, identities: Sequence[str], *, seed: int = 0) -> None:
        """`identities`: the person of each of N rows. The same draws serve every metric and every generator."""
        names, codes = np.unique(np.asarray(identities), return_inverse=True)
        self.codes = torch.from_numpy(codes)
        self.count = len(names)
        random = np.random.default_rng(seed)
        drawn = random.multinomial(self.count, np.full(self.count, 1 / self.count), size=REPLICATES)
        self.draws = torch.from_numpy(drawn).double()

    def weights(self, replicate: int) -> Tensor:
        """How often each row is in this replicate: [N] float64."""
        return self.draws[replicate][self.codes]

    def part(self, rows: Any) -> PersonBootstrap:
        """The same draws of people for some of the rows."""
        part = object.__new__(PersonBootstrap)
        part.codes, part.count, part.draws = self.codes[rows], self.count, self.draws
        return part

    def mean(self, values: Tensor, *, spread: bool = False, real: float | None = None) -> Estimate | None:
        """Mean of values [N] or [N, K] with the percentile interval of its replicates.

        NaN marks undefined values, which are left out; None if all are undefined. `spread` adds the standard deviation.
        """
        flat = values.double().reshape(len(values), -1)
        defined = flat.isfinite()
        if not defined.any():
            return None
        zero = torch.zeros(self.count, dtype=torch.float64)
        sums = zero.index_add(0, self.codes, flat.nan_to_num().sum(1))
        counts = zero.index_add(0, self.codes, defined.sum(1).double())
        replicates = (self.draws @ sums) / (self.draws @ counts)  # NaN where no drawn person has a value
        low, high = percentiles(replicates)
        values = flat[defined]
        std = values.std(correction=0).item() if spread else None
        return Estimate(values.mean().item(), low, high, std, real)

    def statistic(
        self, value: float, replicate: Callable[[Tensor], float], *, replicates: int, real: float | None = None
    ) -> Estimate:
        """`value` ± 1.96 standard deviations of `replicate(weights [N])` over the first `replicates` draws.

        For distances between distributions, which resampling biases upwards (a drawn set holds fewer different faces):
        only the spread of the replicates is used, not their mean. The lower end is not below 0.
        """
        drawn = torch.tensor([replicate(self.weights(number)) for number in range(replicates)], dtype=torch.float64)
        half = _NORMAL * drawn.std().item() if replicates > 1 else float("nan")
        return Estimate(value, max(0.0, value - half) if value >= 0 else value - half, value + half, None, real)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b for two sets of people without a common person: half-widths add in squares."""
    low = ((a.value - a.low) ** 2 + (b.high - b.value) ** 2) ** 0.5
    high = ((a.high - a.value) ** 2 + (b.value - b.low) ** 2) ** 0.5
    value = a.value - b.value
    return Estimate(value, value - low, value + high)


def percentiles(replicates: Tensor) -> tuple[float, float]:
    """The ends of the interval at LEVEL of a value's replicates [REPLICATES]; those not finite are left out."""
    tail = (1 - LEVEL) / 2
    finite = replicates[replicates.isfinite()]
    low, high = torch.quantile(finite, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high

"""Linear probes: how much of an attribute of a photo can be read from its embedding, and in which direction it lies.

A probe is a ridge regression from embeddings to one attribute, fitted to the training split and judged on people that
were not in it (Alain & Bengio 2016, arXiv:1610.01644, for probes; Hoerl & Kennard 1970 for the regression). What it
explains is a lower bound of what the embedding reveals: another model may read more.

Shape legend: embeddings c [N, D] of unit norm; attribute y [N], NaN where it was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vultus.errors import UserError
from vultus.evaluation.bootstrap import Estimate, PersonBootstrap, percentiles

LAMBDAS = tuple(10.0**power for power in range(-3, 4))  # of the ridge, in mean variances of the embeddings
HELD_OUT = 5  # of so many people one is held out to choose among them
LEAST = 50  # photos with a value that a probe needs


@dataclass(frozen=True)
class Probe:
    """A linear probe, in standard deviations of the attribute between the photos that it was fitted to.

    Attributes:
        center: [D], mean of these embeddings.
        weight: [D] float64: reading = (c - center) @ weight.
        mean, std: of the attribute.
        ridge: the chosen entry of LAMBDAS.
        direction: [D], the change of an embedding by which the reading rises by 1; see `direction_of`.
    """

    center: Tensor
    weight: Tensor
    mean: float
    std: float
    ridge: float
    direction: Tensor

    def read(self, c: Tensor) -> Tensor:
        """What the probe reads from embeddings [N, D]: float64 [N]."""
        return (c.double() - self.center) @ self.weight

    def standardise(self, y: Tensor) -> Tensor:
        """An attribute in standard deviations from the mean of the fitted photos."""
        return (y.double() - self.mean) / self.std


def fit_probe(c: Tensor, y: Tensor, people: Sequence[str], *, name: str) -> Probe:
    """Fit a probe to embeddings c [N, D], attribute y [N] and the person of each photo.

    The ridge is chosen on every fifth person; the probe is then fitted to all. Raises UserError for fewer than 50
    photos with a value, fewer than 5 people, or an attribute that is the same in all of them.
    """
    known = y.isfinite()
    rows = known.nonzero()[:, 0]
    _, codes = np.unique(np.asarray(people)[rows.numpy()], return_inverse=True)
    person = torch.from_numpy(codes)
    if len(rows) < LEAST or int(person.max()) + 1 < HELD_OUT:
        raise UserError(
            f"{name}: measured in {len(rows)} training photos; a probe needs {LEAST} photos of {HELD_OUT} people; "
            f"prepare more photos or raise --limit"
        )
    x, y = c[rows].double(), y[rows].double()
    mean, std = float(y.mean()), float(y.std())
    if std < 1e-9:
        raise UserError(f"{name}: is {mean:g} in all training photos, so there is nothing to explain")
    y = (y - mean) / std
    held = person % HELD_OUT == 0
    errors = [
        float(((x[held] - x[~held].mean(0)) @ weight + y[~held].mean() - y[held]).square().mean())
        for weight in _ridge(x[~held], y[~held])
    ]
    best = int(np.argmin(errors))
    center = x.mean(0)
    weight = _ridge(x, y)[best]
    return Probe(center, weight, mean, std, LAMBDAS[best], direction_of(x, weight, person))


def _ridge(x: Tensor, y: Tensor) -> list[Tensor]:
    """The weights [D] for each of LAMBDAS."""
    x, y = x - x.mean(0), y - y.mean()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    target = vectors.T @ (x.T @ y) / len(x)
    scale = values.clamp(min=0).mean()
    return [vectors @ (target / (values.clamp(min=0) + factor * scale)) for factor in LAMBDAS]


def direction_of(x: Tensor, weight: Tensor, person: Tensor) -> Tensor:
    """The change of an embedding by which the reading x @ weight rises by 1, as it is between photos of one person.

    The weight itself is not that direction: it also cancels what is correlated with the attribute and has none of it.
    The covariance of embedding and reading is (Haufe et al. 2014, "On the interpretation of weight vectors of linear
    models in multivariate neuroimaging", equation 6). It is taken from the deviations from the mean of each person, so
    that the direction does not lead to other people who have more of the attribute, such as women for a smile.

    Args:
        x: embeddings [N, D]; weight: [D]; person: number of the person of each row, [N] int64.

    Returns float32 [D]. Where each person has one photo, the deviations are those from the common mean.
    """
    count = int(person.max()) + 1
    sums = torch.zeros(count, x.shape[1], dtype=x.dtype).index_add_(0, person, x)
    numbers = torch.zeros(count, dtype=x.dtype).index_add_(0, person, torch.ones(len(x), dtype=x.dtype))
    deviations = x - (sums / numbers[:, None])[person]
    if not bool((numbers > 1).any()):
        deviations = x - x.mean(0)
    reading = deviations @ weight
    variance = reading.square().mean()
    return (deviations.T @ reading / len(x) / variance.clamp(min=1e-12)).float()


def explained(reading: Tensor, y: Tensor, bootstrap: PersonBootstrap, *, within: bool = False) -> Estimate | None:
    """The share of the variance of y that a reading explains, R^2, with the interval over people.

    Args:
        reading, y: [N] in the same unit; rows where y is NaN are left out.
        bootstrap: over the people of the rows.
        within: only differences between photos of one person: both are taken as deviations from their mean for the
            person.

    Below 0 if the mean would be nearer to y than the reading. None where fewer than two people have values, or y is the
    same in all rows.
    """
    known = y.isfinite()
    codes = bootstrap.codes[known]
    reading, y = reading[known].double(), y[known].double()

    def per_person(values: Tensor) -> Tensor:
        return torch.zeros(bootstrap.count, dtype=torch.float64).index_add_(0, codes, values)

    numbers = per_person(torch.ones_like(y))
    if int((numbers > 0).sum()) < 2:
        return None
    if within:
        reading, y = (values - (per_person(values) / numbers.clamp(min=1))[codes] for values in (reading, y))
    parts = torch.stack([per_person(each) for each in ((y - reading).square(), y, y.square(), torch.ones_like(y))], 1)

    def share(sums: Tensor) -> Tensor:
        residual, total, squares, count = sums.unbind(-1)
        variance = squares - (0 if within else total.square() / count)
        return 1 - residual / variance

    value = float(share(parts.sum(0)))
    if not np.isfinite(value):
        return None
    low, high = percentiles(share(bootstrap.draws @ parts))
    return Estimate(value, low, high)

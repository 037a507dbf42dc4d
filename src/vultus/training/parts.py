"""Which images of a batch a loss is computed on, and which of them a process of a training computes.

A batch of B images is dealt to P processes, B / P each. Where a loss is computed on some images of the batch, every
process has its share of them. The mean of a loss over its own ones, times `Subset.share`, has as mean over the
processes the mean over all of them; so have the gradients, and P processes train as one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vultus.errors import UserError


def evenly_spread_count(batch: int, fraction: float) -> int:
    """How many of the first `batch` indices evenly_spread() chooses."""
    return math.ceil(batch * fraction - 1e-6)


def evenly_spread(batch: int, fraction: float) -> Tensor:
    """Indices of a `fraction` of a batch, evenly spread, so that any first part of the batch has its share of them."""
    count = evenly_spread_count(batch, fraction)
    return (torch.arange(count) / max(fraction, 1e-6) + 1e-4).long()


def prior_first(count: int, coded: Tensor) -> Tensor:
    """The first `count` indices of a batch, those that are not in `coded` before those that are."""
    indices = torch.arange(count)
    return indices[torch.isin(indices, coded).long().argsort(stable=True)]


def first(batch: int, fraction: float) -> Tensor:
    """The indices of the first `fraction` of a batch, one at least."""
    return torch.arange(max(1, round(batch * fraction)))


@dataclass(frozen=True)
class Subset:
    """Some images of a batch, those of them that a process computes.

    Attributes:
        rows: their places among the images of the process.
        count: how many the whole batch has.
        share: factor of the mean over them; 1 with one process.
    """

    rows: Tensor
    count: int
    share: float

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Rows:
    """Some rows of a larger batch.

    Attributes:
        indices: which ones.
        batch: size of the batch.
    """

    indices: Tensor
    batch: int

    def of(self, values: Tensor) -> Tensor:
        """These rows of `values` [batch, ...]."""
        return values[self.indices]


class Part:
    """The images of each batch that one process computes.

    Args:
        order: the indices of a batch [B] in the order in which they are dealt: images of a kind follow one another, so
            that each process gets its share of every kind.
        subsets: indices of the batch on which a loss is computed, by the setting of the losses that says how many.
        process: number of the process.
        processes: how many there are; they divide B.
        device: of the indices that a step uses.

    Attributes:
        batch: B.
        own: the indices of its images, ascending [B / processes], on the CPU.
        dealt: those of every process.

    Raises UserError that names the setting of a subset of which a process gets no image.
    """

    def __init__(
        self,
        order: Tensor,
        subsets: Mapping[str, Tensor],
        process: int,
        processes: int,
        device: torch.device | str,
    ) -> None:
        self.batch, self.processes = len(order), processes
        self.dealt = [order[number::processes].sort().values for number in range(processes)]
        self.own = self.dealt[process]
        self._rows = self.own.to(device)
        places = torch.full((self.batch,), -1).index_copy_(0, self.own, torch.arange(len(self.own)))
        self._subsets = {}
        for name, indices in subsets.items():
            if len(indices) and min(int(torch.isin(indices, rows).sum()) for rows in self.dealt) == 0:
                raise UserError(
                    f"--loss.{name} takes {len(indices)} of {self.batch} images, too few for {processes} processes; "
                    "raise it or --optim.batch, or start fewer processes"
                )
            own = places[indices]
            own = own[own >= 0]
            share = len(own) * processes / len(indices) if len(indices) else 1.0
            self._subsets[name] = Subset(own.to(device), len(indices), share)

    def __getitem__(self, name: str) -> Subset:
        """The subset with this name."""
        return self._subsets[name]

    def first(self, count: int, times: int = 1) -> Rows | None:
        """The own rows of values [times * count, ...], which hold the first `count` images of the batch `times` times.

        None with one process, whose rows are all of them.
        """
        if self.processes == 1:
            return None
        own = self._rows[: int((self.own < count).sum())]
        return Rows(torch.cat([own + number * count for number in range(times)]), times * count)

    def of(self, values: Tensor) -> Tensor:
        """The own rows of `values` [count, ...], of the first `count` images of the batch."""
        rows = self.first(len(values))
        return values if rows is None else rows.of(values)

    def joined(self, values: Tensor) -> Tensor:
        """The values of all images of a batch, from those of each process one after the other."""
        return values[torch.cat(self.dealt).argsort().to(values.device)]

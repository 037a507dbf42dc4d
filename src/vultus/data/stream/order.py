"""The order of a streamed epoch: a function of (seed, epoch), mixed over several row groups, in bounded memory.

The unit that is read is a block: the rows of one row group. The blocks of an epoch are put into a random order. From
position p on, a window of `mix` blocks moves over them, a block further with each step; a block is in the window for
`mix` steps and gives a random part of its rows to each. The rows of a step are those of all blocks in the window,
shuffled.
Every row comes once in an epoch, `mix` blocks are in memory, and each step needs one new block only. At both ends
the window rests, so that it always holds `mix` blocks: the first block gives all of its rows to the first step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class EpochOrder:
    """The order of one epoch.

    Args:
        rows: number of rows of each block.
        seed: of the run.
        epoch: from 0.
        mix: blocks in the window.

    Attributes:
        blocks: the block at each position.
        position: the position of each block.
        window: blocks in the window, at most `mix`.
        steps: number of steps.
        sizes: rows of each step.
    """

    def __init__(self, rows: Sequence[int] | Ints, seed: int, epoch: int, mix: int) -> None:
        self._rows = np.asarray(rows, np.int64)
        self._seed, self._epoch = seed, epoch
        count = len(self._rows)
        self.blocks: Ints = self._random(0).permutation(count)
        self.position: Ints = np.empty(count, np.int64)
        self.position[self.blocks] = np.arange(count)
        self.window = min(mix, count)
        self.steps = count - self.window + 1
        places = np.arange(count)
        self._first = np.maximum(0, places - self.window + 1)
        self._last = np.minimum(places, self.steps - 1)
        self._parts = self._last - self._first + 1
        # The first `more` of the parts of a block have one row more than the others.
        self._base, self._more = np.divmod(self._rows[self.blocks], self._parts)
        change = np.zeros(self.steps + 1, np.int64)
        np.add.at(change, self._first, self._base + (self._more > 0))
        np.add.at(change, self._first + self._more, -(self._more > 0).astype(np.int64))
        np.add.at(change, self._last + 1, -self._base)
        self.sizes: Ints = change.cumsum()[: self.steps]

    def _random(self, *keys: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._epoch, *keys])

    def in_window(self, step: int) -> range:
        """The positions of the blocks in the window of a step."""
        return range(step, step + self.window)

    def steps_of(self, position: int) -> range:
        """The steps in which the block at a position is in the window."""
        return range(int(self._first[position]), int(self._last[position]) + 1)

    def part(self, position: int, step: int) -> Ints:
        """The rows that the block at a position gives to a step."""
        block = int(self.blocks[position])
        order = self._random(1, block).permutation(int(self._rows[block]))
        number = step - int(self._first[position])
        base, more = int(self._base[position]), int(self._more[position])
        start = number * base + min(number, more)
        return order[start : start + base + (number < more)]

    def step(self, step: int) -> Ints:
        """The rows of a step in their order: int64 [n, 2] of (position of the block, row in it)."""
        parts = [(position, self.part(position, step)) for position in self.in_window(step)]
        pairs = np.concatenate([np.stack([np.full(len(part), position), part], 1) for position, part in parts])
        return self._random(2, step).permutation(pairs)


class Skips:
    """What is left out of the order: single rows, and shards from some place on.

    Args:
        shards: the shard of each block.
    """

    def __init__(self, shards: Sequence[int]) -> None:
        self._shards = np.asarray(shards, np.int64)
        self.rows: dict[int, set[int]] = {}  # of each block
        # (shard, epoch, position of the first block that failed, (step, row) from which they are missing)
        self.shards: list[tuple[int, int, int, tuple[int, int]]] = []

    def touched(self, order: EpochOrder, epoch: int) -> set[int]:
        """The steps of an epoch that may lack rows."""
        blocks = set(self.rows)
        for shard, since, position, _ in self.shards:
            if epoch >= since:
                own = np.flatnonzero(self._shards == shard)
                blocks.update(own[order.position[own] >= (position if epoch == since else 0)].tolist())
        return {step for block in blocks for step in order.steps_of(int(order.position[block]))}

    def missing(self, epoch: int, position: int, shard: int, step: int) -> int | None:
        """From which row of a step on the block at a position is missing; None if it is there."""
        starts = []
        for dropped, since, first, place in self.shards:
            if dropped == shard and epoch > since:
                starts.append(0)
            elif dropped == shard and epoch == since and position >= first and step >= place[0]:
                starts.append(place[1] if step == place[0] else 0)
        return min(starts, default=None)

    def kept(self, order: EpochOrder, epoch: int, step: int, pairs: Ints) -> npt.NDArray[np.bool_]:
        """Which of the rows of a step (EpochOrder.step) are used."""
        kept = np.ones(len(pairs), bool)
        numbers = np.arange(len(pairs))
        for position in order.in_window(step):
            block = int(order.blocks[position])
            start = self.missing(epoch, position, int(self._shards[block]), step)
            own = pairs[:, 0] == position
            if start is not None:
                kept &= ~(own & (numbers >= start))
            if block in self.rows:
                kept &= ~(own & np.isin(pairs[:, 1], list(self.rows[block])))
        return kept


class StreamOrder:
    """The order of a run: where to begin after so many images.

    Args:
        rows: number of rows of each block.
        seed: of the run.
        mix: blocks in the window.
        skips: what has been left out so far.
    """

    def __init__(self, rows: Sequence[int], seed: int, mix: int, skips: Skips) -> None:
        self._rows, self._seed, self._mix = np.asarray(rows, np.int64), seed, mix
        self.skips = skips
        self.epoch: Any = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> EpochOrder:
        return EpochOrder(self._rows, self._seed, epoch, self._mix)

    def used(self, epoch: int) -> Ints:
        """The number of rows of each step of an epoch that are used."""
        order: EpochOrder = self.epoch(epoch)
        sizes = order.sizes.copy()
        for step in self.skips.touched(order, epoch):
            sizes[step] = self.skips.kept(order, epoch, step, order.step(step)).sum()
        return sizes

    def locate(self, cur_nimg: int) -> tuple[int, int, int]:
        """(epoch, step, row of the step) of the next image after `cur_nimg`.

        What was left out before it must be known. All rows of a step count, those left out too.
        """
        epoch, left = 0, cur_nimg
        while True:
            ends = self.used(epoch).cumsum()
            if left < ends[-1]:
                break
            left -= int(ends[-1])
            epoch += 1
            if not ends[-1]:
                return epoch, 0, 0  # an epoch of which nothing was left
        step = int(np.searchsorted(ends, left, "right"))
        left -= int(ends[step - 1]) if step else 0
        order: EpochOrder = self.epoch(epoch)
        kept = self.skips.kept(order, epoch, step, order.step(step))
        return epoch, step, int(np.flatnonzero(kept)[left])

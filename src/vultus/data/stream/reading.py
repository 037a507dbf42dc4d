"""The blocks of a run in the order in which it reads them, some of them ahead of the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
import torch

from vultus.data.dataset import Batch, decoded
from vultus.data.stream.blocks import Block, Blocks, LoadedBlock
from vultus.data.stream.order import EpochOrder, StreamOrder
from vultus.data.stream.remote import Broken
from vultus.errors import UserError

AHEAD = 2  # blocks that are read before the window needs them

Row = tuple[LoadedBlock, int]
Start = tuple[int, int]  # step and row of an epoch with which this session began


class LeftOut(Protocol):
    """What is told of photos that cannot be used."""

    def unusable(self, number: int, loaded: LoadedBlock) -> None:
        """The block with this number has such photos."""
        ...

    def broken(self, number: int, error: Broken, epoch: int, position: int, start: Start) -> None:
        """Its file cannot be read any more; see Skips.shards. Raises UserError where that is no reason to go on."""
        ...


class Reading:
    """Reads the blocks of a run in their order, some ahead."""

    def __init__(
        self,
        blocks: Blocks,
        chosen: Sequence[Block],
        order: StreamOrder,
        left_out: LeftOut,
        kept: dict[int, LoadedBlock],
    ) -> None:
        self._blocks, self._chosen, self._order, self._left_out, self._kept = blocks, chosen, order, left_out, kept
        self._futures: dict[tuple[int, int], Future[LoadedBlock]] = {}

    def rows(self, epoch: int, step: int, row: int) -> Iterator[list[Row]]:
        """The rows of each step from (epoch, step, row) on, without end."""
        while True:
            order = self._order.epoch(epoch)
            window: dict[int, LoadedBlock | None] = {}
            start, given = (step, row), 0
            for now in range(step, order.steps):
                first = row if now == step else 0
                self._enter(order, epoch, now, start, window)
                pairs = order.step(now)
                kept = self._order.skips.kept(order, epoch, now, pairs)
                kept[:first] = False
                found = [(window[int(position)], int(number)) for position, number in pairs[kept]]
                given += len(found)
                yield [(block, number) for block, number in found if block is not None]
                for position in [each for each in window if order.steps_of(each)[-1] == now]:
                    del window[position]
            if not given and start == (0, 0):
                raise UserError("the stream has no photo that can be used: all are left out, see stream.json")
            epoch, step, row = epoch + 1, 0, 0

    def _enter(
        self, order: EpochOrder, epoch: int, step: int, start: Start, window: dict[int, LoadedBlock | None]
    ) -> None:
        """Bring the blocks of a step into the window, and ask for those that come next."""
        positions = order.in_window(step)
        for position in positions:
            if position not in window:
                self._ask(order, epoch, position, step)
        for position in range(positions.stop, min(positions.stop + AHEAD, len(order.blocks))):
            self._ask(order, epoch, position, step + 1)
        if positions.stop + AHEAD > len(order.blocks):
            following = self._order.epoch(epoch + 1)
            for position in range(min(AHEAD, following.window)):
                self._ask(following, epoch + 1, position, 0)
        for position in positions:
            if position not in window:
                # In the order of the positions: which shard is left out does not depend on which answer comes first.
                window[position] = self._take(order, epoch, position, step, start)

    def _is_missing(self, order: EpochOrder, epoch: int, position: int, step: int) -> bool:
        """Whether no row of a block is used from this step on."""
        shard = self._chosen[int(order.blocks[position])].shard
        return self._order.skips.missing(epoch, position, shard, step) is not None

    def _ask(self, order: EpochOrder, epoch: int, position: int, step: int) -> None:
        if (epoch, position) not in self._futures and not self._is_missing(order, epoch, position, step):
            number = int(order.blocks[position])
            if epoch == 0 and number in self._kept:
                self._futures[epoch, position] = Future()
                self._futures[epoch, position].set_result(self._kept.pop(number))
            else:
                self._futures[epoch, position] = self._blocks.submit(self._chosen[number])

    def _take(self, order: EpochOrder, epoch: int, position: int, step: int, start: Start) -> LoadedBlock | None:
        future = self._futures.pop((epoch, position), None)
        number = int(order.blocks[position])
        if future is None or self._is_missing(order, epoch, position, step):
            return None
        try:
            loaded = future.result()
        except Broken as error:
            self._left_out.broken(number, error, epoch, position, start)
            return None
        if loaded.unusable.keys() - self._order.skips.rows.get(number, set()):
            self._left_out.unusable(number, loaded)
        return loaded


def batch_of(rows: Sequence[Row]) -> Batch:
    """These rows, images decoded."""
    images = [block.images[row] or b"" for block, row in rows]
    return Batch(
        images=decoded(images),
        c=torch.from_numpy(np.stack([block.embeddings[row] for block, row in rows])),
        identities=[block.identities[row] for block, row in rows],
        keys=[block.keys[row] for block, row in rows],
    )

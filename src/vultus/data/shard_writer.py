"""The work of a preparation on one shard: its photos in, the shard out. One process and several run the same code.

Photos are decoded in threads and embedded in batches, each of which is computed by one thread: with another number of
threads PyTorch may round differently, and the bytes would depend on the machine and the number of processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vultus._prefetch import Prefetch
from vultus.data.crops import Crops, Encoders, Unusable, crops_of, embed, in_test
from vultus.data.items import Item, Part, Position
from vultus.data.options import Options
from vultus.data.shards import Json, PreparedFolder
from vultus.errors import UserError

PREFETCH = 3  # batches that are decoded while the encoder computes; bounds the memory


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard that is to be written.

    Attributes:
        number: of the shard.
        part: of the source, by its number.
        split: of its photos, "train" or "test"; None: it follows from the identity.
        count: of its photos, at most.
        items: its photos; None: `count` items of the part, which can be read from any position, after `start`.
        start: see `items`.
        expected: sha256 of a shard that is made again and that the manifest names.
    """

    number: int
    part: int
    split: str | None
    count: int
    items: Iterable[Item] | None
    start: Position | None = None
    expected: str | None = None

    def __str__(self) -> str:
        return f"shard {self.number}"


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard whose file is complete.

    Attributes:
        entry: of its sidecar: file, rows and sha256.
        skipped: photos, each with the reason.
        synthetic: number of images whose metadata say that they are.
        first_synthetic: the key of the first of them.
    """

    entry: Json
    skipped: list[Json]
    synthetic: int
    first_synthetic: str


class ShardWriter:
    """Writes the shards of a preparation. `test_identities`: people whose photos of the split "train" are skipped."""

    def __init__(
        self,
        folder: PreparedFolder,
        options: Options,
        parts: Mapping[int, Part],
        encoders: Encoders,
        test_identities: frozenset[str],
    ) -> None:
        """`parts`: those that the tasks read from."""
        self.folder = folder
        self.options = options
        self.parts = parts
        self.encoders = encoders
        self.test_identities = test_identities
        self._threads = torch.get_num_threads()
        self._decoding = ThreadPoolExecutor(max(2, self._threads), "vultus-decode")
        # Threads of a GPU would only wait for one another.
        self._at_once = self._threads if torch.device(options.device).type == "cpu" else 1
        self._embedding = ThreadPoolExecutor(self._at_once, "vultus-embed", torch.set_num_threads, (1,))

    def close(self) -> None:
        """End the threads."""
        for pool in (self._decoding, self._embedding):
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # for threads that start later

    def __call__(self, task: ShardTask, read: Callable[[], None] = lambda: None) -> WrittenShard:
        """Write a shard, without its sidecar. `read` is called after each photo."""
        items = task.items
        if items is None:
            items = itertools.islice(self.parts[task.part].items(task.start), task.count)
        rows: list[Json] = []
        skipped: list[Json] = []
        synthetic: list[str] = []
        pending: list[tuple[Json, tuple[Image.Image, ...]]] = []  # rows without their embeddings
        batches: deque[tuple[list[Json], Future[dict[str, npt.NDArray[np.float32]]]]] = deque()

        def embed_pending() -> None:
            if pending:
                own = [row for row, _ in pending]
                faces = [faces for _, faces in pending]
                batches.append((own, self._embedding.submit(self._embed, [row["key"] for row in own], faces)))
                pending.clear()

        def collect(remaining: int) -> None:
            while len(batches) > remaining:
                own, future = batches.popleft()
                for name, embeddings in future.result().items():
                    for row, embedding in zip(own, embeddings, strict=True):
                        row[name] = embedding
                rows.extend(own)

        with Prefetch(self._decode(items), PREFETCH * self.options.batch) as photos:
            for item, future in photos:
                crops, split = self._usable(item, future.result(), task.split)
                if isinstance(crops, Unusable):
                    skip = {"key": item.key, "reason": crops.reason}
                    skipped.append(skip | {"again": True} if crops.again else skip)
                else:
                    row = {"image": crops.jpeg, "identity": item.identity, "key": item.key, "split": split}
                    pending.append((row, crops.faces))
                    if crops.synthetic:
                        synthetic.append(item.key)
                if len(pending) == self.options.batch:
                    embed_pending()
                    collect(self._at_once)
                read()
        embed_pending()
        collect(0)
        entry = self.folder.write(task.number, rows, self.encoders.dims, task.expected)
        return WrittenShard(entry, skipped, len(synthetic), synthetic[0] if synthetic else "")

    def _decode(self, items: Iterable[Item]) -> Generator[tuple[Item, Future[Crops | Unusable]], None, None]:
        """Give the items to the threads that decode. Yields them without their bytes."""
        views, options = self.encoders.views, self.options
        for item in items:
            crops = self._decoding.submit(crops_of, item, options.resolution, views, options.align)
            yield Item(item.key, item.identity, None), crops

    def _embed(self, keys: Sequence[str], faces: Sequence[Sequence[Image.Image]]) -> dict[str, npt.NDArray[np.float32]]:
        """The embeddings [n, dim] of n photos, by column, from what each network reads of them."""
        table = self.encoders.table
        values = {} if table is None else {"embedding": table.vectors(keys)}
        for (name, network), images in zip(self.encoders.networks.items(), zip(*faces, strict=True), strict=True):
            values[name] = embed(network, images, self.options.device)
        return values

    def _usable(self, item: Item, crops: Crops | Unusable, split: str | None) -> tuple[Crops | Unusable, str]:
        """The crops, or why the photo is skipped; its split."""
        if split is None:
            split = "test" if in_test(item.identity, self.options.test_fraction) else "train"
        elif split == "train" and item.identity in self.test_identities:
            crops = Unusable("this person is in the test split")
        if self.encoders.table is not None and item.key not in self.encoders.table:
            crops = Unusable(f"no row in {self.encoders.table.path.name}")
        return crops, split


@dataclass(frozen=True)
class MakeShardWriter:
    """Makes the ShardWriter of a worker process. See there.

    Attributes:
        load: loads the encoders.
        entries: what the manifest says about them.
    """

    folder: Path
    options: Options
    parts: Mapping[int, Part]
    load: Callable[[], Encoders]
    entries: Mapping[str, Any]
    test_identities: frozenset[str]

    def __call__(self) -> ShardWriter:
        """Load the encoders. Raises UserError if one is another."""
        encoders = self.load()
        if encoders.entries() != self.entries:
            raise UserError(
                f"a worker has another encoder, {encoders.entries()}, than {dict(self.entries)}; install the same "
                "weights on all machines"
            )
        return ShardWriter(PreparedFolder(self.folder), self.options, self.parts, encoders, self.test_identities)

"""A prepared data set as batches, in an order that is a function of (seed, images seen)."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from vultus._files import read_json
from vultus.data.shards import SCHEMA
from vultus.errors import UserError
from vultus.images.io import from_pil


@dataclass(frozen=True)
class Batch:
    """Rows of a prepared data set: images uint8 [B, 3, R, R], c float32 [B, 512] of unit norm, and whose they are."""

    images: Tensor
    c: Tensor
    identities: list[str]
    keys: list[str]


class PreparedDataset:
    """What `vultus prepare` wrote, memory-mapped.

    Args:
        folder: the prepared data set.
        split: "train", "test", or None for all rows.
        max_images: use a random subset of this many rows, drawn by `seed`; 0 uses all.

    Raises UserError if the folder is not a finished prepared data set or the split is empty.
    """

    def __init__(self, folder: str | Path, split: str | None = "train", *, max_images: int = 0, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.split = split
        if not (self.folder / "manifest.json").is_file():
            what = (
                "not finished: run the same `vultus prepare` again"
                if (self.folder / "progress").is_dir()
                else ("not a prepared data set: make one with `vultus prepare SOURCE --out DIR`")
            )
            raise UserError(f"{self.folder}: {what}")
        self.manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        if self.manifest.get("schema") != SCHEMA:
            raise UserError(
                f"{self.folder / 'manifest.json'}: schema {self.manifest.get('schema')} is not {SCHEMA}; "
                f"prepare the data set again with this version"
            )
        self.resolution: int = self.manifest["resolution"]
        self._tables = [self._open(shard["file"]) for shard in self.manifest["shards"]]
        self._select(split, max_images, seed)

    def with_split(self, split: str | None, *, max_images: int = 0, seed: int = 0) -> PreparedDataset:
        """Other rows of the same data set, with the same arguments; the opened tables are shared.

        Raises UserError if the split is empty.
        """
        view = copy.copy(self)
        view.__dict__.pop("identities", None)
        view.split = split
        view._select(split, max_images, seed)
        return view

    def _select(self, split: str | None, max_images: int, seed: int) -> None:
        rows: list[tuple[int, int]] = []
        for number, table in enumerate(self._tables):
            splits = table.column("split").to_pylist()
            rows += [(number, row) for row, name in enumerate(splits) if split is None or name == split]
        self._rows = np.asarray(rows, dtype=np.int64).reshape(-1, 2)
        if not len(self._rows):
            raise UserError(
                f"{self.folder}: no image in split {split!r}; there are {self.manifest['counts']['splits']}"
            )
        if max_images and max_images < len(self._rows):
            chosen = np.random.default_rng(seed).permutation(len(self._rows))[:max_images]
            self._rows = self._rows[np.sort(chosen)]

    def _open(self, name: str) -> pa.Table:
        path = self.folder / name
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except FileNotFoundError:
            raise UserError(f"{path}: missing; prepare the data set again") from None
        except pa.ArrowInvalid:
            raise UserError(f"{path}: damaged; delete the folder and prepare the data set again") from None

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def identities(self) -> list[str]:
        """The identity of every row."""
        columns = [table.column("identity") for table in self._tables]
        return [columns[number][int(row)].as_py() for number, row in self._rows]

    def embeddings(self, indices: Sequence[int] | np.ndarray | None = None) -> Tensor:
        """Float32 [B, dim] of the given rows, or of all."""
        chosen = self._rows if indices is None else self._rows[np.asarray(indices)]
        found = np.empty((len(chosen), self.manifest["encoder"]["dim"]), np.float32)
        for number, table in enumerate(self._tables):
            places = np.flatnonzero(chosen[:, 0] == number)
            if len(places):
                values = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(len(table), -1)
                found[places] = values[chosen[places, 1]]
        return torch.from_numpy(found)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Decode the given rows."""
        rows = [(self._tables[number], int(row)) for number, row in self._rows[np.asarray(indices)]]
        pictures = [Image.open(io.BytesIO(table.column("image")[row].as_py())) for table, row in rows]
        return Batch(
            images=from_pil(pictures),
            c=self.embeddings(indices),
            identities=[table.column("identity")[row].as_py() for table, row in rows],
            keys=[table.column("key")[row].as_py() for table, row in rows],
        )

    def people(self, count: int) -> list[int]:
        """Indices of the first photos of the first `count` different people."""
        first: dict[str, int] = {}
        for index, identity in enumerate(self.identities):
            first.setdefault(identity, index)
            if len(first) == count:
                break
        return list(first.values())


class Order:
    """Which rows a step reads: a fresh permutation for every pass, a function of (seed, images seen) alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def __call__(self, cur_nimg: int, count: int) -> np.ndarray:
        """The `count` rows that follow after cur_nimg images. A batch may span the end of a pass."""
        found: list[np.ndarray] = []
        while count > 0:
            epoch, start = divmod(cur_nimg, self.length)
            part = self._permutation(epoch)[start : start + count]
            found.append(part)
            cur_nimg, count = cur_nimg + len(part), count - len(part)
        return np.concatenate(found)


def batches(
    dataset: PreparedDataset, *, batch: int, cur_nimg: int, seed: int, pin: bool = False
) -> Generator[tuple[int, Batch], None, None]:
    """Yield (images seen before the batch, batch) for ever. Run it in a thread with ahead.Ahead.

    `pin` puts the tensors into page-locked memory, from which a GPU copies without waiting.
    """
    order = Order(len(dataset), seed)
    while True:
        item = dataset.batch(order(cur_nimg, batch))
        if pin:
            item = Batch(item.images.pin_memory(), item.c.pin_memory(), item.identities, item.keys)
        yield cur_nimg, item
        cur_nimg += batch

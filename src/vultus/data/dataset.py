"""Batches of a prepared data set, in an order that is a function of (seed, images seen)."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from vultus._progress import message
from vultus._run_config import read_run_config
from vultus.data.integrity import check_shards
from vultus.data.manifest import read_manifest
from vultus.errors import UserError, in_one_line
from vultus.images.io import from_pil
from vultus.models.facenet import Encoder

CHUNK = 8192  # embeddings that are read at once


# Of the columns of a shard but those of embeddings; see SHARD in shards.py.
COLUMNS = {"image": pa.binary(), "identity": pa.string(), "key": pa.string(), "split": pa.string()}
MAX_SIDE = 1024  # pixels, of what `vultus prepare` writes


@dataclass(frozen=True)
class Batch:
    """Rows of a prepared data set: images uint8 [B, 3, R, R], unit-norm embeddings c float32 [B, dim], identities.

    `facenet` [B, 512]: FaceNet's embeddings, where c are those of another encoder and the data set has them. `second`
    [B, dim2]: targets of a second encoder, where batches() got them.
    """

    images: Tensor
    c: Tensor
    identities: list[str]
    keys: list[str]
    facenet: Tensor | None = None
    second: Tensor | None = None


def decoded(images: Sequence[bytes], side: int | None = None) -> Tensor:
    """JPEG of a data set as uint8 [B, 3, R, R]. Raises an error of Pillow's, or ValueError for another `side`."""
    opened = [Image.open(io.BytesIO(image), formats=("JPEG",)) for image in images]
    for image in opened:
        if image.size != (side or image.width, side or image.width) or image.width > MAX_SIDE:
            raise ValueError(f"{image.width}x{image.height} pixels")
    return from_pil(opened)


class PreparedDataset:
    """A prepared data set, memory-mapped, or one split of it.

    Args:
        folder: that `vultus prepare` wrote.
        split: "train", "test", or None for all rows.
        max_images: use a random subset of this many rows; 0 uses all.
        seed: of that subset.

    Attributes:
        manifest: the content of manifest.json.
        resolution: side R of the images in pixels.
        random_access: whether any row can be read at any time.

    Raises UserError if the folder is not a complete prepared data set, a shard is not the bytes that the manifest
    records, or the split is empty.
    """

    random_access: ClassVar[bool] = True

    def __init__(self, folder: str | Path, split: str | None = "train", *, max_images: int = 0, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        check_shards(self.folder, self.manifest)
        self.resolution: int = self.manifest["resolution"]
        self._tables = [self._open(shard["file"]) for shard in self.manifest["shards"]]
        self._check_content()
        self._select(split, max_images, seed)

    @property
    def facenet_column(self) -> str:
        """The column of FaceNet's embeddings, with which its losses and metrics compare; that of the condition, where
        it is FaceNet's."""
        return "facenet" if "facenet" in self.manifest else "embedding"

    @property
    def facenet_entry(self) -> dict[str, Any]:
        """What the manifest says about the encoder of `facenet_column`."""
        entry: dict[str, Any] = self.manifest.get("facenet") or self.manifest["encoder"]
        return entry

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.folder)

    def with_split(self, split: str | None, *, max_images: int = 0, seed: int = 0) -> PreparedDataset:
        """Another split of the same data set, with the arguments of the constructor. No file is opened again.

        Raises UserError if the split is empty.
        """
        other = copy.copy(self)
        other._forget()
        other._select(split, max_images, seed)
        return other

    def _forget(self) -> None:
        """Drop what was read of other rows."""
        for name in ("identities", "keys"):
            self.__dict__.pop(name, None)

    def _select(self, split: str | None, max_images: int, seed: int) -> None:
        """Set the rows (number of the table, row in it) of the data set."""
        self.split = split
        rows: list[tuple[int, int]] = []
        for number, table in enumerate(self._tables):
            splits = table.column("split").to_pylist()
            rows += [(number, row) for row, name in enumerate(splits) if split is None or name == split]
        self._rows = np.asarray(rows, dtype=np.int64).reshape(-1, 2)
        if not len(self._rows):
            side = {"train": ", or with a smaller --test_fraction", "test": ", or with a larger --test_fraction"}
            which = f"the {split} split" if split else "the data set"
            raise UserError(
                f"{self.folder}: {which} holds no image; prepare more people{side.get(split or '', '')}, into another "
                "--out"
            )
        if max_images and max_images < len(self._rows):
            chosen = np.random.default_rng(seed).permutation(len(self._rows))[:max_images]
            self._rows = self._rows[np.sort(chosen)]

    def as_of(self, content_sha256: str) -> Self:
        """The data set as it was when it had this content: all rows (split None) of the shards that it had then.

        `vultus prepare` adds photos to a data set as further shards, so the earlier ones are unchanged. Raises
        UserError if the data set never had that content.
        """
        if content_sha256 == self.manifest["content_sha256"]:
            return self
        earlier = self.manifest.get("earlier", [])
        state = next((state for state in earlier if state["content_sha256"] == content_sha256), None)
        if state is None:
            raise UserError(f"{self.folder}: never had the content {content_sha256[:12]}")
        other = copy.copy(self)
        other._forget()
        other.manifest = {
            **self.manifest,
            **{key: state[key] for key in ("counts", "content_sha256")},
            "shards": self.manifest["shards"][: state["shards"]],
            "earlier": earlier[: earlier.index(state)],
        }
        other._tables = self._tables[: state["shards"]]
        other._select(None, 0, 0)
        return other

    def begun_with(self, out: Path) -> PreparedDataset:
        """The data set as it was when the run in `out` began, so that the resumed run sees the same photos in the same
        order, also where `vultus prepare` has added photos since.

        A note tells the user. Where no run is in `out`, or it began on another data set, the data set is returned as it
        is, and the run's own check refuses it.
        """
        path = out / "config.json"
        content = str(read_run_config(path)["data"].get("content_sha256")) if path.is_file() else ""
        if content not in [state["content_sha256"] for state in self.manifest.get("earlier", [])]:
            return self
        earlier = self.as_of(content)
        before, now = (each.manifest["counts"]["images"] for each in (earlier, self))
        message(
            f"note: {self.folder} has grown from {before} to {now} images since this run began; it goes on with those "
            f"{before}. To train on all of them, begin a new run in another --out, or with --fresh"
        )
        return earlier

    def begin(self, out: Path, encoder: Encoder | None) -> None:
        """A run in `out` is about to read the data set, with this FaceNet, if it has one."""

    def close(self) -> None:
        """The run has ended."""

    def _open(self, name: str) -> pa.Table:
        path = self.folder / name
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            table.validate(full=True)  # Arrow itself does not look at the offsets that it reads text and images by
            kinds = {name: table.schema.field(name).type for name in COLUMNS}
            lists = all(pa.types.is_fixed_size_list(table.schema.field(name).type) for name in self._columns)
            if kinds != COLUMNS or not lists or any(table.column(name).null_count for name in table.column_names):
                raise ValueError
            return table
        except (pa.ArrowException, OSError, ValueError, LookupError):
            # Its bytes are those that were written, so they are no shard of this version.
            raise UserError(f"{path}: not a shard that can be read; prepare the data set into another --out") from None

    def _check_content(self) -> None:
        """Raise UserError unless the shards hold what the manifest says."""
        path = self.folder / "manifest.json"
        for shard, table in zip(self.manifest["shards"], self._tables, strict=True):
            checks = [("rows", shard["rows"], table.num_rows)]
            for column, key in self._columns.items():
                held = table.schema.field(column).type.list_size
                checks.append((f"{key}.dim", self.manifest[key].get("dim"), held))
            for name, stated, found in checks:
                if stated != found:
                    raise UserError(
                        f"{path}: {name} is {stated}, but {shard['file']} holds {found}; restore the file from a copy, "
                        "or prepare the data set into another --out"
                    )
        for table in self._tables[:1]:
            side = self._decoded([table.column("image")[0].as_py()], None).shape[-1] if len(table) else self.resolution
            if side != self.resolution:
                raise UserError(
                    f"{path}: resolution is {self.resolution}, but the images are {side}x{side}; restore the file from "
                    "a copy, or prepare the data set into another --out"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def rows_sha256(self) -> str:
        """Identifies the rows of this split among those of the data set."""
        return hashlib.sha256(self._rows.tobytes()).hexdigest()

    @functools.cached_property
    def identities(self) -> list[str]:
        """The identity of each row."""
        return self._strings("identity")

    @functools.cached_property
    def keys(self) -> list[str]:
        """The key of each row: the name of its photo."""
        return self._strings("key")

    def _strings(self, name: str) -> list[str]:
        columns = [table.column(name) for table in self._tables]
        return [columns[number][int(row)].as_py() for number, row in self._rows]

    def embeddings(self, indices: Sequence[int] | np.ndarray | None = None, column: str = "embedding") -> Tensor:
        """Embeddings float32 [B, dim] of the given rows, or of all: those of the condition, or those of `facenet`."""
        chosen = self._rows if indices is None else self._rows[np.asarray(indices)]
        dim = self.manifest["encoder" if column == "embedding" else column]["dim"]
        embeddings = np.empty((len(chosen), dim), np.float32)
        for number, table in enumerate(self._tables):
            places = np.flatnonzero(chosen[:, 0] == number)
            if len(places):
                values = table.column(column).combine_chunks().flatten().to_numpy().reshape(len(table), -1)
                embeddings[places] = values[chosen[places, 1]]
        return torch.from_numpy(embeddings)

    def embedding_chunks(self) -> Iterator[Tensor]:
        """The embeddings of all rows, float32 [n, dim] at a time, for the population prior."""
        for start in range(0, len(self), CHUNK):
            yield self.embeddings(range(start, min(start + CHUNK, len(self))))

    def read(
        self, *, batch: int, cur_nimg: int, seed: int, own: np.ndarray | None = None
    ) -> Generator[tuple[Batch, np.ndarray | None], None, None]:
        """The batches after `cur_nimg` images, without end, each with its rows; of each only the places `own`."""
        order = Order(len(self), seed)
        while True:
            rows = order(cur_nimg, batch)
            rows = rows if own is None else rows[own]
            yield self.batch(rows), rows
            cur_nimg += batch

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The given rows, images decoded."""
        rows = [(self._tables[number], int(row)) for number, row in self._rows[np.asarray(indices)]]
        return Batch(
            images=self._decoded([table.column("image")[row].as_py() for table, row in rows], self.resolution),
            c=self.embeddings(indices),
            identities=[table.column("identity")[row].as_py() for table, row in rows],
            keys=[table.column("key")[row].as_py() for table, row in rows],
            facenet=self.embeddings(indices, "facenet") if "facenet" in self.manifest else None,
        )

    def _decoded(self, images: Sequence[bytes], side: int | None) -> Tensor:
        """Images uint8 [B, 3, R, R]. Raises UserError if one is damaged, or of another `side`."""
        try:
            return decoded(images, side)
        except Exception as error:  # Pillow raises many kinds on damaged files
            reason = in_one_line(error)
            raise UserError(
                f"{self.folder}: an image in its shards is damaged ({reason}); prepare the data set into another --out"
            ) from None

    @property
    def _columns(self) -> dict[str, str]:
        """The keys of the manifest that describe columns of embeddings."""
        return {"embedding": "encoder"} | ({"facenet": "facenet"} if "facenet" in self.manifest else {})

    def people(self, count: int) -> list[int]:
        """The first row of each of the first `count` identities."""
        first: dict[str, int] = {}
        for index, identity in enumerate(self.identities):
            first.setdefault(identity, index)
            if len(first) == count:
                break
        return list(first.values())


class Order:
    """The rows of a training step: a new permutation for each pass, a function of (seed, images seen) alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def __call__(self, cur_nimg: int, count: int) -> np.ndarray:
        """The next `count` rows after `cur_nimg` images. They may span the end of a pass."""
        rows: list[np.ndarray] = []
        while count > 0:
            epoch, start = divmod(cur_nimg, self.length)
            part = self._permutation(epoch)[start : start + count]
            rows.append(part)
            cur_nimg, count = cur_nimg + len(part), count - len(part)
        return np.concatenate(rows)


def batches(
    dataset: PreparedDataset,
    *,
    batch: int,
    cur_nimg: int,
    seed: int,
    pin: bool = False,
    second: Tensor | None = None,
    own: np.ndarray | None = None,
) -> Generator[tuple[int, Batch], None, None]:
    """Yield (images seen before the batch, batch) without end, from `cur_nimg` on. Run it in a thread with Prefetch.

    `second` [N, dim2] are targets of a second encoder, a row for each row of the data set. With `own`, each batch is
    only these of its places, those of one of several processes.

    `pin` puts the tensors into page-locked memory, from which they are copied to a GPU asynchronously.
    """
    with contextlib.closing(dataset.read(batch=batch, cur_nimg=cur_nimg, seed=seed, own=own)) as source:
        for item, rows in source:
            if second is not None:
                item = replace(item, second=second[torch.from_numpy(rows)])
            if pin:
                names = ("images", "c", "facenet", "second")
                tensors = {name: getattr(item, name) for name in names}
                item = replace(item, **{name: one.pin_memory() for name, one in tensors.items() if one is not None})
            yield cur_nimg, item
            cur_nimg += batch

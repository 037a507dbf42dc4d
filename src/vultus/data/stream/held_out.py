"""The photos of people for validation: read once, then in memory and in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vultus._progress import message
from vultus.data.dataset import PreparedDataset
from vultus.data.stream.blocks import Block, Blocks
from vultus.data.stream.cache import Arrays, Cache
from vultus.data.stream.remote import Broken
from vultus.errors import UserError

PHOTOS = 256  # at least, where there are so many
GROUPS = 8  # row groups that they come from, at least


class HeldOut(PreparedDataset):
    """The photos for validation as a prepared data set, which is in memory.

    Args:
        manifest: of the stream.
        folder: what stands for one in messages.
        table: with the columns of a shard.
    """

    def __init__(self, manifest: dict[str, Any], folder: Path, table: pa.Table) -> None:
        self.manifest, self.folder = manifest, folder
        self.resolution = manifest["resolution"]
        self._tables = [table]
        self._select("test", 0, 0)


def held_out(blocks: Blocks, test: Sequence[Block], manifest: Mapping[str, Any]) -> pa.Table:
    """Photos from row groups that are spread evenly over the source, and spread evenly in each, as a shard.

    Args:
        blocks: reads the blocks.
        test: the blocks for validation.
        manifest: of the stream.

    Raises UserError if none can be read.
    """
    cache = blocks.shards.cache
    key = Cache.key("held out", manifest["content_sha256"])
    found = cache.get(key)
    if found is None:
        columns = _load(blocks, test, str(manifest["source"]))
        data = b"".join(columns["image"])
        arrays: Arrays = {
            "images": np.frombuffer(data, np.uint8),
            "lengths": np.asarray([len(image) for image in columns["image"]], np.int64),
            "embeddings": np.stack(columns["embedding"]),
        }
        cache.put(key, arrays, {"identity": columns["identity"], "key": columns["key"]})
        names: Any = columns
    else:
        arrays, names = found
        data = arrays["images"].tobytes()
    ends = arrays["lengths"].cumsum()
    images = [data[end - length : end] for end, length in zip(ends.tolist(), arrays["lengths"].tolist(), strict=True)]
    values = pa.array(arrays["embeddings"].ravel(), pa.float32())
    return pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, arrays["embeddings"].shape[1]),
            "identity": pa.array(names["identity"], pa.string()),
            "key": pa.array(names["key"], pa.string()),
            "split": pa.array(["test"] * len(images), pa.string()),
        }
    )


def _load(blocks: Blocks, test: Sequence[Block], source: str) -> dict[str, list[Any]]:
    count = GROUPS
    while True:
        count = min(count, len(test))
        numbers = sorted({round(n * (len(test) - 1) / max(count - 1, 1)) for n in range(count)})
        if count == len(test) or sum(len(test[n].rows) for n in numbers) >= PHOTOS:
            break
        count *= 2
    each = -(-PHOTOS // len(numbers))
    columns: dict[str, list[Any]] = {"image": [], "embedding": [], "identity": [], "key": []}
    reasons = []
    for number in numbers:
        block = test[number]
        spread = np.unique(np.linspace(0, len(block.rows) - 1, min(each, len(block.rows))).round().astype(np.int64))
        try:
            loaded = blocks.load(Block(block.shard, block.group, block.rows[spread]))
        except Broken as error:
            message(f"note: {error}; the validation does without its photos")
            reasons.append(f" ({error})")
            continue
        for row, image in enumerate(loaded.images):
            if image is not None:
                columns["image"].append(image)
                columns["embedding"].append(loaded.embeddings[row])
                columns["identity"].append(loaded.identities[row])
                columns["key"].append(loaded.keys[row])
    if not columns["key"]:
        raise UserError(f"{source}: no photo for validation can be read{reasons[0] if reasons else ''}")
    return columns

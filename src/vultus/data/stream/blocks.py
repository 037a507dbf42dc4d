"""The blocks of a stream: the training photos of one row group, decoded, cropped and embedded."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vultus._download import find_weights
from vultus.data.crops import Crops, Unusable, crops_of, embed
from vultus.data.items import Item
from vultus.data.stream.cache import Cache
from vultus.data.stream.remote import Broken
from vultus.data.stream.shards import Shard, Shards
from vultus.errors import UserError
from vultus.models.encoders import CropEncoder, encoder_entry
from vultus.models.facenet import DTYPES, FACENET_WEIGHTS, FaceNet, dtype_name, load_facenet

BATCH = 32  # photos that are embedded at a time, as `prepare` does
DECODED = 128  # photos that are decoded at a time; bounds the memory
READING = 2  # blocks that are read at a time

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """Rows of a row group: the number of the shard, that of the row group, and the rows in it."""

    shard: int
    group: int
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class LoadedBlock:
    """The photos of a block: JPEG as in a prepared data set (None: unusable), and embeddings float32 [n, dim]."""

    keys: list[str]
    identities: list[str]
    images: list[bytes | None]
    embeddings: Floats
    unusable: dict[int, str]  # the reason, by row of the block


class StreamEncoder:
    """FaceNet, or another encoder, loaded when the first embedding is not in the cache.

    Args:
        encoder: another encoder than FaceNet; it keeps its dtype.
        device: of the computation.
        begun: what an earlier session of the run recorded about its encoder.

    Attributes:
        entry: what the manifest says about it.
        size, crop: side of its input, and the fraction of a photo that it reads.
    """

    def __init__(self, encoder: CropEncoder | None, device: str, begun: dict[str, Any] | None = None) -> None:
        self.device = device
        self._encoder = encoder
        self._error: UserError | None = None
        self._lock = threading.Lock()
        kind: Any = FaceNet if encoder is None else encoder
        self.size, self.crop = int(kind.size), kind.crop
        if encoder is not None:
            self.entry = encoder_entry(encoder)
        elif begun is not None and begun.get("id") == FaceNet.id:
            self.entry = begun
        else:
            # "auto" depends on a measurement, so it is resolved once for a run.
            dtype = dtype_name("auto", device)
            self.entry = {"id": FaceNet.id, "dim": FaceNet.dim, "weights_sha256": _weights(), "dtype": dtype}

    def offer(self, encoder: Any) -> None:
        """Use this one, if it is the same and on the same device, rather than load it a second time."""
        if self._encoder is None and isinstance(encoder, FaceNet) and encoder_entry(encoder) == self.entry:
            self._encoder = encoder

    def embed(self, faces: Sequence[Image.Image]) -> Floats:
        """Embeddings float32 [N, dim] of the crops of N photos. One thread at a time computes."""
        with self._lock:
            if self._encoder is None:
                if self._error is not None:
                    raise self._error
                try:
                    facenet = load_facenet(device=self.device, dtype=DTYPES[self.entry["dtype"]])
                except UserError as error:  # not tried again for each block
                    self._error = error
                    raise
                if encoder_entry(facenet) != self.entry:
                    raise UserError(
                        "the run was begun with other FaceNet weights (sha256 "
                        f"{self.entry['weights_sha256'][:12]}...); "
                        "put that file into the folder of VULTUS_WEIGHTS, or choose another --out"
                    )
                self._encoder = facenet
            return embed(self._encoder, faces, self.device)


def _halves(faces: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    """Fewer than 2 * BATCH photos, as one batch or two."""
    middle = (len(faces) + 1) // 2 if len(faces) > BATCH else len(faces)
    return [part for part in (faces[:middle], faces[middle:]) if part]


def _weights() -> str:
    """The sha256 of the FaceNet weights that load_facenet() would load; no download."""
    try:
        return find_weights(*FACENET_WEIGHTS, fetch=False)[1].sha256
    except UserError:
        return next(weights.sha256 for weights in FACENET_WEIGHTS if weights.url)


class Blocks:
    """Loads blocks, in threads.

    Args:
        shards: reads the files.
        opened: the shards by their number.
        encoder: of the embeddings.
        resolution: side of the crops.
        align: find and align the face first.
        workers: threads that decode; 0 decodes in the thread that reads the block.
    """

    def __init__(
        self,
        shards: Shards,
        opened: Sequence[Shard],
        encoder: StreamEncoder,
        *,
        resolution: int,
        align: bool,
        workers: int,
    ) -> None:
        self.shards, self.opened, self.encoder = shards, opened, encoder
        self.resolution, self.align = resolution, align
        self.computed = 0  # embeddings that were not in the cache
        self._pool = ThreadPoolExecutor(workers, "vultus-decode") if workers else None
        self._reading = threading.Semaphore(READING)
        self._busy: dict[tuple[int, int], threading.Lock] = {}
        self._failed: dict[int, Broken] = {}  # by shard: it is not asked again in this process
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def submit(self, block: Block) -> Future[LoadedBlock]:
        """Load a block in a thread. Its result raises Broken, and UserError."""
        future: Future[LoadedBlock] = Future()
        stopped = self._stopped

        def run() -> None:
            with self._reading:
                try:
                    if stopped.is_set():
                        raise Broken(self.opened[block.shard].name, "the training has ended")
                    future.set_result(self.load(block, stopped))
                except BaseException as error:
                    future.set_exception(error)

        # A thread that hangs in a network read is a daemon: it ends with the process.
        thread = threading.Thread(target=run, name="vultus-stream", daemon=True)
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]
        thread.start()
        return future

    def stop(self) -> None:
        """End the threads; one that waits for the network is left behind."""
        threads, self._threads = self._threads, []
        stopped, self._stopped = self._stopped, threading.Event()
        stopped.set()
        end = time.monotonic() + 5
        for thread in threads:
            thread.join(timeout=max(0.0, end - time.monotonic()))

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """A context at whose end no thread is at work any more."""
        try:
            yield
        finally:
            self.stop()

    def load(self, block: Block, stopped: threading.Event | None = None) -> LoadedBlock:
        """Read, decode and embed a block. Raises Broken, also when `stopped` is set, and UserError."""
        if block.shard in self._failed:
            raise self._failed[block.shard]
        try:
            items = self.shards.items(self.opened[block.shard], block.group, block.rows)
        except Broken as error:
            self._failed[block.shard] = error
            raise
        with self._busy.setdefault((block.shard, block.group), threading.Lock()):
            # The end of a pass and the beginning of the next may need the same block: it is embedded once.
            return self._embedded(block, items, stopped)

    def _embedded(self, block: Block, items: Sequence[Item], stopped: threading.Event | None) -> LoadedBlock:
        cached = self.embeddings(block)
        images: list[bytes | None] = []
        unusable: dict[int, str] = {}
        faces: list[Image.Image] = []
        parts = [np.empty((0, int(self.encoder.entry["dim"])), np.float32)]
        again = False
        for row, crops in enumerate(self._crops(items)):
            if stopped is not None and stopped.is_set():
                raise Broken(self.opened[block.shard].name, "the training has ended")
            images.append(crops.jpeg if isinstance(crops, Crops) else None)
            if isinstance(crops, Unusable):
                unusable[row] = crops.reason
                again = again or crops.again
            elif cached is None:
                faces.append(crops.faces[0])
                if len(faces) == 2 * BATCH:
                    parts.append(self.encoder.embed(faces[:BATCH]))
                    del faces[:BATCH]
        if cached is None:
            # The rest in parts of the same size. What is computed for a row depends on its row group alone.
            parts += [self.encoder.embed(part) for part in _halves(faces)]
            embeddings = np.zeros((len(items), parts[0].shape[1]), np.float32)
            embeddings[[row for row in range(len(items)) if row not in unusable]] = np.concatenate(parts)
            self.computed += len(items) - len(unusable)
            if not again:
                self._keep(block, embeddings, unusable)
        else:
            embeddings, lacking = cached
            for row, reason in lacking.items():  # unusable when the embeddings were computed
                images[row], unusable[row] = None, reason
        keys, identities = [item.key for item in items], [item.identity for item in items]
        return LoadedBlock(keys, identities, images, embeddings, unusable)

    def _crops(self, items: Sequence[Item]) -> Iterator[Crops | Unusable]:
        def crop(item: Item) -> Crops | Unusable:
            return crops_of(item, self.resolution, [(self.encoder.size, self.encoder.crop)], self.align)

        for start in range(0, len(items), DECODED):
            part = items[start : start + DECODED]
            yield from map(crop, part) if self._pool is None else self._pool.map(crop, part)

    # --- the cache ---------------------------------------------------------------------------------------------------

    def embeddings(self, block: Block) -> tuple[Floats, dict[int, str]] | None:
        """Embeddings [n, dim] of a block and its unusable rows, if they are in the cache."""
        key = self._key(block)
        found = None if key is None else self.shards.cache.get(key)
        if found is None:
            return None
        arrays, unusable = found
        return arrays["embeddings"], {int(row): reason for row, reason in unusable.items()}

    def _key(self, block: Block) -> str | None:
        shard = self.opened[block.shard]
        if not shard.place.file.etag:
            return None  # a change of the file would not be noticed
        rows = hashlib.sha256(block.rows.tobytes()).hexdigest()
        crop = ["aligned" if self.align else "centre", self.encoder.crop, self.encoder.size]
        return Cache.key(
            "embeddings", shard.entry(), self.shards.columns[0], block.group, rows, self.encoder.entry, crop
        )

    def _keep(self, block: Block, embeddings: Floats, unusable: dict[int, str]) -> None:
        key = self._key(block)
        if key is not None:
            self.shards.cache.put(key, {"embeddings": embeddings}, unusable)

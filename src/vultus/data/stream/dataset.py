"""A source that is streamed, with the interface of a prepared data set, so that the trainer does not know which it has.

At the start the index is read: footers and identities, no image. Training photos come in the order of order.py, block
by block; a photo is cropped as `prepare` does it, and its embedding comes from the cache, or is computed and kept
there. A small set of photos of people for validation is read once and is in memory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vultus._formats import VERSIONS
from vultus._progress import message, progress
from vultus._run_config import read_run_config
from vultus.data.crops import crop_entry, in_test
from vultus.data.dataset import Batch, PreparedDataset
from vultus.data.items import counted, nobody_named
from vultus.data.stream.blocks import Block, Blocks, LoadedBlock, StreamEncoder
from vultus.data.stream.cache import Cache
from vultus.data.stream.held_out import HeldOut, held_out
from vultus.data.stream.options import StreamOptions
from vultus.data.stream.order import Skips, StreamOrder
from vultus.data.stream.places import find_places, too_many
from vultus.data.stream.reading import Reading, Row, Start, batch_of
from vultus.data.stream.record import Record, check_same, read_record
from vultus.data.stream.remote import Attempts, Broken
from vultus.data.stream.shards import Shard, Shards
from vultus.data.tables import identities_from
from vultus.errors import UserError
from vultus.models.encoders import CropEncoder
from vultus.models.facenet import Encoder

LARGE_GROUP = 20_000  # rows of a row group, from which the memory deserves a note


class StreamedDataset(PreparedDataset):
    """A source that is read as the training goes.

    Args:
        source: hf://user/name[@revision], http(s):// of Parquet files, or Parquet files on a disk.
        options: see StreamOptions; `resolution` must be given.
        device: where embeddings are computed.
        encoder: another encoder than FaceNet, on `device`.
        begun: the folder of a run that is resumed: it goes on at its revision, with its encoder, without the files that
            it could not read.

    Attributes:
        record: what was left out; `record.folder` is where a training keeps it.

    Raises UserError for a source that cannot be opened (see open_source), and for a run that was begun on others.
    """

    random_access = False  # what is read next depends on what could not be used before

    def __init__(
        self,
        source: str | Path,
        options: StreamOptions,
        *,
        device: str = "cpu",
        encoder: CropEncoder | None = None,
        begun: str | Path | None = None,
    ) -> None:
        if options.resolution is None:
            raise ValueError("a stream needs a resolution")
        self.source, self.options, self.resolution = str(source), options, options.resolution
        self.folder = Path(self.source)
        before = read_record(begun) if begun is not None else None
        attempts = self._attempts = Attempts(options.timeout, options.retries, options.pause)
        revision = before["revision"] if before and before["source"] == self.source else None
        places = find_places(self.source, attempts, revision=revision)
        unopened = before["skipped"]["unopened"] if before else []
        known = {entry["name"] for entry in unopened}
        chosen = [place for place in places.places if place.name not in known]
        self._cache = Cache(round(options.cache_gb * 1e9))
        self._shards = Shards(self.source, chosen, self._cache)
        opened = self._shards.open(options.split, options.image_column, options.id_column)
        for error in self._shards.broken:
            message(f"note: {error}; skipped: its photos are left out of this run")
        names = {place.file.name: place.name for place in places.places}
        unopened = unopened + [
            {"file": error.name, "name": names[error.name], "reason": error.reason} for error in self._shards.broken
        ]
        self.encoder = StreamEncoder(encoder, device, _begun_encoder(begun))
        self._opened = opened
        self._train, self._test, people = self._divide()
        head = {
            "source": self.source,
            "revision": places.revision,
            "options": options.content(),
            "files": [shard.entry() for shard in opened],
        }
        self.record = Record(head, unopened)
        self.manifest = self._describe(head, people)
        self._blocks = Blocks(
            self._shards,
            opened,
            self.encoder,
            resolution=self.resolution,
            align=options.align,
            workers=options.workers,
        )
        self._held_out: list[PreparedDataset] = []  # filled once, also for the copies of this object
        self._select_blocks(None, 0, 0)
        self._note()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.source

    def __len__(self) -> int:
        return self._length

    # --- what it consists of -----------------------------------------------------------------------------------------

    @property
    def _has_splits(self) -> bool:
        """Whether the source says which photos are for validation."""
        return {shard.use for shard in self._opened} >= {"train", "test"}

    def _divide(self) -> tuple[list[Block], list[Block], dict[str, dict[str, int]]]:
        """The blocks for training and those for validation, by identity as `prepare`; numbers of images and people."""
        has_splits = self._has_splits
        test_people: set[str] = set()
        blocks: dict[str, list[Block]] = {"train": [], "test": []}
        images = {"train": 0, "test": 0}
        people: dict[str, set[str]] = {"train": set(), "test": set()}
        for number, shard in enumerate(self._opened):  # those of the test split come first
            names = shard.identities()
            if has_splits and shard.use == "test":
                test_people.update(names)
                held = used = np.ones(len(names), bool)
            elif has_splits:
                held = np.zeros(len(names), bool)
                used = np.asarray([name not in test_people for name in names], bool)
            else:
                chosen = {name: in_test(name, self.options.test_fraction) for name in dict.fromkeys(names)}
                held = np.asarray([chosen[name] for name in names], bool)
                used = np.ones(len(names), bool)
            ends = np.cumsum(shard.groups)
            for split, mask in (("train", used & ~held), ("test", used & held)):
                for group, part in enumerate(np.split(mask, ends[:-1])):
                    rows = np.flatnonzero(part).astype(np.int64)
                    if len(rows):
                        blocks[split].append(Block(number, group, rows))
                images[split] += int(mask.sum())
                people[split].update(names[row] for row in np.flatnonzero(mask))
        counts = {name: {"images": images[name], "people": len(people[name])} for name in images}
        if not blocks["train"]:
            raise UserError(f"{self.source}: no photo to train on; give a smaller --test_fraction, or another --split")
        return blocks["train"], blocks["test"], counts

    def _describe(self, head: dict[str, Any], splits: dict[str, dict[str, int]]) -> dict[str, Any]:
        """What a manifest says, and `stream`."""
        options, has_splits = self.options, self._has_splits
        total = sum(sum(shard.groups) for shard in self._opened)
        images = sum(split["images"] for split in splits.values())
        values = {
            "schema": VERSIONS["prepared data set"],
            "source": self.source,
            "licence": options.licence,
            "identities": identities_from(self._shards.columns),
            "resolution": self.resolution,
            "crop": crop_entry(options.align, self.encoder.crop),
            "encoder": self.encoder.entry,
            "counts": {"images": images, "skipped": total - images, "splits": splits},
            "shards": [],
        }
        # Not the address: the same files on another server are the same data.
        content = [head["files"], head["options"], values["crop"], values["encoder"], list(self._shards.columns)]
        stream = {
            "source": self.source,
            "revision": head["revision"],
            "split": "of the source" if has_splits else f"by identity, {options.test_fraction:g} for validation",
            "files": len(self._opened),
            "options": head["options"],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return values | {"content_sha256": digest, "stream": stream}

    def _note(self) -> None:
        if self._shards.columns[1] is None:
            message(nobody_named(self.source, "if a column names them, give it with --id-column"))
        elif self._shards.missing_identities:
            rows = counted(self._shards.missing_identities, "row")
            message(f"note: {rows} without {self._shards.columns[1]}, each counted as a person of its own")
        largest = max(max(shard.groups, default=0) for shard in self._opened)
        if largest > LARGE_GROUP:
            message(
                f"note: {self.source} has row groups of up to {largest} rows; {self.options.mix} of them are in memory "
                "at a time: lower --mix, or write the files with smaller row groups"
            )

    def begin(self, out: Path, encoder: Encoder | None) -> None:
        """Keep the record of what is left out in the run folder `out`, and use this encoder if it is the stream's."""
        self.record.folder = out
        self.encoder.offer(encoder)

    def close(self) -> None:
        """End what is still read, and say what was left out. Only what is in memory can be read afterwards."""
        self._attempts.stopped.set()
        self._blocks.stop()
        for note in self.record.notes():
            message(f"note: {note}")

    def begun_with(self, out: Path) -> PreparedDataset:
        """The stream itself. Raises UserError, which names the option or the file, if the run in `out` was begun on
        something else."""
        before = read_record(out)
        if before is not None:
            check_same(out, before, self.record.head, {shard.place.name: shard.name for shard in self._opened})
        return self

    # --- splits ------------------------------------------------------------------------------------------------------

    def with_split(self, split: str | None, *, max_images: int = 0, seed: int = 0) -> PreparedDataset:
        """The training photos, or for "test" a prepared data set, in memory, of some photos for validation.

        `max_images` is reached with whole row groups, the last of them in part, so that only these are read. Raises
        UserError if the source has no photos for validation.
        """
        if split == "test":
            if not self._held_out:
                if not self._test:
                    raise UserError(f"{self.source}: has no photos for validation; give a larger --test_fraction")
                self._held_out.append(
                    HeldOut(self.manifest, self.folder, held_out(self._blocks, self._test, self.manifest))
                )
            return self._held_out[0]
        other = copy.copy(self)
        other.__dict__.pop("identities", None)
        other._select_blocks(split, max_images, seed)
        return other

    def _select_blocks(self, split: str | None, max_images: int, seed: int) -> None:
        self.split, self.seed = split, seed
        chosen = self._train
        total = sum(len(block.rows) for block in chosen)
        if max_images and max_images < total:
            taken: list[tuple[int, Block]] = []
            room = max_images
            for number in np.random.default_rng(seed).permutation(len(chosen)).tolist():
                block = chosen[number]
                taken.append((number, Block(block.shard, block.group, block.rows[:room])))
                room -= len(taken[-1][1].rows)
                if not room:
                    break
            chosen = [block for _, block in sorted(taken, key=lambda pair: pair[0])]
        self._chosen = chosen
        self._length = sum(len(block.rows) for block in chosen)
        self._order: StreamOrder | None = None
        self._kept: dict[int, LoadedBlock] = {}  # of the first step, by number

    @functools.cached_property
    def identities(self) -> list[str]:
        """The identity of each row, in the order of `batch`."""
        order = self._begin().epoch(0)
        names = {shard: self._opened[shard].identities() for shard in {block.shard for block in self._chosen}}
        starts = {shard: np.cumsum([0, *self._opened[shard].groups]) for shard in names}
        blocks = [self._chosen[number] for number in order.blocks]
        return [
            names[block.shard][int(starts[block.shard][block.group]) + int(row)]
            for block in blocks
            for row in block.rows
        ]

    def rows_sha256(self) -> str:
        """Identifies the rows among those of the source."""
        digest = hashlib.sha256()
        for block in self._chosen:
            digest.update(np.asarray([block.shard, block.group, *block.rows], np.int64).tobytes())
        return digest.hexdigest()

    def as_of(self, content_sha256: str) -> Self:
        """A stream has no earlier states."""
        raise UserError(f"{self.source}: never had the content {content_sha256[:12]}")

    # --- rows at the beginning ---------------------------------------------------------------------------------------

    def _begin(self) -> StreamOrder:
        """The order of the run, without what an earlier session left out."""
        if self._order is None:
            self.record.load()
            skips = Skips([block.shard for block in self._chosen])
            numbers = {(block.shard, block.group): number for number, block in enumerate(self._chosen)}
            names = {shard.place.name: number for number, shard in enumerate(self._opened)}
            for entry in self.record.photos:
                number = numbers.get((names.get(entry["file"], -1), entry["group"]))
                if number is not None:
                    skips.rows.setdefault(number, set()).add(entry["row"])
            for entry in self.record.shards:
                if entry["name"] in names:
                    place = (entry["place"][0], entry["place"][1])
                    skips.shards.append((names[entry["name"]], entry["epoch"], entry["position"], place))
            rows = [len(block.rows) for block in self._chosen]
            self._order = StreamOrder(rows, self.seed, self.options.mix, skips)
        return self._order

    def _first_blocks(self) -> Iterator[int]:
        """The numbers of the blocks that the first step reads, without those that were left out from the start."""
        order = self._begin()
        first = order.epoch(0)
        for position in first.in_window(0):
            number = int(first.blocks[position])
            if order.skips.missing(0, position, self._chosen[number].shard, 0) != 0:
                yield number

    def embedding_chunks(self) -> Iterator[Tensor]:
        """The embeddings of the blocks that the first step reads: a random sample of the row groups, all of a small
        source. The others are not known before the first pass has ended."""
        known = {number: self._blocks.embeddings(self._chosen[number]) for number in self._first_blocks()}
        futures = {number: self._blocks.submit(self._chosen[number]) for number in known if known[number] is None}
        photos = sum(len(self._chosen[number].rows) for number in futures)
        bar = progress(photos, title="first photos of the stream") if futures else contextlib.nullcontext()
        with bar as shown, self._blocks.ended():
            for number, found in known.items():
                if found is None:
                    try:
                        loaded = self._kept[number] = futures[number].result()
                    except Broken:
                        continue  # named and recorded when the training reaches it
                    found = loaded.embeddings, loaded.unusable
                    if shown:
                        shown.update(len(loaded.keys))
                usable = [row for row in range(len(found[0])) if row not in found[1]]
                if usable:
                    yield torch.from_numpy(found[0][usable])

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Rows by their number, blocks in the order of the run; those that cannot be used are left out."""
        order = self._begin().epoch(0)
        starts = np.cumsum([0, *(len(self._chosen[number].rows) for number in order.blocks)])
        chosen: list[Row] = []
        loaded: dict[int, LoadedBlock | None] = {**self._kept}
        for index in np.asarray(indices).tolist():
            position = int(np.searchsorted(starts, index, "right")) - 1
            number = int(order.blocks[position])
            if number not in loaded:
                loaded[number] = None
                with contextlib.suppress(Broken):
                    loaded[number] = self._blocks.load(self._chosen[number])
            block, row = loaded[number], index - int(starts[position])
            if block is not None and block.images[row] is not None:
                chosen.append((block, row))
        return batch_of(chosen)

    def embeddings(self, indices: Sequence[int] | np.ndarray | None = None, column: str = "embedding") -> Tensor:
        """Embeddings float32 [B, dim] of rows by their number, see `batch`."""
        return self.batch(range(len(self)) if indices is None else indices).c

    # --- the training ------------------------------------------------------------------------------------------------

    def read(
        self, *, batch: int, cur_nimg: int, seed: int, own: np.ndarray | None = None
    ) -> Generator[tuple[Batch, np.ndarray | None], None, None]:
        """The batches after `cur_nimg` images, without end. Raises UserError if the network stays away."""
        if own is not None:
            raise ValueError("what a stream leaves out is known to who reads all of it")
        if seed != self.seed:
            self.seed, self._order = seed, None
        order = self._begin()
        self.record.save()
        place = order.locate(cur_nimg)
        kept, self._kept = (self._kept if place == (0, 0, 0) else {}), {}
        reading = Reading(self._blocks, self._chosen, order, self, kept)
        try:
            rows: deque[Row] = deque()
            for found in reading.rows(*place):
                rows.extend(found)
                while len(rows) >= batch:
                    yield batch_of([rows.popleft() for _ in range(batch)]), None
        finally:
            self._blocks.stop()

    def unusable(self, number: int, loaded: LoadedBlock) -> None:
        """Record the photos of a block that cannot be used."""
        block = self._chosen[number]
        known = self._begin().skips.rows.setdefault(number, set())
        name = self._opened[block.shard].place.name
        for row in sorted(loaded.unusable.keys() - known):
            entry = {"file": name, "group": block.group, "row": row, "key": loaded.keys[row]}
            self.record.photos.append(entry | {"reason": loaded.unusable[row]})
        known.update(loaded.unusable)
        self.record.save()

    def broken(self, number: int, error: Broken, epoch: int, position: int, start: Start) -> None:
        """Record that the file of a block is left out from here on (see Skips.shards).

        Raises UserError if no other file can be read either, or most of them are left out.
        """
        broken = self._chosen[number].shard
        shard = self._opened[broken]
        dropped = {entry["name"] for entry in self.record.shards} | {shard.place.name}
        others = [each for each in self._opened if each.use == shard.use and each.place.name not in dropped]
        if not self._answers(others):
            raise UserError(
                f"{error}; no other file of {self.source} can be read either: check the network, then run the same "
                "command again, which resumes"
            )
        if 2 * len(dropped) > sum(each.use == shard.use for each in self._opened):
            raise too_many(self.source, [error], len(self._opened))
        self._begin().skips.shards.append((broken, epoch, position, start))
        photos = sum(len(block.rows) for block in self._chosen if block.shard == broken)
        self.record.shards.append(
            {
                "file": shard.name,
                "name": shard.place.name,
                "epoch": epoch,
                "position": position,
                "place": list(start),
                "photos": photos,
                "reason": error.reason,
            }
        )
        message(
            f"note: {error}; skipped: of its {counted(photos, 'photo')}, those not read yet are left out of this run"
        )
        self.record.save()

    def _answers(self, shards: Sequence[Shard]) -> bool:
        """Whether one of the first of these files can be read now: whether the network is there at all."""
        for shard in shards[:3]:
            try:
                shard.place.file.probe()
            except Broken:
                continue
            return True
        return False


def _begun_encoder(folder: str | Path | None) -> dict[str, Any] | None:
    """What the run in a folder recorded about its encoder."""
    path = Path(folder or "") / "config.json"
    if folder is None or not path.is_file():
        return None
    encoder: dict[str, Any] | None = read_run_config(path)["data"].get("encoder")
    return encoder

"""The work of a preparation: which photos make up which shard, and the order in which shards are complete.

Shards are written by this process, or by several. No batch spans two shards, so that each can be written by itself. The
photos of the split "train" come after those of "test", because the people of "test" are left out of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vultus._engines import Engine, run_tasks
from vultus._progress import Progress, progress
from vultus.data.changes import History, listed, with_listings
from vultus.data.crops import Encoders
from vultus.data.items import Item, Part, Position, Source, counted
from vultus.data.options import Options
from vultus.data.photo_folder import FolderPart
from vultus.data.separation import check_spread, report, separation
from vultus.data.shard_writer import MakeShardWriter, ShardTask, ShardWriter, WrittenShard
from vultus.data.shards import Json, PreparedFolder
from vultus.errors import UserError

SEPARATED = 20_000  # photos whose embeddings are compared
SHOWN = 3  # skipped photos in the summary


def _named(keys: set[str]) -> Callable[[Item], bool]:
    return lambda item: item.key in keys


def _absolute(item: Item) -> Item:
    """The item with a path that holds in every folder."""
    return replace(item, data=item.data.absolute()) if isinstance(item.data, Path) else item


@dataclass(frozen=True)
class Workers:
    """Processes that write shards: their number, what starts them, and the function that loads the encoders in them."""

    count: int
    engine: Engine
    load: Callable[[], Encoders]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard that is to be written. `covers`: what its sidecar says about its photos, once they have been read."""

    task: ShardTask
    covers: Callable[[], Json]


class _Reading:
    """At most `count` items of a part, and those that were read. The items themselves are not kept."""

    def __init__(self, items: Iterator[Item], count: int, index: int, part: Part) -> None:
        self._items, self._count, self._index, self._part = items, count, index, part
        self._position: Position | None = None
        self.taken: list[Item] = []

    def __iter__(self) -> Iterator[Item]:
        for item in itertools.islice(self._items, self._count):
            self.taken.append(Item(item.key, item.identity, None, signature=item.signature))
            yield item
        if not isinstance(self._part, FolderPart):
            self._position = self._part.position()

    def covers(self) -> Json:
        """See _Shard."""
        covered = {"items": len(self.taken), "part": self._index, "position": self._position}
        return covered | {"listing": listed(self.taken)} if isinstance(self._part, FolderPart) else covered


class Preparation:
    """One preparation of `source` into `folder`, from its complete shards on; by this process, if `workers` is None."""

    def __init__(
        self,
        folder: PreparedFolder,
        options: Options,
        source: Source,
        encoders: Encoders,
        workers: Workers | None = None,
    ) -> None:
        self.folder = folder
        self.options = options
        self.source = source
        self.encoders = encoders
        self.workers = workers
        self.test_identities: set[str] = set()
        self.synthetic, self.first_synthetic = 0, ""  # images whose metadata say so, the key of the first

    def run(self) -> dict[str, Any]:
        """Write the shards that are missing, then the manifest, and return it."""
        start = time.perf_counter()
        done = self.folder.done()
        for entry in done:
            if "lost" in entry:
                print(f"{self.folder.folder / entry['file']}: {entry['lost']}; making it again", file=sys.stderr)
            else:
                self._add_test_identities(entry)
        before = sum(entry["items"] for entry in done if "lost" not in entry)
        if done and not self.folder.manifest_file.exists():
            print(f"{self.folder.folder}: resuming after {before} photos", file=sys.stderr)
        with progress(self._total(done, before), title="prepare", initial=before) as shown:
            done = self._write(done, shown)
        self.folder.remove_temporary()  # of workers that were killed
        seconds = time.perf_counter() - start
        manifest = self._finish(done)
        skips = list(itertools.islice((skip for entry in done for skip in entry["skipped"]), SHOWN))
        _report(self.folder, manifest["counts"], skips, (sum(entry["items"] for entry in done) - before) / seconds)
        if self.synthetic:
            print(
                f"  note: {counted(self.synthetic, 'image')} marked as synthetic (the first: {self.first_synthetic}) "
                "in the data set; if they are not meant to be there, move them away and prepare into another --out",
                file=sys.stderr,
            )
        return manifest

    def _total(self, done: list[dict[str, Any]], before: int) -> int | None:
        """The number of photos to read, those read before included, if it is known."""
        total = 0
        if done and isinstance(part := self.source.parts[0], FolderPart):
            history = History(with_listings(self.folder, done))
            total = before + sum(entry["items"] for entry in done if "lost" in entry)
            return min(total + sum(1 for _ in part.items(None, history.is_new)), self.options.limit or sys.maxsize)
        for part in self.source.parts:
            if part.total is None:
                return self.options.limit
            total += part.total
        return min(total, self.options.limit or total)

    def _write(self, done: list[Json], shown: Progress) -> list[Json]:
        """Write the shards and their sidecars. Returns the sidecars of all shards, those in `done` included."""
        entries = {number: entry for number, entry in enumerate(done) if "lost" not in entry}
        # The shards of the split "train" begin when those of "test" are complete.
        for _, shards in itertools.groupby(self._shards(done), key=lambda shard: shard.task.split):
            with contextlib.closing(self._written(shards, shown)) as written:
                for shard, result in written:
                    number = shard.task.number
                    entries[number] = {**result.entry, **shard.covers(), "skipped": result.skipped}
                    if self._another_encoder and len(entries) == 1:
                        first = np.array(self.folder.column(entries[number], "embedding"), np.float32)
                        check_spread(first, self.options.embeddings or self.options.encoder or "")
                    self.folder.record(number, entries[number])
                    self._add_test_identities(entries[number])
                    self.synthetic += result.synthetic
                    self.first_synthetic = self.first_synthetic or result.first_synthetic
        return [entries[number] for number in sorted(entries)]

    def _written(self, shards: Iterable[_Shard], shown: Progress) -> Generator[tuple[_Shard, WrittenShard], None, None]:
        """Each shard, when its file is written, in order. So a process that resumes finds no gap between sidecars."""
        people = frozenset(self.test_identities)
        parts = {index: part for index, part in enumerate(self.source.parts) if part.seekable}
        if self.workers is None:
            with contextlib.closing(ShardWriter(self.folder, self.options, parts, self.encoders, people)) as writer:
                for shard in shards:
                    yield shard, writer(shard.task, shown.update)
            return
        waiting: dict[int, _Shard] = {}
        written: dict[int, WrittenShard] = {}

        def tasks() -> Iterator[ShardTask]:
            for number, shard in enumerate(shards):
                waiting[number] = replace(shard, task=replace(shard.task, items=None))  # without the photos
                yield shard.task

        make = MakeShardWriter(
            self.folder.folder.absolute(), self.options, parts, self.workers.load, self.encoders.entries(), people
        )
        following = 0
        with contextlib.closing(
            run_tasks(make, tasks(), workers=self.workers.count, engine=self.workers.engine)
        ) as results:
            for number, result in results:
                shown.update(waiting[number].task.count)
                written[number] = result
                while following in written:
                    yield waiting.pop(following), written.pop(following)
                    following += 1

    def _shards(self, done: list[Json]) -> Iterator[_Shard]:
        """The shards that are lost, then those after the complete ones: `shard_items` items, or the rest of a part."""
        yield from self._lost(done)
        seen = sum(entry["items"] for entry in done)
        first = done[-1]["part"] if done else 0
        numbers = itertools.count(len(done))
        for index, part in enumerate(self.source.parts[first:], first):
            position = done[-1]["position"] if done and index == first else None
            row = position["row"] if position and part.seekable else 0
            if isinstance(part, FolderPart):
                # By name, not by position: photos may have been added before the last one that was read.
                history = History(with_listings(self.folder, done))
                opened = part.items(None, history.is_new if done else None)
            else:
                opened = part.items(position)
            with contextlib.closing(opened) as items:
                while count := min(self.options.shard_items, self._room(part, seen)):
                    if part.seekable:
                        count = min(count, (part.total or 0) - row)
                        if not count:
                            break
                        yield self._seek(next(numbers), index, row, count)
                        row, seen = row + count, seen + count
                        continue
                    item = next(items, None)
                    if item is None:
                        break
                    reading = _Reading(itertools.chain([item], items), count, index, part)
                    yield self._read(next(numbers), reading, index)
                    seen += len(reading.taken)

    def _lost(self, done: list[Json]) -> Iterator[_Shard]:
        """The shards that are lost."""
        recorded = self.folder.recorded()
        for number, entry in enumerate(done):
            if "lost" not in entry:
                continue
            index, count, expected = entry["part"], entry["items"], recorded.get(entry["file"])
            part = self.source.parts[index]
            if part.seekable:
                yield self._seek(number, index, entry["position"]["row"] - count, count, expected)
                continue
            if isinstance(part, FolderPart):
                opened = part.items(None, _named({item[0] for item in entry["listing"]}))
            else:
                before = done[number - 1] if number and done[number - 1]["part"] == index else None
                opened = part.items(before["position"] if before else None)
            with contextlib.closing(opened) as items:
                reading = _Reading(items, count, index, part)
                shard = self._read(number, reading, index, expected, at_once=True)
            if len(reading.taken) < count:
                raise UserError(
                    f"{self.folder.folder / entry['file']}: {entry['lost']}, and {count - len(reading.taken)} of its "
                    f"{count} photos are no longer in {self.options.source}; put them back and run the same "
                    "command again, or prepare into another --out"
                )
            yield shard

    def _seek(self, number: int, index: int, row: int, count: int, expected: str | None = None) -> _Shard:
        """A shard whose rows are read by the process that writes it."""
        task = ShardTask(number, index, self._split(index), count, None, {"row": row}, expected)
        return _Shard(task, functools.partial(dict, items=count, part=index, position={"row": row + count}))

    def _read(
        self, number: int, reading: _Reading, index: int, expected: str | None = None, *, at_once: bool = False
    ) -> _Shard:
        """A shard whose items are read here: one by one, or `at_once`, as other processes need them."""
        items: Iterable[Item] = reading
        if at_once or self.workers is not None:
            items = tuple(_absolute(item) for item in reading)
        count = len(reading.taken)
        return _Shard(ShardTask(number, index, self._split(index), count, items, None, expected), reading.covers)

    def _split(self, index: int) -> str | None:
        return self.source.parts[index].split if self.source.has_splits else None

    def _room(self, part: Part, seen: int) -> int:
        """How many items of this part the limit allows after `seen` items. Test parts are read first."""
        limit = self.options.limit
        if limit is None:
            return sys.maxsize
        if self.source.has_splits and part.split == "test":
            limit = max(1, round(limit * self.options.test_fraction))
        return max(0, limit - seen)

    def _add_test_identities(self, entry: dict[str, Any]) -> None:
        if self.source.has_splits and self.source.parts[entry["part"]].split == "test":
            self.test_identities.update(identity for identity, _ in self.folder.people(entry))

    def _finish(self, done: list[dict[str, Any]]) -> dict[str, Any]:
        options = self.options
        head = {
            "source": options.source,
            "licence": options.licence,
            "identities": self.source.identities,
            "resolution": options.resolution,
            "crop": self.encoders.crop_entry(options.align),
            **self.encoders.entries(),
        }
        if self._another_encoder:
            found = self._separation(done)
            report(found, head["encoder"]["id"])
            head |= {"separation": found} if found else {}
        try:
            return self.folder.finish(done, head, {"options": vars(options), "listing": self._listing(done)})
        except UserError as error:
            raise UserError(f"{options.source}: {error}") from None

    @property
    def _another_encoder(self) -> bool:
        """Whether the user chose the encoder, so that it may be a wrong one."""
        return self.options.encoder is not None or self.options.embeddings is not None

    def _separation(self, done: list[Json]) -> Json | None:
        """How well the embeddings of the first photos tell people apart."""
        rows, embeddings, identities = 0, [], []
        for entry in done:
            if rows < SEPARATED and entry["rows"]:
                embeddings += self.folder.column(entry, "embedding")
                identities += self.folder.column(entry, "identity")
                rows += entry["rows"]
        return separation(np.array(embeddings, np.float32), identities) if rows else None

    def _listing(self, done: list[dict[str, Any]]) -> dict[str, Any]:
        """What was read, for the manifest: a later preparation compares it with the source."""
        part = self.source.parts[0]
        if not isinstance(part, FolderPart):
            totals = [part.total for part in self.source.parts]
            photos = None if None in totals else sum(total or 0 for total in totals)
            columns = list(self.source.columns or ())
            return {"photos": photos, "revision": self.source.revision, "columns": columns}
        survey = part.survey
        others = {"other_images": dict(survey.other_images), "not_images": dict(survey.not_images)}
        return History(with_listings(self.folder, done)).listing() | others


def describe(counts: dict[str, Any]) -> str:
    """The counts of a manifest in a line."""
    people = sum(split["people"] for split in counts["splits"].values())
    parts = ", ".join(f"{name} {split['images']}" for name, split in counts["splits"].items())
    return f"{counts['images']} images of {people} people ({parts}), {counts['skipped']} skipped"


def _report(folder: PreparedFolder, counts: dict[str, Any], skips: list[dict[str, str]], rate: float) -> None:
    print(f"{folder.folder}: {describe(counts)}; {rate:.1f} images/s", file=sys.stderr)
    for skip in skips:
        print(f"  skipped {skip['key']}: {skip['reason']}", file=sys.stderr)
    if counts["skipped"] > len(skips):
        print(f"  ... all {counts['skipped']} are in {folder.skipped_file}", file=sys.stderr)
    for name, split in counts["splits"].items():
        if not split["images"]:
            print(f"  note: the {name} split has no photo", file=sys.stderr)

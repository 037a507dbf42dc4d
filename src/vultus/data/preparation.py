"""The work of a preparation: photos in, shards out.

Photos are decoded in threads, embedded in batches and written shard by shard; no batch spans two shards.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vultus._files import processors
from vultus._prefetch import Prefetch
from vultus._progress import Progress, progress
from vultus.data.changes import History, Listed, listed, with_listings
from vultus.data.crops import CropEncoder, Crops, Unusable, crop_entry, crops_of, embed, encoder_entry, in_test
from vultus.data.items import Item, Part, Position, Source, counted
from vultus.data.options import Options
from vultus.data.photo_folder import FolderPart
from vultus.data.shards import PreparedFolder
from vultus.errors import UserError

PREFETCH = 3  # batches that are decoded while the encoder computes; bounds the memory
SHOWN = 3  # skipped photos in the summary


def _named(keys: set[str]) -> Callable[[Item], bool]:
    return lambda item: item.key in keys


# --- the preparation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Photo:
    key: str
    identity: str
    split: str | None
    crops: Future[Crops | Unusable]


@dataclass(frozen=True, slots=True)
class _ShardEnd:
    index: int
    items: int
    part: int
    position: Position | None  # after the last item of the shard; None in a folder, where the listing counts
    listing: list[Listed] | None  # of a folder
    expected: str | None = None  # sha256 of a shard that is made again and that the manifest names


@dataclass(slots=True)
class _Shard:
    """The content of the shard that is not written yet."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    pending: list[tuple[dict[str, Any], Image.Image]] = field(default_factory=list)  # rows without an embedding


class Preparation:
    """One preparation of `source` into `folder`, from its complete shards on."""

    def __init__(self, folder: PreparedFolder, options: Options, source: Source, encoder: CropEncoder) -> None:
        self.folder = folder
        self.options = options
        self.source = source
        self.encoder = encoder
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
        cores = processors()
        pool = ThreadPoolExecutor(max(2, cores), "vultus-decode")
        try:
            with (
                Prefetch(self._read(done, pool), PREFETCH * self.options.batch) as events,
                progress(self._total(done, before), title="prepare", initial=before) as shown,
            ):
                done = self._encode(events, done, shown)
        finally:
            pool.shutdown(cancel_futures=True)
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

    def _read(self, done: list[dict[str, Any]], pool: ThreadPoolExecutor) -> Generator[_Photo | _ShardEnd, None, None]:
        """The photos of the shards that are lost, then those after the complete ones.

        A _ShardEnd follows after every `shard_items` items, and after each part.
        """
        yield from self._read_again(done, pool)
        seen = sum(entry["items"] for entry in done)
        first = done[-1]["part"] if done else 0
        numbers = itertools.count(len(done))
        for index, part in enumerate(self.source.parts[first:], first):
            if isinstance(part, FolderPart):
                # By name, not by position: photos may have been added before the last one that was read.
                history = History(with_listings(self.folder, done))
                opened = part.items(None, history.is_new if done else None)
            else:
                opened = part.items(done[-1]["position"] if done and index == first else None)
            with contextlib.closing(opened) as items:
                while count := min(self.options.shard_items, self._room(part, seen)):
                    taken = yield from self._submit(itertools.islice(items, count), part, pool)
                    seen += len(taken)
                    if taken:
                        yield self._end(next(numbers), index, part, taken)
                    if len(taken) < count:
                        break

    def _read_again(
        self, done: list[dict[str, Any]], pool: ThreadPoolExecutor
    ) -> Generator[_Photo | _ShardEnd, None, None]:
        """The photos of each shard that is lost."""
        recorded = self.folder.recorded()
        for number, entry in enumerate(done):
            if "lost" not in entry:
                continue
            part, opened = self.source.parts[entry["part"]], None
            if isinstance(part, FolderPart):
                opened = part.items(None, _named({item[0] for item in entry["listing"]}))
            else:
                before = done[number - 1] if number and done[number - 1]["part"] == entry["part"] else None
                opened = part.items(before["position"] if before else None)
            with contextlib.closing(opened) as items:
                taken = yield from self._submit(itertools.islice(items, entry["items"]), part, pool)
            if len(taken) < entry["items"]:
                raise UserError(
                    f"{self.folder.folder / entry['file']}: {entry['lost']}, and {entry['items'] - len(taken)} of its "
                    f"{entry['items']} photos are no longer in {self.options.source}; put them back and run the same "
                    "command again, or prepare into another --out"
                )
            yield self._end(number, entry["part"], part, taken, recorded.get(entry["file"]))

    def _submit(
        self, items: Iterator[Item], part: Part, pool: ThreadPoolExecutor
    ) -> Generator[_Photo, None, list[Item]]:
        """Give the items to the threads that decode. Returns them, without their bytes."""
        size, fraction = self.encoder.size, self.encoder.crop
        taken = []
        for item in items:
            taken.append(Item(item.key, item.identity, None, signature=item.signature))
            crops = pool.submit(crops_of, item, self.options.resolution, size, fraction, self.options.align)
            yield _Photo(item.key, item.identity, part.split, crops)
        return taken

    def _end(self, number: int, index: int, part: Part, taken: list[Item], expected: str | None = None) -> _ShardEnd:
        if isinstance(part, FolderPart):
            return _ShardEnd(number, len(taken), index, None, listed(taken), expected)
        return _ShardEnd(number, len(taken), index, part.position(), None, expected)

    def _room(self, part: Part, seen: int) -> int:
        """How many items of this part the limit allows after `seen` items. Test parts are read first."""
        limit = self.options.limit
        if limit is None:
            return sys.maxsize
        if self.source.has_splits and part.split == "test":
            limit = max(1, round(limit * self.options.test_fraction))
        return max(0, limit - seen)

    def _encode(
        self, events: Iterator[_Photo | _ShardEnd], done: list[dict[str, Any]], shown: Progress
    ) -> list[dict[str, Any]]:
        """Embed the photos and write their shards. Returns the sidecars of all shards, those in `done` included."""
        entries = {number: entry for number, entry in enumerate(done) if "lost" not in entry}
        shard = _Shard()
        for event in events:
            if isinstance(event, _Photo):
                self._take(event, shard)
                if len(shard.pending) == self.options.batch:
                    self._embed(shard)
                shown.update()
                continue
            self._embed(shard)
            more: dict[str, Any] = {"items": event.items, "part": event.part, "position": event.position}
            if event.listing is not None:
                more["listing"] = event.listing
            entries[event.index] = self.folder.write(
                event.index, shard.rows, self.encoder.dim, shard.skipped, expected=event.expected, **more
            )
            self._add_test_identities(entries[event.index])
            shard = _Shard()
        return [entries[number] for number in sorted(entries)]

    def _take(self, photo: _Photo, shard: _Shard) -> None:
        """Wait for the crops of a photo; add it to the pending rows, or to the skipped photos with the reason."""
        crops = photo.crops.result()
        split = photo.split if self.source.has_splits else None
        if split is None:
            split = "test" if in_test(photo.identity, self.options.test_fraction) else "train"
        elif split == "train" and photo.identity in self.test_identities:
            crops = Unusable("this person is in the test split")
        if isinstance(crops, Unusable):
            skip = {"key": photo.key, "reason": crops.reason}
            shard.skipped.append(skip | {"again": True} if crops.again else skip)
        else:
            row = {"image": crops.jpeg, "identity": photo.identity, "key": photo.key, "split": split}
            shard.pending.append((row, crops.face))
            if crops.synthetic:
                self.synthetic, self.first_synthetic = self.synthetic + 1, self.first_synthetic or photo.key

    def _embed(self, shard: _Shard) -> None:
        """Embed the pending rows as one batch."""
        if not shard.pending:
            return
        embeddings = embed(self.encoder, [face for _, face in shard.pending], self.options.device)
        for (row, _), embedding in zip(shard.pending, embeddings, strict=True):
            shard.rows.append({**row, "embedding": embedding})
        shard.pending.clear()

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
            "crop": crop_entry(options.align, self.encoder.crop),
            "encoder": encoder_entry(self.encoder),
        }
        try:
            return self.folder.finish(done, head, {"options": vars(options), "listing": self._listing(done)})
        except UserError as error:
            raise UserError(f"{options.source}: {error}") from None

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

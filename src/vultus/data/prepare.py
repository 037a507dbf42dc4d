"""Photos to a prepared data set: crops, FaceNet embeddings, identities and splits.

A shard covers a fixed number of items of the source, unusable photos included, and no batch spans two shards. A killed
run therefore resumes after the last complete shard and ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from vultus._device import resolve_device
from vultus._files import folder_lock, make_folder, processors
from vultus._prefetch import Prefetch
from vultus._progress import Progress, progress
from vultus.data.changes import History, Listed, listed, with_listings
from vultus.data.existing import Existing
from vultus.data.items import ONE_PER_IMAGE, Item, Part, Position, Source
from vultus.data.options import Options
from vultus.data.photo_folder import FolderPart
from vultus.data.shards import PreparedFolder, check_place
from vultus.data.sources import open_source
from vultus.errors import UserError
from vultus.images.io import BadImage, NoDecoder, centre_crop, decode_image, encode_jpeg, from_pil, to_x
from vultus.models.facenet import DTYPES, Encoder, fastest_dtype, load_facenet

SHARD_ITEMS = 1024  # items per shard: about 20 s of work on two cores, which is what a kill can cost
PREFETCH = 3  # batches that are decoded while the encoder computes; bounds the memory
SHOWN = 3  # skipped photos in the summary


class CropEncoder(Encoder, Protocol):
    """An encoder that also embeds crops, and has a dtype."""

    dtype: torch.dtype

    def embed_crop(self, x: torch.Tensor) -> torch.Tensor:
        """Crops x [N, 3, size, size] in [-1, 1] -> unit-norm float32 [N, dim]."""
        ...


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int = 128,
    split: str | None = None,
    test_fraction: float = 0.1,
    align: bool = False,
    licence: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    image_column: str | None = None,
    id_column: str | None = None,
    encoder: CropEncoder | None = None,
    shard_items: int = SHARD_ITEMS,
) -> dict[str, Any]:
    """Prepare `source` into the folder `out` and return the manifest.

    Args:
        source: a folder of photos, Parquet (file, folder or glob) or the id of a Hugging Face data set.
        out: the folder to write; the same call again resumes it. If it is complete, photos that were added to a source
            folder since are added as further shards, and shards that are lost are made again.
        resolution: side of the stored crops in pixels, 16 to 1024.
        split: read only this split of the source.
        test_fraction: fraction of the identities in the test split, if the source does not have train and test splits.
        align: detect the face and align it first; photos without a face are skipped.
        licence: of the photos; free text for the manifest.
        limit: read at most this many photos; if the source has splits, `test_fraction` of them from its test split.
        batch: photos per batch of the encoder.
        device: of the encoder: auto (cuda, else mps, else cpu), or its name.
        dtype: of the encoder: "float32", "bfloat16", or "auto" for the faster one.
        image_column: of a table, the column of the images; default "image".
        id_column: of a table, the column of the identities; default the first of celeb_id, identity, identity_id,
            person, person_id, subject, subject_id and label that is there. Without one, every image counts as a person
            of its own.
        encoder: another encoder than FaceNet, on `device`; it keeps its dtype.
        shard_items: items of the source per shard.

    If an identity is in both splits of the source, its train photos are skipped. Messages and progress go to stderr.

    Raises UserError for an invalid option or source, a folder that is locked, holds other files, lies in the source or
    was begun with other options, and OSError if `out` cannot be written. What is done is kept; the same call resumes.
    """
    source, device = str(source), resolve_device(device) if device == "auto" else device
    options = Options(
        source,
        resolution,
        split,
        test_fraction,
        align,
        licence,
        limit,
        batch,
        device,
        dtype,
        shard_items,
        image_column,
        id_column,
    )
    check_place(source, Path(out))
    out = make_folder(out)
    with folder_lock(out, "prepare"):
        folder = PreparedFolder(out)
        folder.clean()
        begun = folder.begun()
        existing = None
        if folder.manifest_file.exists() and begun is None:
            existing = Existing(folder, options)
            if not existing.needs_work():
                counts = _describe(existing.manifest["counts"])
                print(f"{out}: already complete, {counts}; nothing to do", file=sys.stderr)
                return existing.manifest
            begun = existing.begun
        elif begun:
            options.check_same(out, begun["options"])
        opened = (existing and existing.source) or open_source(
            source, split, revision=begun["revision"] if begun else None, image_column=image_column, id_column=id_column
        )
        if encoder is None:
            # "auto" depends on a measurement, so it is resolved once for the whole folder.
            name = begun["encoder"]["dtype"] if begun else dtype
            encoder = load_facenet(device=device, dtype=fastest_dtype(device) if name == "auto" else DTYPES[name])
        now = {
            "options": vars(options),
            "encoder": _encoder_entry(encoder),
            "revision": opened.revision,
            "columns": opened.columns,
        }
        if begun is None:
            folder.begin(now)
        elif now["encoder"] != begun["encoder"]:
            raise UserError(f"{out}: was begun with another encoder, {begun['encoder']}; choose another --out")
        elif now["revision"] != begun["revision"]:
            raise UserError(f"{out}: the files of {source} have changed since it was begun; choose another --out")
        elif opened.columns and list(opened.columns) != begun.get("columns", _columns_before(opened.columns)):
            raise UserError(f"{out}: was begun with other columns than {opened.columns}; choose another --out")
        if existing is not None:
            folder.reopen(now, existing.entries)
        _say_what_is_read(source, opened)
        return _Preparation(folder, options, opened, encoder).run()


def _columns_before(columns: tuple[str, str | None]) -> list[str | None]:
    """The columns that the versions read that did not record them."""
    return ["image", "celeb_id" if columns[1] == "celeb_id" else None]


def _say_what_is_read(source: str, opened: Source) -> None:
    """Print where the identities come from, and what is passed over."""
    if opened.identities == ONE_PER_IMAGE:
        remedy = (
            "put the photos of each person into a sub-folder"
            if opened.columns is None
            else "name the column of the identity with --id-column"
        )
        print(
            f"note: {source} names no identities, so every image counts as a person of its own, and one person may be "
            f"in both splits; if it shows people more than once, {remedy}",
            file=sys.stderr,
        )
    else:
        print(f"{source}: identities from {opened.identities}", file=sys.stderr)
    survey = [part.survey.others() for part in opened.parts if isinstance(part, FolderPart)]
    for note in itertools.chain(opened.notes, *survey):
        print(f"  {note}", file=sys.stderr)


def _encoder_entry(encoder: CropEncoder) -> dict[str, Any]:
    return {
        "id": encoder.id,
        "dim": encoder.dim,
        "weights_sha256": encoder.weights_sha256,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }


# --- one photo -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unusable:
    reason: str
    again: bool = False  # whether the photo itself may be good


@dataclass(frozen=True, slots=True)
class _Crops:
    jpeg: bytes  # resolution x resolution, stored in the data set
    face: Image.Image  # encoder.size x encoder.size, input of the encoder


def _crops(item: Item, resolution: int, size: int, fraction: float, align: bool) -> _Crops | _Unusable:
    """The decoded crops, or the reason why the photo is not usable. Runs in a thread."""
    try:
        photo = decode_image(item.read())
    except OSError as error:
        return _Unusable(f"can't be read ({error.strerror or error})", again=True)
    except BadImage as error:
        return _Unusable(str(error), again=isinstance(error, NoDecoder))
    if align:
        from vultus.images.align import align as align_face

        aligned = align_face(photo)
        if aligned is None:
            return _Unusable("no face found")
        photo = aligned
    # Both crops are taken from the original pixels, so the embedding does not depend on the resolution.
    return _Crops(encode_jpeg(centre_crop(photo, resolution)), centre_crop(photo, size, fraction))


def _named(keys: set[str]) -> Callable[[Item], bool]:
    return lambda item: item.key in keys


def in_test(identity: str, test_fraction: float) -> bool:
    """Whether an identity belongs to the test split; a function of its name and the fraction alone."""
    value = int.from_bytes(hashlib.sha256(identity.encode("utf-8", "backslashreplace")).digest()[:8], "big")
    return value < test_fraction * 2**64


# --- the preparation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Photo:
    key: str
    identity: str
    split: str | None
    crops: Future[_Crops | _Unusable]


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


class _Preparation:
    def __init__(self, folder: PreparedFolder, options: Options, source: Source, encoder: CropEncoder) -> None:
        self.folder = folder
        self.options = options
        self.source = source
        self.encoder = encoder
        self.test_identities: set[str] = set()

    def run(self) -> dict[str, Any]:
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
                progress(self._total(), title="prepare", initial=before) as shown,
            ):
                done = self._encode(events, done, shown)
        finally:
            pool.shutdown(cancel_futures=True)
        seconds = time.perf_counter() - start
        manifest = self._finish(done)
        skips = list(itertools.islice((skip for entry in done for skip in entry["skipped"]), SHOWN))
        _report(self.folder, manifest["counts"], skips, (sum(entry["items"] for entry in done) - before) / seconds)
        return manifest

    def _total(self) -> int | None:
        """The number of photos to read, if it is known."""
        total = 0
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
            crops = pool.submit(_crops, item, self.options.resolution, size, fraction, self.options.align)
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
            crops = _Unusable("this person is in the test split")
        if isinstance(crops, _Unusable):
            skip = {"key": photo.key, "reason": crops.reason}
            shard.skipped.append(skip | {"again": True} if crops.again else skip)
        else:
            row = {"image": crops.jpeg, "identity": photo.identity, "key": photo.key, "split": split}
            shard.pending.append((row, crops.face))

    def _embed(self, shard: _Shard) -> None:
        """Embed the pending rows as one batch."""
        if not shard.pending:
            return
        with torch.inference_mode():
            x = to_x(from_pil([face for _, face in shard.pending]).to(self.options.device))
            embeddings = self.encoder.embed_crop(x).float().cpu().numpy()
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
            "crop": {"kind": "aligned" if options.align else "centre", "encoder_fraction": self.encoder.crop},
            "encoder": _encoder_entry(self.encoder),
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
            return {"photos": photos, "revision": self.source.revision, "columns": self.source.columns}
        survey = part.survey
        others = {"other_images": dict(survey.other_images), "not_images": dict(survey.not_images)}
        return History(with_listings(self.folder, done)).listing() | others


def _describe(counts: dict[str, Any]) -> str:
    people = sum(split["people"] for split in counts["splits"].values())
    parts = ", ".join(f"{name} {split['images']}" for name, split in counts["splits"].items())
    return f"{counts['images']} images of {people} people ({parts}), {counts['skipped']} skipped"


def _report(folder: PreparedFolder, counts: dict[str, Any], skips: list[dict[str, str]], rate: float) -> None:
    print(f"{folder.folder}: {_describe(counts)}; {rate:.1f} images/s", file=sys.stderr)
    for skip in skips:
        print(f"  skipped {skip['key']}: {skip['reason']}", file=sys.stderr)
    if counts["skipped"] > len(skips):
        print(f"  ... all {counts['skipped']} are in {folder.skipped_file}", file=sys.stderr)
    for name, split in counts["splits"].items():
        if not split["images"]:
            print(f"  note: the {name} split has no photo", file=sys.stderr)

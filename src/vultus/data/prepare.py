"""Photos to a prepared data set: crops, FaceNet embeddings, identities and splits.

A shard covers a fixed number of items of the source, unusable photos included, and no batch spans two shards. A killed
run therefore resumes after the last complete shard and ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from vultus._device import resolve_device
from vultus._files import folder_lock, make_folder, processors, read_json
from vultus._prefetch import Prefetch
from vultus._progress import Progress, progress
from vultus.data.shards import PreparedFolder
from vultus.data.sources import Item, Part, Position, Source, open_source
from vultus.errors import UserError
from vultus.images.io import BadImage, centre_crop, decode_image, encode_jpeg, from_pil, to_x
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


@dataclass(frozen=True)
class Options:
    """The options that determine the content of a prepared data set; see `prepare`."""

    source: str
    resolution: int
    split: str | None
    test_fraction: float
    align: bool
    licence: str | None
    limit: int | None
    batch: int
    device: str
    dtype: str
    shard_items: int

    def __post_init__(self) -> None:
        """Raise UserError that names the first option out of range."""
        if not 16 <= self.resolution <= 1024:
            raise UserError(f"resolution {self.resolution}: from 16 to 1024 pixels")
        if not 0 <= self.test_fraction < 1:
            raise UserError(f"test fraction {self.test_fraction}: from 0 to below 1")
        for name in ("limit", "batch", "shard_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: at least 1")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype {self.dtype!r}: one of auto, {', '.join(DTYPES)}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {self.device!r}: not usable here ({str(error).splitlines()[0]})") from None

    def check_same(self, out: Path, begun: dict[str, Any]) -> None:
        """Raise UserError that names the first option that differs from `begun`, the options of an earlier run."""
        for name, value in vars(self).items():
            if name not in begun or begun[name] != value:
                raise UserError(
                    f"{out}: was begun with {name} {json.dumps(begun.get(name))}, now it is {json.dumps(value)}; "
                    "give the same options or choose another --out"
                )


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
    encoder: CropEncoder | None = None,
    shard_items: int = SHARD_ITEMS,
) -> dict[str, Any]:
    """Prepare `source` into the folder `out` and return the manifest.

    Args:
        source: a folder of photos, Parquet (file, folder or glob) or the id of a Hugging Face data set.
        out: the folder to write; the same call again resumes it, or does nothing if it is complete.
        resolution: side of the stored crops in pixels, 16 to 1024.
        split: read only this split of the source.
        test_fraction: fraction of the identities in the test split, if the source does not have train and test splits.
        align: detect the face and align it first; photos without a face are skipped.
        licence: of the photos; free text for the manifest.
        limit: read at most this many photos; if the source has splits, `test_fraction` of them from its test split.
        batch: photos per batch of the encoder.
        device: of the encoder: auto (cuda, else mps, else cpu), or its name.
        dtype: of the encoder: "float32", "bfloat16", or "auto" for the faster one.
        encoder: another encoder than FaceNet, on `device`; it keeps its dtype.
        shard_items: items of the source per shard.

    If an identity is in both splits of the source, its train photos are skipped. Messages and progress go to stderr.

    Raises UserError for an invalid option or source, a locked folder, or one that was begun with other options, and
    OSError if `out` cannot be written. What is done is kept; the same call resumes.
    """
    source, device = str(source), resolve_device(device) if device == "auto" else device
    options = Options(
        source, resolution, split, test_fraction, align, licence, limit, batch, device, dtype, shard_items
    )
    out = make_folder(out)
    with folder_lock(out, "prepare"):
        folder = PreparedFolder(out)
        folder.clean()
        if folder.manifest_file.exists():
            manifest: dict[str, Any] = read_json(folder.manifest_file)
            options.check_same(out, manifest.get("options", {}))
            print(f"{out}: already complete, {_describe(manifest['counts'])}; nothing to do", file=sys.stderr)
            return manifest
        begun = folder.begun()
        if begun:
            options.check_same(out, begun["options"])
        opened = open_source(source, split, revision=begun["revision"] if begun else None)
        if encoder is None:
            # "auto" depends on a measurement, so it is resolved once for the whole folder.
            name = begun["encoder"]["dtype"] if begun else dtype
            encoder = load_facenet(device=device, dtype=fastest_dtype(device) if name == "auto" else DTYPES[name])
        now = {"options": vars(options), "encoder": _encoder_entry(encoder), "revision": opened.revision}
        if begun is None:
            folder.begin(now)
        elif now["encoder"] != begun["encoder"]:
            raise UserError(f"{out}: was begun with another encoder, {begun['encoder']}; choose another --out")
        elif now["revision"] != begun["revision"]:
            raise UserError(f"{out}: the files of {source} have changed since it was begun; choose another --out")
        return _Preparation(folder, options, opened, encoder).run()


def _encoder_entry(encoder: CropEncoder) -> dict[str, Any]:
    return {
        "id": encoder.id,
        "dim": encoder.dim,
        "weights_sha256": encoder.weights_sha256,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }


# --- one photo -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Crops:
    jpeg: bytes  # resolution x resolution, stored in the data set
    face: Image.Image  # encoder.size x encoder.size, input of the encoder


def _crops(item: Item, resolution: int, size: int, fraction: float, align: bool) -> _Crops | str:
    """The decoded crops, or the reason why the photo is not usable. Runs in a thread."""
    try:
        photo = decode_image(item.read())
    except OSError as error:
        return f"can't be read ({error.strerror or error})"
    except BadImage as error:
        return str(error)
    if align:
        from vultus.images.align import align as align_face

        aligned = align_face(photo)
        if aligned is None:
            return "no face found"
        photo = aligned
    # Both crops are taken from the original pixels, so the embedding does not depend on the resolution.
    return _Crops(encode_jpeg(centre_crop(photo, resolution)), centre_crop(photo, size, fraction))


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
    crops: Future[_Crops | str]


@dataclass(frozen=True, slots=True)
class _ShardEnd:
    items: int
    part: int
    position: Position  # after the last item of the shard


@dataclass(slots=True)
class _Shard:
    """The content of the shard that is not written yet."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
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
            self._add_test_identities(entry)
        before = sum(entry["items"] for entry in done)
        if done:
            print(f"{self.folder.folder}: resuming after {before} photos", file=sys.stderr)
        cores = processors()
        pool = ThreadPoolExecutor(max(2, cores), "vultus-decode")
        try:
            with (
                Prefetch(self._read(done, pool), PREFETCH * self.options.batch) as events,
                progress(self._total(), title="prepare", initial=before) as shown,
            ):
                done += self._encode(events, len(done), shown)
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
        """The photos after the complete shards, and a _ShardEnd after every `shard_items` items and after each part."""
        size, fraction = self.encoder.size, self.encoder.crop
        seen = sum(entry["items"] for entry in done)
        first = done[-1]["part"] if done else 0
        for index, part in enumerate(self.source.parts[first:], first):
            position = done[-1]["position"] if done and index == first else None
            with contextlib.closing(part.items(position)) as items:
                while count := min(self.options.shard_items, self._room(part, seen)):
                    taken = 0
                    for item in itertools.islice(items, count):
                        taken += 1
                        crops = pool.submit(_crops, item, self.options.resolution, size, fraction, self.options.align)
                        yield _Photo(item.key, item.identity, part.split, crops)
                    seen += taken
                    if taken:
                        yield _ShardEnd(taken, index, part.position())
                    if taken < count:
                        break

    def _room(self, part: Part, seen: int) -> int:
        """How many items of this part the limit allows after `seen` items. Test parts are read first."""
        limit = self.options.limit
        if limit is None:
            return sys.maxsize
        if self.source.has_splits and part.split == "test":
            limit = max(1, round(limit * self.options.test_fraction))
        return max(0, limit - seen)

    def _encode(self, events: Iterator[_Photo | _ShardEnd], first: int, shown: Progress) -> list[dict[str, Any]]:
        """Embed the photos and write the shards from number `first` on. Returns their sidecars."""
        written: list[dict[str, Any]] = []
        shard = _Shard()
        for event in events:
            if isinstance(event, _Photo):
                self._take(event, shard)
                if len(shard.pending) == self.options.batch:
                    self._embed(shard)
                shown.update()
                continue
            self._embed(shard)
            more = {"items": event.items, "part": event.part, "position": event.position}
            index = first + len(written)
            written.append(self.folder.write(index, shard.rows, self.encoder.dim, shard.skipped, **more))
            self._add_test_identities(written[-1])
            shard = _Shard()
        return written

    def _take(self, photo: _Photo, shard: _Shard) -> None:
        """Wait for the crops of a photo; add it to the pending rows, or to the skipped photos with the reason."""
        crops = photo.crops.result()
        split = photo.split if self.source.has_splits else None
        if split is None:
            split = "test" if in_test(photo.identity, self.options.test_fraction) else "train"
        elif split == "train" and photo.identity in self.test_identities:
            crops = "this person is in the test split"
        if isinstance(crops, str):
            shard.skipped.append({"key": photo.key, "reason": crops})
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
            "resolution": options.resolution,
            "crop": {"kind": "aligned" if options.align else "centre", "encoder_fraction": self.encoder.crop},
            "encoder": _encoder_entry(self.encoder),
        }
        try:
            return self.folder.finish(done, head, {"options": vars(options)})
        except UserError as error:
            raise UserError(f"{options.source}: {error}") from None


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

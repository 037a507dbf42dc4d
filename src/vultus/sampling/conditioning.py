"""The embeddings that faces are generated from: of a file, of photos, or of random identities.

A source is read once, in order, a chunk at a time, so memory does not grow with its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vultus._progress import message
from vultus._ranges import Count, Seed, checks_arguments
from vultus.data.sources import FolderPart, Item
from vultus.errors import UserError
from vultus.images.io import BadImage, centre_crop, photo_suffixes
from vultus.models.encoders import CropEncoder, difference, encoder_entry, load_condition_encoder
from vultus.models.snapshot import Snapshot
from vultus.sampling.embedding_files import open_embeddings, split_source
from vultus.sampling.latents import blend, sample_identities
from vultus.sampling.photos import EmbeddedPhoto, decide_align, embed_photo, reason_of

CHUNK = 256  # random identities that are computed at a time
# Cosine of a photo to the mean of the others. Below it are 1.7 % of the photos of one person and 98 % of those of other
# people (10 photos of each of CelebA's 118 test people).
UNLIKE = 0.35

RANDOM = re.compile(r"random(?::(\d+))?")  # a random identity by its number
DIGITS = 18  # of the number of an identity or row

Skipped = tuple[str, str]  # photo, reason


@dataclass(frozen=True)
class ConditionSource:
    """Named embeddings, read once.

    Attributes:
        count: number of embeddings; an upper bound for photos, because unusable ones are left out.
        chunks: (names [n], unit-norm embeddings float32 [n, c_dim]) in order; a name is the start of the names of the
            files that are generated from its embedding.
        skipped: the photos left out so far; filled while `chunks` is read.
        inputs: the files that are read, and the folders of photos; generated faces are not written there.
        origin: what faces.jsonl says about the embedding of this number, once `chunks` has given it.
        frames: the photos as they were framed, one for each embedding so far; where they were asked for.
    """

    count: int
    chunks: Iterable[tuple[list[str], Tensor]]
    skipped: list[Skipped] = field(default_factory=list)
    inputs: Sequence[Path] = ()
    origin: Callable[[int], dict[str, Any]] = lambda _: {}
    frames: list[Image.Image] = field(default_factory=list)


def from_embeddings(source: str | Path, snapshot: Snapshot) -> ConditionSource:
    """The rows of a file or prepared data set (see embedding_files.py), all checked before the first is used."""
    path, _ = split_source(source)
    embeddings = open_embeddings(source, _c_dim(snapshot), snapshot.metadata.get("encoder"))
    embeddings.check()
    chunks = _numbered(embeddings.chunks(), embeddings.count)
    inputs = [path] if path.is_file() else ()

    def origin(row: int) -> dict[str, Any]:
        return {"source": str(source), "row": row}

    return ConditionSource(embeddings.count, chunks, inputs=inputs, origin=origin)


@checks_arguments
def random_identities(snapshot: Snapshot, count: Count, *, seed: Seed = 0, start: int = 0) -> ConditionSource:
    """`count` random identities from number `start` on, drawn from the population prior of the snapshot.

    Raises UserError if `count` is below 1 or the snapshot has no population prior.
    """
    check_population(snapshot)
    chunks = (
        sample_identities(snapshot.population, min(CHUNK, count - done), seed=seed, start=start + done)
        for done in range(0, count, CHUNK)
    )
    return ConditionSource(count, _numbered(chunks, count), origin=lambda row: {"source": f"random:{start + row}"})


def from_photos(
    paths: Sequence[str | Path],
    snapshot: Snapshot,
    *,
    align: bool | None = None,
    encoder: CropEncoder | str | Path | None = None,
    device: torch.device | str = "cpu",
    keep_frames: bool = False,
) -> ConditionSource:
    """Embeddings of photos: files, or all photos in folders and their sub-folders.

    Args:
        paths: files and folders.
        snapshot: the generator that the embeddings are for.
        align: find the face and align it. None: if the extra `align` is installed. Without alignment the centre square
            of the photo is taken as it is.
        encoder: the encoder of the condition, if it is loaded already, or its ONNX file.
        device: where the encoder runs.
        keep_frames: keep the framed photos in memory, at the size of the generated faces, to show them beside these.

    A photo that is damaged or shows no face is reported on stderr, listed in `skipped` and left out. Raises UserError
    if a path does not exist, a folder has no photos, `encoder` is not the one that the snapshot was trained with, there
    is no network of that one, or (at the end) no photo could be used.
    """
    photos, count = _photos(paths)
    align = decide_align(align)
    encoder = _encoder_for(snapshot, encoder, device)
    skipped: list[Skipped] = []
    found: list[dict[str, Any]] = []
    frames: list[Image.Image] = []

    def seen(photo: _Photo, embedded: EmbeddedPhoto) -> None:
        about: dict[str, Any] = {"source": photo.label}
        if embedded.box is not None:
            about |= {"faces": embedded.faces, "box": [round(edge, 1) for edge in embedded.box]}
        found.append(about)
        if keep_frames:
            frames.append(centre_crop(embedded.frame, snapshot.network.resolution))

    chunks = _embedded(photos, encoder, align, skipped, seen)
    inputs = [Path(path) for path in paths]
    return ConditionSource(count, chunks, skipped, inputs, origin=found.__getitem__, frames=frames)


def as_one(source: ConditionSource) -> ConditionSource:
    """One embedding: the mean of all embeddings of `source`, normalised, named `mean`.

    Several photos of one person describe the person better than each of them: what differs from photo to photo cancels
    out. A note names those that are unlike the others (a cosine below UNLIKE), which may show somebody else.
    """

    def chunks() -> Iterator[tuple[list[str], Tensor]]:
        parts = list(source.chunks)
        c = torch.cat([part for _, part in parts])
        names = [name for names, _ in parts for name in names]
        used.extend(source.origin(number) for number in range(len(names)))
        others = F.normalize(c.sum(0) - c)
        for name, cosine in zip(names, (c * others).sum(1).tolist(), strict=True):
            if len(c) > 1 and cosine < UNLIKE:
                message(f"note: {name} is unlike the others (cosine {cosine:.2f}); does it show the same person?")
        yield ["mean"], blend(c, torch.ones(len(c)))[None]

    used: list[dict[str, Any]] = []

    def origin(_: int) -> dict[str, Any]:
        return {"source": [one.get("source", "") for one in used], "mean": True}

    return ConditionSource(1, chunks(), source.skipped, source.inputs, origin, source.frames)


def one_embedding(
    text: str,
    snapshot: Snapshot,
    *,
    seed: int = 0,
    align: bool | None = None,
    encoder: CropEncoder | str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One embedding [c_dim] by name: a photo, `random` or `random:N` (identity number N), or `FILE#ROW` (default 0)."""
    if Path(text).suffix.lower() in photo_suffixes():
        source = from_photos([text], snapshot, align=align, encoder=encoder, device=device)
        return next(iter(source.chunks))[1][0]
    if match := _random_identity(text):
        check_population(snapshot)
        return sample_identities(snapshot.population, 1, seed=seed, start=_number(match[1] or "0", text))[0]
    path, row = _split_row(text)
    return open_embeddings(path, _c_dim(snapshot), snapshot.metadata.get("encoder")).row(row)


def inputs_of(text: str) -> list[Path]:
    """The file that `one_embedding` reads for this text, if any."""
    if _random_identity(text):
        return []
    return [split_source(_split_row(text)[0])[0]]


def _random_identity(text: str) -> re.Match[str] | None:
    """The match of `random` or `random:N`; None for the name of a file. Raises UserError for any other `random:`."""
    match = RANDOM.fullmatch(text)
    if match is None and text.startswith("random:") and not Path(text).exists():
        raise UserError(f"{text[:80]}: a random identity is random:N, with a whole number N from 0")
    return match


def _split_row(text: str) -> tuple[str, int]:
    """FILE#ROW -> (FILE, ROW); the row is 0 where none is given."""
    if not Path(text).exists() and (match := re.fullmatch(r"(.+)#(\d+)", text)):
        return match[1], _number(match[2], text)
    return text, 0


def _number(digits: str, text: str) -> int:
    if len(digits) > DIGITS:
        raise UserError(f"{text[:80]}: the number is too large; give at most {DIGITS} digits")
    return int(digits)


def check_population(snapshot: Snapshot) -> None:
    """Raise UserError unless random identities can be drawn from the snapshot."""
    if not {"mean", "factor"} <= snapshot.population.keys():
        raise UserError(
            f"{snapshot.path}: holds no population prior to draw random identities from; give embeddings or photos"
        )


def _encoder_for(snapshot: Snapshot, given: CropEncoder | str | Path | None, device: torch.device | str) -> CropEncoder:
    """The encoder that photos for the snapshot are embedded with. Raises UserError if `given` is another one."""
    where = snapshot.path or "the snapshot"
    if given is None or isinstance(given, str | Path):
        return load_condition_encoder(snapshot.metadata, where, given=given, device=device)
    if differs := difference(snapshot.metadata.get("encoder") or {}, encoder_entry(given)):
        raise UserError(f"{where}: the encoder gives embeddings of {differs}; give that one")
    return given


def _c_dim(snapshot: Snapshot) -> int:
    dim: int = snapshot.metadata["generator"]["c_dim"]
    return dim


def _numbered(chunks: Iterable[Tensor], count: int) -> Iterator[tuple[list[str], Tensor]]:
    """Chunks with the names of their rows: the index, with leading zeros."""
    start = 0
    for chunk in chunks:
        yield [index_name(index, count) for index in range(start, start + len(chunk))], chunk
        start += len(chunk)


def index_name(index: int, count: int) -> str:
    """The name of embedding number `index` of `count`, of equal length for all of them: 000003."""
    return f"{index:0{max(6, len(str(count - 1)))}d}"


# --- photos -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Photo:
    label: str  # in messages
    name: str  # start of the names of its files, before duplicates are renamed
    item: Item


def _photos(paths: Sequence[str | Path]) -> tuple[Iterator[_Photo], int]:
    """(photos, number of photos); the paths are checked now, folders are listed while they are read."""
    counts = [_count(Path(path)) for path in paths]
    if not sum(counts):
        raise UserError("no photos given; name files or folders")
    return _all_photos([Path(path) for path in paths]), sum(counts)


def _count(path: Path) -> int:
    if path.is_file():
        return 1
    if not path.is_dir():
        raise UserError(f"{path}: no such photo or folder")
    try:
        count = FolderPart(path).total
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); change its permissions") from None
    if not count:
        raise UserError(f"{path}: no photos in this folder (looked for {', '.join(sorted(photo_suffixes()))})")
    return count


def _all_photos(paths: Sequence[Path]) -> Iterator[_Photo]:
    for path in paths:
        if path.is_dir():
            for item in FolderPart(path).items(None):
                yield _Photo(f"{path}/{item.key}", item.key.rpartition(".")[0], item)
        else:
            yield _Photo(str(path), path.stem, Item(str(path), "", path))


def _embedded(
    photos: Iterable[_Photo],
    encoder: CropEncoder,
    align: bool,
    skipped: list[Skipped],
    seen: Callable[[_Photo, EmbeddedPhoto], None],
) -> Iterator[tuple[list[str], Tensor]]:
    """One photo at a time, so that no embedding depends on the other photos of a batch."""
    used: dict[str, int] = {}
    for photo in photos:
        try:
            embedded = embed_photo(photo.item.read(), encoder, align=align)
        except (BadImage, OSError) as error:
            reason = reason_of(error)
            skipped.append((photo.label, reason))
            message(f"skipped {photo.label}: {reason}")
            continue
        seen(photo, embedded)
        yield [_unique_name(photo.name, used)], embedded.c[None]
    if not used:
        label, reason = skipped[0]
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise UserError(f"{label}: {reason}{more}; no photo could be used, give another one")


def _unique_name(name: str, used: dict[str, int]) -> str:
    """`name` as part of a file name, different from all in `used`, also where file names ignore case."""
    base = re.sub(r"[^\w.-]+", "_", name).strip("._")[:80] or "photo"
    unique = base
    while unique.casefold() in used:
        used[base.casefold()] += 1
        unique = f"{base}-{used[base.casefold()]}"
    used[unique.casefold()] = 1
    return unique

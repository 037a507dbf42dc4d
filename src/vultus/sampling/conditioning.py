"""What faces are made of, as tensors: embeddings from a file, of photos, or of people who do not exist.

A source is read once, in order, a chunk at a time, so memory does not grow with its length. What needs no photo comes
from vectors.py, which does without torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vultus.data.sources import FolderPart, Item
from vultus.errors import UserError
from vultus.images import align as faces
from vultus.images.io import MAX_PIXELS, SUFFIXES, BadImage, centre_crop, decode_image, from_pil, to_x
from vultus.models.facenet import FaceNet, load_facenet
from vultus.sampling import vectors
from vultus.sampling.vectors import Conditions, Skipped, Trained


def from_embeddings(source: str | Path, snapshot: Trained) -> Conditions:
    """The rows of a file or prepared data set (see embeddings.py), all checked before the first is used."""
    return _tensors(vectors.from_embeddings(source, snapshot))


def random_people(snapshot: Trained, count: int, *, seed: int = 0, start: int = 0) -> Conditions:
    """`count` people who do not exist, number `start` and after. Raises UserError if the snapshot cannot tell any."""
    return _tensors(vectors.random_people(snapshot, count, seed=seed, start=start))


def _tensors(conditions: Conditions) -> Conditions:
    chunks = ((names, torch.from_numpy(rows)) for names, rows in conditions.chunks)
    return Conditions(conditions.count, chunks, conditions.skipped)


def from_photos(
    paths: Sequence[str | Path],
    snapshot: Trained,
    *,
    align: bool | None = None,
    encoder: FaceNet | None = None,
    device: torch.device | str = "cpu",
) -> Conditions:
    """Embeddings of photos: files, or all photos below folders.

    `align` None finds and aligns the face where the extra `align` is installed, and else takes the centre square as it
    is. A photo that is damaged or shows no face is said on stderr, listed in `skipped` and left out.
    Raises UserError if a path does not exist, a folder has no photos, or (at the end) no photo could be used.
    """
    photos, count = _photos(paths)
    align = _decide_align(align)
    encoder = _encoder(snapshot, encoder, device)
    skipped: list[Skipped] = []
    return Conditions(count, _embedded(photos, encoder, align, skipped), skipped)


def one_embedding(
    text: str,
    snapshot: Trained,
    *,
    seed: int = 0,
    align: bool | None = None,
    encoder: FaceNet | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One embedding [c_dim] by name: a photo, or as vectors.one_embedding has it."""
    if Path(text).suffix.lower() in SUFFIXES:
        conditions = from_photos([text], snapshot, align=align, encoder=encoder, device=device)
        embedding: Tensor = next(iter(conditions.chunks))[1][0]
        return embedding
    return torch.from_numpy(vectors.one_embedding(text, snapshot, seed=seed))


@dataclass(frozen=True)
class _Photo:
    shown: str  # in messages
    name: str  # begins the names of its pictures, before doubles are told apart
    item: Item


def _photos(paths: Sequence[str | Path]) -> tuple[Iterator[_Photo], int]:
    """(photos, how many); the paths are looked at now, folders are listed as they are read."""
    counts = [_count(Path(path)) for path in paths]
    if not sum(counts):
        raise UserError("no photos given; name files or folders")
    return _all_photos([Path(path) for path in paths]), sum(counts)


def _count(path: Path) -> int:
    if path.is_file():
        return 1
    if not path.is_dir():
        raise UserError(f"{path}: no such photo or folder")
    count = FolderPart(path).total
    if not count:
        raise UserError(f"{path}: no photos in this folder (looked for {', '.join(sorted(SUFFIXES))})")
    return count


def _all_photos(paths: Sequence[Path]) -> Iterator[_Photo]:
    for path in paths:
        if path.is_dir():
            for item in FolderPart(path).items(None):
                yield _Photo(f"{path}/{item.key}", item.key.rpartition(".")[0], item)
        else:
            yield _Photo(str(path), path.stem, Item(str(path), "", path))


def _decide_align(align: bool | None) -> bool:
    if align and not faces.available():
        raise UserError(faces.MISSING)
    if align is None:
        align = faces.available()
        if not align:
            print(
                "note: photos are not aligned, the centre square is taken as it is; pip install 'vultus[align]' to "
                "find and align faces",
                file=sys.stderr,
            )
    return align


def check_encoder(snapshot: Trained) -> None:
    """Raise UserError unless photos can be embedded as the training photos of the snapshot were."""
    needed = snapshot.metadata.get("encoder", {}).get("id", FaceNet.id)
    if needed != FaceNet.id:
        raise UserError(
            f"{snapshot.path}: was trained on embeddings of {needed}, and photos can be embedded by {FaceNet.id} only; "
            f"give a file of {needed} embeddings"
        )


def _encoder(snapshot: Trained, encoder: FaceNet | None, device: torch.device | str) -> FaceNet:
    check_encoder(snapshot)
    # The embedding decides the face, and a photo costs more to decode and align: float32, whatever is faster.
    return encoder or load_facenet(device=device, dtype=torch.float32)


def _embedded(
    photos: Iterable[_Photo], encoder: FaceNet, align: bool, skipped: list[Skipped]
) -> Iterator[tuple[list[str], Tensor]]:
    """One photo at a time, so that no photo's embedding depends on the photos beside it."""
    taken: dict[str, int] = {}
    for photo in photos:
        try:
            seen = embed_photo(photo.item.read(), encoder, align=align)
        except (BadImage, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            skipped.append((photo.shown, reason))
            tqdm.write(f"skipped {photo.shown}: {reason}", file=sys.stderr)
            continue
        yield [_unlike(photo.name, taken)], seen.c[None]
    if not taken:
        shown, reason = skipped[0]
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise UserError(f"{shown}: {reason}{more}; no photo could be used, give another one")


@dataclass(frozen=True)
class EmbeddedPhoto:
    """What an encoder made of a photo.

    Attributes:
        c: the embedding, [dim] float32 on the CPU.
        frame: the face framed as the training photos are, or the photo as it was where nobody looked for faces.
        crop: the part of it that the encoder reads.
        faces: how many were found; None where nobody looked.
    """

    c: Tensor
    frame: Image.Image
    crop: Image.Image
    faces: int | None


def embed_photo(data: bytes, encoder: FaceNet, *, align: bool, max_pixels: int = MAX_PIXELS) -> EmbeddedPhoto:
    """Embed an encoded photo. Raises BadImage if it is damaged, too large, or (with `align`) shows no face."""
    photo = decode_image(data, max_pixels=max_pixels)
    frame, count = faces.align_largest(photo) if align else (photo, None)
    if frame is None:
        raise BadImage("no face found")
    crop = centre_crop(frame, encoder.size, encoder.crop)
    x = to_x(from_pil([crop])).to(next(encoder.parameters()).device)
    with torch.inference_mode():
        c = encoder.embed_crop(x)[0].cpu()
    return EmbeddedPhoto(c, frame, crop, count)


def _unlike(name: str, taken: dict[str, int]) -> str:
    """`name` fit for a file name, and unlike all in `taken` (also where upper and lower case are the same)."""
    text = re.sub(r"[^\w.-]+", "_", name).strip("._")[:80] or "photo"
    unlike = text
    while unlike.casefold() in taken:
        taken[text.casefold()] += 1
        unlike = f"{text}-{taken[text.casefold()]}"
    taken[unlike.casefold()] = 1
    return unlike

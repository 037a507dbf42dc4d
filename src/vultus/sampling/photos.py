"""One photo: its faces, and their embeddings."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from vultus._device import one_thread, resolve_device
from vultus.errors import UserError
from vultus.images import align as faces
from vultus.images.io import MAX_PIXELS, BadImage, centre_crop, decode_image, from_pil, to_x
from vultus.models.encoders import FACENET, CropEncoder, device_of, load_face_encoder

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright photo
WhichFace = Literal["largest", "central", "all"]
BATCH = 32  # images to a call of the encoder


@dataclass(frozen=True)
class EmbeddedPhoto:
    """The embedding of a face in a photo, and the parts of the photo that it was computed from.

    Attributes:
        c: the embedding, float32 [c_dim] on the CPU, unit norm.
        frame: the aligned face, framed like the training photos; without alignment the whole photo.
        crop: the part of the frame that the encoder reads.
        faces: number of faces found; None without alignment.
        box: left, top, right and bottom of this face, in pixels of the upright photo; None without alignment.
    """

    c: Tensor
    frame: Image.Image
    crop: Image.Image
    faces: int | None
    box: Box | None = None


def embed_photo(data: bytes, encoder: CropEncoder, *, align: bool, max_pixels: int = MAX_PIXELS) -> EmbeddedPhoto:
    """Embed the largest face of an encoded photo; see embed_faces()."""
    return embed_faces(data, encoder, align=align, max_pixels=max_pixels)[0]


def embed_faces(
    data: bytes, encoder: CropEncoder, *, align: bool, which: WhichFace = "largest", max_pixels: int = MAX_PIXELS
) -> list[EmbeddedPhoto]:
    """Embed faces of an encoded photo.

    Args:
        data: the file.
        encoder: of the embedding.
        align: find and align faces. Without it the centre square of the photo is embedded.
        which: the largest face, the one nearest to the centre of the photo, or all of them, the largest first.
        max_pixels: of the photo.

    Raises BadImage if the photo is damaged, too large, or (with `align`) shows no face.
    """
    photo = decode_image(data, max_pixels=max_pixels)
    if not align:
        return [_embedded_frame(photo, encoder, None, None)]
    found = faces.find_faces(photo)
    if not found:
        raise BadImage("no face found")
    chosen = found if which == "all" else [_central(found, photo) if which == "central" else found[0]]
    return [_embedded_frame(faces.align_face(photo, face), encoder, len(found), face.box) for face in chosen]


def _central(found: Sequence[faces.Face], photo: Image.Image) -> faces.Face:
    """The face whose centre is nearest to that of the photo; the largest of several."""

    def distance(face: faces.Face) -> float:
        left, top, right, bottom = face.box
        return math.hypot(left + right - photo.width, top + bottom - photo.height)

    return min(found, key=distance)


def _embedded_frame(frame: Image.Image, encoder: CropEncoder, count: int | None, box: Box | None) -> EmbeddedPhoto:
    crop = centre_crop(frame, encoder.size, encoder.crop)
    x = to_x(from_pil([crop])).to(device_of(encoder))
    with torch.inference_mode(), one_thread():
        c = encoder.embed_crop(x)[0].cpu()
    return EmbeddedPhoto(c, frame, crop, count, box)


def decide_align(align: bool | None) -> bool:
    """Whether photos are aligned; None: if the extra `align` is installed, with a note if it is not.

    Raises UserError if they shall be aligned and it is not installed.
    """
    if align and not faces.available():
        raise UserError(faces.MISSING)
    if align is None:
        align = faces.available()
        if not align:
            print(
                "note: photos are not aligned, their centre square is used; to find and align faces: "
                "pip install 'vultus[align]'",
                file=sys.stderr,
            )
    return align


def reason_of(error: BadImage | OSError) -> str:
    """Why a photo cannot be used, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def embed(
    photos: str | Path | Sequence[str | Path] | Tensor,
    *,
    align: bool | None = None,
    encoder: str | Path = FACENET,
    device: str = "auto",
) -> Tensor:
    """Embeddings of photos, by default FaceNet's (VGGFace2, 512 numbers): float32 [N, dim], unit norm, on the CPU.

    Args:
        photos: image files, one or several; or images uint8 [N, 3, R, R] that are framed like the
            training photos, for instance generated faces, which are not aligned.
        align: find the largest face of a photo and align it. None: if the extra `align` is installed. Without
            alignment the centre square of the photo is taken as it is.
        encoder: "facenet", "mobilefacenet", "dlib" or FILE.onnx (see vultus.models.encoders). It computes in float32:
            the embedding determines the face, and decoding costs more than bfloat16 saves.
        device: auto, cuda, mps or cpu.

    Raises UserError that names the file if a photo does not exist, is damaged, or shows no face; and if the weights of
    the encoder are neither on this machine nor can be downloaded.

    Examples:
        >>> c = vultus.embed(["me.jpg", "you.jpg"])
        >>> float(c[0] @ c[1])  # cosine: 0.7 on average for two photos of one identity, 0.0 for two identities
    """
    if isinstance(photos, Tensor):
        if photos.dtype != torch.uint8 or photos.ndim != 4 or photos.shape[1] != 3:
            raise UserError(
                f"embed: images have dtype {photos.dtype} and shape {list(photos.shape)}; uint8 [N, 3, R, R] is needed"
            )
        network = load_face_encoder(encoder, device=resolve_device(device), dtype=torch.float32)
        where = device_of(network)
        with torch.inference_mode():
            parts = [network.embed(to_x(part).to(where)).cpu() for part in photos.split(BATCH)] if len(photos) else []
        return torch.cat([torch.zeros(0, network.dim), *parts])
    paths = [Path(path) for path in ([photos] if isinstance(photos, str | os.PathLike) else photos)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such photo")
    align = decide_align(align)
    network = load_face_encoder(encoder, device=resolve_device(device), dtype=torch.float32)
    rows = [torch.zeros(0, network.dim)]
    for path in paths:
        try:
            rows.append(embed_photo(path.read_bytes(), network, align=align).c[None])
        except (BadImage, OSError) as error:
            raise UserError(f"{path}: {reason_of(error)}; leave it out or give another photo") from None
    return torch.cat(rows)

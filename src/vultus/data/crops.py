"""One photo: its crops, its embedding, its split. `vultus prepare` and a stream use the same code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vultus.data.items import Item
from vultus.images.io import BadImage, NoDecoder, centre_crop, decode_image, encode_jpeg, from_pil, to_x
from vultus.images.xmp import SOURCES, read_marks
from vultus.models.facenet import Encoder


class CropEncoder(Encoder, Protocol):
    """An encoder that also embeds crops, and has a dtype."""

    dtype: torch.dtype

    def embed_crop(self, x: torch.Tensor) -> torch.Tensor:
        """Crops x [N, 3, size, size] in [-1, 1] -> unit-norm float32 [N, dim]."""
        ...


def encoder_entry(encoder: CropEncoder) -> dict[str, Any]:
    """What the manifest says about the encoder."""
    return {
        "id": encoder.id,
        "dim": encoder.dim,
        "weights_sha256": encoder.weights_sha256,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }


def crop_entry(align: bool, fraction: float) -> dict[str, Any]:
    """What the manifest says about the crops, of which the encoder reads the central `fraction`."""
    return {"kind": "aligned" if align else "centre", "encoder_fraction": fraction}


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why a photo cannot be used."""

    reason: str
    again: bool = False  # whether the photo itself may be good


@dataclass(frozen=True, slots=True)
class Crops:
    """The two crops of a photo."""

    jpeg: bytes  # resolution x resolution, stored in the data set
    face: Image.Image  # encoder.size x encoder.size, input of the encoder
    synthetic: bool  # its metadata say that a program made it or a part of it


def crops_of(item: Item, resolution: int, size: int, fraction: float, align: bool) -> Crops | Unusable:
    """The decoded crops, or the reason why the photo is not usable. Runs in a thread."""
    try:
        data = item.read()
        photo = decode_image(data)
    except OSError as error:
        return Unusable(f"can't be read ({error.strerror or error})", again=True)
    except BadImage as error:
        return Unusable(str(error), again=isinstance(error, NoDecoder))
    if align:
        from vultus.images.align import align as align_face

        aligned = align_face(photo)
        if aligned is None:
            return Unusable("no face found")
        photo = aligned
    synthetic = SOURCES.encode() in data and read_marks(data).synthetic  # most files need not be parsed
    # Both crops are taken from the original pixels, so the embedding does not depend on the resolution.
    return Crops(encode_jpeg(centre_crop(photo, resolution)), centre_crop(photo, size, fraction), synthetic)


def embed(encoder: CropEncoder, faces: Sequence[Image.Image], device: torch.device | str) -> npt.NDArray[np.float32]:
    """Embeddings float32 [N, dim] of N crops for the encoder (Crops.face), as one batch."""
    with torch.inference_mode():
        embeddings: npt.NDArray[np.float32] = encoder.embed_crop(to_x(from_pil(faces).to(device))).float().cpu().numpy()
    return embeddings


def in_test(identity: str, test_fraction: float) -> bool:
    """Whether an identity belongs to the test split; a function of its name and the fraction alone."""
    value = int.from_bytes(hashlib.sha256(identity.encode("utf-8", "backslashreplace")).digest()[:8], "big")
    return value < test_fraction * 2**64

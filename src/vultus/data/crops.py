"""One photo: its crops, its embedding, its split. `vultus prepare` and a stream use the same code."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vultus.data.embedding_table import EmbeddingTable
from vultus.data.items import Item
from vultus.images.io import BadImage, Crop, NoDecoder, centre_crop, decode_image, encode_jpeg, from_pil, to_x
from vultus.images.xmp import SOURCES, read_marks
from vultus.models.encoders import CropEncoder, encoder_entry

View = tuple[int, Crop]  # side of an encoder's input in pixels, and the part of the photo that it reads


@dataclass(frozen=True)
class Encoders:
    """What gives a photo its embeddings.

    Attributes:
        condition: the encoder of the condition, or a table of its vectors.
        facenet: for losses, where the condition is another encoder's; its embedding is stored beside the condition.
    """

    condition: CropEncoder | EmbeddingTable
    facenet: CropEncoder | None = None

    @functools.cached_property
    def networks(self) -> dict[str, CropEncoder]:
        """Those that read photos, by the column of their embeddings."""
        table = isinstance(self.condition, EmbeddingTable)
        found = {} if table else {"embedding": cast(CropEncoder, self.condition)}
        return found | ({"facenet": self.facenet} if self.facenet else {})

    @property
    def table(self) -> EmbeddingTable | None:
        """The table, where the condition comes from one."""
        return self.condition if isinstance(self.condition, EmbeddingTable) else None

    @property
    def dims(self) -> dict[str, int]:
        """The length of the embeddings of each column."""
        return {"embedding": self.condition.dim} | ({"facenet": self.facenet.dim} if self.facenet else {})

    @property
    def views(self) -> list[View]:
        """What each of `networks` reads of a photo."""
        return [(network.size, network.crop) for network in self.networks.values()]

    def entries(self) -> dict[str, Any]:
        """What the manifest says about them: `encoder`, that of the condition, and `facenet`, if it is another."""
        condition = (
            self.condition.entry() if isinstance(self.condition, EmbeddingTable) else encoder_entry(self.condition)
        )
        return {"encoder": condition} | ({"facenet": encoder_entry(self.facenet)} if self.facenet else {})

    def crop_entry(self, align: bool) -> dict[str, Any]:
        """What the manifest says about the crops."""
        first = next(iter(self.networks.values()), None)
        return crop_entry(align, None if self.table or first is None else first.crop)


def crop_entry(align: bool, crop: Crop | None) -> dict[str, Any]:
    """What the manifest says about the crops, and about the part of them that the encoder reads; None: not known."""
    entry: dict[str, Any] = {"kind": "aligned" if align else "centre"}
    if isinstance(crop, tuple):
        return entry | {"encoder_crop": list(crop)}
    return entry if crop is None else entry | {"encoder_fraction": crop}


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why a photo cannot be used."""

    reason: str
    again: bool = False  # whether the photo itself may be good


@dataclass(frozen=True, slots=True)
class Crops:
    """The crops of a photo."""

    jpeg: bytes  # resolution x resolution, stored in the data set
    faces: tuple[Image.Image, ...]  # input of each encoder
    synthetic: bool  # its metadata say that a program made it or a part of it


def crops_of(item: Item, resolution: int, views: Sequence[View], align: bool) -> Crops | Unusable:
    """The decoded crops, one for each of `views`, or the reason why the photo is not usable. Runs in a thread."""
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
    # All crops are taken from the original pixels, so the embedding does not depend on the resolution.
    faces = tuple(centre_crop(photo, size, crop) for size, crop in views)
    return Crops(encode_jpeg(centre_crop(photo, resolution)), faces, synthetic)


def embed(encoder: CropEncoder, faces: Sequence[Image.Image], device: torch.device | str) -> npt.NDArray[np.float32]:
    """Embeddings float32 [N, dim] of N crops for the encoder (Crops.faces), as one batch."""
    with torch.inference_mode():
        embeddings: npt.NDArray[np.float32] = encoder.embed_crop(to_x(from_pil(faces).to(device))).float().cpu().numpy()
    return embeddings


def in_test(identity: str, test_fraction: float) -> bool:
    """Whether an identity belongs to the test split; a function of its name and the fraction alone."""
    value = int.from_bytes(hashlib.sha256(identity.encode("utf-8", "backslashreplace")).digest()[:8], "big")
    return value < test_fraction * 2**64

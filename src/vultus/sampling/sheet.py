"""Grids of generated faces, with labels, scores and the photos that the faces were generated from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from vultus.images.io import grid, to_pil
from vultus.images.labelled import labelled_sheet
from vultus.sampling.face_files import Face

MOST = 24  # letters of a label in front of a row


class Sheet:
    """Collects the faces of a grid: a row of `num` for each embedding, or a square if `num` is 1."""

    def __init__(self, num: int, labels: bool) -> None:
        self._num, self._labels = num, labels
        self._images: list[Tensor] = []
        self._faces: list[Face] = []
        self._cosines: list[float] = []

    def add(self, faces: Sequence[Face], images: Tensor, cosines: Sequence[float] | None = None) -> None:
        """Faces, uint8 [n, 3, S, S], and the cosines of their embeddings to the condition, where they are known."""
        self._faces += faces
        self._images.append(images)
        self._cosines += cosines or ()

    def draw(self, photos: Sequence[Image.Image] = ()) -> Image.Image:
        """The grid. With labels, each row begins with its photo, where there is one for each embedding."""
        images = torch.cat(self._images)
        if not self._labels:
            return square_grid(images, self._num)
        shown = [to_pil(image) for image in images]
        captions = [f"cosine {cosine:.2f}" for cosine in self._cosines]
        names = [face.name[-MOST:] for face in self._faces[:: self._num]]
        if self._num == 1 and not photos:
            lines = [" ".join(part) for part in zip(names, captions or [""] * len(names), strict=True)]
            return labelled_sheet(shown, _side(len(shown)), captions=[line.strip() for line in lines])
        heads = [f"noise {number}" for number in range(self._num)]
        if not photos:
            return labelled_sheet(shown, self._num, row_labels=names, column_labels=heads, captions=captions)
        side = shown[0].size
        rows: list[Image.Image] = []
        below: list[str] = []
        for row in range(len(names)):
            # The mean of several photos has one row: the first of them stands for all.
            rows += [photos[row].resize(side, Image.Resampling.LANCZOS)]
            rows += shown[row * self._num : (row + 1) * self._num]
            below += ["", *captions[row * self._num : (row + 1) * self._num]]
        first = "photo" if len(photos) == len(names) else f"first of {len(photos)} photos"
        return labelled_sheet(
            rows,
            self._num + 1,
            row_labels=names,
            column_labels=[first, *heads],
            captions=below if captions else (),
        )


def square_grid(images: Tensor, num: int) -> Image.Image:
    """Images uint8 [N * num, 3, S, S], a row for each of N embeddings, or nearly a square if `num` is 1."""
    return grid(images, num if num > 1 else _side(len(images)))


def _side(count: int) -> int:
    return math.ceil(math.sqrt(count))

"""Reading the sample sheets of a run folder. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from vultus.images.io import HEADER

GAP = 2  # pixels between the images of a sheet


@dataclass(frozen=True)
class Samples:
    """The images of one sample sheet.

    Attributes:
        cur_nimg: images seen when the samples were generated.
        photos: uint8 [P, 3, R, R], the source photo of each person.
        generated: uint8 [P, K, 3, R, R], a face for each person and noise.
        path: of the sheet.
    """

    cur_nimg: int
    photos: npt.NDArray[np.uint8]
    generated: npt.NDArray[np.uint8]
    path: Path


def read_samples(folder: Path, resolution: int) -> tuple[list[Samples], list[str]]:
    """The samples in `folder` (samples/ of a run folder) in order, and a line for each sheet that cannot be read."""
    found, remarks = [], []
    for path in sorted(folder.glob("*.png")):
        if not path.stem.isdigit():
            continue
        try:
            with Image.open(path) as opened:
                sheet = np.asarray(opened.convert("RGB"))
        except OSError:
            remarks.append(f"{path.name} cannot be read and is left out")
            continue
        header = HEADER if resolution >= 64 else 0
        step = resolution + GAP
        columns, more = divmod(sheet.shape[1] + GAP, step)
        rows, left = divmod(sheet.shape[0] + GAP - header, step)
        if more or left or columns < 2 or rows < 1:
            remarks.append(f"{path.name} is not laid out as a sheet of samples and is left out")
            continue
        padded = np.pad(sheet[header:], ((0, GAP), (0, GAP), (0, 0)))
        cells = padded.reshape(rows, step, columns, step, 3)[:, :resolution, :, :resolution]
        images = cells.transpose(0, 2, 4, 1, 3)
        found.append(Samples(int(path.stem), images[:, 0], images[:, 1:], path))
    return found, remarks

"""The sample files of a run folder: generated faces of fixed people, with their photos. Without torch.

samples/<cur_nimg>.npz holds the pixels: `generated` uint8 [P, K, 3, R, R] (K noise vectors for each of P people),
`photos` uint8 [P, 3, R, R] and `format`. Beside it, samples/<cur_nimg>.png shows the same as a sheet. Version 1 of the
format had the sheet only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vultus._files import atomic_path
from vultus._formats import VERSIONS, upgrade, upgrades
from vultus.errors import UserError
from vultus.images.io import HEADER

Pixels = npt.NDArray[np.uint8]

MAX_BYTES = 1 << 28  # of the arrays; those of 8 people with 5 faces at 1024 pixels have 150 MB
GAP = 2  # pixels between two images of a sheet
LABELLED_SIDE = 64  # a sheet has column labels where its images have this side or more


@dataclass(frozen=True)
class Samples:
    """The samples after `cur_nimg` images.

    Attributes:
        cur_nimg: images seen by the generator.
        photos: uint8 [P, 3, R, R], one photo of each person.
        generated: uint8 [P, K, 3, R, R], a face for each person and noise vector.
        path: the file that they were read from.
    """

    cur_nimg: int
    photos: Pixels
    generated: Pixels
    path: Path


def write_samples(path: Path, photos: Pixels, generated: Pixels) -> None:
    """Write the pixels of Samples as .npz, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, generated=generated, photos=photos, format=np.int64(VERSIONS["samples"]))


def sample_paths(folder: Path) -> list[tuple[int, Path]]:
    """(images seen, file) of all samples in a folder, in order: the .npz, or the sheet where there is only that."""
    paths = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdigit()}
    paths |= {int(path.stem): path for path in folder.glob("*.npz") if path.stem.isdigit()}
    return sorted(paths.items())


def read_sample(path: Path, resolution: int) -> Samples:
    """One file of sample_paths(), of images of side `resolution`. Raises UserError that names the file."""
    where = f"{path.parent.name}/{path.name}"
    try:
        if path.suffix == ".png":
            values = upgrade("samples", 1, (path, resolution), where)
        else:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                if sum(member.file_size for member in arrays.zip.infolist()) > MAX_BYTES:
                    raise ValueError("too large")
                values = upgrade("samples", int(arrays["format"]), {key: arrays[key] for key in arrays.files}, where)
        photos, generated = values["photos"], values["generated"]
        sides = (3, resolution, resolution)
        if photos.ndim != 4 or generated.ndim != 5 or photos.shape[1:] != sides or generated.shape[2:] != sides:
            raise ValueError(f"shapes {photos.shape} and {generated.shape}")
        if len(photos) != len(generated) or photos.dtype != np.uint8 or generated.dtype != np.uint8:
            raise ValueError(f"shapes {photos.shape} and {generated.shape} of {photos.dtype}")
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and Pillow raise many kinds of errors on damaged files
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"{where}: no samples of {resolution}x{resolution} pixels ({reason}); delete it") from None
    return Samples(int(path.stem), photos, generated, path)


def read_samples(folder: Path, resolution: int) -> tuple[list[Samples], list[str]]:
    """All samples in a `samples` folder of a run, in the order of training, with a message for each unreadable file."""
    samples: list[Samples] = []
    messages: list[str] = []
    for _, path in sample_paths(folder):
        try:
            samples.append(read_sample(path, resolution))
        except UserError as error:
            messages.append(str(error))
    return samples, messages


@upgrades("samples", 1)
def _upgrade_from_1(value: tuple[Path, int]) -> dict[str, Any]:
    """Version 1 had only the sheet: its pixels are those of the images, without loss."""
    photos, generated = cells_of_sheet(*value)
    return {"photos": photos, "generated": generated}


def cells_of_sheet(path: Path, side: int) -> tuple[Pixels, Pixels]:
    """The images of a sheet of version 1: photos uint8 [P, 3, side, side], generated uint8 [P, K, 3, side, side].

    A sheet has a row for each person: the photo, then K generated faces. Raises ValueError if the size of the sheet
    does not fit, OSError if it is not an image.
    """
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    header = HEADER if side >= LABELLED_SIDE else 0
    height, width = pixels.shape[0] - header + GAP, pixels.shape[1] + GAP
    rows, columns = height // (side + GAP), width // (side + GAP)
    if (rows * (side + GAP), columns * (side + GAP)) != (height, width) or rows < 1 or columns < 2:
        raise ValueError(f"a sheet of {pixels.shape[1]}x{pixels.shape[0]} pixels does not consist of such images")
    padded = np.zeros((height, width, 3), np.uint8)
    padded[: height - GAP, : width - GAP] = pixels[header:]
    cells = padded.reshape(rows, side + GAP, columns, side + GAP, 3)[:, :side, :, :side].transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cells[:, 0]), np.ascontiguousarray(cells[:, 1:])

"""The files of generated faces: a picture for each, and beside them `faces.jsonl`, which says what each of them shows.

A line of `faces.jsonl` is an object with

| key | value |
|---|---|
| `format` | 1 |
| `file` | the picture, relative to the folder |
| `source` | the photo, file of embeddings or `random:N` that the embedding is of |
| `row` | of a file: the number of the row; else absent |
| `faces` | of a photo: number of faces found; `box`: the one that was taken, in pixels of the photo |
| `edit` | of `--edit`: {attribute: strength}; else absent |
| `embedding`, `noise` | number of the embedding in this call, and of its noise |
| `seed`, `noise_strength` | of the noise |
| `model` | id of the snapshot, as the marks of the picture have it |
| `encoder`, `cosine` | encoder of the condition, and the cosine of its embedding of the face to it; if computed |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vultus._files import atomic_path, json_value, make_folder
from vultus._formats import VERSIONS, upgrade
from vultus._outputs import Inputs
from vultus._ranges import ImageFormat
from vultus.errors import UserError
from vultus.images.io import to_pil
from vultus.images.xmp import Origin, Sign, save_marked

PER_FOLDER = 1000  # faces in one folder; more are split into numbered sub-folders
LIST = "faces.jsonl"


@dataclass(frozen=True)
class Face:
    """A face that is to be written.

    Attributes:
        number: among all faces of the call.
        index: of the embedding.
        variant: of the faces of that embedding.
        name: of the embedding, the start of the file's name.
        noise: number of its noise; `variant` but for the best of several.
    """

    number: int
    index: int
    variant: int
    name: str
    noise: int


@dataclass(frozen=True)
class Pictures:
    """How faces are written.

    Attributes:
        format: of the files.
        quality: of JPEG and WebP, 1 to 100.
        size: side in pixels, to which faces are resized (Lanczos); None: as they are generated.
    """

    format: ImageFormat = "png"
    quality: int = 95
    size: int | None = None

    def resized(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 3, R, R] -> [N, 3, size, size]."""
        if self.size in (None, images.shape[-1]) or not len(images):
            return images
        assert self.size is not None
        side = (self.size, self.size)
        arrays = [np.asarray(to_pil(image).resize(side, Image.Resampling.LANCZOS)) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def about(self, resolution: int) -> str:
        """What the metadata say of the size."""
        return "" if self.size in (None, resolution) else f"resized from {resolution} to {self.size} pixels (Lanczos)"


def save_faces(
    faces: Sequence[Face],
    images: Iterable[Tensor],
    out: Path,
    total: int,
    origin: Origin,
    signer: Sign | None = None,
    inputs: Inputs | None = None,
    *,
    pictures: Pictures,
    overwrite: bool,
) -> list[Path]:
    """Write one file for each face, of `total` faces in the folder `out`; return the paths."""
    paths = []
    for face, image in zip(faces, images, strict=True):
        folder = make_folder(out / f"{face.number // PER_FOLDER:04d}") if total > PER_FOLDER else out
        paths.append(folder / f"{face.name}_{face.variant}.{pictures.format}")
        detail = ", ".join(part for part in (f"embedding {face.index}, noise {face.noise}", origin.detail) if part)
        about = Origin(origin.model, origin.seed, detail)
        save_marked(
            to_pil(image),
            paths[-1],
            about,
            watermark=False,
            quality=pictures.quality,
            signer=signer,
            inputs=inputs,
            overwrite=overwrite,
        )
    return paths


class FaceList:
    """Writes `faces.jsonl` of a folder: the lines of this call, after those of earlier calls whose pictures differ.

    Lines are collected in a temporary file, so memory does not grow with them, and take the place of the old file at
    the end. Used with `with`; after an error the old file stays.

    Raises UserError if the folder has a faces.jsonl that vultus did not write.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LIST
        self._folder = folder
        self._names: set[str] = set()
        self._before = read_faces(self.path) if self.path.exists() else []

    def __enter__(self) -> FaceList:
        self._temporary = atomic_path(self.path)
        self._file = open(self._temporary.__enter__(), "w+", encoding="utf-8")
        return self

    def add(self, path: Path, **values: Any) -> None:
        """A line for the picture `path`."""
        name = path.relative_to(self._folder).as_posix()
        self._names.add(name)
        line = {"format": VERSIONS["face list"], "file": name, **values}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __exit__(self, *error: Any) -> None:
        with self._file:
            if error[0] is None:
                kept = [line for line in self._before if line["file"] not in self._names]
                self._file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        self._temporary.__exit__(*error)


def read_faces(path: Path) -> list[dict[str, Any]]:
    """The lines of a faces.jsonl. Raises UserError that names the line if it is not one."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line: Any = json_value(text)
        except ValueError:
            line = None
        if not isinstance(line, Mapping) or not isinstance(line.get("file"), str) or "format" not in line:
            raise UserError(f"{path}: line {number} does not say which picture it is of; move the file away")
        lines.append(upgrade("face list", line["format"], dict(line), path))
    return lines

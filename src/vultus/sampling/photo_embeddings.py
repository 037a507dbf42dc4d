"""Photos to a file of embeddings, with the name of each photo, its number of faces, and which of them was taken.

| file | holds |
|---|---|
| `.npz` | arrays `embeddings` [N, dim], `keys` [N], `faces_found` [N] and `boxes` [N, 4] (not known: -1 and NaN) |
| `.parquet` | columns `key`, `faces_found`, `box`, `embedding` |
| `.json` | a list `faces` of the same, and the id of the encoder as `encoder` |
| `.csv` | columns `faces_found`, `left`, `top`, `right`, `bottom`, `key`, and one for each number of the embedding |
| `.npy` | the embeddings alone; the rest is in a `.json` file of the same name beside it |

All but `.csv` and `.npy` also hold a header, JSON: the version of the format, the encoder as encoder_entry() describes
it, and the photos that were skipped. It is the array `vultus`, the metadata `vultus` of the Parquet schema, or the key
`vultus`. The rows are read by embedding_files.py.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch

from vultus._device import resolve_device
from vultus._files import atomic_path, make_folder, write_text
from vultus._formats import VERSIONS
from vultus._outputs import Inputs, check_output
from vultus._progress import message, progress
from vultus._ranges import Images, checked, checks_arguments
from vultus.data.sources import Item, Part, open_source
from vultus.errors import UserError
from vultus.images.io import BadImage
from vultus.models.encoders import FACENET, CropEncoder, encoder_entry, load_face_encoder
from vultus.sampling.embedding_rows import HEADER
from vultus.sampling.photos import Box, WhichFace, decide_align, embed_faces, reason_of

Named = Iterator[tuple[str, Item]]  # photos with their keys


@dataclass
class PhotoEmbeddings:
    """The embeddings of faces in photos; the lists have an entry for each of N faces.

    Attributes:
        encoder: see encoder_entry().
        photos: number of photos that were read, the skipped ones included.
        keys: the name of the photo in its source, or its path; for a further face of it `#1`, `#2`, ... is added.
        faces_found: number of faces that were found in the photo; None without alignment.
        boxes: left, top, right and bottom of the face, in pixels of the upright photo; None without alignment.
        rows: the embeddings, float32 [dim], unit norm.
        skipped: name of each photo that was left out, and why.
    """

    encoder: dict[str, Any]
    photos: int = 0
    keys: list[str] = field(default_factory=list)
    faces_found: list[int | None] = field(default_factory=list)
    boxes: list[Box | None] = field(default_factory=list)
    rows: list[npt.NDArray[np.float32]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def embeddings(self) -> npt.NDArray[np.float32]:
        """The rows as an array [N, dim]."""
        return np.stack(self.rows)

    def header(self) -> dict[str, Any]:
        """See above."""
        skipped = [{"key": key, "reason": reason} for key, reason in self.skipped]
        return {"format": VERSIONS["embeddings"], "encoder": self.encoder, "skipped": skipped}


@checks_arguments
def embed_photos(
    photos: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    face: WhichFace = "largest",
    align: bool | None = None,
    split: str | None = None,
    image_column: str | None = None,
    limit: Images | None = None,
    encoder: str | Path | CropEncoder = FACENET,
    device: str = "auto",
    overwrite: bool = False,
) -> PhotoEmbeddings:
    """Embed the faces of photos and write them to a file, as the table above says.

    Args:
        photos: one or several of: image file, folder (with its sub-folders), Parquet file or glob of such files, id of
            a Hugging Face data set.
        out: the file to write, with one of the suffixes above.
        face: of a photo that shows several: the largest, the one nearest to the centre of the photo, or all of them,
            the largest first.
        align: find and align faces. None: if the extra `align` is installed. Without alignment the centre square of the
            photo is embedded.
        split: of a table, read only this split.
        image_column: of a table, the column of the images; default "image".
        limit: read at most this many photos.
        encoder: "facenet", "mobilefacenet", "dlib" or FILE.onnx (see vultus.models.encoders), or a loaded one.
        device: auto, cuda, mps or cpu.
        overwrite: replace an existing file; never one that is read.

    A photo that is damaged or shows no face is reported on stderr, listed in the header and left out. The embeddings of
    FaceNet are those of `vultus.embed`.

    Raises UserError if a source does not exist or holds no photo, the file to write exists, is read or lies in a folder
    that is read, or no photo could be used.
    """
    checked(face, WhichFace, "--face")
    sources = [str(source) for source in ([photos] if isinstance(photos, str | os.PathLike) else photos)]
    out = Path(out)
    if (write := _WRITERS.get(out.suffix.lower())) is None:
        raise UserError(f"{out}: cannot write embeddings to {out.suffix or 'this'}; use {', '.join(_WRITERS)}")
    read = [path for source in sources for path in (source, *glob.glob(source, recursive=True))]
    inputs = Inputs(read, [source for source in sources if Path(source).is_dir()])
    check_output(out, *([_beside(out)] if out.suffix.lower() == ".npy" else []), inputs=inputs, overwrite=overwrite)
    make_folder(out.parent)
    items, total = _items(sources, split, image_column)
    align = decide_align(align)
    # float32, as for the photos of `vultus generate`: the embedding determines the face.
    if isinstance(encoder, str | Path):
        encoder = load_face_encoder(encoder, device=resolve_device(device), dtype=torch.float32)
    result = PhotoEmbeddings(encoder_entry(encoder))
    if limit is not None:
        items, total = itertools.islice(items, limit), limit if total is None else min(total, limit)
    used: dict[str, int] = {}
    with progress(total, title="embed") as shown:
        for key, item in items:
            result.photos += 1
            try:
                found = embed_faces(item.read(), encoder, align=align, which=face)
            except (BadImage, OSError) as error:
                result.skipped.append((key, reason_of(error)))
                message(f"skipped {key}: {reason_of(error)}")
                found = []
            for embedded in found:
                number = used.get(key, 0)
                used[key] = number + 1
                result.keys.append(f"{key}#{number}" if number else key)
                result.faces_found.append(embedded.faces)
                result.boxes.append(embedded.box)
                result.rows.append(embedded.c.numpy())
            shown.update()
    if not result.rows:
        key, reason = (*result.skipped, (sources[0], "no photo in it"))[0]
        more = f" (and {len(result.skipped) - 1} more)" if len(result.skipped) > 1 else ""
        raise UserError(f"{key}: {reason}{more}; no photo could be used, give another one")
    write(result, out)
    return result


def _items(sources: list[str], split: str | None, image_column: str | None) -> tuple[Named, int | None]:
    """The photos of all sources, and their number if it is known. Raises UserError for one that cannot be read."""
    if not sources:
        raise UserError("no photos given; name files, folders or a data set")
    parts: list[Named] = []
    total: int | None = 0
    for source in sources:
        path, name = Path(source), os.fsencode(source).decode("utf-8", "backslashreplace")
        if path.is_file() and path.suffix.lower() != ".parquet":
            if (split, image_column) != (None, None):
                raise UserError(f"{source}: a photo has no splits or columns; leave --split and --image-column out")
            parts.append(iter([(name, Item(name, "", path))]))
            counts: list[int | None] = [1]
        else:
            # The keys of a single source are those of `vultus prepare`, so that both can be joined.
            prefix = f"{name}/" if len(sources) > 1 else ""
            opened = open_source(source, split, image_column=image_column)
            parts += [_named(prefix, part) for part in opened.parts]
            counts = [part.total for part in opened.parts]
        total = None if total is None or None in counts else total + sum(count or 0 for count in counts)
    return itertools.chain.from_iterable(parts), total


def _named(prefix: str, part: Part) -> Named:
    for item in part.items(None):
        yield prefix + item.key, item


# --- files ------------------------------------------------------------------------------------------------------------


def _beside(out: Path) -> Path:
    """The file beside a .npy file that holds all but the embeddings."""
    return out.with_suffix(".json")


def _write_npy(result: PhotoEmbeddings, out: Path) -> None:
    _write_json(result, _beside(out), rows=False)
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        np.save(file, result.embeddings)


def _write_npz(result: PhotoEmbeddings, out: Path) -> None:
    arrays: dict[str, Any] = {
        "embeddings": result.embeddings,
        "keys": np.array(result.keys),
        "faces_found": np.array([-1 if count is None else count for count in result.faces_found]),
        "boxes": np.array([box or (np.nan,) * 4 for box in result.boxes], np.float32),
        HEADER: np.array(json.dumps(result.header())),
    }
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _write_parquet(result: PhotoEmbeddings, out: Path) -> None:
    columns = {
        "key": result.keys,
        "faces_found": pa.array(result.faces_found, pa.int32()),
        "box": pa.array(result.boxes, pa.list_(pa.float32())),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(result.embeddings.ravel()), result.encoder["dim"]),
    }
    with atomic_path(out) as temporary:
        pq.write_table(pa.table(columns, metadata={HEADER: json.dumps(result.header())}), temporary)


def _write_csv(result: PhotoEmbeddings, out: Path) -> None:
    boxes = np.array([box or (None,) * 4 for box in result.boxes], object).T
    columns = {"faces_found": pa.array(result.faces_found, pa.int32())}
    for name, values in zip(("left", "top", "right", "bottom"), boxes, strict=True):
        columns[name] = pa.array(values, pa.float32())
    columns["key"] = pa.array(result.keys)
    for number, values in enumerate(result.embeddings.T):
        columns[f"e{number}"] = pa.array(values)
    with atomic_path(out) as temporary:
        pa_csv.write_csv(pa.table(columns), temporary)


def _write_json(result: PhotoEmbeddings, out: Path, *, rows: bool = True) -> None:
    faces = [
        {"key": key, "faces_found": count, "box": None if box is None else [round(edge, 2) for edge in box]}
        | ({"embedding": [float(str(value)) for value in row]} if rows else {})  # the shortest digits of a float32
        for key, count, box, row in zip(result.keys, result.faces_found, result.boxes, result.rows, strict=True)
    ]
    lines = ",\n".join(json.dumps(face, ensure_ascii=False) for face in faces)
    head = {HEADER: result.header(), "encoder": result.encoder["id"]}  # the page and the API check the second alone
    write_text(out, f'{json.dumps(head, ensure_ascii=False)[:-1]}, "faces": [\n{lines}\n]}}\n')


_WRITERS: dict[str, Callable[[PhotoEmbeddings, Path], None]] = {
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".json": _write_json,
}

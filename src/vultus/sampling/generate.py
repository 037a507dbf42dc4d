"""From embeddings to image files: single faces, grids, and interpolations between two embeddings.

A face is a function of (snapshot, embedding, seed, index, variant), whatever the batch size. For that the noise is
drawn by position (latents.py), and the generator always runs on STEP faces at once, the last call padded: libraries
choose other convolution and matrix kernels for other batch sizes, float32 sums then differ in the last bits, and one
pixel value in 30,000 to 100,000 rounds to the next integer (1, 2, 7, 8 against 16, measured on a CPU). Within one size
neither the position in the batch nor the other rows made a difference.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vultus._files import make_folder
from vultus._outputs import Inputs
from vultus._progress import progress
from vultus._ranges import Count, NoiseStrength, Seed, checks_arguments
from vultus.errors import UserError
from vultus.images.io import to_images
from vultus.images.watermark import mark_pixels
from vultus.images.xmp import WRITABLE, Origin, Sign, check_marked, model_id, save_marked
from vultus.models.encoders import device_of
from vultus.models.facenet import Encoder
from vultus.models.generators import GeneratorNetwork
from vultus.models.snapshot import Snapshot
from vultus.sampling.best import check_candidates, choose, likeness, load_chooser, load_scorer
from vultus.sampling.conditioning import ConditionSource, Skipped, index_name
from vultus.sampling.face_files import Face, FaceList, Pictures, save_faces
from vultus.sampling.latents import noise
from vultus.sampling.sheet import Sheet, square_grid

STEP = 16  # faces to a call of the generator, always
AT_ONCE = 256  # candidates in memory at once where faces are chosen, or those of one embedding
PNG = Pictures()
MAX_GRID = 1024  # faces in one grid: 17 megapixels at 128x128
# Suffixes that no folder has on purpose; beside those of Pillow.
VIDEO = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".heic", ".heif", ".jxl", ".svg"}


@dataclass(frozen=True)
class Summary:
    """Result of `generate`: number of faces, number of embeddings, the photos left out, and where the files are."""

    faces: int
    embeddings: int
    skipped: list[Skipped]
    out: Path


def render(generator: GeneratorNetwork, z: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """z [N, z_dim], c [N, c_dim] -> images uint8 [N, 3, R, R] on the CPU, in calls of exactly STEP faces.

    The generator computes in `dtype`, float32 if None, on the device of its parameters. Raises UserError if it gives
    values that are not finite.
    """
    device, kind = device_of(generator), dtype or torch.float32
    z, c = z.detach().cpu().float(), c.detach().cpu().float()
    if not len(z):
        return torch.zeros(0, 3, generator.resolution, generator.resolution, dtype=torch.uint8)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(z), STEP):
            rows = [_padded(values[start : start + STEP]).to(device, kind) for values in (z, c)]
            x = check_finite(generator(*rows)[: len(z) - start], generator)
            parts.append(to_images(x).cpu())
    # This keeps the memory format of the generator's output, on which the last bits of the watermark depend.
    return torch.cat(parts)


def check_finite(x: Tensor, generator: GeneratorNetwork) -> Tensor:
    """`x` [N, 3, R, R], which the generator gave. Raises UserError unless all values are finite: NaN would be black."""
    if not x.isfinite().all():
        raise UserError(
            f"{generator.path or 'the generator'}: gives values that are not finite (NaN or infinity); its weights are "
            f"damaged or the training failed, use another snapshot"
        )
    return x


def _padded(rows: Tensor) -> Tensor:
    """Rows [n, D] -> [STEP, D], zeros behind."""
    return torch.cat([rows, rows.new_zeros(STEP - len(rows), rows.shape[1])])


@checks_arguments
def generate(
    snapshot: Snapshot,
    source: ConditionSource,
    out: str | Path,
    *,
    num: Count = 1,
    seed: Seed = 0,
    batch: Count = STEP,
    grid: bool = False,
    labels: bool = False,
    pictures: Pictures = PNG,
    scores: bool = False,
    dtype: torch.dtype | None = None,
    noise_strength: NoiseStrength = 1.0,
    best_of: Count = 1,
    mark: bool = True,
    signer: Sign | None = None,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> Summary:
    """Write `num` faces of each embedding as image files with a list, `faces.jsonl`, or all in one grid.

    Args:
        snapshot: the generator; it runs on the device that it was loaded to, an exported model on the CPU.
        source: the embeddings; memory does not grow with their number.
        out: folder of NAME_VARIANT.png (in sub-folders from more than 1,000 faces on); with `grid` a file with a
            suffix of xmp.WRITABLE, or a folder for grid.png.
        num: faces of each embedding, with different noise.
        seed: of the noise. The same seed gives the same faces.
        batch: faces held in memory at once, rounded up to a multiple of STEP. The faces do not depend on it.
        grid: one image of at most MAX_GRID faces: a row for each embedding, or a square grid if `num` is 1.
        labels: of the rows and columns of the grid; the framed photo comes first, where `source` kept it.
        pictures: format, quality and size of the files; a grid has the format of its name.
        scores: compute the cosine of each face to its embedding, for the list and the labels. With `best_of` it is
            computed anyway.
        dtype: what the generator computes in, float32 if None. Other dtypes and devices round differently.
        noise_strength: factor of the noise, 0 to 4; below 1 the faces of an embedding are more alike and closer to the
            average.
        best_of: draw so many times as many noises and keep the faces that FaceNet finds most like their embedding, at
            a minimum spread, the best first (see sampling/best.py). 1 takes the first noises.
        mark: add the invisible watermark to every face. False leaves the pixels as generated, which metrics need; the
            metadata name the image as synthetic either way (see images/xmp.py).
        signer: adds a C2PA manifest (images.c2pa.Signer).
        inputs: further files that the caller read; like those of `source` they are never replaced.
        overwrite: replace existing files that show something else.

    An existing file is replaced only by the same image, unless `overwrite` is set; nothing is written into a folder
    whose photos are the source. Raises UserError otherwise, and before any work if `out` or a number is not valid.
    """
    total = source.count * num
    check_candidates(best_of, num)
    grid_path = _grid_path(out, total) if grid else None
    out = grid_path.parent if grid_path else folder_of(out, "single images")
    folders = [path for path in source.inputs if path.is_dir()]
    read = Inputs([path for path in [*source.inputs, *inputs, *file_of(snapshot)] if path not in folders], folders)
    read.check(grid_path or out)
    if grid_path and not overwrite:
        check_marked(grid_path)
    chooser, z_dim = load_chooser(snapshot, best_of, num), snapshot.network.z_dim
    encoder = chooser or (load_scorer(snapshot, "--scores needs the encoder of the condition") if scores else None)
    make_folder(out)
    origin = Origin(model_of(snapshot), seed, pictures.about(snapshot.network.resolution))
    noted = {"seed": seed, "noise_strength": noise_strength, "model": origin.model}
    sheet = Sheet(num, labels)
    number = embeddings = 0
    at_once = -(-max(1, batch) // STEP) * STEP
    at_once = num * max(1, at_once // num) if chooser else at_once  # all faces of an embedding are chosen together
    stream = _all_faces(source, num)
    with (
        contextlib.nullcontext() if grid_path else FaceList(out) as listed,
        progress(total, title="generate", unit="face") as bar,
    ):
        while group := list(itertools.islice(stream, at_once)):
            faces, c = [face for face, _ in group], torch.stack([c for _, c in group])
            if chooser:
                indices = [face.index for face in faces[::num]]
                chosen, images = best_faces(
                    snapshot.network, c[::num], indices, num, best_of, chooser, seed, noise_strength, dtype
                )
                noises = itertools.chain.from_iterable(chosen)
                faces = [replace(face, noise=number) for face, number in zip(faces, noises, strict=True)]
                images = images.flatten(0, 1)
            else:
                z = torch.cat([noise(seed, face.index, 1, z_dim, variant=face.noise) for face in faces])
                images = render(snapshot.network, z * noise_strength, c, dtype)
            cosines = likeness(images, c, encoder).tolist() if encoder else None
            images = pictures.resized(images)
            images = marked(images) if mark else images
            if listed is None:
                sheet.add(faces, images, cosines)
            else:
                paths = save_faces(
                    faces, images, out, total, origin, signer, read, pictures=pictures, overwrite=overwrite
                )
                for place, (face, path) in enumerate(zip(faces, paths, strict=True)):
                    score = {"encoder": encoder.id, "cosine": round(cosines[place], 4)} if encoder and cosines else {}
                    about = {"embedding": face.index, "noise": face.noise}
                    listed.add(path, **source.origin(face.index), **about, **noted, **score)
            number += len(group)
            embeddings = group[-1][0].index + 1
            bar.update(len(group))
    if grid_path:
        photos = source.frames if labels else []
        image = sheet.draw(photos)
        origin = replace(origin, photos=bool(photos))
        save_marked(
            image,
            grid_path,
            origin,
            watermark=False,
            quality=pictures.quality,
            signer=signer,
            inputs=read,
            overwrite=overwrite,
        )
    return Summary(number, embeddings, source.skipped, grid_path or out)


def save_images(
    images: Tensor,
    out: str | Path,
    *,
    generator: Snapshot | None = None,
    seed: int | None = None,
    watermark: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Write generated faces as `vultus generate` does: marked as synthetic, with its file names.

    Args:
        images: uint8 [N, 3, R, R], or [N, num, 3, R, R] as Generator.sample gives them.
        out: a folder of INDEX_VARIANT.png, for instance 000000_0.png (in sub-folders from more than 1,000 faces on);
            or a file .png, .jpg, .webp, .tif, .avif or .gif for all faces in one grid: a row for each embedding, a
            square grid if there is one face of each.
        generator: the generator of the faces. Its id is written to the metadata.
        seed: the seed of the faces, for the metadata.
        watermark: add the invisible watermark to the pixels. False keeps the pixels as they are, which metrics need;
            the metadata name the image as synthetic either way.
        overwrite: replace existing files that show something else. Without it they raise UserError; the same image
            again does not.

    Returns the paths of the files, each of which is written atomically. Raises UserError for images of another dtype or
    shape, for more than 1,024 faces in one grid, and for a suffix of an image or video that cannot be written.

    Examples:
        >>> generator = vultus.load()
        >>> faces = generator.sample(generator.sample_identities(4), num=2, seed=7)
        >>> vultus.save_images(faces, "faces/", generator=generator, seed=7)
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"save_images: images are {kind}; uint8 tensors of 0 to 255 are needed, as sample() gives them")
    if images.ndim == 4:
        images = images[:, None]
    if images.ndim != 5 or images.shape[2] != 3 or 0 in images.shape:
        raise UserError(
            f"save_images: images have shape {list(images.shape)}; [N, 3, R, R] or [N, num, 3, R, R] is needed"
        )
    count, num = images.shape[:2]
    flat = images.flatten(0, 1).cpu()
    origin = Origin(model_of(generator) if generator is not None else "", seed)
    if Path(out).suffix.lower() in WRITABLE and not _is_folder(out):
        path = _grid_path(out, len(flat))
        if not overwrite:
            check_marked(path)
        make_folder(path.parent)
        sheet = square_grid(marked(flat) if watermark else flat, num)
        save_marked(sheet, path, origin, watermark=False, overwrite=overwrite)
        return [path]
    folder = make_folder(folder_of(out, "single images", remedy=f"for a grid a file {', '.join(WRITABLE)}"))
    places = itertools.product(range(count), range(num))
    faces = [
        Face(number, index, variant, index_name(index, count), variant)
        for number, (index, variant) in enumerate(places)
    ]
    paths = []
    for start in range(0, len(flat), STEP):
        part = flat[start : start + STEP]
        part = marked(part) if watermark else part
        paths += save_faces(
            faces[start : start + STEP], part, folder, len(flat), origin, pictures=PNG, overwrite=overwrite
        )
    return paths


def best_faces(
    generator: GeneratorNetwork,
    c: Tensor,
    indices: Sequence[int],
    num: int,
    best_of: int,
    encoder: Encoder,
    seed: int,
    noise_strength: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[list[list[int]], Tensor]:
    """The best `num` of `num` x `best_of` faces of every embedding: (numbers of their noises, images).

    `c` [N, c_dim] are the embeddings, `indices` their numbers, on which the noise depends. Images are uint8
    [N, num, 3, R, R]; see `choose` in sampling/best.py for what is kept.
    """
    count = num * best_of
    numbers: list[list[int]] = []
    kept = [torch.zeros(0, num, 3, generator.resolution, generator.resolution, dtype=torch.uint8)]
    at_once = max(1, AT_ONCE // count)
    for start in range(0, len(c), at_once):
        part, rows = c[start : start + at_once].repeat_interleave(count, 0), indices[start : start + at_once]
        z = [noise(seed, row, 1, generator.z_dim, variant=variant) for row in rows for variant in range(count)]
        images = render(generator, torch.cat(z) * noise_strength, part, dtype)
        for own, score in zip(images.split(count), likeness(images, part, encoder).split(count), strict=True):
            numbers.append(choose(own, score, num))
            kept.append(own[numbers[-1]][None])
    return numbers, torch.cat(kept)


def _all_faces(source: ConditionSource, num: int) -> Iterator[tuple[Face, Tensor]]:
    index = 0
    for names, c in source.chunks:
        for name, row in zip(names, c, strict=True):
            for variant in range(num):
                yield Face(index * num + variant, index, variant, name, variant), row
            index += 1


def _grid_path(out: str | Path, total: int) -> Path:
    """Where a grid of `total` faces is written. Raises UserError if they are too many, or for another suffix."""
    if total > MAX_GRID:
        raise UserError(f"{total} faces do not fit in one grid of {MAX_GRID}; write single files or generate fewer")
    path = Path(out)
    if _is_folder(out) or not path.suffix:
        return path / "grid.png"
    if path.suffix.lower() not in WRITABLE:
        raise UserError(
            f"--out {path}: a grid cannot be written as {path.suffix}; use {', '.join(WRITABLE)}, or {path}{os.sep} "
            f"for a folder"
        )
    return path


def folder_of(out: str | Path, purpose: str, *, remedy: str = "add --grid") -> Path:
    """The folder `out`. Raises UserError for the name of an image or video file, which is a mistake."""
    path = Path(out)
    if not _is_folder(out) and path.suffix.lower() in Image.registered_extensions().keys() | VIDEO:
        raise UserError(f"{path}: a folder is needed for {purpose}; name a folder, or {remedy}")
    return path


def _is_folder(out: str | Path) -> bool:
    """Whether `out` is a folder, or its name ends as that of a folder."""
    return str(out).endswith(("/", os.sep)) or Path(out).is_dir()


def file_of(snapshot: Snapshot) -> list[Path]:
    """The file of a snapshot, which the caller must not replace."""
    return [] if snapshot.path is None else [snapshot.path]


def marked(images: Tensor) -> Tensor:
    """Images uint8 [N, 3, H, W] with the invisible watermark."""
    return torch.from_numpy(mark_pixels(images.numpy()))


def model_of(snapshot: Snapshot) -> str:
    """The id of a snapshot; an exported model has the id of the snapshot that it was exported from."""
    return str(snapshot.metadata["model"]) if "model" in snapshot.metadata else model_id(snapshot.path)

"""Embeddings to pictures, one by one, on a sheet, or along the way from one face to another.

A face is a function of (snapshot, embedding, seed, index, variant), whatever the batch size. For that the noise is
drawn by position (people.py), and the generator always runs on STEP faces at once, the last call filled up: libraries
choose other convolution and matrix kernels for other batch sizes, float32 sums then differ in the last bits, and one
pixel value in 30,000 to 100,000 rounds to the next integer (1, 2, 7, 8 against 16, measured on a CPU). Within one size
neither the place in the batch nor the neighbours made a difference.
"""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from vultus._files import atomic_path, make_folder
from vultus.errors import UserError
from vultus.images.io import SUFFIXES, to_images, to_pil, to_pixels
from vultus.images.io import grid as lay_out
from vultus.images.watermark import mark_pixels
from vultus.images.xmp import Origin, Sign, mark_gif, model_id, save_marked
from vultus.models.onnx_runtime import OnnxModel
from vultus.sampling.latents import Floats, check_strength, noise, slerp
from vultus.sampling.vectors import Conditions, Skipped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vultus.models.generators import GeneratorNetwork
    from vultus.models.snapshot import Snapshot

Pixels = npt.NDArray[np.uint8]

STEP = 16  # faces to a call of the generator, always
MAX_GRID = 1024  # faces on one sheet: 17 megapixels at 128x128
MAX_STEPS = 240  # frames from one face to another
PER_FOLDER = 1000  # faces; more are spread over numbered sub-folders


@dataclass(frozen=True)
class Summary:
    """What `generate` did: faces made, from how many embeddings, the photos left out, and where the pictures are."""

    faces: int
    embeddings: int
    skipped: list[Skipped]
    out: Path


# --- the work ---------------------------------------------------------------------------------------------------------


def render(generator: GeneratorNetwork, z: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """z [N, z_dim], c [N, c_dim] -> images uint8 [N, 3, R, R] on the CPU, in calls of exactly STEP faces.

    The generator computes in `dtype`, float32 if None.
    """
    import torch

    device, kind = next(generator.parameters()).device, dtype or torch.float32

    @torch.inference_mode()
    def step(z: Floats, c: Floats) -> Pixels:
        x = generator(torch.from_numpy(z).to(device, kind), torch.from_numpy(c).to(device, kind))
        return to_images(x).cpu().numpy()

    return torch.from_numpy(_in_steps(step, z.detach().cpu().numpy(), c.detach().cpu().numpy()))


def _render(model: Snapshot | OnnxModel, z: Floats, c: Floats, dtype: torch.dtype | None) -> Pixels:
    """As `render`, of either kind of model."""
    if isinstance(model, OnnxModel):
        network = model.network
        return _in_steps(lambda z, c: to_pixels(network(z, c)), z, c)
    import torch

    return render(model.network, torch.from_numpy(z), torch.from_numpy(c), dtype).numpy()


def _in_steps(step: Callable[[Floats, Floats], Pixels], z: Floats, c: Floats) -> Pixels:
    parts = []
    for start in range(0, len(z), STEP):
        count = len(z[start : start + STEP])
        full = [np.zeros((STEP, rows.shape[1]), np.float32) for rows in (z, c)]
        full[0][:count], full[1][:count] = z[start : start + STEP], c[start : start + STEP]
        parts.append(step(*full)[:count])
    return np.concatenate(parts)


@dataclass(frozen=True)
class _Face:
    number: int  # among all faces
    index: int  # of the embedding
    variant: int  # of the noise
    name: str
    c: Floats


def generate(
    snapshot: Snapshot | OnnxModel,
    conditions: Conditions,
    out: str | Path,
    *,
    num: int = 1,
    seed: int = 0,
    batch: int = STEP,
    grid: bool = False,
    dtype: torch.dtype | None = None,
    noise_strength: float = 1.0,
    mark: bool = True,
    signer: Sign | None = None,
) -> Summary:
    """Write `num` faces of each embedding as PNG files, or all on one sheet.

    Args:
        snapshot: the generator; the device is where it was loaded to. An exported model runs on the processor.
        conditions: what to make faces of; memory does not grow with their number.
        out: folder of NAME_VARIANT.png (in sub-folders of PER_FOLDER from PER_FOLDER faces on); with `grid` a file
            .png, .jpg or .webp, or a folder for grid.png.
        num: faces of each embedding, with different noise.
        seed: of the noise. The same seed gives the same faces.
        batch: faces held in memory at once, rounded up to a multiple of STEP. The faces do not depend on it.
        grid: one sheet of at most MAX_GRID faces: a row for each embedding, or a square sheet if `num` is 1.
        dtype: what the generator computes in, float32 if None; an exported model does what it was exported for. Other
            dtypes and devices round differently.
        noise_strength: the noise is multiplied by it; below 1 faces are more alike and nearer to the average.
        mark: put the invisible watermark into every face. False leaves the pixels as the generator made them, which
            metrics need; the metadata say what the picture is either way (see marks.py).
        signer: adds a C2PA manifest (credentials.Signer).

    Existing files of the same names are replaced, each atomically. Raises UserError before any work if `out` or the
    numbers cannot be.
    """
    out = Path(out)
    if num < 1:
        raise UserError(f"cannot make {num} faces of each embedding; ask for at least one")
    check_strength(noise_strength)
    total = conditions.count * num
    if grid and total > MAX_GRID:
        raise UserError(f"{total} faces do not fit on one sheet of {MAX_GRID}; leave the grid out or ask for fewer")
    if not grid and out.suffix.lower() in SUFFIXES:
        raise UserError(f"{out}: a folder is needed for single pictures; name a folder or ask for a grid")
    sheet_path = (out if out.suffix.lower() in SUFFIXES else out / "grid.png") if grid else None
    make_folder(sheet_path.parent if sheet_path else out)
    model = _model(snapshot)
    held: list[Pixels] = []
    number = embeddings = 0
    stream = _all_faces(conditions, num)
    with tqdm(total=total, unit="face", file=sys.stderr, desc="generate") as bar:
        while group := list(itertools.islice(stream, -(-max(1, batch) // STEP) * STEP)):
            z_dim = snapshot.network.z_dim
            z = np.concatenate([noise(seed, face.index, 1, z_dim, variant=face.variant) for face in group])
            images = _render(snapshot, _weakened(z, noise_strength), np.stack([face.c for face in group]), dtype)
            images = mark_pixels(images) if mark else images
            if sheet_path:
                held.append(images)
            else:
                for face, image in zip(group, images, strict=True):
                    origin = Origin(model, seed, f"embedding {face.index}, noise {face.variant}")
                    path = _face_path(out, face, total)
                    save_marked(to_pil(image), path, origin, watermark=False, signer=signer)
            number += len(group)
            embeddings = group[-1].index + 1
            bar.update(len(group))
    if sheet_path:
        columns = num if num > 1 else math.ceil(math.sqrt(number))
        sheet = lay_out(np.concatenate(held), columns)
        save_marked(sheet, sheet_path, Origin(model, seed), watermark=False, signer=signer)
    return Summary(number, embeddings, conditions.skipped, sheet_path or out)


def _weakened(z: Floats, strength: float) -> Floats:
    return z * np.float32(strength)


def _all_faces(conditions: Conditions, num: int) -> Iterator[_Face]:
    index = 0
    for names, c in conditions.chunks:
        for name, row in zip(names, np.asarray(c), strict=True):
            for variant in range(num):
                yield _Face(index * num + variant, index, variant, name, row)
            index += 1


def _face_path(out: Path, face: _Face, total: int) -> Path:
    if total > PER_FOLDER:
        out = make_folder(out / f"{face.number // PER_FOLDER:04d}")
    return out / f"{face.name}_{face.variant}.png"


def between(
    snapshot: Snapshot | OnnxModel,
    a: Tensor | Floats,
    b: Tensor | Floats,
    out: str | Path,
    *,
    steps: int = 9,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    noise_strength: float = 1.0,
    milliseconds: int = 120,
    mark: bool = True,
    signer: Sign | None = None,
) -> list[Path]:
    """Faces along the arc from embedding `a` to `b` [c_dim], all with the same noise.

    Writes between.png (a strip of `steps` faces) and between.gif (there and back, `milliseconds` a frame) into the
    folder `out` and returns their paths; `mark` and `signer` as in `generate`, though a GIF is not signed. Raises
    UserError unless 2 <= steps <= MAX_STEPS, and for a noise_strength below 0.
    """
    if not 2 <= steps <= MAX_STEPS:
        raise UserError(f"cannot go from one face to another in {steps} steps; choose 2 to {MAX_STEPS}")
    check_strength(noise_strength)
    out = make_folder(out)
    c = slerp(np.asarray(a), np.asarray(b), np.linspace(0, 1, steps, dtype=np.float32)).astype(np.float32)
    z = _weakened(noise(seed, 0, 1, snapshot.network.z_dim), noise_strength)
    images = _render(snapshot, z.repeat(steps, 0), c, dtype)
    images = mark_pixels(images) if mark else images
    strip, animation = out / "between.png", out / "between.gif"
    origin = Origin(_model(snapshot), seed)
    save_marked(lay_out(images, steps), strip, origin, watermark=False, signer=signer)
    frames = [to_pil(image).quantize(256) for image in [*images, *images[-2:0:-1]]]
    buffer = io.BytesIO()
    more: dict[str, Any] = {"append_images": frames[1:], "duration": milliseconds, "loop": 0}
    frames[0].save(buffer, "GIF", save_all=True, comment=origin.words.encode(), **more)
    with atomic_path(animation) as temporary:
        temporary.write_bytes(mark_gif(buffer.getvalue(), origin))
    return [strip, animation]


def _model(snapshot: Snapshot | OnnxModel) -> str:
    """The snapshot's id; an exported model knows that of the snapshot that it was made of."""
    return str(snapshot.metadata["model"]) if "model" in snapshot.metadata else model_id(snapshot.path)

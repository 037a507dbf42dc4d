"""Faces in, arrays out: one pass over a set of faces runs every network on it, and what was run once is kept.

An array is float32 [N, numbers, dim]: N photos of a data set, `numbers` faces for each (noises, or pairs of noises),
`dim` values for each face. Each is one `.npy` file in the cache, named after the content of all that decides about it
(faces, photos, network, dtype), and mapped into memory: an evaluation of a million faces needs no more memory than one
of a thousand. The size of the batches decides about memory and speed, not about values.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vultus._files import atomic_path, make_folder
from vultus.data.dataset import Batch, PreparedDataset
from vultus.errors import UserError
from vultus.evaluation import metrics
from vultus.evaluation.backbones.lpips import Perceptual
from vultus.evaluation.verification import groups
from vultus.images.io import to_images, to_x
from vultus.models.snapshot import Snapshot
from vultus.sampling.population import noise

CACHE_VERSION = 2  # count it up when what is computed from the same faces and networks changes


class FaceSet(Protocol):
    """A set of faces, one or more for every photo of a data set."""

    id: str  # names their content: faces of one id are the same pictures
    title: str  # for the progress bar

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """Face `number` for each row of the data set, whose photos are given: x [B, 3, R, R], 8 bits in [-1, 1]."""
        ...


class RealFaces:
    """The photos themselves."""

    id = "real"
    title = "photos"

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet; `number` does not matter."""
        return to_x(photos.images)


class OtherFaces:
    """Another photo of the same person: the next one, after the last the first. Made for people with two or more."""

    title = "other photos"

    def __init__(self, dataset: PreparedDataset) -> None:
        self._dataset = dataset
        self.id = "other"
        self.following = np.full(len(dataset), -1)
        for rows in groups(dataset.identities):
            if len(rows) > 1:
                self.following[rows.numpy()] = rows.roll(-1).numpy()

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet; `number` does not matter."""
        return to_x(self._dataset.batch(self.following[rows]).images)


class GeneratedFaces:
    """What a generator makes of the embeddings of the photos; the noise is a function of (seed, row, number), times
    `noise_strength`."""

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        noise_strength: float = 1.0,
    ) -> None:
        self.snapshot, self.seed, self.device, self.dtype = snapshot, seed, device, dtype
        self.noise_strength = noise_strength
        digest = hashlib.sha256(f"{seed} {dtype} {torch.device(device).type}".encode())
        if noise_strength != 1:
            digest.update(f" noise x {noise_strength}".encode())
        for key, value in sorted(snapshot.network.state_dict().items()):
            digest.update(f"{key} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        self.id = f"made-{digest.hexdigest()}"
        self.title = "generated"

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet. Raises UserError if the generator gives values that are not numbers."""
        generator = self.snapshot.network
        z = torch.cat([noise(self.seed, row, 1, generator.z_dim, variant=number) for row in rows.tolist()])
        z = z * self.noise_strength
        x = generator(z.to(self.device, self.dtype), photos.c.to(self.device, self.dtype))
        if not x.isfinite().all():
            raise UserError(f"{self.snapshot.path or 'the snapshot'}: makes values that are not numbers; train anew")
        return to_x(to_images(x))


class FaceBatch:
    """One batch of a pass: photos, faces and their perceptual features, each made when first asked for."""

    def __init__(self, faces: FaceSet, rows: np.ndarray, photos: Batch, device: torch.device | str) -> None:
        self._faces, self._rows, self.photos, self._device = faces, rows, photos, device
        self._made: dict[int, Tensor] = {}
        self._embedded: dict[tuple[str, int | None], tuple[Tensor, ...]] = {}

    def x(self, number: int) -> Tensor:
        """Face `number` of each row, [B, 3, R, R]."""
        if number not in self._made:
            self._made[number] = self._faces(self._rows, number, self.photos).to(self._device)
        return self._made[number]

    def target(self) -> Tensor:
        """The photos, [B, 3, R, R] in [-1, 1]."""
        return to_x(self.photos.images.to(self._device))

    def perceptual(self, network: Perceptual, number: int | None) -> tuple[Tensor, ...]:
        """Perceptual features of face `number`, or of the photos for None."""
        key = network.id, number
        if key not in self._embedded:
            self._embedded[key] = network.embed(self.target() if number is None else self.x(number))
        return self._embedded[key]


@dataclass(frozen=True)
class Column:
    """One thing that is measured on every face.

    Attributes:
        name: its key in what `measure` returns.
        id: names what decides about the values besides the faces: weights, preprocessing, dtype.
        numbers: faces of each photo, or pairs of them.
        dim: values a face.
        value: of a batch and a number: [B, dim].
    """

    name: str
    id: str
    numbers: int
    dim: int
    value: Callable[[FaceBatch, int], Tensor]


def vectors(name: str, network: Any, numbers: int) -> Column:
    """The vector of an encoder or judge (`embed`) or of a feature network (`features`) for every face."""
    run = network.embed if hasattr(network, "embed") else network.features
    key = f"{network.id} {getattr(network, 'weights_sha256', '')} {network.dtype}"
    return Column(name, key, numbers, network.dim, lambda seen, number: run(seen.x(number)))


def pixels(numbers: int) -> Column:
    """MSE and MS-SSIM against the photo."""

    def value(seen: FaceBatch, number: int) -> Tensor:
        x, y = seen.x(number), seen.target()
        return torch.stack([metrics.mse(x, y).cpu(), metrics.ms_ssim(x, y)], 1)

    return Column("pixels", "mse ms_ssim", numbers, 2, value)


def perceptual(network: Perceptual, numbers: int) -> Column:
    """Perceptual distance to the photo."""

    def value(seen: FaceBatch, number: int) -> Tensor:
        return network.distance(seen.perceptual(network, number), seen.perceptual(network, None))[:, None]

    return Column(network.short, f"{network.id} {network.weights_sha256} {network.dtype}", numbers, 1, value)


def pairs_of(numbers: int) -> list[tuple[int, int]]:
    """The unordered pairs of so many noises, in the order of the column `apart`."""
    return list(itertools.combinations(range(numbers), 2))


def apart(network: Perceptual | None, numbers: int) -> Column:
    """Between two faces of one embedding: root mean squared difference in [-1, 1] and perceptual distance (or NaN)."""
    pairs = pairs_of(numbers)

    def value(seen: FaceBatch, number: int) -> Tensor:
        i, j = pairs[number]
        rms = metrics.mse(seen.x(i), seen.x(j)).sqrt().cpu()
        if network is None:
            return torch.stack([rms, torch.full_like(rms, torch.nan)], 1)
        found = network.distance(seen.perceptual(network, i), seen.perceptual(network, j))
        return torch.stack([rms, found.double().cpu()], 1)

    key = "none" if network is None else f"{network.id} {network.weights_sha256} {network.dtype}"
    return Column("apart", f"rms {key}", len(pairs), 2, value)


def measure(
    faces: FaceSet,
    dataset: PreparedDataset,
    rows: np.ndarray,
    columns: Sequence[Column],
    *,
    batch: int,
    cache: Path,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Every column on the faces of the given rows: {name: float32 [N, numbers, dim]}, mapped from files in `cache`.

    Networks of the columns are on `device`. Columns that are there already are not computed again; what cannot be read
    is. If the cache cannot be written to, arrays stay in memory and a note says so.
    """
    chosen = hashlib.sha256(dataset.embeddings(rows).numpy().tobytes() + np.asarray(rows).tobytes()).hexdigest()
    where = [CACHE_VERSION, torch.device(device).type, faces.id, dataset.manifest["content_sha256"], chosen]
    paths = {column.name: _path(cache, column, [*where, column.id, column.numbers]) for column in columns}
    shapes = {column.name: (len(rows), column.numbers, column.dim) for column in columns}
    found = {name: array for name, path in paths.items() if (array := _read(path, shapes[name])) is not None}
    missing = [column for column in columns if column.name not in found]
    if missing:
        found |= _compute(faces, dataset, rows, missing, batch, paths, shapes, device)
    return {column.name: found[column.name] for column in columns}


@torch.inference_mode()
def _compute(
    faces: FaceSet,
    dataset: PreparedDataset,
    rows: np.ndarray,
    columns: Sequence[Column],
    batch: int,
    paths: dict[str, Path],
    shapes: dict[str, tuple[int, int, int]],
    device: torch.device | str,
) -> dict[str, Tensor]:
    arrays = _Arrays(paths, shapes, [column.name for column in columns])
    title = f"{faces.title}: {', '.join(column.name for column in columns)}"
    with arrays, tqdm(total=len(rows), unit="img", file=sys.stderr, desc=title) as bar:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            seen = FaceBatch(faces, part, dataset.batch(part), device)
            for column in columns:
                for number in range(column.numbers):
                    values = column.value(seen, number).float().cpu().numpy()
                    arrays.open[column.name][start : start + len(part), number] = values
            bar.update(len(part))
    # A file that was just renamed stays mapped where it is.
    return {name: torch.from_numpy(array) for name, array in arrays.open.items()}


class _Arrays(contextlib.ExitStack):
    """Files of the cache while they are written, or arrays in memory where they cannot be."""

    def __init__(self, paths: dict[str, Path], shapes: dict[str, tuple[int, int, int]], names: list[str]) -> None:
        super().__init__()
        self.open: dict[str, np.ndarray] = {}
        for name in names:
            try:
                self.open[name] = self._begin(paths[name], shapes[name])
            except (OSError, UserError) as error:  # a full disk must not cost the evaluation
                print(f"vultus: note: {paths[name]}: not cached ({error})", file=sys.stderr)
                self.open[name] = np.zeros(shapes[name], np.float32)

    def _begin(self, path: Path, shape: tuple[int, int, int]) -> np.ndarray:
        make_folder(path.parent)
        with contextlib.ExitStack() as attempt:
            temporary = attempt.enter_context(atomic_path(path))
            _allocate(temporary, shape)
            array = np.lib.format.open_memmap(temporary, mode="r+")
            attempt.callback(array.flush)
            self.push(attempt.pop_all())
        return array


def _allocate(path: Path, shape: tuple[int, int, int]) -> None:
    """A file of zeros that has its room on the disk: writing to a mapped hole of a full disk would kill the process."""
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, *shape[1:]), np.float32)) | {"shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        blank = bytes(4 * shape[1] * shape[2])
        for _ in range(shape[0]):
            file.write(blank)


def _path(cache: Path, column: Column, key: Sequence[Any]) -> Path:
    digest = hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()
    return cache / f"{column.name}-{digest[:32]}.npy"


def _read(path: Path, shape: tuple[int, int, int]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        # Copy on write: torch wants memory that it may write to, and nothing ever does.
        array = np.load(path, mmap_mode="c")
    except (OSError, ValueError) as error:
        print(f"vultus: note: {path}: cannot be read ({type(error).__name__}), computed again", file=sys.stderr)
        return None
    if array.shape != shape or array.dtype != np.float32:
        print(f"vultus: note: {path}: not the array expected, computed again", file=sys.stderr)
        return None
    return torch.from_numpy(array)

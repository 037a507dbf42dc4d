"""Faces in, arrays out: one pass over a set of faces runs every backbone on it, and the arrays are cached.

An array is float32 [N, count, dim]: N photos of a data set, `count` faces for each (noises, or pairs of noises), `dim`
values for each face. Each is one `.npy` file in the cache, named after a hash of all that its values depend on (faces,
photos, backbone, dtype), and memory-mapped: an evaluation of a million faces needs no more memory than one of a
thousand. The batch size changes memory and speed, not values.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vultus._files import atomic_path, make_folder
from vultus._formats import VERSIONS
from vultus._progress import message, progress
from vultus.data.dataset import Batch, PreparedDataset
from vultus.errors import UserError
from vultus.evaluation import metrics
from vultus.evaluation.backbones.lpips import Perceptual
from vultus.evaluation.verification import person_rows
from vultus.images.io import to_x
from vultus.models.facenet import Encoder
from vultus.models.snapshot import Snapshot
from vultus.sampling.best import SPREAD, in_float32
from vultus.sampling.generate import STEP, best_faces, render
from vultus.sampling.latents import noise

NOISE_PAIRS = "apart"  # the column of `noise_pairs`; its name in the cache


class FaceSet(Protocol):
    """A set of faces, one or more for every photo of a data set."""

    id: str  # identifies their content: two sets of one id hold the same images
    title: str  # for the progress bar

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """Face `number` for each row of the data set, whose photos are given: x [B, 3, R, R] in [-1, 1], of 8 bits."""
        ...


class RealFaces:
    """The photos themselves."""

    id = "real"
    title = "photos"

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet; `number` has no effect."""
        return to_x(photos.images)


class OtherFaces:
    """Another photo of the same person: the next one, after the last the first.

    `following` [N] is the row of that photo, -1 for people with one photo, whose rows must not be used.
    """

    id = "other"
    title = "other photos"

    def __init__(self, dataset: PreparedDataset) -> None:
        self._dataset = dataset
        self.following = np.full(len(dataset), -1)
        for rows in person_rows(dataset.identities):
            if len(rows) > 1:
                self.following[rows.numpy()] = rows.roll(-1).numpy()

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet; `number` has no effect."""
        return to_x(self._dataset.batch(self.following[rows]).images)


class GeneratedFaces:
    """The faces that a generator makes from the embeddings of the photos.

    Args:
        snapshot: the generator, on `device`.
        seed: the noise of a face is a function of (seed, row, number).
        device, dtype: that the generator computes with.
        noise_strength: factor of the noise.
    """

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
        digest = hashlib.sha256(f"{seed} {dtype} {torch.device(device).type} {STEP} at once".encode())
        if noise_strength != 1:
            digest.update(f" noise x {noise_strength}".encode())
        for key, value in sorted(snapshot.network.state_dict().items()):
            digest.update(f"{key} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        self.id = f"made-{digest.hexdigest()}"
        self.title = "generated"

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet. Raises UserError if the generator returns values that are not finite."""
        generator = self.snapshot.network
        z = torch.cat([noise(self.seed, row, 1, generator.z_dim, variant=number) for row in rows.tolist()])
        z = z * self.noise_strength
        return to_x(render(generator, z, photos.c, self.dtype))


class ChosenFaces(GeneratedFaces):
    """The faces that `vultus generate --best-of` keeps: for each photo the best `num` of `num` x `best_of` faces.

    Args:
        snapshot, seed, device, dtype, noise_strength: see GeneratedFaces.
        encoder: the encoder of the condition, on `device`; it chooses, in float32.
        num: faces that are kept.
        best_of: candidates for each of them.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        encoder: Encoder,
        num: int,
        best_of: int,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        noise_strength: float = 1.0,
    ) -> None:
        super().__init__(snapshot, seed=seed, device=device, dtype=dtype, noise_strength=noise_strength)
        self.num, self.best_of, self._encoder = num, best_of, encoder
        chosen = f"{self.id} {num} of {num * best_of} {SPREAD} {encoder.id} {encoder.weights_sha256}"
        self.id = f"best-{hashlib.sha256(chosen.encode()).hexdigest()}"
        self._latest: tuple[list[int], Tensor] = [], torch.zeros(0)  # rows, their faces [B, num, 3, R, R]

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        """See FaceSet; `number` is below `num`. All faces of the latest rows are kept."""
        if self._latest[0] != rows.tolist():
            self._encoder = in_float32(self._encoder)
            _, images = best_faces(
                self.snapshot.network,
                photos.c,
                rows.tolist(),
                self.num,
                self.best_of,
                self._encoder,
                self.seed,
                self.noise_strength,
                self.dtype,
            )
            self._latest = rows.tolist(), images
        return to_x(self._latest[1][:, number])


class FaceBatch:
    """One batch of a pass: photos, faces and their perceptual features, each computed at first use."""

    def __init__(self, faces: FaceSet, rows: np.ndarray, photos: Batch, device: torch.device | str) -> None:
        self._faces, self._rows, self.photos, self._device = faces, rows, photos, device
        self._x: dict[int, Tensor] = {}
        self._features: dict[tuple[str, int | None], tuple[Tensor, ...]] = {}

    def x(self, number: int) -> Tensor:
        """Face `number` of each row, [B, 3, R, R]."""
        if number not in self._x:
            self._x[number] = self._faces(self._rows, number, self.photos).to(self._device)
        return self._x[number]

    def target(self) -> Tensor:
        """The photos, [B, 3, R, R] in [-1, 1]."""
        return to_x(self.photos.images.to(self._device))

    def perceptual(self, network: Perceptual, number: int | None) -> tuple[Tensor, ...]:
        """Perceptual features of face `number`, or of the photos for None."""
        key = network.id, number
        if key not in self._features:
            self._features[key] = network.embed(self.target() if number is None else self.x(number))
        return self._features[key]


@dataclass(frozen=True)
class Column:
    """Something that is computed from every face.

    Attributes:
        name: its key in what `extract` returns.
        id: identifies what the values depend on besides the faces: weights, preprocessing, dtype.
        count: faces of each photo, or pairs of them.
        dim: values of each face.
        value: function of a batch and the number of a face (or pair): [B, dim].
    """

    name: str
    id: str
    count: int
    dim: int
    value: Callable[[FaceBatch, int], Tensor]


def vectors(name: str, network: Any, count: int) -> Column:
    """The vector of an encoder or judge (`embed`) or of a feature network (`features`) for every face."""
    run = network.embed if hasattr(network, "embed") else network.features
    key = f"{network.id} {getattr(network, 'weights_sha256', '')} {network.dtype}"
    return Column(name, key, count, network.dim, lambda batch, number: run(batch.x(number)))


def pixels(count: int) -> Column:
    """MSE and MS-SSIM against the source photo."""

    def value(batch: FaceBatch, number: int) -> Tensor:
        x, y = batch.x(number), batch.target()
        return torch.stack([metrics.mse(x, y).cpu(), metrics.ms_ssim(x, y)], 1)

    return Column("pixels", "mse ms_ssim", count, 2, value)


def perceptual(network: Perceptual, count: int) -> Column:
    """Perceptual distance to the source photo."""

    def value(batch: FaceBatch, number: int) -> Tensor:
        return network.distance(batch.perceptual(network, number), batch.perceptual(network, None))[:, None]

    return Column(network.short, f"{network.id} {network.weights_sha256} {network.dtype}", count, 1, value)


def pairs_of(count: int) -> list[tuple[int, int]]:
    """The unordered pairs of `count` noises, in the order of the column `noise_pairs`."""
    return list(itertools.combinations(range(count), 2))


def noise_pairs(network: Perceptual | None, count: int) -> Column:
    """Differences between two faces of one embedding: RMS in [-1, 1], and the perceptual distance (NaN without one)."""
    pairs = pairs_of(count)

    def value(batch: FaceBatch, number: int) -> Tensor:
        i, j = pairs[number]
        rms = metrics.mse(batch.x(i), batch.x(j)).sqrt().cpu()
        if network is None:
            return torch.stack([rms, torch.full_like(rms, torch.nan)], 1)
        distance = network.distance(batch.perceptual(network, i), batch.perceptual(network, j))
        return torch.stack([rms, distance.double().cpu()], 1)

    key = "none" if network is None else f"{network.id} {network.weights_sha256} {network.dtype}"
    return Column(NOISE_PAIRS, f"rms {key}", len(pairs), 2, value)


def extract(
    faces: FaceSet,
    dataset: PreparedDataset,
    rows: np.ndarray,
    columns: Sequence[Column],
    *,
    batch: int,
    cache: Path,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Compute every column on the faces of the given rows: {name: float32 [N, count, dim]}.

    The backbones of the columns are on `device`. The arrays are mapped from files in the folder `cache`. A file that is
    there already is not computed again, unless it cannot be read. If the cache cannot be written, arrays stay in
    memory and a note says so.
    """
    photos = hashlib.sha256(dataset.embeddings(rows).numpy().tobytes() + np.asarray(rows).tobytes()).hexdigest()
    version = VERSIONS["feature cache"]
    key = [version, torch.device(device).type, faces.id, dataset.manifest["content_sha256"], photos]
    paths = {column.name: _path(cache, column, [*key, column.id, column.count]) for column in columns}
    shapes = {column.name: (len(rows), column.count, column.dim) for column in columns}
    arrays = {name: array for name, path in paths.items() if (array := _read(path, shapes[name])) is not None}
    missing = [column for column in columns if column.name not in arrays]
    if missing:
        arrays |= _compute(faces, dataset, rows, missing, batch, paths, shapes, device)
    return {column.name: arrays[column.name] for column in columns}


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
    with arrays, progress(len(rows), title=title) as shown:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            current = FaceBatch(faces, part, dataset.batch(part), device)
            for column in columns:
                for number in range(column.count):
                    values = column.value(current, number).float().cpu().numpy()
                    arrays.open[column.name][start : start + len(part), number] = values
            shown.update(len(part))
    # The mapping of a file stays valid when the file is renamed.
    return {name: torch.from_numpy(array) for name, array in arrays.open.items()}


class _Arrays(contextlib.ExitStack):
    """Memory-mapped files of the cache while they are written, or arrays in memory where that fails."""

    def __init__(self, paths: dict[str, Path], shapes: dict[str, tuple[int, int, int]], names: list[str]) -> None:
        super().__init__()
        self.open: dict[str, np.ndarray] = {}
        for name in names:
            try:
                self.open[name] = self._begin(paths[name], shapes[name])
            except (OSError, UserError) as error:  # a full disk must not end the evaluation
                message(f"vultus: note: {paths[name]}: not cached ({error})")
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
    """Write a file of zeros: in a sparse file, a full disk would kill the process at the first mapped write."""
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
        # Copy on write: torch needs writable memory, though nothing writes to it.
        array = np.load(path, mmap_mode="c")
    except (OSError, ValueError) as error:
        message(f"vultus: note: {path}: cannot be read ({type(error).__name__}), computed again")
        return None
    if array.shape != shape or array.dtype != np.float32:
        message(f"vultus: note: {path}: has another shape or type, computed again")
        return None
    return torch.from_numpy(array)

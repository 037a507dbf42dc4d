"""The generator as the public API offers it: load it, sample identities, sample faces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vultus._device import resolve_device
from vultus._ranges import Count, NoiseStrength, Seed, checks_arguments
from vultus.errors import UserError
from vultus.models.hub import fetch
from vultus.models.onnx_runtime import is_onnx
from vultus.models.snapshot import Snapshot, load_snapshot
from vultus.sampling.best import load_chooser
from vultus.sampling.conditioning import check_population
from vultus.sampling.directions import load_directions
from vultus.sampling.embedding_rows import normalise_rows
from vultus.sampling.generate import best_faces, render
from vultus.sampling.latents import noise, sample_identities


class Generator(Snapshot):
    """A trained generator: face embeddings in, faces out.

    Attributes:
        network: the PyTorch module: network(z [N, z_dim], c [N, c_dim]) -> x [N, 3, R, R] in [-1, 1].
        population: the population prior of the training embeddings (see sampling/population.py), or empty.
        metadata: generator (its config), encoder, crop, data, metrics, cur_nimg, preset, licence.
        path: the file that it was loaded from.

    Examples:
        >>> generator = vultus.load("default")
        >>> c = generator.sample_identities(4, seed=0)  # or vultus.embed(["me.jpg"])
        >>> faces = generator.sample(c, num=8, seed=0)  # uint8 [4, 8, 3, 128, 128]
    """

    @property
    def resolution(self) -> int:
        """Side of the generated images in pixels."""
        return self.network.resolution

    @property
    def c_dim(self) -> int:
        """Length of an embedding."""
        return self.network.c_dim

    @property
    def z_dim(self) -> int:
        """Length of a noise vector."""
        return self.network.z_dim

    @checks_arguments
    def sample(
        self,
        c: Tensor | npt.ArrayLike,
        *,
        num: Count = 1,
        seed: Seed = 0,
        noise_strength: NoiseStrength = 1.0,
        best_of: Count = 1,
    ) -> Tensor:
        """Generate `num` faces of each embedding: uint8 [N, num, 3, R, R] on the CPU.

        Args:
            c: embeddings [N, c_dim], or [c_dim] for N = 1. Rows are normalised.
            num: faces of each embedding, with different noise.
            seed: of the noise. The same seed gives the same faces.
            noise_strength: factor of the noise, 0 to 4; below 1 the faces of an embedding are more alike and closer to
                the average, at 0 they are equal.
            best_of: draw so many times as many noises and keep the faces that FaceNet finds most like their embedding,
                at a minimum spread, the best first. num x best_of is at most 1,024. 1 takes the first noises.

        Face [i, k] depends on (snapshot, c[i], seed, i, k) alone, and is the face INDEX_VARIANT.png that
        `vultus generate --embeddings FILE --num N --seed S --no-mark` writes for the same embeddings.

        Raises UserError for embeddings of another shape, rows that are not finite or all zero, a `num` below 1, another
        noise_strength, where the generator's output is not finite, and with `best_of` where FaceNet's weights are
        missing or the embeddings are of another encoder.
        """
        rows = self._rows(c)
        if encoder := load_chooser(self, best_of, num):
            return best_faces(self.network, rows, range(len(rows)), num, best_of, encoder, seed, noise_strength)[1]
        variants = [noise(seed, 0, len(rows), self.z_dim, variant=variant) for variant in range(num)]
        z = torch.stack(variants, 1).flatten(0, 1) * noise_strength
        return render(self.network, z, rows.repeat_interleave(num, 0)).unflatten(0, (len(rows), num))

    @checks_arguments
    def sample_identities(self, count: int, *, seed: Seed = 0, start: int = 0) -> Tensor:
        """Embeddings of random identities, drawn from the population prior: float32 [count, c_dim], unit norm.

        Identity i depends on (snapshot, seed, start + i) alone. `vultus generate --random COUNT` uses the same ones.
        Raises UserError if the snapshot has no population prior.
        """
        if count < 0:
            raise UserError(f"cannot sample {count} random identities; give at least 0")
        if start < 0:
            raise UserError(f"cannot start at identity {start}; give at least 0")
        check_population(self)
        return sample_identities(self.population, count, seed=seed, start=start)

    def edit(
        self, c: Tensor | npt.ArrayLike, edits: Mapping[str, float], *, directions: str | Path | None = None
    ) -> Tensor:
        """Embeddings [N, c_dim] moved so that attributes change, for instance {"smile": 1.5}: float32, unit norm.

        Strengths are in standard deviations between photos, from -4 to 4; `directions` is a file that `vultus probe`
        wrote, None for that of the package. Raises UserError for another attribute or strength, and for directions of
        another encoder.
        """
        return load_directions(directions, self).edit(self._rows(c), edits)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "auto", **options: Any) -> Generator:
        """Load a published generator: `user/name` on the Hugging Face hub, or a folder that `vultus publish` wrote.

        `options` are those of huggingface_hub.hf_hub_download (revision, token, cache_dir, local_files_only). Raises
        UserError if there is no such model, or neither a network nor a copy in the cache.
        """
        return cls._of(load_snapshot(fetch(name, **options), resolve_device(device)))

    @classmethod
    def _of(cls, snapshot: Snapshot) -> Generator:
        return cls(snapshot.network, snapshot.population, snapshot.metadata, snapshot.path)

    def _rows(self, c: Tensor | npt.ArrayLike) -> Tensor:
        values = np.asarray(c.detach().cpu().float() if isinstance(c, Tensor) else c)
        values = values[None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != self.c_dim:
            raise UserError(f"sample: embeddings have shape {list(values.shape)}; [N, {self.c_dim}] is needed")
        if values.dtype.kind not in "fiu":
            raise UserError(f"sample: embeddings hold {values.dtype.name} values; floats are needed")
        return torch.from_numpy(normalise_rows(values, "sample")[1])


def load(name: str | Path = "default", *, device: str = "auto") -> Generator:
    """Load a generator.

    Args:
        name: `default`, the snapshot that the package contains; a snapshot file; a run folder; a folder that
            `vultus publish` wrote; `hf://user/name` on the Hugging Face hub; or an exported model FILE.onnx.
        device: auto (cuda, else mps, else cpu), cuda, mps or cpu. An exported model runs on the CPU.

    Raises UserError that names the file and the remedy.
    """
    if is_onnx(name):
        if device not in ("auto", "cpu"):
            raise UserError(f"--device {device}: an exported model runs on the CPU; use auto or cpu")
        device = "cpu"
    return Generator._of(load_snapshot(name, resolve_device(device)))

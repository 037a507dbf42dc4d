"""Sheets of faces to look at: people beside their photos, one person under more and more noise, the way between two.

A face on a sheet is the one that `vultus generate` makes of the same snapshot, embedding, seed and place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from vultus.errors import UserError
from vultus.images.io import grid
from vultus.models.snapshot import Snapshot
from vultus.sampling.generate import render
from vultus.sampling.population import noise, slerp

PEOPLE, NOISES, STEPS = 5, 6, 7  # of overview_sheet
WORD = 64  # pixels that a label needs


def people_sheet(
    snapshot: Snapshot,
    c: Tensor,
    photos: Tensor | None = None,
    *,
    noises: int = 6,
    seed: int = 0,
    noise_strength: float = 1.0,
) -> Image.Image:
    """A row for each embedding of c [N, c_dim]: its photo (uint8 [N, 3, R, R]) if given, then `noises` faces."""
    variants = [noise(seed, 0, len(c), snapshot.network.z_dim, variant=variant) for variant in range(noises)]
    z = torch.stack(variants, 1).flatten(0, 1) * noise_strength
    images = render(snapshot.network, z, c.repeat_interleave(noises, 0)).unflatten(0, (len(c), noises))
    labels = [f"noise {variant}" for variant in range(noises)]
    if photos is not None:
        if photos.shape[1:] != images.shape[2:]:
            raise UserError(
                f"photos of {photos.shape[-1]} pixels do not fit beside faces of {images.shape[-1]}; use a data set "
                f"prepared at that size"
            )
        images, labels = torch.cat([photos[:, None], images], 1), ["photo", *labels]
    return _lay_out(images, labels)


def noise_sheet(
    snapshot: Snapshot,
    c: Tensor,
    *,
    strengths: Sequence[float] = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5),
    noises: int = 3,
    seed: int = 0,
) -> Image.Image:
    """One person c [c_dim]: a row for each noise, a column for each strength; at 0 there is no noise at all."""
    z_dim = snapshot.network.z_dim
    directions = torch.cat([noise(seed, 0, 1, z_dim, variant=variant) for variant in range(noises)])
    z = directions[:, None] * torch.tensor(strengths, dtype=torch.float32)[:, None]
    images = render(snapshot.network, z.flatten(0, 1), c.expand(noises * len(strengths), -1))
    return _lay_out(images.unflatten(0, (noises, len(strengths))), [f"noise x {strength:g}" for strength in strengths])


def way_sheet(
    snapshot: Snapshot, ends: Tensor, *, steps: int = 9, noises: int = 1, seed: int = 0, noise_strength: float = 1.0
) -> Image.Image:
    """Along the arcs from each of `ends` [N, c_dim] to the next: a row for each arc and noise, `steps` faces in it."""
    if len(ends) < 2 or steps < 2:
        raise UserError(f"a way needs two ends and two steps, not {len(ends)} and {steps}")
    c = torch.cat([slerp(a, b, torch.linspace(0, 1, steps)).repeat(noises, 1) for a, b in itertools.pairwise(ends)])
    z_dim = snapshot.network.z_dim
    z = torch.cat([noise(seed, 0, 1, z_dim, variant=variant).expand(steps, -1) for variant in range(noises)])
    images = render(snapshot.network, z.repeat(len(ends) - 1, 1) * noise_strength, c)
    return _lay_out(images.unflatten(0, (-1, steps)), [])


def _lay_out(images: Tensor, labels: list[str]) -> Image.Image:
    """Rows of images [rows, columns, 3, R, R], labelled where a word has room."""
    return grid(images.flatten(0, 1), images.shape[1], labels=labels if images.shape[-1] >= WORD else [])


def overview_sheet(snapshot: Snapshot, embeddings: torch.Tensor, *, seed: int) -> Image.Image:
    """A sheet: PEOPLE rows of NOISES + 1 faces of one embedding, then STEPS faces between the first two people."""
    z_dim = snapshot.network.z_dim
    columns = max(NOISES + 1, STEPS)
    z = noise(seed, 0, columns, z_dim)
    rows = [render(snapshot.network, z, embeddings[person].expand(columns, -1)) for person in range(PEOPLE)]
    way = slerp(embeddings[0], embeddings[1], torch.linspace(0, 1, columns))
    rows.append(render(snapshot.network, z[:1].expand(columns, -1), way))
    return grid(torch.cat(rows), columns)

"""Images of many faces: identities beside their photos, one identity under more and more noise, interpolations.

A face in such an image is the one that `vultus generate` gives for the same snapshot, embedding, seed and index.
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
from vultus.sampling.latents import noise, slerp

OVERVIEW_IDENTITIES, OVERVIEW_NOISES = 5, 7  # rows of one identity, and faces in a row, of overview_sheet
LABEL_WIDTH = 64  # pixels of a face that has room for a label


def identity_sheet(
    snapshot: Snapshot,
    c: Tensor,
    photos: Tensor | None = None,
    *,
    noises: int = 6,
    seed: int = 0,
    noise_strength: float = 1.0,
) -> Image.Image:
    """A row for each embedding of c [N, c_dim]: its photo (uint8 [N, 3, R, R]) if given, then `noises` faces.

    Raises UserError if the photos are not of the generator's resolution.
    """
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
    """One identity c [c_dim]: a row for each noise vector, a column for each factor that it is multiplied by."""
    z_dim = snapshot.network.z_dim
    directions = torch.cat([noise(seed, 0, 1, z_dim, variant=variant) for variant in range(noises)])
    z = directions[:, None] * torch.tensor(strengths, dtype=torch.float32)[:, None]
    images = render(snapshot.network, z.flatten(0, 1), c.expand(noises * len(strengths), -1))
    return _lay_out(images.unflatten(0, (noises, len(strengths))), [f"noise x {strength:g}" for strength in strengths])


def interpolation_sheet(
    snapshot: Snapshot, ends: Tensor, *, steps: int = 9, noises: int = 1, seed: int = 0, noise_strength: float = 1.0
) -> Image.Image:
    """Along the arcs from each of `ends` [N, c_dim] to the next: a row of `steps` faces for each arc and noise.

    Raises UserError for fewer than two ends or steps.
    """
    if len(ends) < 2 or steps < 2:
        raise UserError(f"an interpolation needs two embeddings and two steps, not {len(ends)} and {steps}")
    c = torch.cat([slerp(a, b, torch.linspace(0, 1, steps)).repeat(noises, 1) for a, b in itertools.pairwise(ends)])
    z_dim = snapshot.network.z_dim
    z = torch.cat([noise(seed, 0, 1, z_dim, variant=variant).expand(steps, -1) for variant in range(noises)])
    images = render(snapshot.network, z.repeat(len(ends) - 1, 1) * noise_strength, c)
    return _lay_out(images.unflatten(0, (-1, steps)), [])


def overview_sheet(snapshot: Snapshot, embeddings: Tensor, *, seed: int) -> Image.Image:
    """What a generator can do, of embeddings [N >= OVERVIEW_IDENTITIES, c_dim].

    A row of OVERVIEW_NOISES faces for each of the first OVERVIEW_IDENTITIES embeddings, then as many faces from the
    first embedding to the second.
    """
    z = noise(seed, 0, OVERVIEW_NOISES, snapshot.network.z_dim)
    rows = [
        render(snapshot.network, z, embeddings[identity].expand(OVERVIEW_NOISES, -1))
        for identity in range(OVERVIEW_IDENTITIES)
    ]
    arc = slerp(embeddings[0], embeddings[1], torch.linspace(0, 1, OVERVIEW_NOISES))
    rows.append(render(snapshot.network, z[:1].expand(OVERVIEW_NOISES, -1), arc))
    return grid(torch.cat(rows), OVERVIEW_NOISES)


def _lay_out(images: Tensor, labels: list[str]) -> Image.Image:
    """Rows of images [rows, columns, 3, R, R], with labels over the columns if the images are wide enough."""
    return grid(images.flatten(0, 1), images.shape[1], labels=labels if images.shape[-1] >= LABEL_WIDTH else [])

"""Differentiable augmentation of what the discriminator sees, against overfitting on few photos.

A discriminator that sees the same few thousand photos many times memorises them, and its gradient then says little
about faces in general. Photos and generated images are changed at random before it sees them, and the gradient passes
through the change (DiffAugment, Zhao et al. 2020, arXiv:2006.10738). A change that is applied with a probability below
1 does not leak into the generated images (Karras et al. 2020, arXiv:2006.06676, section 2.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vultus.training.parts import Rows

MAX_SHIFT = 1 / 8  # of the side
CUTOUT = 1 / 2  # side of the square that is cut out, as a share of the image's side


def augment(x: Tensor, probability: float, rng: torch.Generator, among: Rows | None = None) -> Tensor:
    """Shift each of the images x [N, 3, R, R] with `probability`, and cut a square out of each with the same one.

    A shift is of whole pixels, up to an eighth of the side in each direction; the square has half of the side and may
    cross the border. Pixels without a source, and those cut out, are 0, the middle grey. DiffAugment changes colours
    too; this does not, because generated images then get harsh colours, most of all early in a run
    (docs/log/2026-11.md).
    `rng` is on x's device; the same state gives the same changes. With `among`, x holds these
    rows of a larger batch, and they are changed as they are in that batch.
    """
    images, _, height, width = x.shape

    def draw(*shape: int) -> Tensor:
        if among is None:
            return torch.rand(images, *shape, generator=rng, device=x.device)
        return among.of(torch.rand(among.batch, *shape, generator=rng, device=x.device))

    sides = torch.tensor([height, width], device=x.device)
    # In units of half a side, as affine_grid takes them, and of whole pixels, so that nothing is blurred.
    shifts = (((2 * draw(2) - 1) * MAX_SHIFT * sides).round() * 2 / sides * (draw(1) < probability)).flip(1)
    identity = torch.eye(2, device=x.device).expand(images, 2, 2)
    grid = F.affine_grid(torch.cat([identity, shifts[:, :, None]], 2), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid.to(x.dtype), padding_mode="zeros", align_corners=False)

    centre = draw(2) * sides
    rows = (torch.arange(height, device=x.device) + 0.5 - centre[:, :1]).abs()[:, :, None]
    columns = (torch.arange(width, device=x.device) + 0.5 - centre[:, 1:]).abs()[:, None]
    cut = (draw(1, 1) < probability) & (rows < CUTOUT * height / 2) & (columns < CUTOUT * width / 2)
    return x.masked_fill(cut[:, None], 0)

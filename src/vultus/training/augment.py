"""Differentiable augmentation of what the discriminator sees: more photos out of few.

A discriminator that sees the same few thousand photos again and again learns them by heart, and then its judgement says
nothing about faces in general. Here photos and made pictures alike are changed at random before it sees them, and the
gradient goes back through the change (DiffAugment, Zhao et al. 2020, arXiv:2006.10738). A change that not every picture
gets is one that the generator need not copy (Karras et al. 2020, arXiv:2006.06676, section 2.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 1 / 8  # of the side
HOLE = 1 / 2  # side of the square that is cut out, in sides


def augment(x: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Pictures x [N, 3, R, R], each with probability `share` shifted, and with the same one with a square cut out.

    A shift is of whole pixels, up to an eighth of the side either way; the square has half of the side and may hang
    over the edge. What is uncovered or cut out is 0, the middle grey. Colours stay as they are: DiffAugment changes
    them too, and the pictures then come out in harsh colours, above all early in a run (docs/log.md). `rng` is on x's
    device; the same state gives the same changes.
    """
    batch, _, height, width = x.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=rng, device=x.device)

    sides = torch.tensor([height, width], device=x.device)
    # In units of half a side, as affine_grid has them, and of whole pixels, so that nothing is blurred.
    moves = (((2 * draw(2) - 1) * SHIFT * sides).round() * 2 / sides * (draw(1) < share)).flip(1)
    turn = torch.eye(2, device=x.device).expand(batch, 2, 2)
    grid = F.affine_grid(torch.cat([turn, moves[:, :, None]], 2), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid.to(x.dtype), padding_mode="zeros", align_corners=False)

    centre = draw(2) * sides
    down = (torch.arange(height, device=x.device) + 0.5 - centre[:, :1]).abs()[:, :, None]
    right = (torch.arange(width, device=x.device) + 0.5 - centre[:, 1:]).abs()[:, None]
    hole = (draw(1, 1) < share) & (down < HOLE * height / 2) & (right < HOLE * width / 2)
    return x.masked_fill(hole[:, None], 0)

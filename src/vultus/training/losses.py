"""Losses as small pure functions, and the schedules of their weights.

Every loss returns a scalar; logits are float32, [N] unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._loss_config import LossConfig

MSE_FLOOR = 0.1  # share of mse_weight that is left at the end of mse_nimg


def mse_weight(loss: LossConfig, cur_nimg: int) -> float:
    """The weight of the reconstruction error after so many images."""
    left = 1 - (1 - MSE_FLOOR) * min(cur_nimg / loss.mse_nimg, 1.0) if loss.mse_nimg else 1.0
    return loss.mse_weight * left


def identity_weight(loss: LossConfig, cur_nimg: int) -> float:
    """The weight of the identity loss after so many images."""
    progress = min(cur_nimg / loss.identity_nimg, 1.0) if loss.identity_nimg else 1.0
    return loss.identity_start + (loss.identity_weight - loss.identity_start) * progress


def bce_discriminator(real_logits: Tensor, fake_logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Goodfellow et al. 2014 (arXiv:1406.2661) on logits, with one-sided label smoothing (Salimans et al. 2016,
    arXiv:1606.03498).

    On logits, because a sigmoid followed by a clamped logarithm has no gradient where the discriminator is certain.
    """
    real = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, 1 - label_smoothing))
    return real + F.softplus(fake_logits).mean()


def bce_generator(fake_logits: Tensor) -> Tensor:
    """The non-saturating loss of the generator: -log sigmoid(D(fake))."""
    return F.softplus(-fake_logits).mean()


def hinge_real(logits: Tensor) -> Tensor:
    """The discriminator's hinge loss on photos (Lim & Ye 2017, arXiv:1705.02894), for logits of any shape."""
    return F.relu(1 - logits).mean()


def hinge_fake(logits: Tensor) -> Tensor:
    """The discriminator's hinge loss on generated images."""
    return F.relu(1 + logits).mean()


def hinge_generator(logits: Tensor) -> Tensor:
    """The generator's loss that belongs to the hinge loss."""
    return -logits.mean()


def reconstruction(x: Tensor, target: Tensor, size: int = 0) -> Tensor:
    """Mean squared error per value in [-1, 1], after averaging both down to size x size (0: full size)."""
    if size and size < x.shape[-1]:
        x, target = (F.adaptive_avg_pool2d(image, size) for image in (x, target))
    return F.mse_loss(x, target)


def feature_distance(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of features of unit size, summed over depths (perceptual loss, Johnson et al. 2016,
    arXiv:1603.08155)."""
    return torch.stack([(a - b).abs().float().mean() for a, b in zip(fake, real, strict=True)]).sum()


def kl_normal(
    mean: Tensor,
    log_variance: Tensor,
    free: float = 0.0,
    whole: Callable[[Tensor], Tensor] = lambda nats: nats,
) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, of [N, z_dim]: summed over z_dim, mean over the batch.

    The first `free` nats of each latent, in the mean over the batch, have no gradient (Kingma et al. 2016,
    arXiv:1606.04934, equation 15). Where the N rows are a part of a batch, `whole` gives the mean [z_dim] over the
    batch from that over the part.
    """
    nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    if not free:
        return nats.sum(1).mean()
    own = nats.mean(0)
    return own.masked_fill(whole(own.detach()) < free, free).sum()


def identity(embedding: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine between unit-norm embeddings [N, c_dim]."""
    return 1 - (embedding * target).sum(1).mean()

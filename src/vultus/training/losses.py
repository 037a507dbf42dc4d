"""Losses as small pure functions. Every one returns a scalar; logits are float32, [N] unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_discriminator(real_logits: Tensor, fake_logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Goodfellow et al. 2014 (arXiv:1406.2661) on logits, with one-sided label smoothing (Salimans et al. 2016).

    On logits, because a sigmoid followed by a clamped logarithm gives no gradient once the discriminator is sure.
    """
    real = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, 1 - label_smoothing))
    return real + F.softplus(fake_logits).mean()


def bce_generator(fake_logits: Tensor) -> Tensor:
    """The non-saturating loss: -log sigmoid(D(fake))."""
    return F.softplus(-fake_logits).mean()


def relativistic_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Paired relativistic loss (Jolicoeur-Martineau 2019; Huang et al. 2024, arXiv:2501.05441, eq. 2)."""
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The same with the roles exchanged."""
    return F.softplus(real_logits - fake_logits).mean()


def hinge_real(logits: Tensor) -> Tensor:
    """The discriminator's loss on real pictures (Lim & Ye 2017, arXiv:1705.02894), of logits of any shape."""
    return F.relu(1 - logits).mean()


def hinge_fake(logits: Tensor) -> Tensor:
    """The discriminator's loss on made pictures."""
    return F.relu(1 + logits).mean()


def hinge_generator(logits: Tensor) -> Tensor:
    """The generator's loss, which goes with both."""
    return -logits.mean()


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """Mean squared norm of the gradient of the logits to the pictures, summed over pixels in [-1, 1].

    R1 on real pictures (Mescheder et al. 2018, arXiv:1801.04406, eq. 9), R2 on made ones. Needs x.requires_grad.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.float().square().sum((1, 2, 3)).mean()


def reconstruction(x: Tensor, target: Tensor, size: int = 0) -> Tensor:
    """Mean squared error per value in [-1, 1], after averaging both down to size x size (0: full size)."""
    if size and size < x.shape[-1]:
        x, target = (F.adaptive_avg_pool2d(image, size) for image in (x, target))
    return F.mse_loss(x, target)


def feature_distance(made: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of features scaled to unit size, summed over depths (Johnson et al. 2016,
    arXiv:1603.08155)."""
    return torch.stack([(a - b).abs().float().mean() for a, b in zip(made, real, strict=True)]).sum()


def kl_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over [., z_dim], mean over the batch."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


def identity(found: Tensor, asked: Tensor) -> Tensor:
    """1 - mean cosine between unit-norm embeddings [N, 512]."""
    return 1 - (found * asked).sum(1).mean()

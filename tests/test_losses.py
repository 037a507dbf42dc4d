"""Losses and the schedules of their weights: values worked out by hand, and the published formulas in torch's form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F

from vultus._loss_config import LossConfig
from vultus.training import losses

EIGHT = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 4.0])


def test_weights_at_the_start_halfway_at_the_end_and_after_it() -> None:
    loss = LossConfig(mse_weight=10.0, mse_nimg=100, identity_weight=4.0, identity_start=1.0, identity_nimg=200)
    images = (0, 50, 100, 101, 1000)
    assert [losses.mse_weight(loss, n) for n in images] == pytest.approx([10.0, 5.5, 1.0, 1.0, 1.0])
    assert [losses.identity_weight(loss, n) for n in images] == pytest.approx([1.0, 1.75, 2.5, 2.515, 4.0])
    constant = replace(loss, mse_nimg=0, identity_nimg=0)
    assert [losses.mse_weight(constant, n) for n in (0, 50)] == [10.0, 10.0]
    assert [losses.identity_weight(constant, n) for n in (0, 50)] == [4.0, 4.0]
    soon = replace(loss, mse_nimg=1, identity_nimg=1)
    assert [losses.mse_weight(soon, 1), losses.identity_weight(soon, 1)] == pytest.approx([1.0, 4.0])


def test_bce_is_the_cross_entropy_of_probabilities() -> None:
    real, fake = torch.tensor([math.log(3), 0.0]), torch.tensor([-math.log(3), 0.0])  # p = 3/4, 1/2; 1/4, 1/2
    expected = -(math.log(3 / 4) + math.log(1 / 2)) / 2  # of each half; both are equal
    assert losses.bce_discriminator(real, fake).item() == pytest.approx(2 * expected)
    # With smoothing, the target of photos is 0.9; that of generated images stays 0 (one-sided).
    smooth = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4) + math.log(1 / 2)) / 2
    assert losses.bce_discriminator(real, fake, 0.1).item() == pytest.approx(smooth + expected)
    assert losses.bce_generator(fake).item() == pytest.approx(-(math.log(1 / 4) + math.log(1 / 2)) / 2)
    assert losses.bce_discriminator(EIGHT, EIGHT.flip(0)).shape == losses.bce_generator(EIGHT).shape == ()


def test_bce_is_finite_and_has_a_gradient_where_the_discriminator_is_certain() -> None:
    logits = torch.tensor([-200.0, -200.0], requires_grad=True)
    loss = losses.bce_generator(logits)
    loss.backward()
    assert loss.item() == 200
    assert logits.grad is not None
    assert logits.grad.tolist() == [-0.5, -0.5]


def test_hinge_by_hand() -> None:
    logits = torch.tensor([[-2.0, 0.5], [1.0, 3.0]])
    assert losses.hinge_real(logits).item() == (3 + 0.5 + 0 + 0) / 4
    assert losses.hinge_fake(logits).item() == (0 + 1.5 + 2 + 4) / 4
    assert losses.hinge_generator(logits).item() == -2.5 / 4


def test_reconstruction_by_hand() -> None:
    x = torch.zeros(2, 3, 4, 4)
    target = x.clone()
    target[..., :2, :2] = 2.0  # a quarter of each image
    assert losses.reconstruction(x, target).item() == 1.0
    assert losses.reconstruction(x, target, 2).item() == 1.0  # quarters of 2, 0, 0, 0
    assert losses.reconstruction(x, target, 1).item() == 0.25  # the mean of each image is 0.5
    assert losses.reconstruction(x, target, 4).item() == losses.reconstruction(x, target, 5).item() == 1.0
    wide = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    pooled = F.avg_pool2d(wide, 2).square().mean()
    assert losses.reconstruction(wide, torch.zeros_like(wide), 3).item() == pytest.approx(pooled.item())


def test_feature_distance_is_a_sum_of_means() -> None:
    fake = [torch.tensor([[1.0, -1.0]]), torch.tensor([0.5, 0.5, 2.0])]
    real = [torch.tensor([[0.0, 1.0]]), torch.tensor([0.5, 1.5, 0.0])]
    assert losses.feature_distance(fake, real).item() == (1 + 2) / 2 + (0 + 1 + 2) / 3
    half = losses.feature_distance([each.bfloat16() for each in fake], [each.bfloat16() for each in real])
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="zip"):
        losses.feature_distance(fake, real[:1])


def test_kl_agrees_with_torch_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(5, 7, generator=random), torch.randn(5, 7, generator=random)
    posterior = D.Normal(mean, (0.5 * log_variance).exp())
    expected = D.kl_divergence(posterior, D.Normal(torch.zeros(7), torch.ones(7))).sum(1).mean()
    assert losses.kl_normal(mean, log_variance).item() == pytest.approx(expected.item(), rel=1e-5)


def test_free_nats_of_each_latent_cost_the_same_and_have_no_gradient() -> None:
    """Latents of 0.5, 2 and 8 nats in the mean over the batch, of which each has 2 free."""
    mean = torch.tensor([[0.0, 2.0, 4.0], [2**0.5, 2.0, 4.0]], requires_grad=True)
    log_variance = torch.zeros(2, 3)
    assert losses.kl_normal(mean, log_variance).item() == pytest.approx(0.5 + 2 + 8)
    loss = losses.kl_normal(mean, log_variance, 2.0)
    assert loss.item() == pytest.approx(2 + 2 + 8)
    (gradient,) = torch.autograd.grad(loss, mean)
    assert gradient.tolist() == [[0, 1, 2], [0, 1, 2]]  # a latent at the threshold still learns
    # The same rows as half of a batch, the other half of which has 6 nats more in each latent: none is below.
    whole = losses.kl_normal(mean, log_variance, 2.0, lambda own: (own + (own + 6)) / 2)
    assert whole.item() == pytest.approx(0.5 + 2 + 8)


def test_identity_is_one_minus_the_cosine() -> None:
    embedding = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    assert losses.identity(embedding, target).item() == pytest.approx(1 - (1 + 0.6 - 1) / 3)

"""Batch-norm over the batches of all processes of a training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch-norm whose mean and variance are those of the images of all processes.

    nn.SyncBatchNorm does the same, but accepts tensors on a GPU only. Every process must run the layer, on one image or
    more. Outside of training it is nn.BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W], float32 or bfloat16."""
        if not self.training:
            return super().forward(x)
        y, mean, variance = _Synchronised.apply(x, self.weight, self.bias, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return y


def synchronised(network: nn.Module) -> None:
    """Replace each nn.BatchNorm2d in a network; parameters, buffers and their names stay."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                with torch.device("meta"):
                    norm = SyncBatchNorm2d(child.num_features, child.eps, child.momentum, child.affine)
                norm._parameters, norm._buffers = child._parameters, child._buffers
                setattr(module, name, norm)


class _Synchronised(torch.autograd.Function):
    """(x, weight, bias, eps) -> (y, mean, unbiased variance)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, count = x.shape[1], x.numel() // x.shape[1]
        own = x.new_zeros(2, channels, dtype=torch.float32)
        torch.batch_norm_update_stats(x, own[0], own[1], 1.0)  # with momentum 1: mean and unbiased variance of x
        moments = torch.cat([own[0], own[1] * ((count - 1) / count), own.new_tensor([count])])
        every = [torch.empty_like(moments) for _ in range(dist.get_world_size())]
        dist.all_gather(every, moments)
        parts = torch.stack(every)
        counts = parts[:, -1:]
        share = counts / counts.sum()
        means, variances = parts[:, :channels], parts[:, channels:-1]
        # Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        total = counts.sum()
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        unbiased = variance * (total / (total - 1).clamp(min=1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # As if mean and variance were constants; also the sums of dy and of dy times the normalized x.
        dx, own_weight, own_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([own_bias, own_weight])
        dist.all_reduce(sums)
        deviation = (variance + ctx.eps).rsqrt()
        slope = scale * deviation.square() * sums[1] / total
        shift = scale * deviation * sums[0] / total - mean * slope
        slope, shift = (values.to(x.dtype)[:, None, None] for values in (slope, shift))
        dx = torch.addcmul(dx - shift, x, slope, value=-1)
        return dx, None if weight is None else own_weight, None if weight is None else own_bias, None

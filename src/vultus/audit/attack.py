"""The attack: a mapping from templates back to embeddings, trained on people whose embeddings the attacker has.

It is a linear map, as in Shahreza et al. 2024 (arXiv:2411.03960), fitted by ridge regression, plus a network of one
hidden layer that is trained on what the linear map leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, BATCH, WIDTH, RATE = 300, 256, 512, 1e-3  # the budget, equal for all protections
RIDGE = 1e-3  # of the mean square of the inputs

Mapping = Callable[[Tensor], Tensor]


def train_mapping(seen: Tensor, c: Tensor, *, seed: int) -> Mapping:
    """Train a mapping on inputs `seen` [N, K] and their embeddings c [N, D] of unit norm.

    Returns a function [M, K] -> [M, D] of unit norm. The loss is 1 - cosine. The result is a function of the arguments.
    """
    mean, scale = seen.mean(0), seen.std(0).clamp(min=1e-6)
    x = (seen - mean) / scale
    centre = c.mean(0)
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1])
    linear = torch.linalg.solve(gram, x.T @ (c - centre))
    random = torch.Generator().manual_seed(seed % 2**63)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        last = nn.Linear(WIDTH, c.shape[1])
        network = nn.Sequential(nn.Linear(x.shape[1], WIDTH), nn.GELU(), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def mapped(x: Tensor) -> Tensor:
        return F.normalize(x @ linear + centre + network(x), dim=1)

    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=random)
        loss = (1 - (mapped(x[rows]) * c[rows]).sum(1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def mapping(seen: Tensor) -> Tensor:
        return mapped((seen - mean) / scale)

    return mapping

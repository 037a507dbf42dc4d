"""The training step: two networks, their optimizers, the moving average, one batch at a time.

Every random number of a step comes from a generator seeded with (seed, images seen), so a step can be repeated.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from vultus import losses
from vultus.config import TrainConfig, to_dict
from vultus.encoders import Encoder
from vultus.images import to_x
from vultus.networks import Generator, build_discriminator, build_generator

MSE_FLOOR = 0.1  # share of mse_weight that is left at the end of mse_nimg


def step_generator(seed: int, cur_nimg: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step."""
    digest = hashlib.sha256(f"{seed} {cur_nimg}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


class GAN:
    """G, D and G_ema with their optimizers.

    Args:
        config: the run; its network, loss and optimizer parts are used here.
        device: where to compute.
        dtype: what the networks compute in; parameters, losses and penalties are float32.
        encoder: frozen FaceNet, needed only where identity_weight is positive.
        memory_format: of weights and pictures; channels_last is the faster one on a CPU.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        encoder: Encoder | None,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        if config.loss.identity_weight and encoder is None:
            raise ValueError("loss.identity_weight needs an encoder")
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.encoder = encoder
        self.memory_format = memory_format
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.G: Generator = build_generator(**to_dict(config.generator)).to(self.device)
            self.D: nn.Module = build_discriminator(**to_dict(config.discriminator)).to(self.device)
        for network in (self.G, self.D):
            network.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.G_ema: Generator = copy.deepcopy(self.G).eval().requires_grad_(False)
        optim = config.optim
        adam: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "foreach": True}
        self.G_optim = torch.optim.Adam(self.G.parameters(), **adam)
        self.D_optim = torch.optim.Adam(self.D.parameters(), **adam)

    def step(self, images: Tensor, c: Tensor, cur_nimg: int) -> dict[str, Tensor]:
        """One update of D, G and G_ema on images uint8 [B, 3, R, R] with embeddings c [B, 512].

        `cur_nimg` is the number of images seen before this batch. Returns named losses and the norms of the gradients
        as scalars on the device; no value is read back to the host.
        """
        config, loss = self.config, self.config.loss
        rng = step_generator(config.seed, cur_nimg, self.device)
        images = images.to(self.device, non_blocking=True)
        c = c.to(self.device, non_blocking=True)
        batch = len(images)
        if config.loader.mirror:
            flip = torch.rand(batch, 1, 1, 1, generator=rng, device=self.device) < 0.5
            images = torch.where(flip, images.flip(3), images)
        x_real = to_x(images).contiguous(memory_format=self.memory_format)
        z = torch.randn(batch, config.generator.z_dim, generator=rng, device=self.device)
        x_fake = self.G(z.to(self.dtype), c)

        named: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        warm = cur_nimg >= loss.warmup_nimg
        if loss.adversarial_weight and warm:
            # The pictures are made once for both updates, and the real logits of D's update serve G's as well.
            real_logits = self._discriminator_step(x_real, x_fake.detach(), c, cur_nimg, named)
            self.D.requires_grad_(False)
            fake_logits = self.D(x_fake.to(self.dtype), c)
            if loss.adversarial == "relativistic":
                named["G_adversarial"] = losses.relativistic_generator(real_logits, fake_logits)
            else:
                named["G_adversarial"] = losses.bce_generator(fake_logits)
            total = total + loss.adversarial_weight * named["G_adversarial"]
        if loss.mse_weight:
            named["G_mse"] = losses.reconstruction(x_fake, x_real, loss.mse_size)
            left = 1 - (1 - MSE_FLOOR) * min(cur_nimg / loss.mse_nimg, 1.0) if loss.mse_nimg else 1.0
            total = total + loss.mse_weight * left * named["G_mse"]
        if loss.identity_weight and warm and self.encoder is not None:
            part = max(1, round(batch * loss.identity_fraction))
            draw = step_generator(config.seed + 1, cur_nimg)  # on the host: these two decide shapes, not values
            size = loss.identity_size + 8 * int(torch.randint(-2, 3, (), generator=draw))
            mirrored = bool(torch.rand((), generator=draw) < 0.5)
            found = self.encoder.embed(x_fake[:part].flip(3) if mirrored else x_fake[:part], size)
            named["G_identity"] = losses.identity(found, c[:part])
            total = total + loss.identity_weight * named["G_identity"]
        self.G_optim.zero_grad(set_to_none=True)
        total.backward()
        self.D.requires_grad_(True)
        named["G_grad_norm"] = _gradient_norm(self.G)
        self.G_optim.step()
        self._average(cur_nimg + batch)
        named["G_total"] = total
        return {key: value.detach() for key, value in named.items()}

    def _discriminator_step(
        self, x_real: Tensor, x_fake: Tensor, c: Tensor, cur_nimg: int, named: dict[str, Tensor]
    ) -> Tensor:
        """Update D, enter its losses into `named`, return the real logits [B], detached."""
        loss = self.config.loss
        real_logits = self.D(x_real.to(self.dtype), c)
        fake_logits = self.D(x_fake.to(self.dtype), c)
        if loss.adversarial == "relativistic":
            total = losses.relativistic_discriminator(real_logits, fake_logits)
        else:
            total = losses.bce_discriminator(real_logits, fake_logits, loss.label_smoothing)
        named["D_adversarial"] = total
        named["D_real_logits"] = real_logits.mean()
        named["D_fake_logits"] = fake_logits.mean()
        self.D_optim.zero_grad(set_to_none=True)
        total.backward()
        if loss.gamma and (cur_nimg // len(x_real)) % loss.penalty_every == 0:
            for name, x in (("D_r1", x_real), ("D_r2", x_fake)):
                # In float32: the gradient of a gradient loses its digits in bfloat16.
                x = x.detach().requires_grad_()
                penalty = losses.gradient_penalty(self.D(x, c), x)
                (penalty * (loss.gamma / 2 * loss.penalty_every)).backward()
                named[name] = penalty
        named["D_grad_norm"] = _gradient_norm(self.D)
        self.D_optim.step()
        return real_logits.detach()

    @torch.no_grad()
    def _average(self, nimg: int) -> None:
        """G_ema <- G, with a half-life in images that grows with the run (Karras et al. 2020, ADA, appendix B)."""
        optim = self.config.optim
        half_life = max(min(optim.ema_nimg, nimg * optim.ema_rampup), 1e-8)
        keep = 0.5 ** (optim.batch / half_life)
        average, current = self.G_ema.state_dict(), self.G.state_dict()
        keys = [key for key, value in average.items() if value.is_floating_point()]
        torch._foreach_lerp_([average[key] for key in keys], [current[key] for key in keys], 1 - keep)
        for key in average.keys() - keys:
            average[key].copy_(current[key])

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides (seed, images seen)."""
        parts = ("G", "D", "G_ema", "G_optim", "D_optim")
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict()."""
        for name in ("G", "D", "G_ema", "G_optim", "D_optim"):
            getattr(self, name).load_state_dict(state[name])


def _gradient_norm(network: nn.Module) -> Tensor:
    """L2 norm of all gradients together, of the losses with their weights."""
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])

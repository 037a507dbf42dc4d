"""The training step of method `gan`: two networks, their optimizers, the moving average, one batch at a time.

Every random number of a step comes from a generator seeded with (seed, images seen), so a step can be repeated.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vultus.config import LossConfig, TrainConfig, to_dict
from vultus.images.io import to_x
from vultus.models.discriminators import build_discriminator
from vultus.models.facenet import Encoder
from vultus.models.generators import GeneratorNetwork, build_generator
from vultus.training import losses

MSE_FLOOR = 0.1  # share of mse_weight that is left at the end of mse_nimg
LR_FLOOR = 0.05  # share of the learning rate that is left at the end of a run, where it falls


def step_generator(seed: int, cur_nimg: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step."""
    digest = hashlib.sha256(f"{seed} {cur_nimg}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def mse_weight(loss: LossConfig, cur_nimg: int) -> float:
    """The weight of the reconstruction error after so many images."""
    left = 1 - (1 - MSE_FLOOR) * min(cur_nimg / loss.mse_nimg, 1.0) if loss.mse_nimg else 1.0
    return loss.mse_weight * left


def identity_weight(loss: LossConfig, cur_nimg: int) -> float:
    """The weight of the identity loss after so many images."""
    way = min(cur_nimg / loss.identity_nimg, 1.0) if loss.identity_nimg else 1.0
    return loss.identity_start + (loss.identity_weight - loss.identity_start) * way


def lr_left(lr_fall: float, used: float) -> float:
    """The share of the learning rate that is left when a share `used` of the run's budget is used up."""
    return max(LR_FLOOR, min(1.0, (1 - used) / lr_fall)) if lr_fall else 1.0


class GAN:
    """G, D and G_ema with their optimizers. Another method adds networks to them and has a step of its own.

    Attributes:
        used: share of the run's budget that is used up; the learning rate and what D sees may depend on it.

    Args:
        config: the run; its network, loss and optimizer parts are used here.
        device: where to compute.
        dtype: what the networks compute in; parameters, losses and penalties are float32.
        encoder: frozen FaceNet, needed only where config.loss.needs_encoder().
        memory_format: of weights and pictures; channels_last is the faster one on a CPU.
    """

    GENERATOR_SIDE: ClassVar[tuple[str, ...]] = ("G",)  # networks that G_optim trains
    DISCRIMINATOR_SIDE: ClassVar[tuple[str, ...]] = ("D",)  # networks that D_optim trains

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        encoder: Encoder | None,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        if config.loss.needs_encoder() and encoder is None:
            raise ValueError("these losses need an encoder")
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.encoder = encoder
        self.memory_format = memory_format
        self.used = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._build()
        for network in self.networks().values():
            network.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.G_ema: GeneratorNetwork = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.G_optim, self.D_optim = self._adam(self.GENERATOR_SIDE), self._adam(self.DISCRIMINATOR_SIDE)

    def _build(self) -> None:
        """Make the networks named in GENERATOR_SIDE and DISCRIMINATOR_SIDE."""
        self.G: GeneratorNetwork = build_generator(**to_dict(self.config.generator))
        self.D: nn.Module = build_discriminator(**to_dict(self.config.discriminator))

    def _adam(self, names: tuple[str, ...]) -> torch.optim.Adam:
        optim = self.config.optim
        parameters = [parameter for name in names for parameter in self.networks()[name].parameters()]
        return torch.optim.Adam(parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), foreach=True)

    def networks(self) -> dict[str, nn.Module]:
        """All that is trained, by name."""
        return {name: getattr(self, name) for name in (*self.GENERATOR_SIDE, *self.DISCRIMINATOR_SIDE)}

    def calibrate(self, images: Tensor) -> None:
        """Look at photos uint8 [N, 3, R, R] once, before the first step of a run. Nothing to see for this method."""

    def step(self, images: Tensor, c: Tensor, cur_nimg: int) -> dict[str, Tensor]:
        """One update of D, G and G_ema on images uint8 [B, 3, R, R] with embeddings c [B, 512].

        `cur_nimg` is the number of images seen before this batch. Returns named losses and the norms of the gradients
        as scalars on the device; no value is read back to the host.
        """
        loss, batch = self.config.loss, len(images)
        x_real, c, z = self._begin(images, c, cur_nimg)
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
            elif loss.adversarial == "hinge":
                named["G_adversarial"] = losses.hinge_generator(fake_logits)
            else:
                named["G_adversarial"] = losses.bce_generator(fake_logits)
            total = total + loss.adversarial_weight * named["G_adversarial"]
        if loss.mse_weight:
            named["G_mse"] = losses.reconstruction(x_fake, x_real, loss.mse_size)
            total = total + mse_weight(loss, cur_nimg) * named["G_mse"]
        weight = identity_weight(loss, cur_nimg)
        if weight and warm and self.encoder is not None:
            part = max(1, round(batch * loss.identity_fraction))
            size, mirrored = self._draw_view(cur_nimg)
            found = self.encoder.embed(x_fake[:part].flip(3) if mirrored else x_fake[:part], size)
            named["G_identity"] = losses.identity(found, c[:part])
            total = total + weight * named["G_identity"]
        self.G_optim.zero_grad(set_to_none=True)
        total.backward()
        self.D.requires_grad_(True)
        named["G_grad_norm"] = gradient_norm(self.G)
        self.G_optim.step()
        self._average(cur_nimg + batch)
        named["G_total"] = total
        return {key: value.detach() for key, value in named.items()}

    def _begin(self, images: Tensor, c: Tensor, cur_nimg: int) -> tuple[Tensor, Tensor, Tensor]:
        """What every step starts with: x_real [B, 3, R, R], mirrored or not, c and z [B, z_dim] on the device; the
        learning rate is set."""
        config = self.config
        rng = step_generator(config.seed, cur_nimg, self.device)
        images = images.to(self.device, non_blocking=True)
        c = c.to(self.device, non_blocking=True)
        if config.loader.mirror:
            flip = torch.rand(len(images), 1, 1, 1, generator=rng, device=self.device) < 0.5
            images = torch.where(flip, images.flip(3), images)
        z = torch.randn(len(images), config.generator.z_dim, generator=rng, device=self.device)
        lr = config.optim.lr * lr_left(config.optim.lr_fall, self.used)
        for group in (*self.G_optim.param_groups, *self.D_optim.param_groups):
            group["lr"] = lr
        return to_x(images).contiguous(memory_format=self.memory_format), c, z

    def _draw_view(self, cur_nimg: int) -> tuple[int, bool]:
        """The side at which FaceNet reads the pictures of a step, and whether it sees them mirrored."""
        loss = self.config.loss
        draw = step_generator(self.config.seed + 1, cur_nimg)  # on the host: these two decide shapes, not values
        number = int(torch.randint(0, loss.identity_sizes, (), generator=draw))
        mirrored = bool(torch.rand((), generator=draw) < 0.5)
        return loss.identity_size + 8 * number - 4 * (loss.identity_sizes - 1), mirrored

    def _discriminator_step(
        self, x_real: Tensor, x_fake: Tensor, c: Tensor, cur_nimg: int, named: dict[str, Tensor]
    ) -> Tensor:
        """Update D, enter its losses into `named`, return the real logits [B], detached."""
        loss = self.config.loss
        real_logits = self.D(x_real.to(self.dtype), c)
        fake_logits = self.D(x_fake.to(self.dtype), c)
        if loss.adversarial == "relativistic":
            total = losses.relativistic_discriminator(real_logits, fake_logits)
        elif loss.adversarial == "hinge":
            total = losses.hinge_real(real_logits) + losses.hinge_fake(fake_logits)
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
        named["D_grad_norm"] = gradient_norm(self.D)
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

    def _parts(self) -> dict[str, Any]:
        return self.networks() | {name: getattr(self, name) for name in ("G_ema", "G_optim", "D_optim")}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides (seed, images seen)."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict()."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def gradient_norm(*networks: nn.Module) -> Tensor:
    """L2 norm of all gradients together, of the losses with their weights."""
    gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)

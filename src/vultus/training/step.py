"""The training step that all methods share: networks, optimizers, moving average, one update per batch.

A method says which networks there are, what the generator makes of a batch, and the terms of both losses. Every random
number of a step comes from a generator seeded with (seed, images seen), so that a step can be repeated.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vultus.config import TrainConfig
from vultus.images.io import to_x
from vultus.models.facenet import LossEncoder
from vultus.models.generators import GeneratorNetwork
from vultus.models.second_encoder import SecondEncoder
from vultus.models.sync_norm import synchronised
from vultus.training.parts import Part
from vultus.training.processes import ALONE, Processes

Term = tuple[str, float, Tensor]  # name in the statistics, weight, scalar loss


@dataclass
class Step:
    """One step on a batch of photos, or on the part [B, ...] of it that this process computes.

    Attributes:
        cur_nimg: images seen before it.
        part: which images of the batch these are.
        x_real: the photos [B, 3, R, R] in [-1, 1], mirrored or not.
        c: their embeddings [B, c_dim].
        facenet: FaceNet's [B, 512], which its losses compare with: c itself, or where c are another encoder's, those
            that the data set holds.
        z: the latents [B, z_dim] that x was generated from.
        x: generated images [B, 3, R, R], with gradient.
        second: targets [B, dim2] of a second encoder; None without one.
        log: named scalars for the statistics, besides the loss terms.
    """

    cur_nimg: int
    part: Part
    x_real: Tensor
    c: Tensor
    facenet: Tensor
    z: Tensor
    x: Tensor
    second: Tensor | None = None
    log: dict[str, Tensor] = field(default_factory=dict)


S = TypeVar("S", bound=Step)
C = TypeVar("C", bound=TrainConfig)


class _Parameters(nn.Module):
    """Parameters whose gradients DistributedDataParallel averages."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameter for network in networks for parameter in network.parameters())

    def forward(self, total: Tensor) -> Tensor:
        """The loss of the step, as it is."""
        return total


class Method(ABC, Generic[C, S]):
    """G, D and G_ema with their optimizers.

    Attributes:
        budget_used: share of the run's budget that is used up, set by the trainer before each step.

    Args:
        config: the run; its network, loss and optimizer parts are used here.
        device: where to compute.
        dtype: what the networks compute in; parameters and losses are float32.
        encoder: frozen FaceNet, needed only where config.loss.needs_encoder().
        second: a second frozen face encoder, for methods that have a loss for one.
        memory_format: of weights and images; channels_last is the faster one on a CPU.
        processes: those that train together, each on its part of every batch.
    """

    GENERATOR_SIDE: ClassVar[tuple[str, ...]] = ("G",)  # networks that G_optim trains
    DISCRIMINATOR_SIDE: ClassVar[tuple[str, ...]] = ("D",)  # networks that D_optim trains
    G: GeneratorNetwork
    D: nn.Module

    def __init__(
        self,
        config: C,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        encoder: LossEncoder | None,
        second: SecondEncoder | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        processes: Processes = ALONE,
    ) -> None:
        if config.loss.needs_encoder() and encoder is None:
            raise ValueError("these losses need an encoder")
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.encoder = encoder
        self.second = second
        self.memory_format = memory_format
        self.processes = processes
        self.budget_used = 0.0
        self._parts_of: dict[int, Part] = {}
        self._reducers: dict[tuple[str, ...], nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._build()
        for network in self.networks().values():
            network.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
            if processes.count > 1:
                synchronised(network)
        self.G_ema: GeneratorNetwork = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.G_optim, self.D_optim = self._adam(self.GENERATOR_SIDE), self._adam(self.DISCRIMINATOR_SIDE)

    # --- what a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def _build(self) -> None:
        """Build the networks named in GENERATOR_SIDE and DISCRIMINATOR_SIDE, without those that no loss needs."""

    @abstractmethod
    def _generate(self, part: Part, x_real: Tensor, c: Tensor, facenet: Tensor, z: Tensor, cur_nimg: int) -> S:
        """Generate images for a batch, from noise z [B, z_dim]. The other arguments: see Step."""

    @abstractmethod
    def _discriminator_terms(self, step: S) -> Iterator[Term]:
        """The terms of the discriminators' loss, in the order in which they are added."""

    @abstractmethod
    def _generator_terms(self, step: S) -> Iterator[Term]:
        """The terms of the generator's loss, in the order in which they are added. The discriminators are frozen."""

    def _order(self, batch: int) -> Tensor:
        """The indices of a batch in the order in which they are dealt to the processes, see Part."""
        return torch.arange(batch)

    def _subsets(self, batch: int) -> dict[str, Tensor]:
        """The indices of a batch on which a loss is computed, by the setting of the losses that says how many."""
        return {}

    def calibrate(self, images: Tensor) -> None:
        """Called once with photos uint8 [N, 3, R, R] before the first step of a run."""

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        images: Tensor,
        c: Tensor,
        cur_nimg: int,
        second: Tensor | None = None,
        facenet: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One update of the discriminators, of G and of G_ema, on images uint8 [B, 3, R, R], embeddings c [B, c_dim].

        With several processes, these are the images of this one's part(). `cur_nimg` is the number of images seen
        before this batch; `second` [B, dim2] are targets of the second encoder; `facenet` [B, 512] are FaceNet's
        embeddings, where c are another encoder's. The images are generated once for both updates.
        Returns named losses and the norms of the gradients, of the whole batch, as scalars on the device; no value is
        read back to the host.
        """
        part = self.part(len(images) * self.processes.count)
        x_real, c, z = self._begin(part, images, c, cur_nimg)
        target = c if facenet is None else facenet.to(self.device, non_blocking=True)
        step = self._generate(part, x_real, c, target, z, cur_nimg)
        step.second = None if second is None else second.to(self.device, non_blocking=True)
        self._update_discriminators(step)
        discriminators = self._side(self.DISCRIMINATOR_SIDE)
        for network in discriminators:
            network.requires_grad_(False)
        total = self._total(step, self._generator_terms(step))
        self.G_optim.zero_grad(set_to_none=True)
        self._reduced(self.GENERATOR_SIDE, total).backward()
        for network in discriminators:
            network.requires_grad_(True)
        step.log["G_grad_norm"] = gradient_norm(*self._side(self.GENERATOR_SIDE))
        self.G_optim.step()
        if self.processes.main:
            self._average(cur_nimg + part.batch)
        step.log["G_total"] = total
        losses = {key: value.detach() for key, value in step.log.items()}
        if self.processes.count == 1:
            return losses
        means = self.processes.mean(torch.stack(list(losses.values())))
        return dict(zip(losses, means.unbind(), strict=True))

    def part(self, batch: int) -> Part:
        """The images of a batch of that size that this process computes. Raises UserError as Part."""
        if batch not in self._parts_of:
            number, count = self.processes.number, self.processes.count
            self._parts_of[batch] = Part(self._order(batch), self._subsets(batch), number, count, self.device)
        return self._parts_of[batch]

    def connect(self) -> None:
        """Take the weights of the first process, and from now on average gradients over all of them."""
        if self.processes.count == 1:
            return
        for network in self.networks().values():
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)
        for side in (self.GENERATOR_SIDE, self.DISCRIMINATOR_SIDE):
            self._reducers[side] = DistributedDataParallel(
                _Parameters(self._side(side)), gradient_as_bucket_view=True, static_graph=True
            )

    def _reduced(self, side: tuple[str, ...], total: Tensor) -> Tensor:
        """`total`, whose backward averages the gradients of this side's networks over the processes.

        The forward passes of a step are many, of parts of networks, and no call of one module, as
        DistributedDataParallel expects. It needs nothing of them but the loss.
        """
        reduced: Tensor = self._reducers[side](total) if side in self._reducers else total
        return reduced

    def _begin(self, part: Part, images: Tensor, c: Tensor, cur_nimg: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_real [B, 3, R, R] (mirrored or not), c and noise z [B, z_dim], on the device."""
        config = self.config
        rng = step_generator(config.seed, cur_nimg, self.device)
        images = images.to(self.device, non_blocking=True)
        c = c.to(self.device, non_blocking=True)
        if config.loader.mirror:
            flip = part.of(torch.rand(part.batch, 1, 1, 1, generator=rng, device=self.device)) < 0.5
            images = torch.where(flip, images.flip(3), images)
        z = part.of(torch.randn(part.batch, config.generator.z_dim, generator=rng, device=self.device))
        return to_x(images).contiguous(memory_format=self.memory_format), c, z

    def _update_discriminators(self, step: S) -> None:
        total = self._total(step, self._discriminator_terms(step))
        if total.requires_grad:
            self.D_optim.zero_grad(set_to_none=True)
            self._reduced(self.DISCRIMINATOR_SIDE, total).backward()
            step.log["D_grad_norm"] = gradient_norm(*self._side(self.DISCRIMINATOR_SIDE))
            self.D_optim.step()

    def _total(self, step: S, terms: Iterator[Term]) -> Tensor:
        """The weighted sum of the terms; each is entered into the step's log without its weight."""
        total = torch.zeros((), device=self.device)
        for name, weight, value in terms:
            step.log[name] = value
            total = total + weight * value
        return total

    def _draw_view(self, cur_nimg: int) -> tuple[int, bool]:
        """The side at which FaceNet reads the images of a step, and whether they are mirrored first."""
        loss = self.config.loss
        draw = step_generator(self.config.seed + 1, cur_nimg)  # on the host: these two decide shapes, not values
        number = int(torch.randint(0, loss.identity_sizes, (), generator=draw))
        mirrored = bool(torch.rand((), generator=draw) < 0.5)
        return loss.identity_size + 8 * number - 4 * (loss.identity_sizes - 1), mirrored

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

    # --- state --------------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        """All networks that are trained, by name."""
        names = (*self.GENERATOR_SIDE, *self.DISCRIMINATOR_SIDE)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def _side(self, names: tuple[str, ...]) -> list[nn.Module]:
        return [network for name, network in self.networks().items() if name in names]

    def _adam(self, names: tuple[str, ...]) -> torch.optim.Adam:
        optim = self.config.optim
        parameters = [parameter for network in self._side(names) for parameter in network.parameters()]
        return torch.optim.Adam(parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), foreach=True)

    def _parts(self) -> dict[str, Any]:
        return self.networks() | {name: getattr(self, name) for name in ("G_ema", "G_optim", "D_optim")}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides (seed, images seen)."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def take_weights(self, state: Mapping[str, Any]) -> list[str]:
        """Load the tensors of another run's state_dict() that have the same network, name and shape.

        Returns the names of those that were not loaded, "G.conv.weight" and so on. Optimizers start afresh.
        """
        left = []
        for part, network in (self.networks() | {"G_ema": self.G_ema}).items():
            own, given = network.state_dict(), state.get(part, {})
            same = {key: given[key] for key, value in own.items() if key in given and given[key].shape == value.shape}
            network.load_state_dict(own | same)
            left += [f"{part}.{key}" for key in own.keys() - same.keys()]
        return sorted(left)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict()."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def step_generator(seed: int, cur_nimg: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step."""
    digest = hashlib.sha256(f"{seed} {cur_nimg}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def gradient_norm(*networks: nn.Module) -> Tensor:
    """L2 norm of all gradients together."""
    gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)

"""The training step of method `coded`: a conditional GAN that is a conditional variational autoencoder on part of each
batch.

- Coded noise: for `coded_fraction` of the batch z is read from the photo by E, so that the picture can be compared with
  it (at low frequencies, and in FaceNet's features) without being told to average over all poses and lights that the
  embedding leaves open; a KL term keeps the codes near plain noise. CVAE-GAN (Bao et al. 2017, arXiv:1703.10155),
  BicycleGAN (Zhu et al. 2017, arXiv:1711.11586).
- D judges pixels by projection, patches too, with the hinge loss, and real photos with another person's embedding as
  made ones: the matching-aware discriminator (Reed et al. 2016, arXiv:1605.05396).
- F judges FaceNet's features of the pictures (projected GANs, Sauer et al. 2021, arXiv:2111.01007), and with
  `feature_match` whether they fit the embedding, against photos with another person's as D does.

FaceNet reads each made picture once for F, the perceptual distance and the identity loss together.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from vultus.config import to_dict
from vultus.images.io import to_x
from vultus.models.auxiliary import FeatureDiscriminator, PosteriorEncoder
from vultus.models.discriminators import ProjectionDiscriminator, build_discriminator
from vultus.models.facenet import FaceFeatures, FaceNet
from vultus.models.generators import build_generator
from vultus.training import losses
from vultus.training.augment import augment
from vultus.training.gan import GAN, gradient_norm, identity_weight, mse_weight, step_generator

Features = tuple[Tensor, Tensor]


class CVAEGAN(GAN):
    """G, E (noise from photos), D and F (on FaceNet's features) with their optimizers; arguments are GAN's."""

    GENERATOR_SIDE: ClassVar[tuple[str, ...]] = ("G", "E")
    DISCRIMINATOR_SIDE: ClassVar[tuple[str, ...]] = ("D", "F")
    D: ProjectionDiscriminator

    def _build(self) -> None:
        self.G = build_generator(**to_dict(self.config.generator))
        self.E = PosteriorEncoder(self.G.z_dim)
        D = build_discriminator(**to_dict(self.config.discriminator))
        if not isinstance(D, ProjectionDiscriminator):
            raise ValueError("method coded needs a discriminator of kind projection")
        self.D = D
        self.F = FeatureDiscriminator(self.G.c_dim)
        self.face: FaceFeatures | None = None
        if self.config.loss.needs_encoder():
            if not isinstance(self.encoder, FaceNet):
                raise ValueError("method coded reads FaceNet's features; another encoder will not do")
            self.face = FaceFeatures(self.encoder)

    def calibrate(self, images: Tensor) -> None:
        """Bring FaceNet's features to unit size on these photos."""
        if self.face is not None:
            with torch.no_grad():
                features = self.face.shallow(to_x(images.to(self.device)), self.config.loss.identity_size)
            self.F.calibrate(features)

    def step(self, images: Tensor, c: Tensor, cur_nimg: int) -> dict[str, Tensor]:
        """One update of D and F, of G and E, and of G_ema; as GAN.step."""
        loss, batch = self.config.loss, len(images)
        x_real, c, z = self._begin(images, c, cur_nimg)
        named: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        coded = spread(batch, loss.coded_fraction, self.device)
        if len(coded):
            mean, log_variance = self.E(x_real[coded].to(self.dtype))
            z = z.index_copy(0, coded, mean + (0.5 * log_variance).exp() * z[coded])
            named["G_kl"] = losses.kl_normal(mean, log_variance)
            total = total + loss.kl_weight * named["G_kl"]
        x = self.G(z.to(self.dtype), c)
        read = max(1, round(batch * max(loss.feature_fraction, loss.identity_fraction)))
        made, real = self._features(x[:read], x_real[:read], cur_nimg)
        shown = self._changed(torch.cat([x_real, x.detach()]), cur_nimg, 0)
        self._judges_step(shown, c, made, real, named)

        for judge in (self.D, self.F):
            judge.requires_grad_(False)
        if loss.adversarial_weight:
            logits, features, patches = self.D.read(self._changed(x, cur_nimg, 1).to(self.dtype))
            named["G_adversarial"] = losses.hinge_generator(logits + self.D.match(features, c))
            total = total + loss.adversarial_weight * named["G_adversarial"]
            if loss.patch_weight:
                named["G_patch"] = losses.hinge_generator(patches)
                total = total + loss.adversarial_weight * loss.patch_weight * named["G_patch"]
        if loss.feature_weight and made is not None:
            named["G_features"] = torch.stack([losses.hinge_generator(v) for v in self.F(made)]).mean()
            total = total + loss.feature_weight * named["G_features"]
        if loss.feature_match and made is not None:
            named["G_match"] = losses.hinge_generator(self.F.match(made[1], c[:read]))
            total = total + loss.feature_match * named["G_match"]
        if loss.mse_weight and len(coded):
            named["G_mse"] = losses.reconstruction(x[coded], x_real[coded], loss.mse_size)
            total = total + mse_weight(loss, cur_nimg) * named["G_mse"]
        if loss.perceptual_weight and made is not None and real is not None and len(coded):
            among = coded[: spread_count(read, loss.coded_fraction)]
            named["G_perceptual"] = losses.feature_distance([f[among] for f in made], [f[among] for f in real])
            total = total + loss.perceptual_weight * named["G_perceptual"]
        weight = identity_weight(loss, cur_nimg)
        if weight and made is not None and self.face is not None:
            # A picture with its photo's noise has the photo to follow. FaceNet likes faces that look at the camera, so
            # its wish would keep that noise from turning heads.
            asked = free_first(read, coded)[: max(1, round(batch * loss.identity_fraction))]
            found = self.face.rest(made[1][asked] / self.F.scale[1].to(made[1].dtype))
            named["G_identity"] = losses.identity(found, c[asked])
            total = total + weight * named["G_identity"]
        self.G_optim.zero_grad(set_to_none=True)
        total.backward()
        for judge in (self.D, self.F):
            judge.requires_grad_(True)
        named["G_grad_norm"] = gradient_norm(self.G, self.E)
        self.G_optim.step()
        self._average(cur_nimg + batch)
        named["G_total"] = total
        return {key: value.detach() for key, value in named.items()}

    def _features(self, x: Tensor, x_real: Tensor, cur_nimg: int) -> tuple[Features | None, Features | None]:
        """FaceNet's features of made and real pictures, seen at one side and way round; the real ones without a way
        back. None of what no loss needs."""
        loss = self.config.loss
        if self.face is None:
            return None, None
        size, mirrored = self._draw_view(cur_nimg)
        if mirrored:
            x, x_real = x.flip(3), x_real.flip(3)
        made = self.F.scaled(self.face.shallow(x, size))
        if not (loss.feature_weight or loss.feature_match or loss.perceptual_weight):
            return made, None
        with torch.no_grad():
            return made, self.F.scaled(self.face.shallow(x_real, size))

    def _changed(self, x: Tensor, cur_nimg: int, use: int) -> Tensor:
        """Pictures as D sees them; each `use` within a step has changes of its own."""
        loss = self.config.loss
        if not loss.augment or self.used >= loss.augment_until:
            return x
        return augment(x, loss.augment, step_generator(self.config.seed + 2 + use, cur_nimg, self.device))

    def _judges_step(
        self, shown: Tensor, c: Tensor, made: Features | None, real: Features | None, named: dict[str, Tensor]
    ) -> None:
        """Update D, that is shown photos and then as many made pictures, and F; enter their losses into `named`."""
        loss = self.config.loss
        total = torch.zeros((), device=self.device)
        if loss.adversarial_weight:
            named["D_adversarial"] = self._pixel_loss(shown, c, named)
            total = total + named["D_adversarial"]
        if loss.feature_weight and made is not None and real is not None:
            judged = zip(self.F(real), self.F((made[0].detach(), made[1].detach())), strict=True)
            named["F_adversarial"] = torch.stack(
                [losses.hinge_real(a) + losses.hinge_fake(b) for a, b in judged]
            ).mean()
            total = total + named["F_adversarial"]
        if loss.feature_match and made is not None and real is not None:
            named["F_match"] = self._feature_pairs(made[1].detach(), real[1], c[: len(real[1])], named)
            total = total + named["F_match"]
        if total.requires_grad:
            self.D_optim.zero_grad(set_to_none=True)
            total.backward()
            named["D_grad_norm"] = gradient_norm(self.D, self.F)
            self.D_optim.step()

    def _pixel_loss(self, shown: Tensor, c: Tensor, named: dict[str, Tensor]) -> Tensor:
        """D's loss: photos with their embeddings against made pictures, and against photos with wrong embeddings."""
        loss, batch = self.config.loss, len(c)
        logits, features, patches = self.D.read(shown.to(self.dtype))
        joint = logits + self.D.match(features, torch.cat([c, c]))
        total = losses.hinge_real(joint[:batch]) + (1 - loss.mismatch) * losses.hinge_fake(joint[batch:])
        named["D_real_logits"], named["D_fake_logits"] = joint[:batch].mean(), joint[batch:].mean()
        if loss.mismatch:
            wrong = logits[:batch] + self.D.match(features[:batch], c.roll(1, 0))
            total = total + loss.mismatch * losses.hinge_fake(wrong)
            named["D_wrong_logits"] = wrong.mean()
        if loss.patch_weight:
            total = total + loss.patch_weight * (
                losses.hinge_real(patches[:batch]) + losses.hinge_fake(patches[batch:])
            )
        return total

    def _feature_pairs(self, made: Tensor, real: Tensor, c: Tensor, named: dict[str, Tensor]) -> Tensor:
        """F's loss on pairs: photos with their embeddings, against made pictures and photos with wrong ones."""
        right, wrong, asked = self.F.match(real, c), self.F.match(real, c.roll(1, 0)), self.F.match(made, c)
        named["F_real_match"], named["F_wrong_match"], named["F_fake_match"] = right.mean(), wrong.mean(), asked.mean()
        return losses.hinge_real(right) + 0.5 * (losses.hinge_fake(asked) + losses.hinge_fake(wrong))


def free_first(count: int, coded: Tensor) -> Tensor:
    """The first `count` places of a batch, those that are not in `coded` before those that are."""
    places = torch.arange(count, device=coded.device)
    return places[torch.isin(places, coded).long().argsort(stable=True)]


def spread_count(batch: int, fraction: float) -> int:
    """How many of the first `batch` places spread() chooses."""
    return math.ceil(batch * fraction - 1e-6)


def spread(batch: int, fraction: float, device: torch.device | str = "cpu") -> Tensor:
    """The places of a `fraction` of a batch, evenly spread, so that every first part of the batch has its share."""
    count = spread_count(batch, fraction)
    return (torch.arange(count, device=device) / max(fraction, 1e-6) + 1e-4).long()

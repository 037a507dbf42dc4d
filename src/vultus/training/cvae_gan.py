"""Method `cvae-gan`: a conditional GAN that is a conditional variational autoencoder on part of each batch.

- Posterior encoder: for `coded_fraction` of the batch, E reads the latents from the source photo. These images can be
  compared with their photos (at low frequencies, and in FaceNet's features) without averaging over the poses and lights
  that the embedding does not determine. A KL term keeps the posterior near the prior. CVAE-GAN (Bao et al. 2017,
  arXiv:1703.10155), BicycleGAN (Zhu et al. 2017, arXiv:1711.11586).
- D is a projection discriminator with patch logits and the hinge loss. Photos with another person's embedding count as
  fake: the matching-aware discriminator (Reed et al. 2016, arXiv:1605.05396).
- F discriminates FaceNet's features (projected GANs, Sauer et al. 2021, arXiv:2111.01007); with `feature_match` also
  pairs of features and embedding, with mismatched pairs as for D.

FaceNet reads each generated image once, for F, the perceptual distance and the identity loss together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vultus.config import CVAEGANConfig, to_dict
from vultus.images.io import to_x
from vultus.models.alexnet import AlexNetTrunk, ShiftTolerantTrunk, stlpips_convolutions, stlpips_state
from vultus.models.auxiliary import FeatureDiscriminator, PosteriorEncoder, TextureDiscriminator
from vultus.models.discriminators import ProjectionDiscriminator, build_discriminator
from vultus.models.facenet import FaceFeatures, FaceNet
from vultus.models.generators import build_generator
from vultus.models.second_encoder import SecondEncoder
from vultus.training import losses
from vultus.training.augment import augment
from vultus.training.step import Method, Step, Term, step_generator

SECOND_JITTER = 0.016  # of the place and side of the second encoder's crop, in images: 2 pixels of 128
Features = tuple[Tensor, Tensor]  # shallow [N, 192, s, s] and deep [N, 256, t, t], at unit size


@dataclass
class CVAEGANStep(Step):
    """A step with posterior latents and features.

    Attributes:
        coded: indices of the images whose latents come from the posterior encoder.
        posterior: mean and log variance [len(coded), z_dim] of their posterior; None without any.
        features: FaceNet's features of the first images of the batch, with gradient; None where no loss needs them.
        real_features: those of the photos, without gradient; None where no loss needs them.
    """

    coded: Tensor = field(kw_only=True)
    posterior: tuple[Tensor, Tensor] | None = None
    features: Features | None = None
    real_features: Features | None = None


class CVAEGAN(Method[CVAEGANConfig, CVAEGANStep]):
    """G, E (posterior encoder), D, F (on FaceNet's features) and T (on AlexNet's, with `texture_weight`) with their
    optimizers; arguments as of Method."""

    GENERATOR_SIDE: ClassVar[tuple[str, ...]] = ("G", "E")
    DISCRIMINATOR_SIDE: ClassVar[tuple[str, ...]] = ("D", "F", "T")
    D: ProjectionDiscriminator

    def _build(self) -> None:
        self.G = build_generator(**to_dict(self.config.generator))
        self.E = PosteriorEncoder(self.G.z_dim, self.config.loss.coded_size, self.config.generator.noise_maps)
        D = build_discriminator(**to_dict(self.config.discriminator))
        if not isinstance(D, ProjectionDiscriminator):
            raise ValueError("method cvae-gan needs a discriminator of kind projection")
        self.D = D
        self.F = FeatureDiscriminator(self.G.c_dim)
        self.trunk: AlexNetTrunk | None = None
        if self.config.loss.texture_weight:
            self.T = TextureDiscriminator()
            self.trunk = ShiftTolerantTrunk(
                stlpips_convolutions(*stlpips_state()), device=self.device, dtype=self.dtype
            )
        self.face: FaceFeatures | None = None
        if self.config.loss.needs_encoder():
            if not isinstance(self.encoder, FaceNet):
                raise ValueError("method cvae-gan reads FaceNet's features; no other encoder has them")
            self.face = FaceFeatures(self.encoder)

    def calibrate(self, images: Tensor) -> None:
        """Scale the features of FaceNet and AlexNet to unit size on these photos."""
        if self.trunk is not None:
            with torch.no_grad():
                self.T.calibrate(self._textures(to_x(images.to(self.device))))
        if self.face is not None:
            with torch.no_grad():
                features = self.face.shallow(to_x(images.to(self.device)), self.config.loss.identity_size)
            self.F.calibrate(features)

    # --- the step -----------------------------------------------------------------------------------------------------

    def _generate(self, x_real: Tensor, c: Tensor, z: Tensor, cur_nimg: int) -> CVAEGANStep:
        loss, batch = self.config.loss, len(x_real)
        coded = evenly_spread(batch, loss.coded_fraction, self.device)
        posterior = None
        if len(coded):
            mean, log_variance = posterior = self.E(x_real[coded].to(self.dtype))
            z = z.index_copy(0, coded, mean + (0.5 * log_variance).exp() * z[coded])
        x = self.G(z.to(self.dtype), c)
        step = CVAEGANStep(cur_nimg, x_real, c, z, x, coded=coded, posterior=posterior)
        count = max(1, round(batch * max(loss.feature_fraction, loss.identity_fraction)))
        step.features, step.real_features = self._features(x[:count], x_real[:count], cur_nimg)
        return step

    def _features(self, x: Tensor, x_real: Tensor, cur_nimg: int) -> tuple[Features | None, Features | None]:
        """FaceNet's features of generated images and of photos, at one side, both mirrored or neither. The photos'
        features have no gradient. None for those that no loss needs."""
        loss = self.config.loss
        if self.face is None:
            return None, None
        size, mirrored = self._draw_view(cur_nimg)
        if mirrored:
            x, x_real = x.flip(3), x_real.flip(3)
        features = self.F.scaled(self.face.shallow(x, size))
        if not (loss.feature_weight or loss.feature_match or loss.perceptual_weight):
            return features, None
        with torch.no_grad():
            return features, self.F.scaled(self.face.shallow(x_real, size))

    def _augmented(self, x: Tensor, cur_nimg: int, use: int) -> Tensor:
        """Images as D sees them; each `use` within a step draws other changes."""
        loss = self.config.loss
        if not loss.augment or self.budget_used >= loss.augment_until:
            return x
        return augment(x, loss.augment, step_generator(self.config.seed + 2 + use, cur_nimg, self.device))

    # --- the discriminators' loss -------------------------------------------------------------------------------------

    def _discriminator_terms(self, step: CVAEGANStep) -> Iterator[Term]:
        loss = self.config.loss
        if loss.adversarial_weight:
            yield "D_adversarial", 1.0, self._pixel_loss(step)
        if self.trunk is not None:
            yield "T_adversarial", 1.0, self._texture_loss(step)
        if step.features is None or step.real_features is None:
            return
        fake, real = (step.features[0].detach(), step.features[1].detach()), step.real_features
        if loss.feature_weight:
            depths = zip(self.F(real), self.F(fake), strict=True)
            yield (
                "F_adversarial",
                1.0,
                torch.stack([losses.hinge_real(a) + losses.hinge_fake(b) for a, b in depths]).mean(),
            )
        if loss.feature_match:
            yield "F_match", 1.0, self._feature_match_loss(fake[1], real[1], step.c[: len(real[1])], step.log)

    def _pixel_loss(self, step: CVAEGANStep) -> Tensor:
        """D's loss: photos with their embeddings against generated images and photos with another person's."""
        loss, c, batch = self.config.loss, step.c, len(step.c)
        x = self._augmented(torch.cat([step.x_real, step.x.detach()]), step.cur_nimg, 0)
        logits, features, patches = self.D.read(x.to(self.dtype))
        joint = logits + self.D.match(features, torch.cat([c, c]))
        total = losses.hinge_real(joint[:batch]) + (1 - loss.mismatch) * losses.hinge_fake(joint[batch:])
        step.log["D_real_logits"], step.log["D_fake_logits"] = joint[:batch].mean(), joint[batch:].mean()
        if loss.mismatch:
            wrong = logits[:batch] + self.D.match(features[:batch], c.roll(1, 0))
            total = total + loss.mismatch * losses.hinge_fake(wrong)
            step.log["D_wrong_logits"] = wrong.mean()
        if loss.patch_weight:
            patch = losses.hinge_real(patches[:batch]) + losses.hinge_fake(patches[batch:])
            total = total + loss.patch_weight * patch
        return total

    def _textures(self, x: Tensor) -> list[Tensor]:
        """AlexNet's features of images, as T reads them."""
        assert self.trunk is not None
        features = self.trunk.features(x)
        return [features[layer] for layer in self.T.LAYERS]

    def _texture_count(self, step: CVAEGANStep) -> int:
        return max(1, round(len(step.x) * self.config.loss.texture_fraction))

    def _texture_loss(self, step: CVAEGANStep) -> Tensor:
        """T's loss, on images that are augmented as those of D."""
        count = self._texture_count(step)
        x = self._augmented(torch.cat([step.x_real[:count], step.x[:count].detach()]), step.cur_nimg, 2)
        with torch.no_grad():
            features = self._textures(x)
        depths = [losses.hinge_real(logits[:count]) + losses.hinge_fake(logits[count:]) for logits in self.T(features)]
        return torch.stack(depths).mean()

    def _feature_match_loss(self, fake: Tensor, real: Tensor, c: Tensor, log: dict[str, Tensor]) -> Tensor:
        """F's loss on pairs of features and embedding: photos with theirs, against generated images and photos with
        another person's."""
        right, wrong, generated = self.F.match(real, c), self.F.match(real, c.roll(1, 0)), self.F.match(fake, c)
        log["F_real_match"], log["F_wrong_match"], log["F_fake_match"] = right.mean(), wrong.mean(), generated.mean()
        return losses.hinge_real(right) + 0.5 * (losses.hinge_fake(generated) + losses.hinge_fake(wrong))

    # --- the generator's loss -----------------------------------------------------------------------------------------

    def _generator_terms(self, step: CVAEGANStep) -> Iterator[Term]:
        loss, c, coded = self.config.loss, step.c, step.coded
        if step.posterior is not None:
            yield "G_kl", loss.kl_weight, losses.kl_normal(*step.posterior, loss.kl_free)
        if loss.adversarial_weight:
            logits, features, patches = self.D.read(self._augmented(step.x, step.cur_nimg, 1).to(self.dtype))
            yield "G_adversarial", loss.adversarial_weight, losses.hinge_generator(logits + self.D.match(features, c))
            if loss.patch_weight:
                yield "G_patch", loss.adversarial_weight * loss.patch_weight, losses.hinge_generator(patches)
        if self.trunk is not None:
            x = self._augmented(step.x[: self._texture_count(step)], step.cur_nimg, 3)
            textures = [losses.hinge_generator(logits) for logits in self.T(self._textures(x))]
            yield "G_texture", loss.texture_weight, torch.stack(textures).mean()
        if step.features is not None:
            if loss.feature_weight:
                patches_of_depths = [losses.hinge_generator(logits) for logits in self.F(step.features)]
                yield "G_features", loss.feature_weight, torch.stack(patches_of_depths).mean()
            if loss.feature_match:
                match = self.F.match(step.features[1], c[: len(step.features[1])])
                yield "G_match", loss.feature_match, losses.hinge_generator(match)
        if loss.mse_weight and len(coded):
            error = losses.reconstruction(step.x[coded], step.x_real[coded], loss.mse_size)
            yield "G_mse", losses.mse_weight(loss, step.cur_nimg), error
        if step.features is not None:
            yield from self._face_terms(step, step.features)
        if loss.second_weight and self.second is not None:
            yield "G_second", loss.second_weight, self._second_loss(step, self.second)

    def _face_terms(self, step: CVAEGANStep, features: Features) -> Iterator[Term]:
        """Perceptual distance and identity loss, of FaceNet's features."""
        loss, count = self.config.loss, len(features[1])
        if loss.perceptual_weight and step.real_features is not None and len(step.coded):
            among = step.coded[: evenly_spread_count(count, loss.coded_fraction)]
            fake, real = ([f[among] for f in both] for both in (features, step.real_features))
            yield "G_perceptual", loss.perceptual_weight, losses.feature_distance(fake, real)
        weight = losses.identity_weight(loss, step.cur_nimg)
        if weight and self.face is not None:
            # An image with posterior latents has its photo as target. FaceNet's cosine is higher for frontal faces, so
            # the identity loss on such an image would work against the pose in its latents.
            chosen = prior_first(count, step.coded)[: max(1, round(len(step.c) * loss.identity_fraction))]
            embedding = self.face.rest(features[1][chosen] / self.F.scale[1].to(features[1].dtype))
            yield "G_identity", weight, losses.identity(embedding, step.c[chosen])

    def _second_loss(self, step: CVAEGANStep, encoder: SecondEncoder) -> Tensor:
        """The identity loss of the second encoder, on images of sampled noise, in a crop that varies from step to step.

        An image whose latents come from the posterior encoder has the pose of its photo; the target, half of which is
        the mean of other photos, would work against it. Without targets in the step, the photos' own embeddings are.
        """
        count = max(1, round(len(step.x) * self.config.loss.second_fraction))
        chosen = prior_first(len(step.x), step.coded)[:count]
        draw = step_generator(self.config.seed + 9, step.cur_nimg)  # on the host: these decide shapes, not values
        jitter = (2 * torch.rand(3, generator=draw) - 1).tolist()
        x = step.x[chosen]
        x = x.flip(3) if bool(torch.rand((), generator=draw) < 0.5) else x
        left, top, side = (SECOND_JITTER * value for value in jitter)
        if step.second is not None:
            target = step.second[chosen]
        else:
            with torch.no_grad():
                target = encoder.embed(step.x_real[chosen])
        return losses.identity(encoder.embed(x, (left, top, side)), target)


def prior_first(count: int, coded: Tensor) -> Tensor:
    """The first `count` indices of a batch, those that are not in `coded` before those that are."""
    indices = torch.arange(count, device=coded.device)
    return indices[torch.isin(indices, coded).long().argsort(stable=True)]


def evenly_spread_count(batch: int, fraction: float) -> int:
    """How many of the first `batch` indices evenly_spread() chooses."""
    return math.ceil(batch * fraction - 1e-6)


def evenly_spread(batch: int, fraction: float, device: torch.device | str = "cpu") -> Tensor:
    """Indices of a `fraction` of a batch, evenly spread, so that any first part of the batch has its share of them."""
    count = evenly_spread_count(batch, fraction)
    return (torch.arange(count, device=device) / max(fraction, 1e-6) + 1e-4).long()

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
from vultus.training.parts import Part, Rows, evenly_spread, evenly_spread_count, first, prior_first
from vultus.training.step import Method, Step, Term, step_generator

SECOND_JITTER = 0.016  # of the place and side of the second encoder's crop, in images: 2 pixels of 128
Features = tuple[Tensor, Tensor]  # shallow [N, 192, s, s] and deep [N, 256, t, t], at unit size


@dataclass
class CVAEGANStep(Step):
    """A step with posterior latents and features.

    Attributes:
        coded: indices of the images whose latents come from the posterior encoder.
        all_c: the embeddings of the whole batch, of which `c` are this process's.
        posterior: mean and log variance [len(coded), z_dim] of their posterior; None without any.
        features: FaceNet's features of the first images of the batch, with gradient; None where no loss needs them.
        real_features: those of the photos, without gradient; None where no loss needs them.
    """

    coded: Tensor = field(kw_only=True)
    all_c: Tensor = field(kw_only=True)
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

    def _order(self, batch: int) -> Tensor:
        return prior_first(batch, evenly_spread(batch, self.config.loss.coded_fraction))

    def _subsets(self, batch: int) -> dict[str, Tensor]:
        loss = self.config.loss
        coded = evenly_spread(batch, loss.coded_fraction)
        subsets = {"coded_fraction": coded}
        if self.face is not None:
            read = first(batch, max(loss.feature_fraction, loss.identity_fraction))
            subsets |= {
                "feature_fraction": read,
                "perceptual_weight": coded[: evenly_spread_count(len(read), loss.coded_fraction)],
                # An image with posterior latents has its photo as target. FaceNet's cosine is higher for frontal faces,
                # so the identity loss on such an image would work against the pose in its latents.
                "identity_fraction": prior_first(len(read), coded)[: len(first(batch, loss.identity_fraction))],
            }
        if self.trunk is not None:
            subsets["texture_fraction"] = first(batch, loss.texture_fraction)
        if self.second is not None:
            subsets["second_fraction"] = prior_first(batch, coded)[: len(first(batch, loss.second_fraction))]
        return subsets

    # --- the step -----------------------------------------------------------------------------------------------------

    def _generate(
        self, part: Part, x_real: Tensor, c: Tensor, facenet: Tensor, z: Tensor, cur_nimg: int
    ) -> CVAEGANStep:
        coded = part["coded_fraction"].rows
        posterior = None
        if len(coded):
            mean, log_variance = posterior = self.E(x_real[coded].to(self.dtype))
            z = z.index_copy(0, coded, mean + (0.5 * log_variance).exp() * z[coded])
        x = self.G(z.to(self.dtype), c)
        all_c = c if part.processes == 1 else part.joined(self.processes.concatenated(c))
        step = CVAEGANStep(cur_nimg, part, x_real, c, facenet, z, x, coded=coded, all_c=all_c, posterior=posterior)
        if self.face is not None:
            count = len(part["feature_fraction"])
            step.features, step.real_features = self._features(self.face, x[:count], x_real[:count], cur_nimg)
        return step

    def _features(
        self, face: FaceFeatures, x: Tensor, x_real: Tensor, cur_nimg: int
    ) -> tuple[Features, Features | None]:
        """FaceNet's features of generated images and of photos, at one side, both mirrored or neither. The photos'
        features have no gradient, and are None if no loss needs them."""
        loss = self.config.loss
        size, mirrored = self._draw_view(cur_nimg)
        if mirrored:
            x, x_real = x.flip(3), x_real.flip(3)
        features = self.F.scaled(face.shallow(x, size))
        if not (loss.feature_weight or loss.feature_match or loss.perceptual_weight):
            return features, None
        with torch.no_grad():
            return features, self.F.scaled(face.shallow(x_real, size))

    def _augmented(self, x: Tensor, cur_nimg: int, use: int, rows: Rows | None = None) -> Tensor:
        """Images as D sees them; each `use` within a step draws other changes. `rows`: see augment()."""
        loss = self.config.loss
        if not loss.augment or self.budget_used >= loss.augment_until:
            return x
        return augment(x, loss.augment, step_generator(self.config.seed + 2 + use, cur_nimg, self.device), rows)

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
        share = step.part["feature_fraction"].share
        if loss.feature_weight:
            depths = zip(self.F(real), self.F(fake), strict=True)
            hinge = [losses.hinge_real(a) + losses.hinge_fake(b) for a, b in depths]
            yield "F_adversarial", 1.0, share * torch.stack(hinge).mean()
        if loss.feature_match:
            yield "F_match", 1.0, self._feature_match_loss(step, fake[1], real[1])

    def _pixel_loss(self, step: CVAEGANStep) -> Tensor:
        """D's loss: photos with their embeddings against generated images and photos with another person's."""
        loss, c, batch = self.config.loss, step.c, len(step.c)
        both = torch.cat([step.x_real, step.x.detach()])
        x = self._augmented(both, step.cur_nimg, 0, step.part.first(step.part.batch, times=2))
        logits, features, patches = self.D.read(x.to(self.dtype))
        joint = logits + self.D.match(features, torch.cat([c, c]))
        total = losses.hinge_real(joint[:batch]) + (1 - loss.mismatch) * losses.hinge_fake(joint[batch:])
        step.log["D_real_logits"], step.log["D_fake_logits"] = joint[:batch].mean(), joint[batch:].mean()
        if loss.mismatch:
            wrong = logits[:batch] + self.D.match(features[:batch], step.part.of(step.all_c.roll(1, 0)))
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

    def _texture_loss(self, step: CVAEGANStep) -> Tensor:
        """T's loss, on images that are augmented as those of D."""
        seen = step.part["texture_fraction"]
        count = len(seen)
        pair = torch.cat([step.x_real[:count], step.x[:count].detach()])
        x = self._augmented(pair, step.cur_nimg, 2, step.part.first(seen.count, times=2))
        with torch.no_grad():
            features = self._textures(x)
        depths = [losses.hinge_real(logits[:count]) + losses.hinge_fake(logits[count:]) for logits in self.T(features)]
        return seen.share * torch.stack(depths).mean()

    def _feature_match_loss(self, step: CVAEGANStep, fake: Tensor, real: Tensor) -> Tensor:
        """F's loss on pairs of features and embedding: photos with theirs, against generated images and photos with
        another person's."""
        read = step.part["feature_fraction"]
        c, others = step.c[: len(read)], step.part.of(step.all_c[: read.count].roll(1, 0))
        right, wrong, generated = self.F.match(real, c), self.F.match(real, others), self.F.match(fake, c)
        for name, logits in (("real", right), ("wrong", wrong), ("fake", generated)):
            step.log[f"F_{name}_match"] = read.share * logits.mean()
        hinge = losses.hinge_real(right) + 0.5 * (losses.hinge_fake(generated) + losses.hinge_fake(wrong))
        return read.share * hinge

    # --- the generator's loss -----------------------------------------------------------------------------------------

    def _generator_terms(self, step: CVAEGANStep) -> Iterator[Term]:
        loss, c, part = self.config.loss, step.c, step.part
        coded = part["coded_fraction"]
        if step.posterior is not None:
            kl = losses.kl_normal(*step.posterior, loss.kl_free, lambda own: self.processes.mean(coded.share * own))
            yield "G_kl", loss.kl_weight, coded.share * kl
        if loss.adversarial_weight:
            x = self._augmented(step.x, step.cur_nimg, 1, part.first(part.batch))
            logits, features, patches = self.D.read(x.to(self.dtype))
            yield "G_adversarial", loss.adversarial_weight, losses.hinge_generator(logits + self.D.match(features, c))
            if loss.patch_weight:
                yield "G_patch", loss.adversarial_weight * loss.patch_weight, losses.hinge_generator(patches)
        if self.trunk is not None:
            seen = part["texture_fraction"]
            x = self._augmented(step.x[: len(seen)], step.cur_nimg, 3, part.first(seen.count))
            textures = [losses.hinge_generator(logits) for logits in self.T(self._textures(x))]
            yield "G_texture", loss.texture_weight, seen.share * torch.stack(textures).mean()
        if step.features is not None:
            share = part["feature_fraction"].share
            if loss.feature_weight:
                patches_of_depths = [losses.hinge_generator(logits) for logits in self.F(step.features)]
                yield "G_features", loss.feature_weight, share * torch.stack(patches_of_depths).mean()
            if loss.feature_match:
                match = self.F.match(step.features[1], c[: len(step.features[1])])
                yield "G_match", loss.feature_match, share * losses.hinge_generator(match)
        if loss.mse_weight and len(coded):
            error = losses.reconstruction(step.x[coded.rows], step.x_real[coded.rows], loss.mse_size)
            yield "G_mse", losses.mse_weight(loss, step.cur_nimg), coded.share * error
        if step.features is not None:
            yield from self._face_terms(step, step.features)
        if loss.second_weight and self.second is not None:
            yield "G_second", loss.second_weight, self._second_loss(step, self.second)

    def _face_terms(self, step: CVAEGANStep, features: Features) -> Iterator[Term]:
        """Perceptual distance and identity loss, of FaceNet's features."""
        loss, part = self.config.loss, step.part
        compared, read = part["perceptual_weight"], part["identity_fraction"]
        if loss.perceptual_weight and step.real_features is not None and len(compared):
            fake, real = ([f[compared.rows] for f in both] for both in (features, step.real_features))
            yield "G_perceptual", loss.perceptual_weight, compared.share * losses.feature_distance(fake, real)
        weight = losses.identity_weight(loss, step.cur_nimg)
        if weight and self.face is not None:
            embedding = self.face.rest(features[1][read.rows] / self.F.scale[1].to(features[1].dtype))
            yield "G_identity", weight, read.share * losses.identity(embedding, step.facenet[read.rows])

    def _second_loss(self, step: CVAEGANStep, encoder: SecondEncoder) -> Tensor:
        """The identity loss of the second encoder, on images of sampled noise, in a crop that varies from step to step.

        An image whose latents come from the posterior encoder has the pose of its photo; the target, half of which is
        the mean of other photos, would work against it. Without targets in the step, the photos' own embeddings are.
        """
        read = step.part["second_fraction"]
        draw = step_generator(self.config.seed + 9, step.cur_nimg)  # on the host: these decide shapes, not values
        jitter = (2 * torch.rand(3, generator=draw) - 1).tolist()
        x = step.x[read.rows]
        x = x.flip(3) if bool(torch.rand((), generator=draw) < 0.5) else x
        left, top, side = (SECOND_JITTER * value for value in jitter)
        if step.second is not None:
            target = step.second[read.rows]
        else:
            with torch.no_grad():
                target = encoder.embed(step.x_real[read.rows])
        return read.share * losses.identity(encoder.embed(x, (left, top, side)), target)

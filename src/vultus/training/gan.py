"""Method `gan`: a conditional GAN with the non-saturating loss, a reconstruction error and an identity loss."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from vultus.config import GANConfig, to_dict
from vultus.models.discriminators import build_discriminator
from vultus.models.generators import build_generator
from vultus.training import losses
from vultus.training.parts import Part, first
from vultus.training.step import Method, Step, Term


class GAN(Method[GANConfig, Step]):
    """Generator and discriminator on pairs of image and embedding; arguments as of Method."""

    def _build(self) -> None:
        self.G = build_generator(**to_dict(self.config.generator))
        self.D = build_discriminator(**to_dict(self.config.discriminator))

    def _subsets(self, batch: int) -> dict[str, Tensor]:
        if self.encoder is None:
            return {}
        return {"identity_fraction": first(batch, self.config.loss.identity_fraction)}

    def _generate(self, part: Part, x_real: Tensor, c: Tensor, facenet: Tensor, z: Tensor, cur_nimg: int) -> Step:
        return Step(cur_nimg, part, x_real, c, facenet, z, self.G(z.to(self.dtype), c))

    def _discriminator_terms(self, step: Step) -> Iterator[Term]:
        loss = self.config.loss
        if loss.adversarial_weight:
            real_logits = self.D(step.x_real.to(self.dtype), step.c)
            fake_logits = self.D(step.x.detach().to(self.dtype), step.c)
            step.log["D_real_logits"], step.log["D_fake_logits"] = real_logits.mean(), fake_logits.mean()
            yield "D_adversarial", 1.0, losses.bce_discriminator(real_logits, fake_logits, loss.label_smoothing)

    def _generator_terms(self, step: Step) -> Iterator[Term]:
        loss = self.config.loss
        if loss.adversarial_weight:
            fake_logits = self.D(step.x.to(self.dtype), step.c)
            yield "G_adversarial", loss.adversarial_weight, losses.bce_generator(fake_logits)
        if loss.mse_weight:
            error = losses.reconstruction(step.x, step.x_real, loss.mse_size)
            yield "G_mse", losses.mse_weight(loss, step.cur_nimg), error
        weight = losses.identity_weight(loss, step.cur_nimg)
        if weight and self.encoder is not None:
            read = step.part["identity_fraction"]
            count = len(read)
            size, mirrored = self._draw_view(step.cur_nimg)
            embedding = self.encoder.embed(step.x[:count].flip(3) if mirrored else step.x[:count], size)
            yield "G_identity", weight, read.share * losses.identity(embedding, step.facenet[:count])

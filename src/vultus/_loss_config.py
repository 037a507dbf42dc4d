"""The settings of the losses, as frozen dataclasses; a part of config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from vultus._ranges import ImagesOrNone, Range, Share, Weight

Pixels = Annotated[int, Range(0, 4_096)]
CodedSide = Annotated[int, Range(32, 128, power_of_two=True)]


@dataclass(frozen=True)
class LossConfig:
    """The loss terms that all methods share. A weight of 0 leaves a term out, and its cost.

    Attributes:
        adversarial_weight: weight of the adversarial loss in the generator's loss.
        mse_weight: weight of the mean squared error against the photo that the embedding was computed from (method
            `cvae-gan`: of the images whose latents come from the posterior encoder).
        mse_size: side at which that error is computed, after averaging both images down; 0 is full size.
        mse_nimg: images over which mse_weight falls linearly to a tenth; 0 keeps it constant.
        identity_weight: weight of 1 - cosine between the target embedding and that of the generated image.
        identity_start: its weight at the first image, from where it changes linearly to identity_weight.
        identity_nimg: images over which it changes; 0 uses identity_weight from the start.
        identity_size: side at which FaceNet reads the image for this loss. Every step draws a side near it and whether
            the image is mirrored, so that a pattern tuned to one sampling grid does not lower the loss.
        identity_sizes: number of sides to draw from, 8 pixels apart, with identity_size in their middle.
        identity_fraction: part of the batch that the identity loss is computed on. Images whose latents come from the
            posterior encoder are the last to be chosen.
    """

    adversarial_weight: Weight = 1.0
    mse_weight: Weight = 0.0
    mse_size: Pixels = 0
    mse_nimg: ImagesOrNone = 0
    identity_weight: Weight = 0.0
    identity_start: Weight = 0.0
    identity_nimg: ImagesOrNone = 0
    identity_size: Annotated[int, Range(32, 1_024)] = 96
    identity_sizes: Annotated[int, Range(1, 64)] = 5
    identity_fraction: Share = 0.5

    def needs_encoder(self) -> bool:
        """Whether FaceNet is part of the training."""
        return bool(self.identity_weight or self.identity_start)

    def second_encoder_name(self) -> str:
        """The second face encoder that is part of the training, or `none`."""
        return "none"

    def encoders(self) -> list[str]:
        """The face encoders that are part of the training, by their names in metrics. They judge nothing of it."""
        second = self.second_encoder_name()
        return ["facenet"] * self.needs_encoder() + [second] * (second != "none")


@dataclass(frozen=True)
class GANLossConfig(LossConfig):
    """Loss terms of method `gan`: the non-saturating loss (binary cross-entropy).

    Attributes:
        label_smoothing: the discriminator's target for photos is 1 minus this.
    """

    label_smoothing: Share = 0.0


@dataclass(frozen=True)
class CVAEGANLossConfig(LossConfig):
    """Loss terms of method `cvae-gan`: the hinge loss, a posterior encoder and a feature discriminator.

    Attributes:
        coded_fraction: part of the batch whose latents come from the posterior encoder, and which is compared with the
            source photo.
        coded_size: side at which the posterior encoder reads the photo, a power of two from 32 to 128.
        kl_weight: weight of the KL divergence between the posterior and the normal prior, in nats.
        kl_free: nats of each latent that cost nothing ("free bits", Kingma et al. 2016, arXiv:1606.04934).
        perceptual_weight: weight of the distance between FaceNet's features of such an image and of its source photo.
        mismatch: share of the discriminator's fake loss that goes to photos with another person's embedding.
        patch_weight: weight of the patch logits, in the losses of both networks.
        feature_weight: weight of the feature discriminator, which sees FaceNet's features only.
        feature_match: weight of its conditional logits, of features and embedding together.
        feature_fraction: part of the batch on which FaceNet's features are computed.
        texture_weight: weight of a discriminator of AlexNet's features (see models/alexnet.py), which sees the whole
            image, hair and background included.
        texture_fraction: part of the batch that it sees.
        second_encoder: a face encoder besides FaceNet whose identity loss is computed on images of sampled noise:
            `mobilefacenet`, or `dlib` (which then judges nothing). Its target is halfway between the source photo and
            the mean of the person's other training photos; in a stream it is the source photo alone.
        second_weight: weight of that loss.
        second_fraction: part of the batch that it is computed on.
        augment: probability that an image is shifted before the discriminator sees it, and that a square is cut out.
        augment_until: share of the run's budget after which images are no longer augmented. Augmentation keeps the
            discriminator from memorising its photos, and costs realism at the end.
    """

    coded_fraction: Share = 0.0
    coded_size: CodedSide = 32
    kl_weight: Weight = 0.0
    kl_free: Weight = 0.0
    perceptual_weight: Weight = 0.0
    mismatch: Share = 0.0
    patch_weight: Weight = 0.0
    feature_weight: Weight = 0.0
    feature_match: Weight = 0.0
    feature_fraction: Share = 0.5
    texture_weight: Weight = 0.0
    texture_fraction: Share = 0.5
    second_encoder: Literal["none", "mobilefacenet", "dlib"] = "none"
    second_weight: Weight = 0.0
    second_fraction: Share = 0.25
    augment: Share = 0.0
    augment_until: Share = 1.0

    def needs_encoder(self) -> bool:
        """Whether FaceNet is part of the training."""
        return super().needs_encoder() or bool(self.perceptual_weight or self.feature_weight or self.feature_match)

    def second_encoder_name(self) -> str:
        """The second face encoder that is part of the training, or `none`."""
        return self.second_encoder if self.second_weight else "none"

"""Named training runs, and how they change with the resolution and the budget.

The results below each preset: 2,527 photos of 118 unseen people (CelebA), two noise vectors each, by `vultus evaluate`;
trained on 14,035 photos at 128x128, seed 0. Times are of one core of an Intel Xeon (AVX512) unless said otherwise.
docs/results.md has all results, with intervals.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from vultus._loss_config import CVAEGANLossConfig, GANLossConfig
from vultus.config import (
    CVAEGANConfig,
    DiscriminatorConfig,
    GANConfig,
    GeneratorConfig,
    LoaderConfig,
    OptimConfig,
    TrainConfig,
)
from vultus.errors import UserError

N = TypeVar("N", GeneratorConfig, DiscriminatorConfig)

REFERENCE_MSE = GANConfig(
    preset="reference-mse",
    generator=GeneratorConfig(projection=256),
    loss=GANLossConfig(mse_weight=10.0, label_smoothing=0.1),
    optim=OptimConfig(batch=32),
    loader=LoaderConfig(max_images=5_000),
    epochs=10,
)
"""The first reference system: strong MSE and BCE, 5,000 photos, 10 epochs.

    vultus train --preset reference-mse --data data/celeba --out runs/reference-mse

54 minutes. FaceNet cosine 0.318; dlib at FAR 1e-3, type I / II 5.1 / 3.1 %; Frechet distance (EfficientNet-lite0) 285;
ST-LPIPS over noise 0.063.
"""

REFERENCE_DCGAN = GANConfig(
    preset="reference-dcgan",
    loss=GANLossConfig(mse_weight=10.0, label_smoothing=0.1),
    optim=OptimConfig(batch=64),
    epochs=2,
)
"""The second reference system: DCGAN on embedding and noise side by side, all photos, 2 epochs.

    vultus train --preset reference-dcgan --data data/celeba --out runs/reference-dcgan

26 minutes. FaceNet cosine 0.258; dlib, type I / II 1.5 / 0.7 %; Frechet distance 370; ST-LPIPS over noise 0.028.
"""

DCGAN_IDENTITY = GANConfig(
    preset="dcgan-identity",
    generator=GeneratorConfig(projection=256),
    loss=GANLossConfig(
        mse_weight=10.0, mse_nimg=60_000, label_smoothing=0.1, identity_weight=0.5, identity_fraction=0.25
    ),
    optim=OptimConfig(batch=32),
    loader=LoaderConfig(mirror=True),
    epochs=7,
)
"""DCGAN networks with an identity loss: a step between the reference systems and `vultus-cpu`.

    vultus train --preset dcgan-identity --data data/celeba --out runs/dcgan-identity --images 51200

62 minutes. FaceNet cosine 0.537; dlib, type I / II 32 / 15 %; Frechet distance 289; ST-LPIPS over noise 0.075.
"""

VULTUS_CPU = CVAEGANConfig(
    preset="vultus-cpu",
    generator=GeneratorConfig(kind="conditional-norm", max_width=256, projection=256, fine_width=16),
    discriminator=DiscriminatorConfig(kind="projection", base_width=48, max_width=256, projection=256, fine_width=16),
    loss=CVAEGANLossConfig(
        mse_weight=10.0,
        mse_size=64,
        identity_weight=4.0,
        identity_start=1.0,
        identity_nimg=10_000,
        identity_size=148,
        identity_sizes=4,
        identity_fraction=0.375,
        coded_fraction=0.5,
        kl_weight=0.01,
        perceptual_weight=4.0,
        mismatch=0.3,
        patch_weight=0.5,
        feature_weight=1.0,
        feature_match=1.0,
        feature_fraction=1.0,
        second_encoder="mobilefacenet",
        second_weight=4.0,
        augment=0.6,
        augment_until=0.9,
    ),
    optim=OptimConfig(lr=6e-4, beta2=0.99, batch=16, ema_nimg=20_000, ema_rampup=0.1),
    loader=LoaderConfig(mirror=True),
    epochs=20,
)
"""The recipe, for a CPU: hinge loss on pixels, patches and FaceNet's features; half of each batch is a conditional
variational autoencoder. One narrow stage computes at 128x128, all others at 64x64 and below; 6 images of 16 pass
through all of FaceNet, 4 through MobileFaceNet.

    vultus train --preset vultus-cpu --data data/celeba --out runs/vultus-cpu --images 180000

12 to 15 images/s on two cores of an AMD EPYC (AVX512-BF16, no AMX), bfloat16: four hours. The embedded snapshot is such
a run in three parts (docs/recipe.md): 183,712 images, FaceNet cosine 0.883; dlib, type I / II 97 / 57 %; Frechet
distance 46; ST-LPIPS over noise 0.199.
"""

VULTUS_BASE = replace(
    VULTUS_CPU,
    preset="vultus-base",
    generator=replace(VULTUS_CPU.generator, base_width=64, max_width=512, projection=512, fine_width=32),
    discriminator=replace(VULTUS_CPU.discriminator, base_width=96, max_width=512, projection=512, fine_width=32),
    loss=replace(VULTUS_CPU.loss, identity_nimg=40_000, identity_fraction=0.5, second_fraction=0.5),
    optim=replace(VULTUS_CPU.optim, lr=4e-4, batch=64, ema_nimg=80_000),
    epochs=200,
    log_every_nimg=6_400,
    sample_every_nimg=64_000,
    checkpoint_every_nimg=64_000,
)
"""The same for one GPU: wider networks, larger batches, schedules in proportion to the length of the run.

    vultus train --preset vultus-base --data data/celeba --out runs/vultus-base --hours 0.5

Not measured yet: it has been run for a few steps on a CPU only.
"""

TINY = GANConfig(
    preset="tiny",
    generator=GeneratorConfig(resolution=32, base_width=16, max_width=64, projection=64),
    discriminator=DiscriminatorConfig(resolution=32, base_width=16, max_width=64, projection=64),
    loss=GANLossConfig(mse_weight=10.0, label_smoothing=0.1),
    optim=OptimConfig(batch=16, ema_nimg=200),
    epochs=4,
    log_every_nimg=160,
    sample_every_nimg=800,
    checkpoint_every_nimg=800,
)
"""32x32, for `vultus demo`: a training of one minute on faces that the embedded snapshot generates."""

PRESETS: dict[str, TrainConfig] = {
    preset.preset: preset for preset in (REFERENCE_MSE, REFERENCE_DCGAN, DCGAN_IDENTITY, VULTUS_CPU, VULTUS_BASE, TINY)
}


def get_preset(name: str) -> TrainConfig:
    """The preset of that name. Raises UserError that lists the presets for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"preset {name}: no such preset; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def fitted(config: TrainConfig, resolution: int, images: int | None = None, c_dim: int | None = None) -> TrainConfig:
    """The same run at another resolution, for a budget of `images` and embeddings of `c_dim` numbers where these are
    known.

    - Above the preset's resolution the widths of the finest stages halve with each doubling, so that an image costs
      twice as much and not four times; below it the widths stay.
    - The error against the photo is computed at the same share of the full size.
    - In a short run the identity weight reaches its final value after 40 % of the images at the latest.
    """
    scale = resolution / config.generator.resolution
    generator, discriminator, loss = config.generator, config.discriminator, config.loss
    narrower = max(1, round(scale))
    schedule = loss.identity_nimg if images is None else min(loss.identity_nimg, round(0.4 * images))
    return replace(
        config,
        generator=replace(narrowed(generator, resolution, narrower), c_dim=c_dim or generator.c_dim),
        discriminator=replace(narrowed(discriminator, resolution, narrower), c_dim=c_dim or discriminator.c_dim),
        loss=replace(loss, mse_size=round(loss.mse_size * scale), identity_nimg=schedule),
    )


def narrowed(network: N, resolution: int, divisor: int) -> N:
    """A network of that resolution. Its finest stages have fewer channels: at least 8, or 4 at full resolution."""
    fine_width = max(4, network.fine_width // divisor) if network.fine_width else 0
    base_width = max(8, network.base_width // divisor)
    return replace(network, resolution=resolution, base_width=base_width, fine_width=fine_width)

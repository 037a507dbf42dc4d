"""What a training run is made of: frozen dataclasses, and the presets.

The fields of a network's config are its constructor's keyword arguments and the `generator` object of a published
snapshot. Progress, and every schedule, is counted in images seen (`*_nimg`), so a run means the same at any batch size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_type_hints

from vultus.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class GeneratorConfig:
    """Keyword arguments of `networks.build_generator`.

    Attributes:
        kind: `dcgan` (transposed convolutions, batch-norm) or `residual` (no normalisation, modulated blocks).
        resolution: side of the pictures in pixels, a power of two from 32.
        z_dim: length of the noise vector.
        c_dim: length of the face embedding.
        base_width: channels at the finest stage; each coarser one has twice as many.
        max_width: where the doubling stops.
        projection: width to which embedding and noise are projected first; 0 feeds them as they are.
    """

    kind: Literal["dcgan", "residual"] = "dcgan"
    resolution: int = 128
    z_dim: int = 100
    c_dim: int = 512
    base_width: int = 32
    max_width: int = 512
    projection: int = 0


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Keyword arguments of `networks.build_discriminator`; as in GeneratorConfig. `projection` must be positive."""

    kind: Literal["dcgan", "residual"] = "dcgan"
    resolution: int = 128
    c_dim: int = 512
    base_width: int = 32
    max_width: int = 512
    projection: int = 128


@dataclass(frozen=True)
class LossConfig:
    """The terms of the losses. A weight of 0 leaves a term out, with its cost.

    Attributes:
        adversarial: `bce` (non-saturating) or `relativistic` (paired real and fake).
        adversarial_weight: its weight in the generator's loss.
        warmup_nimg: reconstruction alone for so many images: the layout of a face is learned fast, and before there is
            one the identity loss only finds patterns that fool FaceNet.
        label_smoothing: the real label is 1 minus this (bce).
        gamma: weight of the zero-centred gradient penalties on real and fake pictures, R1 + R2.
        penalty_every: they are computed every this many steps, with their weight multiplied by as much.
        mse_weight: weight of the reconstruction error against the photo that the embedding came from.
        mse_size: side at which that error is taken (pictures are averaged down to it); 0 is full size.
        mse_nimg: images over which mse_weight falls to a tenth; 0 keeps it.
        identity_weight: weight of 1 - cosine between the embedding asked for and that of the picture made.
        identity_size: side at which FaceNet reads the picture for this loss; every step draws one within 16 pixels of
            it and flips a coin for the mirror image, so that no pattern tuned to one sampling pays.
        identity_fraction: part of the batch it is computed on.
    """

    adversarial: Literal["bce", "relativistic"] = "bce"
    adversarial_weight: float = 1.0
    warmup_nimg: int = 0
    label_smoothing: float = 0.0
    gamma: float = 0.0
    penalty_every: int = 4
    mse_weight: float = 0.0
    mse_size: int = 0
    mse_nimg: int = 0
    identity_weight: float = 0.0
    identity_size: int = 96
    identity_fraction: float = 0.5


@dataclass(frozen=True)
class OptimConfig:
    """Adam for both networks, and the moving average of the generator.

    Attributes:
        lr: learning rate of both networks.
        beta1, beta2: Adam's.
        batch: images in a step.
        ema_nimg: half-life of the average in images.
        ema_rampup: the half-life is at most this share of the images seen: short at first, so that a short run is
            not averaged with its beginning.
    """

    lr: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    batch: int = 64
    ema_nimg: int = 2_000
    ema_rampup: float = 0.05


@dataclass(frozen=True)
class LoaderConfig:
    """Which images, in which order.

    Attributes:
        max_images: use a random subset of this many training images, drawn by `seed`; 0 uses all.
        mirror: flip each picture with probability one half.
    """

    max_images: int = 0
    mirror: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        preset: the preset that the rest started from.
        epochs: length of the run in passes over the data, where no other budget is given.
        seed: seeds weights, order of the data and noise.
        dtype: what the networks compute in; `auto` takes bfloat16 where it is measured to be faster.
        log_every_nimg: a line of statistics.
        sample_every_nimg: a grid of samples and a measurement on unseen people.
        checkpoint_every_nimg: a checkpoint and a snapshot.
        keep: checkpoints kept.
    """

    preset: str = ""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    epochs: float = 1.0
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every_nimg: int = 640
    sample_every_nimg: int = 6_400
    checkpoint_every_nimg: int = 6_400
    keep: int = 2


REFERENCE_MSE = TrainConfig(
    preset="reference-mse",
    generator=GeneratorConfig(projection=256),
    loss=LossConfig(mse_weight=10.0, label_smoothing=0.1),
    optim=OptimConfig(batch=32),
    loader=LoaderConfig(max_images=5_000),
    epochs=10,
)

REFERENCE_DCGAN = TrainConfig(
    preset="reference-dcgan",
    loss=LossConfig(mse_weight=10.0, label_smoothing=0.1),
    optim=OptimConfig(batch=64),
    epochs=2,
)

DCGAN_IDENTITY = TrainConfig(
    preset="dcgan-identity",
    generator=GeneratorConfig(projection=256),
    loss=LossConfig(mse_weight=10.0, mse_nimg=60_000, label_smoothing=0.1, identity_weight=0.5, identity_fraction=0.25),
    optim=OptimConfig(batch=32),
    loader=LoaderConfig(mirror=True),
    epochs=7,
)

TINY = TrainConfig(
    preset="tiny",
    generator=GeneratorConfig(resolution=32, base_width=16, max_width=64, projection=64),
    discriminator=DiscriminatorConfig(resolution=32, base_width=16, max_width=64, projection=64),
    loss=LossConfig(mse_weight=10.0, label_smoothing=0.1),
    optim=OptimConfig(batch=16, ema_nimg=200),
    epochs=4,
    log_every_nimg=160,
    sample_every_nimg=800,
    checkpoint_every_nimg=800,
)

PRESETS = {preset.preset: preset for preset in (REFERENCE_MSE, REFERENCE_DCGAN, DCGAN_IDENTITY, TINY)}


def get_preset(name: str) -> TrainConfig:
    """The preset of that name. Raises UserError that lists the names there are."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: no such preset; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str, at: str = "") -> T:
    """The strict inverse of to_dict: an unknown key or a value of another type raises UserError that names it."""
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {at + key}; known are {', '.join(sorted(known))}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {at + key} must be an object of settings, not {value!r}")
            given[key] = from_dict(hint, value, where, f"{at}{key}.")  # type: ignore[arg-type]
        else:
            given[key] = _checked(value, hint, where, at + key)
    return cls(**given)


def _checked(value: Any, hint: Any, where: str, key: str) -> Any:
    choices = getattr(hint, "__args__", None)
    if choices is not None:
        if value not in choices:
            raise UserError(f"{where}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: {key} must be of type {hint.__name__}, not {value!r}")
    return value


def differences(a: dict[str, Any], b: dict[str, Any], at: str = "") -> list[str]:
    """The dotted keys in which two nested config dicts differ."""
    found: list[str] = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{at}{key}.")
        elif left != right:
            found.append(at + key)
    return found


def with_resolution(config: TrainConfig, resolution: int) -> TrainConfig:
    """The same run at the resolution of the data."""
    return replace(
        config,
        generator=replace(config.generator, resolution=resolution),
        discriminator=replace(config.discriminator, resolution=resolution),
    )

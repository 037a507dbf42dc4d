"""What a training run is made of: frozen dataclasses. presets.py has the runs worth repeating.

The fields of a network's config are its constructor's keyword arguments and the `generator` object of a published
snapshot. Progress, and every schedule, is counted in images seen (`*_nimg`), so a run means the same at any batch size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from vultus._files import read_json
from vultus.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class GeneratorConfig:
    """Keyword arguments of `networks.build_generator`.

    Attributes:
        kind: `dcgan` (transposed convolutions, batch-norm), `residual` (no normalisation, modulated blocks) or
            `conditional-norm` (residual blocks under batch-norm that embedding and noise scale and shift).
        resolution: side of the pictures in pixels, a power of two from 32.
        z_dim: length of the noise vector.
        c_dim: length of the face embedding.
        base_width: channels at the finest stage; each coarser one has twice as many.
        max_width: where the doubling stops.
        projection: width to which embedding and noise are projected first; 0 feeds them as they are (not in
            `conditional-norm`).
    """

    kind: Literal["dcgan", "conditional-norm"] = "dcgan"
    resolution: int = 128
    z_dim: int = 100
    c_dim: int = 512
    base_width: int = 32
    max_width: int = 512
    projection: int = 0


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Keyword arguments of `networks.build_discriminator`; as in GeneratorConfig. `projection` must be positive.

    Attributes:
        kind: `dcgan` or `residual`, or `projection` (strided convolutions that also judge patches), which method
            `coded` needs.
    """

    kind: Literal["dcgan", "projection"] = "dcgan"
    resolution: int = 128
    c_dim: int = 512
    base_width: int = 32
    max_width: int = 512
    projection: int = 128


@dataclass(frozen=True)
class LossConfig:
    """The terms of the losses. A weight of 0 leaves a term out, with its cost.

    Attributes:
        adversarial: `bce` (non-saturating), `relativistic` (paired real and fake) or `hinge`.
        adversarial_weight: its weight in the generator's loss.
        warmup_nimg: reconstruction alone for so many images: the layout of a face is learned fast, and before there is
            one the identity loss only finds patterns that fool FaceNet.
        label_smoothing: the real label is 1 minus this (bce).
        gamma: weight of the zero-centred gradient penalties on real and fake pictures, R1 + R2.
        penalty_every: they are computed every this many steps, with their weight multiplied by as much.
        mse_weight: weight of the reconstruction error against the photo that the embedding came from (method `coded`:
            of the pictures whose noise was read from it).
        mse_size: side at which that error is taken (pictures are averaged down to it); 0 is full size.
        mse_nimg: images over which mse_weight falls to a tenth; 0 keeps it.
        identity_weight: weight of 1 - cosine between the embedding asked for and that of the picture made.
        identity_start: its weight at the first image, from where it goes to identity_weight in a straight line.
        identity_nimg: images over which it does; 0 takes identity_weight from the start.
        identity_size: side at which FaceNet reads the picture for this loss; every step draws one near it and flips a
            coin for the mirror image, so that no pattern tuned to one sampling pays.
        identity_sizes: how many sides there are to draw from, 8 pixels apart, with identity_size in their middle.
        identity_fraction: part of the batch it is computed on; pictures whose noise was read from a photo come last.
        coded_fraction: part of the batch whose noise is read from the photo itself, and which is compared with it.
        kl_weight: weight of what that noise says beyond plain noise, in nats.
        perceptual_weight: weight of the difference between FaceNet's features of such a picture and of its photo.
        mismatch: share of the discriminator's made side that goes to real photos with another person's embedding.
        patch_weight: weight of the judgement of single patches, in both losses.
        feature_weight: weight of the discriminator that sees pictures through FaceNet's features only.
        feature_match: weight of its judgement of features and embedding together.
        feature_fraction: part of the batch on which FaceNet's features are computed.
        augment: probability that a picture is shifted before D sees it, and that a square of it is cut out.
        augment_until: share of the run after which D sees pictures as they are: shifts and squares keep D from learning
            its photos by heart on the way, and cost realism at the end. By the budget, as optim.lr_fall.
    """

    adversarial: Literal["bce", "relativistic", "hinge"] = "bce"
    adversarial_weight: float = 1.0
    warmup_nimg: int = 0
    label_smoothing: float = 0.0
    gamma: float = 0.0
    penalty_every: int = 4
    mse_weight: float = 0.0
    mse_size: int = 0
    mse_nimg: int = 0
    identity_weight: float = 0.0
    identity_start: float = 0.0
    identity_nimg: int = 0
    identity_size: int = 96
    identity_sizes: int = 5
    identity_fraction: float = 0.5
    # Of method `coded` alone:
    coded_fraction: float = 0.0
    kl_weight: float = 0.0
    perceptual_weight: float = 0.0
    mismatch: float = 0.0
    patch_weight: float = 0.0
    feature_weight: float = 0.0
    feature_match: float = 0.0
    feature_fraction: float = 0.5
    augment: float = 0.0
    augment_until: float = 1.0

    def needs_encoder(self) -> bool:
        """Whether FaceNet is part of the training."""
        names = ("identity_weight", "identity_start", "perceptual_weight", "feature_weight", "feature_match")
        return any(getattr(self, name) for name in names)


@dataclass(frozen=True)
class OptimConfig:
    """Adam for both networks, and the moving average of the generator.

    Attributes:
        lr: learning rate of both networks.
        lr_fall: share of the run, at its end, over which the rate falls to a twentieth in a straight line; 0 keeps it.
            A longer budget on going on lets it rise again. With a budget in hours it follows the clock.
        beta1, beta2: Adam's.
        batch: images in a step.
        ema_nimg: half-life of the average in images.
        ema_rampup: the half-life is at most this share of the images seen: short at first, so that a short run is
            not averaged with its beginning.
    """

    lr: float = 2e-4
    lr_fall: float = 0.0
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
        method: `gan` (gan.py: a conditional GAN) or `coded` (coded.py: one whose noise is, for part of each batch, read
            from the photo).
        epochs: length of the run in passes over the data, where no other budget is given.
        seed: seeds weights, order of the data and noise.
        dtype: what the networks compute in; `auto` takes bfloat16 where it is measured to be faster.
        log_every_nimg: a line of statistics.
        sample_every_nimg: a grid of samples and a measurement on unseen people.
        checkpoint_every_nimg: a checkpoint and a snapshot.
        keep: checkpoints kept.
    """

    preset: str = ""
    method: Literal["gan", "coded"] = "gan"
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


UNUSED = {
    "gan": (
        "coded_fraction",
        "kl_weight",
        "perceptual_weight",
        "mismatch",
        "augment",
        "patch_weight",
        "feature_weight",
        "feature_match",
    ),
    "coded": ("warmup_nimg", "label_smoothing", "gamma"),
}


def check_method(config: TrainConfig) -> None:
    """Raise UserError that names the setting if the parts of a run do not go together."""
    method, loss = config.method, config.loss
    for name in UNUSED[method]:
        if getattr(loss, name):
            raise UserError(f"loss.{name} is not a part of method {method}; leave it out")
    if method == "coded" and loss.adversarial != "hinge":
        raise UserError(f"method coded takes loss.adversarial hinge, not {loss.adversarial}")
    if method == "coded" and config.discriminator.kind != "projection":
        raise UserError(f"method coded takes discriminator.kind projection, not {config.discriminator.kind}")
    if config.generator.kind == "conditional-norm" and config.generator.projection < 2:
        raise UserError(f"generator.projection is {config.generator.projection}; kind conditional-norm needs 2 or more")
    for name in ("identity_fraction", "coded_fraction", "mismatch", "feature_fraction", "augment", "augment_until"):
        if not 0 <= getattr(loss, name) <= 1:
            raise UserError(f"loss.{name} is {getattr(loss, name)}; it must lie between 0 and 1")
    if loss.identity_sizes < 1:
        raise UserError(f"loss.identity_sizes is {loss.identity_sizes}; it must be 1 or more")
    if not 0 <= config.optim.lr_fall <= 1:
        raise UserError(f"optim.lr_fall is {config.optim.lr_fall}; it must lie between 0 and 1")


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


def read_run_config(path: Path) -> dict[str, Any]:
    """config.json of a run folder: {"config": ..., "data": ...}. Raises UserError that names the file."""
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), dict) for key in ("config", "data")):
        raise UserError(f"{path}: not the config of a run; give the --out of vultus train")
    return record

"""The settings of a training run as frozen dataclasses. presets.py has named runs.

A method (`gan`, `cvae-gan`) has its own config class and its own loss settings, so a setting that the method does not
use cannot be given. The fields of a network's config are the keyword arguments of its constructor, and the `generator`
object in a snapshot's metadata. Progress, and every schedule, is counted in images seen (`*_nimg`), so that a run means
the same at any batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from vultus._loss_config import CVAEGANLossConfig, GANLossConfig, LossConfig
from vultus._ranges import (
    Count,
    Epochs,
    Images,
    ImagesOrNone,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    Side,
    checked,
)
from vultus.errors import UserError

T = TypeVar("T")
Length = Annotated[int, Range(1, 65_536)]  # of a vector
Width = Annotated[int, Range(1, 8_192)]  # channels
Projection = Annotated[int, Range(0, 65_536)]
FineWidth = Annotated[int, Range(0, 1_024)]  # channels; 0: none
NoiseMaps = Annotated[int, Range(0, 64)]
MIN_FACE_SIZE = 75  # side from which every layer of FaceNet has an output


@dataclass(frozen=True)
class GeneratorConfig:
    """Keyword arguments of `models.generators.build_generator`.

    Attributes:
        kind: `dcgan` (transposed convolutions, batch normalisation) or `conditional-norm` (residual blocks whose batch
            normalisation is scaled and shifted by embedding and noise).
        resolution: side of the images in pixels, a power of two from 32.
        z_dim: length of the noise vector.
        c_dim: length of the face embedding.
        base_width: channels at the finest stage; each coarser stage has twice as many.
        max_width: upper limit of the channels of a stage.
        projection: width to which embedding and noise are projected first; 0 uses them without a projection (`dcgan`
            only).
        noise_maps: so many maps of 8x8 are part of the noise (`conditional-norm` only), 64 numbers of z_dim each; they
            vary parts of the image, the rest of the noise varies all of it.
        fine_width: channels of a stage at the full resolution (`conditional-norm` only); 0 computes at half the
            resolution and shuffles the last features to pixels.
    """

    kind: Literal["dcgan", "conditional-norm"] = "dcgan"
    resolution: Side = 128
    z_dim: Length = 100
    c_dim: Length = 512
    base_width: Width = 32
    max_width: Width = 512
    projection: Projection = 0
    noise_maps: NoiseMaps = 0
    fine_width: FineWidth = 0


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Keyword arguments of `models.discriminators.build_discriminator`; as in GeneratorConfig. `projection` must be
    positive.

    Attributes:
        kind: `dcgan`, or `projection` (a projection discriminator that also has logits for patches), which method
            `cvae-gan` needs.
        fine_width: channels of a stage at the full resolution (`projection` only); 0 shuffles the pixels to half of it.
    """

    kind: Literal["dcgan", "projection"] = "dcgan"
    resolution: Side = 128
    c_dim: Length = 512
    base_width: Width = 32
    max_width: Width = 512
    projection: Length = 128
    fine_width: FineWidth = 0


@dataclass(frozen=True)
class OptimConfig:
    """Adam for both networks, and the moving average of the generator.

    Attributes:
        lr: learning rate of both networks.
        beta1, beta2: Adam's.
        batch: images in a step.
        ema_nimg: half-life of the average in images.
        ema_rampup: the half-life is at most this share of the images seen, so that the average of a short run does not
            contain its beginning.
    """

    lr: Annotated[float, Range(0, 1, above=True)] = 2e-4
    beta1: ShareBelowOne = 0.5
    beta2: ShareBelowOne = 0.999
    batch: Count = 64
    ema_nimg: ImagesOrNone = 2_000
    ema_rampup: Share = 0.05


@dataclass(frozen=True)
class LoaderConfig:
    """Which images are read.

    Attributes:
        max_images: use a random subset of this many training images, drawn by `seed`; 0 uses all.
        mirror: flip each image with probability one half.
    """

    max_images: ImagesOrNone = 0
    mirror: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what all methods share. Build the class of a method, see CONFIGS.

    Attributes:
        preset: name of the preset that the settings started from.
        method: how it is trained; each method has a config class.
        epochs: length of the run in passes over the data, where no other budget is given.
        seed: seeds weights, order of the data and noise.
        dtype: what the networks compute in; `auto` takes bfloat16 where it is measured to be faster.
        log_every_nimg: images between two lines of statistics.
        sample_every_nimg: images between two sample sheets, and between two validations on unseen people.
        checkpoint_every_nimg: images between two checkpoints, each with a snapshot.
        keep: number of checkpoints that are kept; 0 keeps all.
    """

    preset: str = ""
    method: str = ""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    epochs: Epochs = 1.0
    seed: Seed = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every_nimg: Images = 640
    sample_every_nimg: Images = 6_400
    checkpoint_every_nimg: Images = 6_400
    keep: Annotated[int, Range(0, 10_000)] = 2


@dataclass(frozen=True)
class GANConfig(TrainConfig):
    """Settings of method `gan`, see training/gan.py."""

    method: Literal["gan"] = "gan"
    loss: GANLossConfig = field(default_factory=GANLossConfig)


@dataclass(frozen=True)
class CVAEGANConfig(TrainConfig):
    """Settings of method `cvae-gan`, see training/cvae_gan.py."""

    method: Literal["cvae-gan"] = "cvae-gan"
    loss: CVAEGANLossConfig = field(default_factory=CVAEGANLossConfig)


CONFIGS: dict[str, type[TrainConfig]] = {"gan": GANConfig, "cvae-gan": CVAEGANConfig}
ALIASES = {"coded": "cvae-gan"}  # names of methods in earlier versions

# Settings of earlier versions that this one no longer has, with the value at which they did nothing.
REMOVED: dict[str, Any] = {
    "loss.adversarial": None,  # each method has one adversarial loss
    "loss.gamma": 0.0,
    "loss.penalty_every": None,  # without gamma it had no effect
    "loss.warmup_nimg": 0,
    "optim.lr_fall": 0.0,
}
ADVERSARIAL = {"gan": "bce", "cvae-gan": "hinge"}  # what `loss.adversarial` said in earlier versions


def method_name(name: str) -> str:
    """The current name of a method. Raises UserError that lists the methods for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in CONFIGS:
        raise UserError(f"method {name}: no such method; there are {', '.join(CONFIGS)}")
    return name


def check_config(config: TrainConfig) -> None:
    """Raise UserError that names the setting if a value is out of range or two settings do not go together."""
    from_dict(type(config), to_dict(config), "settings")  # a config built in Python has not been checked yet
    generator, discriminator, loss = config.generator, config.discriminator, config.loss
    if config.method == "cvae-gan" and discriminator.kind != "projection":
        raise UserError(f"method cvae-gan takes --discriminator.kind projection, not {discriminator.kind}")
    if generator.kind == "conditional-norm" and generator.projection < 2:
        raise UserError(f"--generator.projection is {generator.projection}; kind conditional-norm needs 2 or more")
    for name, part, kind in (
        ("generator.noise_maps", generator, "conditional-norm"),
        ("generator.fine_width", generator, "conditional-norm"),
        ("discriminator.fine_width", discriminator, "projection"),
    ):
        value = getattr(part, name.partition(".")[2])
        if value and part.kind != kind:
            raise UserError(f"--{name} is {value}; kind {part.kind} has none, use kind {kind} or 0")
    if generator.z_dim <= 64 * generator.noise_maps:
        raise UserError(
            f"--generator.z_dim is {generator.z_dim}; with --generator.noise_maps {generator.noise_maps} it must be "
            f"more than {64 * generator.noise_maps}"
        )
    for name in ("resolution", "c_dim"):
        ours, theirs = getattr(generator, name), getattr(discriminator, name)
        if ours != theirs:
            raise UserError(
                f"--generator.{name} is {ours} but --discriminator.{name} is {theirs}; give both networks the same"
            )
    smallest = loss.identity_size - 4 * (loss.identity_sizes - 1)
    if loss.needs_encoder() and smallest < MIN_FACE_SIZE:
        raise UserError(
            f"--loss.identity_size {loss.identity_size} with --loss.identity_sizes {loss.identity_sizes} goes down to "
            f"{smallest} pixels; FaceNet needs {MIN_FACE_SIZE} or more"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """The strict inverse of to_dict: an unknown key or a value of another type raises UserError that names it.

    `where` names the source of the values in messages; `prefix` is what the keys of this level are preceded by.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: settings are a mapping of keys and values, not {values!r:.60}")
    hints = get_type_hints(cls, include_extras=True)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            owner = next((name for name, config in CONFIGS.items() if _loss_class(config) is cls), None)
            unknown = f"unknown key {prefix}{key}; known are {', '.join(sorted(known))}"
            raise UserError(f"{where}: {why_unknown(f'{prefix}{key}', owner) or unknown}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix + key} must be a mapping of settings, not {value!r:.60}")
            given[key] = from_dict(hint, value, where, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            given[key] = checked(value, hint, f"{where}: {prefix + key}")
    return cls(**given)


def setting_types(cls: type[Any], prefix: str = "") -> dict[str, Any]:
    """The type of every setting of a config class, by its dotted key; see _ranges.py."""
    types: dict[str, Any] = {}
    for key, hint in get_type_hints(cls, include_extras=True).items():
        types |= setting_types(hint, f"{prefix}{key}.") if is_dataclass(hint) else {prefix + key: hint}  # type: ignore[arg-type]
    return types


def train_config(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A run from nested plain values, as to_dict gives them: the strict from_dict of the class of their `method`."""
    method = values.get("method", "gan")
    if not isinstance(method, str):
        raise UserError(f"{where}: method must be one of {', '.join(CONFIGS)}, not {method!r}")
    try:
        method = method_name(method)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return from_dict(CONFIGS[method], {**values, "method": method}, where)


def with_method(config: TrainConfig, method: str) -> TrainConfig:
    """The same run by another method: settings that both have are kept, the others get their defaults."""
    cls = CONFIGS[method_name(method)]
    if isinstance(config, cls):
        return config
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("method", "loss")}
    loss_class = _loss_class(cls)
    shared = {f.name: getattr(config.loss, f.name) for f in fields(loss_class) if hasattr(config.loss, f.name)}
    return cls(**values, loss=loss_class(**shared))


def merged(config: TrainConfig, settings: Mapping[str, Any], where: str) -> TrainConfig:
    """`config` with other settings: nested, or by dotted keys ({"optim.lr": 1e-4}).

    A `method` among them chooses the config class. Raises UserError that names an unknown key or a wrong type.
    """
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = str(key).split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise UserError(f"{where}: {key} is given beside a value for {parent}")
        if isinstance(value, Mapping) and isinstance(level.get(last), dict):
            level[last].update(value)
        else:
            level[last] = dict(value) if isinstance(value, Mapping) else value
    config = with_method(config, str(nested.pop("method", config.method)))
    values = to_dict(config)
    for key, value in nested.items():
        inside = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if inside else value
    return train_config(values, where)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config dict with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two nested config dicts differ."""
    keys: list[str] = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            keys.append(prefix + key)
    return keys


def why_unknown(key: str, method: str | None) -> str:
    """Why a dotted key is not a setting of `method`, or "" where the key was never one of any method."""
    if key in REMOVED:
        return f"{key}: this version no longer has it; leave it out"
    others = [name for name, config in CONFIGS.items() if key in loss_keys(config)]
    if method and others and method not in others:
        return f"{key} is not a setting of method {method}; leave it out"
    return ""


def _loss_class(config: type[TrainConfig]) -> type[LossConfig]:
    cls: type[LossConfig] = get_type_hints(config)["loss"]
    return cls


def loss_keys(config: type[TrainConfig]) -> set[str]:
    """The dotted keys of the loss settings of a config class."""
    return {f"loss.{f.name}" for f in fields(_loss_class(config))}

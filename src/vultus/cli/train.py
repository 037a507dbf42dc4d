"""The command `train`: its options are the fields of the config of a method."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from vultus._ranges import Hours, Images, checked, from_text, parts
from vultus._yaml import parse_yaml, read_yaml
from vultus.cli.options import ArgumentParser, add_typed
from vultus.cli.setting_help import SECTIONS, attribute_texts, setting_help
from vultus.config import CONFIGS, flat, merged, method_name, setting_types, to_dict, why_unknown
from vultus.data.stream.options import StreamOptions, option_name, stream_types
from vultus.errors import UserError
from vultus.presets import PRESETS, get_preset

T = TypeVar("T")

# Options that are not settings of the run. They may stand in a file of --config too.
OPTIONS: dict[str, tuple[Any, str]] = {
    "preset": (str, f"one of {', '.join(PRESETS)}"),
    "method": (str, f"one of {', '.join(CONFIGS)}; each has settings of its own"),
    "data": (
        str,
        "prepared data set; or a source to stream: hf://user/name[@revision], https://host/path/*.parquet, or Parquet "
        "files on a disk",
    ),
    "out": (str, "run folder; a run that is there is resumed"),
    "init": (str | None, "run folder whose last checkpoint gives the weights to begin with"),
    "hours": (Hours | None, "budget: hours of training, all sessions together"),
    "images": (Images | None, "budget: images seen"),
    "device": (str, "auto, cuda, mps or cpu"),
    "track": (str, "tensorboard, wandb, trackio (extra `track`)"),
    "project": (str, "project of the run in the trackers"),
}
DEFAULTS: dict[str, Any] = {"device": "auto", "project": "vultus", "track": []}
# Options of a stream, which may stand in a file too.
STREAM = {name: (hint, attribute_texts(StreamOptions)[name]) for name, hint in stream_types().items()}
OPTIONS |= STREAM
Given = list[tuple[str, str, Any]]  # source as messages name it ("--" or "FILE: "), key, value; in their order


def train_command(arguments: Sequence[str]) -> int:
    """Train a generator; in each process that torchrun started, or in this one."""
    from vultus.training.processes import joined

    with joined():
        return _train(arguments)


def _train(arguments: Sequence[str]) -> int:
    from vultus.data.dataset import PreparedDataset
    from vultus.training import launch
    from vultus.training.processes import current
    from vultus.training.resume import check_side

    parsed = _parser(_all_settings()).parse_args(list(arguments))
    given: Given = parsed.given
    options = DEFAULTS | {key: value for _, key, value in given if key in OPTIONS}
    method = None if options.get("method") is None else _named(given, "method", method_name)
    # The length of a run may be a setting in a file, which a budget on the command line replaces.
    budgets = [key for key in ("hours", "images") if options.get(key) is not None]
    budgets += ["epochs"] if any((source, key) == ("--", "epochs") for source, key, _ in given) else []
    launch.check_budgets([f"--{name}" for name in budgets])
    stream = {name: options[name] for name in STREAM if name in options}
    dataset = None
    if parsed.help or parsed.print_config:
        with contextlib.suppress(UserError):
            dataset = PreparedDataset(options.get("data", ""), None)
    else:
        for name in ("data", "out"):
            if name not in options:
                raise UserError(f"--{name} is required (see vultus train --help)")
        if "preset" in options:
            _named(given, "preset", get_preset)  # a wrong name is reported before a wrong folder
        dataset = launch.open_data(
            options["data"],
            stream,
            preset=options.get("preset"),
            out=None if parsed.fresh else options["out"],
            device=options["device"],
        )
        check_side(dataset)
    start = launch.base_config(
        options.get("preset"),
        method=method,
        out=None if parsed.fresh else options.get("out"),
        resolution=dataset.resolution if dataset else options.get("resolution"),
        images=options.get("images"),
        c_dim=dataset.manifest["encoder"]["dim"] if dataset else None,
    )
    if parsed.help:
        defaults = flat(to_dict(start)) | {"preset": launch.DEFAULT_PRESET, **DEFAULTS}
        defaults |= {name: getattr(StreamOptions, name) for name in STREAM}
        _parser(setting_types(type(start)), defaults).print_help()
        raise SystemExit(0)
    settings = {}
    for source, key, value in given:
        if key not in OPTIONS:
            if reason := why_unknown(key, start.method):
                raise UserError(source + reason)
            settings[key] = value
    config = merged(start, settings, "settings")
    if parsed.print_config:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return 0
    assert dataset is not None
    path = launch.run(
        config,
        dataset,
        out=options["out"],
        images=options.get("images"),
        hours=options.get("hours"),
        device=options["device"],
        track=options["track"],
        project=options["project"],
        fresh=parsed.fresh,
        dry_run=parsed.dry_run,
        init=options.get("init"),
    )
    if not parsed.dry_run and current().main:
        print(path)
    return 0


def _named(given: Given, key: str, find: Callable[[str], T]) -> T:
    """What `find` returns for the last value of `key`. Raises UserError that says where the name was given."""
    source, _, name = [each for each in given if each[1] == key][-1]
    try:
        return find(name)
    except UserError as error:
        raise UserError(f"{source}{error}") from None


def _all_settings() -> dict[str, Any]:
    """The types of the settings of all methods, by dotted key."""
    types: dict[str, Any] = {}
    for config in CONFIGS.values():
        types |= setting_types(config)
    return {key: hint for key, hint in types.items() if key not in OPTIONS}


def _parser(settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> ArgumentParser:
    """A parser that collects the options in `given`; with `defaults`, one that shows them in its help."""
    parser = ArgumentParser(
        prog="vultus train",
        usage="vultus train --data DATA --out OUT [OPTIONS] [SETTINGS]",
        description="Train a generator.",
        why_unknown=lambda key: why_unknown(key, None),
        add_help=False,
    )
    parser.set_defaults(given=[])
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    parser.add_argument("--config", action=_File, help="YAML file of settings, which replace those of the preset")
    parser.add_argument(
        "--fresh", action="store_true", help="start over: move the run in --out into a sub-folder of it"
    )
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML for --config, and exit")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    shown = defaults or {}
    stream = parser.add_argument_group("stream", "where --data names a source that is read as the training goes")
    for key, (kind, text) in OPTIONS.items():
        more: dict[str, Any] = {"nargs": "+"} if key == "track" else {}
        if kind is bool:
            more = {"nargs": "?", "const": True}
        note = " (required)" if key in ("data", "out") else ""
        default = shown.get(key, argparse.SUPPRESS)
        names = dict.fromkeys((option_name(key), f"--{key}"))
        more |= {"action": _Set, "metavar": key.upper(), "default": default, "help": text + note, "dest": key}
        if key in STREAM:
            add_typed(stream.add_argument, *names, type=kind, **more)
        else:
            parser.add_argument(*names, type=kind, **more)
    texts = setting_help()
    for section, title in SECTIONS.items():
        group = parser.add_argument_group(title)
        if section:
            group.add_argument(f"--{section}", action=_Section, metavar="FILE", help="YAML file of these settings")
        for key, hint in settings.items():
            if key.rpartition(".")[0] == section and key not in OPTIONS:
                plain = parts(hint)[0] in (int, float)
                more = {"metavar": key.rpartition(".")[2].upper()} if plain else {}
                add_typed(
                    group.add_argument,
                    f"--{key}",
                    type=hint,
                    action=_Set,
                    default=shown.get(key, argparse.SUPPRESS),
                    help=texts.get(key, ""),
                    **more,
                )
    return parser


class _Set(argparse.Action):
    """Adds an option to `given`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Take the value."""
        namespace.given = [*namespace.given, ("--", self.dest, values)]


class _File(argparse.Action):
    """Adds the options in a YAML file to `given`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file."""
        namespace.given = [*namespace.given, *_entries(read_yaml(values), f"{values}: ")]


class _Section(argparse.Action):
    """Adds the settings of a section, in a YAML file or in the option itself ("{lr: 1e-4}"), to `given`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Read them."""
        option = self.option_strings[0]
        section = parse_yaml(values, option) if values.lstrip().startswith("{") else read_yaml(values)
        namespace.given = [*namespace.given, *_entries(section, f"{option} {values}: ", f"{option[2:]}.")]


def _entries(values: Any, source: str, prefix: str = "") -> Given:
    """The settings in a value that was read from YAML, nested or with dotted keys, checked."""
    if not isinstance(values, Mapping):
        found = {type(None): "nothing", list: "a list", str: "text"}.get(type(values), "a number")
        raise UserError(f"{source}settings as `key: value` are needed, but there is {found}")
    types = _all_settings() | {key: hint for key, (hint, _) in OPTIONS.items()}
    given: Given = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in SECTIONS:
            given += _entries(value, f"{source}{key}: " if not isinstance(value, Mapping) else source, f"{key}.")
        elif key == "track":
            given.append((source, key, [checked(each, str, f"{source}{key}") for each in _listed(value)]))
        elif key in types:
            if value is None and key in OPTIONS:
                continue
            if isinstance(value, float) and value.is_integer() and parts(types[key])[0] is int:
                value = int(value)  # YAML has 1e6 as a float
            convert = from_text if isinstance(value, str) else checked
            given.append((source, key, convert(value, types[key], f"{source}{key}")))
        else:
            known = ", ".join(sorted(key for key in types if key.startswith(prefix)))
            raise UserError(source + (why_unknown(key, None) or f"unknown key {key}; known are {known}"))
    return given


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

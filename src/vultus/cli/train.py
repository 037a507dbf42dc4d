"""The command `train`: its options are the fields of the config of a method."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from vultus.config import CONFIGS, TrainConfig, method_name, to_dict, train_config, why_unknown
from vultus.errors import UserError
from vultus.presets import PRESETS

# Options that decide which others there are, and their defaults.
DECISIVE: dict[str, type] = {"preset": str, "method": str, "data": str, "out": str, "images": int}


def train_command(arguments: Sequence[str]) -> int:
    """Train a generator."""
    from vultus.data.dataset import PreparedDataset
    from vultus.training import launch

    first = _first_options(arguments)
    dataset = None
    with contextlib.suppress(UserError):  # --help, or an error that is reported below, after those of the options
        dataset = PreparedDataset(first.data or "", None)
    start = launch.base_config(
        first.preset,
        method=first.method,
        out=first.out,
        resolution=dataset.resolution if dataset else None,
        images=first.images,
    )
    given = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    unknown = [("--", why_unknown(name, start.method)) for name in given]
    unknown += [("--config: ", why_unknown(name, start.method)) for name in first.in_files]
    for prefix, reason in unknown:
        if reason:
            raise UserError(prefix + reason)
    options = train_parser(start, launch.DEFAULT_PRESET).parse_args(list(arguments))
    launch.check_budgets([f"--{name}" for name in ("hours", "images", "epochs") if name in given])
    values = {key: value for key, value in options.as_dict().items() if key in to_dict(start)}
    config = train_config(values | {"preset": start.preset, "method": start.method}, "settings")
    path = launch.run(
        config,
        dataset or PreparedDataset(options.data, None),
        out=options.out,
        images=options.images,
        hours=options.hours,
        device=options.device,
        track=options.track,
        project=options.project,
    )
    print(path)
    return 0


def train_parser(start: TrainConfig, default_preset: str) -> ArgumentParser:
    """The parser for the settings of the method of `start`, whose values are the defaults."""
    parser = ArgumentParser(prog="vultus train", exit_on_error=False, description="Train a generator.")
    parser.add_argument("--preset", type=str, default=default_preset, help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", action="config", help="YAML file of settings, which replace those of the preset")
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument("--out", type=str, required=True, help="run folder; a run that is there is resumed")
    parser.add_argument("--hours", type=float, help="budget: hours of training, all sessions together")
    parser.add_argument("--images", type=int, help="budget: images seen")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--track", type=str, nargs="+", default=[], help="tensorboard, wandb, trackio (extra `track`)")
    parser.add_argument("--project", type=str, default="vultus", help="project of the run in the trackers")
    parser.add_argument("--method", type=str, help=f"one of {', '.join(CONFIGS)}; each has settings of its own")
    parser.add_class_arguments(type(start), skip={"preset", "method"})
    parser.set_defaults({key: value for key, value in to_dict(start).items() if key != "preset"})
    return parser


def _first_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options in DECISIVE, from the command and its YAML files; in `in_files`, the dotted keys in the files."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, kind in DECISIVE.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--config", action=_FromFile)
    parser.set_defaults(in_files=[])
    options = parser.parse_known_args(arguments)[0]
    if options.method is not None:
        options.method = method_name(options.method)
    return options


class _FromFile(argparse.Action):
    """Takes the options that the parser knows from a YAML file. What is wrong with it, the whole parser reports."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Enter the file's values into the namespace."""
        import yaml  # type: ignore[import-untyped]

        try:
            with open(values, encoding="utf-8") as file:
                settings = yaml.safe_load(file)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return
        for key, value in settings.items() if isinstance(settings, dict) else ():
            namespace.in_files += [f"{key}.{name}" for name in value] if isinstance(value, dict) else [str(key)]
            if key in DECISIVE and isinstance(value, DECISIVE[key]):
                setattr(namespace, key, value)

"""The verb `train` of the command line: its options are the fields of the config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from vultus._files import read_json
from vultus.cli.common import device_named, open_facenet
from vultus.config import TrainConfig, check_method, from_dict, to_dict
from vultus.errors import UserError
from vultus.presets import PRESETS, fitted, get_preset

DEFAULT_PRESET = "vultus-cpu"


def _train_parser(preset: TrainConfig) -> ArgumentParser:
    parser = ArgumentParser(prog="vultus train", exit_on_error=False, description="Train a generator.")
    parser.add_argument("--preset", type=str, default=DEFAULT_PRESET, help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", action="config", help="YAML file of settings, laid over the preset")
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument("--out", type=str, required=True, help="run folder; one begun before is gone on with")
    parser.add_argument("--hours", type=float, help="budget: hours of training, all sessions together")
    parser.add_argument("--images", type=int, help="budget: images seen")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--track", type=str, nargs="+", default=[], help="tensorboard, wandb, trackio (extra `track`)")
    parser.add_argument("--project", type=str, default="vultus", help="what the trackers file the run under")
    parser.add_class_arguments(TrainConfig, skip={"preset"})
    parser.set_defaults({key: value for key, value in to_dict(preset).items() if key != "preset"})
    return parser


def _start(arguments: Sequence[str]) -> TrainConfig:
    """The preset, as it is for the resolution of the data and the budget, or the settings of the run that is gone on
    with. What else is asked for is laid over it."""
    from vultus.data.dataset import PreparedDataset

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--data")
    first.add_argument("--out")
    first.add_argument("--images", type=int)
    asked = first.parse_known_args(arguments)[0]
    preset = get_preset(asked.preset or DEFAULT_PRESET)
    begun = Path(asked.out or "") / "config.json"
    if begun.is_file():
        config = from_dict(TrainConfig, read_json(begun)["config"], str(begun))
        if asked.preset in (None, config.preset):
            return config
    try:
        return fitted(preset, PreparedDataset(asked.data or "").resolution, asked.images)
    except UserError:
        return preset  # --help, or an error that is named later, after those of the options


def train_command(arguments: Sequence[str]) -> int:
    """Train a generator."""
    preset = _start(arguments)
    options = _train_parser(preset).parse_args(list(arguments))
    budgets = [name for name in ("--hours", "--images", "--epochs") if any(_names(a, name) for a in arguments)]
    if len(budgets) > 1:
        raise UserError(f"{' and '.join(budgets)} are both budgets; give one")
    from vultus.data.dataset import PreparedDataset
    from vultus.training.trainer import Budget, train
    from vultus.training.validation import unseen_validation

    values = {key: value for key, value in options.as_dict().items() if key in to_dict(TrainConfig())}
    config = from_dict(TrainConfig, values | {"preset": preset.preset}, "settings")
    check_method(config)
    PreparedDataset(options.data)  # a wrong folder is named before FaceNet is fetched
    device = device_named(options.device)
    encoder = open_facenet(device, needed=config.loss.needs_encoder())
    probe = unseen_validation(options.data, encoder) if encoder is not None else None
    evaluators = [("unseen", probe, config.sample_every_nimg)] if probe is not None else []
    budget = None
    if options.hours is not None or options.images is not None:
        budget = Budget(total_nimg=options.images, hours=options.hours)
    path = train(
        config,
        data=options.data,
        out=options.out,
        budget=budget,
        device=device,
        encoder=encoder if config.loss.needs_encoder() else None,
        evaluators=evaluators,
        track=options.track,
        project=options.project,
    )
    print(path)
    return 0


def _names(argument: str, option: str) -> bool:
    return argument == option or argument.startswith(option + "=")

"""The verb `train` of the command line: its options are the fields of the config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from vultus.config import PRESETS, TrainConfig, check_method, from_dict, get_preset, to_dict, with_resolution
from vultus.errors import UserError
from vultus.options import device_named, open_facenet

DEFAULT_PRESET = "dcgan-identity"


def _train_parser(preset: str) -> ArgumentParser:
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
    defaults = to_dict(get_preset(preset))
    parser.set_defaults({key: value for key, value in defaults.items() if key != "preset"})
    return parser


def train_verb(arguments: Sequence[str]) -> int:
    """Train a generator."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=DEFAULT_PRESET)
    preset = first.parse_known_args(arguments)[0].preset
    options = _train_parser(preset).parse_args(list(arguments))
    budgets = [name for name in ("--hours", "--images", "--epochs") if any(_names(a, name) for a in arguments)]
    if len(budgets) > 1:
        raise UserError(f"{' and '.join(budgets)} are both budgets; give one")
    from vultus.dataset import PreparedDataset
    from vultus.probe import unseen_probe
    from vultus.train import Budget, train

    values = {key: value for key, value in options.as_dict().items() if key in to_dict(TrainConfig())}
    config = from_dict(TrainConfig, values | {"preset": preset}, "settings")
    check_method(config)
    dataset = PreparedDataset(options.data)
    if not any(_names(a, "--generator.resolution") for a in arguments):
        config = with_resolution(config, dataset.resolution)
    device = device_named(options.device)
    encoder = open_facenet(device, needed=config.loss.needs_encoder())
    probe = unseen_probe(options.data, encoder) if encoder is not None else None
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

"""The command line: one verb per function. Results go to stdout, progress to stderr, a user's error is one line."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from vultus.config import PRESETS, TrainConfig, from_dict, get_preset, to_dict, with_resolution
from vultus.errors import UserError

DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO}


def _device(name: str) -> str:
    """Resolve `auto`: cuda, then mps, then cpu. Raises UserError if a device that is asked for is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, present in there.items() if present)
    if not there.get(name.split(":")[0], False):
        raise UserError(f"--device {name}: not on this machine; there are {', '.join(k for k, v in there.items() if v)}")
    return name


# --- train ------------------------------------------------------------------------------------------------------------


def _train_parser(preset: str) -> ArgumentParser:
    parser = ArgumentParser(prog="vultus train", exit_on_error=False, description="Train a generator.")
    parser.add_argument("--preset", type=str, default="vultus-cpu", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", action="config", help="YAML file of settings, laid over the preset")
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument("--out", type=str, required=True, help="run folder; one begun before is gone on with")
    parser.add_argument("--hours", type=float, help="budget: hours of training, all sessions together")
    parser.add_argument("--images", type=int, help="budget: images seen")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    parser.add_class_arguments(TrainConfig, skip={"preset"})
    defaults = to_dict(get_preset(preset))
    parser.set_defaults({key: value for key, value in defaults.items() if key != "preset"})
    return parser


def _train(arguments: Sequence[str]) -> int:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="vultus-cpu")
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
    dataset = PreparedDataset(options.data)
    if not any(_names(a, "--generator.resolution") for a in arguments):
        config = with_resolution(config, dataset.resolution)
    device = _device(options.device)
    encoder = _facenet(device, needed=config.loss.identity_weight > 0)
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
        encoder=encoder if config.loss.identity_weight else None,
        evaluators=evaluators,
    )
    print(path)
    return 0


def _names(argument: str, option: str) -> bool:
    return argument == option or argument.startswith(option + "=")


def _facenet(device: str, *, needed: bool) -> Any:
    from vultus.encoders import load_facenet

    try:
        return load_facenet(device=device)
    except UserError as error:
        if needed:
            raise
        print(f"note: no FaceNet ({error}); unseen people are not measured during training", file=sys.stderr)
        return None


# --- the program ------------------------------------------------------------------------------------------------------

VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "prepared data set -> run folder with checkpoints and a snapshot"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code (0 done, 2 an error the user can mend, 128 + n stopped by signal n)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(importlib.metadata.version("vultus"))
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _error(f"no such verb: {verb}; there are {', '.join(VERBS)}")
    from vultus.train import Stopped

    try:
        return VERBS[verb][0](rest)
    except UserError as error:
        return _error(str(error))
    except Stopped as stopped:
        return 128 + stopped.signal
    except argparse.ArgumentError as error:
        return _error(f"{' '.join(str(error).split())} (see vultus {verb} --help)")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _error(
            f"{error.filename or 'output'}: {error.strerror}; make room or choose another place, then run the same "
            f"command again"
        )


def _error(message: str) -> int:
    print(f"vultus: error: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: vultus VERB [OPTIONS]   (vultus VERB --help)", ""]
    lines += [f"  {verb:<10} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(lines)

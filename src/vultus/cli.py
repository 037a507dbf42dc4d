"""The command line: one verb per function. Results go to stdout, progress to stderr, a user's error is one line."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from vultus.config import PRESETS, TrainConfig, check_method, from_dict, get_preset, to_dict, with_resolution
from vultus.errors import Stopped, UserError

DEFAULT_PRESET = "dcgan-identity"
DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO}


def _device(name: str) -> str:
    """Resolve `auto`: cuda, then mps, then cpu. Raises UserError if a device that is asked for is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, present in there.items() if present)
    if not there.get(name.split(":")[0], False):
        raise UserError(
            f"--device {name}: not on this machine; there are {', '.join(k for k, v in there.items() if v)}"
        )
    return name


# --- train ------------------------------------------------------------------------------------------------------------


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


def _train(arguments: Sequence[str]) -> int:
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
    device = _device(options.device)
    encoder = _facenet(device, needed=config.loss.needs_encoder())
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


def _facenet(device: str, *, needed: bool) -> Any:
    from vultus.encoders import load_facenet

    try:
        return load_facenet(device=device)
    except UserError as error:
        if needed:
            raise
        print(f"note: no FaceNet ({error}); unseen people are not measured during training", file=sys.stderr)
        return None


# --- prepare ----------------------------------------------------------------------------------------------------------


def _prepare(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="vultus prepare", exit_on_error=False, description="Make a data set for training.")
    parser.add_argument("source", type=str, help="folder of photos, Parquet files, or a Hugging Face data set id")
    parser.add_argument("--out", type=str, required=True, help="folder to write; one begun before is gone on with")
    parser.add_argument("--resolution", type=int, default=128, help="side of the crops in pixels")
    parser.add_argument("--split", type=str | None, help="read this split of the source only")
    parser.add_argument("--test_fraction", type=float, default=0.1, help="share of people kept unseen, if none are yet")
    parser.add_argument("--align", action="store_true", help="find the face first (extra `align`)")
    parser.add_argument("--licence", type=str | None, help="terms of the photos; every model trained on them says so")
    parser.add_argument("--limit", type=int | None, help="read at most so many photos")
    parser.add_argument("--dtype", type=Literal["auto", "float32", "bfloat16"], default="auto", help="FaceNet's")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    options = parser.parse_args(list(arguments))
    from vultus.prepare import prepare

    manifest = prepare(
        options.source,
        Path(options.out),
        resolution=options.resolution,
        split=options.split,
        test_fraction=options.test_fraction,
        align=options.align,
        licence=options.licence,
        limit=options.limit,
        device=_device(options.device),
        dtype=options.dtype,
    )
    print(json.dumps(manifest, indent=2) if options.json else options.out)
    return 0


# --- generate ---------------------------------------------------------------------------------------------------------


def _snapshot(name: str, device: str) -> Any:
    from vultus.checkpoint import load_snapshot
    from vultus.demo import default_snapshot

    return load_snapshot(default_snapshot() if name == "default" else name, device)


def _generate(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="vultus generate", exit_on_error=False, description="Make faces.")
    parser.add_argument("snapshot", type=str, help="snapshot, run or published folder, hf://user/name, `default`")
    parser.add_argument("--embeddings", type=str | None, help="FILE.npy, .npz, .safetensors, .parquet[:COLUMN]")
    parser.add_argument("--photos", type=str, nargs="+", help="photos, or folders of photos")
    parser.add_argument("--random", type=int | None, help="so many people who do not exist")
    parser.add_argument("--between", type=str, nargs=2, help="two of: photo, FILE#ROW, random:N")
    parser.add_argument("--out", type=str, required=True, help="folder, or with --grid a picture file")
    parser.add_argument("--num", type=int, default=1, help="faces of each embedding")
    parser.add_argument("--seed", type=int, default=0, help="of noise and random people")
    parser.add_argument("--grid", action="store_true", help="one sheet instead of single files")
    parser.add_argument("--steps", type=int, default=9, help="pictures of --between")
    parser.add_argument("--noise_strength", type=float, default=1.0, help="below 1: more alike, nearer to the average")
    parser.add_argument("--align", type=bool | None, help="find the face in photos; default: where the extra is there")
    parser.add_argument("--batch", type=int, default=16, help="faces held in memory at once; does not change them")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    options = parser.parse_args(list(arguments))
    given = [name for name in ("embeddings", "photos", "random", "between") if options[name] is not None]
    if len(given) != 1:
        raise UserError("give one of --embeddings FILE, --photos PATH ..., --random N, --between A B")
    from vultus import conditions
    from vultus.generate import between, generate

    device = _device(options.device)
    snapshot = _snapshot(options.snapshot, device)
    photo: dict[str, Any] = {"align": options.align, "device": device}
    noise: dict[str, Any] = {"seed": options.seed, "noise_strength": options.noise_strength}
    if options.between is not None:
        ends = [conditions.one_embedding(end, snapshot, seed=options.seed, **photo) for end in options.between]
        for path in between(snapshot, ends[0], ends[1], options.out, steps=options.steps, **noise):
            print(path)
        return 0
    if options.embeddings is not None:
        source = conditions.from_embeddings(options.embeddings, snapshot)
    elif options.photos is not None:
        source = conditions.from_photos(options.photos, snapshot, **photo)
    else:
        source = conditions.random_people(snapshot, options.random, seed=options.seed)
    made = generate(
        snapshot, source, options.out, num=options.num, batch=options.batch, grid=bool(options.grid), **noise
    )
    left = f", {len(made.skipped)} photos left out" if made.skipped else ""
    print(f"{made.faces} faces of {made.embeddings} embeddings{left}", file=sys.stderr)
    print(made.out)
    return 0


# --- evaluate ---------------------------------------------------------------------------------------------------------


def _evaluate(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="vultus evaluate", exit_on_error=False, description="Measure snapshots.")
    parser.add_argument("snapshots", type=str, nargs="+", help="snapshot files, run folders, or `default`")
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument(
        "--split", type=Literal["test", "train", "both"], default="test", help="test: people never seen; both: the gap"
    )
    parser.add_argument("--noises", type=int, default=2, help="faces of each embedding")
    parser.add_argument("--limit", type=int | None, help="so many photos, spread over the split")
    parser.add_argument(
        "--judge", type=str, nargs="+", default=["dlib"], help="dlib, and FILE.onnx[:raw] face encoders"
    )
    parser.add_argument("--fetch", action="store_true", help="download the weights of FID and LPIPS (340 MB)")
    parser.add_argument("--out", type=str | None, help="folder for the table, plots and pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch", type=int, default=32, help="photos at a time; does not change the figures")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(arguments))
    from vultus.compare import compare
    from vultus.dataset import PreparedDataset

    device = _device(options.device)
    snapshots = {name: _snapshot(name, device) for name in options.snapshots}
    PreparedDataset(options.data, None)  # a wrong folder is named before FaceNet is fetched
    text, results = compare(
        snapshots,
        options.data,
        encoder=_facenet(device, needed=True),
        judges=tuple(options.judge),
        fetch=options.fetch,
        split=options.split,
        out=options.out,
        device=device,
        **{name: options[name] for name in ("noises", "limit", "seed", "batch")},
    )
    print(json.dumps(results, indent=2) if options.json else text)
    return 0


# --- report -----------------------------------------------------------------------------------------------------------


def _report(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="vultus report", exit_on_error=False, description="Tell what was trained, and how well."
    )
    parser.add_argument("runs", type=str, nargs="+", help="run folders; several are shown side by side")
    parser.add_argument("--out", type=str | None, help="folder to write; default: the run folder, if there is one")
    parser.add_argument(
        "--evaluation", type=str, nargs="+", default=[], help="folders of evaluate --out; default: RUN/evaluation"
    )
    parser.add_argument("--with-photos", action="store_true", help="show photos of the data set beside the faces")
    parser.add_argument("--wandb", action="store_true", help="as a report on Weights & Biases (extra `track`)")
    parser.add_argument("--public", action="store_true", help="with --wandb: a link for everybody")
    options = parser.parse_args(list(arguments))
    if options.out is None and len(options.runs) > 1:
        raise UserError("a report of several runs needs --out FOLDER")
    if options.public and not options.wandb:
        raise UserError("--public goes with --wandb; the page itself is a file to send or to put anywhere")
    from vultus.runs import read_evaluations, read_runs
    from vultus.story import tell

    runs = read_runs(options.runs)
    story = tell(runs, read_evaluations(runs, options.evaluation))
    for each in story.runs:
        for line in [*([each.state] if each.state else []), *each.remarks]:
            print(f"vultus: {each.run.name}: {line}", file=sys.stderr)
    for line in story.remarks:
        print(f"vultus: {line}", file=sys.stderr)
    out = options.out or options.runs[0]
    if options.wandb:
        from vultus.wandb_report import write_wandb_report

        lines = write_wandb_report(story, out, public=options.public, with_photos=options.with_photos)
    else:
        from vultus.report import write_report

        lines = [str(path) for path in write_report(story, out, with_photos=options.with_photos)]
    print("\n".join(lines))
    return 0


# --- publish ----------------------------------------------------------------------------------------------------------


def _publish(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="vultus publish", exit_on_error=False, description="Publish on the Hugging Face hub.")
    parser.add_argument("snapshot", type=str, help="snapshot, run folder, `default`, or a folder that --dry-run wrote")
    parser.add_argument("--repo", type=str, required=True, help="its name on the hub: user/name")
    parser.add_argument("--out", type=str | None, help="folder to write; default: RUN/publish, else ./publish")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and upload nothing")
    parser.add_argument("--private", action="store_true", help="nobody else may see it")
    parser.add_argument("--evaluation", type=str | None, help="folder of evaluate --out; default: RUN/evaluation")
    parser.add_argument("--licence", type=str | None, help="id such as mit, unless the data are restricted")
    parser.add_argument("--dtype", type=Literal["float32", "float16"], default="float32", help="of the weights")
    parser.add_argument("--people", type=bool, default=True, help="publish how the training embeddings are spread")
    parser.add_argument("--seed", type=int, default=0, help="of the people and noise in samples.jpg")
    options = parser.parse_args(list(arguments))
    from vultus.pretrained import is_published
    from vultus.publish import check_token, upload, write_publication

    source = Path(options.snapshot)
    if not options.dry_run:
        check_token()  # said before the work
    snapshot = _snapshot(options.snapshot, "cpu")
    if source.is_dir() and is_published(source) and not (source / "snapshot.safetensors").is_file():
        folder = source  # as it is, with what was changed in its card
        given = [name for name in ("out", "evaluation", "licence") if options[name] is not None]
        if given:
            raise UserError(f"{folder}: is published as it is; --{given[0]} goes with a snapshot or run folder")
    else:
        folder = Path(options.out or (source / "publish" if source.is_dir() else "publish"))
        evaluation = options.evaluation
        if evaluation is None and (source / "evaluation" / "results.json").is_file():
            evaluation = source / "evaluation"
        write_publication(
            snapshot,
            options.repo,
            folder,
            evaluation=None if evaluation is None else (Path(evaluation), options.snapshot),
            **{name: options[name] for name in ("licence", "dtype", "people", "seed")},
        )
    print(folder if options.dry_run else upload(folder, options.repo, private=options.private))
    return 0


# --- demo -------------------------------------------------------------------------------------------------------------


def _demo(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="vultus demo", exit_on_error=False, description="See faces; train a tiny network.")
    parser.add_argument("--out", type=str, default="vultus-demo", help="folder to write")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the tiny training")
    parser.add_argument("--seed", type=int, default=0, help="of noise and random people")
    options = parser.parse_args(list(arguments))
    from vultus.demo import demo

    demo(options.out, seconds=options.seconds, seed=options.seed)
    return 0


# --- the program ------------------------------------------------------------------------------------------------------

VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (_demo, "faces from the embedded snapshot, and a small training; needs no data and no network"),
    "prepare": (_prepare, "photos -> prepared data set: crops with their face embeddings"),
    "train": (_train, "prepared data set -> run folder with checkpoints and a snapshot"),
    "generate": (_generate, "snapshot + embeddings, photos or random people -> pictures"),
    "evaluate": (_evaluate, "snapshot + prepared data set -> figures on people never seen"),
    "report": (_report, "run folders -> a page of curves, faces and figures; or a report on W&B"),
    "publish": (_publish, "snapshot -> a folder with a model card, on the Hugging Face hub"),
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
        if error.errno is None or (error.filename is None and error.errno not in DISK_ERRORS):
            raise
        remedy = "make room or choose another place" if error.errno in DISK_ERRORS else "choose another place"
        return _error(f"{error.filename or 'output'}: {error.strerror}; {remedy}, then run the same command again")


def _error(message: str) -> int:
    print(f"vultus: error: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: vultus VERB [OPTIONS]   (vultus VERB --help)", ""]
    lines += [f"  {verb:<10} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(lines)

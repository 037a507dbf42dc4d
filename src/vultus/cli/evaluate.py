"""Verbs of the command line that say what was trained, or hand it on: evaluate, report, publish, export."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from vultus.cli.common import device_named, open_facenet, open_snapshot
from vultus.errors import UserError

# --- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate_verb(arguments: Sequence[str]) -> int:
    """Measure snapshots."""
    parser = ArgumentParser(prog="vultus evaluate", exit_on_error=False, description="Measure snapshots.")
    parser.add_argument("snapshots", type=str, nargs="+", help="snapshot files, run folders, or `default`")
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument(
        "--split", type=Literal["test", "train", "both"], default="test", help="test: people never seen; both: the gap"
    )
    parser.add_argument("--noises", type=int, default=2, help="faces of each embedding")
    parser.add_argument("--noise_strength", type=float, default=1.0, help="below 1: more alike, nearer to the average")
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
    from vultus.data.dataset import PreparedDataset
    from vultus.evaluation.compare import compare

    device = device_named(options.device)
    snapshots = {name: open_snapshot(name, device) for name in options.snapshots}
    PreparedDataset(options.data, None)  # a wrong folder is named before FaceNet is fetched
    text, results = compare(
        snapshots,
        options.data,
        encoder=open_facenet(device, needed=True),
        judges=tuple(options.judge),
        fetch=options.fetch,
        split=options.split,
        out=options.out,
        device=device,
        **{name: options[name] for name in ("noises", "noise_strength", "limit", "seed", "batch")},
    )
    print(json.dumps(results, indent=2) if options.json else text)
    return 0


# --- report -----------------------------------------------------------------------------------------------------------


def report_verb(arguments: Sequence[str]) -> int:
    """Tell what was trained, and how well."""
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
    from vultus.reporting.content import tell
    from vultus.reporting.run_folder import read_evaluations, read_runs

    runs = read_runs(options.runs)
    story = tell(runs, read_evaluations(runs, options.evaluation))
    for each in story.runs:
        for line in [*([each.state] if each.state else []), *each.remarks]:
            print(f"vultus: {each.run.name}: {line}", file=sys.stderr)
    for line in story.remarks:
        print(f"vultus: {line}", file=sys.stderr)
    out = options.out or options.runs[0]
    if options.wandb:
        from vultus.reporting.wandb_report import write_wandb_report

        lines = write_wandb_report(story, out, public=options.public, with_photos=options.with_photos)
    else:
        from vultus.reporting.html import write_report

        lines = [str(path) for path in write_report(story, out, with_photos=options.with_photos)]
    print("\n".join(lines))
    return 0


# --- publish ----------------------------------------------------------------------------------------------------------


def publish_verb(arguments: Sequence[str]) -> int:
    """Publish on the Hugging Face hub."""
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
    from vultus.export.publish import check_token, upload, write_publication
    from vultus.models.hub import is_published

    source = Path(options.snapshot)
    if not options.dry_run:
        check_token()  # said before the work
    snapshot = open_snapshot(options.snapshot, "cpu")
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


# --- export -----------------------------------------------------------------------------------------------------------


def export_verb(arguments: Sequence[str]) -> int:
    """Write a snapshot for programs without PyTorch."""
    parser = ArgumentParser(
        prog="vultus export", exit_on_error=False, description="Write a snapshot for programs without PyTorch."
    )
    parser.add_argument("snapshot", type=str, help="snapshot, run or published folder, hf://user/name, `default`")
    parser.add_argument("--onnx", action="store_true", help="as one ONNX file (extra `export`)")
    parser.add_argument("--out", type=str | None, help="FILE.onnx; default: vultus.onnx, in a run folder beside it")
    parser.add_argument(
        "--precision", type=Literal["float32", "float16", "int8"], default="float32", help="of the weights"
    )
    options = parser.parse_args(list(arguments))
    if not options.onnx:
        raise UserError("name the format to export to: --onnx")
    folder = Path(options.snapshot) if Path(options.snapshot).is_dir() else Path()
    out = Path(options.out) if options.out else folder / "vultus.onnx"
    if out.suffix.lower() != ".onnx":
        raise UserError(f"--out {out}: give a file name that ends in .onnx")
    from vultus.export.onnx_export import export_onnx

    parity = export_onnx(open_snapshot(options.snapshot, "cpu"), out, precision=options.precision)
    print(f"{parity}; {out.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    print(out)
    return 0


# --- detect -----------------------------------------------------------------------------------------------------------


def detect_verb(arguments: Sequence[str]) -> int:
    """Tell whether pictures are synthetic."""
    parser = ArgumentParser(
        prog="vultus detect", exit_on_error=False, description="Tell whether pictures say that they are synthetic."
    )
    parser.add_argument("files", type=str, nargs="+", help="PNG, JPEG or WebP pictures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args(list(arguments))
    from vultus.images.detect import examine, in_words

    found = []
    for path in options.files:
        found.append(examine(path))
        if not options.json:
            print(in_words(found[-1]))
    if options.json:
        print(json.dumps(found, indent=2))
    return 0

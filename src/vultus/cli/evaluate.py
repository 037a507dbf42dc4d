"""`vultus evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from vultus._ranges import Count, Limit, NoiseStrength
from vultus.cli.options import ArgumentParser, add_measuring


def evaluate_command(arguments: Sequence[str]) -> int:
    """Measure snapshots."""
    parser = ArgumentParser(prog="vultus evaluate", exit_on_error=False, description="Measure snapshots.")
    names = "snapshots, run or published folders, hf://user/name, FILE.onnx, `default`"
    parser.add_argument("snapshots", type=str, nargs="+", help=names)
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument(
        "--split",
        type=Literal["test", "train", "both"],
        default="test",
        help="test: people never used in training; both: also the gap to training people",
    )
    parser.add_argument("--noises", type=Count, default=2, help="faces of each embedding")
    parser.add_argument(
        "--noise_strength",
        type=NoiseStrength,
        default=1.0,
        help="factor of the noise; below 1: faces more alike",
    )
    parser.add_argument(
        "--best-of", type=Count, default=1, help="measure what generate --best-of K keeps; FaceNet's rows are marked"
    )
    parser.add_argument("--limit", type=Limit | None, help="use this many photos, evenly spread over the split")
    parser.add_argument(
        "--judge",
        type=str,
        nargs="+",
        default=["dlib"],
        help="dlib, mobilefacenet, face encoders as FILE.onnx[:raw]",
    )
    parser.add_argument("--fetch", action="store_true", help="download the weights of FID and LPIPS (340 MB)")
    parser.add_argument(
        "--out", type=str | None, help="folder for the table, plots and grids of faces; default: in RUN/evaluations"
    )
    add_measuring(parser, seed="of the noise and of the resampled people")
    options = parser.parse_args(list(arguments))
    from vultus.evaluation.compare import evaluate_snapshots, format_comparison

    passed = (
        "data",
        "split",
        "out",
        "noises",
        "noise_strength",
        "best_of",
        "limit",
        "fetch",
        "seed",
        "batch",
        "device",
    )
    results = evaluate_snapshots(options.snapshots, judges=options.judge, **{name: options[name] for name in passed})
    print(json.dumps(results, indent=2) if options.json else format_comparison(results))
    return 0

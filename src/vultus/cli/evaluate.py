"""`vultus evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from jsonargparse import ArgumentParser

from vultus.cli.common import device_named, open_facenet, open_snapshot


def evaluate_command(arguments: Sequence[str]) -> int:
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

"""`vultus probe`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vultus._ranges import Count, Limit, Seed
from vultus.cli.options import ArgumentParser


def probe_command(arguments: Sequence[str]) -> int:
    """Measure what can be read from embeddings, and fit directions for --edit."""
    parser = ArgumentParser(
        prog="vultus probe",
        exit_on_error=False,
        description="Measure what can be read from embeddings, and fit directions for --edit.",
    )
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument("--snapshot", type=str, default="default", help="snapshot whose faces are edited, or `none`")
    parser.add_argument("--judge", type=str, nargs="+", default=["dlib"], help="dlib, mobilefacenet, FILE.onnx[:raw]")
    parser.add_argument("--limit", type=Limit | None, help="use this many photos of each split, evenly spread")
    parser.add_argument("--edited", type=Limit, default=500, help="photos of the test split whose faces are edited")
    parser.add_argument(
        "--out", type=str | None, help="new folder for directions.safetensors, probe.md, probe.json and edits.png"
    )
    parser.add_argument("--seed", type=Seed, default=0, help="of the noise and of the resampled people")
    parser.add_argument("--batch", type=Count, default=32, help="photos at a time; does not change the results")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(arguments))
    from vultus.audit.probe import probe, table

    result = probe(
        None if options.snapshot == "none" else options.snapshot,
        data=options.data,
        judges=options.judge,
        **{name: options[name] for name in ("limit", "edited", "out", "seed", "batch", "device")},
    )
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0

"""`vultus probe`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vultus._ranges import Limit
from vultus.cli.options import ArgumentParser, add_measuring


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
    add_measuring(parser, seed="of the noise and of the resampled people")
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

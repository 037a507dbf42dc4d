"""`vultus audit`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vultus._ranges import Count, Limit, Seed
from vultus.cli.options import ArgumentParser


def audit_command(arguments: Sequence[str]) -> int:
    """Measure what leaked templates reveal."""
    parser = ArgumentParser(
        prog="vultus audit", exit_on_error=False, description="Measure what leaked templates reveal."
    )
    parser.add_argument("--data", type=str, required=True, help="prepared data set")
    parser.add_argument("--snapshot", type=str, default="default", help="snapshot that inverts the templates")
    protections = "plain, 8bit, 1bit, noise-LEVEL, rotation, rotation-pairs, biohash-known, biohash-unknown, pca-K"
    parser.add_argument("--protect", type=str, nargs="+", help=f"{protections}; default: a selection of all")
    parser.add_argument("--limit", type=Limit | None, help="use this many photos, evenly spread over the test split")
    parser.add_argument("--judge", type=str, nargs="+", default=["dlib"], help="dlib, mobilefacenet, FILE.onnx[:raw]")
    parser.add_argument("--groups", type=str | None, help="JSON file {group: [photos or people]}, measured one by one")
    parser.add_argument("--out", type=str | None, help="new folder for the page (HTML and Markdown) and audit.json")
    parser.add_argument("--seed", type=Seed, default=0, help="of keys, noise, mapping and resampled people")
    parser.add_argument("--batch", type=Count, default=32, help="photos at a time; does not change the results")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(arguments))
    from vultus.audit.audit import audit
    from vultus.audit.tables import text

    passed = ("groups", "limit", "out", "seed", "batch", "device")
    result = audit(
        options.snapshot,
        data=options.data,
        protections=options.protect,
        judges=options.judge,
        **{name: options[name] for name in passed},
    )
    print(json.dumps(result, indent=2) if options.json else text(result))
    return 0

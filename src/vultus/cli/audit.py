"""`vultus audit`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vultus._ranges import Limit
from vultus.cli.options import ArgumentParser, add_measuring


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
    add_measuring(parser, seed="of keys, noise, mapping and resampled people")
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

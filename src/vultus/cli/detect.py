"""`vultus detect`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vultus.cli.options import ArgumentParser


def detect_command(arguments: Sequence[str]) -> int:
    """Detect whether images are marked as synthetic."""
    parser = ArgumentParser(
        prog="vultus detect", exit_on_error=False, description="Detect whether images are marked as synthetic."
    )
    parser.add_argument("files", type=str, nargs="+", help="PNG, JPEG or WebP images")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(list(arguments))
    from vultus.images.detect import describe, examine

    results = []
    for path in options.files:
        results.append(examine(path))
        if not options.json:
            print(describe(results[-1]))
    if options.json:
        print(json.dumps(results, indent=2))
    return 0

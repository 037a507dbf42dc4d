"""`vultus detect`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jsonargparse import ArgumentParser


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

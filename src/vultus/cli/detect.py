"""`vultus detect`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from vultus.cli.options import ArgumentParser
from vultus.errors import UserError

EPILOG = "exit code: 0 if every image could be read, whatever was found in it; 1 if some could not; 2 if none could"


def detect_command(arguments: Sequence[str]) -> int:
    """Detect whether images are marked as synthetic."""
    parser = ArgumentParser(
        prog="vultus detect",
        exit_on_error=False,
        description="Detect whether images are marked as synthetic.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "files", type=str, nargs="+", help="PNG, JPEG, WebP, GIF, TIFF, AVIF or BMP images, or folders of them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text: a list with an entry per file")
    options = parser.parse_args(list(arguments))
    from vultus.images.detect import describe, examine, find_images

    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for path, reason in find_images(options.files):
        try:
            if reason is not None:
                raise UserError(f"{path}: {reason}; name an image file")
            results.append(examine(path))
        except UserError as error:
            failed.append(str(error))
            results.append({"file": str(path), "synthetic": None, "error": str(error)})
            if [str(path)] != options.files:  # the only file is named in the error of the command
                print(f"skipped {error}", file=sys.stderr)
            continue
        if not options.json:
            print(describe(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
    if len(failed) == len(results):
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{more}")
    if len(results) > 1:
        found = sum(bool(result["synthetic"]) for result in results)
        skipped = f", {len(failed)} could not be read" if failed else ""
        print(f"{found} of {len(results) - len(failed)} images are marked as synthetic{skipped}", file=sys.stderr)
    return 1 if failed else 0

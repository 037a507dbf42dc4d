"""`vultus export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vultus.cli.options import ArgumentParser
from vultus.errors import UserError


def export_command(arguments: Sequence[str]) -> int:
    """Write a snapshot for programs without PyTorch."""
    parser = ArgumentParser(
        prog="vultus export", exit_on_error=False, description="Write a snapshot for programs without PyTorch."
    )
    parser.add_argument("snapshot", type=str, help="snapshot, run or published folder, hf://user/name, `default`")
    parser.add_argument("--onnx", action="store_true", help="as one ONNX file (extra `export`)")
    parser.add_argument("--out", type=str | None, help="FILE.onnx; default: vultus.onnx, for a run folder inside it")
    parser.add_argument(
        "--precision", type=Literal["float32", "float16", "int8"], default="float32", help="of the weights"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing file that is another export, or none"
    )
    options = parser.parse_args(list(arguments))
    if not options.onnx:
        raise UserError("name the format to export to: --onnx")
    folder = Path(options.snapshot) if Path(options.snapshot).is_dir() else Path()
    out = Path(options.out) if options.out else folder / "vultus.onnx"
    if out.suffix.lower() != ".onnx":
        raise UserError(f"--out {out}: give a file name that ends in .onnx")
    from vultus.export.onnx_export import export_onnx, exported_metadata

    # The export in a run folder is of that run: after more training a new one takes its place.
    own = not options.out and bool(folder.parts) and out.is_file() and bool(exported_metadata(out))
    parity = export_onnx(options.snapshot, out, precision=options.precision, overwrite=bool(options.overwrite) or own)
    print(f"{parity}; {out.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    print(out)
    return 0

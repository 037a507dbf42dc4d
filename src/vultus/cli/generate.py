"""`vultus generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vultus.cli.common import device_named, open_snapshot
from vultus.errors import UserError


def generate_verb(arguments: Sequence[str]) -> int:
    """Make faces."""
    parser = ArgumentParser(prog="vultus generate", exit_on_error=False, description="Make faces.")
    parser.add_argument(
        "snapshot", type=str, help="snapshot, run or published folder, hf://user/name, FILE.onnx, `default`"
    )
    parser.add_argument("--embeddings", type=str | None, help="FILE.npy, .npz, .safetensors, .parquet[:COLUMN]")
    parser.add_argument("--photos", type=str, nargs="+", help="photos, or folders of photos")
    parser.add_argument("--random", type=int | None, help="so many people who do not exist")
    parser.add_argument("--between", type=str, nargs=2, help="two of: photo, FILE#ROW, random:N")
    parser.add_argument("--out", type=str, required=True, help="folder, or with --grid a picture file")
    parser.add_argument("--num", type=int, default=1, help="faces of each embedding")
    parser.add_argument("--seed", type=int, default=0, help="of noise and random people")
    parser.add_argument("--grid", action="store_true", help="one sheet instead of single files")
    parser.add_argument("--steps", type=int, default=9, help="pictures of --between")
    parser.add_argument("--noise_strength", type=float, default=1.0, help="below 1: more alike, nearer to the average")
    parser.add_argument("--align", type=bool | None, help="find the face in photos; default: where the extra is there")
    parser.add_argument("--batch", type=int, default=16, help="faces held in memory at once; does not change them")
    parser.add_argument("--no-mark", action="store_true", help="no invisible watermark: pixels for metrics")
    parser.add_argument("--c2pa-cert", type=str | None, help="CHAIN.pem: sign the pictures (C2PA, extra `sign`)")
    parser.add_argument("--c2pa-key", type=str | None, help="KEY.pem of that certificate")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    options = parser.parse_args(list(arguments))
    given = [name for name in ("embeddings", "photos", "random", "between") if options[name] is not None]
    if len(given) != 1:
        raise UserError("give one of --embeddings FILE, --photos PATH ..., --random N, --between A B")
    if (options.c2pa_cert is None) != (options.c2pa_key is None):
        raise UserError("--c2pa-cert CHAIN.pem and --c2pa-key KEY.pem go together")
    from vultus.models.onnx_runtime import is_onnx, open_onnx
    from vultus.sampling import vectors

    exported = is_onnx(options.snapshot)
    if exported and options.device not in ("auto", "cpu"):
        raise UserError(f"--device {options.device}: an exported model runs on the processor; leave the option out")
    from vultus.sampling.generate import between, generate

    device = "cpu" if exported else device_named(options.device)
    snapshot = open_onnx(options.snapshot) if exported else open_snapshot(options.snapshot, device)
    photo: dict[str, Any] = {"align": options.align, "device": device}
    how: dict[str, Any] = {"seed": options.seed, "noise_strength": options.noise_strength, "mark": not options.no_mark}
    if options.c2pa_cert is not None:
        from vultus.images.c2pa import Signer

        how["signer"] = Signer(options.c2pa_cert, options.c2pa_key)
    if options.between is not None:
        ends = [_end(text, snapshot, seed=options.seed, **photo) for text in options.between]
        for path in between(snapshot, ends[0], ends[1], options.out, steps=options.steps, **how):
            print(path)
        return 0
    if options.embeddings is not None:
        source = vectors.from_embeddings(options.embeddings, snapshot)
    elif options.photos is not None:
        from vultus.sampling.conditioning import from_photos

        source = from_photos(options.photos, snapshot, **photo)
    else:
        source = vectors.random_people(snapshot, options.random, seed=options.seed)
    made = generate(snapshot, source, options.out, num=options.num, batch=options.batch, grid=bool(options.grid), **how)
    left = f", {len(made.skipped)} photos left out" if made.skipped else ""
    print(f"{made.faces} faces of {made.embeddings} embeddings{left}", file=sys.stderr)
    print(made.out)
    return 0


def _end(text: str, snapshot: Any, *, seed: int, **photo: Any) -> Any:
    """One end of --between. A photo needs torch, for FaceNet, whatever draws the faces."""
    from vultus.images.io import SUFFIXES

    if Path(text).suffix.lower() not in SUFFIXES:
        from vultus.sampling.vectors import one_embedding

        return one_embedding(text, snapshot, seed=seed)
    from vultus.sampling.conditioning import one_embedding as one_photo

    return one_photo(text, snapshot, seed=seed, **photo)

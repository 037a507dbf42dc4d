"""`vultus prepare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vultus._ranges import CropSide, Images, ShareBelowOne
from vultus.cli.options import ArgumentParser, add_device, add_workers


def prepare_command(arguments: Sequence[str]) -> int:
    """Prepare a data set for training."""
    parser = ArgumentParser(prog="vultus prepare", exit_on_error=False, description="Prepare a data set for training.")
    parser.add_argument(
        "source",
        type=str,
        help="folder of photos, Parquet files, or a Hugging Face data set (user/name, hf://user/name[@revision])",
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write; an interrupted run is resumed")
    parser.add_argument(
        "--resolution",
        type=CropSide,
        default=128,
        help="side of the stored crops in pixels; `train` needs 32, 64, 128, 256, 512 or 1024",
    )
    parser.add_argument("--split", type=str | None, help="read only this split of the source")
    parser.add_argument(
        "--test_fraction",
        type=ShareBelowOne,
        default=0.1,
        help="share of identities in the test split, if the source has none",
    )
    parser.add_argument("--image-column", type=str | None, help="column of the images in a table; default: image")
    parser.add_argument(
        "--id-column",
        type=str | None,
        help="column of the identities in a table; default: celeb_id, identity, person, ... or label, if there is one",
    )
    parser.add_argument(
        "--encoder",
        type=str,
        default="facenet",
        help="of the embeddings: facenet, mobilefacenet, dlib or FILE.onnx; with --embeddings, its name",
    )
    parser.add_argument(
        "--embeddings",
        type=str | None,
        help="table of a vector for each photo (Parquet or CSV: key, vector), computed by another program",
    )
    parser.add_argument(
        "--no-facenet",
        action="store_true",
        help="with another encoder: do not store FaceNet's embedding, which the losses of vultus-cpu and others need",
    )
    parser.add_argument("--align", action="store_true", help="find and align the face first (extra `align`)")
    parser.add_argument(
        "--licence", type=str | None, help="terms of the photos, recorded in every model that is trained on them"
    )
    parser.add_argument("--limit", type=Images | None, help="read at most this number of photos")
    parser.add_argument(
        "--dtype", type=Literal["auto", "float32", "bfloat16"], default="auto", help="of FaceNet; auto: the faster one"
    )
    add_device(parser)
    add_workers(parser, "processes that share the work; the result is the same. default: this one")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    options = parser.parse_args(list(arguments))
    from vultus._device import resolve_device
    from vultus.data.prepare import prepare

    manifest = prepare(
        options.source,
        Path(options.out),
        resolution=options.resolution,
        split=options.split,
        test_fraction=options.test_fraction,
        align=options.align,
        licence=options.licence,
        limit=options.limit,
        device=resolve_device(options.device),
        dtype=options.dtype,
        image_column=options.image_column,
        id_column=options.id_column,
        encoder=options.encoder,
        embeddings=options.embeddings,
        facenet=not options.no_facenet,
        workers=options.workers,
        engine=options.engine,
    )
    print(json.dumps(manifest, indent=2) if options.json else options.out)
    return 0

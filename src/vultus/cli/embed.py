"""`vultus embed`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from vultus._ranges import Images
from vultus.cli.options import ArgumentParser, add_device


def embed_command(arguments: Sequence[str]) -> int:
    """Embed the faces of photos."""
    parser = ArgumentParser(prog="vultus embed", exit_on_error=False, description="Embed the faces of photos.")
    parser.add_argument(
        "photos",
        type=str,
        nargs="+",
        help="photos, folders of photos, Parquet files, or Hugging Face data sets (user/name, hf://user/name[@revision])",
    )
    parser.add_argument("--out", type=str, required=True, help="FILE.npy, .npz, .parquet, .csv or .json")
    parser.add_argument(
        "--encoder", type=str, default="facenet", help="facenet, mobilefacenet, dlib, or a network in FILE.onnx"
    )
    parser.add_argument(
        "--face",
        type=Literal["largest", "central", "all"],
        default="largest",
        help="of a photo that shows several: which of them",
    )
    parser.add_argument("--split", type=str | None, help="of a table, read only this split")
    parser.add_argument("--image-column", type=str | None, help="column of the images in a table; default: image")
    parser.add_argument("--limit", type=Images | None, help="read at most this number of photos")
    parser.add_argument(
        "--align", type=bool | None, help="find and align the face in photos; default: if the extra is installed"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file; never the inputs")
    add_device(parser)
    options = parser.parse_args(list(arguments))
    from vultus.data.items import counted
    from vultus.sampling.photo_embeddings import embed_photos

    result = embed_photos(
        options.photos,
        options.out,
        encoder=options.encoder,
        face=options.face,
        align=options.align,
        split=options.split,
        image_column=options.image_column,
        limit=options.limit,
        device=options.device,
        overwrite=bool(options.overwrite),
    )
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    faces, photos = counted(len(result.rows), "face"), counted(result.photos, "photo")
    print(f"{faces} of {photos}{skipped}", file=sys.stderr)
    print(options.out)
    return 0

"""`vultus detect`: what a picture says of itself, and whether its pixels carry the watermark."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from vultus.errors import UserError
from vultus.images.c2pa import read_credentials
from vultus.images.io import FORMATS, BadImage, decode_image
from vultus.images.watermark import detect_watermark
from vultus.images.xmp import SOURCES, Kind, Said, read_marks

KINDS: dict[str | None, Kind] = {"PNG": "PNG", "JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}


def examine(path: str | Path) -> dict[str, Any]:
    """What is known of a PNG, JPEG or WebP file, ready for JSON.

    file; synthetic: whether it says so of itself, or the watermark does; metadata (see marks.Said) or None; credentials
    (see credentials.read_credentials) or None; watermark: found, score, p_value.

    Raises UserError if it cannot be read or is no such picture.
    """
    try:
        data = Path(path).read_bytes()
        pixels = decode_image(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a picture") from None
    except BadImage as error:
        raise UserError(f"{path}: {error}; give a PNG, JPEG or WebP picture of 32 pixels or more") from None
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        said, kind = read_marks(image), KINDS[image.format]
    credentials = read_credentials(data, kind)
    signed = Said(credentials["source"]).synthetic if credentials else False
    watermark = detect_watermark(pixels)
    return {
        "file": str(path),
        "synthetic": said.synthetic or signed or watermark.found,
        "metadata": None if said == Said() else vars(said),
        "credentials": credentials,
        "watermark": vars(watermark),
    }


def in_words(found: dict[str, Any]) -> str:
    """What `examine` found, in a few lines."""
    said, signed, watermark = found["metadata"], found["credentials"], found["watermark"]
    lines = [f"{found['file']}: {'synthetic' if found['synthetic'] else 'no sign that it is synthetic'}"]
    if said is None:
        lines.append("  metadata: none")
    else:
        names = {"tool": "", "model": "snapshot ", "seed": "seed "}
        parts = [f"{word}{said[name]}" for name, word in names.items() if said[name] is not None]
        source = (said["source"] or "no source").removeprefix(SOURCES)
        lines.append(f"  metadata: {', '.join([source, *parts])}")
    if signed is not None:
        source = (signed["source"] or "no source").removeprefix(SOURCES)
        lines.append(f"  credentials: {signed['state']}, {source}, signed by {signed['signer']}")
    state = "found" if watermark["found"] else "not found"
    lines.append(f"  watermark: {state} (score {watermark['score']:.2f}, p {watermark['p_value']:.2g})")
    return "\n".join(lines)

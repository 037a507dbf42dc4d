"""Is an image synthetic? Its metadata, its Content Credentials, and the watermark in its pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from vultus.errors import UserError
from vultus.images.c2pa import read_credentials
from vultus.images.io import FORMATS, BadImage, decode_image, file_format
from vultus.images.watermark import detect_watermark
from vultus.images.xmp import SOURCES, SyntheticMetadata, read_metadata


def examine(path: str | Path) -> dict[str, Any]:
    """Examine a PNG, JPEG or WebP file. Returns values that json can write:

    - file: the path.
    - synthetic: whether the metadata, the credentials or the watermark say so. False is no proof of the contrary: all
      three can be removed, and other programs write other marks.
    - metadata: source (the IPTC DigitalSourceType), tool, model, seed, description; None if there are none.
    - credentials: state, source and signer of a C2PA manifest (see images/c2pa.py); None if there is none, or if the
      extra `sign` is not installed.
    - watermark: found, score and p_value (see images/watermark.py).

    Raises UserError if the file cannot be read or is no such image.

    Examples:
        >>> vultus.detect("faces/000000_0.png")["synthetic"]
        True
    """
    try:
        data = Path(path).read_bytes()
        pixels = decode_image(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name an image file") from None
    except BadImage as error:
        raise UserError(f"{path}: {error}; give a PNG, JPEG or WebP image of at least 32x32 pixels") from None
    with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
        metadata, kind = read_metadata(image), file_format(image)
    credentials = read_credentials(data, kind)
    signed = SyntheticMetadata(credentials["source"]).synthetic if credentials else False
    watermark = detect_watermark(pixels)
    return {
        "file": str(path),
        "synthetic": metadata.synthetic or signed or watermark.found,
        "metadata": None if metadata == SyntheticMetadata() else vars(metadata),
        "credentials": credentials,
        "watermark": vars(watermark),
    }


def describe(result: dict[str, Any]) -> str:
    """The result of `examine` as a few lines of text."""
    metadata, credentials, watermark = result["metadata"], result["credentials"], result["watermark"]
    lines = [f"{result['file']}: {'synthetic' if result['synthetic'] else 'no sign that it is synthetic'}"]
    if metadata is None:
        lines.append("  metadata: none")
    else:
        prefixes = {"tool": "", "model": "snapshot ", "seed": "seed "}
        parts = [f"{prefix}{metadata[key]}" for key, prefix in prefixes.items() if metadata[key] is not None]
        lines.append(f"  metadata: {', '.join([_source_name(metadata['source']), *parts])}")
    if credentials is not None:
        source = _source_name(credentials["source"])
        lines.append(f"  credentials: {credentials['state']}, {source}, signed by {credentials['signer']}")
    state = "found" if watermark["found"] else "not found"
    lines.append(f"  watermark: {state} (score {watermark['score']:.2f}, p {watermark['p_value']:.2g})")
    return "\n".join(lines)


def _source_name(source: str | None) -> str:
    return (source or "no source").removeprefix(SOURCES)

"""Is an image synthetic? Its metadata, its Content Credentials, and the watermark in its pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vultus.errors import UserError
from vultus.images.c2pa import read_credentials
from vultus.images.io import MAX_FILE_BYTES, BadImage, decode_image, file_format, open_image
from vultus.images.watermark import detect_watermark
from vultus.images.xmp import SOURCES, WRITABLE, SyntheticMetadata, read_marks

SUFFIXES = (*WRITABLE, ".bmp")  # of the files that are examined in a folder


def find_images(paths: Sequence[str | Path]) -> Iterator[tuple[Path, str | None]]:
    """(path, None) of every image: files as they are given, folders with their sub-folders in the order of the names.

    In a folder the suffix decides what is an image; hidden files are left out. A folder that cannot be read or has no
    image, and a path that does not exist, give (path, reason).
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield path, None
            continue
        count = 0
        for found, reason in _walk(path):
            count += 1
            yield found, reason
        if not count:
            yield path, f"no images in this folder (looked for {', '.join(SUFFIXES)})"


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    failed: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=failed.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(place) / name, None
    for error in failed:
        yield Path(error.filename), f"cannot be read ({error.strerror})"


def examine(path: str | Path) -> dict[str, Any]:
    """Examine an image file: PNG, JPEG, WebP, GIF, TIFF, AVIF or BMP. Returns values that json can write:

    - file: the path.
    - synthetic: whether the metadata, the credentials or the watermark say so. False is no proof of the contrary: all
      three can be removed, and other programs write other marks.
    - metadata: source (the IPTC DigitalSourceType), tool, model, seed, description; None if there are none.
    - credentials: state, source and signer of a C2PA manifest (see images/c2pa.py); None if there is none, or if the
      extra `sign` is not installed.
    - watermark: found, score and p_value (see images/watermark.py); of an animation, in its first image.

    Raises UserError if the file cannot be read or is no such image.

    Examples:
        >>> vultus.detect("faces/000000_0.png")["synthetic"]
        True
    """
    try:
        data = _read(Path(path))
        pixels = decode_image(data)
        with open_image(data) as image:
            kind = file_format(image)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name an image file") from None
    except BadImage as error:
        raise UserError(f"{path}: {error}; give another image") from None
    metadata = read_marks(data)
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


def _read(path: Path) -> bytes:
    """The content of a regular file; a device has no end. Raises OSError or BadImage."""
    if path.exists() and not path.is_file():
        raise BadImage("a folder, not a file" if path.is_dir() else "not a regular file")
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"file too large: the limit is {MAX_FILE_BYTES // 1_000_000} MB")
    return data


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

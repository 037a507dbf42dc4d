"""Metadata of generated images: that a trained model generated them, which snapshot, and which seed.

Every image has an XMP packet (ISO 16684-1) with the IPTC property DigitalSourceType (IPTC Photo Metadata 2025.1), which
news agencies, search engines and social networks read. Its value is the one for images of a trained model, or the one
for composites if the image shows real photos too. PNG, JPEG and WebP have a standard place for the packet; Pillow
cannot write it into a GIF, so `mark_gif` does. The bytes are a function of the pixels and the Origin: no time is
written.

Metadata are lost when only the pixels are copied. The watermark (watermark.py) is for that case.

This module does not import torch.
"""

from __future__ import annotations

import functools
import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image, ImageSequence, PngImagePlugin, features

from vultus._files import atomic_path, sha256_file
from vultus._outputs import REPLACE, Inputs
from vultus.errors import UserError
from vultus.images.watermark import add_watermark

SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
SYNTHETIC = SOURCES + "trainedAlgorithmicMedia"
COMPOSITE = SOURCES + "compositeSynthetic"  # several elements, at least one of them synthetic

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
XMP = "http://ns.adobe.com/xap/1.0/"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
OWN = "urn:vultus:1.0/"

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{rdf}">
  <rdf:Description rdf:about="" xmlns:dc="{dc}" xmlns:xmp="{xmp}" xmlns:Iptc4xmpExt="{iptc}" xmlns:vultus="{own}">
   <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
   <Iptc4xmpExt:AISystemUsed>vultus</Iptc4xmpExt:AISystemUsed>
   <Iptc4xmpExt:AISystemVersionUsed>{version}</Iptc4xmpExt:AISystemVersionUsed>
   <xmp:CreatorTool>vultus {version}</xmp:CreatorTool>
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">{description}</rdf:li></rdf:Alt></dc:description>
   <vultus:Model>{model}</vultus:Model>{seed}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


MarkedFormat = Literal["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "GIF"]
MEDIA_TYPES: dict[str, str] = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
    "GIF": "image/gif",
}
# The files that can be written with marks: by suffix, the format.
WRITABLE: dict[str, MarkedFormat] = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
}
if features.check("avif"):  # Pillow can be built without
    WRITABLE[".avif"] = "AVIF"
TIFF_DESCRIPTION, TIFF_SOFTWARE, TIFF_XMP = 270, 305, 700  # numbers of the fields

GIF_XMP = b"\x21\xff\x0bXMP DataXMP"  # start of the application extension
GIF_END = b"\x01" + bytes(range(255, -1, -1)) + b"\x00"  # its end, see mark_gif

Sign = Callable[[bytes, MarkedFormat, "Origin"], bytes]  # c2pa.Signer


@dataclass(frozen=True)
class Origin:
    """Where an image comes from, as its metadata record it.

    Attributes:
        model: the snapshot: the first 16 hex digits of its file's sha256 (`model_id`), or its name on the hub.
        seed: of the noise.
        detail: for instance "embedding 3, noise 0".
        photos: the image shows real photos beside generated faces.
    """

    model: str
    seed: int | None = None
    detail: str = ""
    photos: bool = False

    @property
    def description(self) -> str:
        """A line of text for readers: the comment of PNG, JPEG and GIF, and the description in the XMP packet."""
        what = "AI-generated faces beside real photos" if self.photos else "AI-generated face"
        parts = [what, f"snapshot {self.model}" if self.model else "", self.detail]
        parts.insert(2, "" if self.seed is None else f"seed {self.seed}")
        text = ", ".join(part for part in parts if part)
        return "".join(letter if letter.isprintable() else " " for letter in text)  # XML allows no control characters


def source_of(origin: Origin) -> str:
    """The IPTC DigitalSourceType of the image."""
    return COMPOSITE if origin.photos else SYNTHETIC


def model_id(path: str | os.PathLike[str] | None) -> str:
    """The id of the snapshot in this file as images record it; empty for a snapshot that was never saved."""
    return sha256_file(path)[:16] if path else ""


# --- writing ----------------------------------------------------------------------------------------------------------


@functools.cache
def _version() -> str:
    return version("vultus")


def xmp_packet(origin: Origin) -> bytes:
    """The XMP packet of an image, UTF-8."""
    seed = "" if origin.seed is None else f"\n   <vultus:Seed>{origin.seed}</vultus:Seed>"
    text = _PACKET.format(
        rdf=RDF,
        dc=DC,
        xmp=XMP,
        iptc=IPTC,
        own=OWN,
        source=source_of(origin),
        version=_version(),
        description=escape(origin.description),
        model=escape(origin.model),
        seed=seed,
    )
    return text.encode()


def encode_marked(
    image: Image.Image, kind: MarkedFormat, origin: Origin, *, watermark: bool = True, quality: int = 95
) -> bytes:
    """Encode an RGB image as a file with the metadata of `origin`.

    Args:
        image: RGB.
        kind: PNG and TIFF keep the pixels; JPEG and AVIF are written without chroma subsampling; a GIF has 256 colours.
        origin: the content of the metadata.
        watermark: add the invisible watermark to the pixels.
        quality: of JPEG, WebP and AVIF.

    The same arguments give the same bytes.
    """
    packet, description = xmp_packet(origin), origin.description
    if watermark:
        image = add_watermark(image)
    buffer = io.BytesIO()
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("Software", "vultus")
        text.add_text("Comment", description)
        text.add_itxt("XML:com.adobe.xmp", packet.decode())
        # For faces, run lengths and Huffman codes alone give files as small as zlib's full search, in half the time.
        image.save(buffer, "PNG", pnginfo=text, compress_level=1, compress_type=zlib.Z_RLE)
    elif kind == "JPEG":
        image.save(buffer, "JPEG", quality=quality, subsampling=0, comment=description.encode(), xmp=packet)
    elif kind == "WEBP":
        image.save(buffer, "WEBP", quality=quality, xmp=packet)
    elif kind == "AVIF":
        image.save(buffer, "AVIF", quality=quality, subsampling="4:4:4", xmp=packet)
    elif kind == "TIFF":
        fields: dict[int, Any] = {TIFF_DESCRIPTION: description, TIFF_SOFTWARE: "vultus", TIFF_XMP: packet}
        image.save(buffer, "TIFF", compression="tiff_adobe_deflate", tiffinfo=fields)
    else:
        image.quantize(256).save(buffer, "GIF", comment=description.encode())
        return mark_gif(buffer.getvalue(), origin)
    return buffer.getvalue()


def save_marked(
    image: Image.Image,
    path: Path,
    origin: Origin,
    *,
    watermark: bool = True,
    quality: int = 95,
    signer: Sign | None = None,
    inputs: Inputs | None = None,
    overwrite: bool = True,
) -> None:
    """Write the file of `encode_marked` atomically, in the format of the suffix (WRITABLE); with a signer, signed.

    The watermark is for faces that are given to others. Sample grids of a training run keep their pixels. For `inputs`
    and `overwrite` see write_marked.
    """
    kind = WRITABLE[path.suffix.lower()]
    data = encode_marked(image, kind, origin, watermark=watermark, quality=quality)
    if signer is not None:
        data = signer(data, kind, origin)
    write_marked(data, path, inputs=inputs, overwrite=overwrite)


def write_marked(data: bytes, path: Path, *, inputs: Inputs | None = None, overwrite: bool = True) -> None:
    """Write a marked image file atomically.

    Raises UserError if `path` is one of `inputs`; and, without `overwrite`, if a file is there that vultus did not
    write, or one that shows something else. The same image again is no error.
    """
    if inputs is not None:
        inputs.check(path)
    if not overwrite and os.path.lexists(path):
        check_marked(path)
        old = path.read_bytes()
        if old == data:
            return
        if not _same_image(old, data):
            other = read_marks(old).description or "another image"
            raise UserError(f"{path}: exists and shows something else ({other[:120]}); {REPLACE}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def check_marked(path: Path) -> None:
    """Raise UserError if there is something at `path` that is no image file written by vultus."""
    if os.path.lexists(path) and not is_marked(path):
        raise UserError(f"{path}: exists and was not written by vultus; {REPLACE}")


def is_marked(path: Path) -> bool:
    """Whether `path` is an image file that vultus wrote, as its metadata say."""
    try:
        return path.is_file() and (read_marks(path.read_bytes()).tool or "").startswith("vultus")
    except OSError:
        return False


def _same_image(a: bytes, b: bytes) -> bool:
    """Whether two image files show the same pixels, with the same marks but for the version of vultus."""
    if replace(read_marks(a), tool=None) != replace(read_marks(b), tool=None):
        return False
    try:
        with Image.open(io.BytesIO(a), formats=[*MEDIA_TYPES]) as one, Image.open(io.BytesIO(b)) as other:
            if (one.size, getattr(one, "n_frames", 1)) != (other.size, getattr(other, "n_frames", 1)):
                return False
            pairs = zip(ImageSequence.Iterator(one), ImageSequence.Iterator(other), strict=True)
            return all(left.convert("RGB").tobytes() == right.convert("RGB").tobytes() for left, right in pairs)
    except Exception:  # a damaged file: Pillow's decoders raise many kinds of errors
        return False


def mark_gif(data: bytes, origin: Origin) -> bytes:
    """A GIF file with the XMP packet added as part 3 of the XMP specification defines.

    The packet is in an application extension, not divided into blocks. A reader that does not know this extension takes
    its bytes for lengths of blocks to skip; from wherever it arrives, the 258 bytes behind the packet lead it to the
    end of the extension.
    """
    assert data.endswith(b"\x3b")
    return data[:-1] + GIF_XMP + xmp_packet(origin) + GIF_END + b"\x3b"


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyntheticMetadata:
    """The metadata of an image. `source` is the IPTC DigitalSourceType; None stands for a property that is absent."""

    source: str | None = None
    tool: str | None = None
    model: str | None = None
    seed: int | None = None
    description: str | None = None

    @property
    def synthetic(self) -> bool:
        """Whether the metadata say that a trained model generated the image or a part of it."""
        return (self.source or "").removeprefix(SOURCES) in (
            "trainedAlgorithmicMedia",
            "compositeSynthetic",
            "compositeWithTrainedAlgorithmicMedia",
        )


def read_marks(data: bytes) -> SyntheticMetadata:
    """The metadata of an image file; `SyntheticMetadata()` for any file that is no image or has none."""
    if data[:4] == b"GIF8":
        # Pillow does not read the packet of a GIF; ours is behind the images.
        start = data.rfind(GIF_XMP)
        end = data.find(GIF_END, start)
        return read_packet(data[start + len(GIF_XMP) : end]) if 0 <= start < end else SyntheticMetadata()
    try:
        with Image.open(io.BytesIO(data), formats=[*MEDIA_TYPES]) as image:
            return read_metadata(image)
    except Exception:  # Pillow's readers raise many kinds of errors
        return SyntheticMetadata()


def read_metadata(image: Image.Image) -> SyntheticMetadata:
    """The metadata in the XMP packet of an opened image; `SyntheticMetadata()` if there is no readable packet."""
    packet: Any = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    return read_packet(packet.encode() if isinstance(packet, str) else packet)


def read_packet(packet: bytes) -> SyntheticMetadata:
    """Read an XMP packet. RDF allows a property to be an element or an attribute."""
    # XMP has no document type, and an entity in one could expand to gigabytes.
    if not packet.strip() or b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        return SyntheticMetadata()
    try:
        root = ElementTree.fromstring(packet.strip(b"\x00 \r\n\t"))
    except ElementTree.ParseError:
        return SyntheticMetadata()
    values: dict[str, str] = {}
    for description in root.iter(f"{{{RDF}}}Description"):
        values |= description.attrib
        values |= {child.tag: "".join(child.itertext()).strip() for child in description}
    seed = values.get(f"{{{OWN}}}Seed", "")
    return SyntheticMetadata(
        source=values.get(f"{{{IPTC}}}DigitalSourceType"),
        tool=values.get(f"{{{XMP}}}CreatorTool"),
        model=values.get(f"{{{OWN}}}Model") or None,
        seed=int(seed) if seed.lstrip("-").isdecimal() and len(seed) < 30 else None,
        description=values.get(f"{{{DC}}}description"),
    )

"""What a picture says of itself: that a trained model made it, which one, and of which seed.

Every picture carries an XMP packet (ISO 16684-1) with the IPTC property that news agencies, search engines and social
networks read, DigitalSourceType (IPTC Photo Metadata 2025.1), with the value for pictures of a trained model, or the
one for composites where real photos stand among the faces. PNG, JPEG and WebP keep it where their standards say; GIF
has no such place in Pillow, so it is put there by hand (`mark_gif`). The bytes are a function of the pixels and the
Origin: no time is written.

Metadata are lost when a picture is copied as pixels. The watermark (watermark.py) is for that.

Neither torch nor a module that imports it is needed here.
"""

from __future__ import annotations

import functools
import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image, PngImagePlugin

from vultus._files import atomic_path, sha256_file
from vultus.images.watermark import add_watermark

Kind = Literal["PNG", "JPEG", "WEBP"]
KINDS: dict[str, Kind] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

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
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">{words}</rdf:li></rdf:Alt></dc:description>
   <vultus:Model>{model}</vultus:Model>{seed}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


Sign = Callable[[bytes, Kind, "Origin"], bytes]  # credentials.Signer


@dataclass(frozen=True)
class Origin:
    """What a picture says of itself.

    Attributes:
        model: the snapshot: the first 16 hex digits of its file's sha256 (`model_id`), or its name on the hub.
        seed: of the noise.
        detail: for instance "embedding 3, noise 0".
        photos: real photos stand among the faces.
    """

    model: str
    seed: int | None = None
    detail: str = ""
    photos: bool = False

    @property
    def words(self) -> str:
        """For people: in the comment of PNG, JPEG and GIF, and in the description."""
        what = "AI-generated faces beside real photos" if self.photos else "AI-generated face"
        parts = [what, f"snapshot {self.model}" if self.model else "", self.detail]
        parts.insert(2, "" if self.seed is None else f"seed {self.seed}")
        text = ", ".join(part for part in parts if part)
        return "".join(letter if letter.isprintable() else " " for letter in text)  # XML allows no others


def source_of(origin: Origin) -> str:
    """The IPTC DigitalSourceType of such a picture."""
    return COMPOSITE if origin.photos else SYNTHETIC


def model_id(path: str | os.PathLike[str] | None) -> str:
    """What pictures call the snapshot in this file; empty for one that was never a file."""
    return sha256_file(path)[:16] if path else ""


# --- writing ----------------------------------------------------------------------------------------------------------


@functools.cache
def _version() -> str:
    return version("vultus")


def xmp_packet(origin: Origin) -> bytes:
    """The XMP packet of a picture, UTF-8."""
    seed = "" if origin.seed is None else f"\n   <vultus:Seed>{origin.seed}</vultus:Seed>"
    text = _PACKET.format(
        rdf=RDF,
        dc=DC,
        xmp=XMP,
        iptc=IPTC,
        own=OWN,
        source=source_of(origin),
        version=_version(),
        words=escape(origin.words),
        model=escape(origin.model),
        seed=seed,
    )
    return text.encode()


def encode_marked(
    image: Image.Image, kind: Kind, origin: Origin, *, watermark: bool = True, quality: int = 95
) -> bytes:
    """The file of an RGB picture, with what it says of itself.

    Args:
        image: RGB.
        kind: PNG keeps the pixels; JPEG is written without chroma subsampling.
        origin: what the picture says.
        watermark: put the invisible watermark into the pixels.
        quality: of JPEG and WebP.

    The same arguments give the same bytes.
    """
    packet, words = xmp_packet(origin), origin.words
    if watermark:
        image = add_watermark(image)
    buffer = io.BytesIO()
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("Software", "vultus")
        text.add_text("Comment", words)
        text.add_itxt("XML:com.adobe.xmp", packet.decode())
        # On faces, runs and Huffman codes alone are as short as zlib's search for repetitions, in half of the time.
        image.save(buffer, "PNG", pnginfo=text, compress_level=1, compress_type=zlib.Z_RLE)
    elif kind == "JPEG":
        image.save(buffer, "JPEG", quality=quality, subsampling=0, comment=words.encode(), xmp=packet)
    else:
        image.save(buffer, "WEBP", quality=quality, xmp=packet)
    return buffer.getvalue()


def save_marked(
    image: Image.Image, path: Path, origin: Origin, *, watermark: bool = True, signer: Sign | None = None
) -> None:
    """Write PNG, JPEG or WebP by the suffix, atomically, as `encode_marked` encodes it, signed where a signer is given.

    The watermark is for files that are handed out. Sheets that show how a training goes keep their pixels.
    """
    kind = KINDS[path.suffix.lower()]
    data = encode_marked(image, kind, origin, watermark=watermark)
    if signer is not None:
        data = signer(data, kind, origin)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def mark_gif(data: bytes, origin: Origin) -> bytes:
    """A GIF file with the XMP packet, as XMP's specification part 3 puts it there.

    The packet stands in an application extension, not cut into blocks. To readers that know nothing of it, its bytes
    are lengths of blocks to skip; the 258 bytes behind it lead each of them to the end, wherever they have got to.
    """
    assert data.endswith(b"\x3b")
    slide = b"\x01" + bytes(range(255, -1, -1)) + b"\x00"
    return data[:-1] + b"\x21\xff\x0bXMP DataXMP" + xmp_packet(origin) + slide + b"\x3b"


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What a picture's metadata say. `source` is the IPTC DigitalSourceType; None where they say nothing."""

    source: str | None = None
    tool: str | None = None
    model: str | None = None
    seed: int | None = None
    description: str | None = None

    @property
    def synthetic(self) -> bool:
        """Whether a trained model made the picture, or a part of it, by its own word."""
        return (self.source or "").removeprefix(SOURCES) in (
            "trainedAlgorithmicMedia",
            "compositeSynthetic",
            "compositeWithTrainedAlgorithmicMedia",
        )


def read_marks(image: Image.Image) -> Said:
    """What an opened picture says in its XMP packet; `Said()` where there is none, or none that can be read."""
    packet: Any = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    return read_packet(packet.encode() if isinstance(packet, str) else packet)


def read_packet(packet: bytes) -> Said:
    """Read an XMP packet: properties as elements or as attributes, as RDF allows."""
    # No XMP has a document type, and an entity in one could unfold to gigabytes.
    if not packet.strip() or b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        return Said()
    try:
        root = ElementTree.fromstring(packet.strip(b"\x00 \r\n\t"))
    except ElementTree.ParseError:
        return Said()
    found: dict[str, str] = {}
    for description in root.iter(f"{{{RDF}}}Description"):
        found |= description.attrib
        found |= {child.tag: "".join(child.itertext()).strip() for child in description}
    seed = found.get(f"{{{OWN}}}Seed", "")
    return Said(
        source=found.get(f"{{{IPTC}}}DigitalSourceType"),
        tool=found.get(f"{{{XMP}}}CreatorTool"),
        model=found.get(f"{{{OWN}}}Model") or None,
        seed=int(seed) if seed.lstrip("-").isdecimal() and len(seed) < 30 else None,
        description=found.get(f"{{{DC}}}description"),
    )

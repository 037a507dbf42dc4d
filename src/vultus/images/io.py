"""Pixels: decoding of untrusted bytes, the crop of the training images, conversions between ranges, grids.

`images` always means uint8 tensors [N, 3, H, W]; `x` means float tensors [N, 3, H, W] in [-1, 1]. Every conversion
between the two happens here. torch is imported only by the functions that use tensors, because commands such as
`vultus detect` do not need it and start faster without it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError, features

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 80_000_000  # a file of a few kilobytes can claim gigapixels; phones stay below this
MIN_SIDE = 32  # smaller images hold no face that an encoder could read
MAX_FILE_BYTES = 200_000_000  # a larger file is not a photo and could fill the memory
# Part of a square image: the central fraction, or left, top and side as parts of the image.
Crop = float | tuple[float, float, float]
HEADER = 16  # height of a grid's labels in pixels

# Formats that photos are read in, by Pillow's name, and the part of Pillow that a build can lack. Only raster formats
# with a signature, which are decoded within this process: none that starts another program (EPS), holds pages, layers
# or video (PDF, PSD, MPEG), or is recognised by its suffix alone (TGA).
PHOTO_FORMATS: dict[str, str | None] = {
    "JPEG": "jpg",
    "PNG": "zlib",
    "WEBP": "webp",
    "GIF": None,
    "BMP": None,
    "TIFF": None,
    "AVIF": "avif",
    "JPEG2000": "jpg_2000",
    "PPM": None,
    "QOI": None,
}
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs")
AVIF_BRANDS = (b"avif", b"avis")

# The limit in decode_image is lower than Pillow's and names the size, so Pillow's warning would be a second message.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Warnings about damaged metadata do not concern the user: the image itself is read.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class BadImage(ValueError):
    """Bytes that are not a usable image. The message is the reason in a few words."""


class TooLarge(BadImage):
    """An image of more pixels than allowed."""


class NoDecoder(BadImage):
    """An image of a format that needs an extra, or a Pillow that is built with it."""


@functools.cache
def photo_suffixes() -> frozenset[str]:
    """Suffixes, in lower case with the dot, of the files that are taken for photos.

    They are those that Pillow registers for PHOTO_FORMATS. HEIC and AVIF are among them even where they cannot be
    read, so that such a file is reported and not passed over.
    """
    Image.init()
    registered = Image.registered_extensions().items()
    return frozenset(
        {suffix for suffix, name in registered if name in PHOTO_FORMATS or name == "MPO"} | {".avif", *HEIF_SUFFIXES}
    )


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """The PHOTO_FORMATS that the installed Pillow reads."""
    Image.init()
    return tuple(
        name for name, part in PHOTO_FORMATS.items() if name in Image.OPEN and (part is None or features.check(part))
    )


@functools.cache
def _heif_formats() -> tuple[str, ...]:
    """("HEIF",) if the extra `heic` is installed."""
    try:
        import pillow_heif
    except ImportError:
        return ()
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def photo_media_types() -> dict[str, str]:
    """{media type: format} of the photos that can be read here, for uploads."""
    types = {
        "image/png": "PNG",
        "image/jpeg": "JPEG",
        "image/webp": "WEBP",
        "image/avif": "AVIF",
        "image/bmp": "BMP",
        "image/gif": "GIF",
        "image/heic": "HEIF",
        "image/heif": "HEIF",
        "image/jp2": "JPEG2000",
        "image/tiff": "TIFF",
    }
    read = (*_pillow_formats(), *_heif_formats())
    return {kind: name for kind, name in types.items() if name in read}


def _formats_of(data: bytes) -> tuple[str, ...]:
    """The formats to try on these bytes. Raises NoDecoder for HEIC and AVIF where they cannot be read."""
    if data[4:8] != b"ftyp":
        return _pillow_formats()
    # ISO 14496-12: the first box lists the brands, four bytes each, that the file conforms to.
    box = data[8 : min(int.from_bytes(data[:4], "big"), 512)]
    brands = {box[start : start + 4] for start in range(0, len(box), 4)}
    if not brands.isdisjoint(AVIF_BRANDS):
        if "AVIF" not in _pillow_formats():
            raise NoDecoder("an AVIF image, which the installed Pillow cannot read: pip install -U pillow")
    elif not brands.isdisjoint(HEIF_BRANDS):
        if not _heif_formats():
            raise NoDecoder("a HEIC image; to read it: pip install 'vultus[heic]'")
        return _heif_formats()
    return _pillow_formats()


def open_image(data: bytes) -> Image.Image:
    """Open encoded bytes without decoding the pixels. Raises BadImage if they are not an image that can be read."""
    if not data:
        raise BadImage("empty file")
    try:
        return Image.open(io.BytesIO(data), formats=_formats_of(data))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not a JPEG, PNG or WebP image, nor of another format that is read") from None
    except Exception as error:
        raise _damaged(error) from None


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the untrusted bytes of an image to an RGB image in upright orientation.

    The formats are PHOTO_FORMATS as far as the installed Pillow reads them, and HEIC with the extra `heic`. EXIF
    orientation is applied, CMYK, palettes and grey become RGB, 16 bits become 8, transparency is composited on white,
    an animation gives its first frame. Raises BadImage with the reason, and no other exception for any bytes.
    """
    try:
        image = open_image(data)
        width, height = image.size
        if width * height > max_pixels:
            raise TooLarge(f"too large: {width}x{height}, the limit is {max_pixels // 1_000_000} megapixels")
        if min(width, height) < MIN_SIDE:
            raise BadImage(f"too small: {width}x{height}, the shorter side needs {MIN_SIDE} pixels")
        in_16_bits = image.format == "PPM"  # Pillow scales every depth above 8 to 16 bits, in mode I
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF: the pixels are intact
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, in_16_bits)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"too large: the limit is {max_pixels // 1_000_000} megapixels") from None
    except Exception as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> BadImage:
    """Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others on damaged files."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return TooLarge("too large: more pixels than any photo has")
    return BadImage(f"damaged image ({' '.join(str(error).split()) or type(error).__name__})")


def _to_rgb(image: Image.Image, in_16_bits: bool) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        largest = values.max(initial=0)
        scale = 255 / 65535 if in_16_bits or largest > 255 else 1.0
        if image.mode == "F" and largest <= 1:  # the usual range of floating-point images
            scale = 255.0
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_margin(side: int, fraction: float) -> int:
    """Pixels to cut off at each end so that the central `fraction` of `side` remains."""
    return round(side * (1 - fraction) / 2)


def _place(whole: int, crop: Crop) -> tuple[int, int, int]:
    """Left, top and side, in pixels, of a crop of a square of `whole` pixels."""
    if isinstance(crop, float | int):
        margin = crop_margin(whole, crop)
        return margin, margin, whole - 2 * margin
    side = min(round(crop[2] * whole), whole)
    left, top = (min(max(round(value * whole), 0), whole - side) for value in crop[:2])
    return left, top, side


def centre_crop(image: Image.Image, size: int, crop: Crop = 1.0) -> Image.Image:
    """The part `crop` of the centre square of `image`, resized to size x size (antialiased Lanczos)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    x, y, inner = _place(side, crop)
    box = (left + x, top + y, left + x + inner, top + y + inner)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def crop_x(x: torch.Tensor, size: int, crop: Crop = 1.0) -> torch.Tensor:
    """`centre_crop` for a batch of square tensors [N, 3, S, S] -> [N, 3, size, size]; bilinear, differentiable."""
    left, top, side = _place(x.shape[-1], crop)
    x = x[..., top : top + side, left : left + side]
    if x.shape[-1] == size:
        return x
    import torch.nn.functional as F

    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def box_x(
    x: torch.Tensor, box: tuple[float, float, float], jitter: tuple[float, float, float], size: int
) -> torch.Tensor:
    """A square of images [N, 3, S, S] -> float32 [N, 3, size, size]; bilinear, differentiable.

    `box` is left, top and side as parts of the image, `jitter` is added to it. Both are rounded to whole pixels.
    """
    import torch.nn.functional as F

    whole = x.shape[-1]
    left, top, side = (round((value + change) * whole) for value, change in zip(box, jitter, strict=True))
    left, top = max(left, 0), max(top, 0)
    x = x[..., top : top + side, left : left + side].float()
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def from_pil(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL RGB images of one size -> uint8 [N, 3, H, W]."""
    import torch

    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def to_pil(image: torch.Tensor | npt.NDArray[np.uint8]) -> Image.Image:
    """One uint8 image [3, H, W] -> PIL RGB."""
    array = image if isinstance(image, np.ndarray) else image.cpu().numpy()
    if array.dtype != np.uint8:
        raise TypeError("to_pil takes uint8; use to_images on a float tensor first")
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def to_x(images: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """uint8 [0, 255] -> float [-1, 1], float32 unless `dtype` says otherwise."""
    return (images.float() if dtype is None else images.to(dtype)) / 127.5 - 1


def to_images(x: torch.Tensor) -> torch.Tensor:
    """float [-1, 1] (values outside are clamped) -> uint8 [0, 255], rounded to nearest."""
    import torch

    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def file_format(image: Image.Image) -> str:
    """The format of an image that Pillow opened. MPO, a JPEG with further images behind it, counts as JPEG."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def encode_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """JPEG without chroma subsampling: at quality 95 the PSNR is about 45 dB on 128x128 faces."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def grid(
    images: torch.Tensor | npt.NDArray[np.uint8], columns: int, *, gap: int = 2, labels: Sequence[str] = ()
) -> Image.Image:
    """One image of uint8 images [N, 3, H, W], row by row on white, `columns` in a row, with labels over the columns."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    header = HEADER if labels else 0
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap + header), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(to_pil(image), (column * (width + gap), header + row * (height + gap)))
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        draw.text((column * (width + gap) + 3, 2), label, fill="black", font=ImageFont.load_default(11))
    return sheet


def cell(sheet: Image.Image, row: int, column: int, side: int, *, gap: int = 2, labelled: bool = False) -> Image.Image:
    """The image in one cell of a `grid` of square images."""
    left, top = column * (side + gap), row * (side + gap) + (HEADER if labelled else 0)
    return sheet.crop((left, top, left + side, top + side))

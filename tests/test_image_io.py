"""Decoding of untrusted bytes, the crop, the conversions between ranges, and grids."""

from __future__ import annotations

import io
import random
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vultus.images import io as module
from vultus.images.io import (
    MIN_SIDE,
    BadImage,
    NoDecoder,
    centre_crop,
    crop_x,
    decode_image,
    encode_jpeg,
    from_pil,
    grid,
    photo_suffixes,
    to_images,
    to_pil,
    to_x,
)

# Quarters: red and green above, blue and white below.
QUARTERS = {(10, 10): (255, 0, 0), (54, 10): (0, 255, 0), (10, 38): (0, 0, 255), (54, 38): (255, 255, 255)}


def quarters(size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    top, left = size[1] // 2, size[0] // 2
    pixels[:top, :left] = QUARTERS[10, 10]
    pixels[:top, left:] = QUARTERS[54, 10]
    pixels[top:, :left] = QUARTERS[10, 38]
    pixels[top:, left:] = QUARTERS[54, 38]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def need(kind: str) -> None:
    """Skip the test where a format cannot be read or written here."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="the extra `heic` is not installed")
        assert module._heif_formats() == ("HEIF",)
    elif kind not in module._pillow_formats() or kind not in Image.SAVE:
        pytest.skip(f"the installed Pillow was built without {kind}")


def assert_quarters(image: Image.Image, tolerance: int = 8) -> None:
    assert image.mode == "RGB"
    for place, colour in QUARTERS.items():
        assert np.abs(np.subtract(image.getpixel(place), colour)).max() <= tolerance, place


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 95}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg", "quality": 95}),
        ("AVIF", {"quality": 90}),
        ("JPEG2000", {}),
        ("PPM", {}),
        ("QOI", {}),
        ("HEIF", {"quality": 95}),
    ],
)
def test_formats(kind: str, options: dict[str, object]) -> None:
    need(kind)
    image = decode_image(encoded(quarters(), kind, **options))
    assert image.size == (64, 48)
    assert_quarters(image, tolerance=12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    need(kind)
    # What a camera in this orientation stores: the inverse of what a viewer has to apply.
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quarters() if orientation == 1 else quarters().transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    image = decode_image(encoded(stored, kind, exif=exif.tobytes(), **options))
    assert image.size == (64, 48)
    assert_quarters(image)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as images/io.py does; pytest replaces its filters
def test_damaged_exif_is_ignored() -> None:
    data = encoded(quarters(), "JPEG", quality=95, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode_image(data).size == (64, 48)


def test_phone_photo_with_a_second_image_inside() -> None:
    data = encoded(
        quarters(), "MPO", quality=95, subsampling=0, save_all=True, append_images=[Image.new("RGB", (9, 9))]
    )
    assert_quarters(decode_image(data), tolerance=12)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(quarters().convert("CMYK"), kind, **options)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert_quarters(decode_image(data), tolerance=12)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_becomes_rgb(kind: str) -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)))
    image = decode_image(encoded(ramp, kind))
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels[..., :1] == pixels).all()
    assert abs(int(pixels[20, 40, 0]) - 160) <= 3


def test_one_bit_png() -> None:
    assert (np.asarray(decode_image(encoded(Image.new("1", (40, 40), 1), "PNG"))) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_keeps_its_tones(kind: str) -> None:
    # Pillow's own conversion would clip everything above 255 to white.
    need(kind)
    values = np.linspace(0, 65535, 64).astype(np.uint16)
    data = encoded(Image.fromarray(np.tile(values, (48, 1))), kind)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    pixels = np.asarray(decode_image(data))
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels[0, :, 0].astype(int) - values / 257).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_that_is_dark_stays_dark(kind: str) -> None:
    data = encoded(Image.fromarray(np.full((48, 64), 200, np.uint16)), kind)
    assert np.asarray(decode_image(data)).max() <= 1


def test_16_bit_rgb_png() -> None:
    assert_quarters(decode_image(png(64, 48, 2, _rows_16(quarters()), depth=16)))


@pytest.mark.parametrize("largest", [1.0, 255.0])
def test_floating_point_tiff(largest: float) -> None:
    ramp = np.tile(np.linspace(0, largest, 64, dtype=np.float32), (48, 1))
    pixels = np.asarray(decode_image(encoded(Image.fromarray(ramp), "TIFF")))
    assert np.abs(pixels[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1


def _rows_16(image: Image.Image) -> bytes:
    pixels = np.asarray(image).astype(">u2") * 257
    return b"".join(b"\x00" + row.astype(">u2").tobytes() for row in pixels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white(kind: str) -> None:
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:20] = (255, 0, 0, 255)
    pixels[20:30] = (0, 0, 0, 0)
    pixels[30:] = (0, 0, 0, 128)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = decode_image(encoded(Image.fromarray(pixels), kind, **options))
    assert image.getpixel((5, 5)) == (255, 0, 0)
    assert image.getpixel((5, 25)) == (255, 255, 255)
    assert image.getpixel((5, 35)) == (127, 127, 127)


def test_grey_with_alpha() -> None:
    pixels = np.zeros((40, 40, 2), np.uint8)
    pixels[20:] = (100, 255)
    image = decode_image(encoded(Image.fromarray(pixels, "LA"), "PNG"))
    assert image.getpixel((5, 5)) == (255, 255, 255)
    assert image.getpixel((5, 25)) == (100, 100, 100)


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.paste(1, (0, 20, 40, 40))
    result = decode_image(encoded(image, "PNG", transparency=0))
    assert result.getpixel((5, 5)) == (255, 255, 255)
    assert result.getpixel((5, 25)) == (200, 10, 20)


@pytest.mark.parametrize(("mode", "colour", "other"), [("RGB", (9, 8, 7), (50, 60, 70)), ("L", 9, 50)])
def test_transparent_colour_key(mode: str, colour: object, other: object) -> None:
    image = Image.new(mode, (40, 40), colour)
    image.paste(other, (0, 20, 40, 40))
    result = decode_image(encoded(image, "PNG", transparency=colour))
    assert result.getpixel((5, 5)) == (255, 255, 255)
    assert result.getpixel((5, 25)) == (other if isinstance(other, tuple) else (other,) * 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert decode_image(data).getpixel((20, 20)) == (250, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_is_rejected(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(BadImage):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just a text\n" * 50, "not a JPEG, PNG or WebP image, nor of"),
        (encoded(quarters(), "PDF"), "not a JPEG, PNG or WebP image, nor of"),
        (encoded(quarters(), "EPS"), "not a JPEG, PNG or WebP image, nor of"),
        (encoded(quarters(), "TGA"), "not a JPEG, PNG or WebP image, nor of"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG or WebP image, nor of"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "too small: 1x1"),
        (encoded(Image.new("RGB", (500, MIN_SIDE - 1)), "JPEG"), "too small: 500x31"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode_image(data)


def test_smallest_side_that_is_accepted() -> None:
    assert decode_image(encoded(Image.new("RGB", (MIN_SIDE, 300)), "PNG")).size == (MIN_SIDE, 300)


def png(width: int, height: int, colour_type: int, rows: bytes | None, depth: int = 8) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    if rows is None:  # black, compressed row by row: a decompression bomb
        packer, row = zlib.compressobj(1), bytes(1 + width * 3)
        parts = [packer.compress(row) for _ in range(height)]
        body = b"".join(parts) + packer.flush()
    else:
        body = zlib.compress(rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_bomb_is_rejected_before_it_is_decompressed() -> None:
    data = png(20_000, 20_000, 2, None)
    assert len(data) < 10_000_000
    tracemalloc.start()
    with pytest.raises(BadImage, match="too large"):
        decode_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_size_beyond_the_limit_of_pillow() -> None:
    with pytest.raises(BadImage, match="too large"):
        decode_image(png(2**31 - 1, 2**31 - 1, 2, b""))


def test_pixel_limit_is_an_argument() -> None:
    data = encoded(quarters((100, 100)), "PNG")
    assert decode_image(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(BadImage, match="too large: 100x100"):
        decode_image(data, max_pixels=9_999)


def test_formats_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(100)
    avif = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(100)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)  # the import fails
        patch.setattr(module, "_heif_formats", module._heif_formats.__wrapped__)
        patch.setattr(module, "_pillow_formats", lambda: ("JPEG", "PNG"))
        with pytest.raises(NoDecoder, match=r"HEIC image; to read it: pip install 'vultus\[heic\]'"):
            decode_image(heic)
        with pytest.raises(NoDecoder, match="an AVIF image, which the installed Pillow cannot read"):
            decode_image(avif)
    assert {".heic", ".avif", ".tif", ".bmp", ".gif", ".jp2", ".jfif"} <= photo_suffixes()
    assert not photo_suffixes() & {".eps", ".pdf", ".psd", ".svg", ".mpg", ".h5", ".tga", ".txt", ""}


def test_random_bytes_raise_only_bad_image() -> None:
    rng = random.Random(0)
    starts = [
        b"",
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"RIFF\x40\0\0\0WEBPVP8 ",
        b"GIF89a",
        b"BM",
        b"II*\0\x08\0\0\0",
        b"MM\0*\0\0\0\x08",
        b"P6 60 60 255 ",
        b"qoif",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\xff\x4f\xff\x51",
        b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
        b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf",
    ]
    for number in range(1400):
        data = starts[number % len(starts)] + rng.randbytes(rng.randrange(0, 300))
        with pytest.raises(BadImage) as caught:
            decode_image(data)
        assert "\n" not in str(caught.value)
        assert str(caught.value)


def test_damaged_images_raise_only_bad_image() -> None:
    rng = random.Random(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    whole = [
        encoded(quarters(), "JPEG", exif=exif),
        encoded(quarters(), "PNG", exif=exif),
        encoded(quarters(), "WEBP", exif=exif),
        encoded(quarters().convert("P"), "PNG", transparency=0),
        encoded(quarters(), "PNG", save_all=True, append_images=[quarters().transpose(Image.Transpose.ROTATE_180)]),
        encoded(quarters(), "GIF"),
        encoded(quarters(), "BMP"),
        encoded(quarters(), "TIFF", exif=exif),
        encoded(quarters(), "TIFF", compression="tiff_lzw"),
        encoded(quarters(), "PPM"),
    ]
    more = [kind for kind in ("AVIF", "JPEG2000", "QOI") if kind in module._pillow_formats() and kind in Image.SAVE]
    whole += [encoded(quarters(), kind) for kind in (*more, *module._heif_formats())]
    rejected = 0
    for number in range(1500):
        data = bytearray(whole[number % len(whole)])
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if number % 3 == 0:
            del data[rng.randrange(len(data)) :]
        try:
            image = decode_image(bytes(data))
        except BadImage:
            rejected += 1
        else:
            assert image.mode == "RGB"
            assert min(image.size) >= MIN_SIDE
    assert 300 < rejected < 1500


# --- crop and ranges -------------------------------------------------------------------------------------------------


def test_to_x_and_back_is_exact_for_every_value() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = to_x(images)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_images(x), images)


def test_to_images_clamps_and_rounds() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 10.4 / 127.5 - 1, 10.6 / 127.5 - 1])
    assert to_images(x).tolist() == [0, 0, 128, 255, 255, 10, 11]


def test_pil_round_trip() -> None:
    image = quarters()
    images = from_pil([image, image])
    assert images.shape == (2, 3, 48, 64)
    assert images.dtype == torch.uint8
    assert np.array_equal(np.asarray(to_pil(images[1])), np.asarray(image))
    with pytest.raises(TypeError):
        to_pil(to_x(images)[0])


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_centre_crop_takes_the_middle(size: tuple[int, int]) -> None:
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    left, top = (size[0] - 100) // 2, (size[1] - 100) // 2
    pixels[top : top + 100, left : left + 100] = 40
    pixels[top + 10 : top + 90, left + 10 : left + 90] = 80
    image = Image.fromarray(pixels)
    whole = np.asarray(centre_crop(image, 100))
    assert whole[0, 0, 0] == 40
    assert whole[50, 50, 0] == 80
    assert (np.asarray(centre_crop(image, 80, 0.8)) == 80).all()


def test_crop_of_tensors_agrees_with_crop_of_images() -> None:
    ramp = np.linspace(0, 255, 160)
    pixels = np.stack([np.add.outer(ramp, ramp) / 2, np.tile(ramp, (160, 1)), np.tile(ramp[:, None], (1, 160))], -1)
    image = Image.fromarray(pixels.astype(np.uint8))
    from_image = to_x(from_pil([centre_crop(image, 96, 0.8)]))
    from_tensor = crop_x(to_x(from_pil([image])), 96, 0.8)
    assert from_tensor.shape == (1, 3, 96, 96)
    assert (from_image - from_tensor).abs().max() < 4 / 127.5


def test_jpeg_is_accurate_and_deterministic() -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
    data = encode_jpeg(smooth)
    assert data == encode_jpeg(smooth)
    error = np.asarray(decode_image(data)).astype(float) - np.asarray(smooth)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 42


def test_grid_lays_out_row_by_row() -> None:
    images = torch.zeros(3, 3, 10, 20, dtype=torch.uint8)
    images[2, 0] = 200
    sheet = grid(images, 2, gap=2)
    assert sheet.size == (42, 22)
    assert sheet.getpixel((5, 17)) == (200, 0, 0)
    assert sheet.getpixel((30, 17)) == (255, 255, 255)
    assert grid(images, 2, labels=("a", "b")).size == (42, 38)

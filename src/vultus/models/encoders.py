"""The face encoders that can give a generator its condition: FaceNet, MobileFaceNet, dlib's, or one in an ONNX file.

Shapes: x [N, 3, S, S] float in [-1, 1]; embeddings [N, dim] float32, unit norm.

Beside an ONNX file NAME.onnx there may be NAME.json, which says how the network reads a face; see EncoderInput. Without
it the input is that of ArcFace (Deng et al. 2019, arXiv:1801.07698): 112 pixels, RGB, values (rgb - 127.5) / 127.5, the
eyes where its template has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._files import read_json, sha256_file
from vultus.errors import UserError, in_one_line
from vultus.images.align import LEFT_EYE, RIGHT_EYE
from vultus.images.io import crop_x
from vultus.models.facenet import FACENET_WEIGHTS, Encoder, FaceNet, load_facenet
from vultus.models.mobilefacenet import BOX, MOBILEFACENET_WEIGHTS, load_mobilefacenet
from vultus.models.onnx_runtime import is_onnx, open_session
from vultus.models.second_encoder import load_dlib_encoder

FACENET, MOBILEFACENET, DLIB = "facenet", "mobilefacenet", "dlib"
NAMES = (FACENET, MOBILEFACENET, DLIB)
FACENET_ID = FaceNet.id
IDS = {FACENET_ID: FACENET, "mobilefacenet": MOBILEFACENET, "dlib-resnet-v1-fixed": DLIB}  # names by id
MISSING = "a face encoder from an ONNX file needs onnxruntime: pip install 'vultus[export]'"
UNIT = 1e-3  # largest difference of a norm from 1 where vectors count as normalised
SIDES = range(16, 1025)


class CropEncoder(Encoder, Protocol):
    """An encoder that also embeds crops."""

    def embed_crop(self, x: Tensor) -> Tensor:
        """Crops x [N, 3, size, size] in [-1, 1] -> unit-norm float32 [N, dim]."""
        ...


@dataclass(frozen=True)
class EncoderInput:
    """How a network reads a face: the keys of the JSON file beside an ONNX file, all of them optional.

    Attributes:
        id: name of the encoder; by default that of the file.
        size: side of the input in pixels; by default that of the network, or 112.
        crop: left, top and side of the square that is read, as parts of the frame that `vultus prepare` cuts.
        template: instead of `crop`, where the eyes are in the input: [[x, y], ...] in pixels, the left eye of the
            image first. Of the five points of ArcFace's templates only these two are used, as `--align` does.
        mean, std: (value - mean) / std is the input, for values from 0 to 255; a number, or one for each channel.
        channels: "rgb" or "bgr".
    """

    id: str
    size: int
    crop: tuple[float, float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str

    def entry(self) -> dict[str, Any]:
        """What a data set records."""
        return {name: getattr(self, name) for name in ("size", "channels")} | {
            name: list(getattr(self, name)) for name in ("crop", "mean", "std")
        }


class OnnxEncoder:
    """A face encoder in an ONNX file, run by ONNX Runtime on the CPU. It has no gradient.

    The network has one input, images [N, 3, size, size] or [N, size, size, 3], and one output, [N, dim]. Embeddings are
    normalised, whether the network does it or not.

    Args:
        path: of the ONNX file; NAME.json beside it as described above.

    Attributes:
        normalised: whether the network's own vectors have unit norm.
        settings: the input, as a data set records it.

    Raises UserError that names the file if it is no such network.
    """

    dtype = torch.float32

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such ONNX file")
        # One thread: with another number of threads, embeddings may be rounded differently.
        self._session = open_session(self.path, threads=1, missing=MISSING, remedy="give a face encoder")
        try:
            self._layout, size, self._batch = self._image_input()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: names in it are not text; give a face encoder") from None
        self.input = read_input(self.path, size)
        self.id, self.size, self.crop = self.input.id, self.input.size, self.input.crop
        self.settings = self.input.entry()
        self.weights_sha256 = sha256_file(self.path)
        self._mean = np.asarray(self.input.mean, np.float32).reshape(-1, 1, 1)
        self._std = np.asarray(self.input.std, np.float32).reshape(-1, 1, 1)
        ramp = torch.linspace(-1, 1, self.size).expand(1, 3, self.size, self.size)
        raw = self._run(torch.cat([ramp, ramp.flip(3)]))
        self.dim = raw.shape[1]
        self.normalised = bool(np.abs(np.linalg.norm(raw, axis=1) - 1).max() < UNIT)

    def __reduce__(self) -> tuple[type[OnnxEncoder], tuple[Path]]:
        return OnnxEncoder, (self.path.absolute(),)

    def embed(self, x: Tensor) -> Tensor:
        """Whole images x [N, 3, S, S] in [-1, 1] -> [N, dim] float32, unit norm; no gradient."""
        return self.embed_crop(crop_x(x, self.size, self.crop))

    def embed_crop(self, x: Tensor) -> Tensor:
        """Crops x [N, 3, size, size] in [-1, 1] -> [N, dim] float32, unit norm.

        Raises UserError if the network fails or gives values that are not finite.
        """
        if not len(x):
            return torch.zeros(0, self.dim)
        step = self._batch or len(x)
        raw = np.concatenate([self._run(part) for part in x.split(step)])
        return F.normalize(torch.from_numpy(raw))

    def _run(self, x: Tensor) -> np.ndarray:
        values = x.detach().float().cpu().numpy() * 127.5 + 127.5
        if self.input.channels == "bgr":
            values = values[:, ::-1]
        values = (values - self._mean) / self._std
        if self._layout == "nhwc":
            values = values.transpose(0, 2, 3, 1)
        name = self._session.get_inputs()[0].name
        parts = values[:, None] if self._batch == 1 else [values]
        try:
            rows = [self._session.run(None, {name: np.ascontiguousarray(part)})[0] for part in parts]
        except Exception as error:  # onnxruntime has a dozen exception classes
            raise UserError(
                f"{self.path}: failed on images [{len(x)}, 3, {self.size}, {self.size}] ({in_one_line(error)}); set "
                f"size in {sidecar(self.path).name}, or export it with a free number of images"
            ) from None
        raw = np.concatenate([row.reshape(len(part), -1) for row, part in zip(rows, parts, strict=True)])
        if raw.dtype.kind != "f" or not np.isfinite(raw).all():
            raise UserError(f"{self.path}: gives values that are no finite numbers; it is no face encoder")
        return raw.astype(np.float32)

    def _image_input(self) -> tuple[str, int | None, int | None]:
        """(layout, side, batch) of the input; None where the file leaves it free."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        for kind, ports in (("input", inputs), ("output", outputs)):
            if len(ports) != 1:
                names = ", ".join(port.name for port in ports[:6])
                raise UserError(
                    f"{self.path}: has {len(ports)} {kind}s ({names}); a face encoder with one {kind} is needed: "
                    "export it with the images as input and the embedding as output only"
                )
        shape = [value if isinstance(value, int) and value > 0 else None for value in inputs[0].shape]
        sides = {"nchw": shape[2:], "nhwc": shape[1:3]} if len(shape) == 4 else {}
        layout = next((name for name, at in (("nchw", 1), ("nhwc", 3)) if sides and shape[at] == 3), None)
        if layout is None or len(set(sides[layout])) != 1 or inputs[0].type != "tensor(float)":
            raise UserError(
                f"{self.path}: its input is {inputs[0].type} {inputs[0].shape}; float images [N, 3, S, S] or "
                "[N, S, S, 3] are needed: it is no face encoder, or has to be exported again"
            )
        if shape[0] not in (None, 1):
            raise UserError(
                f"{self.path}: takes exactly {shape[0]} images at a time; export it with a free number of images"
            )
        if len(outputs[0].shape) < 2 or all(value == 1 for value in outputs[0].shape[1:]):
            raise UserError(f"{self.path}: its output is {outputs[0].shape}; embeddings [N, dim] are needed")
        return layout, sides[layout][0], shape[0]


def sidecar(path: Path) -> Path:
    """The JSON file beside an ONNX file."""
    return path.with_suffix(".json")


def read_input(path: Path, size: int | None) -> EncoderInput:
    """How the network in `path`, whose input has `size` pixels (None: any), reads a face.

    Raises UserError that names the JSON file and the key for a value that cannot be right.
    """
    file = sidecar(path)
    given: Any = read_json(file) if file.is_file() else {}
    if not isinstance(given, dict):
        raise UserError(f'{file}: an object such as {{"size": 112}} is needed; correct or delete it')
    names = {field.name for field in fields(EncoderInput)} | {"template"}
    if unknown := sorted(given.keys() - names):
        raise UserError(f"{file}: has no key {unknown[0]!r}; there are {', '.join(sorted(names))}")
    side = given.get("size", size or 112)
    if type(side) is not int or side not in SIDES or size not in (None, side):
        need = f"the network takes {size}" if size else f"from {SIDES[0]} to {SIDES[-1]} pixels"
        raise UserError(f"{file}: size is {side!r}; {need}")
    if "crop" in given and "template" in given:
        raise UserError(f"{file}: crop and template say the same thing; leave one out")
    channels = given.get("channels", "rgb")
    if channels not in ("rgb", "bgr"):
        raise UserError(f'{file}: channels is {channels!r}; "rgb" or "bgr" is needed')
    crop = template_crop(_points(given["template"], file), side) if "template" in given else given.get("crop", BOX)
    left, top, whole = _numbers(crop, (3,), f"{file}: crop")
    if not (left >= 0 and top >= 0 and whole >= 0.1 and max(left, top) + whole <= 1):
        raise UserError(
            f"{file}: crop or template reads the square {left:.3g}, {top:.3g} of side {whole:.3g}, which is not in the "
            "frame that `vultus prepare` cuts; left, top and side are parts of it, from 0 to 1"
        )
    std = _numbers(given.get("std", 127.5), (1, 3), f"{file}: std")
    if min(std) <= 0:
        raise UserError(f"{file}: std is {list(std)}; numbers above 0 are needed")
    name = given.get("id", path.stem)
    if not isinstance(name, str) or not name.strip() or len(name) > 80:
        raise UserError(f"{file}: id is {name!r:.40}; a name is needed")
    mean = _numbers(given.get("mean", 127.5), (1, 3), f"{file}: mean")
    return EncoderInput(name, side, (left, top, whole), mean, std, channels)


def template_crop(eyes: tuple[tuple[float, float], tuple[float, float]], size: int) -> tuple[float, float, float]:
    """The square of a frame, as parts of it, that has the eyes at these pixels when it is resized to `size`."""
    (x, y), (other, _) = eyes
    side = (RIGHT_EYE[0] - LEFT_EYE[0]) / ((other - x) / size)
    return LEFT_EYE[0] - side * x / size, LEFT_EYE[1] - side * y / size, side


def _points(value: Any, file: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{file}: template is a list of points [[x, y], ...], the two eyes first")
    (x, y), (other, right) = (_numbers(point, (2,), f"{file}: template") for point in value[:2])
    if other - x < 4 or abs(right - y) > (other - x) / 2:
        raise UserError(
            f"{file}: template begins with [{x:g}, {y:g}], [{other:g}, {right:g}]; the eye on the left of "
            "the image comes first, then the one on the right"
        )
    return (x, y), (other, right)


def _numbers(value: Any, lengths: tuple[int, ...], what: str) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    right = all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in values)
    if len(values) not in lengths or not right:
        raise UserError(f"{what} is {str(value)[:60]}; {' or '.join(map(str, lengths))} numbers are needed")
    return tuple(float(one) for one in values)


def load_face_encoder(
    name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> CropEncoder:
    """The encoder `facenet`, `mobilefacenet` or `dlib`, on `device`, in `dtype` (None: the faster one); or FILE.onnx.

    MobileFaceNet and an ONNX file always compute in float32. Raises UserError for another name, and if weights are
    missing or a file is no face encoder.
    """
    if is_onnx(name):
        return OnnxEncoder(name)
    if name == FACENET:
        return load_facenet(device=device, dtype=dtype)
    if name == MOBILEFACENET:
        return load_mobilefacenet(device=device)
    if name == DLIB:
        return load_dlib_encoder(device=device, dtype=dtype)
    raise UserError(f"--encoder {str(name)[:80]}: no such face encoder; give {', '.join(NAMES)} or FILE.onnx")


def load_condition_encoder(
    metadata: Mapping[str, Any],
    what: str | Path,
    *,
    given: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> CropEncoder:
    """The encoder of the embeddings that a model was trained on, by its metadata, in float32 on `device`.

    `what` names the model in messages; `given` is the user's encoder, needed where it is an ONNX file. Raises UserError
    that names both if `given` is another one, and if there is no network to embed photos with.
    """
    needed = metadata.get("encoder") or {}
    name = given or IDS.get(needed.get("id", FACENET_ID))
    if name is None:
        remedy = "" if needed.get("network") is False else "give its network with --encoder FILE.onnx, or "
        raise UserError(
            f"{what}: was trained on embeddings of {needed['id']}, so photos cannot be embedded; {remedy}give a file "
            f"of {needed['id']} embeddings"
        )
    encoder = load_face_encoder(name, device=device, dtype=torch.float32)
    if differs := difference(needed, encoder_entry(encoder)):
        raise UserError(f"{what}: --encoder gives embeddings of {differs}, on which it was trained; give that encoder")
    return encoder


def device_of(network: object) -> torch.device:
    """The device that an encoder or a generator computes on; the CPU for one without parameters."""
    parameter = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def encoder_entry(encoder: Encoder) -> dict[str, Any]:
    """What a data set records about an encoder."""
    entry = {
        "id": encoder.id,
        "dim": encoder.dim,
        "weights_sha256": encoder.weights_sha256,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }
    if isinstance(encoder, OnnxEncoder):
        entry |= {"input": encoder.settings, "normalised": encoder.normalised}
    return entry


def difference(needed: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """How two encoders differ, "A, 512 numbers, ... instead of B, ..."; empty if they are the same.

    Both are entries as encoder_entry() makes them, or parts of them; what one of them does not know is not compared.
    """
    for key in ("id", "dim", "weights_sha256", "input"):
        if needed.get(key) and given.get(key) and same_weights(needed[key]) != same_weights(given[key]):
            return f"{_described(given, key)} instead of {_described(needed, key)}"
    return ""


def same_weights(sha256: Any) -> Any:
    """The hash of the first pinned file of an encoder for all of them: they hold one network in float16 and float32."""
    for files in (FACENET_WEIGHTS, MOBILEFACENET_WEIGHTS):
        if sha256 in [weights.sha256 for weights in files]:
            return files[0].sha256
    return sha256


def _described(entry: Mapping[str, Any], key: str) -> str:
    text = f"{entry.get('id', 'an unnamed encoder')} ({entry.get('dim', '?')} numbers)"
    if key == "weights_sha256":
        text += f" with weights {str(entry[key])[:12]}"
    return text + (f" with input {entry[key]}" if key == "input" else "")

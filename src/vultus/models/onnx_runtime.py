"""A generator as one ONNX file, run by ONNX Runtime: numpy in, numpy out, and torch is not imported.

The file is written by export.py. Its metadata hold two entries: `vultus`, JSON with what the snapshot says of itself,
and `vultus.people`, JSON of the distribution of its training embeddings, float32 in base64.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vultus._files import processors
from vultus.errors import UserError, in_one_line

Floats = npt.NDArray[np.float32]

FORMAT = "1"
SUFFIX = ".onnx"
ABOUT, PEOPLE = "vultus", "vultus.people"
MISSING = "an exported model needs ONNX Runtime: pip install 'vultus[export]'"


class OnnxNetwork:
    """generator(z [N, z_dim], c [N, c_dim]) -> x [N, 3, R, R] in [-1, 1], all float32, on the processor."""

    def __init__(self, path: Path, about: Mapping[str, Any], session: Any) -> None:
        self.path, self._session = path, session
        self.resolution, self.z_dim, self.c_dim = (int(about[key]) for key in ("resolution", "z_dim", "c_dim"))

    def __call__(self, z: Floats, c: Floats) -> Floats:
        """Raises UserError if ONNX Runtime fails."""
        try:
            (x,) = self._session.run(["x"], {"z": z, "c": c})
        except Exception as error:  # onnxruntime has a dozen kinds
            raise UserError(f"{self.path}: failed on {len(z)} faces ({in_one_line(error)}); export it again") from None
        faces: Floats = x
        return faces


@dataclass(frozen=True)
class OnnxModel:
    """An exported model; the attributes are those of checkpoint.Snapshot, in numpy.

    Attributes:
        generator: see OnnxNetwork.
        people: as in people.fit_people, or empty.
        metadata: that of the snapshot, and `model`, its id, and `precision`, of the file.
        path: the file.
    """

    network: OnnxNetwork
    population: dict[str, npt.NDArray[np.float32]]
    metadata: dict[str, Any]
    path: Path


def is_onnx(name: str | Path) -> bool:
    """Whether a file of this name is an exported model."""
    return str(name).lower().endswith(SUFFIX)


def open_onnx(path: str | Path, *, threads: int | None = None) -> OnnxModel:
    """Open a file that `vultus export` wrote; `threads` as in `open_session`.

    Raises UserError if it is missing, damaged or of something else, or ONNX Runtime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it by vultus export SNAPSHOT --onnx --out {path}")
    session = open_session(path, threads=threads)
    found = session.get_modelmeta().custom_metadata_map
    try:
        about = json.loads(found[ABOUT])
        people = decode_people(found.get(PEOPLE, "{}"))
        right = about.pop("format") == FORMAT
        network = OnnxNetwork(path, about["generator"], session)
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise UserError(f"{path}: not a generator that vultus {FORMAT} exported; export its snapshot again")
    return OnnxModel(network, people, about, path)


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    cuda: bool = False,
    missing: str = MISSING,
    remedy: str = "export it again",
) -> Any:
    """An onnxruntime.InferenceSession on the processor, or with `cuda` on a GPU where this ONNX Runtime can.

    `threads` None: as many as OMP_NUM_THREADS says, or as there are processors for this process (ONNX Runtime itself
    knows neither). Raises UserError if the file is missing or damaged (with `remedy`) or ONNX Runtime is not installed
    (`missing`).
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        raise UserError(missing) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception, too
    options.intra_op_num_threads = threads or _threads()
    wanted = ["CUDAExecutionProvider"] if cuda else []
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen kinds
        raise UserError(
            f"{path}: not an ONNX model that onnxruntime can read ({in_one_line(error)}); {remedy}"
        ) from None


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else processors()


def encode_people(people: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """The entry `vultus.people`: {name: {"shape": [...], "float32": base64, little-endian}}."""
    return json.dumps(
        {
            key: {"shape": list(value.shape), "float32": base64.b64encode(value.astype("<f4").tobytes()).decode()}
            for key, value in people.items()
        }
    )


def decode_people(text: str) -> dict[str, npt.NDArray[np.float32]]:
    """What encode_people was given. Raises KeyError, TypeError or ValueError for anything else."""
    return {
        key: np.frombuffer(base64.b64decode(value["float32"]), "<f4").reshape(value["shape"]).astype(np.float32)
        for key, value in json.loads(text).items()
    }

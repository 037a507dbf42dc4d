"""A generator exported to one ONNX file, run by ONNX Runtime.

export/onnx_export.py writes the file. Its metadata have two entries: `vultus`, JSON with the format version and the
metadata of the snapshot, and `vultus.people`, JSON with the population prior, float32 in base64.
"""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vultus._files import json_value, sha256_file
from vultus._formats import upgrade
from vultus.errors import UserError, in_one_line
from vultus.models.generators import GeneratorNetwork
from vultus.models.integrity import MAX_RESOLUTION, check_metadata, check_population

SUFFIX = ".onnx"
METADATA_KEY, POPULATION_KEY = "vultus", "vultus.people"
MISSING = "an exported model needs ONNX Runtime: pip install 'vultus[export]'"


class OnnxGenerator(GeneratorNetwork):
    """An exported generator. ONNX Runtime computes it, on the CPU and in the precision of the file.

    The only parameter is the sha256 of the file: it gives the network a device, and a checksum of its weights differs
    between two files.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], session: Any) -> None:
        super().__init__(*(int(settings[key]) for key in ("resolution", "z_dim", "c_dim")))
        self.path, self._session = path, session
        digest = torch.tensor(list(bytes.fromhex(sha256_file(path))), dtype=torch.float32)
        self.sha256 = nn.Parameter(digest, requires_grad=False)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """As GeneratorNetwork, without gradient. Raises UserError if ONNX Runtime fails."""
        inputs = {"z": z.detach().float().cpu().numpy(), "c": c.detach().float().cpu().numpy()}
        try:
            (x,) = self._session.run(["x"], inputs)
        except Exception as error:  # onnxruntime has a dozen exception classes
            raise UserError(f"{self.path}: failed on {len(z)} faces ({in_one_line(error)}); export it again") from None
        return torch.from_numpy(x).to(z.device)

    def settings(self) -> dict[str, Any]:
        """Raises UserError: an exported model cannot be published or exported again."""
        raise UserError(f"{self.path}: is an exported model; give the snapshot that it was exported from")


class OnnxModel(NamedTuple):
    """The content of an ONNX file; the fields are those of Snapshot.

    `metadata` are those of the snapshot, and `model`, the id of the snapshot, and `precision` of the file.
    """

    network: OnnxGenerator
    population: dict[str, Tensor]
    metadata: dict[str, Any]


def is_onnx(name: str | Path) -> bool:
    """Whether this is the name of an ONNX file."""
    return str(name).lower().endswith(SUFFIX)


def open_onnx(path: str | Path, *, threads: int | None = None) -> OnnxModel:
    """Open a file that `vultus export` wrote; `threads` as in `open_session`.

    Raises UserError if it is missing, damaged, of another program or of a newer version, if its values are not finite,
    or if ONNX Runtime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with vultus export SNAPSHOT --onnx --out {path}")
    session = open_session(path, threads=threads)
    try:
        entries = session.get_modelmeta().custom_metadata_map  # of bytes that may not be UTF-8
        stored = {"metadata": json_value(entries[METADATA_KEY]), "population": entries.get(POPULATION_KEY, "{}")}
        stored = upgrade("onnx", stored["metadata"]["format"], stored, path)
        population, metadata = decode_population(stored["population"]), stored["metadata"]
        del metadata["format"]
        check_metadata(metadata, path)
        sizes = {key: int(metadata["generator"][key]) for key in ("resolution", "z_dim", "c_dim")}
        inputs = {one.name: one.shape[1:] for one in session.get_inputs()}
        if inputs != {"z": [sizes["z_dim"]], "c": [sizes["c_dim"]]} or not 0 < sizes["resolution"] <= MAX_RESOLUTION:
            raise ValueError
        network = OnnxGenerator(path, sizes, session)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a generator that vultus exported; export its snapshot again") from None
    check_population(population, network.c_dim, path)
    _check_weights(path, network)
    return OnnxModel(network.eval(), population, metadata)


def _check_weights(path: Path, network: OnnxGenerator) -> None:
    """Raise UserError if weights of the file are not finite, or one face is not.

    ONNX Runtime gives no access to the weights, so they are read with the library onnx where that is installed. The
    face has noise and embedding without a zero, so that each weight is used.
    """
    try:
        onnx: Any = importlib.import_module("onnx")
    except ImportError:
        pass
    else:
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.DEFAULT:
                try:
                    values = onnx.numpy_helper.to_array(tensor)
                except Exception as error:  # shapes that do not fit the values
                    raise UserError(f"{path}: a tensor is damaged ({in_one_line(error)}); export it again") from None
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    raise UserError(f"{path}: tensor {tensor.name} holds NaN or infinity; export the snapshot again")
    try:
        x = network(torch.ones(1, network.z_dim), torch.full((1, network.c_dim), network.c_dim**-0.5))
    except Exception as error:  # onnxruntime has a dozen exception classes
        raise UserError(f"{path}: cannot be run ({in_one_line(error)}); export the snapshot again") from None
    if x.shape != (1, 3, network.resolution, network.resolution):
        raise UserError(f"{path}: gives arrays of shape {list(x.shape)}; export the snapshot again")
    if not x.isfinite().all():
        raise UserError(f"{path}: gives values that are not finite (NaN or infinity); export another snapshot")


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    cuda: bool = False,
    missing: str = MISSING,
    remedy: str = "export it again",
) -> Any:
    """An onnxruntime.InferenceSession on the CPU, or with `cuda` on a GPU if this build of ONNX Runtime supports it.

    `threads` is the number of threads of an operator; by default that of PyTorch (ONNX Runtime itself ignores
    OMP_NUM_THREADS). Raises UserError if the file is missing or damaged (its message ends with `remedy`) or ONNX
    Runtime is not installed (the message is `missing`).
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        raise UserError(missing) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors also come as exceptions
    options.intra_op_num_threads = threads or torch.get_num_threads()
    wanted = ["CUDAExecutionProvider"] if cuda else []
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen exception classes
        raise UserError(
            f"{path}: not an ONNX model that onnxruntime can read ({in_one_line(error)}); {remedy}"
        ) from None


def encode_population(population: Mapping[str, Tensor]) -> str:
    """The entry `vultus.people`: {name: {"shape": [...], "float32": base64, little-endian}}."""
    arrays = {key: value.detach().cpu().numpy().astype("<f4") for key, value in population.items()}
    return json.dumps(
        {
            key: {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}
            for key, array in arrays.items()
        }
    )


def decode_population(text: str) -> dict[str, Tensor]:
    """The inverse of encode_population. Raises KeyError, TypeError or ValueError for any other text."""
    return {
        key: torch.from_numpy(
            np.frombuffer(base64.b64decode(value["float32"]), "<f4").reshape(value["shape"]).astype(np.float32)
        )
        for key, value in json_value(text).items()
    }

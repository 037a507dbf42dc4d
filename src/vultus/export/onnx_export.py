"""A snapshot as one ONNX file, which exported.py runs without torch, and browsers by onnxruntime-web.

Inputs z [N, z_dim] and c [N, c_dim], output x [N, 3, R, R] in [-1, 1]; N is free, all three are float32 whatever the
precision. The file is compared with PyTorch before it gets its name.

Precisions:
- float32: as PyTorch computes, but for rounding.
- float16: the weights are stored in float16 and become float32 when the file is opened. Half the size, the same speed:
  processors have few float16 kernels, and a fully converted network spends its time on conversions.
- int8: convolutions compute in 8-bit integers (Jacob et al. 2018, arXiv:1712.05877): weights by channel, activations
  by tensor, with ranges from random people; other weights are stored in float16. The last convolutions stay as they
  are: they make the pixels, and 8 bits there cost more than in all the others together (docs/export.md). How many,
  two to half of them, is found by comparing with PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vultus._files import atomic_path, make_folder
from vultus._formats import VERSIONS
from vultus.errors import UserError
from vultus.images.xmp import model_id
from vultus.models.onnx_runtime import METADATA_KEY, POPULATION_KEY, encode_population, open_session
from vultus.models.snapshot import Snapshot
from vultus.sampling.latents import Floats, noise, sample_identities

Precision = Literal["float32", "float16", "int8"]

OPSET = 18
BATCHES = (1, 3, 16)  # of the comparison
LIMIT = 1e-3  # by which a pixel may differ from PyTorch's in float32; a step of 8 bits is 7.8e-3
LEAST = 35.0  # dB that int8 must reach; below, the evaluation finds the faces worse (docs/export.md)
CALIBRATION = 128  # faces that int8 takes the ranges of activations from
CONVOLUTIONS = ("Conv", "ConvTranspose")
PERCENTILE = 99.999  # of these activations; what lies outside is clamped
SMALL = 1024  # numbers; tensors of fewer stay float32
MISSING = "exporting needs onnx, onnxscript and onnxruntime: pip install 'vultus[export]'"


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from PyTorch on random people.

    Attributes:
        largest: {faces in the batch: largest difference of a value in [-1, 1]}.
        psnr: dB over all of them, of values that span 2; infinite if nothing differs.
    """

    largest: dict[int, float]
    psnr: float

    def __str__(self) -> str:
        parts = ", ".join(f"{value:.1e} for {batch}" for batch, value in self.largest.items())
        return f"largest difference to PyTorch in [-1, 1]: {parts} at a time; {self.psnr:.1f} dB"


def export_onnx(snapshot: Snapshot, path: str | Path, *, precision: Precision = "float32") -> Parity:
    """Write `path`, atomically, and return how far it is from PyTorch.

    Raises UserError, and writes nothing, if a library is missing, the snapshot is an exported model itself, or the file
    is not near enough: LIMIT for float32, LEAST for int8.
    """
    path = Path(path)
    settings = snapshot.network.settings()
    onnx = _onnx()
    make_folder(path.parent)
    about = snapshot.metadata | {"format": str(VERSIONS["onnx"]), "model": model_id(snapshot.path)}
    about |= {"precision": precision, "generator": settings}
    entries = {METADATA_KEY: json.dumps(about, ensure_ascii=False)}
    if snapshot.population:
        entries[POPULATION_KEY] = encode_population(snapshot.population)
    with atomic_path(path) as temporary:
        for model in _models(snapshot, precision):
            onnx.helper.set_model_props(model, entries)
            onnx.checker.check_model(model)
            temporary.write_bytes(model.SerializeToString())
            parity = compare(snapshot, temporary)
            if precision != "int8" or parity.psnr >= LEAST:
                break
        else:
            raise UserError(
                f"{path}: not written, 8 bits change the faces of this snapshot visibly ({parity}, {LEAST:g} are "
                f"needed); export it as float16"
            )
        if precision == "float32" and max(parity.largest.values()) > LIMIT:
            raise UserError(f"{path}: not written, it differs too much ({parity}); try another version of onnxruntime")
    return parity


def _models(snapshot: Snapshot, precision: Precision) -> Iterator[Any]:
    """ModelProtos of that precision, for int8 with more and more of the last convolutions left as they are."""
    traced = _traced(snapshot)
    if precision == "int8":
        layers = [node.name for node in traced.graph.node if node.op_type in CONVOLUTIONS]
        for left in range(2, max(2, len(layers) // 2) + 1):
            # A copy, because the library may change what it is given.
            yield _store_half(_quantised(copy.deepcopy(traced), snapshot, layers[-left:]))
    else:
        yield _store_half(traced) if precision == "float16" else traced


def compare(snapshot: Snapshot, path: Path) -> Parity:
    """An ONNX file beside its snapshot on batches of BATCHES faces of random people."""
    session = open_session(path, threads=torch.get_num_threads())
    generator = snapshot.network
    device = next(generator.parameters()).device
    largest, squares = {}, []
    for batch in BATCHES:
        z, c = examples(snapshot, batch, seed=batch)
        with torch.inference_mode():
            expected = generator(torch.from_numpy(z).to(device), torch.from_numpy(c).to(device)).cpu().numpy()
        (found,) = session.run(["x"], {"z": z, "c": c})
        largest[batch] = float(np.abs(found - expected).max())
        squares.append(((found - expected) ** 2).ravel())
    error = float(np.concatenate(squares).mean(dtype=np.float64))
    return Parity(largest, 10 * np.log10(4 / error) if error else float("inf"))


def examples(snapshot: Snapshot, count: int, *, seed: int) -> tuple[Floats, Floats]:
    """Noise z and embeddings c of `count` random people; of random directions, where the snapshot knows no people."""
    generator = snapshot.network
    if snapshot.population:
        people = {key: value.cpu().numpy() for key, value in snapshot.population.items()}
    else:
        people = {"mean": np.zeros(generator.c_dim), "factor": np.eye(generator.c_dim)}
    return noise(seed, 0, count, generator.z_dim).numpy(), sample_identities(people, count, seed=seed).numpy()


# --- PyTorch to ONNX --------------------------------------------------------------------------------------------------


def _onnx() -> Any:
    try:
        onnx, *_ = map(importlib.import_module, ("onnx", "onnxruntime", "onnxscript"))
    except ImportError:
        raise UserError(MISSING) from None
    return onnx


def _traced(snapshot: Snapshot) -> Any:
    """The ModelProto of a generator in float32, without the traces of the machine that torch leaves in it."""
    z, c = (torch.from_numpy(rows) for rows in examples(snapshot, 2, seed=0))
    free = {0: torch.export.Dim("N")}
    device = next(snapshot.network.parameters()).device
    with _quiet():
        program: Any = torch.onnx.export(
            snapshot.network,
            (z.to(device), c.to(device)),
            dynamo=True,
            input_names=["z", "c"],
            output_names=["x"],
            dynamic_shapes={"z": free, "c": free},
            opset_version=OPSET,
            verbose=False,
        )
    model = program.model_proto
    # Torch notes the file and line of each operation, with the folders of this machine.
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    model.producer_name, model.producer_version = "vultus", ""
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' remarks on what they lack and will change are not for the user; what goes wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _store_half(model: Any) -> Any:
    """The model with its large float32 weights stored as float16, in place: a Cast to float32 behind each is folded on
    opening."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= SMALL:
            name, half = tensor.name, f"{tensor.name}.float16"
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), half))
            casts.append(helper.make_node("Cast", [half], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _quantised(model: Any, snapshot: Snapshot, left: list[str]) -> Any:
    """The convolutions of a ModelProto in 8 bits but for those of these names."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    batches = [examples(snapshot, 16, seed=seed) for seed in range(1000, 1000 + CALIBRATION // 16)]
    feeds = iter([{"z": z, "c": c} for z, c in batches])

    class Reader:
        """What onnxruntime asks of calibration data."""

        def get_next(self) -> dict[str, Floats] | None:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(CONVOLUTIONS),
            nodes_to_exclude=left,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": PERCENTILE},
        )
        return onnx.load(path)

"""A snapshot as one ONNX file, which models/onnx_runtime.py runs without torch, and browsers by onnxruntime-web.

Inputs z [N, z_dim] and c [N, c_dim], output x [N, 3, R, R] in [-1, 1]; N is free, all three are float32 at every
precision. The file is compared with PyTorch before it gets its name.

Precisions:
- float32: as PyTorch computes, but for rounding.
- float16: the weights are stored in float16 and become float32 when the file is opened. Half the size, the same speed:
  CPUs have few float16 kernels, and a fully converted network spends its time on conversions.
- int8: convolutions compute in 8-bit integers (Jacob et al. 2018, arXiv:1712.05877): weights quantised by channel,
  activations by tensor, with ranges measured on random identities; other weights are stored in float16. The last
  convolutions stay in float32: they compute the pixels, and quantising them costs more than all the others together
  (docs/export.md). How many, two to half of all, is determined by comparison with PyTorch.
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
import numpy.typing as npt
import torch

from vultus._files import atomic_path, json_value, make_folder
from vultus._formats import VERSIONS
from vultus._outputs import Inputs, check_output
from vultus.errors import UserError
from vultus.images.xmp import model_id
from vultus.models.onnx_runtime import METADATA_KEY, POPULATION_KEY, SUFFIX, encode_population, open_session
from vultus.models.snapshot import Snapshot, load_snapshot
from vultus.sampling.latents import noise, sample_identities

Floats = npt.NDArray[np.float32]
Precision = Literal["float32", "float16", "int8"]

OPSET = 18
BATCHES = (1, 3, 16)  # batch sizes of the comparison with PyTorch
LIMIT = 1e-3  # largest difference of a value from PyTorch's in float32; a step of 8 bits is 7.8e-3
LEAST = 35.0  # PSNR in dB that int8 must reach; below it the evaluation measures worse faces (docs/export.md)
CALIBRATION = 128  # faces on which int8 measures the ranges of activations
CONVOLUTIONS = ("Conv", "ConvTranspose")
PERCENTILE = 99.999  # of these activations; values outside are clamped
SMALL = 1024  # elements; smaller tensors stay float32
MISSING = "exporting needs onnx, onnxscript and onnxruntime: pip install 'vultus[export]'"


@dataclass(frozen=True)
class Parity:
    """The difference between an exported file and PyTorch on random identities.

    Attributes:
        largest: {batch size: largest difference of a value in [-1, 1]}.
        psnr: in dB over all batches, values span 2; infinite where nothing differs.
    """

    largest: dict[int, float]
    psnr: float

    def __str__(self) -> str:
        parts = ", ".join(f"{value:.1e} (batch {batch})" for batch, value in self.largest.items())
        return f"largest difference to PyTorch in [-1, 1]: {parts}; PSNR {self.psnr:.1f} dB"


def export_onnx(
    snapshot: Snapshot | str | Path, out: str | Path, *, precision: Precision = "float32", overwrite: bool = False
) -> Parity:
    """Write a snapshot as the ONNX file `out`, atomically.

    Args:
        snapshot: a snapshot or its name: `default`, a file, a run or published folder, or hf://user/name.
        out: the file to write; its name ends in .onnx.
        precision: float32, float16 (half the size) or int8 (a quarter of it, and faster; see the module).
        overwrite: replace an existing file. Without it only an export of the same snapshot and precision is replaced.

    Returns: the difference from PyTorch.

    Raises UserError, and writes nothing, if a library is missing, the snapshot is an exported model itself, `out` may
    not be written, or the difference is too large: over LIMIT for float32, PSNR under LEAST for int8; at any precision
    if a value is not finite.
    """
    path = Path(out)
    if path.suffix.lower() != SUFFIX or path.is_dir():
        raise UserError(f"--out {out}: give a file name that ends in {SUFFIX}")
    if not isinstance(snapshot, Snapshot):
        snapshot = load_snapshot(snapshot, "cpu")
    settings = snapshot.network.settings()
    onnx = _onnx()
    inputs = Inputs([] if snapshot.path is None else [snapshot.path])
    same = {"model": model_id(snapshot.path), "precision": precision}
    check_output(
        path, inputs=inputs, own=lambda old: same.items() <= exported_metadata(old).items(), overwrite=overwrite
    )
    make_folder(path.parent)
    metadata = snapshot.metadata | {"format": str(VERSIONS["onnx"])} | same
    metadata["generator"] = settings
    entries = {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)}
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
                f"{path}: not written, 8 bits change the faces of this snapshot visibly ({parity}, {LEAST:g} dB are "
                f"needed); export it with --precision float16"
            )
        if not np.isfinite([*parity.largest.values()]).all():
            raise UserError(
                f"{path}: not written, in {precision} it gives values that are not finite (NaN or infinity); export it "
                f"with --precision float32"
            )
        if precision == "float32" and not max(parity.largest.values()) <= LIMIT:
            raise UserError(
                f"{path}: not written, the difference is too large ({parity}); install another version of onnxruntime"
            )
    return parity


def exported_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file that `export_onnx` wrote; empty for any other file."""
    try:
        model = _onnx().load(path, load_external_data=False)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        metadata = json_value(entries[METADATA_KEY])
    except UserError:
        raise
    except Exception:  # protobuf has several exception classes for damaged files
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _models(snapshot: Snapshot, precision: Precision) -> Iterator[Any]:
    """ModelProtos of that precision; int8 yields several, each with one more of the last convolutions in float32."""
    traced = _traced(snapshot)
    if precision == "int8":
        layers = [node.name for node in traced.graph.node if node.op_type in CONVOLUTIONS]
        for count in range(2, max(2, len(layers) // 2) + 1):
            # A copy, because onnxruntime may modify its argument.
            yield _store_half(_quantised(copy.deepcopy(traced), snapshot, layers[-count:]))
    else:
        yield _store_half(traced) if precision == "float16" else traced


def compare(snapshot: Snapshot, path: Path) -> Parity:
    """The difference between an ONNX file and its snapshot, on random identities in batches of BATCHES."""
    session = open_session(path, threads=torch.get_num_threads())
    generator = snapshot.network
    device = next(generator.parameters()).device
    largest, squares = {}, []
    for batch in BATCHES:
        z, c = examples(snapshot, batch, seed=batch)
        with torch.inference_mode():
            expected = generator(torch.from_numpy(z).to(device), torch.from_numpy(c).to(device)).cpu().numpy()
        if not np.isfinite(expected).all():
            raise UserError(
                f"{snapshot.path or 'the snapshot'}: gives values that are not finite (NaN or infinity), nothing was "
                f"written; use another snapshot"
            )
        (x,) = session.run(["x"], {"z": z, "c": c})
        largest[batch] = float(np.abs(x - expected).max())
        squares.append(((x - expected) ** 2).ravel())
    error = float(np.concatenate(squares).mean(dtype=np.float64))
    if not np.isfinite(error):
        return Parity(largest, float("nan"))
    return Parity(largest, 10 * np.log10(4 / error) if error else float("inf"))


def examples(snapshot: Snapshot, count: int, *, seed: int) -> tuple[Floats, Floats]:
    """Noise z [count, z_dim] and embeddings c [count, c_dim] of random identities, float32.

    Without a population prior in the snapshot, the embeddings are uniform on the sphere.
    """
    generator = snapshot.network
    population = snapshot.population or {"mean": torch.zeros(generator.c_dim), "factor": torch.eye(generator.c_dim)}
    c = sample_identities(population, count, seed=seed)
    return noise(seed, 0, count, generator.z_dim).numpy(), c.numpy()


# --- PyTorch to ONNX --------------------------------------------------------------------------------------------------


def _onnx() -> Any:
    try:
        onnx, *_ = map(importlib.import_module, ("onnx", "onnxruntime", "onnxscript"))
    except ImportError:
        raise UserError(MISSING) from None
    return onnx


def _traced(snapshot: Snapshot) -> Any:
    """The ModelProto of a generator in float32, without paths of this machine."""
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
    # torch records the source file and line of each operation, with the folders of this machine.
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    model.producer_name, model.producer_version = "vultus", ""
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of the exporters about missing options and future changes; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _store_half(model: Any) -> Any:
    """Store the large float32 weights as float16, in place; a Cast to float32 behind each is folded on opening."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= SMALL:
            name, half = tensor.name, f"{tensor.name}.float16"
            with np.errstate(over="ignore"):  # infinity is noticed by the comparison with PyTorch
                values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, half))
            casts.append(helper.make_node("Cast", [half], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _quantised(model: Any, snapshot: Snapshot, excluded: list[str]) -> Any:
    """The ModelProto with its convolutions in 8 bits, except those of the names in `excluded`."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    batches = [examples(snapshot, 16, seed=seed) for seed in range(1000, 1000 + CALIBRATION // 16)]
    feeds = iter([{"z": z, "c": c} for z, c in batches])

    class Reader:
        """The interface of onnxruntime for calibration data."""

        def get_next(self) -> dict[str, Floats] | None:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path, source = Path(folder) / "int8.onnx", Path(folder) / "float32.onnx"
        onnx.save(model, source)  # a ModelProto fails with onnxruntime 1.20
        quantize_static(
            source,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(CONVOLUTIONS),
            nodes_to_exclude=excluded,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": PERCENTILE},
        )
        return onnx.load(path)

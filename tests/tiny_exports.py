"""Tiny generators of every kind, as snapshots and as exported models."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tiny_parts import DIM, TinyEncoder
from vultus.export.onnx_export import Parity, export_onnx
from vultus.models.facenet import FaceNet
from vultus.models.generators import build_generator
from vultus.models.snapshot import load_snapshot, save_snapshot
from vultus.sampling.population import fit_population

Models = dict[str, tuple[Path, Path, Parity]]  # by kind: snapshot, its export in float32, the parity of the export

KINDS = {"dcgan": 512, "conditional-norm": DIM}  # and the length of their embeddings
TINY = {"id": TinyEncoder.id, "dim": DIM, "weights_sha256": TinyEncoder.weights_sha256}


def write_snapshot(path: Path, kind: str) -> Path:
    """A generator whose weights and statistics all differ from their initial values.

    Residual blocks add up: smaller changes and larger variances keep rounding errors small, so that the export agrees
    with PyTorch on any machine.
    """
    c_dim = KINDS[kind]
    config = {"kind": kind, "resolution": 32, "z_dim": 20, "c_dim": c_dim, "base_width": 8, "max_width": 16}
    config["projection"] = 32
    torch.manual_seed(0)
    generator = build_generator(**config)
    change, least_variance = (0.05, 1.0) if kind == "conditional-norm" else (0.1, 0.5)
    for parameter in generator.parameters():
        parameter.data.add_(change * torch.randn_like(parameter))
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean)
            module.running_var = torch.rand_like(module.running_var) + least_variance
    people = fit_population(F.normalize(torch.randn(40, c_dim)))
    encoder = TINY if c_dim == DIM else {"id": FaceNet.id, "dim": c_dim}
    crop = {"kind": "centre", "encoder_fraction": 0.8}
    about = {"generator": config, "encoder": encoder, "crop": crop, "cur_nimg": 7, "licence": "for tests alone"}
    save_snapshot(path, network=generator, population=people, metadata=about)
    return path


def export_all(folder: Path) -> Models:
    """A snapshot and an export of every kind, in one folder."""
    models = {}
    for kind in KINDS:
        path, out = write_snapshot(folder / f"{kind}.safetensors", kind), folder / f"{kind}.onnx"
        models[kind] = path, out, export_onnx(load_snapshot(path), out)
    return models

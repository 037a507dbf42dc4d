"""Snapshots: what a user needs to generate faces, in one safetensors file. Nothing in it is a pickle.

Tensors `generator.*` are the EMA generator, `people.*` the population prior (see sampling/population.py). The metadata
entries are `format`, the version, and `vultus`, JSON with the keys of Snapshot.metadata.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vultus._download import HUB
from vultus._files import atomic_path, json_value
from vultus._formats import VERSIONS, upgrade
from vultus.config import GeneratorConfig, from_dict, to_dict
from vultus.errors import UserError, in_one_line
from vultus.models.generators import GeneratorNetwork, build_generator
from vultus.models.hub import MODEL, fetch, is_published
from vultus.models.integrity import check_metadata, check_population, checked_network, parse_json
from vultus.models.onnx_runtime import is_onnx, open_onnx

DEFAULT = "default"  # name of the snapshot that is embedded in the package


@dataclass
class Snapshot:
    """A generator ready to run, and its origin.

    Attributes:
        network: network(z [N, z_dim], c [N, c_dim]) -> x [N, 3, R, R] in [-1, 1], in evaluation mode.
        population: the population prior: `mean` [c_dim], `factor` [c_dim, k] and the rest of sampling/population.py,
            fitted to the training embeddings; or empty.
        metadata: `generator` (fields of GeneratorConfig), `encoder`, `crop`, `data`, `metrics`, `cur_nimg`, `preset`,
            `licence`.
        path: the file that it was read from.
    """

    network: GeneratorNetwork
    population: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path | None = None


def save_snapshot(
    path: Path,
    *,
    network: GeneratorNetwork,
    population: dict[str, Tensor],
    metadata: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a snapshot file. `metadata["generator"]` must be the fields of the GeneratorConfig of `network`.

    `dtype` is that of the floating tensors in the file; load_snapshot converts them to float32.
    """
    tensors = {f"generator.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"people.{key}": value for key, value in population.items()}
    stored = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    values = {"format": str(VERSIONS["snapshot"]), "vultus": json.dumps(metadata, ensure_ascii=False)}
    data = safetensors.torch.save(stored, metadata=values)  # save_file would hide the OSError of a full disk
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_snapshot(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot onto `device`, its network in evaluation mode and without gradients.

    `path` is a snapshot file, a run folder, a model folder, an ONNX file, `hf://user/name` for a model on the hub, or
    `default` for the embedded snapshot. A bare user/name is a local path, so that a misspelt folder causes no request.
    Raises UserError that names the file and the remedy if it is missing, damaged, of a newer version, or holds a value
    that is not finite.
    """
    if path == DEFAULT:
        path = default_snapshot()
    if str(path).startswith(HUB):
        path = fetch(path)
    path = Path(path)
    if is_onnx(path):
        network, population, metadata = open_onnx(path)
        return Snapshot(network.to(device), population, metadata, path)
    if path.is_dir():
        if (path / "snapshot.safetensors").is_file():
            path = path / "snapshot.safetensors"
        elif is_published(path):
            return _published(path, device)
        else:
            raise UserError(f"{path}: no snapshot.safetensors in this folder; train into it first")
    if not path.is_file():
        raise UserError(f"{path}: no such snapshot (one on the Hugging Face hub is named {HUB}user/name)")
    return _read_file(path, device)


def _read_file(path: Path, device: torch.device | str) -> Snapshot:
    values, tensors = read_safetensors(path, remedy="copy or train it again")
    if not {"format", "vultus"} <= values.keys():
        raise UserError(f"{path}: not a vultus snapshot; give a file that vultus train wrote")
    stored = {"metadata": parse_json(values["vultus"], path), "tensors": tensors}
    stored = upgrade("snapshot", values["format"], stored, path)
    metadata, tensors = stored["metadata"], stored["tensors"]
    check_metadata(metadata, path)
    if not isinstance(metadata.get("generator"), dict):
        raise UserError(f"{path}: its metadata hold no generator settings; give a file that vultus train wrote")
    settings = to_dict(from_dict(GeneratorConfig, metadata["generator"], str(path)))
    network: GeneratorNetwork = checked_network(build_generator, settings, _under("generator.", tensors), path)
    network.path = path
    # save_pretrained stores these with the network.
    network.population = _under("people.", tensors)
    check_population(network.population, network.c_dim, path)
    network.metadata = {key: value for key, value in metadata.items() if key != "generator"}
    return Snapshot(network.to(device).eval().requires_grad_(False), network.population, metadata, path)


def saved_cur_nimg(path: Path) -> int | None:
    """The images seen by the snapshot in this file; None if it is missing, damaged, or does not say."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return int(json_value((file.metadata() or {})["vultus"])["cur_nimg"])
    except Exception:  # safetensors has errors of its own
        return None


def _published(folder: Path, device: torch.device | str) -> Snapshot:
    network = GeneratorNetwork.from_pretrained(folder, map_location=device)
    metadata = {"generator": network.settings()} | network.metadata
    return Snapshot(network.requires_grad_(False), network.population, metadata, folder / MODEL)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_safetensors(path: Path, *, remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, float32. Raises UserError, which ends in `remedy`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}, {key: _float32(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # of safetensors, and of torch where a tensor is too large
        raise UserError(f"{path}: damaged or not a safetensors file ({in_one_line(error)}); {remedy}") from None


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def asset(name: str) -> Path:
    """The path of a file that is part of the package. Raises UserError if it is missing from the installation."""
    path = Path(str(importlib.resources.files("vultus"))) / "assets" / name
    if not path.is_file():
        raise UserError(f"{path}: missing from this installation; install vultus again")
    return path


def default_snapshot() -> Path:
    """The path of the embedded snapshot."""
    return asset("default.safetensors")


def gallery() -> Tensor:
    """Embeddings [64, 512] float32 of random identities, sampled from the population prior of the embedded snapshot."""
    return safetensors.torch.load_file(asset("gallery.safetensors"))["embeddings"].float()

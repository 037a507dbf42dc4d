"""Training state (`checkpoint`) and what a user needs (`snapshot`).

A checkpoint holds everything that the next step depends on: networks, moving average, optimizers, images seen. The
order of the data and every random number are functions of (seed, images seen), so no random state needs to be stored.
It is read with weights_only. A snapshot is one safetensors file: the averaged generator, a description of the training
embeddings as a distribution, and the metadata as JSON. Nothing that a user loads is a pickle.
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
from torch import Tensor, nn

from vultus._files import atomic_path, sha256_file
from vultus.config import GeneratorConfig, from_dict, to_dict
from vultus.errors import UserError
from vultus.models.generators import GeneratorNetwork, build_generator
from vultus.models.hub import MODEL, PREFIX, fetch, fill, is_published
from vultus.models.onnx_runtime import OnnxNetwork, is_onnx, open_onnx

FORMAT = "1"


@dataclass
class Snapshot:
    """A generator ready to run, and where it comes from.

    Attributes:
        generator: generator(z [N, z_dim], c [N, c_dim]) -> x [N, 3, R, R] in [-1, 1], in evaluation mode.
        people: `mean` [c_dim] and `factor` [c_dim, k] of the training embeddings (see people.py), or empty.
        metadata: generator (its config), encoder, crop, data, metrics, cur_nimg, preset, licence.
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
    """Write one safetensors file, atomically. `metadata["generator"]` must be the generator's GeneratorConfig.

    `dtype` float16 halves the file; the generator computes in float32 again once loaded.
    """
    tensors = {f"generator.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"people.{key}": value for key, value in population.items()}
    stored = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    values = {"format": FORMAT, "vultus": json.dumps(metadata, ensure_ascii=False)}
    data = safetensors.torch.save(stored, metadata=values)  # its save_file hides a full disk in an error of its own
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_snapshot(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot, the newest one of a run folder, a published folder, hf://user/name, or an exported model.

    A bare user/name is a path here, so that a folder's name with a slip in it never asks the network. Raises UserError
    that names the file and the remedy.
    """
    if str(path).startswith(PREFIX):
        path = fetch(path)
    path = Path(path)
    if is_onnx(path):
        return _exported(path, device)
    if path.is_dir():
        if (path / "snapshot.safetensors").is_file():
            path = path / "snapshot.safetensors"
        elif is_published(path):
            return _published(path, device)
        else:
            raise UserError(f"{path}: no snapshot.safetensors in this folder; train into it first")
    if not path.is_file():
        raise UserError(f"{path}: no such snapshot (one on the Hugging Face hub is named {PREFIX}user/name)")
    try:
        with safetensors.safe_open(path, "pt") as file:
            values = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged or not a safetensors file ({reason}); copy or train it again") from None
    if values.get("format") != FORMAT or "vultus" not in values:
        raise UserError(f"{path}: not a vultus snapshot of format {FORMAT} (found {values.get('format')})")
    metadata = json.loads(values["vultus"])
    config = from_dict(GeneratorConfig, metadata["generator"], str(path))
    generator = build_generator(**to_dict(config))
    state = {key.removeprefix("generator."): value for key, value in tensors.items() if key.startswith("generator.")}
    fill(generator, {key: _float32(value) for key, value in state.items()}, path)
    people = {
        key.removeprefix("people."): _float32(value) for key, value in tensors.items() if key.startswith("people.")
    }
    # With these it can be published from Python, its licence and all.
    generator.population, generator.metadata = people, {k: v for k, v in metadata.items() if k != "generator"}
    return Snapshot(generator.to(device).eval().requires_grad_(False), people, metadata, path)


def _published(folder: Path, device: torch.device | str) -> Snapshot:
    generator = GeneratorNetwork.from_pretrained(folder, map_location=device)
    metadata = {"generator": generator.settings()} | generator.metadata
    return Snapshot(generator.requires_grad_(False), generator.population, metadata, folder / MODEL)


class OnnxGenerator(GeneratorNetwork):
    """An exported model among the generators, so that whatever measures or draws with these does so with it.

    ONNX Runtime computes, on the processor and in the file's own precision. The only parameter is the file's sha256: it
    tells the device, and tells the weights of two files apart.
    """

    def __init__(self, network: OnnxNetwork) -> None:
        super().__init__(network.resolution, network.z_dim, network.c_dim)
        self.network = network
        digest = torch.tensor(list(bytes.fromhex(sha256_file(network.path))), dtype=torch.float32)
        self.sha256 = nn.Parameter(digest, requires_grad=False)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """See GeneratorNetwork; float32, without gradient."""
        x = self.network(z.detach().float().cpu().numpy(), c.detach().float().cpu().numpy())
        return torch.from_numpy(x).to(z.device)

    def settings(self) -> dict[str, Any]:
        """Raises UserError: it cannot be published, nor exported again."""
        raise UserError(f"{self.network.path}: is an exported model; take the snapshot that it was made of")


def _exported(path: Path, device: torch.device | str) -> Snapshot:
    model = open_onnx(path, threads=torch.get_num_threads())
    people = {key: torch.from_numpy(value) for key, value in model.population.items()}
    return Snapshot(OnnxGenerator(model.network).to(device).eval(), people, model.metadata, path)


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def asset(name: str) -> Path:
    """A file that the package carries. Raises UserError if it is missing from the installation."""
    path = Path(str(importlib.resources.files("vultus"))) / "assets" / name
    if not path.is_file():
        raise UserError(f"{path}: missing from this installation; install vultus again")
    return path


def default_snapshot() -> Path:
    """The embedded snapshot."""
    return asset("default.safetensors")


def gallery() -> torch.Tensor:
    """Embeddings [N, 512] of people who do not exist, drawn from the distribution in the embedded snapshot."""
    return safetensors.torch.load_file(asset("gallery.safetensors"))["embeddings"].float()

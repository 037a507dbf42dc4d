"""Checks of what a file of a generator holds, before it is used: every loader runs them, so that a damaged or hostile
file gives one line and no picture.

Shape legend: c_dim length of an embedding, k rank of the population prior, K components of its mixture of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vultus._files import json_value
from vultus.errors import UserError, in_one_line

MAX_RESOLUTION = 4096  # pixels; the number of layers, and with it the time of a check, grows with it
OBJECTS = ("encoder", "crop", "data", "metrics")  # metadata that are objects, where they are given


def check_finite_tensors(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise UserError that names file and tensor if a floating tensor holds NaN or infinity.

    23 MB take 5 ms. NaN and infinity reach the smallest or the largest value, so these two are enough.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            least, most = torch.aminmax(tensor)
            if not (torch.isfinite(least) and torch.isfinite(most)):
                kind = "NaN" if tensor.isnan().any() else "infinity"
                raise UserError(f"{where}: tensor {name} holds {kind}; the training failed or the file is damaged")


def check_population(population: Mapping[str, Tensor], c_dim: int, where: str | Path) -> None:
    """Raise UserError unless a population prior is finite and its shapes fit embeddings of `c_dim` numbers."""
    check_finite_tensors({f"people.{name}": tensor for name, tensor in population.items()}, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in population.items()}
    right = shapes.get("mean", (c_dim,)) == (c_dim,)
    factor = shapes.get("factor", (c_dim, 0))
    right = right and len(factor) == 2 and factor[0] == c_dim
    if mixture := {"weights", "means", "factors"} & shapes.keys():
        means = shapes.get("means", ())
        right = right and len(mixture) == 3 and len(means) == 2 and 0 < means[1] <= factor[1] and means[0] > 0
        right = right and shapes["weights"] == means[:1] and shapes["factors"] == (*means, *means[1:])
    if not right or not all(tensor.is_floating_point() for tensor in population.values()):
        held = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise UserError(
            f"{where}: its population prior ({held[:200]}) does not fit embeddings of {c_dim} numbers; copy or "
            f"download the file again"
        )


def check_metadata(metadata: Any, where: str | Path) -> None:
    """Raise UserError unless the metadata of a snapshot are an object whose entries have the right types."""
    wrong = None if isinstance(metadata, dict) else "they are no object"
    for key in OBJECTS if wrong is None else ():
        if not isinstance(metadata.get(key, {}), dict | None):
            wrong = f"{key} is no object"
    if wrong is None:
        encoder = metadata.get("encoder") or {}
        texts = {"encoder.id": encoder.get("id"), "licence": metadata.get("licence"), "preset": metadata.get("preset")}
        wrong = next((f"{key} is no text" for key, value in texts.items() if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise UserError(f"{where}: its metadata are not those of a vultus generator ({wrong}); copy or train it again")


def parse_json(text: str, where: str | Path) -> Any:
    """The value of JSON in the metadata of a file. Raises UserError that names the file if it is none."""
    try:
        return json_value(text)
    except ValueError as error:
        raise UserError(f"{where}: its metadata are not JSON ({in_one_line(error)}); copy or train it again") from None


def checked_network(
    build: Callable[..., Any], settings: Mapping[str, Any], state: Mapping[str, Tensor], where: str | Path
) -> Any:
    """`build(**settings)` with the weights `state`.

    Names and shapes are compared without memory for the weights first: a config can declare a network of any size.
    Raises UserError that names the file if the settings are impossible, the names or shapes of the weights differ from
    those of the network, or a weight is not finite.
    """
    if not 0 < settings.get("resolution", 0) <= MAX_RESOLUTION:
        raise UserError(f"{where}: generator.resolution {settings.get('resolution')}: not from 1 to {MAX_RESOLUTION}")
    try:
        with torch.device("meta"):
            expected = build(**settings).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError, AssertionError) as error:
        raise UserError(f"{where}: its config is none of a generator ({in_one_line(error)})") from None
    _compare(state, expected, where)
    check_finite_tensors(state, where)
    network: nn.Module = build(**settings)
    network.load_state_dict(state, strict=True)
    return network


def _compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str | Path) -> None:
    problem = ""
    if missing := [name for name in expected if name not in state]:
        problem = f"tensor {missing[0]} is missing"
    elif unknown := [name for name in state if name not in expected]:
        problem = f"tensor {unknown[0][:80]} is unknown"
    elif other := [name for name, tensor in expected.items() if tensor.shape != state[name].shape]:
        name = other[0]
        problem = f"tensor {name} has shape {list(state[name].shape)}, not {list(expected[name].shape)}"
    elif other := [name for name, tensor in expected.items() if _kind(tensor) != _kind(state[name])]:
        problem = f"tensor {other[0]} has dtype {state[other[0]].dtype}"
    if problem:
        raise UserError(f"{where}: its weights do not fit its config ({problem}); copy or download it again")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()

"""The backbones of an evaluation: those that can be loaded, and the reasons why others cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vultus.errors import UserError
from vultus.evaluation.backbones.efficientnet import FeatureNetwork, load_effnet
from vultus.evaluation.backbones.face_recognition import Judge, load_judge
from vultus.evaluation.backbones.inception import load_inception
from vultus.evaluation.backbones.lpips import Perceptual, load_lpips, load_stlpips
from vultus.models.facenet import Encoder


@dataclass(frozen=True)
class Backbones:
    """The networks that faces are measured with.

    Attributes:
        encoder: the encoder of the condition; losses may contain it.
        judges: face recognition networks that no loss contains; the first one decides in which pairs of faces the
            identity is kept (`diversity_noise_*_held`).
        features: networks for distances between distributions.
        perceptual: distances between pairs of images; the first one measures diversity over noise.
        missing: {metrics that cannot be measured: reason and remedy}.
    """

    encoder: Encoder
    judges: tuple[Judge, ...] = ()
    features: tuple[FeatureNetwork, ...] = ()
    perceptual: tuple[Perceptual, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UserError if two networks would give their metrics the same name."""
        networks: list[Any] = [*self.judges, *self.features, *self.perceptual]
        shorts = [self.short, *(network.short for network in networks)]
        for name in shorts:
            if shorts.count(name) > 1:
                raise UserError(f"--judge: two networks are called {name}; rename the file of the judge")

    @property
    def short(self) -> str:
        """The encoder in the names of metrics."""
        return self.encoder.id.partition("-")[0]

    @property
    def ids(self) -> dict[str, Any]:
        """{id: dtype} of every network, for the context of a result."""
        networks: list[Any] = [self.encoder, *self.judges, *self.features, *self.perceptual]
        return {network.id: str(network.dtype).removeprefix("torch.") for network in networks}


def load_backbones(
    encoder: Encoder,
    *,
    judges: tuple[str, ...] = ("dlib",),
    device: torch.device | str = "cpu",
    fetch: bool = False,
) -> Backbones:
    """Load all networks whose packages and weights are present.

    Args:
        encoder: the encoder of the condition.
        judges: `dlib`, or paths of ONNX face encoders (see load_judge).
        device: of the networks.
        fetch: download the weights of FID's Inception and of LPIPS's AlexNet where they are missing.

    Raises UserError for a judge given by path that does not load, or a download that fails.
    """
    missing: dict[str, str] = {}
    loaded: dict[str, list[Any]] = {"judges": [], "features": [], "perceptual": []}

    def add(kind: str, metrics: str, load: Any, *, required: bool = False, **keywords: Any) -> None:
        try:
            loaded[kind].append(load(device=device, **keywords))
        except UserError as error:
            if required:
                raise
            missing[metrics] = str(error) + ("; or use --fetch" if "fetch" in keywords else "")

    for judge in judges:
        add(
            "judges",
            f"identity_{judge}, type1_{judge}, type2_{judge}",
            load_judge,
            required=judge != "dlib",
            spec=judge,
        )
    add("features", "fd_effnet, kd_effnet, precision_effnet, recall_effnet", load_effnet)
    add("features", "fid, kid", load_inception, required=fetch, fetch=fetch)
    add("perceptual", "stlpips, diversity_noise_stlpips", load_stlpips)
    add("perceptual", "lpips", load_lpips, required=fetch, fetch=fetch)
    parts: dict[str, Any] = {kind: tuple(networks) for kind, networks in loaded.items()}
    return Backbones(encoder, **parts, missing=missing)

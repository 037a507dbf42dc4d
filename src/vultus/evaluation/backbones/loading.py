"""The networks that an evaluation looks through, as far as they are at hand, and what is missing for the others."""

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
    """What faces are measured with.

    Attributes:
        encoder: the condition's own encoder; a generator may have been trained against it.
        judges: face encoders that no generator was trained against; the first one is asked about diversity.
        features: networks for distances of distributions.
        perceptual: distances of pairs of pictures; the first one measures diversity over noise.
        missing: rows that cannot be measured, by name, with the reason and the remedy.
    """

    encoder: Encoder
    judges: tuple[Judge, ...] = ()
    features: tuple[FeatureNetwork, ...] = ()
    perceptual: tuple[Perceptual, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError if two networks would give their rows one name."""
        networks: list[Any] = [*self.judges, *self.features, *self.perceptual]
        shorts = [self.short, *(network.short for network in networks)]
        for name in shorts:
            if shorts.count(name) > 1:
                raise UserError(f"--judge: two networks are called {name}; rename the file of the judge")

    @property
    def short(self) -> str:
        """The encoder in the names of rows."""
        return self.encoder.id.partition("-")[0]

    @property
    def ids(self) -> dict[str, Any]:
        """What identifies every network and what it computes in, for the record."""
        networks: list[Any] = [self.encoder, *self.judges, *self.features, *self.perceptual]
        return {network.id: str(network.dtype).removeprefix("torch.") for network in networks}


def load_backbones(
    encoder: Encoder,
    *,
    judges: tuple[str, ...] = ("dlib",),
    device: torch.device | str = "cpu",
    fetch: bool = False,
) -> Backbones:
    """All networks that are at hand.

    Args:
        encoder: the condition's own.
        judges: `dlib`, or paths of ONNX face encoders (see judges.load_judge). One that is given by path must load.
        fetch: download the weights of FID's Inception and of LPIPS's AlexNet where they are not at hand.

    Raises UserError for a judge given by path that does not load, or a download that fails.
    """
    missing: dict[str, str] = {}
    found: dict[str, list[Any]] = {"judges": [], "features": [], "perceptual": []}

    def add(kind: str, rows: str, load: Any, *, must: bool = False, **keywords: Any) -> None:
        try:
            found[kind].append(load(device=device, **keywords))
        except UserError as error:
            if must:
                raise
            missing[rows] = str(error) + ("; or let --fetch do it" if "fetch" in keywords else "")

    for judge in judges:
        add("judges", f"identity_{judge}, type1_{judge}, type2_{judge}", load_judge, must=judge != "dlib", spec=judge)
    add("features", "fd_effnet, kd_effnet, precision_effnet, recall_effnet", load_effnet)
    add("features", "fid, kid", load_inception, must=fetch, fetch=fetch)
    add("perceptual", "stlpips, diversity_noise_stlpips", load_stlpips)
    add("perceptual", "lpips", load_lpips, must=fetch, fetch=fetch)
    parts: dict[str, Any] = {kind: tuple(networks) for kind, networks in found.items()}
    return Backbones(encoder, **parts, missing=missing)

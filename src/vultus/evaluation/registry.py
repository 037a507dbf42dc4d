"""Every metric: its name, group, direction, label and format, and what it needs. Tables, plots, reports, model cards and
alarms read it here.

The name of a metric carries its backbone, count and split (`fd_effnet_2527_test`), so an entry describes a family of
names by a pattern. Fields in braces are filled from the name: {backbone}, {far}, {count}, {split}.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "near"]  # near: the nearer to what real photos reach, the better
Format = Literal["number", "percent", "small"]  # small: five decimals, for kernel distances

ARROWS: dict[str, str] = {"higher": "↑", "lower": "↓", "near": "="}
GROUPS = ("identity", "realism", "reconstruction", "diversity", "memorization")
BACKBONE_NAMES = {"effnet": "EfficientNet-lite0", "facenet": "FaceNet", "inception": "Inception", "rms": "RMS"} | {
    "stlpips": "ST-LPIPS",
    "lpips": "LPIPS",
}


@dataclass(frozen=True)
class Metric:
    """A family of metrics.

    Attributes:
        pattern: regular expression that the whole name matches; its named groups fill `label`.
        group: one of GROUPS.
        direction: what is better.
        label: what it says, for readers; with fields in braces.
        format: how a value is written.
        needs: what must be at hand to measure it: a backbone, weights, noises.
        headline: shown first in reports and model cards.
        short: label for narrow tables and plots, with fields; empty: the name.
    """

    pattern: str
    group: str
    direction: Direction
    label: str
    format: Format = "number"
    needs: str = ""
    headline: bool = False
    short: str = ""


@dataclass(frozen=True)
class NamedMetric:
    """A metric by its full name: the family, and the fields that the name carries."""

    name: str
    family: Metric
    fields: dict[str, str]

    @property
    def label(self) -> str:
        """The label with its fields filled."""
        shown = {key: BACKBONE_NAMES.get(value, value) for key, value in self.fields.items()}
        return self.family.label.format(**shown)

    @property
    def arrow(self) -> str:
        """The direction as a sign."""
        return ARROWS[self.family.direction]

    def text(self, value: float, digits: int | None = None) -> str:
        """A value of this metric as text; `digits` decimals, or as many as four significant figures need."""
        if self.family.format == "percent":
            return f"{value:.1%}".replace("%", " %")
        if digits is None:
            digits = decimals(abs(value), small=self.family.format == "small")
        return f"{value:.{digits}f}"


def decimals(largest: float, *, small: bool = False) -> int:
    """Decimals for a row whose largest value is `largest`: four significant figures, four decimals at most."""
    if small:
        return 5 if largest < 0.1 else 4
    return 3 if largest < 2 else 2 if largest < 100 else 1


_B, _NS = r"(?P<backbone>[a-z0-9_]+?)", r"_(?P<count>\d+)_(?P<split>[a-z]+)"

METRICS: tuple[Metric, ...] = (
    Metric(
        rf"identity_{_B}",
        "identity",
        "higher",
        "mean score by {backbone} between a generated face and the photo that its embedding came from",
        headline=True,
    ),
    Metric(
        rf"type1_{_B}_far(?P<far>[\de-]+)",
        "identity",
        "higher",
        "accepted by {backbone} as the person of the very photo, at a false accept rate of {far}",
        needs="pairs of different people, 1 / FAR or more",
        headline=True,
    ),
    Metric(
        rf"type2_{_B}_far(?P<far>[\de-]+)",
        "identity",
        "higher",
        "accepted by {backbone} as the person of another photo, at a false accept rate of {far}",
        needs="people with two photos",
        headline=True,
    ),
    Metric(
        rf"rank(?P<rank>\d+)_{_B}",
        "identity",
        "higher",
        "the right person is among the {rank} nearest people by {backbone}",
        needs="people with two photos",
        headline=True,
    ),
    Metric(rf"fid{_NS}", "realism", "lower", "FID", needs="weights of FID's Inception network", headline=True),
    Metric(rf"kid{_NS}", "realism", "lower", "KID", format="small", needs="weights of FID's Inception network"),
    Metric(
        rf"fd_{_B}{_NS}",
        "realism",
        "lower",
        "Fréchet distance in features of {backbone} (not FID, and not comparable with it)",
        needs="100 photos",
        headline=True,
    ),
    Metric(rf"kd_{_B}{_NS}", "realism", "lower", "kernel distance in features of {backbone} (not KID)", format="small"),
    Metric(rf"precision_{_B}", "realism", "higher", "generated faces that lie among real ones ({backbone})"),
    Metric(rf"recall_{_B}", "realism", "higher", "real faces that lie among generated ones ({backbone})"),
    Metric(rf"density_{_B}", "realism", "higher", "density of generated faces around real ones ({backbone})"),
    Metric(
        rf"coverage_{_B}", "realism", "higher", "real faces with a generated one in their neighbourhood ({backbone})"
    ),
    Metric(r"mse(?:_best\d+)?", "reconstruction", "lower", "mean squared error against the photo, values in [-1, 1]"),
    Metric(r"psnr(?:_best\d+)?", "reconstruction", "higher", "peak signal-to-noise ratio against the photo, dB"),
    Metric(r"ms_ssim(?:_\d)?(?:_best\d+)?", "reconstruction", "higher", "MS-SSIM against the photo"),
    Metric(r"lpips(?:_best\d+)?", "reconstruction", "lower", "LPIPS against the photo", needs="AlexNet's weights"),
    Metric(r"stlpips(?:_best\d+)?", "reconstruction", "lower", "ST-LPIPS against the photo (not LPIPS)"),
    Metric(
        r"diversity_identity",
        "diversity",
        "near",
        "1 - mean cosine between faces of different embeddings",
    ),
    Metric(
        r"pairs_above_(?P<limit>[\d.]+)",
        "diversity",
        "near",
        "pairs of different embeddings with a cosine above {limit}",
    ),
    Metric(
        rf"diversity_noise_{_B}_held",
        "diversity",
        "near",
        "difference between two noises of one embedding ({backbone}), 0 where a face loses the identity",
        needs="two noises and a judge",
    ),
    Metric(
        rf"diversity_noise_{_B}",
        "diversity",
        "near",
        "difference between two noises of one embedding ({backbone})",
        needs="two noises",
        headline=True,
    ),
    Metric(rf"nearest_train_{_B}", "memorization", "near", "mean cosine to the nearest training photo ({backbone})"),
    Metric(
        rf"copied_{_B}",
        "memorization",
        "near",
        "nearer to a training photo than 99 % of real unseen faces are ({backbone})",
        headline=True,
    ),
)


@functools.lru_cache(maxsize=1024)
def find(name: str) -> NamedMetric | None:
    """The metric of this name, or None for an unknown one."""
    for family in METRICS:
        if found := re.fullmatch(family.pattern, name):
            return NamedMetric(name, family, {key: value for key, value in found.groupdict().items() if value})
    return None


def order(name: str) -> tuple[int, int]:
    """Where a metric stands in a table: by its group, then by its family. Unknown ones come last."""
    found = find(name)
    if found is None:
        return len(GROUPS), len(METRICS)
    return GROUPS.index(found.family.group), METRICS.index(found.family)


def headlines(names: Iterable[str]) -> list[NamedMetric]:
    """The metrics among `names` that a summary shows, in the order of tables."""
    left_out = ("_best", "_held", "far1e-2", "rank5")
    known = [metric for metric in map(find, dict.fromkeys(names)) if metric is not None and metric.family.headline]
    return sorted((m for m in known if not any(part in m.name for part in left_out)), key=lambda m: order(m.name))

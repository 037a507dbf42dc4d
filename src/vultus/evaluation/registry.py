"""Every metric: its name, group, direction, label and format, and what it needs.

Tables, plots, reports, model cards and alarms read it here.

The name of a metric carries its backbone, count and split (`fd_effnet_2527_test`), so an entry of METRICS is a family
of names, given by a template: `fd_{backbone}_{count}_{split}`. Exactly one family matches a name. To add a metric, add
its family here and compute it in scores.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "near"]  # near: the nearer to the value of real photos, the better
Format = Literal["number", "percent", "small"]  # small: five decimals, for kernel distances

ARROWS: dict[Direction, str] = {"higher": "↑", "lower": "↓", "near": "="}
MEMORIZATION = "memorization"  # the group of what compares with the training photos
GROUPS = ("identity", "realism", "reconstruction", "diversity", MEMORIZATION)
CONDITION_ENCODER = "facenet"  # in the names of metrics; identity losses contain it, so its scores flatter a generator
HEADLINE_FAR = "1e-3"
MIN_PHOTOS = 100  # below it, distances between distributions are not measured
BACKBONE_NAMES = {
    "effnet": "EfficientNet-lite0",
    "facenet": "FaceNet",
    "inception": "Inception",
    "rms": "RMS",
    "stlpips": "ST-LPIPS",
    "lpips": "LPIPS",
}

_BEST = r"(?:_best(?P<best>\d+))?"  # the best of so many noises instead of the mean over noises
_FIELDS = {
    "backbone": r"[a-z0-9_]+?",
    "distance": r"[a-z0-9_]+?(?<!_held)",
    "variant": r"(?!best\d)[a-z0-9]+?",
    "far": r"\d+e-\d+",
    "rank": r"\d+",
    "count": r"\d+",
    "split": r"[a-z]+",
    "scales": r"\d",
    "limit": r"[\d.]+",
}


@dataclass(frozen=True)
class Metric:
    """A family of metrics.

    Attributes:
        template: the name, with fields in braces.
        group: one of GROUPS.
        direction: which values are better.
        label: what it measures, for readers; the fields of the name may stand in it.
        format: how a single value is written.
        needs: what it needs besides its backbone and the photos; empty: nothing.
        headline: shown first in reports, plots and model cards (see `headlines`).
        best_of: names with the suffix `_best<K>` belong to it.
    """

    template: str
    group: str
    direction: Direction
    label: str
    format: Format = "number"
    needs: str = ""
    headline: bool = False
    best_of: bool = False

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names of this family; its groups are the fields."""
        text = re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", self.template)
        return re.compile(text + (_BEST if self.best_of else ""))


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
        if "far" in shown:
            shown["far"] = f"{float(shown['far']) * 100:g} %"
        best = f", best of {self.fields['best']} noises" if "best" in self.fields else ""
        return self.family.label.format(**shown) + best

    @property
    def arrow(self) -> str:
        """The direction as a sign."""
        return ARROWS[self.family.direction]

    @property
    def headline(self) -> bool:
        """Whether it is shown first. Of a family, only the mean over noises, rank 1 and the FAR of 1e-3 are."""
        usual = self.fields.get("far", HEADLINE_FAR) == HEADLINE_FAR and self.fields.get("rank", "1") == "1"
        return self.family.headline and usual and "best" not in self.fields

    def decimals(self, largest: float) -> int:
        """Decimals for a table row whose largest absolute value is `largest`."""
        return decimals(largest, small=self.family.format == "small")

    def text(self, value: float, digits: int | None = None) -> str:
        """A value of this metric as text; `digits` decimals, or as many as four significant figures need."""
        if self.family.format == "percent":
            return f"{value * 100:.{1 if digits is None else digits}f} %"
        return f"{value:.{self.decimals(abs(value)) if digits is None else digits}f}"


def decimals(largest: float, *, small: bool = False) -> int:
    """Decimals for values up to `largest`: four significant figures; `small`: four or five decimals."""
    if small:
        return 5 if largest < 0.1 else 4
    return 3 if largest < 2 else 2 if largest < 100 else 1


_OTHER_PHOTO = "people with two photos"

METRICS: tuple[Metric, ...] = (
    Metric(
        "identity_{backbone}",
        "identity",
        "higher",
        "mean score by {backbone} between a generated face and its source photo (a cosine, or minus a distance)",
        headline=True,
    ),
    Metric(
        "type1_{backbone}_far{far}",
        "identity",
        "higher",
        "accepted by {backbone} as the person of the source photo, at a false accept rate of {far}",
        format="percent",
        needs="1 / FAR pairs of different people",
        headline=True,
    ),
    Metric(
        "type2_{backbone}_far{far}",
        "identity",
        "higher",
        "accepted by {backbone} as the person of another photo, at a false accept rate of {far}",
        format="percent",
        needs=f"1 / FAR pairs of different people, {_OTHER_PHOTO}",
        headline=True,
    ),
    Metric(
        "rank{rank}_{backbone}",
        "identity",
        "higher",
        "identification rate at rank {rank}, by {backbone}",
        format="percent",
        needs=_OTHER_PHOTO,
        headline=True,
    ),
    Metric(
        "fid_{count}_{split}",
        "realism",
        "lower",
        "FID on {count} images",
        needs=f"weights of FID's Inception network, {MIN_PHOTOS} photos",
        headline=True,
    ),
    Metric(
        "kid_{count}_{split}",
        "realism",
        "lower",
        "KID on {count} images",
        format="small",
        needs=f"weights of FID's Inception network, {MIN_PHOTOS} photos",
    ),
    Metric(
        "fd_{backbone}_{count}_{split}",
        "realism",
        "lower",
        "Fréchet distance in features of {backbone} on {count} images (not FID, not comparable with it)",
        needs=f"{MIN_PHOTOS} photos",
        headline=True,
    ),
    Metric(
        "kd_{backbone}_{count}_{split}",
        "realism",
        "lower",
        "kernel distance in features of {backbone} on {count} images (not KID)",
        format="small",
        needs=f"{MIN_PHOTOS} photos",
    ),
    Metric(
        "precision_{backbone}",
        "realism",
        "higher",
        "generated faces that lie among real ones, in features of {backbone}",
        format="percent",
        needs=f"{MIN_PHOTOS} photos",
    ),
    Metric(
        "recall_{backbone}",
        "realism",
        "higher",
        "real faces that lie among generated ones, in features of {backbone}",
        format="percent",
        needs=f"{MIN_PHOTOS} photos",
    ),
    Metric(
        "density_{backbone}",
        "realism",
        "higher",
        "density of generated faces around real ones, in features of {backbone}; may exceed 1",
        needs=f"{MIN_PHOTOS} photos",
    ),
    Metric(
        "coverage_{backbone}",
        "realism",
        "higher",
        "real faces with a generated one in their neighbourhood, in features of {backbone}",
        format="percent",
        needs=f"{MIN_PHOTOS} photos",
    ),
    Metric(
        "mse",
        "reconstruction",
        "lower",
        "mean squared error against the source photo, values in [-1, 1]",
        best_of=True,
    ),
    Metric(
        "psnr",
        "reconstruction",
        "higher",
        "peak signal-to-noise ratio against the source photo in dB",
        best_of=True,
    ),
    Metric("ms_ssim", "reconstruction", "higher", "MS-SSIM against the source photo", best_of=True),
    Metric(
        "ms_ssim_{scales}",
        "reconstruction",
        "higher",
        "MS-SSIM with {scales} of its 5 scales against the source photo",
        best_of=True,
    ),
    Metric(
        "lpips",
        "reconstruction",
        "lower",
        "LPIPS against the source photo",
        needs="AlexNet's weights",
        best_of=True,
    ),
    Metric(
        "lpips_{variant}",
        "reconstruction",
        "lower",
        "LPIPS-like distance {variant} against the source photo (not LPIPS)",
        best_of=True,
    ),
    Metric(
        "stlpips",
        "reconstruction",
        "lower",
        "ST-LPIPS against the source photo (not LPIPS)",
        best_of=True,
    ),
    Metric(
        "diversity_identity",
        "diversity",
        "near",
        "1 - mean cosine between faces of different embeddings, by the encoder of the condition",
    ),
    Metric(
        "pairs_above_{limit}",
        "diversity",
        "near",
        "pairs of faces of different embeddings with a cosine above {limit}, by the encoder of the condition",
        format="percent",
    ),
    Metric(
        "diversity_noise_{distance}",
        "diversity",
        "near",
        "{distance} difference between two faces of one embedding; 0: the noise has no effect",
        needs="two noises",
        headline=True,
    ),
    Metric(
        "diversity_noise_{distance}_held",
        "diversity",
        "near",
        "{distance} difference between two faces of one embedding, 0 where a face loses the identity",
        needs="two noises, a judge",
    ),
    Metric(
        "nearest_train_{backbone}",
        "memorization",
        "near",
        "mean cosine to the nearest training photo, by {backbone}",
        needs="the training split",
    ),
    Metric(
        "copied_{backbone}",
        "memorization",
        "near",
        "nearer to a training photo than 99 % of real unseen faces are, by {backbone}",
        format="percent",
        needs="the training split",
        headline=True,
    ),
)


@functools.lru_cache(maxsize=1024)
def find(name: str) -> NamedMetric | None:
    """The metric of this name, or None for an unknown one."""
    for family in METRICS:
        if match := family.pattern.fullmatch(name):
            return NamedMetric(name, family, {key: value for key, value in match.groupdict().items() if value})
    return None


def order(name: str) -> tuple[int, int]:
    """Sort key of a metric in a table: its group, then its family. Unknown names come last."""
    metric = find(name)
    if metric is None:
        return len(GROUPS), len(METRICS)
    return GROUPS.index(metric.family.group), METRICS.index(metric.family)


def headlines(names: Iterable[str], in_loss: Collection[str] = (CONDITION_ENCODER,)) -> list[NamedMetric]:
    """Of these metrics, the ones to show first, in the order of a table.

    Acceptance and ranks by an encoder that the losses contain (`in_loss`) are left out where another encoder measured
    them too.
    """
    metrics = [metric for name in names if (metric := find(name)) and metric.headline]
    judged = {m.family for m in metrics if m.fields.get("backbone") not in in_loss}
    chosen = [m for m in metrics if not (_verifies(m) and m.fields["backbone"] in in_loss) or m.family not in judged]
    return sorted(chosen, key=lambda metric: order(metric.name))


def _verifies(metric: NamedMetric) -> bool:
    return metric.family.template.startswith(("type", "rank"))

"""Which metrics of a result are shown first. Without torch.

Memorization is measured against the training split of the data set of an evaluation. If the snapshot was trained on
other data, that says nothing about it: tables mark the values, and they are no headlines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vultus.evaluation import registry

COPIES = "copies:"  # the beginning of the alarm
OTHER_DATA = (
    "not the data set that this snapshot was trained on (by its hash), so these values say nothing about memorization"
)


# These follow values of an encoder that is no fair judge: the losses contained it, it chose the faces, or both.
IN_LOSS = " (in the loss)"
CHOSE = " (chose the faces)"
BOTH = " (in the loss, chose the faces)"
ENCODERS = (registry.CONDITION_ENCODER, "mobilefacenet", "dlib")  # by the beginnings of their ids
WITHOUT_ENCODER = ("reference-mse", "reference-dcgan", "tiny")  # presets whose losses contain none


def loss_encoders(metadata: Mapping[str, Any]) -> list[str]:
    """The face encoders that the training of a snapshot contained, by their names in metrics, of its metadata: those of
    the losses, and that of the condition, if it is another than FaceNet.

    Snapshots of earlier versions record the preset only.
    """
    without = metadata.get("preset") in WITHOUT_ENCODER
    found = list(metadata.get("loss_encoders", [] if without else [registry.CONDITION_ENCODER]))
    condition = str((metadata.get("encoder") or {}).get("id", registry.CONDITION_ENCODER))
    short = condition.partition("-")[0]  # as Backbones.short
    name = short if short in ENCODERS else condition
    return found if name in (registry.CONDITION_ENCODER, *found) else [*found, name]


def encoders_in_loss(result: Mapping[str, Any]) -> list[str]:
    """The same of a result. For those of earlier versions, which do not say it: the encoder of the condition."""
    return list(result.get("context", {}).get("loss_encoders", [registry.CONDITION_ENCODER]))


def in_loss(name: str, result: Mapping[str, Any]) -> bool:
    """Whether this metric of a result is known to be the verdict of an encoder that the losses contained."""
    metric = registry.find(name)
    if metric is None or metric.family.group != "identity":
        return False
    return metric.fields["backbone"] in result.get("context", {}).get("loss_encoders", ())


def chose(name: str, result: Mapping[str, Any]) -> bool:
    """Whether this metric of a result is the verdict of the encoder that chose the faces, in results of `--best-of`."""
    metric = registry.find(name)
    if metric is None or metric.family.group != "identity":
        return False
    return metric.fields["backbone"] in result.get("context", {}).get("chosen_by", ())


def partiality(name: str, result: Mapping[str, Any]) -> str:
    """What follows the value of this metric in a table where its encoder is no fair judge; otherwise ""."""
    return {(True, False): IN_LOSS, (False, True): CHOSE, (True, True): BOTH}.get(
        (in_loss(name, result), chose(name, result)), ""
    )


def of_other_data(result: Mapping[str, Any]) -> bool:
    """Whether the data set of a result is known to be another than the snapshot was trained on."""
    return result.get("context", {}).get("trained_on_this_data") is False


def with_training_data(result: Mapping[str, Any], content_sha256: Any) -> dict[str, Any]:
    """A result that says whether its data set is the one with this hash, on which the snapshot was trained.

    Results of earlier versions do not say it; others, and those where a hash is unknown, stay as they are.
    """
    context = result["context"]
    measured = context.get("data_sha256")
    if context.get("trained_on_this_data") is not None or not content_sha256 or not measured:
        return dict(result)
    same = bool(measured == content_sha256)
    alarms = [text for text in result["alarms"] if same or not text.startswith(COPIES)]
    return {**result, "context": {**context, "trained_on_this_data": same}, "alarms": alarms}


def headlines_of(result: Mapping[str, Any]) -> list[registry.NamedMetric]:
    """The metrics of a result to show first; without memorization if the photos are `of_other_data`, and without the
    verdicts of encoders that the losses contained, or that chose the faces, where another encoder judged."""
    partial = [*encoders_in_loss(result), *result.get("context", {}).get("chosen_by", ())]
    metrics = registry.headlines(result["metrics"], partial)
    if of_other_data(result):
        metrics = [metric for metric in metrics if metric.family.group != registry.MEMORIZATION]
    return metrics

"""Warnings that follow from the metrics of an evaluation."""

from __future__ import annotations

from vultus.evaluation import registry
from vultus.evaluation.headlines import COPIES
from vultus.evaluation.scores import COLLAPSE, FARS, Rows, far_label


def find_alarms(
    rows: Rows, *, encoder: str, judge: str | None, perceptual: str | None, copies: bool = True
) -> list[str]:
    """Warnings: collapse, noise without effect, an encoder that is fooled, copies. Each gives its values.

    `encoder`, `judge` and `perceptual` are the backbones in the names of the metrics. `copies`: the nearest photos that
    were compared are the training photos of the generator.
    """
    warnings = []

    def with_real(name: str) -> tuple[float, float] | None:
        row = rows.get(name)
        return None if row is None or row.real is None else (row.value, row.real)

    def text(name: str, value: float) -> str:
        metric = registry.find(name)
        return f"{value:.3f}" if metric is None else metric.text(value)

    name = f"pairs_above_{COLLAPSE}"
    share = with_real(name)
    if share and share[0] > 0.01 + 2 * share[1]:
        value, real = (text(name, number) for number in share)
        warnings.append(f"collapse: {value} of the pairs of faces of different embeddings look alike (real: {real})")
    name = "diversity_identity"
    varied = with_real(name)
    if varied and varied[0] < 0.5 * varied[1]:
        value, real = (text(name, number) for number in varied)
        warnings.append(f"collapse: faces of different people are alike, diversity {value} (real: {real})")
    for name in (name for name in rows if name.startswith("recall_")):
        recall = with_real(name)
        if recall and recall[0] < 0.02 < 0.1 < recall[1]:
            warnings.append(f"collapse: {name} {text(name, recall[0])}, few real faces lie among the generated ones")
    name = f"diversity_noise_{perceptual}"
    noise = with_real(name) or with_real(name := "diversity_noise_rms")
    if noise and noise[0] < 0.1 * noise[1]:
        value, real = (text(name, number) for number in noise)
        warnings.append(f"idle noise: faces of one embedding differ by {value}, photos of one person by {real}")
    names = [f"type1_{backbone}_far{far_label(FARS[-1])}" for backbone in (encoder, judge)]
    theirs, ours = (rows.get(name) for name in names)
    if theirs and ours and theirs.value > 0.2 and ours.value < 0.5 * theirs.value:
        shares = [text(name, row.value) for name, row in zip(names, (theirs, ours), strict=True)]
        warnings.append(
            f"{encoder} flatters: it accepts {shares[0]} of the faces as the person, {judge} accepts {shares[1]}"
        )
    name = f"copied_{encoder}"
    copied = rows.get(name)
    if copies and copied and copied.low > 0.05:
        value = text(name, copied.value)
        warnings.append(f"{COPIES} {value} of the faces are nearer to a training photo than 99 % of real faces are")
    return warnings

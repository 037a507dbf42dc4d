"""What a report tells of its runs, in words and numbers, before anybody decides how it looks."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vultus.evaluation.charts import Line, histogram, line_chart
from vultus.reporting.run_folder import EVALUATION, Evaluation, Run, number
from vultus.reporting.run_summary import RunSummary, describe

SHOWN = 5  # people at each end of the judge's list
OWN = "facenet"  # the condition's own encoder, which is no judge; for results that do not name their judges

# Charts of training: title, what it tells, and its lines as (evaluator or None, key, label).
CURVES: tuple[tuple[str, str, tuple[tuple[str | None, str, str], ...]], ...] = (
    (
        "Likeness, unseen people",
        "FaceNet cosine between the embedding asked for and that of the face made; higher is better",
        (("unseen", "identity_facenet", "unseen people"),),
    ),
    (
        "Reconstruction error",
        "mean squared error against the photo, values in [-1, 1]; dashed: in training",
        (("unseen", "mse", "unseen people"), (None, "G_mse", "in training")),
    ),
    ("Identity loss", "1 - FaceNet cosine, in training", ((None, "G_identity", "in training"),)),
    (
        "Adversarial losses",
        "generator; dashed: discriminator. Neither near 0 means that both still learn",
        ((None, "G_adversarial", "generator"), (None, "D_adversarial", "discriminator")),
    ),
    (
        "Discriminator's logits",
        "for photos; dashed: for faces made",
        ((None, "D_real_logits", "photos"), (None, "D_fake_logits", "faces made")),
    ),
    (
        "What coded noise says",
        "nats beyond plain noise, of noise read from photos",
        ((None, "G_kl", "in training"),),
    ),
    (
        "Difference in FaceNet's features",
        "between a photo and the face whose noise was read from it, in training",
        ((None, "G_perceptual", "in training"),),
    ),
    (
        "Feature discriminator",
        "its loss; dashed: the generator's against it",
        ((None, "F_adversarial", "discriminator"), (None, "G_features", "generator")),
    ),
    (
        "Gradient norms",
        "generator; dashed: discriminator",
        ((None, "G_grad_norm", "generator"), (None, "D_grad_norm", "discriminator")),
    ),
    ("Speed", "images a second", ((None, "images_per_s", "images a second"),)),
)

# Rows of an evaluation that come first, as (pattern, words, in per cent); {judge} is the judge's name.
HEADLINES = (
    (r"type1_{judge}_far1e-3", "taken for the person of the very photo (by {judge}, false accepts 1 in 1,000)", True),
    (r"type2_{judge}_far1e-3", "taken for the person of their other photos (same judge)", True),
    (r"rank1_{judge}", "the person is the nearest of all (same judge)", True),
    (r"identity_facenet", "FaceNet cosine to the embedding asked for", False),
    (r"fid_\d+_\w+", "FID", False),
    (r"fd_\w+_\d+_\w+", "Fréchet distance of {name} features (not FID)", False),
    (r"diversity_noise_(?:lpips|stlpips|rms)", "difference over noise, {name}", False),
    (r"copied_\w+", "nearer to a training photo than 99 % of real strangers are", True),
)


@dataclass(frozen=True)
class Chart:
    """A drawing with its words; `slug` is good for the name of a file."""

    title: str
    caption: str
    svg: str
    slug: str


@dataclass(frozen=True)
class Figure:
    """A row of the summary: words, what real photos reach, and a cell for each run ("" where it was not measured)."""

    words: str
    real: str
    cells: list[str]


@dataclass(frozen=True)
class PersonScores:
    """The judge's list of people for one column: (person, mean score, photos, share of the way from worst to best)."""

    column: str
    judge: str
    count: int
    median: float
    best: list[tuple[str, float, int, float]]
    worst: list[tuple[str, float, int, float]]


@dataclass(frozen=True)
class ReportContent:
    """All of a report."""

    title: str
    runs: list[RunSummary]
    curves: list[Chart]
    summary: list[Figure]
    evaluation: Evaluation
    histograms: list[Chart]
    nearest: list[Chart]
    people: list[PersonScores]
    remarks: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the runs, in order."""
        return [each.run.name for each in self.runs]

    @property
    def whom(self) -> list[str]:
        """Whose faces are shown: one sentence where it is the same for all runs."""
        told = list(dict.fromkeys(each.whom for each in self.runs))
        return told if len(told) == 1 else [f"{each.run.name}: {each.whom}" for each in self.runs]

    def compared(self, key: str) -> list[tuple[str, list[str]]]:
        """The rows of `facts` or `machine` of all runs side by side: (name, a cell a run)."""
        rows = [dict(getattr(each, key)) for each in self.runs]
        names = dict.fromkeys(name for row in rows for name in row)
        return [(name, [row.get(name, "-") for row in rows]) for name in names]


def tell(runs: Sequence[Run], evaluation: Evaluation) -> ReportContent:
    """The story of these runs and their evaluation."""
    title = "Training report: " + (", ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs")
    judge = _judge(evaluation)
    return ReportContent(
        title=title,
        runs=[describe(run) for run in runs],
        curves=_curves(runs),
        summary=_summary(runs, evaluation, judge),
        evaluation=evaluation,
        histograms=_histograms(evaluation),
        nearest=_nearest(evaluation),
        people=_people(evaluation),
        remarks=_evaluation_remarks(runs, evaluation),
    )


def _judge(evaluation: Evaluation) -> str | None:
    return next((judge for result in evaluation.columns.values() for judge in _judges(result)), None)


def _judges(result: Mapping[str, Any]) -> list[str]:
    """Encoders that no training has seen."""
    return list(result.get("people") or [kind for kind in result["distributions"] if kind not in (OWN, "nearest")])


# --- curves and histograms --------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> list[Chart]:
    found = []
    for title, caption, keys in CURVES:
        lines = []
        for colour, run in enumerate(runs):
            for place, (evaluator, key, label) in enumerate(keys):
                name = f"{run.name}, {label}" if len(runs) > 1 else label
                points = run.series(key, evaluator)
                lines.append(Line(name, points, colour, dashed=place > 0, dots=evaluator is not None))
        svg = line_chart(title, lines)
        if svg:
            found.append(Chart(title, caption, svg, f"curve-{_slug(title)}"))
    return found


def _histograms(evaluation: Evaluation) -> list[Chart]:
    found = []
    kinds = dict.fromkeys(kind for result in evaluation.columns.values() for kind in result["distributions"])
    judges = {judge for result in evaluation.columns.values() for judge in _judges(result)}
    for kind in sorted((kind for kind in kinds if kind != "nearest"), key=lambda kind: kind not in judges):
        for column, result in evaluation.columns.items():
            shown = result["distributions"].get(kind)
            if not shown:
                continue
            filled = {"same person": (2, "same person"), "different people": (7, "different people")}
            outlined = {"generated, type I": (1, "generated, type I"), "generated, type II": (0, "generated, type II")}
            flattered = ", the judge" if kind in judges else ", whose embedding the faces were made from"
            svg = histogram(
                f"{column}: scores by {kind}",
                shown["edges"],
                {label: (colour, shown[key]) for label, (colour, key) in filled.items() if key in shown},
                {label: (colour, shown[key]) for label, (colour, key) in outlined.items() if key in shown},
                x_label=f"score by {kind} (right: more alike)",
                marks={f"FAR {far}": place for far, place in shown.get("thresholds", {}).items()},
            )
            if svg:
                found.append(Chart(column, f"by {kind}{flattered}", svg, f"identity-{kind}-{_slug(column)}"))
    return found


def _nearest(evaluation: Evaluation) -> list[Chart]:
    found = []
    for column, result in evaluation.columns.items():
        shown = result["distributions"].get("nearest")
        if not shown or "generated" not in shown:
            continue
        svg = histogram(
            f"{column}: cosine to the nearest training photo",
            shown["edges"],
            {"photos of unseen people": (2, shown["real unseen faces"])} if "real unseen faces" in shown else {},
            {"faces made": (1, shown["generated"])},
            x_label="FaceNet cosine to the nearest training photo",
        )
        rows = result["metrics"]
        told = [f"{words} {_plain(rows[key])}" for key, words in _NEAREST if key in rows]
        if svg:
            found.append(Chart(column, "; ".join(told), svg, f"nearest-{_slug(column)}"))
    return found


_NEAREST = (("nearest_train_facenet", "mean cosine"), ("copied_facenet", "share nearer than 99 % of real strangers"))


def _plain(row: Mapping[str, float]) -> str:
    real = f" (real photos {row['real']:.3f})" if number(row.get("real")) else ""
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{real}"


# --- evaluation -------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run], evaluation: Evaluation, judge: str | None) -> list[Figure]:
    """The figures that a reader wants first: of the evaluation, or else the last ones measured in training."""
    results = [evaluation.columns.get(evaluation.of_run.get(run.name, "")) for run in runs]
    found = []
    for pattern, words, share in HEADLINES:
        if "{judge}" in pattern and judge is None:
            continue
        fitting = re.compile(pattern.replace("{judge}", re.escape(judge or "")))
        names = [name for result in results if result for name in result["metrics"] if fitting.fullmatch(name)]
        if not names:
            continue
        # Of two counts, the one that more runs have: distances of other counts cannot be compared.
        name = max(dict.fromkeys(names), key=names.count)
        rows = [result["metrics"].get(name) if result else None for result in results]
        real = next((row["real"] for row in rows if row and number(row.get("real"))), None)
        found.append(
            Figure(
                words.format(judge=judge, name=_instrument(name)),
                "" if real is None else _value(real, share),
                ["" if row is None else _value(row["value"], share) for row in rows],
            )
        )
    if not found:
        for key, words in (("identity_facenet", "FaceNet cosine to the embedding asked for"), ("mse", "MSE")):
            last = [run.series(key, "unseen")[-1:] for run in runs]
            if any(last):
                cells = [f"{entry[0][1]:.3f}" if entry else "" for entry in last]
                found.append(Figure(f"{words}, last measured in training", "", cells))
    return found


def _instrument(name: str) -> str:
    parts = name.split("_")
    return {"rms": "RMS", "stlpips": "ST-LPIPS", "lpips": "LPIPS"}.get(parts[-1], parts[1] if len(parts) > 1 else name)


def _value(value: float, share: bool) -> str:
    if not math.isfinite(value):
        return "-"
    if share:
        return f"{value * 100:.3g} %" if value >= 0.1 or value == 0 else f"{value * 100:.2g} %"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _people(evaluation: Evaluation) -> list[PersonScores]:
    found = []
    for column, result in evaluation.columns.items():
        for judge, entries in result.get("people", {}).items():
            listed = [(str(name), float(score), int(count)) for name, score, count in entries]
            if len(listed) < 2:
                continue
            high, low = listed[0][1], listed[-1][1]
            reach = (high - low) or 1.0
            rows = [(name, score, count, (score - low) / reach) for name, score, count in listed]
            shown = min(SHOWN, len(rows) // 2)
            median = statistics.median(score for _, score, _ in listed)
            found.append(PersonScores(column, judge, len(rows), median, rows[:shown], rows[-shown:]))
    return found


def _evaluation_remarks(runs: Sequence[Run], evaluation: Evaluation) -> list[str]:
    found = []
    for run in runs:
        result = evaluation.columns.get(evaluation.of_run.get(run.name, ""))
        if result is None:
            command = f"vultus evaluate {run.folder} --data DATA --out {run.folder / EVALUATION}"
            found.append(f"{run.name} has not been evaluated yet: {command}")
            continue
        context = result["context"]
        if number(context.get("cur_nimg")) and context["cur_nimg"] < run.snapshot.get("cur_nimg", run.cur_nimg):
            found.append(
                f"{run.name} was evaluated at {context['cur_nimg']:,} images; the snapshot has gone on to "
                f"{run.snapshot.get('cur_nimg', run.cur_nimg):,}"
            )
        ours, theirs = run.data.get("content_sha256"), context.get("data_sha256")
        if ours and theirs and ours != theirs:
            found.append(f"{run.name} was evaluated on other data ({theirs[:12]}) than it was trained on ({ours[:12]})")
    for key, words in (("split", "splits"), ("n_images", "numbers of photos"), ("data_sha256", "data sets")):
        values = {str(result["context"].get(key)) for result in evaluation.columns.values()}
        if len(values) > 1:
            found.append(f"columns were measured on different {words}: compare with care")
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"

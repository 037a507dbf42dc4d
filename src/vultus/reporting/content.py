"""The content of a report about runs: texts, values and charts, independent of the format that shows them."""

from __future__ import annotations

import functools
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vultus.errors import UserError
from vultus.evaluation import registry
from vultus.evaluation.headlines import headlines_of, of_other_data, partiality
from vultus.evaluation.plots import Line, histogram, line_chart
from vultus.evaluation.stored import base_name
from vultus.reporting.run_folder import Evaluation, Run, number, read_evaluations, read_runs
from vultus.reporting.run_summary import RunSummary, summarize_run

SHOWN = 5  # people at each end of the list of identity scores
CONDITION_ENCODER = registry.CONDITION_ENCODER  # its scores flatter the generator; for results that list no judges
IN_TRAINING = ("identity_facenet", "mse")  # metrics of the validation in training, shown where there is no evaluation

# Charts of training: title, caption, and the lines as (evaluator or None for the trainer, key, label).
CURVES: tuple[tuple[str, str, tuple[tuple[str | None, str, str], ...]], ...] = (
    (
        "Identity, unseen people",
        "FaceNet cosine between the condition and the embedding of the generated face; higher is better",
        (("unseen", "identity_facenet", "unseen people"),),
    ),
    (
        "Reconstruction error",
        "mean squared error against the source photo, values in [-1, 1]; dashed: in training",
        (("unseen", "mse", "unseen people"), (None, "G_mse", "in training")),
    ),
    ("Identity loss", "1 - FaceNet cosine, in training", ((None, "G_identity", "in training"),)),
    (
        "Adversarial losses",
        "generator; dashed: discriminator. A discriminator loss near 0 leaves the generator little to learn from",
        ((None, "G_adversarial", "generator"), (None, "D_adversarial", "discriminator")),
    ),
    (
        "Discriminator logits",
        "real photos; dashed: generated faces",
        ((None, "D_real_logits", "real photos"), (None, "D_fake_logits", "generated faces")),
    ),
    (
        "KL divergence of the posterior",
        "of the noise that the posterior encoder reads from photos, to the standard normal, in nats",
        ((None, "G_kl", "in training"),),
    ),
    (
        "Perceptual loss",
        "difference of FaceNet features between a photo and its reconstruction, in training",
        ((None, "G_perceptual", "in training"),),
    ),
    (
        "Feature discriminator",
        "its loss; dashed: the generator's loss against it",
        ((None, "F_adversarial", "discriminator"), (None, "G_features", "generator")),
    ),
    (
        "Gradient norms",
        "generator; dashed: discriminator",
        ((None, "G_grad_norm", "generator"), (None, "D_grad_norm", "discriminator")),
    ),
    ("Speed", "images per second", ((None, "images_per_s", "images per second"),)),
)
NEAREST = ("nearest_train_facenet", "copied_facenet")  # metrics under the histogram of the nearest training photos


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart and its caption.

    Attributes:
        slug: part of a file name.
        figure: makes the matplotlib figure, or None if there is nothing to draw; raises ImportError without matplotlib.
    """

    title: str
    caption: str
    slug: str
    figure: Callable[[], Any]


@dataclass(frozen=True)
class Headline:
    """A row of the summary: label, what real photos reach, and a cell for each run ("" where not measured)."""

    label: str
    real: str
    cells: list[str]


@dataclass(frozen=True)
class PersonScores:
    """The best and the worst people of one column, by one judge.

    `best` and `worst` hold (person, mean score, photos, position between the worst 0 and the best 1 of all).
    """

    column: str
    judge: str
    count: int
    median: float
    best: list[tuple[str, float, int, float]]
    worst: list[tuple[str, float, int, float]]


@dataclass(frozen=True)
class ReportContent:
    """The content of a report.

    Attributes:
        headlines: the summary, metrics in the order of tables.
        alarms: of the evaluations: (names of columns, text).
        remarks: what a reader of the scores must know: other data, an older snapshot, no evaluation.
    """

    title: str
    runs: list[RunSummary]
    curves: list[Chart]
    headlines: list[Headline]
    evaluation: Evaluation
    histograms: list[Chart]
    nearest: list[Chart]
    people: list[PersonScores]
    alarms: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the runs, in order."""
        return [summary.run.name for summary in self.runs]

    @property
    def other_data(self) -> list[str]:
        """Columns whose data set is not the one that the snapshot was trained on."""
        return [name for name, result in self.evaluation.columns.items() if of_other_data(result)]

    @property
    def evaluated_on(self) -> list[str]:
        """Whose faces are shown: one sentence where it is the same for all runs, else one for each."""
        texts = list(dict.fromkeys(summary.evaluated_on for summary in self.runs))
        return texts if len(texts) == 1 else [f"{one.run.name}: {one.evaluated_on}" for one in self.runs]

    @property
    def folder(self) -> Path:
        """Where the report is written by default. Raises UserError for several runs."""
        if len(self.runs) > 1:
            raise UserError("a report of several runs needs --out FOLDER")
        return self.runs[0].run.folder

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the report."""
        return [*self.curves, *self.histograms, *self.nearest]

    def compared(self, key: str) -> list[tuple[str, list[str]]]:
        """The rows of `facts` or `machine` of all runs side by side: (name, a cell for each run)."""
        rows = [dict(getattr(summary, key)) for summary in self.runs]
        names = dict.fromkeys(name for row in rows for name in row)
        return [(name, [row.get(name, "-") for row in rows]) for name in names]


def read_content(
    runs: str | Path | Sequence[str | Path], evaluation: str | Path | Sequence[str | Path] = ()
) -> ReportContent:
    """The content of a report about run folders.

    Args:
        runs: one or more run folders.
        evaluation: folders that `vultus evaluate` wrote; default: what is stored in each run folder.

    Raises UserError for a folder that is no run, or that holds no evaluation.
    """
    found = read_runs([runs] if isinstance(runs, str | Path) else runs)
    folders = [evaluation] if isinstance(evaluation, str | Path) else evaluation
    return build_content(found, read_evaluations(found, folders))


def build_content(runs: Sequence[Run], evaluation: Evaluation) -> ReportContent:
    """The content of a report about these runs and their evaluation."""
    title = "Training report: " + (", ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs")
    return ReportContent(
        title=title,
        runs=[summarize_run(run) for run in runs],
        curves=_curves(runs),
        headlines=_headlines(runs, evaluation),
        evaluation=evaluation,
        histograms=_histograms(evaluation),
        nearest=_nearest(evaluation),
        people=_people(evaluation),
        alarms=_alarms(evaluation),
        remarks=_remarks(runs, evaluation),
    )


def _judges(result: Mapping[str, Any]) -> list[str]:
    """Face encoders that no training loss contains."""
    kinds = [kind for kind in result["distributions"] if kind not in (CONDITION_ENCODER, "nearest")]
    return list(result.get("people") or kinds)


# --- charts -----------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> list[Chart]:
    charts = []
    for title, caption, keys in CURVES:
        lines = []
        for colour, run in enumerate(runs):
            for place, (evaluator, key, label) in enumerate(keys):
                name = f"{run.name}, {label}" if len(runs) > 1 else label
                points = run.series(key, evaluator)
                lines.append(Line(name, points, colour, dashed=place > 0, dots=evaluator is not None))
        if any(line.points for line in lines):
            figure = functools.partial(line_chart, title, lines)
            charts.append(Chart(title, caption, f"curve-{_slug(title)}", figure))
    return charts


def _histograms(evaluation: Evaluation) -> list[Chart]:
    """Scores of pairs, for each face encoder and column; judges first."""
    charts = []
    kinds = dict.fromkeys(kind for result in evaluation.columns.values() for kind in result["distributions"])
    judges = {judge for result in evaluation.columns.values() for judge in _judges(result)}
    for kind in sorted((kind for kind in kinds if kind != "nearest"), key=lambda kind: kind not in judges):
        encoder = registry.BACKBONE_NAMES.get(kind, kind)
        role = "which no training loss contains" if kind in judges else "the encoder of the condition"
        for column, result in evaluation.columns.items():
            shown = result["distributions"].get(kind)
            if not shown:
                continue
            filled = {"same person": 2, "different people": 7}
            outlined = {"generated, type I": 1, "generated, type II": 0}
            figure = functools.partial(
                histogram,
                f"{column}: scores by {encoder}",
                shown["edges"],
                {label: (colour, shown[label]) for label, colour in filled.items() if label in shown},
                {label: (colour, shown[label]) for label, colour in outlined.items() if label in shown},
                x_label=f"score by {encoder}; higher is more similar",
                marks={f"FAR {far}": place for far, place in shown.get("thresholds", {}).items()},
            )
            charts.append(Chart(column, f"by {encoder}, {role}", f"identity-{kind}-{_slug(column)}", figure))
    return charts


def _nearest(evaluation: Evaluation) -> list[Chart]:
    charts = []
    for column, result in evaluation.columns.items():
        shown = result["distributions"].get("nearest")
        if not shown or "generated" not in shown:
            continue
        real = "real unseen faces"
        figure = functools.partial(
            histogram,
            f"{column}: cosine to the nearest training photo",
            shown["edges"],
            {"photos of unseen people": (2, shown[real])} if real in shown else {},
            {"generated faces": (1, shown["generated"])},
            x_label="FaceNet cosine to the nearest training photo",
        )
        metrics = [metric for metric in map(registry.find, NEAREST) if metric and metric.name in result["metrics"]]
        caption = "; ".join(_sentence(metric, result["metrics"][metric.name]) for metric in metrics)
        charts.append(Chart(column, caption, f"nearest-{_slug(column)}", figure))
    return charts


def _sentence(metric: registry.NamedMetric, row: Mapping[str, float]) -> str:
    interval = f" [{metric.text(row['low'])}, {metric.text(row['high'])}]" if number(row.get("low")) else ""
    real = f" (real photos {metric.text(row['real'])})" if number(row.get("real")) else ""
    return f"{metric.label}: {metric.text(row['value'])}{interval}{real}"


# --- evaluation -------------------------------------------------------------------------------------------------------


def _headlines(runs: Sequence[Run], evaluation: Evaluation) -> list[Headline]:
    """The headline metrics of the evaluation, or else the last values of the validation in training."""
    results = [evaluation.columns.get(evaluation.of_run.get(run.name, "")) for run in runs]
    chosen = [[metric.name for metric in headlines_of(result)] if result else [] for result in results]
    names = [name for own in chosen for name in own]
    # The same metric on other numbers of images is another metric: of each family, show the one that most runs have.
    usual: dict[tuple[Any, ...], registry.NamedMetric] = {}
    for metric in registry.headlines(dict.fromkeys(names)):
        key = (metric.family.template, *(v for k, v in metric.fields.items() if k not in ("count", "split")))
        if key not in usual or names.count(metric.name) > names.count(usual[key].name):
            usual[key] = metric
    rows = []
    for metric in usual.values():
        values = [
            result["metrics"].get(metric.name)
            if result and (metric.name in own or metric.family.group != registry.MEMORIZATION)
            else None
            for result, own in zip(results, chosen, strict=True)
        ]
        real = next((value["real"] for value in values if value and number(value.get("real"))), None)
        cells = [
            metric.text(value["value"]) + (partiality(metric.name, result) if result else "")
            if value and number(value["value"])
            else ""
            for value, result in zip(values, results, strict=True)
        ]
        rows.append(Headline(metric.label, "" if real is None else metric.text(real), cells))
    if not rows:
        for metric in filter(None, map(registry.find, IN_TRAINING)):
            last = [run.series(metric.name, "unseen")[-1:] for run in runs]
            if any(last):
                cells = [metric.text(points[0][1]) if points else "" for points in last]
                rows.append(Headline(f"{metric.label}; last value of the validation in training", "", cells))
    return rows


def _people(evaluation: Evaluation) -> list[PersonScores]:
    groups = []
    for column, result in evaluation.columns.items():
        for judge, entries in result.get("people", {}).items():
            people = [(str(name), float(score), int(count)) for name, score, count in entries]
            if len(people) < 2:
                continue
            high, low = people[0][1], people[-1][1]
            span = (high - low) or 1.0
            rows = [(name, score, count, (score - low) / span) for name, score, count in people]
            shown = min(SHOWN, len(rows) // 2)
            median = statistics.median(score for _, score, _ in people)
            groups.append(PersonScores(column, judge, len(rows), median, rows[:shown], rows[-shown:]))
    return groups


def _alarms(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The alarms of all columns: those of the runs first, then those of baselines."""
    own = {base_name(column) for column in evaluation.of_run.values()}
    columns: dict[str, list[str]] = {}
    for name in sorted(evaluation.columns, key=lambda name: base_name(name) not in own):
        for text in evaluation.columns[name]["alarms"]:
            columns.setdefault(text, []).append(name)
    return [(", ".join(names), text) for text, names in columns.items()]


def _remarks(runs: Sequence[Run], evaluation: Evaluation) -> list[str]:
    remarks = []
    for run in runs:
        result = evaluation.columns.get(evaluation.of_run.get(run.name, ""))
        if result is None:
            command = f"vultus evaluate {shlex.quote(str(run.folder))} --data DATA"
            remarks.append(f"{run.name} is not evaluated yet: {command}")
            continue
        context = result["context"]
        current = run.snapshot.get("cur_nimg", run.cur_nimg)
        nimg, older = context.get("cur_nimg"), run.name in evaluation.older
        if number(nimg) and (nimg < current or (older and nimg != current)):
            remarks.append(f"{run.name} was evaluated at {nimg:,} images; the snapshot is of {current:,} images")
        elif older:
            remarks.append(f"{run.name}: the evaluation is of another snapshot of this run, not of the one shown here")
        if of_other_data(result):
            trained, evaluated = (
                str(sha or "") for sha in (run.data.get("content_sha256"), context.get("data_sha256"))
            )
            known = bool(trained and evaluated and trained != evaluated)
            theirs, ours = (f" ({evaluated[:12]})", f" ({trained[:12]})") if known else ("", "")
            remarks.append(
                f"{run.name} was evaluated on other data{theirs} than it was trained on{ours}: what is compared with "
                f"training photos says nothing about memorization"
            )
    splits: dict[str, set[str]] = {}
    for name, result in evaluation.columns.items():
        splits.setdefault(base_name(name), set()).add(str(result["context"].get("split")))
    # The columns of an evaluation with --split both are there to be compared.
    different = ["splits"] if len({frozenset(each) for each in splits.values()}) > 1 else []
    for key, words in (("n_images", "numbers of photos"), ("data_sha256", "data sets")):
        if len({str(result["context"].get(key)) for result in evaluation.columns.values()}) > 1:
            different.append(words)
    remarks += [f"columns were measured on different {each} and cannot be compared directly" for each in different]
    return remarks


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"

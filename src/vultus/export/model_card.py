"""The model card: what a user needs to know about a published generator, and the metadata that the hub reads.

Its text is assets/model_card.md.jinja. The licence follows what the snapshot says about its training data: a model has
no wider licence than the photos that it was trained on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vultus.errors import UserError
from vultus.evaluation import registry
from vultus.evaluation.headlines import OTHER_DATA, headlines_of, of_other_data
from vultus.evaluation.results import read_result
from vultus.evaluation.tables import format_table

TAGS = ["face", "gan", "facenet", "face-embedding", "vultus", "pytorch"]
TASK = "unconditional-image-generation"  # the hub has no task for embedding to image; this generator also samples
SAMPLES = "samples.jpg"
RESTRICTED = re.compile(
    r"non[- ]?commercial|\bnc\b|\bnd\b|research|academic|educational|personal use|no redistribution|"
    r"not (be )?redistribut|no derivatives|all rights reserved|proprietary|confidential|prohibit|forbid|restrict",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Licence:
    """A licence of the weights.

    Attributes:
        id: the hub's id of the licence; `other` where there is none.
        name: the hub's `license_name`, with `other`.
        data_terms: the terms of the training data, as the snapshot records them.
    """

    id: str
    name: str | None
    data_terms: str | None

    @property
    def research_only(self) -> bool:
        """Whether use is limited to research: the terms of the data say so, or they are unknown."""
        return self.id == "other" and (self.data_terms is None or bool(RESTRICTED.search(self.data_terms)))

    @property
    def text(self) -> str:
        """A paragraph for the card and for the licence file."""
        if self.id != "other":
            data = f" The training photos: {self.data_terms}." if self.data_terms else ""
            return f"The weights are under the licence `{self.id}`, chosen by the publisher.{data}"
        if self.data_terms is None:
            return (
                "**Research only.** The terms of the training photos were not recorded. Until they are known, these "
                "weights may be used for non-commercial research only, and not be redistributed."
            )
        if self.research_only:
            return (
                f"**Research only.** The weights were trained on photos under these terms: *{self.data_terms}*. The "
                "same holds for the weights and for images generated with them: non-commercial research only."
            )
        return (
            f"The weights were trained on photos under these terms: *{self.data_terms}*. The same holds for the "
            "weights."
        )


def licence_of(data_terms: str | None, chosen: str | None = None) -> Licence:
    """The licence of a model whose training data have the terms `data_terms`; `chosen` is the publisher's (a hub id).

    Raises UserError for a chosen licence where the data are restricted, and for one that is no id.
    """
    data_terms = (data_terms or "").strip() or None
    if chosen is None:
        open_terms = data_terms is not None and not RESTRICTED.search(data_terms)
        return Licence("other", "terms-of-the-training-photos" if open_terms else "research-only", data_terms)
    if data_terms and RESTRICTED.search(data_terms):
        raise UserError(
            f"--licence {chosen}: the data are under '{data_terms}', which holds for the model too; leave it out"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", chosen):
        raise UserError(f"--licence {chosen}: not a licence id of the hub, such as mit, apache-2.0 or cc-by-4.0")
    return Licence(chosen, None, data_terms)


# --- metrics ----------------------------------------------------------------------------------------------------------


def result_in(metrics: Any, where: object = "the snapshot") -> dict[str, Any] | None:
    """The `metrics` of a snapshot's metadata as the result of an evaluation of the current version; None without any.

    Raises UserError, which names `where`, if they are no result.
    """
    return read_result(metrics, where) if metrics else None


def eval_results(result: Mapping[str, Any], dataset: tuple[str, str]) -> list[EvalResult]:
    """The headline metrics as the hub's eval results. `dataset` is its id on the hub and its name."""
    rows = result["metrics"]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset[0],
            dataset_name=dataset[1],
            dataset_split=result["context"].get("split"),
            metric_type=metric.name,
            metric_name=metric.name,
            metric_value=round(float(rows[metric.name]["value"]), 5),
        )
        for metric in headlines_of(result)
    ]


def _results(result: Mapping[str, Any], repo: str) -> dict[str, Any]:
    """What the template shows of a result."""
    context, rows = result["context"], result["metrics"]
    split = {"test": "people never seen in training", "train": "the training people"}.get(str(context.get("split")))
    strength, best_of = context.get("noise_strength", 1), context.get("best_of", 1)
    intervals = all("low" in row for row in rows.values())
    photos, whole = context.get("n_images", "?"), context.get("n_split")
    part = f" of {whole}" if whole and whole != photos else ""
    return {
        "measured_on": f"{photos}{part} photos of {context.get('n_people', '?')} people "
        f"({split or 'the whole data set'}), {context.get('noises', '?')} faces for each"
        + (f", noise times {strength:g}" if strength != 1 else "")
        + (f", the best of {best_of} times as many by the encoder of the condition" if best_of != 1 else ""),
        "rows": [_row(metric, rows[metric.name]) for metric in headlines_of(result)],
        "alarms": result["alarms"],
        "other_data": OTHER_DATA if of_other_data(result) else "",
        "intervals": any("low" in row for row in rows.values()),
        "table": format_table({repo: result}, intervals=intervals),
    }


def _row(metric: registry.NamedMetric, row: Mapping[str, float]) -> dict[str, str]:
    interval = f" [{metric.text(row['low'])}, {metric.text(row['high'])}]" if "low" in row else ""
    return {
        "name": metric.name,
        "arrow": metric.arrow,
        "value": metric.text(row["value"]) + interval,
        "real": metric.text(row["real"]) if row.get("real") is not None else "",
        "label": metric.label,
    }


# --- the card ---------------------------------------------------------------------------------------------------------


def model_card(
    metadata: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    repo: str = "user/name",
    result: Mapping[str, Any] | None = None,
    licence: Licence | None = None,
    licence_file: bool = False,
    samples: str | None = None,
    population: bool = True,
) -> str:
    """The README.md of a published generator, with the hub's metadata on top.

    Args:
        metadata: of the snapshot.
        settings: the fields of GeneratorConfig.
        repo: user/name.
        result: of an evaluation; default: what the metadata carry.
        licence: default: what the metadata say.
        licence_file: whether LICENSE.md is beside the card.
        samples: caption of samples.jpg, if it is beside the card.
        population: whether people.safetensors is beside the card.
    """
    licence = licence or licence_of(metadata.get("licence"))
    result = result or result_in(metadata.get("metrics"))
    celeba = "celeba" in (metadata.get("licence") or "").lower()
    dataset = ("flwrlabs/celeba", "CelebA") if celeba else ("private", "photos of the publisher")
    name = repo.split("/")[-1]
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link="LICENSE.md" if licence_file and licence.id == "other" else None,
        library_name="vultus",
        pipeline_tag=TASK,
        tags=[*TAGS, *(["research-only"] if licence.research_only else [])],
        datasets=[dataset[0]] if celeba else None,
        model_name=name,
        eval_results=eval_results(result, dataset) if result else None,
    )
    fraction = (metadata.get("crop") or {}).get("encoder_fraction")
    template = importlib.resources.files("vultus") / "assets" / "model_card.md.jinja"
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        name=name,
        repo=repo,
        network=settings,
        licence=licence,
        samples=samples,
        samples_file=SAMPLES,
        population=population,
        encoder=(metadata.get("encoder") or {}).get("id", "the encoder that it was trained with"),
        crop=f"{fraction:.0%}" if fraction else "",
        images=(metadata.get("data") or {}).get("images"),
        celeba=celeba,
        cur_nimg=metadata.get("cur_nimg"),
        hours=metadata.get("hours"),
        preset=metadata.get("preset"),
        result=_results(result, repo) if result else None,
        citation_key=re.sub("[^a-z0-9]+", "_", repo.lower()),
        version=importlib.metadata.version("vultus"),
    )
    return str(card).rstrip() + "\n"

"""The model card: what a stranger needs to know of a published generator, and the metadata that the hub reads.

A model is not freer than the photos it learned from: the licence follows what the snapshot says of its data.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vultus.errors import UserError
from vultus.evaluation.tables import CONTEXT, format_table, group_of

TAGS = ["face", "gan", "facenet", "face-embedding", "vultus", "pytorch"]
TASK = "unconditional-image-generation"  # the hub has no task for embedding to picture; this one draws from noise too
SAMPLES = "samples.jpg"
RESTRICTED = re.compile(
    r"non[- ]?commercial|\bnc\b|\bnd\b|research|academic|educational|personal use|no redistribution|"
    r"not (be )?redistribut|no derivatives|all rights reserved|proprietary|confidential|prohibit|forbid|restrict",
    re.IGNORECASE,
)

# The rows that a stranger is shown, by the beginning of their names, and what they say.
HEADLINES = {
    "identity_facenet": "FaceNet cosine between the embedding asked for and the face made: 1 is equal. Flattered where "
    "FaceNet was also in the training loss",
    "identity_": "the same by {of}, an encoder that no training has seen (a cosine, or minus a distance)",
    "type2_": "faces that {of} accepts as the person of *another* photo, at the false accept rate in the name",
    "rank1_": "faces whose nearest person, by {of}, is the right one",
    "fid_": "FID on as many faces as photos: 0 is equal",
    "fd_": "Fréchet distance to photos in features of {of}: 0 is equal. Not FID, not comparable with one",
    "precision_": "faces that lie among real ones, by features of {of}",
    "recall_": "real faces that lie among the made ones, by features of {of}",
    "mse": "mean squared error against the very photo, values in [-1, 1]",
    "lpips": "LPIPS against the very photo: 0 is equal",
    "stlpips": "ST-LPIPS against the very photo: 0 is equal. Not LPIPS",
    "diversity_identity": "1 - mean FaceNet cosine between faces of different people",
    "diversity_noise_rms": "how far two faces of one embedding differ, RMS; 0 is noise ignored",
    "copied_": "faces nearer to a training photo than 99 % of strangers' photos are",
}
SUFFIXES = ("_best8", "_held", "far1e-2")  # rows for the full table only


@dataclass(frozen=True)
class Licence:
    """A licence as the hub takes it, and in words. `noted` is what the snapshot says of its data."""

    id: str
    name: str | None
    noted: str | None

    @property
    def research_only(self) -> bool:
        """Whether a stranger must take it so: the data say it, or nobody knows."""
        return self.id == "other" and (self.noted is None or bool(RESTRICTED.search(self.noted)))

    @property
    def words(self) -> str:
        """A paragraph for the card and for the licence file."""
        if self.id != "other":
            noted = f" The training photos: {self.noted}." if self.noted else ""
            return f"The weights are under the licence `{self.id}`, chosen by whoever published them.{noted}"
        if self.noted is None:
            return (
                "**Research only.** The terms of the training photos were not recorded. Until they are known, these "
                "weights may be used for non-commercial research only, and not be passed on."
            )
        if self.research_only:
            return (
                f"**Research only.** The weights were learned from photos whose terms are: *{self.noted}*. The same "
                "holds for the weights, and for pictures made with them: non-commercial research only."
            )
        return f"The weights were learned from photos whose terms are: *{self.noted}*. The same holds for the weights."


def licence_of(noted: str | None, chosen: str | None = None) -> Licence:
    """The licence of a model whose data have the terms `noted`, where the publisher asks for `chosen` (a hub id).

    Raises UserError for a chosen licence where the data are restricted, and for one that is no id.
    """
    noted = (noted or "").strip() or None
    if chosen is None:
        known = noted is not None and not RESTRICTED.search(noted)
        return Licence("other", "terms-of-the-training-photos" if known else "research-only", noted)
    if noted and RESTRICTED.search(noted):
        raise UserError(f"--licence {chosen}: the data are under '{noted}', and so is the model; leave it out")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", chosen):
        raise UserError(f"--licence {chosen}: not an id of the hub, such as mit, apache-2.0 or cc-by-4.0")
    return Licence(chosen, None, noted)


# --- figures ----------------------------------------------------------------------------------------------------------


def result_in(metrics: Any) -> dict[str, Any] | None:
    """The `metrics` of a snapshot's metadata as the result of an evaluation (see evaluate.py), or None.

    They are such a result already, or plain figures by name, with `_real` and `_std` beside them and what surrounds
    them between.
    """
    if not isinstance(metrics, dict) or not metrics:
        return None
    empty: dict[str, Any] = {"context": {}, "metrics": {}, "missing": {}, "alarms": [], "notes": []}
    if "metrics" in metrics and "context" in metrics:
        return empty | metrics
    rows = {}
    for name, value in metrics.items():
        plain = isinstance(value, float) and group_of(name)[0] != "other" and not name.endswith(("_real", "_std"))
        if plain:
            real = metrics.get(f"{name}_real")
            rows[name] = {"value": value} | ({} if real is None else {"real": real})
    context = {key: metrics[key] for key in CONTEXT if key in metrics}
    return empty | {"context": context, "metrics": rows} if rows else None


def headline(name: str) -> str | None:
    """What the row says, in words, or None for a row that only the full table has."""
    if any(part in name for part in SUFFIXES):
        return None
    start = next((start for start in HEADLINES if name.startswith(start)), None)
    if start is None:
        return None
    of = name.removeprefix(start).split("_")[0]
    return HEADLINES[start].format(of={"effnet": "EfficientNet-lite0"}.get(of, of))


def eval_results(result: Mapping[str, Any], dataset: tuple[str, str]) -> list[EvalResult]:
    """The headlines as the hub's eval results. `dataset` is its id on the hub and its name."""
    context = result["context"]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset[0],
            dataset_name=dataset[1],
            dataset_split=context.get("split"),
            metric_type=name,
            metric_name=name,
            metric_value=round(float(row["value"]), 5),
        )
        for name, row in result["metrics"].items()
        if headline(name)
    ]


def _results(result: Mapping[str, Any] | None, repo: str) -> list[str]:
    if result is None:
        return ["## Results", "", "Not measured: no evaluation was given when this model was published.", ""]
    context, metrics = result["context"], result["metrics"]
    split = {"test": "people never seen in training", "train": "the training people"}.get(str(context.get("split")))
    people = f"{context.get('n_images', '?')} photos of {context.get('n_people', '?')} people"
    strength = context.get("noise_strength", 1)
    noises = f"{context.get('noises', '?')} faces for each" + (f", noise times {strength:g}" if strength != 1 else "")
    lines = [
        "## Results",
        "",
        f"On {people} ({split or 'the whole data set'}), {noises}. *Real photos* is what those reach, and so what a "
        "perfect generator would.",
        "",
        "| | this model | real photos | |",
        "|---|---|---|---|",
    ]
    for name, row in metrics.items():
        if words := headline(name):
            interval = f" [{row['low']:.3g}, {row['high']:.3g}]" if "low" in row else ""
            real = f"{row['real']:.3g}" if row.get("real") is not None else ""
            lines.append(f"| `{name}` | {row['value']:.3g}{interval} | {real} | {words} |")
    if any("low" in row for row in metrics.values()):
        lines += ["", "In brackets: 95 % intervals over people."]
    intervals = all("low" in row for row in metrics.values())
    table = format_table({repo: result}, intervals=intervals)
    return [*lines, "", "<details><summary>All figures</summary>", "", table, "", "</details>", ""]


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
    people: bool = True,
) -> str:
    """The README.md of a published generator, with the hub's metadata on top.

    Args:
        metadata: of the snapshot.
        settings: the fields of GeneratorConfig.
        repo: user/name.
        result: of an evaluation; by default what the metadata carry.
        licence: by default what the metadata say.
        licence_file: whether LICENSE.md lies beside the card.
        samples: what samples.jpg shows, if it lies beside the card.
        people: whether people.safetensors lies beside the card.
    """
    licence = licence or licence_of(metadata.get("licence"))
    result = result or result_in(metadata.get("metrics"))
    celeba = "celeba" in (metadata.get("licence") or "").lower()
    dataset = ("flwrlabs/celeba", "CelebA") if celeba else ("private", "photos of the publisher")
    head = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link="LICENSE.md" if licence_file and licence.id == "other" else None,
        library_name="vultus",
        pipeline_tag=TASK,
        tags=[*TAGS, *(["research-only"] if licence.research_only else [])],
        datasets=[dataset[0]] if celeba else None,
        model_name=repo.split("/")[-1],
        eval_results=eval_results(result, dataset) if result else None,
    )
    body = [
        *_opening(metadata, settings, repo, samples, licence),
        *_use(metadata, settings, repo, people),
        *_training(metadata, settings, celeba),
        *_results(result, repo),
        *_limits(metadata, celeba, people),
        "## Licence",
        "",
        licence.words,
        "",
        "The code of vultus is under the MIT licence. FaceNet, which is not in this repository and is fetched from its "
        "own address where photos are read, is InceptionResnetV1 by David Sandberg (MIT), trained on VGGFace2, photos "
        "of public figures from the web, with terms of their own.",
        "",
        *_citation(repo),
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(body)


def _opening(
    metadata: Mapping[str, Any], settings: Mapping[str, Any], repo: str, samples: str | None, licence: Licence
) -> list[str]:
    side = settings["resolution"]
    picture = [f"![Faces of people who do not exist]({SAMPLES})", "", f"*{samples}*", ""] if samples else []
    only = f"> {licence.words}\n" if licence.research_only else ""
    return [
        f"# {repo.split('/')[-1]}",
        "",
        f"A generator that turns a **face embedding** ({settings['c_dim']} numbers in which a face recognition network "
        f"sums up a face) and a bit of noise into a {side}×{side} picture of a face: of a person who does not exist, "
        "or, roughly, of the person whose photo the embedding came from.",
        "",
        *([only] if only else []),
        *picture,
    ]


def _use(metadata: Mapping[str, Any], settings: Mapping[str, Any], repo: str, people: bool) -> list[str]:
    encoder = (metadata.get("encoder") or {}).get("id", "the encoder that it was trained on")
    crop = metadata.get("crop") or {}
    fraction = crop.get("encoder_fraction")
    framing = f", read from the central {fraction:.0%} of a square photo of the face" if fraction else ""
    random = [
        "from vultus.images.io import to_images, to_pil",
        "from vultus.models.generators import GeneratorNetwork",
        f"from vultus.sampling.population import noise{', sample_identities' if people else ''}",
        "",
        f'generator = GeneratorNetwork.from_pretrained("{repo}")  # or a local copy of the folder',
        (
            f"c = sample_identities(generator.population, 4, seed=0)  # [4, {settings['c_dim']}]: people who do not exist"
            if people
            else f"c = ...  # [4, {settings['c_dim']}]: your embeddings, of unit norm"
        ),
        f"x = generator(noise(0, 0, 4, {settings['z_dim']}), c)  "
        f"# [4, 3, {settings['resolution']}, {settings['resolution']}] in [-1, 1]",
        'to_pil(to_images(x)[0]).save("face.png")',
    ]
    shell = [
        *(
            [f"vultus generate hf://{repo} --random 16 --grid --out faces.png  # people who do not exist"]
            if people
            else []
        ),
        f"vultus generate hf://{repo} --embeddings vectors.npy --out faces/",
        f"vultus generate hf://{repo} --photos me.jpg --num 8 --grid --out me.png",
    ]
    return [
        "## Use",
        "",
        "With the Python package *vultus* installed (`pip install .` in a copy of its source):",
        "",
        "```bash",
        *shell,
        "```",
        "",
        "```python",
        *random,
        "```",
        "",
        f"Embeddings are of `{encoder}`, {settings['c_dim']} numbers of unit norm{framing}. Those of another encoder, "
        "or of another crop, give another face. Pixels are in [-1, 1]; noise is standard normal. "
        "`config.json` holds the constructor's arguments, `model.safetensors` the weights"
        + (", `people.safetensors` the distribution from which random people are drawn" if people else "")
        + ". No file is a pickle.",
        "",
        "**Meant for** research on what face embeddings reveal, on generative models, and on synthetic identities; for "
        "teaching; for pictures of people who do not exist where no real person may be shown.",
        "",
        "**Not meant for** drawing a real person's face from an embedding without their consent; identifying, "
        "tracking or judging anyone; pretending that a picture is a photo of somebody; training or testing face "
        "recognition as if these were real people. Mark pictures as generated.",
        "",
    ]


def _training(metadata: Mapping[str, Any], settings: Mapping[str, Any], celeba: bool) -> list[str]:
    images = (metadata.get("data") or {}).get("images")
    seen, hours = metadata.get("cur_nimg"), metadata.get("hours")
    facts = [
        f"- network: `{settings['kind']}`, {settings['resolution']}×{settings['resolution']}, trained from scratch as "
        "a conditional GAN; the weights are a moving average over the training",
        f"- training photos: {images:,}{' of CelebA' if celeba else ''}" if images else "",
        f"- length: {seen:,} images seen{f', {hours:.2f} hours' if hours else ''}" if seen else "",
        f"- preset of vultus: `{metadata['preset']}`" if metadata.get("preset") else "",
    ]
    return ["## Training", "", *filter(None, facts), ""]


def _limits(metadata: Mapping[str, Any], celeba: bool, people: bool) -> list[str]:
    if celeba:
        whose = (
            "CelebA shows celebrities: mostly young, light-skinned adults in make-up, smiling at a camera from the "
            "front, in photos taken from the web without asking them. Children, old people, dark-skinned people, faces "
            "in profile, glasses, hats and hands before the face are rare there. Expect such faces to come out worse, "
            "and nearer to the average celebrity than they are."
        )
    else:
        whose = (
            "The model knows the kinds of faces that its training photos show. Expect people unlike them, by age, "
            "skin, sex, pose, glasses or light, to come out worse, and nearer to the average of those photos than they "
            "are."
        )
    whose += (
        " FaceNet learned from photos of celebrities too, and what it does not tell apart, this model cannot draw. How "
        "well the model does for which group of people was not measured."
    )
    images = (metadata.get("data") or {}).get("images")
    spread = [
        f"`people.safetensors` holds means and spreads of the {f'{images:,} ' if images else ''}training embeddings, "
        "not the embeddings; of few photos even that may tell something about the people in them.",
        "",
    ]
    return [
        "## Limits and bias",
        "",
        "Pictures are likenesses, not portraits, and never evidence of what somebody looks like: background, pose, "
        "light and much of the hair are not in an embedding and are made up. They are small, and "
        "show the texture of a generator.",
        "",
        whose,
        "",
        "## Risk: embeddings are personal data, and this model inverts them",
        "",
        "A face embedding is often treated as harmless because it is no picture. This model shows that it is not: it "
        "draws something of the face back from it. Embeddings that identify a person are biometric data (in the EU a "
        "special category under Article 9 of the GDPR). Protect them as you would the photos, "
        "and use them only with the consent of the people they belong to. A generated face of a real person "
        "is about that person, too. Made faces can also resemble somebody by chance.",
        "",
        *(spread if people else []),
    ]


def _citation(repo: str) -> list[str]:
    version = importlib.metadata.version("vultus")
    return [
        "## How to cite",
        "",
        "```bibtex",
        f"@software{{vultus_{re.sub('[^a-z0-9]+', '_', repo.lower())},",
        f"  title   = {{{repo.split('/')[-1]}: faces from face embeddings, made with vultus}},",
        "  author  = {{the vultus authors}},",
        "  year    = {2026},",
        f"  version = {{{version}}},",
        f"  url     = {{https://huggingface.co/{repo}}}",
        "}",
        "```",
        "",
    ]

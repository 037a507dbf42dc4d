"""What can be read from embeddings, and the directions in which it changes: load, fit, measure, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vultus._device import resolve_device
from vultus._download import cache_folder
from vultus._files import write_json, write_text
from vultus._formats import VERSIONS
from vultus._outputs import check_absent
from vultus._ranges import Count, Limit, Seed, checks_arguments
from vultus.audit.attributes import ATTRIBUTES, attribute_column, check_available
from vultus.audit.edits import STRENGTHS, measure_edits
from vultus.audit.probes import Probe, explained, fit_probe
from vultus.audit.tables import markdown, percent
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import load_judge
from vultus.evaluation.bootstrap import PersonBootstrap
from vultus.evaluation.extract import RealFaces, extract
from vultus.evaluation.headlines import loss_encoders
from vultus.evaluation.scores import spread
from vultus.images.io import to_pil
from vultus.images.labelled import labelled_sheet
from vultus.images.xmp import Origin, save_marked
from vultus.models.encoders import difference
from vultus.models.snapshot import Snapshot
from vultus.sampling.conditioning import check_population
from vultus.sampling.directions import Directions, save_directions
from vultus.sampling.generate import marked, model_of, render
from vultus.sampling.generator import load
from vultus.sampling.latents import noise, sample_identities

FILES = ("probe.md", "probe.json", "directions.safetensors", "edits.png")
LEAST_EXPLAINED = 0.05  # of the variance within one person: below it there is no direction to edit along
SHEET = (-3.0, -1.5, 0.0, 1.5, 3.0)  # strengths on the sheet


@checks_arguments
def probe(
    snapshot: str | Path | None = "default",
    *,
    data: str | Path,
    judges: Sequence[str] = ("dlib",),
    limit: Limit | None = None,
    edited: Limit = 500,
    out: str | Path | None = None,
    seed: Seed = 0,
    batch: Count = 32,
    device: str = "auto",
) -> dict[str, Any]:
    """Fit linear probes from the embeddings of a prepared data set to what can be measured in its photos, and measure
    edits along their directions.

    Args:
        snapshot: the generator whose faces are edited; None fits and judges the probes only.
        data: prepared data set. Probes are fitted to its training split and judged on its test split.
        judges: face encoders that say how much identity an edit costs.
        limit: photos of each split, evenly spread.
        edited: of those of the test split, so many, evenly spread, whose faces are edited.
        out: new folder for probe.md, probe.json, directions.safetensors and, with a snapshot, edits.png.
        seed: of the noise and the resampled people.
        batch: photos at a time.
        device: "auto", "cuda", "mps" or "cpu".

    Returns {`format`, `context`, `attributes`: {name: {`meaning`, `explained`, `explained_within`, `ridge`, `edits`}}}:
    `explained` is the share of the variance between the test photos that the probe explains, `explained_within` that
    between photos of one person; see `measure_edits` for `edits`. An attribute has a direction, and edits, only if at
    least 5 % is explained within one person: with less, an edit changes everything else.

    Raises UserError for a snapshot of another encoder than the data's, an existing result in `out`, or too few photos.
    """
    check_available()
    if out is not None:
        check_absent(out, FILES)
    device = resolve_device(device)
    test = PreparedDataset(data, "test")
    training = test.with_split("train")
    encoder = test.manifest["encoder"]
    generator = None if snapshot is None else load(snapshot, device=device)
    if generator is not None:
        if differs := difference(generator.metadata.get("encoder") or {}, encoder):
            raise UserError(
                f"{generator.path}: takes embeddings of {differs}, {test.folder} has others; give data of that encoder"
            )
        if out is not None:
            check_population(generator)
    loaded = [load_judge(judge, device=device) for judge in judges] if generator is not None else []
    options: dict[str, Any] = {"batch": batch, "cache": cache_folder() / "features", "device": device}
    rows = {part: spread(len(part), limit) for part in (training, test)}
    measured = {
        part: extract(RealFaces(), part, rows[part], [attribute_column()], **options)["attributes"][:, 0]
        for part in (training, test)
    }
    c = {part: part.embeddings(rows[part]) for part in (training, test)}
    people = {part: [part.identities[row] for row in rows[part]] for part in (training, test)}
    bootstrap = PersonBootstrap(people[test], seed=seed)
    probes: dict[str, Probe] = {}
    found: dict[str, dict[str, Any]] = {}
    for place, (name, meaning) in enumerate(ATTRIBUTES.items()):
        one = fit_probe(c[training], measured[training][:, place], people[training], name=name)
        reading, y = one.read(c[test]), one.standardise(measured[test][:, place])
        shares = {
            "explained": explained(reading, y, bootstrap),
            "explained_within": explained(reading, y, bootstrap, within=True),
        }
        within = shares["explained_within"]
        if within is not None and within.value >= LEAST_EXPLAINED:
            probes[name] = one
        found[name] = {"meaning": meaning, **{key: share.to_dict() if share else None for key, share in shares.items()}}
        found[name] |= {"mean": one.mean, "std": one.std, "ridge": one.ridge, "edits": {}}
    if generator is not None:
        chosen = rows[test][spread(len(rows[test]), edited)]
        for name, edits in measure_edits(probes, generator, test, chosen, judges=loaded, seed=seed, **options).items():
            found[name]["edits"] = edits
    context = {
        "data_sha256": test.manifest["content_sha256"],
        "encoder": encoder,
        "training": {"photos": len(rows[training]), "people": len(set(people[training]))},
        "test": {"photos": len(rows[test]), "people": bootstrap.count},
        "snapshot": model_of(generator) if generator is not None else None,
        "loss_encoders": loss_encoders(generator.metadata) if generator is not None else [],
        "judges": [judge.id for judge in loaded],
        "edited": min(edited, len(rows[test])) if generator is not None else 0,
        "seed": seed,
        "device": str(device),
    }
    result = {"format": VERSIONS["probes"], "context": context, "attributes": found}
    if out is not None:
        _write(result, probes, generator, Path(out))
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table: shares and rates in %, with their 95 % intervals over people."""
    attributes: Mapping[str, Any] = result["attributes"]
    edits: Mapping[str, Any] = next((row["edits"] for row in attributes.values() if row["edits"]), {})
    heads = ["attribute", "explained", "within one person"]
    for strength, edit in edits.items():
        heads += [f"{strength}: change", *(f"{strength}: {judge} accepts" for judge in edit["accepted"])]
    rows = [heads]
    for name, row in attributes.items():
        cells = [name, percent(row["explained"]), percent(row["explained_within"])]
        for strength in edits:
            if (edit := row["edits"].get(strength)) is None:
                cells += ["-"] * (1 + len(edits[strength]["accepted"]))
                continue
            cells.append(f"{edit['change']['value']:+.2f}")
            cells += [
                f"{100 * rates['after']['value']:.1f} of {100 * rates['before']['value']:.1f}"
                for rates in edit["accepted"].values()
            ]
        rows.append(cells)
    return markdown(rows)


def _write(result: Mapping[str, Any], probes: Mapping[str, Probe], generator: Snapshot | None, out: Path) -> None:
    context = result["context"]
    fitted, judged = context["training"], context["test"]
    lines = [
        "# What can be read from these embeddings",
        f"Linear probes, fitted to {fitted['photos']} photos of {fitted['people']} people and judged on "
        f"{judged['photos']} photos of {judged['people']} other people. Encoder {context['encoder']['id']}, "
        f"seed {context['seed']}, device {context['device']}.",
        table(result),
        "`explained`: share of the variance between photos that the probe explains, %; `within one person`: between "
        "photos of one person; with 95 % intervals over people. A linear probe gives a lower bound of what an "
        "embedding reveals.",
        "\n".join(f"- {name}: larger where {row['meaning']}" for name, row in result["attributes"].items()),
    ]
    if generator is not None:
        lines.append(
            f"Edits of {' and '.join(f'{strength:+g}' for strength in STRENGTHS)} with snapshot {context['snapshot']}, "
            f"{context['edited']} photos: "
            "change of the attribute in the generated faces, in standard deviations between photos, and the share of "
            "faces that a judge accepts against the photo at a false accept rate of 1e-3, % after and before the edit."
        )
        if named := [name for name in context["loss_encoders"] if any(name in judge for judge in context["judges"])]:
            lines.append(f"The training of the generator contained {', '.join(named)}, which is no fair judge of it.")
    if len(probes) < len(ATTRIBUTES):
        names = ", ".join(name for name in ATTRIBUTES if name not in probes)
        lines.append(f"No direction: {names}; a probe explains less than 5 % of the variance within one person.")
    if not probes:
        raise UserError(
            "no attribute is explained well enough for a direction; prepare more photos, or leave --out out to get the "
            "shares alone"
        )
    vectors = {name: one.direction for name, one in probes.items()}
    about = {key: context[key] for key in ("encoder", "data_sha256", "snapshot")}
    directions = Directions(vectors, about | {"attributes": dict(result["attributes"])})
    save_directions(out / FILES[2], directions)
    if generator is not None:
        _write_sheet(directions, generator, context["seed"], out / FILES[3])
    write_text(out / FILES[0], "\n\n".join(lines) + "\n")
    write_json(out / FILES[1], result)


def _write_sheet(directions: Directions, generator: Snapshot, seed: int, path: Path) -> None:
    """A random identity edited in each direction: a row for each attribute, all with the same noise."""
    c = sample_identities(generator.population, 1, seed=seed)
    moved = torch.cat([directions.edit(c, {name: s}) for name in directions.vectors for s in SHEET])
    z = noise(seed, 0, 1, generator.network.z_dim).expand(len(moved), -1)
    images = marked(render(generator.network, z, moved))
    heads = [f"{strength:+g}" if strength else "as it is" for strength in SHEET]
    names = [name.replace("_", " ") for name in directions.vectors]
    sheet = labelled_sheet([to_pil(image) for image in images], len(SHEET), row_labels=names, column_labels=heads)
    save_marked(sheet, path, Origin(model_of(generator), seed), watermark=False)

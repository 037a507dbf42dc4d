"""The result of an audit as a table, and as a page (HTML and Markdown) for readers who are no experts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch

from vultus._files import write_json, write_text
from vultus.audit.protocol import Attacked
from vultus.evaluation.plots import to_svg
from vultus.images.io import grid
from vultus.images.xmp import Origin, encode_marked
from vultus.models.snapshot import Snapshot
from vultus.sampling.conditioning import check_population
from vultus.sampling.generate import marked, model_of, render
from vultus.sampling.latents import noise, sample_identities

FILES = ("audit.html", "audit.md", "audit.json")
SAMPLES = 6  # random identities on the page
PUBLISHED = ("NbNet (Mai et al. 2018, arXiv:1703.00832), LFW, FAR 1e-3: type I 95.20 %, type II 58.05 %.",)
LIMITS = (
    "The figures hold for this data set, this encoder, this generator and this attack of a fixed budget. A stronger "
    "attack may succeed more often: a low success is no proof of security.",
    "rotation and biohash-unknown assume that the attacker has neither the key nor templates of known photos under it. "
    "rotation-pairs and biohash-known show what is left when that is not so.",
    "Unknown BioHash keys differ between people, so the key alone tells people apart: its TAR measures key and face "
    "together, that of biohash-known the face alone.",
    "Noise is drawn anew for every template, and both templates of a pair have it.",
    "Intervals cover the choice of people only, not the thresholds, the keys, the noise or the training of the attack.",
)


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table, percentages with their 95 % intervals over people."""
    protections: Mapping[str, Any] = result["protections"]
    columns = [(name, key) for name, values in next(iter(protections.values()))["success"].items() for key in values]
    names = ["protection", "length", "TAR of templates", *(_heading(name, key) for name, key in columns)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for title, row in protections.items():
        cells = [row["tar"], *(row["success"][name][key] for name, key in columns)]
        lines.append(f"| {title} | {row['dim']} | {' | '.join(map(_percent, cells))} |")
    return "\n".join(lines)


def _heading(encoder: str, key: str) -> str:
    """`type1@0.001` of an encoder in words."""
    kind, _, far = key.partition("@")
    return f"{encoder}, type {'I' if kind == 'type1' else 'II'}, FAR {far}"


def _remark(context: Mapping[str, Any]) -> str:
    """Which encoders the training of the generator contained."""
    names = context["loss_encoders"]
    if not names:
        return "The training of the generator contained none of these encoders."
    return f"The training of the generator contained {', '.join(names)}: their figures are too high to be fair."


def _percent(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def write_page(result: Mapping[str, Any], attacks: Mapping[str, Attacked], snapshot: Snapshot, out: Path) -> None:
    """Write audit.html, audit.md and audit.json into the folder `out`.

    The faces on the page are of random identities; a real photo is never on it. Raises UserError if the snapshot has no
    population prior.
    """
    shared = {"context": result["context"], "published": PUBLISHED, "limits": LIMITS}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(result).splitlines()]
    source = files("vultus").joinpath("assets/audit.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    html = page.render(
        **shared,
        remark=_remark(result["context"]),
        head=rows[0],
        rows=rows[2:],
        attackers={title: row["attacker"] for title, row in result["protections"].items()},
        chart=_trade_off(result),
        faces=_samples(attacks, snapshot, result["context"]["seed"]),
    )
    context = result["context"]
    markdown = [
        "# What leaked face templates reveal",
        f"{context['n_images']} photos of {context['n_people']} people of the test split, seed {context['seed']}, "
        f"device {context['device']}; attacked encoder {context['attacked']}; mapping: {context['mapping']}. "
        "Percentages with 95 % intervals over people. TAR at a false accept rate (FAR) of 1e-3.",
        table(result),
        _remark(context),
        "## Published",
        "\n".join(f"- {line}" for line in PUBLISHED),
        "## Limits",
        "\n".join(f"- {line}" for line in LIMITS),
    ]
    write_text(out / FILES[0], html)
    write_text(out / FILES[1], "\n\n".join(markdown) + "\n")
    write_json(out / FILES[2], result)


def _trade_off(result: Mapping[str, Any]) -> str:
    """TAR of the templates against type II success at the attacked encoder, at FAR 1e-3, as an SVG element."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure = Figure(figsize=(8, 5), layout="constrained", label="verification that is left and success of the attack")
    axes = figure.subplots()
    for number, (title, row) in enumerate(result["protections"].items()):
        attacked = next(iter(row["success"].values()))["type2@0.001"]
        if row["tar"] and attacked:
            x, y = 100 * attacked["value"], 100 * row["tar"]["value"]
            axes.plot(x, y, "o", color="#2c6fbb")
            axes.annotate(title, (x, y), xytext=(6, -10 if number % 2 else 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="success of the attack, type II, % (less is safer)", ylabel="TAR of templates, % (more is better)")
    axes.set(xlim=(-2, 112), ylim=(-2, 105))  # room for the names; with other limits small differences look large
    return to_svg(figure)


@torch.no_grad()
def _samples(attacks: Mapping[str, Attacked], snapshot: Snapshot, seed: int) -> dict[str, str]:
    """{protection: data URL of a row of faces} of random identities, protected and inverted."""
    check_population(snapshot)
    c = sample_identities(snapshot.population, SAMPLES, seed=seed)
    z = noise(seed, 0, SAMPLES, snapshot.network.z_dim)
    rows = {"original": c}
    people = [f"random {number}" for number in range(SAMPLES)]
    rows |= {name: attack.invert(c, people)[1] for name, attack in attacks.items() if name != "plain"}
    images = {name: marked(render(snapshot.network, z, row)) for name, row in rows.items()}
    origin = Origin(model_of(snapshot), seed)
    sheets = {
        name: encode_marked(grid(faces, SAMPLES), "JPEG", origin, watermark=False, quality=90)
        for name, faces in images.items()
    }
    return {name: "data:image/jpeg;base64," + base64.b64encode(data).decode() for name, data in sheets.items()}

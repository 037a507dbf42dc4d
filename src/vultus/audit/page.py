"""The page of an audit (HTML and Markdown) for readers who are no experts, and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from vultus._files import atomic_path, write_json, write_text
from vultus.audit import published, words
from vultus.audit.plot import trade_off
from vultus.audit.protocol import Attacked
from vultus.audit.tables import group_cells, key_cells, main_cells, markdown
from vultus.images.io import grid
from vultus.images.xmp import Origin, encode_marked
from vultus.models.snapshot import Snapshot
from vultus.sampling.generate import marked, model_of, render
from vultus.sampling.latents import noise, sample_identities

HTML, MARKDOWN, JSON, PLOT, FACES = "audit.html", "audit.md", "audit.json", "audit.svg", "audit.jpg"
FILES = (HTML, MARKDOWN, JSON, PLOT, FACES)
SAMPLES = 6  # random identities on the page


def write_page(result: Mapping[str, Any], attacks: Mapping[str, Attacked], snapshot: Snapshot, out: Path) -> None:
    """Write FILES into the folder `out`; audit.svg only where matplotlib is installed.

    The faces are of random identities; a real photo is never among them. The snapshot must have a population prior.
    """
    faces = _samples(attacks, snapshot, result["context"]["seed"])
    origin = Origin(model_of(snapshot), result["context"]["seed"])
    values = {
        "context": result["context"],
        "words": words,
        "table": main_cells(result),
        "keys": key_cells(result),
        "groups": group_cells(result),
        "attackers": {title: row["attacker"] for title, row in result["protections"].items()},
        "published": published.cells(),
        "remarks": published.REMARKS,
    }
    pictures = {name: _jpeg(images, origin) for name, images in faces.items()}
    urls = {name: "data:image/jpeg;base64," + base64.b64encode(data).decode() for name, data in pictures.items()}
    chart = trade_off(result)
    write_text(out / HTML, _rendered("audit.html.jinja", values, chart=chart, faces=urls))
    rows = ", ".join(faces)
    write_text(out / MARKDOWN, _rendered("audit.md.jinja", values, chart=PLOT if chart else "", faces=FACES, rows=rows))
    if chart:
        write_text(out / PLOT, trade_off(result, standalone=True))
    with atomic_path(out / FACES) as temporary:
        temporary.write_bytes(_jpeg(torch.cat(list(faces.values())), origin))
    write_json(out / JSON, result)


def _rendered(template: str, values: Mapping[str, Any], **more: Any) -> str:
    """A template of assets/, filled in."""
    source = files("vultus").joinpath("assets", template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=".html" in template,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown
    return environment.from_string(source).render(**values, **more)


def _jpeg(images: Tensor, origin: Origin) -> bytes:
    """A sheet of images uint8 [N, 3, R, R], SAMPLES in a row, with the marks of generated faces."""
    return encode_marked(grid(images, SAMPLES), "JPEG", origin, watermark=False, quality=90)


@torch.no_grad()
def _samples(attacks: Mapping[str, Attacked], snapshot: Snapshot, seed: int) -> dict[str, Tensor]:
    """{protection: faces uint8 [SAMPLES, 3, R, R]} of random identities, protected and inverted."""
    c = sample_identities(snapshot.population, SAMPLES, seed=seed)
    z = noise(seed, 0, SAMPLES, snapshot.network.z_dim)
    rows = {"original": c}
    people = [f"random {number}" for number in range(SAMPLES)]
    rows |= {name: attack.invert(c, people)[1] for name, attack in attacks.items() if name != "plain"}
    return {name: marked(render(snapshot.network, z, row)) for name, row in rows.items()}

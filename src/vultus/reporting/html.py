"""`vultus report`: what was trained, how good it is and how it looks, as one HTML page and as Markdown.

OUT/report.html      everything in one file: opens from the disk, fetches nothing
OUT/report.md        the same; its pictures are in OUT/report-files

Photos of the data set are left out unless asked for: sample sheets show them in the first column, which is cut off, and
the sheets of an evaluation that hold photos are not shown at all.
"""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vultus._files import atomic_path, file_stem, make_folder, write_text
from vultus.evaluation.charts import STYLE, alone, compact
from vultus.evaluation.tables import format_table, markdown, table_lines
from vultus.images.io import HEADER, cell
from vultus.images.xmp import Origin, encode_marked
from vultus.reporting.content import ReportContent
from vultus.reporting.run_folder import EVALUATION, Evaluation, Run

FILES = "report-files"
SIZES = (128, 96, 64, 48)  # sides of a face, tried until the page is small enough
LARGEST = 5_000_000  # bytes of the page
GAP = 2  # of images.grid
QUALITY = 82
TIMES, SHEETS = 7, 12  # columns of the faces over time; sheets behind a fold
EXHIBITS = {
    "extremes": "the best and the worst faces by the judge, above them the photos",
    "nearest": "the faces nearest to a training photo, below each its three nearest training photos",
}


@dataclass(frozen=True)
class Picture:
    """A JPEG with its words. `labels` stand over its columns."""

    caption: str
    data: bytes
    width: int
    height: int
    slug: str
    labels: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        """The picture itself as an address."""
        return "data:image/jpeg;base64," + base64.b64encode(self.data).decode("ascii")


@dataclass(frozen=True)
class Album:
    """Pictures of one run: the last sheet, the same faces over time, and the sheets behind a fold."""

    last: Picture | None
    times: Picture | None
    sheets: list[Picture]
    exhibits: list[Picture]
    remarks: list[str]


def write_report(story: ReportContent, out: str | Path, *, with_photos: bool = False) -> list[Path]:
    """Write report.html, report.md and what the latter shows; return the paths of the two."""
    folder = make_folder(out)
    for side in SIZES:
        albums = [album(each.run, story.evaluation, side, with_photos=with_photos) for each in story.runs]
        page = render(story, albums, "report.html", with_photos=with_photos)
        if len(page.encode()) <= LARGEST:
            break
    files = make_folder(folder / FILES)
    written = set()
    for number, drawing in enumerate([*story.curves, *story.histograms, *story.nearest]):
        written.add(f"{number:02d}-{drawing.slug}.svg")
        write_text(files / f"{number:02d}-{drawing.slug}.svg", alone(drawing.svg))
    for number, shown in enumerate(albums):
        for picture in _filed(shown):
            written.add(f"run-{number}-{picture.slug}.jpg")
            with atomic_path(files / f"run-{number}-{picture.slug}.jpg") as temporary:
                temporary.write_bytes(picture.data)
    # An earlier report may have shown more, photos even.
    for old in files.iterdir():
        if old.suffix in (".svg", ".jpg") and old.name not in written:
            old.unlink()
    write_text(folder / "report.html", page)
    write_text(folder / "report.md", render(story, albums, "report.md", with_photos=with_photos))
    return [folder / "report.html", folder / "report.md"]


def render(story: ReportContent, albums: Sequence[Album], name: str, *, with_photos: bool) -> str:
    """The page by the package's template of that name."""
    import jinja2

    source = (importlib.resources.files("vultus") / "assets" / f"{name}.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = markdown
    columns = story.evaluation.columns
    drawings = [*story.curves, *story.histograms, *story.nearest]
    text = environment.from_string(source).render(
        story=story,
        albums=albums,
        style=STYLE,
        table=_split(table_lines(columns)) if columns else [],
        markdown_table=format_table(columns) if columns else "",
        paths={id(drawing): f"{FILES}/{n:02d}-{drawing.slug}.svg" for n, drawing in enumerate(drawings)},
        picture_paths={
            id(picture): f"{FILES}/run-{n}-{picture.slug}.jpg"
            for n, shown in enumerate(albums)
            for picture in _filed(shown)
        },
        id=id,
        with_photos=with_photos,
        evaluation_folder=EVALUATION,
    )
    return re.sub(r"\n{3,}", "\n\n", text) if name.endswith(".md") else text


def _filed(shown: Album) -> list[Picture]:
    """The pictures that the Markdown shows."""
    return [picture for picture in (shown.last, shown.times) if picture] + shown.exhibits


def _split(lines: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Rows of a table as {group} or {name, arrow, real, cells: [(value, interval)]}; the first is the head."""
    found: list[dict[str, Any]] = [{"head": list(lines[0][3:])}]
    for name, arrow, real, *cells in lines[1:]:
        if name.startswith("**"):
            found.append({"group": name.strip("*")})
            continue
        parts = [re.fullmatch(r"(\S+) (\[.*\])", text) for text in cells]
        pairs = [(part[1], part[2]) if part else (text, "") for part, text in zip(parts, cells, strict=True)]
        found.append({"name": name, "arrow": arrow, "real": real, "cells": pairs})
    return found


# --- pictures ---------------------------------------------------------------------------------------------------------


def album(run: Run, evaluation: Evaluation, side: int, *, with_photos: bool) -> Album:
    """The pictures of a run, faces `side` pixels wide (or as large as they are, if smaller pictures need no more)."""
    found: list[str] = []
    sheets = []
    for nimg, path in run.sheets:
        try:
            faces = _faces(path, run.resolution)
        except OSError:
            found.append(f"{path.name} cannot be read and is left out")
            continue
        if faces is None:
            found.append(f"{path.name} is not laid out as a sheet of samples and is left out")
            continue
        sheets.append((nimg, faces))
    if not sheets:
        return Album(None, None, [], [], found)
    columns = slice(0 if with_photos else 1, None)
    last_nimg, last = sheets[-1]
    noises = len(last[0]) - 1
    labels = (*(["photo"] if with_photos else []), *(f"noise {n + 1}" for n in range(noises)))
    caption = f"{run.name}: people in rows, noise in columns, after {last_nimg:,} images"
    final = _sheet([row[columns] for row in last], side, caption, "last", labels, photos=with_photos)
    learned = [sheet for sheet in sheets if sheet[0] > 0]  # before any training all faces are one grey
    chosen = _spread(learned if len(learned) > 1 else sheets, TIMES)
    people = min(len(faces) for _, faces in chosen)
    rows = [
        [*([last[person][0]] if with_photos else []), *(faces[person][1] for _, faces in chosen)]
        for person in range(people)
    ]
    names = (*(["photo"] if with_photos else []), *(compact(nimg) for nimg, _ in chosen))
    caption = f"{run.name}: people in rows, images seen in columns, always the same noise"
    times = _sheet(rows, side, caption, "times", names, photos=with_photos) if len(chosen) > 1 else None
    folded = [
        _sheet(
            [row[columns] for row in faces],
            side // 2,
            f"{run.name}, {nimg:,} images",
            f"sheet-{nimg:010d}",
            photos=with_photos,
        )
        for nimg, faces in _spread(sheets, SHEETS)
    ]
    return Album(final, times, folded, _exhibits(run, evaluation, side) if with_photos else [], found)


def _faces(path: Path, side: int) -> list[list[Image.Image]] | None:
    """The cells of a sample sheet by rows, the photos first; None if the picture is not laid out that way."""
    labelled = side >= 64  # as samples.py writes it
    with Image.open(path) as opened:
        sheet = opened.convert("RGB")
    columns, more = divmod(sheet.width + GAP, side + GAP)
    rows, left = divmod(sheet.height + GAP - (HEADER if labelled else 0), side + GAP)
    if more or left or columns < 2 or rows < 1:
        return None
    return [[cell(sheet, row, column, side, labelled=labelled) for column in range(columns)] for row in range(rows)]


def _sheet(
    rows: Sequence[Sequence[Image.Image]],
    side: int,
    caption: str,
    slug: str,
    labels: Sequence[str] = (),
    *,
    photos: bool,
) -> Picture:
    """Faces side by side without a gap, so that no frame glares on a dark page."""
    sheet = Image.new("RGB", (len(rows[0]) * side, len(rows) * side))
    for y, row in enumerate(rows):
        for x, face in enumerate(row):
            larger = face.width <= side
            method = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
            sheet.paste(face.resize((side, side), method), (x * side, y * side))
    data = _encode(sheet, caption, photos=photos)
    return Picture(caption, data, sheet.width, sheet.height, slug, tuple(labels))


def _encode(sheet: Image.Image, caption: str, *, photos: bool) -> bytes:
    origin = Origin("", detail=caption, photos=photos)
    return encode_marked(sheet, "JPEG", origin, watermark=False, quality=QUALITY)


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many, the first and the last among them."""
    count = min(len(values), most)
    return [values[round(n * (len(values) - 1) / max(count - 1, 1))] for n in range(count)]


def _exhibits(run: Run, evaluation: Evaluation, side: int) -> list[Picture]:
    """The sheets that an evaluation left of this run; they hold photos."""
    found: list[Picture] = []
    if run.name not in evaluation.of_run:
        return found
    folder, called = evaluation.sources[evaluation.of_run[run.name]]
    for kind, words in EXHIBITS.items():
        path = folder / f"{file_stem(called)}-{kind}.jpg"
        if path.is_file():
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            picture.thumbnail((side * 8, side * 8))
            caption = f"{run.name}: {words}"
            data = _encode(picture, caption, photos=True)
            found.append(Picture(caption, data, picture.width, picture.height, kind))
    return found

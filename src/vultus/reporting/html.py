"""`vultus report`: what was trained, its scores and its faces, as one HTML page and as Markdown.

OUT/report.html      everything in one file: opens from the disk, fetches nothing
OUT/report.md        the same; its images are in OUT/report-files

Photos of the data set are left out by default: of the sample sheets only the generated faces are shown, and the sheets
of an evaluation that contain photos are not shown at all.
"""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vultus._files import atomic_path, file_stem, make_folder, write_text
from vultus._outputs import check_output
from vultus._progress import message
from vultus.evaluation.headlines import OTHER_DATA
from vultus.evaluation.plots import STANDALONE, STYLE, compact, to_svg
from vultus.evaluation.tables import build_table, format_table, markdown
from vultus.images.io import to_pil
from vultus.images.labelled import labelled_sheet
from vultus.images.xmp import Origin, encode_marked
from vultus.reporting.content import Chart, ReportContent, read_content
from vultus.reporting.run_folder import Evaluation, Run
from vultus.training.sample_files import Samples

FILES = "report-files"
SIZES = (128, 96, 64, 48)  # sides of a face in pixels, tried until the page is small enough
MAX_BYTES = 5_000_000  # of the page
QUALITY = 82  # of JPEG
LABEL_SIZE = 16  # of the letters at the largest side of a face, which a page shows smaller
OVER_TIME, SHEETS = 7, 12  # columns of the faces over time; folded sheets
EVALUATION_SHEETS = {
    "extremes": "the best and the worst faces by the judge, above them the source photos",
    "nearest": "the generated faces nearest to a training photo, below each its three nearest training photos",
}
NO_CHARTS = "Charts are left out: matplotlib is not installed (pip install 'vultus[plot]')."


@dataclass(frozen=True)
class Jpeg:
    """An encoded image with its caption."""

    caption: str
    data: bytes
    width: int
    height: int
    slug: str

    @property
    def uri(self) -> str:
        """The image as a data: URI."""
        return "data:image/jpeg;base64," + base64.b64encode(self.data).decode("ascii")


@dataclass(frozen=True)
class RunImages:
    """The images of one run.

    Attributes:
        latest: the last sample sheet.
        over_time: the faces of one noise over the training.
        sheets: sample sheets from the first to the last, folded in the page.
        evaluation: sheets of the evaluation, which show photos.
    """

    latest: Jpeg | None = None
    over_time: Jpeg | None = None
    sheets: tuple[Jpeg, ...] = ()
    evaluation: tuple[Jpeg, ...] = ()

    @property
    def files(self) -> list[Jpeg]:
        """The images that the Markdown shows."""
        return [image for image in (self.latest, self.over_time) if image] + list(self.evaluation)


def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    evaluation: str | Path | Sequence[str | Path] = (),
    with_photos: bool = False,
) -> list[Path]:
    """Write a report about one or more run folders, as HTML and as Markdown.

    Args:
        runs: run folders; several are shown side by side.
        out: folder to write; default: the run folder, if there is only one.
        evaluation: folders that `vultus evaluate` wrote; default: what is stored in each run folder.
        with_photos: show photos of the data set beside the faces.

    Returns: the paths of report.html and report.md.

    Raises UserError for a folder that is no run, an evaluation that cannot be read, several runs without `out`.
    """
    content = read_content(runs, evaluation)
    print_remarks(content)
    return write_report(content, content.folder if out is None else out, with_photos=with_photos)


def print_remarks(content: ReportContent) -> None:
    """Print to stderr what is unusual about the runs and what could not be read, a line each."""
    for summary in content.runs:
        for line in [*([summary.state] if summary.state else []), *summary.remarks]:
            message(f"vultus: {summary.run.name}: {line}")
    for line in content.remarks:
        message(f"vultus: {line}")


def write_report(content: ReportContent, out: str | Path, *, with_photos: bool = False) -> list[Path]:
    """Write report.html, report.md and the files of the latter into the folder `out`; return the paths of the two."""
    folder = make_folder(out)
    known = (folder / "config.json").is_file()  # a run folder, perhaps with a report of an earlier version
    check_output(folder / "report.html", folder / "report.md", own=lambda _: (folder / FILES).is_dir() or known)
    svgs = _svgs(content.charts)
    for side in SIZES:
        images = [
            run_images(summary.run, content.evaluation, side, with_photos=with_photos) for summary in content.runs
        ]
        page = render(content, images, svgs, "report.html", with_photos=with_photos)
        if len(page.encode()) <= MAX_BYTES:
            break
    files = make_folder(folder / FILES)
    written = set()
    for chart, path in _chart_paths(content, svgs).items():
        written.add(Path(path).name)
        write_text(folder / path, svgs[chart].replace(">", f"><style>{STANDALONE}</style>", 1) + "\n")
    for number, shown in enumerate(images):
        for image in shown.files:
            written.add(Path(_image_path(number, image)).name)
            with atomic_path(folder / _image_path(number, image)) as temporary:
                temporary.write_bytes(image.data)
    # Delete what an earlier report wrote and this one does not show, photos above all.
    for old in files.iterdir():
        if old.suffix in (".svg", ".jpg") and old.name not in written:
            old.unlink()
    write_text(folder / "report.html", page)
    write_text(folder / "report.md", render(content, images, svgs, "report.md", with_photos=with_photos))
    return [folder / "report.html", folder / "report.md"]


def render(
    content: ReportContent,
    images: Sequence[RunImages],
    svgs: Mapping[Chart, str],
    name: str,
    *,
    with_photos: bool,
) -> str:
    """The report by the template `name` of the package; `svgs` are the charts that could be drawn."""
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
    columns = content.evaluation.columns
    text = environment.from_string(source).render(
        content=content,
        images=images,
        svgs=svgs,
        no_charts=NO_CHARTS if content.charts and not svgs else "",
        style=STYLE,
        table=build_table(columns) if columns else None,
        markdown_table=format_table(columns) if columns else "",
        chart_paths=_chart_paths(content, svgs),
        image_path=_image_path,
        with_photos=with_photos,
        other_data=OTHER_DATA,
    )
    return re.sub(r"\n{3,}", "\n\n", text) if name.endswith(".md") else text


def _svgs(charts: Iterable[Chart]) -> dict[Chart, str]:
    """The charts as SVG elements; none without matplotlib."""
    try:
        texts = {chart: to_svg(chart.figure()) for chart in charts}
    except ImportError:
        return {}
    return {chart: text for chart, text in texts.items() if text}


def _chart_paths(content: ReportContent, svgs: Mapping[Chart, str]) -> dict[Chart, str]:
    shown = [chart for chart in content.charts if chart in svgs]
    return {chart: f"{FILES}/{number:02d}-{chart.slug}.svg" for number, chart in enumerate(shown)}


def _image_path(run: int, image: Jpeg) -> str:
    return f"{FILES}/run-{run}-{image.slug}.jpg"


# --- images -----------------------------------------------------------------------------------------------------------

Faces = Sequence[npt.NDArray[np.uint8]]  # [3, R, R] each


def run_images(run: Run, evaluation: Evaluation, side: int, *, with_photos: bool) -> RunImages:
    """The images of a run, faces `side` pixels wide."""
    if not run.samples:
        return RunImages()
    latest = run.samples[-1]
    photo = ("source photo",) if with_photos else ()
    sheet = _samples_sheet(
        latest,
        side,
        f"{run.name}: people in rows, noise in columns, after {latest.cur_nimg:,} images",
        "last",
        with_photos=with_photos,
    )
    trained = [samples for samples in run.samples if samples.cur_nimg > 0]  # an untrained generator gives grey images
    chosen = _spread(trained if len(trained) > 1 else run.samples, OVER_TIME)
    people = min(len(samples.photos) for samples in chosen)
    over_time = None
    if len(chosen) > 1:
        over_time = _sheet(
            [
                [*([latest.photos[person]] if with_photos else []), *(one.generated[person, 0] for one in chosen)]
                for person in range(people)
            ],
            side,
            f"{run.name}: people in rows, images seen in columns, always the same noise",
            "times",
            (*photo, *(f"{compact(samples.cur_nimg)} images" for samples in chosen)),
            photos=with_photos,
        )
    folded = [
        _samples_sheet(
            samples,
            side // 2,
            f"{run.name}, {samples.cur_nimg:,} images",
            f"sheet-{samples.cur_nimg:010d}",
            with_photos=with_photos,
        )
        for samples in _spread(run.samples, SHEETS)
    ]
    shown = _evaluation_sheets(run, evaluation, side) if with_photos else []
    return RunImages(sheet, over_time, tuple(folded), tuple(shown))


def _samples_sheet(samples: Samples, side: int, caption: str, slug: str, *, with_photos: bool) -> Jpeg:
    """One sample sheet of the training: a row for each person."""
    rows = [
        [*([samples.photos[person]] if with_photos else []), *samples.generated[person]]
        for person in range(len(samples.photos))
    ]
    heads = [*(["source photo"] if with_photos else []), *(f"noise {n + 1}" for n in range(samples.generated.shape[1]))]
    return _sheet(rows, side, caption, slug, heads, photos=with_photos)


def _sheet(rows: Sequence[Faces], side: int, caption: str, slug: str, heads: Sequence[str], *, photos: bool) -> Jpeg:
    """Faces side by side, a row for each person, with the words that say so."""
    images = []
    for pixels in (pixels for row in rows for pixels in row):
        face = to_pil(pixels)
        method = Image.Resampling.NEAREST if face.width <= side else Image.Resampling.LANCZOS
        images.append(face.resize((side, side), method))
    labels = [f"person {person + 1}" for person in range(len(rows))]
    size = max(9, round(LABEL_SIZE * side / SIZES[0]))
    sheet = labelled_sheet(
        images, len(rows[0]), row_labels=labels, column_labels=heads, font_size=size, dark=True, least=0
    )
    return _encode(sheet, caption, slug, photos=photos)


def _encode(sheet: Image.Image, caption: str, slug: str, *, photos: bool) -> Jpeg:
    origin = Origin("", detail=caption, photos=photos)
    data = encode_marked(sheet, "JPEG", origin, watermark=False, quality=QUALITY)
    return Jpeg(caption, data, sheet.width, sheet.height, slug)


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spread, the first and the last among them."""
    count = min(len(values), count)
    return [values[round(n * (len(values) - 1) / max(count - 1, 1))] for n in range(count)]


def _evaluation_sheets(run: Run, evaluation: Evaluation, side: int) -> list[Jpeg]:
    """The sheets of an evaluation of this run; they show photos."""
    images: list[Jpeg] = []
    if run.name not in evaluation.of_run:
        return images
    folder, column = evaluation.sources[evaluation.of_run[run.name]]
    for kind, words in EVALUATION_SHEETS.items():
        path = folder / f"{file_stem(column)}-{kind}.jpg"
        if path.is_file():
            with Image.open(path) as opened:
                sheet = opened.convert("RGB")
            sheet.thumbnail((max(side, 96) * 10, max(side, 96) * 10))  # its labels must stay readable
            images.append(_encode(sheet, f"{run.name}: {words}", kind, photos=True))
    return images

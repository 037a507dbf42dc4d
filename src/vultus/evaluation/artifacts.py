"""The files that an evaluation writes: the results, a table, plots and grids of faces.

OUT/table.md           the table
OUT/results.json       the results
OUT/identity.png       scores of real and generated pairs, by every encoder
OUT/nearest.png        cosine of generated and of real unseen faces to the nearest training photo
OUT/NAME-faces.jpg     a row for each of some people: the photo, then generated faces
OUT/NAME-extremes.jpg  the best and the worst faces by the judge, above them the photos
OUT/NAME-nearest.jpg   the faces nearest to a training photo, below each its three nearest training photos

Every picture says in words what its rows, columns and numbers are.

The grids show photos of the data set, so its terms hold for them too. The plots need matplotlib and are left out, with
a note, where it is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vultus._files import atomic_path, file_stem, make_folder, write_json, write_text
from vultus._progress import message
from vultus.data.dataset import PreparedDataset
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.evaluate import EvaluationSettings
from vultus.evaluation.extract import ChosenFaces, FaceSet, RealFaces, extract, vectors
from vultus.evaluation.plots import distributions
from vultus.evaluation.results import FILE
from vultus.evaluation.scores import spread
from vultus.evaluation.tables import Results
from vultus.evaluation.verification import row_scores
from vultus.images.io import to_images, to_pil
from vultus.images.labelled import labelled_sheet
from vultus.images.xmp import Origin, save_marked

PEOPLE, FACES, EXTREMES, NEAREST = 8, 6, 8, 8


@dataclass(frozen=True)
class Grid:
    """Images uint8 [N, 3, R, R], `columns` in a row, with labels of rows and columns and a caption for each image."""

    images: Tensor
    columns: int
    row_labels: list[str]
    column_labels: Sequence[str] = ()
    captions: Sequence[str] = ()

    def draw(self) -> Image.Image:
        """As one image."""
        return labelled_sheet(
            [to_pil(image) for image in self.images],
            self.columns,
            row_labels=self.row_labels,
            column_labels=self.column_labels,
            captions=self.captions,
        )


def write_results(out: str | Path, results: Results, text: str) -> list[Path]:
    """Write the table `text` as Markdown, the results as JSON, and the plots. Returns the paths."""
    folder = make_folder(out)
    written = [folder / FILE, folder / "table.md"]
    write_json(written[0], results)
    write_text(written[1], text + "\n")
    kinds = dict.fromkeys(key for result in results.values() for key in result["distributions"])
    plots = {"identity.png": [kind for kind in kinds if kind != "nearest"], "nearest.png": ["nearest"]}
    for name, shown in plots.items():
        if not set(shown) & set(kinds):
            continue
        try:
            figure = distributions(results, shown)
        except ImportError:
            message(f"vultus: note: {folder / name}: left out, it needs matplotlib: pip install 'vultus[plot]'")
            continue
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
        written.append(folder / name)
    return written


@torch.inference_mode()
def write_grids(
    out: str | Path,
    name: str,
    faces: FaceSet,
    dataset: PreparedDataset,
    *,
    backbones: Backbones,
    other: PreparedDataset | None,
    settings: EvaluationSettings,
    trained_on_this_data: bool | None = None,
) -> list[Path]:
    """Write grids of the faces of one snapshot beside the photos of `dataset`. Returns the paths.

    `trained_on_this_data`: whether the photos of `other` are those that the snapshot was trained on.

    Embeddings come from the cache that the evaluation with the same settings filled.
    """
    folder = make_folder(out)
    rows = spread(len(dataset), settings.limit)
    stem = file_stem(name)
    grids = {f"{stem}-faces.jpg": _people(faces, dataset, rows)}
    columns = [vectors(judge.short, judge, settings.noises) for judge in backbones.judges[:1]]
    columns.append(vectors(backbones.short, backbones.encoder, settings.noises))
    generated = extract(faces, dataset, rows, columns, **settings.extraction)
    if backbones.judges:
        judge = backbones.judges[0]
        real = extract(RealFaces(), dataset, rows, [vectors(judge.short, judge, 1)], **settings.extraction)
        similar = row_scores(generated[judge.short][:, 0], real[judge.short][:, 0], judge.similarity)
        grids[f"{stem}-extremes.jpg"] = _extremes(faces, dataset, rows, similar, judge.short)
    if other is not None and other.split == "train":
        embeddings = generated[backbones.short][:, 0]
        theirs = trained_on_this_data is not False
        grids[f"{stem}-nearest.jpg"] = _nearest(faces, dataset, rows, embeddings, other, theirs, backbones.short)
    for file, grid in grids.items():
        origin = Origin(name, settings.seed, "evaluation", photos=True)
        save_marked(grid.draw(), folder / file, origin, watermark=False)
    return [folder / file for file in grids]


def _images(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, number: int = 0) -> Tensor:
    return to_images(faces(rows, number, dataset.batch(rows))).cpu()


def _people(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray) -> Grid:
    some = rows[spread(len(rows), PEOPLE)]
    photos = dataset.batch(some)
    numbers = range(faces.num if isinstance(faces, ChosenFaces) else FACES)
    columns = [photos.images, *(_images(faces, dataset, some, number) for number in numbers)]
    heads = ["source photo", *(f"generated with noise {number + 1}" for number in numbers)]
    if isinstance(faces, ChosenFaces):
        heads = ["source photo", *(f"best {number + 1} of {faces.num * faces.best_of} faces" for number in numbers)]
    images = torch.stack(columns, 1).flatten(0, 1)
    return Grid(images, len(columns), [f"person {name}" for name in photos.identities], heads)


def _extremes(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, similar: Tensor, judge: str) -> Grid:
    order = torch.argsort(similar, descending=True).numpy()
    count = min(EXTREMES, len(order))
    parts: list[Tensor] = []
    labels: list[str] = []
    captions: list[str] = []
    for title, chosen in (("best", order[:count]), ("worst", order[-count:])):
        photos = dataset.batch(rows[chosen])
        parts += [photos.images, _images(faces, dataset, rows[chosen])]
        labels += [f"source photos of the {title} faces (below: the person)"]
        labels += [f"{title} faces, generated with noise 1 (below: score by {judge} against the photo above)"]
        captions += [*photos.identities, *(f"{score:.2f}" for score in similar[chosen].tolist())]
    return Grid(torch.cat(parts), count, labels, captions=captions)


def _nearest(
    faces: FaceSet,
    dataset: PreparedDataset,
    rows: np.ndarray,
    embeddings: Tensor,
    train: PreparedDataset,
    theirs: bool,
    encoder: str,
) -> Grid:
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(train.embeddings(column=train.facenet_column), dim=1).T
    values, places = cosines.topk(3)
    count = min(NEAREST, len(rows))
    order = values[:, 0].topk(count).indices
    photos = dataset.batch(rows[order.numpy()])
    parts = [_images(faces, dataset, rows[order.numpy()])]
    labels = ["generated with noise 1 (below: the person whose embedding it is)"]
    captions = list(photos.identities)
    kind = "training photo" if theirs else "training photo of this data set, on which the snapshot was NOT trained"
    for rank, word in enumerate(("nearest", "2nd nearest", "3rd nearest")):
        near = train.batch(places[order, rank].numpy())
        parts.append(near.images)
        labels.append(f"{word} {kind} (below: cosine by {encoder}, person)")
        captions += [
            f"{value:.2f}, {name}" for value, name in zip(values[order, rank].tolist(), near.identities, strict=True)
        ]
    return Grid(torch.cat(parts), count, labels, captions=captions)

"""The files that an evaluation writes: the results, a table, plots and grids of faces.

OUT/table.md           the table
OUT/results.json       the results
OUT/identity.png       scores of real and generated pairs, by every encoder
OUT/nearest.png        cosine of generated and of real unseen faces to the nearest training photo
OUT/NAME-faces.jpg     for some people the photo, then generated faces
OUT/NAME-extremes.jpg  the best and the worst faces by the judge, above them the photos
OUT/NAME-nearest.jpg   the faces nearest to a training photo, below each its three nearest training photos

The grids show photos of the data set, so its terms hold for them too. The plots need matplotlib and are left out, with
a note, where it is not installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._files import atomic_path, file_stem, make_folder, write_json, write_text
from vultus._progress import message
from vultus.data.dataset import PreparedDataset
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.evaluate import EvaluationSettings
from vultus.evaluation.extract import FaceSet, RealFaces, extract, vectors
from vultus.evaluation.plots import distributions
from vultus.evaluation.results import FILE
from vultus.evaluation.scores import spread
from vultus.evaluation.tables import Results
from vultus.evaluation.verification import row_scores
from vultus.images.io import grid, to_images
from vultus.images.xmp import Origin, save_marked

PEOPLE, FACES, EXTREMES, NEAREST = 8, 6, 8, 8

Grid = tuple[Tensor, int, list[str]]  # images uint8 [N, 3, R, R], columns, labels


def write_results(out: str | Path, results: Results, text: str) -> list[Path]:
    """Write the table `text` as Markdown, the results as JSON, and the plots. Returns the paths."""
    folder = make_folder(out)
    written = [folder / "table.md", folder / FILE]
    write_text(written[0], text + "\n")
    write_json(written[1], results)
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
) -> list[Path]:
    """Write grids of the faces of one snapshot beside the photos of `dataset`. Returns the paths.

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
        grids[f"{stem}-extremes.jpg"] = _extremes(faces, dataset, rows, similar)
    if other is not None and other.split == "train":
        grids[f"{stem}-nearest.jpg"] = _nearest(faces, dataset, rows, generated[backbones.short][:, 0], other)
    for file, (images, width, labels) in grids.items():
        origin = Origin(name, settings.seed, "evaluation", photos=True)
        save_marked(grid(images, width, labels=labels), folder / file, origin, watermark=False)
    return [folder / file for file in grids]


def _images(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, number: int = 0) -> Tensor:
    return to_images(faces(rows, number, dataset.batch(rows))).cpu()


def _people(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray) -> Grid:
    some = rows[spread(len(rows), PEOPLE)]
    columns = [dataset.batch(some).images, *(_images(faces, dataset, some, number) for number in range(FACES))]
    labels = ["photo", *(f"noise {number}" for number in range(FACES))]
    return torch.stack(columns, 1).flatten(0, 1), len(columns), labels


def _extremes(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, similar: Tensor) -> Grid:
    order = torch.argsort(similar, descending=True).numpy()
    count = min(EXTREMES, len(order))
    best, worst = rows[order[:count]], rows[order[-count:]]
    parts = [part for some in (best, worst) for part in (dataset.batch(some).images, _images(faces, dataset, some))]
    return torch.cat(parts), count, []


def _nearest(
    faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, embeddings: Tensor, train: PreparedDataset
) -> Grid:
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(train.embeddings(), dim=1).T
    values, places = cosines.topk(3)
    count = min(NEAREST, len(rows))
    order = values[:, 0].topk(count).indices
    parts = [_images(faces, dataset, rows[order.numpy()])]
    parts += [train.batch(places[order, rank].numpy()).images for rank in range(3)]
    return torch.cat(parts), count, [f"{value:.2f}" for value in values[order, 0].tolist()]

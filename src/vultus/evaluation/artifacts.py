"""What an evaluation leaves in a folder for people who would rather look: the table, plots and pictures.

OUT/table.md           the table
OUT/results.json       the results
OUT/identity.png       scores of real and generated pairs, by every encoder
OUT/nearest.png        how near generated and real unseen faces come to a training photo
OUT/NAME-faces.jpg     people: the photo, then generated faces
OUT/NAME-extremes.jpg  the best and the worst faces by the judge, above them the photos
OUT/NAME-nearest.jpg   the faces nearest to a training photo, below each its three nearest training photos

The pictures show photos of the data set: what its terms allow holds for them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vultus._files import file_stem, make_folder, write_json, write_text
from vultus.data.dataset import PreparedDataset
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.evaluate import EvaluationSettings
from vultus.evaluation.extract import FaceSet, RealFaces, measure, vectors
from vultus.evaluation.plots import distributions
from vultus.evaluation.scores import spread
from vultus.evaluation.tables import format_table
from vultus.evaluation.verification import row_scores
from vultus.images.io import grid, to_images
from vultus.images.xmp import Origin, save_marked

PEOPLE, FACES, EXTREMES, NEAREST = 8, 6, 8, 8


def write_results(out: str | Path, results: Mapping[str, Mapping[str, Any]], more: str = "") -> list[Path]:
    """Table, JSON and plots; `more` is added below the table. Returns the files written."""
    folder = make_folder(out)
    written = [folder / "table.md", folder / "results.json"]
    write_text(written[0], format_table(results) + "\n" + (f"\n{more}\n" if more else ""))
    write_json(written[1], results)
    names = dict.fromkeys(key for result in results.values() for key in result["distributions"])
    for kinds, name in (([key for key in names if key != "nearest"], "identity"), (["nearest"], "nearest")):
        shown = [kind for kind in kinds if kind in names]
        if shown and _plot(results, shown, folder / f"{name}.png"):
            written.append(folder / f"{name}.png")
    return written


def _plot(results: Mapping[str, Mapping[str, Any]], kinds: list[str], path: Path) -> bool:
    """False where matplotlib is not installed."""
    try:
        distributions(results, kinds).savefig(path, dpi=130)
    except ImportError:
        return False
    return True


@torch.inference_mode()
def write_pictures(
    out: str | Path,
    name: str,
    faces: FaceSet,
    dataset: PreparedDataset,
    *,
    backbones: Backbones,
    other: PreparedDataset | None,
    settings: EvaluationSettings,
) -> list[Path]:
    """Sheets of faces of one snapshot beside the photos of `dataset`. Returns the files written.

    Vectors come from the cache that the evaluation with the same settings filled.
    """
    folder = make_folder(out)
    rows = spread(len(dataset), settings.limit)
    stem = file_stem(name)
    sheets = {f"{stem}-faces.jpg": _people(faces, dataset, rows)}
    columns = [vectors(one.short, one, settings.noises) for one in backbones.judges[:1]]
    columns.append(vectors(backbones.short, backbones.encoder, settings.noises))
    made = measure(faces, dataset, rows, columns, **settings.how)
    if backbones.judges:
        judge = backbones.judges[0]
        seen = [vectors(judge.short, judge, 1)]
        real = measure(RealFaces(), dataset, rows, seen, **settings.how)[judge.short]
        found = row_scores(made[judge.short][:, 0], real[:, 0], judge.similarity)
        sheets[f"{stem}-extremes.jpg"] = _extremes(faces, dataset, rows, found)
    if other is not None and other.split == "train":
        sheets[f"{stem}-nearest.jpg"] = _nearest(faces, dataset, rows, made[columns[-1].name][:, 0], other)
    for file, (images, width, labels) in sheets.items():
        origin = Origin(name, settings.seed, "evaluation", photos=True)
        save_marked(grid(images, width, labels=labels), folder / file, origin, watermark=False)
    return [folder / file for file in sheets]


Sheet = tuple[Tensor, int, list[str]]


def _images(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, number: int = 0) -> Tensor:
    return to_images(faces(rows, number, dataset.batch(rows))).cpu()


def _people(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray) -> Sheet:
    some = rows[spread(len(rows), PEOPLE)]
    columns = [dataset.batch(some).images, *(_images(faces, dataset, some, number) for number in range(FACES))]
    labels = ["photo", *(f"noise {number}" for number in range(FACES))]
    return torch.stack(columns, 1).flatten(0, 1), len(columns), labels


def _extremes(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, found: Tensor) -> Sheet:
    order = torch.argsort(found, descending=True).numpy()
    count = min(EXTREMES, len(order))
    best, worst = rows[order[:count]], rows[order[-count:]]
    parts = [part for some in (best, worst) for part in (dataset.batch(some).images, _images(faces, dataset, some))]
    return torch.cat(parts), count, []


def _nearest(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, made: Tensor, train: PreparedDataset) -> Sheet:
    found = torch.nn.functional.normalize(made, dim=1) @ torch.nn.functional.normalize(train.embeddings(), dim=1).T
    values, places = found.topk(3)
    count = min(NEAREST, len(rows))
    order = values[:, 0].topk(count).indices
    parts = [_images(faces, dataset, rows[order.numpy()])]
    parts += [train.batch(places[order, rank].numpy()).images for rank in range(3)]
    return torch.cat(parts), count, [f"{value:.2f}" for value in values[order, 0].tolist()]

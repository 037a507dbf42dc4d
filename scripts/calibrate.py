"""How each metric changes when photos are degraded in known ways: the calibration table of docs/metrics.md.

    python scripts/calibrate.py --data data/celeba --limit 1000 --out calibration

Photos of the test split are degraded in one way at a time (blur, noise, JPEG, grey, mirror), or replaced (by another
photo of the person, another person, training photos, the nearest training photo, the mean face), and evaluated as if
they were generated. Writes OUT/calibration.md and OUT/results.json, and prints whether each series is monotone.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vultus._files import make_folder, write_json, write_text
from vultus.data.dataset import Batch, PreparedDataset
from vultus.evaluation.backbones.loading import load_backbones
from vultus.evaluation.evaluate import EvaluationSettings, evaluate_faces
from vultus.evaluation.extract import OtherFaces
from vultus.evaluation.metrics import nearest
from vultus.evaluation.scores import spread
from vultus.evaluation.tables import format_table
from vultus.images.io import encode_jpeg, from_pil, to_images, to_pil, to_x
from vultus.models.facenet import load_facenet

SERIES = (
    ("photo", "blur 1", "blur 2", "blur 4"),
    ("photo", "noise 0.1", "noise 0.2", "noise 0.4"),
    ("photo", "jpeg 60", "jpeg 30", "jpeg 10"),
)

Change = Callable[[Tensor, np.ndarray], Tensor]


class Degraded:
    """Photos changed by a function of (x [B, 3, R, R] in [-1, 1], rows)."""

    def __init__(self, name: str, change: Change) -> None:
        self.id = f"calibration-{name}"
        self.title = name
        self._change = change

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        return to_x(to_images(self._change(to_x(photos.images), rows)))


def blur(sigma: float) -> Change:
    half = int(3 * sigma + 0.5)
    offsets = torch.arange(-half, half + 1, dtype=torch.float32)
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    window = (window / window.sum()).expand(3, 1, -1)

    def change(x: Tensor, rows: np.ndarray) -> Tensor:
        x = F.pad(x, (half,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(x, window[..., None, :], groups=3), window[..., None], groups=3)

    return change


def noisy(sigma: float) -> Change:
    def change(x: Tensor, rows: np.ndarray) -> Tensor:
        noise = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(int(row))) for row in rows]
        return x + sigma * torch.stack(noise)

    return change


def jpeg(quality: int) -> Change:
    def change(x: Tensor, rows: np.ndarray) -> Tensor:
        files = [io.BytesIO(encode_jpeg(to_pil(image), quality)) for image in to_images(x)]
        return to_x(from_pil([Image.open(file).convert("RGB") for file in files]))

    return change


def grey(x: Tensor, rows: np.ndarray) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (x * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)


def changes(test: PreparedDataset, train: PreparedDataset, chosen: np.ndarray) -> dict[str, Any]:
    """The changes of the photos, by name."""
    some = spread(len(train), len(chosen))
    place = {int(row): number for number, row in enumerate(chosen)}
    people = test.identities
    names = sorted(set(people))
    first = {name: people.index(name) for name in names}
    successor = dict(zip(names, [*names[1:], names[0]], strict=True))
    _, near = nearest(test.embeddings(), train.embeddings())
    mean = torch.stack([to_x(train.batch(part).images).mean(0) for part in np.array_split(some, 20)]).mean(0)

    def from_train(x: Tensor, rows: np.ndarray) -> Tensor:
        return to_x(train.batch([some[place[int(row)] % len(some)] for row in rows]).images)

    def stranger(x: Tensor, rows: np.ndarray) -> Tensor:
        return to_x(test.batch([first[successor[people[row]]] for row in rows]).images)

    def copied(x: Tensor, rows: np.ndarray) -> Tensor:
        return to_x(train.batch(near[torch.from_numpy(rows)].numpy()).images)

    degraded: dict[str, Change] = {"photo": lambda x, rows: x}
    degraded |= {f"blur {sigma}": blur(sigma) for sigma in (1, 2, 4)}
    degraded |= {f"noise {sigma}": noisy(sigma) for sigma in (0.1, 0.2, 0.4)}
    degraded |= {f"jpeg {quality}": jpeg(quality) for quality in (60, 30, 10)}
    degraded |= {"grey": grey, "mirrored": lambda x, rows: x.flip(3)}
    degraded |= {"wrong person": stranger, "train photos": from_train, "copies": copied}
    degraded["mean face"] = lambda x, rows: mean.expand_as(x)
    faces: dict[str, Any] = {name: Degraded(name, change) for name, change in degraded.items()}
    return {"photo": faces.pop("photo"), "other photo": OtherFaces(test)} | faces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared data set with splits train and test")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--out", default="calibration")
    options = parser.parse_args()
    test = PreparedDataset(options.data, "test")
    train = test.with_split("train")
    settings = EvaluationSettings(noises=1, limit=options.limit, best_of=0)
    chosen = spread(len(test), options.limit)
    backbones = load_backbones(load_facenet(dtype=torch.float32))
    results = {}
    for name, faces in changes(test, train, chosen).items():
        results[name] = evaluate_faces(faces, test, backbones=backbones, other=train, settings=settings)
    out = make_folder(Path(options.out))
    replaced = ("other photo", "mirrored", "wrong person", "train photos", "copies", "mean face")
    degraded = [name for name in results if name not in replaced]
    tables = [
        format_table({name: results[name] for name in names}, intervals=False, circumstances=False)
        for names in (degraded, ("photo", *replaced))
    ]
    write_text(out / "calibration.md", "\n\n".join(tables) + "\n")
    write_json(out / "results.json", results)
    print("\n\n".join(tables))
    for series in SERIES:
        for row in results["photo"]["metrics"]:
            values = [results[name]["metrics"][row]["value"] for name in series]
            steps = np.diff(values)
            shape = "monotone" if (steps >= 0).all() or (steps <= 0).all() else "NOT MONOTONE"
            print(f"{series[-1]:>10}  {row:<28} {shape:<13} " + " ".join(f"{value:.4f}" for value in values))


if __name__ == "__main__":
    main()

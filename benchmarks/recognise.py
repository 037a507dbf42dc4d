"""What a synthetic data set is worth: recognisers that are trained on generated faces, on photos, and on both.

    vultus synthesize --people 800 --out SYNTHETIC
    OMP_NUM_THREADS=1 python benchmarks/recognise.py --real PREPARED --synthetic SYNTHETIC --out DIR

A small residual network is trained from random weights with the ArcFace loss (Deng et al. 2019, arXiv:1801.07698), in
each arm for the same number of steps, with the same settings and augmentation. PREPARED is a data set of `vultus
prepare`: people of its train split are the photos of an arm, people of its test split, whom no arm contains, the test.
The test is that of LFW (Huang et al. 2007): 10 folds without common people, each with 300 pairs of one person and 300
of two people; a fold is decided by the threshold that is best on the other nine. TAR at a FAR is over all pairs.
Intervals are 95 %, over people. The result of an arm is kept in DIR; the same command goes on with the next arm.

The network reads 48 pixels, the training is short: results compare the arms, not recognisers.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vultus._files import make_folder, read_json, write_json
from vultus._progress import progress
from vultus.data.dataset import PreparedDataset
from vultus.evaluation.bootstrap import Estimate, PersonBootstrap
from vultus.evaluation.verification import pair_scores, person_rows, row_scores, threshold_at_far
from vultus.images.io import box_x, from_pil, to_images, to_x
from vultus.models.mobilefacenet import BOX

SIDE, MARGIN = 48, 6  # pixels that the network reads, and that a random crop may shift
FOLDS, PAIRS = 10, 300  # of the test; pairs of one person, and as many of two, in each fold
FARS = (1e-2, 1e-3)
CHUNK = 256  # images that are decoded or embedded at once


@dataclass(frozen=True)
class Settings:
    """Of the training; the same for every arm."""

    steps: int = 3000
    batch: int = 32
    rate: float = 1e-3  # of AdamW, with a cosine schedule after 5 % of warm-up
    decay: float = 0.05
    scale: float = 16.0  # of ArcFace
    margin: float = 0.2  # in radians; it rises from 0 over the first half, or so short a training does not converge
    seed: int = 0


@dataclass(frozen=True)
class Faces:
    """Images uint8 [N, 3, SIDE + MARGIN, SIDE + MARGIN] and the person of each."""

    images: Tensor
    people: list[str]


# --- data -------------------------------------------------------------------------------------------------------------


def crops(images: Tensor) -> Tensor:
    """Whole images uint8 [N, 3, S, S] -> the crop that MobileFaceNet reads, at the side that is stored here."""
    return to_images(box_x(to_x(images), BOX, (0.0, 0.0, 0.0), SIDE + MARGIN))


def photos(dataset: PreparedDataset) -> Faces:
    parts = [
        crops(dataset.batch(range(start, min(start + CHUNK, len(dataset)))).images)
        for start in range(0, len(dataset), CHUNK)
    ]
    return Faces(torch.cat(parts), [f"real-{name}" for name in dataset.identities])


def generated(folder: Path) -> Faces:
    parts, people = [], []
    for path in sorted(folder.glob("train-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(CHUNK, columns=["image", "identity"]):
            rows = batch.to_pylist()
            parts.append(crops(from_pil([Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows])))
            people += [f"generated-{row['identity']}" for row in rows]
    return Faces(torch.cat(parts), people)


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """A random crop, flip, and change of brightness and contrast of each image -> x [N, 3, SIDE, SIDE]."""
    x = to_x(images)
    shifts = torch.randint(0, MARGIN + 1, (len(x), 2), generator=rng).tolist()
    x = torch.stack([row[:, top : top + SIDE, left : left + SIDE] for row, (top, left) in zip(x, shifts, strict=True)])
    flipped = torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5
    x = torch.where(flipped, x.flip(3), x)
    contrast, brightness = (0.3 * (2 * torch.rand(len(x), 1, 1, 1, generator=rng) - 1) for _ in range(2))
    return x * (1 + contrast) + brightness


# --- the recogniser ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Half the side, then a residual unit of two convolutions (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())
        self.unit = nn.Sequential(
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return F.relu(x + self.unit(x))


class Recogniser(nn.Sequential):
    """x [N, 3, SIDE, SIDE] -> [N, 128]; 1.3 million parameters, MobileFaceNet has 1.0.

    On a CPU, MobileFaceNet trains at a fifth of the rate, because of its depthwise convolutions.
    """

    def __init__(self) -> None:
        widths = (3, 24, 48, 96, 192)
        blocks = [Block(cin, cout) for cin, cout in zip(widths, widths[1:], strict=False)]
        side = SIDE // 2 ** len(blocks)
        super().__init__(*blocks, nn.Flatten(), nn.Linear(widths[-1] * side**2, 128, bias=False), nn.BatchNorm1d(128))

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 3, SIDE + MARGIN, SIDE + MARGIN] -> [N, 128]: the mean of the image and its mirror image."""
        self.eval()
        border = MARGIN // 2
        x = to_x(images)[..., border : border + SIDE, border : border + SIDE]
        return torch.cat([F.normalize(self(part)) + F.normalize(self(part.flip(3))) for part in x.split(CHUNK)])


def arcface(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """The ArcFace loss (Deng et al. 2019, equation 3): `margin` is added to the angle to the own class.

    cosines [N, K], labels [N]. Where the angle would exceed pi, the cosine is lowered as much as at pi - margin.
    """
    own = cosines.gather(1, labels[:, None])
    sine = (1 - own.square()).clamp(min=1e-9).sqrt()
    shifted = own * math.cos(margin) - sine * math.sin(margin)
    shifted = torch.where(own > math.cos(math.pi - margin), shifted, own - margin * math.sin(margin))
    return F.cross_entropy(scale * cosines.scatter(1, labels[:, None], shifted), labels)


def trained(faces: Faces, settings: Settings, name: str) -> tuple[Recogniser, dict[str, Any]]:
    """A recogniser that was trained on `faces`, and what is to be said of its training."""
    torch.manual_seed(settings.seed)
    rng = torch.Generator().manual_seed(settings.seed)
    names, codes = np.unique(np.asarray(faces.people), return_inverse=True)
    labels = torch.from_numpy(codes)
    network = Recogniser().to(memory_format=torch.channels_last)
    classes = nn.Parameter(torch.randn(len(names), 128) * 0.1)
    parameters = [*network.parameters(), classes]
    optimizer = torch.optim.AdamW(parameters, settings.rate, weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at((step + 1) / settings.steps))
    order = rows_of(len(labels), settings, rng)
    start, losses = time.perf_counter(), []
    with progress(settings.steps, title=name, unit="step") as shown:
        for step in range(settings.steps):
            rows = next(order)
            x = augmented(faces.images[rows], rng).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                embeddings = network(x)
            cosines = F.normalize(embeddings.float()) @ F.normalize(classes).T
            margin = settings.margin * min(1.0, 2 * step / settings.steps)
            loss = arcface(cosines, labels[rows], settings.scale, margin)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            shown.show({"loss": f"{np.mean(losses[-50:]):.2f}"})
            shown.update()
    seconds = time.perf_counter() - start
    about = {"people": len(names), "images": len(labels), "loss": float(np.mean(losses[-50:])), "seconds": seconds}
    return network, about


def rate_at(part: float) -> float:
    """Factor of the learning rate after this part of the steps."""
    return part / 0.05 if part < 0.05 else 0.5 * (1 + math.cos(math.pi * (part - 0.05) / 0.95))


def rows_of(count: int, settings: Settings, rng: torch.Generator) -> Iterator[Tensor]:
    """The rows of each step: every image once in each pass."""
    rows = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rows) < settings.batch:
            rows = torch.cat([rows, torch.randperm(count, generator=rng)])
        yield rows[: settings.batch]
        rows = rows[settings.batch :]


# --- the test ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The pairs of the test: rows [P, 2], whether they show one person [P], the fold [P]."""

    rows: Tensor
    same: Tensor
    fold: Tensor


def pairs_of(people: Sequence[str]) -> Pairs:
    """FOLDS x PAIRS pairs of one person and as many of two, a function of `people` alone."""
    random = np.random.default_rng(0)
    members = [rows.numpy() for rows in person_rows(people)]
    rows, same = [], []
    for part in np.array_split(random.permutation(len(members)), FOLDS):
        mated = np.concatenate([_all_pairs(members[person]) for person in part if len(members[person]) > 1])
        rows.append(random.permutation(mated)[:PAIRS])
        others = [random.choice(part, 2, replace=False) for _ in range(PAIRS)]
        rows.append(np.array([[random.choice(members[a]), random.choice(members[b])] for a, b in others]))
        same += [True] * PAIRS + [False] * PAIRS
    fold = torch.arange(FOLDS).repeat_interleave(2 * PAIRS)
    return Pairs(torch.from_numpy(np.concatenate(rows)), torch.tensor(same), fold)


def _all_pairs(rows: np.ndarray) -> np.ndarray:
    first, second = np.triu_indices(len(rows), 1)
    return np.stack([rows[first], rows[second]], 1)


def measured(embeddings: Tensor, people: Sequence[str], pairs: Pairs) -> dict[str, Any]:
    """Accuracy, and TAR at FARS, each with its interval."""
    found = row_scores(embeddings[pairs.rows[:, 0]], embeddings[pairs.rows[:, 1]], "cosine")
    right = torch.zeros(len(found), dtype=torch.float64)
    for fold in range(FOLDS):
        own = pairs.fold == fold
        right[own] = ((found[own] > best_threshold(found[~own], pairs.same[~own])) == pairs.same[own]).double()
    result = {"accuracy": dataclasses.asdict(accuracy(right, people, pairs))}
    same, different = pair_scores(embeddings, people, "cosine")
    # In the order of pair_scores: by the first row, in blocks, where the second is behind it.
    code = torch.from_numpy(np.unique(np.asarray(people), return_inverse=True)[1])
    first, second = torch.triu_indices(len(people), len(people), 1)
    owners = [people[row] for row in first[code[first] == code[second]].tolist()]
    bootstrap = PersonBootstrap(owners)
    for far in FARS:
        estimate = bootstrap.mean((same > threshold_at_far(different, far)).double())
        assert estimate is not None
        result[f"tar_at_far_{far:g}"] = dataclasses.asdict(estimate)
    return result


def best_threshold(found: Tensor, same: Tensor) -> float:
    """The threshold with the most right decisions."""
    order = found.argsort(descending=True)
    # Accepting the best k pairs: right are the pairs of one person among them, and those of two behind them.
    gain = torch.where(same[order], 1, -1).cumsum(0)
    return (found[order][gain.argmax()] - 1e-7).item()


def accuracy(right: Tensor, people: Sequence[str], pairs: Pairs) -> Estimate:
    """The share of right decisions with its interval: a pair counts as often as both of its people are drawn."""
    bootstrap = PersonBootstrap(people)
    a, b = bootstrap.codes[pairs.rows].unbind(1)
    weights = torch.where(pairs.same, bootstrap.draws[:, a], bootstrap.draws[:, a] * bootstrap.draws[:, b])
    halves = [(weights[:, which] @ right[which]) / weights[:, which].sum(1) for which in (pairs.same, ~pairs.same)]
    low, high = torch.quantile((halves[0] + halves[1]) / 2, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(right.mean().item(), low, high)


# --- the arms ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", required=True, help="data set of `vultus prepare` with a train and a test split")
    parser.add_argument("--synthetic", type=Path, required=True, help="folder of `vultus synthesize` (Parquet)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps, seed=arguments.seed)
    out = make_folder(arguments.out)
    test = PreparedDataset(arguments.real, "test")
    unseen, pairs = photos(test), pairs_of(test.identities)

    def both() -> Faces:
        one, other = real(), generated(arguments.synthetic)
        return Faces(torch.cat([one.images, other.images]), one.people + other.people)

    def real() -> Faces:
        return photos(test.with_split("train"))

    arms: dict[str, Callable[[], Faces]] = {
        "real": real,
        "synthetic": lambda: generated(arguments.synthetic),
        "both": both,
    }
    results: dict[str, Any] = {}
    torch.manual_seed(settings.seed)
    results["untrained"] = measured(Recogniser().embed(unseen.images), test.identities, pairs)
    for name, load in arms.items():
        file = out / f"{name}-{settings.steps}-{settings.seed}.json"
        if not file.is_file():
            network, about = trained(load(), settings, name)
            measurements = measured(network.embed(unseen.images), test.identities, pairs)
            write_json(file, {"settings": dataclasses.asdict(settings), **about, **measurements})
        results[name] = read_json(file)
    results["FaceNet"] = measured(test.embeddings(), test.identities, pairs)
    print(f"test: {len(test)} photos of {len(set(test.identities))} people; {settings}")
    print("| arm | people | images | accuracy | " + " | ".join(f"TAR at FAR {far:g}" for far in FARS) + " |")
    print("|---|---|---|---|" + "---|" * len(FARS))
    for name, row in results.items():
        values = [row[key] for key in ("accuracy", *(f"tar_at_far_{far:g}" for far in FARS))]
        cells = [f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in values]
        print(f"| {name} | {row.get('people', '')} | {row.get('images', '')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

"""Cost and robustness of the invisible watermark: the tables of docs/marks.md.

    python scripts/watermark.py default photos --data data/celeba --out watermark

Faces are generated from the embeddings of the data set's test split with one noise each (seed 0), marked, distorted in
many ways and given to the detector. False alarms are counted on the real photos of both splits, except those to which
the detector's score distribution is fitted. The Fréchet distance is that of `vultus evaluate`, with and without the
watermark. `photos` takes photos of the training split instead of generated faces: what a perfect generator would give.
Writes OUT/watermark.md and OUT/results.json.
"""

import argparse
import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

import vultus
from vultus._download import cache_folder
from vultus._files import make_folder, write_json, write_text
from vultus.data.dataset import Batch, PreparedDataset
from vultus.evaluation.backbones.efficientnet import load_effnet
from vultus.evaluation.extract import Column, FaceSet, GeneratedFaces, RealFaces, extract, vectors
from vultus.evaluation.metrics import FeatureStatistics, FrechetReference, ms_ssim, psnr
from vultus.evaluation.scores import spread
from vultus.images.io import from_pil, to_images, to_pil, to_x
from vultus.images.watermark import ALARM, LOCATION, SPREAD, add_watermark, detect_watermark

FITTED = 4000  # photos of the training split to which the distribution of scores is fitted
Attack = Callable[[Image.Image, np.random.Generator], Image.Image]


class Marked:
    """A FaceSet whose images have the watermark."""

    def __init__(self, faces: FaceSet) -> None:
        # The id contains the watermark's effect: another watermark must not use cached measurements.
        noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
        mark = hashlib.sha256(np.asarray(add_watermark(Image.fromarray(noise))).tobytes()).hexdigest()
        self._faces, self.id, self.title = faces, f"{faces.id} {mark}", f"{faces.title}, marked"

    def __call__(self, rows: np.ndarray, number: int, photos: Batch) -> Tensor:
        images = to_images(self._faces(rows, number, photos)).cpu()
        return to_x(from_pil([add_watermark(to_pil(image)) for image in images]))


# --- distortions ------------------------------------------------------------------------------------------------------


def again(kind: str, quality: int) -> Attack:
    def attack(image: Image.Image, random: np.random.Generator) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality)
        return Image.open(buffer).convert("RGB")

    return attack


def resized(*sides: int) -> Attack:
    def attack(image: Image.Image, random: np.random.Generator) -> Image.Image:
        for side in sides:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        return image

    return attack


def cropped(least: float, most: float, *, back: bool) -> Attack:
    """Crop to between `least` and `most` of width and height, at a random place; `back` resizes to the old size."""

    def attack(image: Image.Image, random: np.random.Generator) -> Image.Image:
        width, height = (round(side * random.uniform(least, most)) for side in image.size)
        left = int(random.integers(0, image.width - width + 1))
        top = int(random.integers(0, image.height - height + 1))
        part = image.crop((left, top, left + width, top + height))
        return part.resize(image.size, Image.Resampling.BICUBIC) if back else part

    return attack


def noisy(sigma: float) -> Attack:
    def attack(image: Image.Image, random: np.random.Generator) -> Image.Image:
        pixels = np.asarray(image) + random.normal(0, sigma, (image.height, image.width, 3))
        return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))

    return attack


ATTACKS: dict[str, Attack] = {
    "nothing": lambda image, random: image,
    "JPEG 75": again("JPEG", 75),
    "to 64×64 and back": resized(64, 128),
    "crop to 115×115": cropped(0.9, 0.9, back=False),
    "crop to 115×115, stretched back": cropped(0.9, 0.9, back=True),
    "0 to 10 % off each axis, stretched back": cropped(0.9, 1, back=True),
    "JPEG 90": again("JPEG", 90),
    "JPEG 50": again("JPEG", 50),
    "WebP 90": again("WEBP", 90),
    "WebP 75": again("WEBP", 75),
    "to 64×64": resized(64),
    "to 256×256": resized(256),
    "to 64×64 and back, then JPEG 75": lambda image, random: again("JPEG", 75)(resized(64, 128)(image, random), random),
    "crop to 115×115, JPEG 75": lambda image, random: again("JPEG", 75)(
        cropped(0.9, 0.9, back=False)(image, random), random
    ),
    "mirrored": lambda image, random: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "noise of 4 grey levels": noisy(4),
    "half the contrast": lambda image, random: image.point([64 + value // 2 for value in range(256)] * 3),
    "Gaussian blur of 1 pixel": lambda image, random: image.filter(ImageFilter.GaussianBlur(1)),
    "crop to 96×96": cropped(0.75, 0.75, back=False),
    "turned by 1 degree": lambda image, random: image.rotate(1, Image.Resampling.BICUBIC),
    "turned by 3 degrees": lambda image, random: image.rotate(3, Image.Resampling.BICUBIC),
    "to 48×48 and back": resized(48, 128),
}


# --- measurements -----------------------------------------------------------------------------------------------------


def survival(images: Tensor) -> dict[str, float]:
    """Share of marked images that are detected after each attack; images uint8 [N, 3, R, R] without the watermark."""
    marked = [add_watermark(to_pil(image)) for image in images]
    shares = {}
    for name, attack in tqdm(ATTACKS.items(), desc="survival"):
        random = np.random.default_rng(0)
        shares[name] = float(np.mean([detect_watermark(attack(image, random)).found for image in marked]))
    return shares


def difference(images: Tensor) -> dict[str, float]:
    x, y = to_x(images), to_x(from_pil([add_watermark(to_pil(image)) for image in images]))
    decibel = psnr(x, y)
    return {"psnr": float(decibel.mean()), "psnr_least": float(decibel.min()), "ms_ssim": float(ms_ssim(x, y).mean())}


def alarms(train: PreparedDataset, test: PreparedDataset) -> dict[str, Any]:
    """Scores of real photos: the Gumbel distribution of the first FITTED, and false alarms among all others."""
    scores = {}
    for name, dataset in (("train", train), ("test", test)):
        parts = np.array_split(np.arange(len(dataset)), max(1, len(dataset) // 64))
        detections = [
            detect_watermark(to_pil(image)) for part in tqdm(parts, desc=name) for image in dataset.batch(part).images
        ]
        scores[name] = np.array([(one.score, one.found) for one in detections])
    fitted, rest = scores["train"][:FITTED], scores["train"][FITTED:]
    location, width = gumbel(fitted[:, 0])
    result: dict[str, Any] = {"location": location, "spread": width, "used": [LOCATION, SPREAD], "alarm": ALARM}
    parts = {"train, not fitted": rest, "test": scores["test"], "both": np.concatenate([rest, scores["test"]])}
    for name, part in parts.items():
        count = int(part[:, 1].sum())
        result[name] = {"photos": len(part), "alarms": count, "share_at_most": upper(count, len(part))}
        result[name]["highest"] = float(part[:, 0].max(initial=0))
    return result


def gumbel(scores: np.ndarray) -> tuple[float, float]:
    """Location and scale of the Gumbel distribution by maximum likelihood."""
    spread = scores.std()
    for _ in range(200):
        weights = np.exp(-scores / spread)
        spread = (spread + scores.mean() - (scores * weights).sum() / weights.sum()) / 2
    return float(-spread * math.log(np.exp(-scores / spread).mean())), float(spread)


def upper(count: int, total: int) -> float:
    """The exact one-sided 95 % bound of a share (Clopper and Pearson 1934)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = [math.comb(total, k) * middle**k * (1 - middle) ** (total - k) for k in range(count + 1)]
        low, high = (middle, high) if sum(terms) > 0.05 else (low, middle)
    return high


def statistics(faces: FaceSet, dataset: PreparedDataset, rows: np.ndarray, column: Column) -> FeatureStatistics:
    features = extract(faces, dataset, rows, [column], batch=32, cache=cache_folder() / "features")
    return FeatureStatistics(column.dim).update(features[column.name][:, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshots", nargs="+", help="snapshots, run folders, `default`, or `photos`")
    parser.add_argument("--data", required=True, help="prepared data set with splits train and test")
    parser.add_argument("--count", type=int, default=1000, help="number of distorted faces")
    parser.add_argument("--out", default="watermark")
    options = parser.parse_args()
    test, train = PreparedDataset(options.data, "test"), PreparedDataset(options.data, "train")
    column = vectors("effnet", load_effnet(), 1)
    real = statistics(RealFaces(), test, np.arange(len(test)), column)
    reference = FrechetReference(real.mean, real.cov)
    results: dict[str, Any] = {"false alarms": alarms(train, test), "snapshots": {}}
    out = make_folder(Path(options.out))
    for name in options.snapshots:
        photos = name == "photos"
        dataset, rows = (train, spread(len(train), len(test))) if photos else (test, np.arange(len(test)))
        faces = RealFaces() if photos else GeneratedFaces(vultus.load(name, device="cpu"), seed=0, device="cpu")
        chosen = rows[spread(len(rows), options.count)]
        parts = np.array_split(chosen, max(1, len(chosen) // 32))
        images = torch.cat([to_images(faces(part, 0, dataset.batch(part))) for part in parts])
        features = [statistics(one, dataset, rows, column) for one in (faces, Marked(faces))]
        plain, marked = (reference.distance(one.mean, one.cov) for one in features)
        results["snapshots"][name] = {
            "survival": survival(images),
            "difference": difference(images),
            "fd_effnet": {"faces": len(rows), "plain": plain, "marked": marked, "change": marked / plain - 1},
        }
        write_json(out / "results.json", results)
    text = table(results, options.count)
    write_text(out / "watermark.md", text)
    print(text)


def table(results: dict[str, Any], count: int) -> str:
    columns = results["snapshots"]
    lines = [f"| found after (of {count}) | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for attack in ATTACKS:
        shares = [f"{100 * one['survival'][attack]:.1f} %" for one in columns.values()]
        lines.append(f"| {attack} | " + " | ".join(shares) + " |")
    rows = {
        "PSNR, mean (least)": lambda one: f"{one['difference']['psnr']:.1f} ({one['difference']['psnr_least']:.1f}) dB",
        "MS-SSIM, mean": lambda one: f"{one['difference']['ms_ssim']:.4f}",
        "fd_effnet without": lambda one: f"{one['fd_effnet']['plain']:.2f}",
        "fd_effnet with": lambda one: f"{one['fd_effnet']['marked']:.2f}",
        "change": lambda one: f"{100 * one['fd_effnet']['change']:+.2f} %",
    }
    for name, cell in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(one) for one in columns.values()) + " |")
    alarm = json.dumps(results["false alarms"], indent=1)
    return "\n".join(lines) + f"\n\n```json\n{alarm}\n```\n"


if __name__ == "__main__":
    main()

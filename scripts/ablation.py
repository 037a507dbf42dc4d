"""Ablation study: the recipe without one of its parts, each variant trained from scratch for the same number of images.

    python scripts/ablation.py --data data/celeba --out runs/ablation [--images 9600] [--seeds 0 1] [--limit 300]

Every run is `vultus train --preset vultus-cpu`, with the settings of `--set` in all of them, for instance
`--set loss.augment=0`. All are then evaluated on the same photos of unseen people and printed as one Markdown table: a
row for each variant, with the mean over the seeds and, for several seeds, the minimum and the maximum. After an
interruption, run it again: it resumes. Twelve minutes on one core for each run of 9,600 images.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from vultus._files import write_json
from vultus.errors import UserError
from vultus.evaluation.compare import compare
from vultus.models.facenet import load_facenet
from vultus.sampling.generator import load

ARMS: dict[str, tuple[str, ...]] = {
    "whole recipe": (),
    "no posterior encoder": ("loss.coded_fraction=0", "loss.mse_weight=0", "loss.perceptual_weight=0"),
    "no perceptual distance": ("loss.perceptual_weight=0",),
    "no reconstruction error": ("loss.mse_weight=0",),
    "no feature discriminator": ("loss.feature_weight=0", "loss.feature_match=0"),
    "no mismatched pairs": ("loss.mismatch=0",),
    "no patch logits": ("loss.patch_weight=0",),
    "no identity loss": ("loss.identity_weight=0", "loss.identity_start=0"),
    "no augmentation": ("loss.augment=0",),
    "no second encoder": ("loss.second_weight=0",),
    "no stage at full resolution": ("generator.fine_width=0", "discriminator.fine_width=0"),
}

# Metric, title, factor, digits.
COLUMNS = (
    ("identity_facenet", "FaceNet cosine", 1, 3),
    ("type1_dlib_far1e-3", "dlib, type I, %", 100, 1),
    ("type2_dlib_far1e-3", "type II, %", 100, 1),
    ("identity_dlib", "dlib, -distance", 1, 3),
    ("fd_effnet", "Fréchet distance", 1, 1),
    ("diversity_noise_stlpips", "diversity over noise", 1, 3),
)


def name_of(arm: str, seed: int) -> str:
    return f"{arm.lower().replace(' ', '-')}-{seed}".replace("'", "")


def value(metrics: dict, row: str) -> float:
    """The metric of that name, or the first whose name continues with the number of images."""
    name = next((key for key in metrics if key == row or key.startswith(row + "_")), None)
    if name is None:
        raise UserError(f"the evaluation has no metric {row}")
    return metrics[name]["value"]


def cell(values: list[float], factor: float, digits: int) -> str:
    text = f"{factor * statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({factor * min(values):.{digits}f} to {factor * max(values):.{digits}f})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--images", type=int, default=9_600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--limit", type=int, default=300, help="photos that each run is evaluated on")
    options = parser.parse_args()
    runs = [(arm, seed, options.out / name_of(arm, seed)) for seed in options.seeds for arm in options.arms]
    for arm, seed, run in runs:
        settings = [f"--{setting}" for setting in (*options.set, *ARMS[arm])]
        command = ["train", "--preset", "vultus-cpu", "--data", options.data, "--out", str(run)]
        command += ["--images", str(options.images), "--sample_every_nimg", str(options.images)]
        command += [f"--seed={seed}", *settings]
        print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "vultus", *command], check=True)
    _, results = compare(
        {run.name: load(str(run), device="cpu") for _, _, run in runs},
        options.data,
        encoder=load_facenet(device="cpu"),
        limit=options.limit,
        device="cpu",
    )
    write_json(options.out / "results.json", results)
    lines = [f"| | {' | '.join(title for _, title, _, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm in options.arms:
        metrics = [results[run.name]["metrics"] for name, _, run in runs if name == arm]
        cells = [cell([value(each, row) for each in metrics], factor, digits) for row, _, factor, digits in COLUMNS]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

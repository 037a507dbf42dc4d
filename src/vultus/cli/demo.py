"""`vultus demo`: faces from the embedded snapshot, then a small training on faces that it made.

It needs no network, no data and no FaceNet.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from vultus._files import folder_lock, make_folder
from vultus.data.shards import PreparedFolder
from vultus.evaluation.plots import curves
from vultus.images.io import to_pil
from vultus.images.xmp import Origin, encode_marked, model_id, save_marked
from vultus.models.snapshot import Snapshot, default_snapshot, gallery, load_snapshot
from vultus.presets import get_preset
from vultus.sampling.generate import render
from vultus.sampling.grids import NOISES, PEOPLE, overview_sheet
from vultus.sampling.population import noise, sample_identities
from vultus.training.run_log import read_stats
from vultus.training.trainer import Budget, train
from vultus.training.validation import unseen_validation

TINY_PEOPLE, TINY_SIDE = 512, 32


def demo(out: str | Path, *, seconds: float = 60.0, seed: int = 0) -> list[Path]:
    """Write faces.png, then train a tiny network for `seconds` on faces made by the embedded snapshot.

    Returns the pictures written: faces.png (a row of noises for each of a few people, and a row from one person to
    another), training.png (what the tiny network learned), and curves.png where matplotlib is installed.
    """
    out = make_folder(out)
    with folder_lock(out, "write"):
        snapshot = load_snapshot(default_snapshot())
        pictures = [out / "faces.png"]
        save_marked(overview_sheet(snapshot, gallery(), seed=seed), pictures[0], Origin(model_id(snapshot.path), seed))
        print(f"{pictures[0]}: {PEOPLE} people who do not exist, {NOISES + 1} noises each, and the way between two")
        data, run = out / "made-faces", out / "tiny-run"
        write_made_faces(snapshot, data, seed=seed)
        config = get_preset("tiny")
        probe = unseen_validation(data, None)
        assert probe is not None
        begun = time.monotonic()
        print(f"training a tiny network on {TINY_PEOPLE} made faces for {seconds:.0f} s", file=sys.stderr)
        budget = Budget(hours=_hours_so_far(run) + seconds / 3600)
        train(config, data=data, out=run, budget=budget, evaluators=[("unseen", probe, config.sample_every_nimg)])
        pictures.append(out / "training.png")
        sheet = Image.open(sorted((run / "samples").glob("[0-9]*.png"))[-1])
        larger = sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST)
        save_marked(larger, pictures[1], Origin(model_id(run / "snapshot.safetensors"), seed), watermark=False)
        lines = read_stats(run / "stats.jsonl")
        errors = [line["mse"] for line in lines if line.get("evaluator") == "unseen"]
        print(
            f"{pictures[1]}: {lines[-1]['cur_nimg']} images in {time.monotonic() - begun:.0f} s; error on made people "
            f"kept out of the training (MSE, values in [-1, 1]): {errors[0]:.3f} before, {errors[-1]:.3f} after"
        )
        if plot(lines, out / "curves.png"):
            pictures.append(out / "curves.png")
            print(f"{pictures[2]}: losses of this training")
        else:
            print("no plot of the losses: it needs matplotlib (pip install 'vultus[plot]')", file=sys.stderr)
    return pictures


def _hours_so_far(run: Path) -> float:
    """Hours that an earlier demo trained in the same folder, so that every demo trains for its full time."""
    if not (run / "snapshot.safetensors").is_file():
        return 0.0
    return float(load_snapshot(run).metadata["hours"])


def write_made_faces(snapshot: Snapshot, folder: Path, *, seed: int, photos: int = 2) -> None:
    """A prepared data set of TINY_PEOPLE random people, `photos` faces each; one person in 8 is for test."""
    prepared = PreparedFolder(make_folder(folder))
    prepared.clean()
    if prepared.manifest_file.is_file():
        return
    prepared.begin({})
    c = sample_identities(snapshot.population, TINY_PEOPLE, seed=seed)
    origin = Origin(model_id(snapshot.path), seed)
    rows: list[dict[str, Any]] = []
    for variant in range(photos):
        z = noise(seed, 0, TINY_PEOPLE, snapshot.network.z_dim, variant=variant)
        for number, image in enumerate(render(snapshot.network, z, c)):
            small = to_pil(image).resize((TINY_SIDE, TINY_SIDE), Image.Resampling.LANCZOS)
            rows.append(
                {
                    "image": encode_marked(small, "JPEG", origin, watermark=False),
                    "embedding": c[number].numpy(),
                    "identity": f"made-{number:04d}",
                    "key": f"made-{number:04d}-{variant}",
                    "split": "test" if number % 8 == 0 else "train",
                }
            )
    entry = prepared.write(0, rows, c.shape[1], [])
    head = {
        "schema": 1,
        "source": f"made by the embedded snapshot, seed {seed}",
        "licence": snapshot.metadata.get("licence"),
        "resolution": TINY_SIDE,
        "crop": snapshot.metadata["crop"],
        "encoder": snapshot.metadata["encoder"] | {"dtype": "float32"},
    }
    prepared.finish([entry], head, {})


def plot(lines: list[dict[str, Any]], path: Path) -> bool:
    """Losses and the error on unseen people over images seen, as a PNG. False if matplotlib is not installed."""
    try:
        figure = curves(lines)
    except ImportError:
        return False
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)
    return True

"""`vultus demo`: faces from the embedded snapshot, then a small training on faces that it generated.

It needs no network, no data and no FaceNet.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vultus._files import atomic_path, folder_lock, make_folder
from vultus._outputs import check_output
from vultus._ranges import Seconds, Seed, checks_arguments
from vultus.cli.options import ArgumentParser

if TYPE_CHECKING:
    from vultus.models.snapshot import Snapshot

IDENTITIES, SIDE = 512, 32  # of the generated data set


def demo_command(arguments: Sequence[str]) -> int:
    """Generate faces and train a small network."""
    parser = ArgumentParser(
        prog="vultus demo", exit_on_error=False, description="Generate faces and train a small network."
    )
    parser.add_argument("--out", type=str, default="vultus-demo", help="folder to write")
    parser.add_argument("--seconds", type=Seconds, default=60.0, help="duration of the training")
    parser.add_argument("--seed", type=Seed, default=0, help="of noise and random identities")
    options = parser.parse_args(list(arguments))
    demo(options.out, seconds=options.seconds, seed=options.seed)
    return 0


@checks_arguments
def demo(out: str | Path, *, seconds: Seconds = 60.0, seed: Seed = 0) -> list[Path]:
    """Write faces.png, then train a small network for `seconds` on faces that the embedded snapshot generates.

    Returns the images written: faces.png (rows of faces of a few random identities, and an interpolation), training.png
    (samples of the small network), and curves.png if matplotlib is installed.
    """
    from PIL import Image

    from vultus.images.xmp import Origin, is_marked, model_id, save_marked
    from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
    from vultus.presets import get_preset
    from vultus.sampling.grids import OVERVIEW_IDENTITIES, OVERVIEW_NOISES, overview_sheet
    from vultus.training.run_log import read_stats
    from vultus.training.trainer import Budget, train
    from vultus.training.validation import unseen_validation

    out = make_folder(out)
    written = [out / name for name in ("faces.png", "training.png", "curves.png")]
    check_output(*written, own=lambda path: is_marked(path) or (out / "made-faces").is_dir())
    with folder_lock(out, "write"):
        snapshot = load_snapshot(default_snapshot())
        images = [out / "faces.png"]
        save_marked(overview_sheet(snapshot, gallery(), seed=seed), images[0], Origin(model_id(snapshot.path), seed))
        print(
            f"{images[0]}: {OVERVIEW_IDENTITIES} people who do not exist, {OVERVIEW_NOISES} faces each, and an "
            f"interpolation between two of them"
        )
        data, run = out / "made-faces", out / "tiny-run"
        write_generated_faces(snapshot, data, seed=seed)
        config = get_preset("tiny")
        validation = unseen_validation(data, None)
        assert validation is not None  # the data set has a test split
        start = time.monotonic()
        print(f"training a small network on {IDENTITIES} generated identities for {seconds:g} s", file=sys.stderr)
        before = _hours_so_far(run)
        budget = Budget(hours=(before or 0.0) + seconds / 3600)
        evaluators = [("unseen", validation, config.sample_every_nimg)]
        train(config, data=data, out=run, budget=budget, evaluators=evaluators, fresh=before is None)
        images.append(out / "training.png")
        samples = Image.open(sorted((run / "samples").glob("[0-9]*.png"))[-1])
        larger = samples.resize((samples.width * 3, samples.height * 3), Image.Resampling.NEAREST)
        save_marked(larger, images[1], Origin(model_id(run / "snapshot.safetensors"), seed), watermark=False)
        lines = read_stats(run / "stats.jsonl")
        errors = [line["mse"] for line in lines if line.get("evaluator") == "unseen"]
        print(
            f"{images[1]}: {lines[-1]['cur_nimg']} images in {time.monotonic() - start:.0f} s; error on identities "
            f"that were not trained on (MSE, values in [-1, 1]): {errors[0]:.3f} before, {errors[-1]:.3f} after"
        )
        if _plot(lines, out / "curves.png"):
            images.append(out / "curves.png")
            print(f"{images[2]}: losses of this training")
        else:
            print("no plot of the losses: it needs matplotlib (pip install 'vultus[plot]')", file=sys.stderr)
    return images


def _hours_so_far(run: Path) -> float | None:
    """Hours of training by earlier demos in the same folder, so that every demo trains for its full time; None if there
    is no checkpoint from which that training could go on."""
    from vultus.training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(run)
    return None if checkpoint is None else float(checkpoint[0]["seconds"]) / 3600


def write_generated_faces(snapshot: Snapshot, folder: Path, *, seed: int, photos: int = 2, side: int = SIDE) -> None:
    """A prepared data set of IDENTITIES random identities with `photos` faces each, side x side pixels; one in 8 is in
    the test split."""
    from PIL import Image

    from vultus._progress import progress
    from vultus.data.shards import PreparedFolder
    from vultus.images.io import to_pil
    from vultus.images.xmp import Origin, encode_marked, model_id
    from vultus.sampling.generate import STEP, render
    from vultus.sampling.latents import noise, sample_identities

    prepared = PreparedFolder(make_folder(folder))
    prepared.clean()
    if prepared.manifest_file.is_file():
        return
    prepared.begin({})
    c = sample_identities(snapshot.population, IDENTITIES, seed=seed)
    origin = Origin(model_id(snapshot.path), seed)
    rows: list[dict[str, Any]] = []
    with progress(photos * IDENTITIES, title="generate a data set", unit="face") as bar:
        for variant, start in itertools.product(range(photos), range(0, IDENTITIES, STEP)):
            z = noise(seed, start, STEP, snapshot.network.z_dim, variant=variant)
            for number, image in enumerate(render(snapshot.network, z, c[start : start + STEP]), start):
                small = to_pil(image).resize((side, side), Image.Resampling.LANCZOS)
                rows.append(
                    {
                        "image": encode_marked(small, "JPEG", origin, watermark=False),
                        "embedding": c[number].numpy(),
                        "identity": f"made-{number:04d}",
                        "key": f"made-{number:04d}-{variant}",
                        "split": "test" if number % 8 == 0 else "train",
                    }
                )
            bar.update(STEP)
    entry = prepared.write(0, rows, {"embedding": c.shape[1]}) | {"skipped": []}
    head = {
        "schema": 1,
        "source": f"generated by the embedded snapshot, seed {seed}",
        "licence": snapshot.metadata.get("licence"),
        "resolution": side,
        "crop": snapshot.metadata["crop"],
        "encoder": snapshot.metadata["encoder"] | {"dtype": "float32"},
    }
    prepared.finish([entry], head, {})


def _plot(lines: list[dict[str, Any]], path: Path) -> bool:
    """Losses and the error on unseen identities over images seen, as a PNG. False if matplotlib is not installed."""
    from vultus.evaluation.plots import curves

    try:
        figure = curves(lines)
    except ImportError:
        return False
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return True

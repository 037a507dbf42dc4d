"""Embed a snapshot in the package as `default`.

    python scripts/embed_snapshot.py RUN/snapshot.safetensors figures.json [--data DIR]

Writes src/vultus/assets/default.safetensors (weights in float16, the results of `vultus evaluate --json` in its
metadata) and gallery.safetensors (embeddings of 64 random identities, sampled from its population prior).
"""

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch

from vultus._files import atomic_path
from vultus.data.dataset import PreparedDataset
from vultus.models.snapshot import load_snapshot, save_snapshot
from vultus.sampling.latents import sample_identities
from vultus.sampling.population import fit_population

ASSETS = Path(__file__).parents[1] / "src" / "vultus" / "assets"
GALLERY, SEED = 64, 7
CONTEXT = (  # keys of the evaluation that the metadata contain
    "data_sha256",
    "split",
    "n_images",
    "n_people",
    "noises",
    "noise_strength",
    "seed",
    "device",
    "networks",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot")
    parser.add_argument("figures", nargs="?", help="JSON of `vultus evaluate SNAPSHOT --json`")
    parser.add_argument("--images", type=int, help="images seen in all, where the run began from others (--init)")
    parser.add_argument("--hours", type=float, help="hours of training in all")
    parser.add_argument("--licence", help="terms of the data, where `vultus prepare` was not given them")
    parser.add_argument("--data", help="fit the population prior to the training split of this data set")
    options = parser.parse_args()
    snapshot = load_snapshot(options.snapshot)
    if options.data:
        snapshot.population = fit_population(PreparedDataset(options.data).embeddings())
    given = {"licence": options.licence, "cur_nimg": options.images, "hours": options.hours}
    snapshot.metadata.update({key: value for key, value in given.items() if value})
    if options.figures:
        figures = json.loads(Path(options.figures).read_text(encoding="utf-8"))
        result = next(iter(figures.values()))
        rows = {name: {key: round(value, 5) for key, value in row.items()} for name, row in result["metrics"].items()}
        context = {key: result["context"][key] for key in CONTEXT}
        snapshot.metadata["metrics"] = {"context": context, "metrics": rows, "alarms": result["alarms"]}
    ASSETS.mkdir(exist_ok=True)
    path = ASSETS / "default.safetensors"
    save_snapshot(
        path,
        network=snapshot.network,
        population=snapshot.population,
        metadata=snapshot.metadata,
        dtype=torch.float16,
    )
    embeddings = sample_identities(load_snapshot(path).population, GALLERY, seed=SEED)
    with atomic_path(ASSETS / "gallery.safetensors") as temporary:
        temporary.write_bytes(safetensors.torch.save({"embeddings": embeddings}))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {GALLERY} identities in the gallery")


if __name__ == "__main__":
    main()

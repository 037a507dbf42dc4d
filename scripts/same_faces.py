"""How far faces of one seed differ between threads, batch sizes, dtypes, runtimes and instruction sets.

    python scripts/same_faces.py --people 256 --seed 0
    python scripts/same_faces.py --photos FOLDER      # embeddings of photos, too: FaceNet in float32

Every row is a process of its own, compared with the first one: one thread, float32, calls of 16 faces, as
`vultus generate` does. Instruction sets that are forced (oneDNN, ATen, MKL) are those of older processors. Levels are
values of pixels, 0 to 255. FaceNet's cosine between the two versions of a face is there if its weights are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SSE4 = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


@dataclass(frozen=True)
class Variant:
    """What differs from the first row; `batch` 0: render(), whose calls are of 16 faces."""

    threads: int = 1
    batch: int = 0
    dtype: str = "float32"
    onnx: bool = False
    environment: dict[str, str] = field(default_factory=dict)


VARIANTS = {
    "one thread": Variant(),
    "one thread, again": Variant(),
    "2 threads": Variant(threads=2),
    "calls of 1 face": Variant(batch=1),
    "calls of 64 faces": Variant(batch=64),
    "instructions up to AVX2": Variant(environment=AVX2),
    "instructions up to SSE4": Variant(environment=SSE4),
    "ONNX Runtime, float32": Variant(onnx=True),
    "bfloat16": Variant(dtype="bfloat16"),
}


def work(snapshot: str, people: int, seed: int, photos: str | None, variant: Variant, out: str) -> None:
    """Write the images (uint8) and, with `photos`, their embeddings."""
    import torch

    torch.set_num_threads(variant.threads)
    from vultus.images.io import to_images
    from vultus.models.snapshot import load_snapshot
    from vultus.sampling.generate import render
    from vultus.sampling.latents import noise, sample_identities

    loaded = load_snapshot(snapshot)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[variant.dtype]
    c = sample_identities(loaded.population, people, seed=seed)
    z = noise(seed, 0, people, loaded.network.z_dim)
    if variant.batch:
        with torch.inference_mode():
            rows = zip(z.split(variant.batch), c.split(variant.batch), strict=True)
            images = torch.cat([to_images(loaded.network(*row)) for row in rows])
    else:
        images = render(loaded.network, z, c, dtype)
    arrays = {"images": images.numpy()}
    if photos is not None:
        from vultus import embed

        arrays["embeddings"] = embed(sorted(Path(photos).iterdir())).numpy()
    np.savez(out, **arrays)


def run(snapshot: str, variant: Variant, out: Path, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """The arrays of a process of its own."""
    threads = {"OMP_NUM_THREADS": str(variant.threads), "MKL_NUM_THREADS": str(variant.threads)}
    values = json.dumps([snapshot, options.people, options.seed, options.photos, variant.__dict__, str(out)])
    environment = os.environ | threads | variant.environment
    subprocess.run([sys.executable, __file__, "--worker", values], env=environment, check=True)
    with np.load(out) as arrays:
        return dict(arrays)


def compare(first: dict[str, np.ndarray], other: dict[str, np.ndarray], facenet: Any) -> dict[str, float]:
    """Differences of the images, and of the embeddings where there are some."""
    levels = np.abs(first["images"].astype(np.int16) - other["images"])
    row = {
        "differing_per_million": float((levels > 0).mean() * 1e6),
        "largest_level": float(levels.max()),
        "mean_level": float(levels.mean()),
    }
    if facenet is not None:
        import torch

        from vultus.images.io import to_x

        a, b = (
            torch.cat([facenet.embed(to_x(part)) for part in torch.from_numpy(arrays["images"]).split(32)])
            for arrays in (first, other)
        )
        row["lowest_cosine"] = float((a * b).sum(1).min())
    if "embeddings" in first:
        row["largest_difference_of_embeddings"] = float(np.abs(first["embeddings"] - other["embeddings"]).max())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--snapshot", default="default")
    parser.add_argument("--people", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", help="folder of photos whose embeddings are compared")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS)[1:], default=list(VARIANTS)[1:])
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        *values, variant, out = json.loads(options.worker)
        work(*values, Variant(**variant), out)
        return
    from vultus._download import weights_available
    from vultus.models.facenet import FACENET_WEIGHTS, load_facenet

    facenet = load_facenet() if weights_available(*FACENET_WEIGHTS) else None
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        exported = f"{folder}/model.onnx"
        if any(VARIANTS[name].onnx for name in options.only):
            from vultus import export_onnx

            export_onnx(options.snapshot, exported)
        arrays = [
            run(exported if VARIANTS[name].onnx else options.snapshot, VARIANTS[name], Path(folder, "a.npz"), options)
            for name in ("one thread", *options.only)
        ]
        for name, other in zip(options.only, arrays[1:], strict=True):
            rows[name] = row = compare(arrays[0], other, facenet)
            print(f"{name:<24}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

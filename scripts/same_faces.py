"""How far faces of one seed differ between threads, batch sizes, dtypes, runtimes and instruction sets.

    python scripts/same_faces.py --people 256 --seed 0
    python scripts/same_faces.py --photos FOLDER      # embeddings of photos, too: FaceNet in float32

Every row is a process of its own, compared with the first one: one thread, float32, calls of 16 faces, as
`vultus generate` does. Instruction sets that are forced (oneDNN, ATen, MKL, OpenBLAS) are those of older processors.

    largest_output          largest difference of the generator's outputs, in [-1, 1]
    differing_per_million   values of pixels that differ, of a million
    largest_level           by at most so many of 255 levels
    marked_per_million      as differing_per_million, of faces with the watermark
    lowest_cosine           of FaceNet's embeddings of the two versions of a face, if its weights are here
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

AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
SSE4 = {
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OPENBLAS_CORETYPE": "Nehalem",
}


@dataclass(frozen=True)
class Variant:
    """What differs from the first row; `batch` 0: render(), whose calls are of 16 faces."""

    threads: int = 1
    batch: int = 0
    dtype: str = "float32"
    onnx: str = ""  # precision of an exported model
    environment: dict[str, str] = field(default_factory=dict)


VARIANTS = {
    "one thread": Variant(),
    "one thread, again": Variant(),
    "2 threads": Variant(threads=2),
    "4 threads": Variant(threads=4),
    "calls of 1 face": Variant(batch=1),
    "calls of 7 faces": Variant(batch=7),
    "calls of 64 faces": Variant(batch=64),
    "instructions up to AVX2": Variant(environment=AVX2),
    "instructions up to SSE4": Variant(environment=SSE4),
    "MKL, compatible": Variant(environment={"MKL_CBWR": "COMPATIBLE"}),
    "ONNX Runtime, float32": Variant(onnx="float32"),
    "ONNX Runtime, float16": Variant(onnx="float16"),
    "ONNX Runtime, int8": Variant(onnx="int8"),
    "bfloat16": Variant(dtype="bfloat16"),
}


def work(snapshot: str, people: int, seed: int, photos: str | None, variant: Variant, out: str) -> None:
    """Write the outputs (float32), images and marked images (uint8), and with `photos` their embeddings."""
    import torch

    torch.set_num_threads(variant.threads)
    from vultus.images.io import to_images
    from vultus.images.watermark import mark_pixels
    from vultus.models.facenet import DTYPES
    from vultus.models.snapshot import load_snapshot
    from vultus.sampling.generate import render
    from vultus.sampling.latents import noise, sample_identities

    loaded = load_snapshot(snapshot)
    c = sample_identities(loaded.population, people, seed=seed)
    z = noise(seed, 0, people, loaded.network.z_dim)
    outputs: list[torch.Tensor] = []
    loaded.network.register_forward_hook(lambda network, inputs, x: outputs.append(x))
    if variant.batch:
        with torch.inference_mode():
            rows = zip(z.split(variant.batch), c.split(variant.batch), strict=True)
            images = torch.cat([to_images(loaded.network(*row)) for row in rows])
    else:
        images = render(loaded.network, z, c, DTYPES[variant.dtype])
    x = torch.cat(outputs)[:people].contiguous().numpy()
    arrays = {"x": x, "images": images.numpy(), "marked": mark_pixels(images.numpy())}
    if photos is not None:
        from vultus import embed

        arrays["embeddings"] = embed(sorted(Path(photos).iterdir())).numpy()
    np.savez(out, **arrays)


def run(snapshot: str, variant: Variant, out: Path, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """The arrays of a process of its own."""
    threads = {"OMP_NUM_THREADS": str(variant.threads), "MKL_NUM_THREADS": str(variant.threads)}
    threads["OPENBLAS_NUM_THREADS"] = "1"  # as `vultus` sets it
    values = json.dumps([snapshot, options.people, options.seed, options.photos, variant.__dict__, str(out)])
    environment = os.environ | threads | variant.environment
    subprocess.run([sys.executable, __file__, "--worker", values], env=environment, check=True)
    with np.load(out) as arrays:
        return dict(arrays)


def differing(first: np.ndarray, other: np.ndarray) -> float:
    """Values that differ, of a million."""
    return float((first != other).mean() * 1e6)


def compare(first: dict[str, np.ndarray], other: dict[str, np.ndarray], facenet: Any) -> dict[str, float]:
    """Differences of the images, and of the embeddings where there are some."""
    levels = np.abs(first["images"].astype(np.int16) - other["images"])
    row = {
        "largest_output": float(np.abs(first["x"] - other["x"]).max()),
        "differing_per_million": differing(first["images"], other["images"]),
        "largest_level": float(levels.max()),
        "mean_level": float(levels.mean()),
        "marked_per_million": differing(first["marked"], other["marked"]),
    }
    if facenet is not None and levels.any():
        if "of_faces" not in first:
            first["of_faces"] = embeddings(first["images"], facenet)
        cosines = (first["of_faces"] * embeddings(other["images"], facenet)).sum(1)
        row |= {"lowest_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    if "embeddings" in first:
        row["largest_difference_of_embeddings"] = float(np.abs(first["embeddings"] - other["embeddings"]).max())
    return row


def embeddings(images: np.ndarray, facenet: Any) -> np.ndarray:
    """FaceNet's embeddings of images uint8 [N, 3, R, R]: float64 [N, 512]."""
    import torch

    from vultus.images.io import to_x

    with torch.inference_mode():
        parts = [facenet.embed(to_x(part)).double() for part in torch.from_numpy(images).split(32)]
    return torch.cat(parts).numpy()


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
    import torch

    from vultus._download import weights_available
    from vultus.models.facenet import FACENET_WEIGHTS, load_facenet

    facenet = load_facenet(dtype=torch.float32) if weights_available(*FACENET_WEIGHTS) else None
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "arrays.npz")
        first = run(options.snapshot, VARIANTS["one thread"], out, options)
        for name in options.only:
            variant, snapshot = VARIANTS[name], options.snapshot
            if variant.onnx:
                from vultus import export_onnx

                snapshot = f"{folder}/{variant.onnx}.onnx"
                export_onnx(options.snapshot, snapshot, precision=variant.onnx)
            rows[name] = row = compare(first, run(snapshot, variant, out, options), facenet)
            print(f"{name:<24}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

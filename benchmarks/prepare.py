"""Speed of `vultus prepare` as a fraction of the speed of FaceNet alone.

    VULTUS_WEIGHTS=... python benchmarks/prepare.py --source ../shared/celeba --images 512

In one process and alternately: (a) the forward pass of FaceNet on crops in memory, (b) `vultus prepare` with the same
encoder, batch and threads. The second ratio is of CPU time, which other work on the machine affects less. Then the
difference between bfloat16 and float32 embeddings of the photos.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vultus.data.prepare import prepare
from vultus.data.sources import open_source
from vultus.images.io import centre_crop, decode_image, from_pil, to_x
from vultus.models.facenet import DTYPES, FaceNet, fastest_dtype, load_facenet


def crops_of(source: str, count: int, size: int, fraction: float) -> torch.Tensor:
    """The crops of the first `count` photos of `source`, x [count, 3, size, size]."""
    items = itertools.chain.from_iterable(part.items(None) for part in open_source(source).parts)
    photos = (decode_image(item.read()) for item in itertools.islice(items, count))
    return to_x(from_pil([centre_crop(photo, size, fraction) for photo in photos]))


def clock() -> tuple[float, float]:
    """Wall-clock seconds, and seconds of CPU time of this process."""
    return time.perf_counter(), time.process_time()


def forward_rates(encoder: FaceNet, batches: list[torch.Tensor]) -> tuple[float, float]:
    """Images per second of wall-clock time and of CPU time, FaceNet alone; one thread for each batch, as in prepare."""
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def forward(x: torch.Tensor) -> None:
        encoder.embed_crop(x)

    wall, cpu = clock()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(forward, batches))
    torch.set_num_threads(threads)
    wall, cpu = (now - then for now, then in zip(clock(), (wall, cpu), strict=True))
    count = sum(map(len, batches))
    return count / wall, count / cpu


def prepare_rates(encoder: FaceNet, source: str, count: int, batch: int, **workers: Any) -> tuple[float, float]:
    """The same for `vultus prepare`; the CPU time is without that of `workers`."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        wall, cpu = clock()
        manifest = prepare(source, Path(folder) / "out", limit=count, batch=batch, encoder=encoder, **workers)
        wall, cpu = (now - then for now, then in zip(clock(), (wall, cpu), strict=True))
    count = manifest["counts"]["images"]
    return count / wall, count / cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="../shared/celeba")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--workers", type=int, help="measure `vultus prepare` with this number of processes too")
    parser.add_argument("--engine", choices=("processes", "ray"), default="processes", help="of --workers")
    options = parser.parse_args()

    dtype = fastest_dtype("cpu") if options.dtype == "auto" else DTYPES[options.dtype]
    encoder = load_facenet(dtype=dtype)
    crops = crops_of(options.source, options.images, encoder.size, encoder.crop)
    batches = list(crops.split(options.batch))
    forward_rates(encoder, batches[:2])
    prepare_rates(encoder, options.source, 2 * options.batch, options.batch)
    print(f"{len(crops)} images, batch {options.batch}, {dtype}, {torch.get_num_threads()} threads", flush=True)
    ratios, cpu_ratios = [], []
    for _ in range(options.rounds):
        alone, alone_cpu = forward_rates(encoder, batches)
        whole, whole_cpu = prepare_rates(encoder, options.source, len(crops), options.batch)
        ratios.append(whole / alone)
        cpu_ratios.append(whole_cpu / alone_cpu)
        print(
            f"FaceNet alone {alone:6.1f} images/s   prepare {whole:6.1f} images/s   {ratios[-1]:.1%}   "
            f"(CPU time {cpu_ratios[-1]:.1%})",
            flush=True,
        )
        if options.workers:
            workers = {"workers": options.workers, "engine": options.engine}
            several, _ = prepare_rates(encoder, options.source, len(crops), options.batch, **workers)
            print(
                f"{options.workers} workers ({options.engine}), with their start: {several:.1f} images/s, "
                f"{several / whole:.1%} of one process",
                flush=True,
            )
    median, cpu_median = statistics.median(ratios), statistics.median(cpu_ratios)
    print(f"median {median:.1%} of FaceNet's forward pass (CPU time {cpu_median:.1%})")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")

    faces = crops[:256].split(options.batch)
    with torch.inference_mode():
        exact, coarse = (
            torch.cat([net.embed_crop(x) for x in faces])
            for net in (load_facenet(dtype=torch.float32), load_facenet(dtype=torch.bfloat16))
        )
    away = 1 - (exact * coarse).sum(1)
    print(f"bfloat16 against float32, {len(away)} faces: 1 - cosine max {away.max():.1e}, mean {away.mean():.1e}")


if __name__ == "__main__":
    main()

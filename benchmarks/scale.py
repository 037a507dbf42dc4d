"""Time and memory against the number of images, and what 100 million of them cost.

    python benchmarks/scale.py --out scale [--stages prepare stream train synthesize] [--sizes 1000 3000 10000]
        [--max-growth 100]
    python benchmarks/scale.py --project 1e8

Each size of a stage is a process of its own, whose records are made anew: 64 faces that the embedded snapshot
generates, again and again under other keys, in Parquet files of row groups of 500.

prepare      vultus prepare at 128 pixels, with FaceNet
stream       reading, cropping, mixing and keeping embeddings, one pass; a projection takes the place of FaceNet
train        vultus train --preset tiny, one pass over prepared records of 32 pixels
synthesize   vultus synthesize without a judge, 10 faces of each person

Time is fitted as a + b n, the peak memory of all processes of a stage (RSS; pages that they share count for each) as
c + d n. If memory grows by more than
--max-growth MB per 100,000 images, the exit code is 1.

--project computes hours, storage and network for so many images from rates of one processor (measured, see
docs/scale.md) and from FLOPs and the share of a GPU's peak that is assumed. It runs nothing.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

FACES, ROWS, SIDE = 64, 500, 128  # different records; rows of a row group; pixels
STAGES = ("prepare", "stream", "train", "synthesize")
POLL = 0.1  # seconds between two readings of the memory


# --- records ---------------------------------------------------------------------------------------------------------


def faces() -> list[bytes]:
    """JPEG files of generated faces."""
    from vultus import load
    from vultus.images.io import encode_jpeg, to_pil

    generator = load("default", device="cpu")
    images = generator.sample(generator.sample_identities(FACES, seed=0))[:, 0]
    return [encode_jpeg(to_pil(image)) for image in images]


def write_records(folder: Path, count: int, images: list[bytes]) -> None:
    """Parquet files in the schema of flwrlabs/celeba, 20 records of each person."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("celeb_id", pa.int64())])
    with pq.ParquetWriter(folder / "train-00000.parquet", schema) as writer:
        for start in range(0, count, ROWS):
            numbers = range(start, min(start + ROWS, count))
            cells = [{"bytes": images[number % FACES], "path": f"{number:09d}.jpg"} for number in numbers]
            people = [number // 20 for number in numbers]
            writer.write_table(pa.table({"image": pa.array(cells, kind), "celeb_id": people}, schema))


def write_prepared(folder: Path, count: int, images: list[bytes]) -> None:
    """A prepared data set of 32 pixels with random embeddings."""
    from PIL import Image

    from vultus.data.shards import PreparedFolder
    from vultus.images.io import encode_jpeg

    folder.mkdir(parents=True)
    prepared, random = PreparedFolder(folder), np.random.default_rng(0)
    prepared.begin({})
    small = [encode_jpeg(Image.open(io.BytesIO(image)).resize((32, 32))) for image in images]
    entries = []
    for number, start in enumerate(range(0, count, 1000)):
        rows = []
        for row in range(start, min(start + 1000, count)):
            c = random.standard_normal(512).astype(np.float32)
            person = f"{row // 20:07d}"
            rows.append(
                {
                    "image": small[row % FACES],
                    "embedding": c / np.linalg.norm(c),
                    "identity": person,
                    "key": f"{row:09d}",
                }
                | {"split": "test" if row // 20 % 10 == 0 else "train"}
            )
        entries.append(prepared.write(number, rows, {"embedding": 512}) | {"skipped": []})
    encoder = {"id": "random", "dim": 512, "weights_sha256": "0" * 64, "dtype": "float32"}
    head = {"schema": 1, "source": "generated", "licence": None, "resolution": 32, "encoder": encoder}
    prepared.finish(entries, head | {"crop": {"kind": "centre", "encoder_fraction": 0.8}}, {})


# --- measuring -------------------------------------------------------------------------------------------------------


def command(stage: str, count: int, folder: Path, images: list[bytes]) -> list[str]:
    """Write the records of a stage, and return the command that is measured."""
    vultus = [sys.executable, "-m", "vultus"]
    if stage == "synthesize":
        people = ["--people", str(count // 10), "--per-person", "10", "--judge", "none"]
        return [*vultus, "synthesize", *people, "--out", str(folder / "out")]
    if stage == "train":
        write_prepared(folder / "data", count, images)
        rare = [f"--{name}_every_nimg={10**9}" for name in ("sample", "checkpoint")]
        preset = ["--preset", "tiny", "--epochs", "1", "--device", "cpu", *rare]
        return [*vultus, "train", *preset, "--data", str(folder / "data"), "--out", str(folder / "run")]
    write_records(folder / "records", count, images)
    if stage == "prepare":
        return [*vultus, "prepare", str(folder / "records"), "--out", str(folder / "out"), "--device", "cpu"]
    return [sys.executable, __file__, "--out", str(folder), "--stream", str(folder / "records")]


def measured(arguments: list[str], log: Path) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a command and the processes that it starts."""
    start, peak = time.monotonic(), 0.0
    with open(log, "w") as file:
        process = psutil.Popen(arguments, stdout=file, stderr=file)
        while process.poll() is None:
            total = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    total += each.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            peak = max(peak, total / 1e6)
            time.sleep(POLL)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments[1:4])}: failed, see {log}")
    return time.monotonic() - start, peak


def read_stream(source: str) -> None:
    """One pass over a stream; runs in a process of its own."""
    import torch
    import torch.nn.functional as F

    from vultus.data.dataset import batches
    from vultus.data.stream.dataset import StreamedDataset
    from vultus.data.stream.options import StreamOptions

    class Projection:
        id, dim, weights_sha256, crop, size, dtype = "projection", 512, "0" * 64, 0.8, 16, torch.float32

        def embed_crop(self, x: torch.Tensor) -> torch.Tensor:
            return F.normalize(x.flatten(1)[:, : self.dim])

        embed = embed_crop

    dataset = StreamedDataset(source, StreamOptions(resolution=32), encoder=Projection())
    photos = dataset.with_split("train")
    for nimg, _ in batches(photos, batch=50, cur_nimg=0, seed=0):
        if nimg + 50 >= len(photos):
            break
    dataset.close()


@dataclass(frozen=True)
class Fit:
    """A straight line through measurements: start + slope * n; `error`: largest distance as a share of the value."""

    start: float
    slope: float
    error: float

    @classmethod
    def of(cls, sizes: list[int], values: list[float]) -> Fit:
        slope, start = np.polyfit(sizes, values, 1)
        fitted = start + slope * np.asarray(sizes)
        return cls(float(start), float(slope), float(np.max(np.abs(fitted - values) / np.asarray(values))))


def measure(options: argparse.Namespace) -> bool:
    """Print the table. Returns whether memory is flat."""
    images, flat, out = faces(), True, options.out
    print("| stage | images | seconds | peak memory, MB |\n|---|---|---|---|")
    fits = []
    for stage in options.stages:
        rows = []
        for size in options.sizes:
            folder = out / f"{stage}-{size}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            rows.append(measured(command(stage, size, folder, images), out / f"{stage}-{size}.log"))
            print(f"| {stage} | {size:,} | {rows[-1][0]:.1f} | {rows[-1][1]:.0f} |", flush=True)
            shutil.rmtree(folder)
        seconds, memory = (Fit.of(options.sizes, list(values)) for values in zip(*rows, strict=True))
        growth = 1e5 * memory.slope
        flat = flat and growth <= options.max_growth
        time_text = f"{seconds.start:.1f} s + n / {1 / seconds.slope:.1f} per s, within {seconds.error:.0%}"
        fits.append(f"| {stage} | {time_text} | {memory.start:.0f} MB + {growth:.0f} MB per 100,000 |")
    print("\n| stage | time of n images | memory |\n|---|---|---|", *fits, sep="\n")
    return flat


# --- projection ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """`peak`: bfloat16 TFLOP/s of a GPU by its data sheet; `network`: GB/s of a node, to the disk and other nodes."""

    name: str
    nodes: int
    gpus: int  # of a node
    peak: float
    cores: int  # of a node
    network: float

    @property
    def flops(self) -> float:
        return self.nodes * self.gpus * self.peak * 1e12


CLUSTERS = (
    Cluster("1 node of 8 H100", 1, 8, 989, 96, 12.5),
    Cluster("4 nodes of 8 A100", 4, 8, 312, 96, 12.5),
    Cluster("1 server of 64 cores", 1, 0, 0, 64, 1.25),
)


@dataclass(frozen=True)
class Rates:
    """What the projection is computed from; the defaults are those of docs/scale.md."""

    photo: float = 4_593  # bytes of a source photo; measured: CelebA
    record: float = 10_992  # bytes of a prepared record at 128 pixels; measured
    decode: float = 505  # photos decoded and cropped per second and core; measured
    read: float = 900  # prepared records read per second and core; measured
    facenet: float = 51  # photos through FaceNet per second and core; measured
    train: float = 7  # images trained per second and core, vultus-cpu; measured
    facenet_flops: float = 2.84e9  # of a photo; computed
    train_flops: float = 33.2e9  # of an image, vultus-base; computed
    parameters: float = 35.8e6  # whose gradients are averaged, vultus-base; computed
    batch: float = 64  # images of a GPU in a step
    utilisation: float = 0.25  # share of the peak that is reached; assumed
    passes: float = 10  # over the data


def hours(count: float, per_second: float) -> float:
    return count / per_second / 3600


def projected(cluster: Cluster, rates: Rates, count: float) -> dict[str, dict[str, float]]:
    """Hours of each part of each stage on a cluster, where all parts of a stage run at the same time."""
    cores, network = cluster.nodes * cluster.cores, cluster.nodes * cluster.network * 1e9
    gpus = cluster.nodes * cluster.gpus
    prepare = {"read photos": count * rates.photo / network / 3600, "decode": hours(count, rates.decode * cores)}
    seen = count * rates.passes
    train = {"read records": seen * rates.record / network / 3600, "decode": hours(seen, rates.read * cores)}
    if gpus:
        speed = cluster.flops * rates.utilisation
        prepare["FaceNet"] = hours(count, speed / rates.facenet_flops)
        train["training step"] = hours(seen, speed / rates.train_flops)
        if cluster.nodes > 1:
            # A ring all-reduce sends and receives twice the gradients, over the network of each node.
            moved = 2 * 4 * rates.parameters * (cluster.nodes - 1) / cluster.nodes
            train["all-reduce"] = seen / (rates.batch * gpus) * moved / (cluster.network * 1e9) / 3600
    else:
        prepare["FaceNet"] = hours(count, rates.facenet * cores)
        train["training step"] = hours(seen, rates.train * cores)
    return {"prepare": prepare, "train": train}


def project(count: float, rates: Rates) -> None:
    print(f"{count:,.0f} photos: {count * rates.photo / 1e12:.1f} TB; prepared at 128 pixels: "
          f"{count * rates.record / 1e12:.2f} TB; embeddings alone: {count * 2048 / 1e9:.0f} GB\n")  # fmt: skip
    print("| cluster | stage | hours of each part, the longest first | GPU hours |\n|---|---|---|---|")
    for cluster in CLUSTERS:
        for stage, parts in projected(cluster, rates, count).items():
            order = sorted(parts.items(), key=lambda part: -part[1])
            shown = ", ".join(f"{name} {value:.1f}" for name, value in order)
            used = f"{order[0][1] * cluster.nodes * cluster.gpus:.0f}" if cluster.gpus else ""
            print(f"| {cluster.name} | {stage} | {shown} | {used} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scale"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--max-growth", type=float, default=100.0, help="MB of memory per 100,000 images")
    parser.add_argument("--project", type=float, help="number of images")
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    for name, value in vars(Rates()).items():
        parser.add_argument(f"--{name}", type=float, default=value, help="of --project")
    options = parser.parse_args()
    if options.stream:
        read_stream(options.stream)
    elif options.project:
        project(options.project, Rates(**{name: getattr(options, name) for name in vars(Rates())}))
    elif not measure(options):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Training from a stream against training from a prepared data set of the same photos, measured in one run.

    python benchmarks/stream.py --source celeba/ --data data/celeba [--preset reference-dcgan] [--images 3200]
        [--rounds 3] [--data-only]

A server on loopback (tests/range_server.py) serves the Parquet files of `--source`; `--data` is what `vultus prepare`
made of them. The embeddings are in the cache, as from the second pass on: what is measured is reading, decoding and
mixing. The two alternate, so that a change of the machine's speed affects both; the ratio is that of the medians.
Without --data-only each batch is a training step too. The mixing is measured as the distance in the source between
neighbours of a batch, in relation to a permutation of all photos.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from range_server import RangeServer
from vultus._prefetch import Prefetch
from vultus.data.dataset import Batch, PreparedDataset, batches
from vultus.data.stream.dataset import StreamedDataset
from vultus.data.stream.options import StreamOptions
from vultus.models.facenet import fastest_dtype
from vultus.presets import fitted, get_preset
from vultus.training.environment import peak_memory
from vultus.training.methods import METHODS


def mixing(dataset: StreamedDataset, keys: list[str]) -> str:
    """How far apart in the source the neighbours of a batch are."""
    train = [key for part in dataset_keys(dataset) for key in part]
    places = {key: number for number, key in enumerate(train)}
    apart = np.abs(np.diff([places[key] for key in keys]))
    whole = np.abs(np.diff(np.random.default_rng(0).permutation(len(train))))
    return (
        f"neighbours of a batch are {apart.mean():.0f} photos apart in the source, {np.median(apart):.0f} in the "
        f"median; in a permutation of all {len(train)}: {whole.mean():.0f} and {np.median(whole):.0f} "
        f"(ratio {apart.mean() / whole.mean():.2f})"
    )


def dataset_keys(dataset: StreamedDataset) -> Iterator[list[str]]:
    for block in dataset._chosen:
        yield [item.key for item in dataset._shards.items(dataset._opened[block.shard], block.group, block.rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, type=Path, help="folder of Parquet files")
    parser.add_argument("--data", required=True, help="prepared data set of these files")
    parser.add_argument("--preset", default="reference-dcgan")
    parser.add_argument("--images", type=int, default=3200, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mix", type=int, default=StreamOptions.mix)
    parser.add_argument("--workers", type=int, default=StreamOptions.workers)
    parser.add_argument("--data-only", action="store_true", help="no training step")
    options = parser.parse_args()
    prepared = PreparedDataset(options.data, "train")
    config = fitted(get_preset(options.preset), prepared.resolution)
    batch = config.optim.batch
    model = METHODS[config.method](config, device="cpu", dtype=fastest_dtype("cpu"), encoder=None)
    with RangeServer(options.source) as server:
        given = StreamOptions(resolution=prepared.resolution, mix=options.mix, workers=options.workers)
        dataset = StreamedDataset(f"{server.address}/*.parquet", given)
        streamed = dataset.with_split("train")
        assert isinstance(streamed, StreamedDataset)
        start = time.perf_counter()
        for _ in streamed.embedding_chunks():
            pass
        sources = {"prepared": prepared, "streamed": streamed}
        with (
            Prefetch(batches(prepared, batch=batch, cur_nimg=0, seed=0), 3) as one,
            Prefetch(batches(streamed, batch=batch, cur_nimg=0, seed=0), 3) as two,
        ):
            iterators = {"prepared": one, "streamed": two}
            keys: list[str] = []

            def rate(name: str) -> float:
                start = time.perf_counter()
                for _ in range(options.images // batch):
                    nimg, item = next(iterators[name])
                    use(name, nimg, item)
                return options.images // batch * batch / (time.perf_counter() - start)

            def use(name: str, nimg: int, item: Batch) -> None:
                if name == "streamed":
                    keys.extend(item.keys)
                if not options.data_only:
                    model.step(item.images, item.c, nimg)

            # A pass first: from then on all embeddings are in the cache.
            passed = 0
            while passed < len(streamed):
                _, item = next(two)
                keys.extend(item.keys)
                passed += batch
            print(f"first pass: {len(streamed) / (time.perf_counter() - start):.1f} images/s, no training")
            print(mixing(dataset, keys[: len(streamed)]))
            rates: dict[str, list[float]] = {name: [] for name in sources}
            for _ in range(options.rounds):
                for name in rates:
                    rates[name].append(rate(name))
    what = "data only" if options.data_only else f"{options.preset}, batch {batch}"
    print(f"{what}, {prepared.resolution}x{prepared.resolution}, mix {options.mix}, {options.workers} workers")
    for name, values in rates.items():
        print(f"{name:<9} {statistics.median(values):7.1f} images/s   ({', '.join(f'{r:.1f}' for r in values)})")
    print(f"ratio     {statistics.median(rates['streamed']) / statistics.median(rates['prepared']):7.2f}")
    for name, mib in peak_memory("cpu").items():
        print(f"{name} {mib:.0f}")


if __name__ == "__main__":
    main()

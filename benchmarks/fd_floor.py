"""The Fréchet distance between photos and photos: the floor for every generator.

    python benchmarks/fd_floor.py --data data/celeba

Takes all N photos of the test split and N photos spread evenly over the training split (other people), in
EfficientNet-lite0 features as `vultus evaluate` computes them.
"""

import argparse

import numpy as np
import torch

from vultus.dataset import PreparedDataset
from vultus.features import load_effnet
from vultus.images import to_x
from vultus.metrics import FeatureStatistics, frechet_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared data set")
    options = parser.parse_args()
    network = load_effnet()
    count = len(PreparedDataset(options.data, "test"))
    found = []
    for split in ("train", "test"):
        dataset = PreparedDataset(options.data, split)
        count = min(count, len(dataset))
        statistics = FeatureStatistics(network.dim)
        for rows in np.array_split(np.arange(count) * len(dataset) // count, -(-count // 32)):
            with torch.inference_mode():
                statistics.update(network.features(to_x(dataset.batch(rows).images)))
        found.append(statistics)
    train, test = found
    print(f"{count} train against {count} test: {frechet_distance(train.mean, train.cov, test.mean, test.cov):.2f}")


if __name__ == "__main__":
    main()

"""Scores of real pairs: two photos of one person, and of two people. The values of NATURAL in serving.

    python scripts/same_person.py --data data/celeba

All pairs of the test split. FaceNet's embeddings are those of the data set; those of the judge are computed (a
minute).
"""

import argparse

import numpy as np
import torch

from vultus.data.dataset import PreparedDataset
from vultus.evaluation.backbones.face_recognition import load_judge
from vultus.evaluation.verification import Similarity, pair_scores
from vultus.images.io import to_x


def show(name: str, embeddings: torch.Tensor, people: list[str], similarity: Similarity) -> None:
    for who, scores in zip(("one person", "two people"), pair_scores(embeddings, people, similarity), strict=True):
        low, high = np.percentile(scores.numpy(), [5, 95])
        print(f"{name}, {len(scores)} pairs of {who}: 5 % {low:.3f}, mean {scores.mean():.3f}, 95 % {high:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared data set")
    options = parser.parse_args()
    dataset = PreparedDataset(options.data, "test")
    show("facenet", dataset.embeddings(), dataset.identities, "cosine")
    judge = load_judge("dlib")
    rows = np.arange(len(dataset))
    parts = [judge.embed(to_x(dataset.batch(rows[start : start + 64]).images)) for start in range(0, len(rows), 64)]
    show("dlib", torch.cat(parts), dataset.identities, judge.similarity)


if __name__ == "__main__":
    main()

"""The numbers behind the defaults of `vultus synthesize`.

    VULTUS_WEIGHTS=... python scripts/calibrate_synthesis.py --data PREPARED

On the test split of a prepared data set: the angle between embeddings, and each judge's score, that accept a given
share of the pairs of different people. On generated faces: how many of them each judge accepts, as `vultus synthesize`
compares them, and how often it takes two faces for one person. Then how many people the population prior holds.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

import vultus
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import load_judge
from vultus.evaluation.verification import pair_scores, row_scores, threshold_at_far
from vultus.images.io import to_x
from vultus.sampling.generate import render
from vultus.synthesis.people import People

FARS = (1e-2, 1e-3, 1e-4)
PEOPLE, FACES = 100, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set of `vultus prepare`")
    parser.add_argument("--judges", nargs="*", default=["dlib", "mobilefacenet"])
    parser.add_argument(
        "--angles", type=float, nargs="*", default=[55.0, 60.0, 65.0, 70.0], help="for which to count people"
    )
    arguments = parser.parse_args()
    test = PreparedDataset(arguments.data, "test")
    photos = [test.batch(range(at, min(at + 64, len(test)))).images for at in range(0, len(test), 64)]
    print(f"{len(test)} photos of {len(set(test.identities))} people")
    same, different = pair_scores(test.embeddings(), test.identities, "cosine")
    for far in FARS:
        limit = threshold_at_far(different, far)
        print(f"angle at FAR {far:g}: {math.degrees(math.acos(limit)):.1f} degrees, TAR {accepted(same, limit):.3f}")
    shares = [accepted(scores, math.cos(math.radians(50))) for scores in (same, different)]
    print(f"nearer than 50 degrees: {shares[0]:.3f} of the pairs of one person, {shares[1]:.1e} of those of two")

    generator = vultus.load("default")
    c = generator.sample_identities(PEOPLE)
    faces = generator.sample(c, num=FACES).flatten(0, 1)
    average = render(generator.network, torch.zeros(PEOPLE, generator.z_dim), c)
    owners = [str(person) for person in range(PEOPLE) for _ in range(FACES)]
    for name in arguments.judges:
        judge = load_judge(name)
        real = torch.cat([judge.embed(to_x(part)) for part in photos])
        same, different = pair_scores(real, test.identities, judge.similarity)
        found = judge.embed(to_x(faces))
        references = judge.embed(to_x(average)).repeat_interleave(FACES, 0)
        own = row_scores(found, references, judge.similarity)
        mated, others = pair_scores(found, owners, judge.similarity)
        for far in FARS:
            limit = threshold_at_far(different, far)
            print(
                f"{name} at FAR {far:g}: threshold {limit:.4f}, TAR {accepted(same, limit):.3f}; generated: "
                f"{accepted(own, limit):.4f} accepted, pairs of one person {accepted(mated, limit):.4f}, "
                f"of two people {accepted(others, limit):.5f}"
            )
    for angle in (50.0, *arguments.angles):
        crowd, start = People(generator.population, seed=0, min_angle=angle), time.perf_counter()
        try:
            last = crowd.take(0, 10_000)[-1].number
            print(f"{angle:g} degrees: 10000 of {last + 1} identities, {time.perf_counter() - start:.0f} s")
        except UserError as error:
            print(f"{angle:g} degrees: {error}")


def accepted(scores: torch.Tensor, limit: float) -> float:
    """The share of the scores above the limit."""
    return (scores > limit).double().mean().item()


if __name__ == "__main__":
    main()

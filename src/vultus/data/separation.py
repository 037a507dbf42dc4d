"""Whether the embeddings of a prepared data set tell people apart."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vultus.errors import UserError

PAIRS = 2000  # of each kind, at most
FEWEST = 20  # pairs of one person, below which nothing is said
ALIKE = 0.95  # mean cosine of the photos of different people, from which all embeddings count as one
WEAK = 0.8  # area under the ROC curve: 1 separates all pairs, 0.5 none. FaceNet on CelebA's test people: 0.98


def separation(embeddings: npt.NDArray[np.float32], identities: Sequence[str]) -> dict[str, Any] | None:
    """The mean cosine of two photos of one person (`same`) and of two people (`different`), and the area under the ROC
    curve (`auc`), of unit-norm embeddings [N, dim]; None where there are too few pairs of one person."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[int]] = {}
    for row, identity in enumerate(identities):
        rows.setdefault(identity, []).append(row)
    pairs = [(own[place], own[place + 1]) for own in rows.values() for place in range(len(own) - 1)]
    if len(pairs) < FEWEST or len(rows) < 2:
        return None
    same = np.array(pairs)[rng.permutation(len(pairs))[:PAIRS]]
    people = np.unique(np.asarray(identities), return_inverse=True)[1]
    different = rng.integers(0, len(identities), (2 * PAIRS, 2))
    different = different[people[different[:, 0]] != people[different[:, 1]]]
    near, far = ((embeddings[a] * embeddings[b]).sum(1) for a, b in (same.T, different.T))
    # Mann-Whitney: the share of all pairs (near, far) in which the first is larger.
    auc = np.searchsorted(np.sort(far), near).mean() / len(far)
    return {"same": round(float(near.mean()), 4), "different": round(float(far.mean()), 4), "auc": round(float(auc), 4)}


def check_spread(embeddings: npt.NDArray[np.float32], what: str) -> None:
    """Raise UserError if the embeddings [N, dim] of some photos, unit norm, are nearly all the same."""
    if len(embeddings) < FEWEST:
        return
    total = embeddings.sum(0, dtype=np.float64)
    count = len(embeddings)
    cosine = float((total @ total - count) / (count * (count - 1)))
    if cosine > ALIKE:
        raise UserError(
            f"{what}: the embeddings of {count} photos are nearly the same (mean cosine {cosine:.3f}); if it is a "
            "network, it probably expects other values or other crops: set mean, std, channels, size or crop in the "
            "JSON file beside it"
        )


def report(found: dict[str, Any] | None, what: str) -> None:
    """Say on stderr how well the embeddings tell people apart."""
    if found is None:
        return
    same, different, auc = (found[name] for name in ("same", "different", "auc"))
    figures = f"cosine {same:.2f} for one person, {different:.2f} for two; area under the ROC curve {auc:.3f}"
    if auc < WEAK:
        print(
            f"note: {what}: embeddings of one person and of two people hardly differ ({figures}); check that the "
            "encoder reads these photos as it was trained to, and that the identities are right",
            file=sys.stderr,
        )
    else:
        print(f"{what}: {figures}", file=sys.stderr)

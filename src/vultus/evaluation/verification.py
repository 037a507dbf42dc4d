"""Identity the way biometrics measures it: scores of pairs, thresholds at a false accept rate, success rates, ranks.

Pure functions of embeddings. No network, no file, no random number.

Shape legend: embeddings [N, D] float; people: one name per row. A score is larger for faces that are more alike: the
cosine, or minus the Euclidean distance (`Similarity`). A pair is accepted if its score lies above the threshold.

The terms are those of template inversion: a generated face that is accepted against the very photo whose embedding it
was made from is a success of type I, against another photo of that person of type II (Mai et al. 2018,
arXiv:1703.00832). The false accept rate (FAR) and thresholds follow Grother et al., NIST FRVT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["cosine", "euclidean"]

_BLOCK = 1024  # rows of a score matrix that exist at once


def scores(a: Tensor, b: Tensor, similarity: Similarity) -> Tensor:
    """Every row of `a` against every row of `b`: [N, D], [M, D] -> [N, M] float32."""
    if similarity == "cosine":
        return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
    # The matrix product form loses digits where two rows nearly coincide; verification decides far from there.
    return -torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")


def row_scores(a: Tensor, b: Tensor, similarity: Similarity) -> Tensor:
    """Row by row: [N, D], [N, D] -> [N] float32."""
    if similarity == "cosine":
        return F.cosine_similarity(a.float(), b.float(), dim=1)
    return -(a.float() - b.float()).norm(dim=1)


def pair_scores(embeddings: Tensor, people: Sequence[str], similarity: Similarity) -> tuple[Tensor, Tensor]:
    """Scores of all unordered pairs of rows: (same person [S], different people [P - S]), P = N (N - 1) / 2.

    Memory is four bytes a pair: 50 MB for 5,000 rows. Raises ValueError for lengths that differ.
    """
    if len(embeddings) != len(people):
        raise ValueError(f"{len(embeddings)} embeddings of {len(people)} people")
    _, codes = np.unique(np.asarray(people), return_inverse=True)
    who = torch.from_numpy(codes)
    same, different = [], []
    for start in range(0, len(embeddings), _BLOCK):
        rows = slice(start, start + _BLOCK)
        found = scores(embeddings[rows], embeddings[start:], similarity)
        # Above the diagonal only; the block's own rows come first among the columns.
        upper = torch.ones_like(found, dtype=torch.bool).triu(1)
        alike = who[rows, None] == who[None, start:]
        same.append(found[upper & alike])
        different.append(found[upper & ~alike])
    return torch.cat(same), torch.cat(different)


def threshold_at_far(different: Tensor, far: float) -> float:
    """The smallest threshold that accepts at most `far` (0 to 1) of the scores of different people, [P].

    Raises ValueError if there are fewer than 1 / far pairs: no threshold then has that rate, only one of 0.
    """
    allowed = int(far * len(different))
    if allowed < 1:
        raise ValueError(f"a false accept rate of {far:g} needs {round(1 / far)} pairs or more, not {len(different)}")
    return torch.topk(different, allowed + 1).values[-1].item() if allowed < len(different) else float("-inf")


def accepted_against_others(
    made: Tensor, real: Tensor, people: Sequence[str], similarity: Similarity, threshold: float
) -> Tensor:
    """Type II: for each row of `made` [N, D] the share of that person's other photos, `real` [N, D], that accept it.

    Row i of `made` belongs to photo i. [N] float64; NaN where a person has no other photo.
    """
    result = torch.full((len(made),), float("nan"), dtype=torch.float64)
    for rows in groups(people):
        if len(rows) > 1:
            accepted = (scores(made[rows], real[rows], similarity) > threshold).double()
            result[rows] = (accepted.sum(1) - accepted.diagonal()) / (len(rows) - 1)
    return result


def ranks(probes: Tensor, real: Tensor, people: Sequence[str], similarity: Similarity) -> Tensor:
    """Closed-set identification: [N] float64, how many other people are nearer to the probe than its own person.

    The gallery holds a template of each person, the mean of the (normalised, for the cosine) embeddings of the photos
    `real` [N, D], for the own person without photo i, so that a probe is never compared with the photo it was made
    from. 0 is rank 1. NaN where a person has no other photo. Identification rates as in Phillips et al. 2000, "The
    FERET evaluation methodology".
    """
    real = F.normalize(real.float(), dim=1) if similarity == "cosine" else real.float()
    members = groups(people)
    totals = torch.stack([real[rows].sum(0) for rows in members])
    counts = torch.tensor([len(rows) for rows in members])
    templates = totals / counts[:, None]
    result = torch.full((len(probes),), float("nan"), dtype=torch.float64)
    for number, rows in enumerate(members):
        if len(rows) < 2:
            continue
        own = row_scores(probes[rows], (totals[number] - real[rows]) / (len(rows) - 1), similarity)
        others = scores(probes[rows], templates, similarity)
        others[:, number] = float("-inf")
        result[rows] = (others >= own[:, None]).sum(1).double()
    return result


def groups(people: Sequence[str]) -> list[Tensor]:
    """The rows of each person, people in the order of their names."""
    _, codes, counts = np.unique(np.asarray(people), return_inverse=True, return_counts=True)
    return list(torch.from_numpy(np.argsort(codes, kind="stable")).split(counts.tolist()))

"""Identity as biometrics measures it: scores of pairs, thresholds at a false accept rate, success rates, ranks.

Pure functions of embeddings: no network, no file, no random number.

Shape legend: embeddings [N, D] float; identities: the person of each row. A score is larger for faces that are more
alike: the cosine, or minus the Euclidean distance (`Similarity`). A pair is accepted if its score is above a threshold.

The terms are those of template inversion: a generated face that is accepted against its source photo, the one whose
embedding it was generated from, is a success of type I; against another photo of that person, of type II (Mai et al.
2018, arXiv:1703.00832). The false accept rate (FAR) and thresholds follow Grother et al., NIST FRVT.
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


def pair_scores(embeddings: Tensor, identities: Sequence[str], similarity: Similarity) -> tuple[Tensor, Tensor]:
    """Scores of all unordered pairs of rows: (same person [S], different people [P - S]), P = N (N - 1) / 2.

    Memory is four bytes for each pair: 50 MB for 5,000 rows. Raises ValueError for lengths that differ.
    """
    if len(embeddings) != len(identities):
        raise ValueError(f"{len(embeddings)} embeddings, but {len(identities)} identities")
    _, codes = np.unique(np.asarray(identities), return_inverse=True)
    person = torch.from_numpy(codes)
    same, different = [], []
    for start in range(0, len(embeddings), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = scores(embeddings[rows], embeddings[start:], similarity)
        # Above the diagonal only; the block's own rows come first among the columns.
        upper = torch.ones_like(block, dtype=torch.bool).triu(1)
        mated = person[rows, None] == person[None, start:]
        same.append(block[upper & mated])
        different.append(block[upper & ~mated])
    return torch.cat(same), torch.cat(different)


def threshold_at_far(different: Tensor, far: float) -> float:
    """The smallest threshold that accepts at most `far` (0 to 1) of the scores of different people, [P].

    Raises ValueError if there are fewer than 1 / far pairs: a threshold for that rate cannot be estimated from them.
    """
    allowed = int(far * len(different))
    if allowed < 1:
        raise ValueError(f"a false accept rate of {far:g} needs {round(1 / far)} pairs or more, not {len(different)}")
    return torch.topk(different, allowed + 1).values[-1].item() if allowed < len(different) else float("-inf")


def accepted_against_others(
    generated: Tensor, real: Tensor, identities: Sequence[str], similarity: Similarity, threshold: float
) -> Tensor:
    """Type II success: the share of the person's other photos that accept each generated face.

    Args:
        generated: embeddings [N, D] of a face generated from each photo.
        real: embeddings [N, D] of the photos.

    Returns: [N] float64, NaN where a person has no other photo.
    """
    result = torch.full((len(generated),), float("nan"), dtype=torch.float64)
    for rows in person_rows(identities):
        if len(rows) > 1:
            accepted = (scores(generated[rows], real[rows], similarity) > threshold).double()
            result[rows] = (accepted.sum(1) - accepted.diagonal()) / (len(rows) - 1)
    return result


def ranks(probes: Tensor, real: Tensor, identities: Sequence[str], similarity: Similarity) -> Tensor:
    """Closed-set identification: how many other people are nearer to each probe than its own person; 0 is rank 1.

    Args:
        probes: embeddings [N, D] of faces, probe i generated from photo i.
        real: embeddings [N, D] of the photos. The gallery holds a template of each person, the mean of its embeddings
            (normalised first, for the cosine). Photo i is left out of the template of its own person, so that a
            probe is never compared with its source photo.

    Returns: [N] float64, NaN where a person has no other photo. Identification rates follow Phillips et al. 2000, "The
    FERET evaluation methodology".
    """
    real = F.normalize(real.float(), dim=1) if similarity == "cosine" else real.float()
    members = person_rows(identities)
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


def person_rows(identities: Sequence[str]) -> list[Tensor]:
    """The rows of each person, int64, people in the order of their names."""
    _, codes, counts = np.unique(np.asarray(identities), return_inverse=True, return_counts=True)
    return list(torch.from_numpy(np.argsort(codes, kind="stable")).split(counts.tolist()))

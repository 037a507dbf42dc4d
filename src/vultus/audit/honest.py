"""What protected templates are left for: verification of honest users.

With a key for each person there are two cases. With keys of their own, impostors protect their faces with their own
keys, and keys alone tell people apart. With the stolen key of the person whom they claim to be, the "stolen-token
scenario" (Teoh et al. 2008, "Cancellable biometrics and annotations on BioHash"), only the faces are left.

Shape legend: embeddings c [N, D] float32 of unit norm; keys [N] int64; templates [N, K] float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vultus.audit.protections import Protection
from vultus.errors import UserError
from vultus.evaluation.verification import pair_scores, person_rows, scores

CHECKED = 2000  # templates that check_information compares with one another


def stolen_key_scores(protection: Protection, c: Tensor, keys: Tensor, people: Sequence[str]) -> Tensor:
    """Scores of impostors who use the key of the person whom they claim to be: [P].

    Every template of a person is compared with all photos of other people under that person's key. Memory is four bytes
    for each pair, N^2 pairs.
    """
    found = []
    for rows in person_rows(people):
        templates = protection.protect(c, keys[rows[0]].expand(len(c)))
        other = torch.ones(len(c), dtype=torch.bool)
        other[rows] = False
        found.append(scores(templates[rows], templates[other], "cosine").flatten())
    return torch.cat(found)


def check_information(name: str, templates: Tensor, people: Sequence[str]) -> None:
    """Raise UserError if templates of one person are no more alike than those of two people.

    It compares the pairs of whole people, up to CHECKED templates: the area under the ROC curve must be above 0.5 by
    0.01 and by two of its standard errors. Without two templates of one person there is nothing to compare.
    """
    rows: list[int] = []
    for each in person_rows(people):
        if len(rows) >= CHECKED:
            break
        rows += each.tolist()
    same, different = pair_scores(templates[rows], [people[row] for row in rows], "cosine")
    if not len(same) or not len(different):
        return
    ordered = different.sort().values
    below, upto = (torch.searchsorted(ordered, same, right=right).double().mean().item() for right in (False, True))
    area = (below + upto) / 2 / len(different)
    if area <= 0.5 + max(0.01, 2 / (12 * len(same)) ** 0.5):
        raise UserError(
            f"--protect {name}: templates of one person are no more alike than those of two people (area under the ROC "
            f"curve {area:.3f}), which leaves nothing to attack and nothing to verify; choose a weaker protection"
        )

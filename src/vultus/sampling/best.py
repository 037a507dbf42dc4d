"""The best faces of an embedding: of many noises, those whose faces the encoder of the condition finds most alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vultus.errors import UserError
from vultus.images.io import to_x
from vultus.models.encoders import device_of, load_condition_encoder
from vultus.models.facenet import Encoder, FaceNet
from vultus.models.snapshot import Snapshot

MOST = 1024  # candidates of one embedding, which are in memory at once
SPREAD = 0.9  # of the median difference between two candidates; nearer faces count as the same one
RELAXED = 0.8  # factor of that limit where too few faces are left
SIDE = 32  # pixels, of the images that are compared
BATCH = 16  # faces to a call of the encoder, the last call padded: other sizes round differently


def load_chooser(snapshot: Snapshot, best_of: int, num: int) -> Encoder | None:
    """The encoder that chooses `num` faces of `num` x `best_of`; None for 1.

    It computes in float32 on the device of the snapshot. Raises UserError for too many candidates, a snapshot whose
    embeddings are of another encoder, and missing weights.
    """
    if best_of == 1:
        return None
    check_candidates(best_of, num)
    return load_scorer(snapshot, "--best-of needs the encoder of the condition to choose faces")


def load_scorer(snapshot: Snapshot, need: str) -> Encoder:
    """The encoder of the condition, which says how like the embedding a face is, in float32 on the snapshot's device.

    Raises UserError, which begins with `need`, if it cannot be loaded.
    """
    device = next(snapshot.network.parameters()).device
    try:
        return load_condition_encoder(snapshot.metadata, snapshot.path or "the snapshot", device=device)
    except UserError as error:
        raise UserError(f"{need}: {error}") from None


def in_float32(encoder: Encoder) -> Encoder:
    """The same encoder computing in float32, as `load_chooser` loads it: the choice must not depend on the machine."""
    if not isinstance(encoder, FaceNet) or encoder.dtype == torch.float32:
        return encoder
    device = next(encoder.network.parameters()).device
    return FaceNet(encoder.network, device=device, dtype=torch.float32, weights_sha256=encoder.weights_sha256)


def check_candidates(best_of: int, num: int) -> None:
    """Raise UserError where one embedding has more than MOST candidates."""
    if best_of > 1 and best_of * num > MOST:
        raise UserError(
            f"--best-of {best_of} of {num} faces is {best_of * num} candidates of one embedding; {MOST} is the most, "
            f"lower --best-of or the number of faces"
        )


@torch.inference_mode()
def likeness(images: Tensor, c: Tensor, encoder: Encoder) -> Tensor:
    """The cosine of the embedding of each image uint8 [M, 3, R, R] to its row of `c` [M, c_dim]: float32 [M].

    -2 where it is not a number, so that such an image comes last.
    """
    device = device_of(encoder)
    parts = []
    for part, target in zip(images.split(BATCH), c.cpu().float().split(BATCH), strict=True):
        padded = torch.cat([part, part.new_zeros(BATCH - len(part), *part.shape[1:])])
        embeddings = encoder.embed(to_x(padded.to(device)))[: len(part)].cpu().float()
        parts.append((embeddings * target).sum(1))
    return torch.cat(parts).nan_to_num(nan=-2.0)


def choose(images: Tensor, score: Tensor, num: int) -> list[int]:
    """The rows of the `num` best of the candidates of one embedding, the best first.

    Args:
        images: candidates, uint8 [M, 3, R, R], M >= num.
        score: of each [M], higher for better ones.
        num: how many are kept.

    Faces are taken in the order of their scores; one that is nearer to a face already taken than SPREAD times the
    median difference between two candidates is passed over. The difference is the RMS of pixels, as in the metric
    `diversity_noise_rms`, of images reduced to SIDE. If too few faces are left, the limit is lowered.
    """
    order = score.argsort(descending=True, stable=True).tolist()
    if num == 1:
        return order[:1]
    small = F.adaptive_avg_pool2d(to_x(images.cpu()), min(SIDE, images.shape[-1])).flatten(1).double()
    difference = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / small.shape[1] ** 0.5
    limit = SPREAD * float(difference[tuple(torch.triu_indices(len(images), len(images), 1))].median())
    while True:
        kept: list[int] = []
        nearest = torch.full((len(images),), float("inf"), dtype=torch.float64)  # to a face already taken
        for row in order:
            if len(kept) < num and nearest[row] >= limit:
                kept.append(row)
                nearest = torch.minimum(nearest, difference[row])
        if len(kept) == num:
            return kept
        limit = limit * RELAXED if limit > 1e-6 else 0.0

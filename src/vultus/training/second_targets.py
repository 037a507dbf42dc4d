"""What the loss of a second encoder takes as target, computed once per data set and kept in the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vultus._download import cache_folder
from vultus._files import atomic_path, make_folder
from vultus._progress import progress
from vultus.data.dataset import PreparedDataset
from vultus.images.io import to_x
from vultus.models.second_encoder import SecondEncoder

BATCH = 32


def second_targets(dataset: PreparedDataset, encoder: SecondEncoder, device: torch.device | str = "cpu") -> Tensor:
    """Unit-norm targets float32 [N, dim] on the CPU, a row for each photo of the data set (see person_targets).

    `device` is that of the encoder.
    """
    return person_targets(photo_embeddings(dataset, encoder, device), dataset.identities)


def person_targets(embeddings: Tensor, identities: list[str]) -> Tensor:
    """Of unit-norm embeddings [N, dim]: halfway between each and the mean of the person's other ones; unit norm.

    A face near it is accepted as the person of its photo (type I) and of other photos (type II). People with one photo
    have its embedding as target.
    """
    numbers = {identity: number for number, identity in enumerate(dict.fromkeys(identities))}
    people = torch.tensor([numbers[identity] for identity in identities])
    sums = torch.zeros(len(numbers), embeddings.shape[1]).index_add_(0, people, embeddings)
    counts = torch.bincount(people, minlength=len(numbers))
    others = F.normalize(sums[people] - embeddings)
    others = torch.where((counts[people] > 1)[:, None], others, embeddings)
    return F.normalize(embeddings + others)


def photo_embeddings(dataset: PreparedDataset, encoder: SecondEncoder, device: torch.device | str) -> Tensor:
    """Embeddings float32 [N, dim] of the photos by `encoder`, from the cache or computed."""
    path = _path(dataset, encoder)
    if path.is_file():
        values = torch.from_numpy(np.load(path))
        if values.shape == (len(dataset), encoder.dim):
            return values
    parts = []
    with torch.inference_mode(), progress(len(dataset), title=f"embeddings by {encoder.id}", unit="photo") as bar:
        for start in range(0, len(dataset), BATCH):
            photos = dataset.batch(range(start, min(start + BATCH, len(dataset))))
            parts.append(encoder.embed(to_x(photos.images.to(device))).cpu())
            bar.update(len(parts[-1]))
    values = torch.cat(parts)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values.numpy())
    return values.clone()


def _path(dataset: PreparedDataset, encoder: SecondEncoder) -> Path:
    content = dataset.manifest["content_sha256"]
    keys = [content, dataset.split, dataset.rows_sha256(), encoder.id, encoder.weights_sha256]
    digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:32]
    return make_folder(cache_folder() / "embeddings") / f"{digest}.npy"

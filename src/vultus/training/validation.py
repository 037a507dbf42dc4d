"""The short measurement on unseen people that training takes as it goes; `evaluate` is the long one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.images.io import to_x
from vultus.models.facenet import Encoder
from vultus.models.generators import GeneratorNetwork
from vultus.sampling.population import noise

NOISE_SEED = 2
ALIKE = 0.9  # mean cosine of faces of different people above which they are one face; of real photos it is 0.02
UNRELATED = 0.05  # mean cosine to the embeddings asked for, below which faces are nobody's; untrained: 0.03


def failure(found: Mapping[str, float]) -> str:
    """What the figures of `unseen_validation` say is wrong with a generator that has been trained for a while, or ""."""
    alike, cosine = found.get("alike", 0.0), found.get("identity_facenet", 1.0)
    if alike > ALIKE:
        return f"faces of different people are alike (cosine {alike:.2f}): collapsed"
    if cosine < UNRELATED:
        return f"faces have nothing of their embeddings (cosine {cosine:.2f}): it does not learn"
    return ""


def unseen_validation(
    folder: str | Path, encoder: Encoder | None, *, images: int = 128, batch: int = 32
) -> Callable[[GeneratorNetwork], dict[str, float]] | None:
    """A function of a generator that gives, on photos of unseen people spread over the test split:

    `identity_facenet`: mean cosine between the embedding asked for and that of the picture made, and `mse` in [-1, 1]
    against the photo, one noise a photo; and `alike`: mean cosine between pictures made for different photos, which is
    near 1 when all of them are one face. Without an encoder `mse` alone. None if the data set has no test split.
    """
    try:
        dataset = PreparedDataset(folder, "test")
    except UserError:
        return None
    count = min(images, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    photos = dataset.batch(chosen)

    @torch.inference_mode()
    def measure(generator: GeneratorNetwork) -> dict[str, float]:
        device = next(generator.parameters()).device
        z = noise(NOISE_SEED, 0, count, generator.z_dim)
        squared = 0.0
        made = []
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            c = photos.c[part].to(device)
            x = generator(z[part].to(device), c).clamp(-1, 1)
            if encoder is not None:
                made.append(encoder.embed(x).cpu())
            squared += float((x - to_x(photos.images[part].to(device))).square().mean((1, 2, 3)).sum())
        found = {"n_images": count, "mse": round(squared / count, 5)}
        if encoder is None:
            return found
        e = torch.cat(made)
        alike = float((e.sum(0).square().sum() - count) / max(count * (count - 1), 1))
        cosine = float((e * photos.c.cpu()).sum() / count)
        return found | {"identity_facenet": round(cosine, 4), "alike": round(alike, 4)}

    return measure

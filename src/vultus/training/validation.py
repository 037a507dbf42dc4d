"""The short measurement on unseen people during training; `evaluate` is the long one afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.images.io import to_x
from vultus.models.facenet import Encoder
from vultus.models.generators import GeneratorNetwork
from vultus.sampling.latents import noise

NOISE_SEED = 2
COLLAPSED = 0.9  # mean cosine between faces of different people, from which they count as one face; photos have 0.02
UNRELATED = 0.05  # mean cosine to the target embeddings, below which there is no identity; untrained: 0.03


def failure(metrics: Mapping[str, float]) -> str:
    """What the metrics of `unseen_validation` say is wrong with a generator after some training, or ""."""
    alike, cosine = metrics.get("alike", 0.0), metrics.get("identity_facenet", 1.0)
    if alike > COLLAPSED:
        return f"faces of different people are alike (cosine {alike:.2f}): mode collapse"
    if cosine < UNRELATED:
        return f"faces are unrelated to their embeddings (cosine {cosine:.2f}): it does not learn"
    return ""


def unseen_validation(
    data: str | Path | PreparedDataset, encoder: Encoder | None, *, images: int = 128, batch: int = 32
) -> Callable[[GeneratorNetwork], dict[str, float]] | None:
    """A function that measures a generator on photos of unseen people, spread evenly over the test split.

    Its metrics, with one noise vector for each photo:

    - `n_images`: number of photos.
    - `mse`: mean squared error against the photo, values in [-1, 1].
    - `identity_facenet`: mean cosine between the target embedding and that of the generated image.
    - `alike`: mean cosine between the images generated for different photos; near 1 when all of them are one face.

    Without an encoder there are only the first two. Returns None if the data set has no test split.
    """
    try:
        dataset = data.with_split("test") if isinstance(data, PreparedDataset) else PreparedDataset(data, "test")
    except UserError:
        return None
    count = min(images, len(dataset))
    photos = dataset.batch([index * len(dataset) // count for index in range(count)])

    @torch.inference_mode()
    def measure(generator: GeneratorNetwork) -> dict[str, float]:
        device = next(generator.parameters()).device
        z = noise(NOISE_SEED, 0, count, generator.z_dim)
        squared = 0.0
        embeddings = []
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            c = photos.c[part].to(device)
            x = generator(z[part].to(device), c).clamp(-1, 1)
            if encoder is not None:
                embeddings.append(encoder.embed(x).cpu())
            squared += float((x - to_x(photos.images[part].to(device))).square().mean((1, 2, 3)).sum())
        metrics = {"n_images": count, "mse": round(squared / count, 5)}
        if encoder is None:
            return metrics
        e = torch.cat(embeddings)
        alike = float((e.sum(0).square().sum() - count) / max(count * (count - 1), 1))
        cosine = float((e * photos.c.cpu()).sum() / count)
        return metrics | {"identity_facenet": round(cosine, 4), "alike": round(alike, 4)}

    return measure

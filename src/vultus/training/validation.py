"""The short measurement on unseen people during training; `evaluate` is the long one afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.images.io import to_x
from vultus.models.facenet import Encoder
from vultus.models.generators import GeneratorNetwork
from vultus.sampling.latents import noise

NOISE_SEED = 2
COLLAPSED = 0.9  # mean cosine between faces of different people, from which they count as one face; photos have 0.02
FEWEST = 30  # photos, below which faces that follow their embeddings a little cannot be told from chance
CHANCE = 2.0  # standard deviations above chance, which 2 % of faces that do not depend on their embedding reach


def failure(metrics: Mapping[str, float]) -> str:
    """What the metrics of `unseen_validation` say is wrong with a generator after some training, or ""."""
    alike, above = metrics.get("alike", 0.0), metrics.get("identity_above_chance", float("inf"))
    if alike > COLLAPSED:
        return f"faces of different people are alike (cosine {alike:.2f}): mode collapse"
    if above < CHANCE and metrics.get("n_images", FEWEST) >= FEWEST:
        cosine, chance = metrics.get("identity_facenet", 0.0), metrics.get("identity_chance", 0.0)
        return (
            f"faces are unrelated to their embeddings (cosine {cosine:.3f}, to those of others {chance:.3f}, a "
            f"difference of {above:.1f} standard deviations): it does not learn"
        )
    return ""


def above_chance(e: Tensor, c: Tensor) -> tuple[float, float]:
    """(chance level, standard deviations above it) of the mean cosine between the rows of e and c [N, D], unit norm.

    The chance level is the mean cosine between a row of `e` and another row of `c`. The deviations are those of the
    mean cosine if the rows of `c` are permuted, which is how it varies where `e` does not depend on `c`; their variance
    is known exactly (Hoeffding 1951, "A combinatorial central limit theorem"). 0 where all rows of `e` are equal. Two
    photos of one person count as different people, which makes the number smaller, not larger.
    """
    count = len(e)
    cosines = e.double() @ c.double().T
    chance = float((cosines.sum() - cosines.trace()) / max(count * (count - 1), 1))
    centred = cosines - cosines.mean(0) - cosines.mean(1, keepdim=True) + cosines.mean()
    deviation = float(centred.square().sum() / max(count - 1, 1)) ** 0.5
    return chance, float(centred.trace()) / deviation if deviation > 1e-6 else 0.0


def unseen_validation(
    data: str | Path | PreparedDataset, encoder: Encoder | None, *, images: int = 128, batch: int = 32
) -> Callable[[GeneratorNetwork], dict[str, float]] | None:
    """A function that measures a generator on photos of unseen people, spread evenly over the test split.

    Its metrics, with one noise vector for each photo:

    - `n_images`: number of photos.
    - `mse`: mean squared error against the photo, values in [-1, 1].
    - `identity_facenet`: mean cosine between FaceNet's embedding of the photo and that of the generated image.
    - `identity_chance`: the same against the embeddings of the other photos; what faces reach that have nothing to do
      with their embedding. For small images and young networks it is far from 0.
    - `identity_above_chance`: the difference in standard deviations (see `above_chance`).
    - `alike`: mean cosine between the images generated for different photos; near 1 when all of them are one face.

    Without an encoder there are only the first two. Returns None if the data set has no test split.
    """
    try:
        dataset = data.with_split("test") if isinstance(data, PreparedDataset) else PreparedDataset(data, "test")
    except UserError:
        return None
    count = min(images, len(dataset))
    photos = dataset.batch([index * len(dataset) // count for index in range(count)])
    target = photos.c if photos.facenet is None else photos.facenet

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
        cosine = float((e * target).sum() / count)
        chance, above = above_chance(e, target)
        metrics |= {"identity_facenet": round(cosine, 4), "alike": round(alike, 4)}
        return metrics | {"identity_chance": round(chance, 4), "identity_above_chance": round(above, 2)}

    return measure

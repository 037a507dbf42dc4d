"""Measure a snapshot on people it has never seen.

Every number is about what a user would save: generated faces are rounded to 8 bits first. Faces go to the encoder as
whole frames and it takes its own crop, as in training. The noise of a face is a function of (seed, index of the photo,
number of the noise), so no result depends on the batch size.

The results, all for N photos of the data set's split, S its name:

- identity_<encoder>: cosine of the encoder's embedding of a generated face to the embedding asked for, mean over photos
  and noises; `_std` beside it; `_real` is the same for the very photos at the stored resolution: the ceiling. It is
  below 1 because the embedding was taken before the photo was reduced to that resolution.
- mse (in [-1, 1], per value), psnr (dB): a generated face against the very photo.
- fd_<features>_<N>_<S>: Fréchet distance, one face per embedding (noise 0) against those N photos. Not FID.
- diversity_noise_<features>, diversity_noise_rms: between faces of one embedding with different noise, mean over the
  pairs, then over a person's photos, then over people: 1 - cosine of features, and RMS in [-1, 1]. 0 is noise ignored.
- diversity_identity: 1 - mean cosine of the encoder's embeddings between faces of different embeddings (noise 0, at
  most 2,000 faces); pairs_above_0.9: share of those pairs with a cosine above 0.9, a sign of collapse; `_real` is the
  same for the embeddings asked for.
"""

from __future__ import annotations

import collections
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from vultus.checkpoint import Snapshot
from vultus.dataset import Batch, PreparedDataset
from vultus.encoders import FACENET_WEIGHTS, Encoder
from vultus.errors import UserError
from vultus.features import EXTRA, FeatureNetwork, load_effnet, weights_path
from vultus.files import atomic_path, make_folder
from vultus.images import to_images, to_x
from vultus.metrics import (
    FeatureStatistics,
    cosine,
    frechet_distance,
    mean_pairwise_distance,
    mean_pairwise_rms,
    mse,
    pair_cosines,
    psnr,
)
from vultus.people import noise
from vultus.weights import cache_folder

CACHE_VERSION = 1  # count it up when what is computed from real photos changes
MAX_PAIRED = 2000  # faces for diversity_identity: two million pairs, some 50 MB
COLLAPSE = 0.9


def evaluate(
    snapshot: Snapshot,
    dataset: PreparedDataset,
    *,
    encoder: Encoder,
    features: FeatureNetwork | Literal["effnet"] | None = "effnet",
    noises: int = 2,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Return the numbers that the module describes, with their circumstances; all of it fits into JSON.

    Args:
        snapshot: the generator and where it comes from. It must be on `device`.
        dataset: a split of a prepared data set; "test" holds people that no training has seen.
        encoder: what the data set was made with, on `device`.
        features: a feature network on `device`; "effnet" loads EfficientNet-lite0, or leaves its rows out and notes
            it where the extra is not installed; None leaves them out.
        noises: faces per embedding; from 2 on their diversity is measured.
        limit: use this many photos, evenly spread over the split; None uses all.
        batch: photos at a time; it decides about memory and speed, not about results.
        seed: of the noise.
        dtype: what the generator computes in.
        cache: folder for what is computed from real photos; by default in the cache folder of the user.

    Raises UserError where snapshot, data set and encoder do not belong together, or there are fewer than 2 people.
    """
    start = time.perf_counter()
    _check_arguments(noises=noises, limit=limit, batch=batch, seed=seed)
    check_match(snapshot, dataset, encoder)
    indices = _spread(len(dataset), limit)
    people = [dataset.identities[index] for index in indices]
    if len(set(people)) < 2:
        raise UserError(
            f"{dataset.folder}: {len(indices)} images of {len(set(people))} person in split {_split(dataset)}; an "
            f"evaluation needs 2 people or more: prepare more photos or raise --limit"
        )
    notes: list[str] = []
    network = _feature_network(features, device, notes)
    real = _measure_real(dataset, indices, batch, encoder, network, device, cache or cache_folder() / "features")
    made = _measure_generated(snapshot, dataset, indices, batch, encoder, network, noises, seed, device, dtype)

    name = encoder.id.partition("-")[0]
    results: dict[str, Any] = {
        "cur_nimg": snapshot.metadata.get("cur_nimg"),
        "data_sha256": dataset.manifest["content_sha256"],
        "split": _split(dataset),
        "n_images": len(indices),
        "n_people": len(set(people)),
        "noises": noises,
        "seed": seed,
        "resolution": dataset.resolution,
        **_mean_std(f"identity_{name}", made["identity"]),
        **_mean_std(f"identity_{name}_real", real["identity"]),
        **_mean_std("mse", made["mse"]),
        **_mean_std("psnr", made["psnr"]),
        **_identity_diversity(made["embeddings"], dataset.embeddings(indices)[_paired(len(indices))]),
    }
    if network is not None:
        key = f"fd_{network.short}_{len(indices)}_{_split(dataset)}"
        results[key] = frechet_distance(made["mean"], made["cov"], real["mean"], real["cov"])
        if len(indices) <= network.dim:
            notes.append(
                f"{key}: {len(indices)} images give singular covariances of {network.dim} features; the distance comes "
                f"out too large, by more the fewer the images (arXiv:1911.07023): compare it at this N only"
            )
    if noises > 1:
        if network is not None:
            results[f"diversity_noise_{network.short}"] = _mean_over_people(made["apart"], people)
        results["diversity_noise_rms"] = _mean_over_people(made["rms"], people)
    else:
        notes.append("diversity_noise: left out, it needs 2 noises or more")
    dtypes = {"generator": dtype, "encoder": encoder.dtype} | ({"features": network.dtype} if network else {})
    results |= {
        "encoder": encoder.id,
        "features": network.id if network else None,
        "device": str(device),
        "dtype": {key: str(value).removeprefix("torch.") for key, value in dtypes.items()},
        "seconds": round(time.perf_counter() - start, 1),
        "notes": notes,
    }
    for note in notes:
        print(f"vultus: note: {note}", file=sys.stderr)
    return results


def check_match(snapshot: Snapshot, dataset: PreparedDataset, encoder: Encoder) -> None:
    """Raise UserError, naming both sides, unless snapshot, data set and encoder belong together."""
    theirs, ours = snapshot.metadata.get("encoder") or {}, dataset.manifest["encoder"]
    named = f"{snapshot.path or 'the snapshot'}", f"{dataset.folder}"
    for key, shown in (("id", "encoder"), ("dim", "embedding length"), ("weights_sha256", "encoder weights")):
        if _same(theirs.get(key)) != _same(ours.get(key)):
            raise UserError(
                f"{named[0]} has {shown} {theirs.get(key)}, {named[1]} has {ours.get(key)}; prepare the data set with "
                f"the encoder that the snapshot was trained on"
            )
    if ours["id"] != encoder.id or _same(ours.get("weights_sha256")) != _same(encoder.weights_sha256):
        raise UserError(
            f"{named[1]} was prepared with {ours['id']} ({ours.get('weights_sha256')}), the encoder at hand is "
            f"{encoder.id} ({encoder.weights_sha256}); set VULTUS_WEIGHTS to the weights it was prepared with"
        )
    crops = snapshot.metadata.get("crop"), dataset.manifest["crop"]
    if crops[0] != crops[1]:
        raise UserError(
            f"{named[0]} was trained on crop {json.dumps(crops[0])}, {named[1]} has {json.dumps(crops[1])}; prepare "
            f"the data set with the same crop"
        )
    if snapshot.generator.resolution != dataset.resolution:
        side, other = snapshot.generator.resolution, dataset.resolution
        raise UserError(
            f"{named[0]} makes {side}x{side} pictures, {named[1]} has {other}x{other}; prepare with --resolution {side}"
        )


def _same(value: Any) -> Any:
    """All pinned files of FaceNet hold one network (float16 and float32), so their hashes count as one."""
    return FACENET_WEIGHTS[0].sha256 if value in {weights.sha256 for weights in FACENET_WEIGHTS} else value


def _check_arguments(*, noises: int, limit: int | None, batch: int, seed: int) -> None:
    for name, value, least in (("noises", noises, 1), ("limit", limit, 2), ("batch", batch, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")


def _feature_network(
    features: FeatureNetwork | Literal["effnet"] | None, device: torch.device | str, notes: list[str]
) -> FeatureNetwork | None:
    if features == "effnet":
        if weights_path() is None:
            notes.append(f"fd_effnet, diversity_noise_effnet: left out, they need {EXTRA}")
            return None
        return load_effnet(device=device)
    return features


def _split(dataset: PreparedDataset) -> str:
    return dataset.split or "all"


def _spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` rows evenly spread over `count`, or of all. Neighbours are often photos of one person."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def _paired(count: int) -> np.ndarray:
    """Places in the chosen rows of the faces whose pairs count for diversity_identity."""
    return _spread(count, MAX_PAIRED)


# --- passes over the data -----------------------------------------------------------------------------------------


def _batches(
    dataset: PreparedDataset, indices: np.ndarray, batch: int, title: str
) -> Iterator[tuple[np.ndarray, Batch]]:
    with tqdm(total=len(indices), unit="img", file=sys.stderr, desc=title) as bar:
        for start in range(0, len(indices), batch):
            rows = indices[start : start + batch]
            yield rows, dataset.batch(rows)
            bar.update(len(rows))


@torch.inference_mode()
def _measure_generated(
    snapshot: Snapshot,
    dataset: PreparedDataset,
    indices: np.ndarray,
    batch: int,
    encoder: Encoder,
    network: FeatureNetwork | None,
    noises: int,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Values of every face [N, noises], of every embedding [N], and statistics of the faces with noise 0."""
    generator = snapshot.generator
    found: dict[str, list[Tensor]] = collections.defaultdict(list)
    statistics = FeatureStatistics(network.dim) if network else None
    paired = set(indices[_paired(len(indices))].tolist())
    training = generator.training
    generator.eval()
    try:
        for rows, photos in _batches(dataset, indices, batch, "generated"):
            made, embeddings, vectors = [], [], []
            for number in range(noises):
                z = torch.cat([noise(seed, row, 1, generator.z_dim, variant=number) for row in rows.tolist()])
                x = generator(z.to(device, dtype), photos.c.to(device, dtype))
                if not x.isfinite().all():
                    raise UserError(f"{snapshot.path or 'the snapshot'}: makes values that are not numbers; train anew")
                x = to_x(to_images(x))
                made.append(x.cpu())
                embeddings.append(encoder.embed(x).cpu())
                if network is not None:
                    vectors.append(network.features(x).cpu())
            target = to_x(photos.images)
            found["mse"].append(torch.stack([mse(x, target) for x in made], 1))
            found["psnr"].append(torch.stack([psnr(x, target) for x in made], 1))
            found["identity"].append(torch.stack([cosine(embedding, photos.c) for embedding in embeddings], 1))
            found["embeddings"].append(embeddings[0][[row in paired for row in rows.tolist()]])
            if noises > 1:
                found["rms"].append(mean_pairwise_rms(torch.stack(made, 1)))
            if statistics is not None:
                statistics.update(vectors[0])
                if noises > 1:
                    found["apart"].append(mean_pairwise_distance(torch.stack(vectors, 1)))
    finally:
        generator.train(training)
    measured = {key: torch.cat(values) for key, values in found.items()}
    return measured if statistics is None else measured | {"mean": statistics.mean, "cov": statistics.cov}


def _measure_real(
    dataset: PreparedDataset,
    indices: np.ndarray,
    batch: int,
    encoder: Encoder,
    network: FeatureNetwork | None,
    device: torch.device | str,
    folder: Path,
) -> dict[str, Tensor]:
    """`identity` [N] of the real photos, and with a feature network `mean` and `cov` of their features; cached."""

    @torch.inference_mode()
    def identity() -> dict[str, Tensor]:
        found = []
        for _, photos in _batches(dataset, indices, batch, f"real, {encoder.id}"):
            found.append(cosine(encoder.embed(to_x(photos.images.to(device))).cpu(), photos.c))
        return {"identity": torch.cat(found)}

    @torch.inference_mode()
    def statistics() -> dict[str, Tensor]:
        assert network is not None
        found = FeatureStatistics(network.dim)
        for _, photos in _batches(dataset, indices, batch, f"real, {network.id}"):
            found.update(network.features(to_x(photos.images.to(device))))
        return {"mean": found.mean, "cov": found.cov}

    # The embeddings tell which photos were chosen, whatever split, limit or subset they come from.
    chosen = hashlib.sha256(dataset.embeddings(indices).numpy().tobytes()).hexdigest()
    content = dataset.manifest["content_sha256"], chosen
    where = f"{_split(dataset)}-{len(indices)}"
    key = *content, encoder.id, encoder.weights_sha256, str(encoder.dtype)
    real = _cached(folder, f"{encoder.id}-{where}", key, identity)
    if network is not None:
        real |= _cached(folder, f"{network.id}-{where}", (*content, network.id, str(network.dtype)), statistics)
    return real


def _cached(folder: Path, name: str, key: Sequence[str], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives, from a file in `folder` if one was written for this name, key and version."""
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, name, *key]).encode()).hexdigest()
    path = folder / f"{name}-{digest[:32]}.safetensors"
    if path.is_file():
        try:
            return dict(safetensors.torch.load_file(path))
        except Exception as error:  # safetensors raises its own error, OSError or ValueError; the file is only a copy
            print(f"vultus: note: {path}: cannot be read ({type(error).__name__}), computed again", file=sys.stderr)
    tensors = compute()
    try:
        make_folder(folder)
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(tensors, temporary)
    except (OSError, UserError) as error:  # a full disk must not cost the evaluation
        print(f"vultus: note: {path}: not cached ({error})", file=sys.stderr)
    return tensors


# --- numbers from arrays ------------------------------------------------------------------------------------------


def _mean_std(key: str, values: Tensor) -> dict[str, float]:
    return {key: values.mean().item(), f"{key}_std": values.std(correction=0).item()}


def _mean_over_people(values: Tensor, people: list[str]) -> float:
    """Mean over people of the mean over a person's rows, so that a person with many photos counts once."""
    _, place = np.unique(people, return_inverse=True)
    sums, counts = np.bincount(place, weights=values.numpy()), np.bincount(place)
    return float((sums / counts).mean())


def _identity_diversity(made: Tensor, real: Tensor) -> dict[str, float]:
    results = {}
    for suffix, embeddings in (("", made), ("_real", real)):
        cosines = pair_cosines(embeddings)
        results[f"diversity_identity{suffix}"] = 1 - cosines.double().mean().item()
        results[f"pairs_above_{COLLAPSE}{suffix}"] = (cosines > COLLAPSE).double().mean().item()
    return results


# --- a table ------------------------------------------------------------------------------------------------------

CONTEXT = ("cur_nimg", "split", "n_images", "n_people", "noises", "seed", "resolution", "device", "seconds")


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Results of several runs, {name: evaluate(...)}, as a Markdown table: a column for each, then their notes.

    A `_std` stands beside its mean. A number that a run lacks is shown as a dash. Numbers whose names differ (another
    N, another split) never share a row.
    """
    keys = dict.fromkeys(key for result in results.values() for key, value in result.items() if _is_row(key, value))
    rows = [["", *results]]
    rows += [[key, *(_cell(result, key) for result in results.values())] for key in keys]
    rows += [[key, *(str(result.get(key, "-")) for result in results.values())] for key in CONTEXT]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = [f"{name}: {note}" for name, result in results.items() for note in result.get("notes", ())]
    return "\n".join([*(f"| {line} |" for line in lines), *(["", *notes] if notes else [])])


def _is_row(key: str, value: Any) -> bool:
    return isinstance(value, float) and key not in CONTEXT and not key.endswith("_std")


def _cell(result: dict[str, Any], key: str) -> str:
    value, spread = result.get(key), result.get(f"{key}_std")
    if value is None:
        return "-"
    digits = 2 if key.startswith(("fd_", "psnr")) else 4
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")

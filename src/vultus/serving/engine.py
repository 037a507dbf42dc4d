"""What a server does with embeddings and photos, without HTTP: one generator, one reader of photos, encoders of files.

Three kinds of threads: the generator's (batching.py), which mark the faces too, one that reads photos and compares
faces (FaceNet, the detector and the judge), and a few that encode pictures. Nothing that comes in is written anywhere.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vultus._download import missing_weights, weights_available
from vultus.errors import UserError
from vultus.evaluation.backbones import face_recognition as judges
from vultus.evaluation.backbones.face_recognition import Judge, load_judge
from vultus.evaluation.verification import row_scores
from vultus.images import align as faces
from vultus.images.io import centre_crop, from_pil, to_pil, to_x
from vultus.images.watermark import mark_pixels
from vultus.images.xmp import Kind, Origin, encode_marked, model_id
from vultus.models.facenet import FACENET_WEIGHTS, FaceNet, load_facenet
from vultus.models.snapshot import Snapshot
from vultus.sampling.conditioning import EmbeddedPhoto, check_encoder, embed_photo
from vultus.sampling.population import noise, sample_identities
from vultus.serving.batching import SIZES, Batcher

KINDS: dict[str, Kind] = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}

# Scores of two photos of one person and of two people: 5th percentile, mean, 95th percentile over all pairs of the
# 2,527 CelebA photos of 118 test people, at 128x128 (27,390 pairs of one person, 3,164,211 of two). From
# scripts/same_person.py.
NATURAL: dict[str, dict[str, tuple[float, float, float]]] = {
    "facenet": {"same_person": (0.401, 0.691, 0.884), "different_people": (-0.221, 0.023, 0.282)},
    "dlib": {"same_person": (-0.628, -0.467, -0.328), "different_people": (-1.004, -0.855, -0.701)},
}


class Engine:
    """One snapshot and what is at hand for photos.

    Args:
        snapshot: loaded to the device that is to be used.
        name: what pictures and answers call the model; by default the start of the snapshot's sha256.
        encoder: FaceNet, or None with the reason in `missing["photos"]`.
        judge: or None with the reason in `missing["dlib"]`.
        align: find and align the face in photos.
        missing: what is not at hand: "photos", "dlib", "align", "random" -> a line that says how to get it.
        exact: draw in calls of 16 faces only (see batching.py).
        mark: put the invisible watermark into every face; the metadata of pictures say what they are either way.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        name: str | None = None,
        encoder: FaceNet | None = None,
        judge: Judge | None = None,
        align: bool = False,
        missing: dict[str, str] | None = None,
        exact: bool = False,
        mark: bool = True,
    ) -> None:
        self.snapshot, self.encoder, self.judge, self.align = snapshot, encoder, judge, align
        self.missing = dict(missing or {})
        self.name = name or model_id(snapshot.path)
        self.people = {
            key: value.double() for key, value in snapshot.population.items()
        }  # as sample_identities wants them
        if not {"mean", "factor"} <= self.people.keys():
            self.missing["random"] = "the snapshot holds no description of people to draw from"
        # On a processor each of two calls has half of the threads (verbs_serve.py); a graphics card has one queue.
        calls = 2 if next(snapshot.network.parameters()).device.type == "cpu" else 1
        self.batcher = Batcher(
            snapshot.network,
            sizes=SIZES[-1:] if exact else SIZES,
            calls=calls,
            after=_marked if mark else None,
        )
        self.reader = ThreadPoolExecutor(1, "reader")
        self.encoders = ThreadPoolExecutor(min(4, torch.get_num_threads()), "encoder")

    def warm_up(self) -> None:
        """Run every network once, so that the first request finds everything loaded."""
        self.batcher.warm_up()
        photo = io.BytesIO()
        Image.new("RGB", (128, 128), "grey").save(photo, "PNG")
        if self.encoder is not None:
            if self.align:
                faces.find_eyes(Image.open(photo))
            seen = embed_photo(photo.getvalue(), self.encoder, align=False)
            z, c, _ = self.rows(seen.c[None], 1, 0, 1.0)
            self.compare(self.draw(z, c).result(), c, seen)

    def close(self) -> None:
        """Finish what was begun, then end the threads."""
        self.batcher.close()
        self.reader.shutdown()
        self.encoders.shutdown()

    # --- work for threads ---------------------------------------------------------------------------------------------

    def rows(self, c: Tensor, num: int, seed: int, strength: float) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Noise z [N * num, z_dim] and c [N * num, c_dim] of `num` faces of each embedding, and their places.

        The noise depends on (seed, variant) alone, not on the place in the request: an embedding asked for alone or
        among others gets the same faces, those of the first embedding in `vultus generate`.
        """
        z = torch.cat([_noise(seed, variant, self.snapshot.network.z_dim) for variant in range(num)])
        places = [(index, variant) for index in range(len(c)) for variant in range(num)]
        return (z * strength).repeat(len(c), 1), c.repeat_interleave(num, 0), places

    def draw(self, z: Tensor, c: Tensor) -> Future[Tensor]:
        """A future of uint8 [N, 3, R, R], with the watermark in each face where this engine marks."""
        return self.batcher.submit(z, c)

    def look(self, data: bytes, max_pixels: int) -> EmbeddedPhoto:
        """Embed a photo. Raises BadImage."""
        assert self.encoder is not None
        return embed_photo(data, self.encoder, align=self.align, max_pixels=max_pixels)

    def random(self, seed: int, num: int) -> Tensor:
        """Embeddings [num, c_dim] of people who do not exist."""
        return sample_identities(self.people, num, seed=seed)

    @torch.inference_mode()
    def compare(self, images: Tensor, c: Tensor, seen: EmbeddedPhoto | None) -> list[dict[str, float | None]]:
        """How alike faces uint8 [N, 3, R, R] are to what they were made of.

        `facenet`: cosine to the embedding asked for, c [N, c_dim]. `dlib`: minus the distance to the photo, where there
        is one. As evaluation measures identity_facenet and identity_dlib. None where it can't be said.
        """
        x = to_x(images)
        scores: dict[str, list[float | None]] = {"facenet": [None] * len(x), "dlib": [None] * len(x)}
        if self.encoder is not None:
            made = self.encoder.embed(x.to(next(self.encoder.parameters()).device)).cpu()
            scores["facenet"] = row_scores(made, c, "cosine").tolist()
        if self.judge is not None and seen is not None:
            frame = to_x(from_pil([centre_crop(seen.frame, x.shape[-1])]))
            both = self.judge.embed(torch.cat([frame, x])).cpu()
            scores["dlib"] = row_scores(both[1:], both[:1].expand(len(x), -1), self.judge.similarity).tolist()
        return [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]

    def encode(self, images: Tensor, places: list[tuple[int, int]], form: str, seed: int) -> list[bytes]:
        """A file of each face, of the embedding and the noise in `places`. Its metadata say that it is synthetic."""
        origins = (Origin(self.name, seed, f"embedding {index}, noise {variant}") for index, variant in places)
        return [
            encode_marked(to_pil(image), KINDS[form], origin, watermark=False)
            for image, origin in zip(images, origins, strict=True)
        ]


def _marked(images: Tensor) -> Tensor:
    return torch.from_numpy(mark_pixels(images.numpy()))


@functools.lru_cache(maxsize=4096)
def _noise(seed: int, variant: int, z_dim: int) -> Tensor:
    """Kept, because most requests leave the seed as it is."""
    return noise(seed, 0, 1, z_dim, variant=variant)


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def npy(images: Tensor) -> bytes:
    """uint8 [N, 3, R, R] -> a .npy file of uint8 [N, R, R, 3]."""
    buffer = io.BytesIO()
    np.save(buffer, images.permute(0, 2, 3, 1).contiguous().numpy())
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """A PNG file of a photo's crop; no mark, for no model made it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# --- what comes in ----------------------------------------------------------------------------------------------------


class BadEmbedding(ValueError):
    """Numbers that are no embeddings. The message is one line."""


def unit_rows(values: np.ndarray, c_dim: int) -> Tensor:
    """Numbers [N, c_dim] or [c_dim] -> float32 rows of unit norm. Raises BadEmbedding that names the row."""
    rows = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[1] != c_dim or not len(rows):
        raise BadEmbedding(f"shape {list(np.shape(values))}; this model takes rows of {c_dim} numbers")
    for index, row in enumerate(rows):
        if not np.isfinite(row).all():
            raise BadEmbedding(f"embedding {index} holds a number that is not finite")
        if not row.any():
            raise BadEmbedding(f"embedding {index} is all zeros, which is no face")
    # Divided by the largest entry first: the square of a tiny or huge one leaves the range of numbers.
    rows = rows / np.abs(rows).max(1, keepdims=True)
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def read_npy(data: bytes, c_dim: int) -> Tensor:
    """A .npy file -> float32 rows of unit norm.

    Raises ValueError, or what else numpy raises, if it is no such file, and BadEmbedding for its numbers.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind not in "fiu":
        raise ValueError(f"holds {dtype.name} values, not numbers")
    # A header may claim any size: the data must be there before an array is made for them.
    if len(data) - file.tell() != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"its length does not fit its shape {list(shape)}")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    return unit_rows(values, c_dim)


# --- what is at hand --------------------------------------------------------------------------------------------------


def open_engine(snapshot: Snapshot, *, align: bool | None = None, device: str = "cpu", **settings: Any) -> Engine:
    """An engine with all that is at hand, and a line for what is not. Nothing is fetched from the network.

    `align` None: where the extra is installed. Raises UserError if `align` is asked for and is not installed, or
    weights at hand are damaged.
    """
    missing: dict[str, str] = {}
    if align and not faces.available():
        raise UserError(faces.MISSING)
    if not faces.available():
        missing["align"] = "photos are not aligned, the centre square is taken; pip install 'vultus[align]' and restart"
    encoder = _or_missing(missing, "photos", functools.partial(_facenet, snapshot, device))
    judge = _or_missing(missing, "dlib", functools.partial(_dlib, device))
    align = faces.available() if align is None else align
    return Engine(snapshot, encoder=encoder, judge=judge, align=align, missing=missing, **settings)


def _or_missing(missing: dict[str, str], key: Literal["photos", "dlib"], load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError as error:
        missing[key] = str(error)
        return None


def _facenet(snapshot: Snapshot, device: str) -> FaceNet:
    check_encoder(snapshot)
    if not weights_available(*FACENET_WEIGHTS):
        raise UserError(f"photos need FaceNet: {missing_weights(*FACENET_WEIGHTS)}, then start the server again")
    return load_facenet(device=device, dtype=torch.float32)


def _dlib(device: str) -> Judge:
    if not judges.judge_available():
        raise UserError(judges.MISSING)
    return load_judge("dlib", device=device)

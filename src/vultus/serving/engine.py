"""Generation, photos and similarities for a server, without HTTP.

Three kinds of threads: those of the batcher (generator and watermark), one for photos (detection, FaceNet, dlib), and a
few that encode image files. Nothing is written to disk.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vultus._download import missing_weights, weights_available
from vultus.errors import UserError
from vultus.evaluation.backbones import face_recognition
from vultus.evaluation.backbones.face_recognition import Judge, load_judge
from vultus.evaluation.verification import row_scores
from vultus.images import align as face_alignment
from vultus.images.io import centre_crop, from_pil, to_pil, to_x
from vultus.images.watermark import mark_pixels
from vultus.images.xmp import Origin, encode_marked, model_id
from vultus.models.encoders import FACENET_ID, CropEncoder, device_of, load_condition_encoder
from vultus.models.facenet import FACENET_WEIGHTS
from vultus.models.mobilefacenet import MOBILEFACENET_WEIGHTS, MobileFaceNet
from vultus.models.snapshot import Snapshot
from vultus.sampling.directions import Directions, load_directions
from vultus.sampling.latents import noise, sample_identities
from vultus.sampling.photos import EmbeddedPhoto, WhichFace, embed_faces
from vultus.serving.batching import BATCH_SIZES, Batcher, NotFinite

IMAGE_FORMATS: dict[str, Literal["PNG", "WEBP", "JPEG"]] = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}

# Similarities of photo pairs, of one person and of two people: 5th percentile, mean, 95th percentile over all pairs of
# the 2,527 CelebA photos of 118 test people, at 128x128 (27,390 pairs of one person, 3,164,211 of two). Computed by
# scripts/same_person.py.
REAL_PAIRS: dict[str, dict[str, tuple[float, float, float]]] = {
    "facenet": {"same_person": (0.401, 0.691, 0.884), "different_people": (-0.221, 0.023, 0.282)},
    "dlib": {"same_person": (-0.628, -0.467, -0.328), "different_people": (-1.004, -0.855, -0.701)},
}

Place = tuple[int, int]  # (number of the embedding, variant: index of the noise)


class Engine:
    """One snapshot, and the networks for photos that are available.

    Args:
        snapshot: on the device that generates.
        name: name of the model in responses and image metadata; default: the start of the snapshot's sha256.
        encoder: that of the condition; None with the reason in `missing["photos"]`.
        judge: dlib's face recognition, which is independent of the training; None with the reason in
            `missing["dlib"]`.
        align: detect and align the face in photos.
        directions: of the edits that are offered, for the embeddings of the snapshot.
        missing: unavailable features, "photos", "dlib", "align" or "random" -> one line: why, and the remedy.
        exact: call the generator with batches of 16 only (see batching.py).
        watermark: add the invisible watermark to every face. Image metadata are written in any case.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        name: str | None = None,
        encoder: CropEncoder | None = None,
        judge: Judge | None = None,
        align: bool = False,
        directions: Directions | None = None,
        missing: dict[str, str] | None = None,
        exact: bool = False,
        watermark: bool = True,
    ) -> None:
        self.snapshot, self.encoder, self.judge, self.align = snapshot, encoder, judge, align
        self.directions = directions
        self.missing = dict(missing or {})
        self.name = name or model_id(snapshot.path)
        # sample_identities computes in float64; converted once, not for every request.
        self.population = {key: value.double() for key, value in snapshot.population.items()}
        if not {"mean", "factor"} <= self.population.keys():
            self.missing["random"] = "this snapshot has no population prior to sample random people from"
        # On a CPU each of two concurrent calls has half of the cores (see cli/serve.py); a GPU runs one at a time.
        concurrent_calls = 2 if next(snapshot.network.parameters()).device.type == "cpu" else 1
        self.batcher = Batcher(
            snapshot.network,
            sizes=BATCH_SIZES[-1:] if exact else BATCH_SIZES,
            concurrent_calls=concurrent_calls,
            postprocess=_add_watermark if watermark else None,
        )
        self.photo_thread = ThreadPoolExecutor(1, "photos")
        self.encode_threads = ThreadPoolExecutor(min(4, torch.get_num_threads()), "encode")

    def check(self) -> None:
        """Generate one face. Raises UserError that names the snapshot if the output is not finite."""
        network = self.snapshot.network
        c = torch.full((1, network.c_dim), network.c_dim**-0.5)
        try:
            self.generate(_noise(0, 0, 0, network.z_dim), c).result()
        except NotFinite as error:
            raise UserError(f"{self.snapshot.path or self.name}: {error}; serve another snapshot") from None

    def warm_up(self) -> None:
        """Run every network once, so that the first request does not pay for initialisation."""
        self.batcher.warm_up()
        photo = io.BytesIO()
        Image.new("RGB", (128, 128), "grey").save(photo, "PNG")
        if self.encoder is not None:
            if self.align:
                face_alignment.find_eyes(Image.open(photo))
            (embedded,) = embed_faces(photo.getvalue(), self.encoder, align=False)
            z, c, _ = self.generator_inputs(embedded.c[None], 1, 0, 1.0)
            self.similarities(self.generate(z, c).result(), c, [embedded])

    def close(self) -> None:
        """Finish the work in progress, then end the threads."""
        self.batcher.close()
        self.photo_thread.shutdown()
        self.encode_threads.shutdown()

    def generator_inputs(
        self, c: Tensor, num: int, seed: int, noise_strength: float, start: int = 0
    ) -> tuple[Tensor, Tensor, list[Place]]:
        """For `num` faces of each embedding c [N, c_dim]: z [N * num, z_dim], c [N * num, c_dim], and their places.

        The embeddings have the numbers `start` to `start + N - 1`. The noise depends on (seed, number of the embedding,
        variant) alone, as in `vultus generate`.
        """
        places = [(start + index, variant) for index in range(len(c)) for variant in range(num)]
        z = torch.cat([_noise(seed, index, variant, self.snapshot.network.z_dim) for index, variant in places])
        return z * noise_strength, c.repeat_interleave(num, 0), places

    def generate(self, z: Tensor, c: Tensor) -> Future[Tensor]:
        """A future of uint8 [N, 3, R, R], watermarked unless the engine was told not to."""
        return self.batcher.submit(z, c)

    def edit(self, c: Tensor, edits: Mapping[str, float]) -> Tensor:
        """Embeddings c [N, c_dim] moved by edits; see Directions.edit."""
        return self.directions.edit(c, edits) if self.directions is not None else c

    def embed(self, photo: bytes, which: WhichFace, max_pixels: int) -> list[EmbeddedPhoto]:
        """Embed faces of a photo file. Raises BadImage."""
        assert self.encoder is not None
        return embed_faces(photo, self.encoder, align=self.align, which=which, max_pixels=max_pixels)

    def random_identities(self, seed: int, start: int, num: int) -> Tensor:
        """Embeddings [num, c_dim] of the random identities from number `start` on."""
        return sample_identities(self.population, num, seed=seed, start=start)

    @torch.inference_mode()
    def similarities(self, images: Tensor, c: Tensor, photos: Sequence[EmbeddedPhoto]) -> list[dict[str, float | None]]:
        """Similarity of generated faces, uint8 [N, 3, R, R], to their source; None where it is not available.

        `facenet`: cosine of the face's embedding and the given embedding c [N, c_dim]. `dlib`: minus the Euclidean
        distance of dlib's descriptors of face and source photo; each of `photos` has equally many faces, in order.
        Defined as identity_facenet and identity_dlib are.
        """
        x = to_x(images)
        scores: dict[str, list[float | None]] = {"facenet": [None] * len(x), "dlib": [None] * len(x)}
        if self.encoder is not None and self.encoder.id == FACENET_ID:
            embeddings = self.encoder.embed(x.to(device_of(self.encoder))).cpu()
            scores["facenet"] = row_scores(embeddings, c, "cosine").tolist()
        if self.judge is not None and photos:
            frames = to_x(from_pil([centre_crop(photo.frame, x.shape[-1]) for photo in photos]))
            of_photos, of_faces = self.judge.embed(torch.cat([frames, x])).cpu().split([len(frames), len(x)])
            of_photos = of_photos.repeat_interleave(len(x) // len(photos), 0)
            scores["dlib"] = row_scores(of_faces, of_photos, self.judge.similarity).tolist()
        return [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]

    def encode(self, images: Tensor, places: list[Place], image_format: str, seed: int) -> list[bytes]:
        """An image file of each face, uint8 [N, 3, R, R], whose metadata mark it as synthetic."""
        origins = (Origin(self.name, seed, f"embedding {index}, noise {variant}") for index, variant in places)
        return [
            encode_marked(to_pil(image), IMAGE_FORMATS[image_format], origin, watermark=False)
            for image, origin in zip(images, origins, strict=True)
        ]


def _add_watermark(images: Tensor) -> Tensor:
    return torch.from_numpy(mark_pixels(images.numpy()))


@functools.lru_cache(maxsize=4096)
def _noise(seed: int, index: int, variant: int, z_dim: int) -> Tensor:
    """z [1, z_dim]; cached, because most requests use the default seed."""
    return noise(seed, index, 1, z_dim, variant=variant)


# --- which parts are available ----------------------------------------------------------------------------------------


def open_engine(
    snapshot: Snapshot,
    *,
    align: bool | None = None,
    device: str = "cpu",
    encoder_file: str | None = None,
    directions_file: str | None = None,
    **options: Any,
) -> Engine:
    """An engine with every network whose weights are available locally; nothing is downloaded.

    Args:
        snapshot: on the device that generates.
        align: detect and align faces in photos; None: if the extra `align` is installed.
        device: for the encoder of the condition and dlib.
        encoder_file: the ONNX file of the encoder of the condition, where it is one.
        directions_file: of edits; None: those of the package, if they are for the embeddings of the snapshot.
        options: of Engine.

    Raises UserError if `align` is True and the extra is not installed, or if weights are damaged.
    """
    missing: dict[str, str] = {}
    can_align = face_alignment.available()
    if align and not can_align:
        raise UserError(face_alignment.MISSING)
    if not can_align:
        missing["align"] = (
            "faces in photos are not detected and aligned, the centre square is used instead; "
            "pip install 'vultus[align]' and restart the server"
        )
    encoder = _load_or_note(missing, "photos", functools.partial(_load_encoder, snapshot, device, encoder_file))
    judge = _load_or_note(missing, "dlib", functools.partial(_load_dlib, device))
    align = can_align if align is None else align
    try:
        options["directions"] = load_directions(directions_file, snapshot)
    except UserError:
        if directions_file is not None:
            raise
    return Engine(snapshot, encoder=encoder, judge=judge, align=align, missing=missing, **options)


def _load_or_note(missing: dict[str, str], feature: Literal["photos", "dlib"], load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError as error:
        missing[feature] = str(error)
        return None


def _load_encoder(snapshot: Snapshot, device: str, given: str | None) -> CropEncoder:
    needed = (snapshot.metadata.get("encoder") or {}).get("id", FACENET_ID)
    known = {FACENET_ID: ("FaceNet", FACENET_WEIGHTS), MobileFaceNet.id: ("MobileFaceNet", MOBILEFACENET_WEIGHTS)}
    name, files = known.get(needed, ("", ()))
    if files and not weights_available(*files):
        raise UserError(f"photos need {name}: {missing_weights(*files)}, then restart the server")
    return load_condition_encoder(snapshot.metadata, snapshot.path or "the snapshot", given=given, device=device)


def _load_dlib(device: str) -> Judge:
    if not face_recognition.judge_available():
        raise UserError(face_recognition.MISSING)
    return load_judge("dlib", device=device)

"""Faces on the way from one embedding to another: a strip, an animation, single frames, a video."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vultus._files import atomic_path, make_folder
from vultus._outputs import Inputs, check_output
from vultus._ranges import NoiseStrength, Seed, Steps, checks_arguments
from vultus.errors import UserError, in_one_line
from vultus.images.io import grid as lay_out
from vultus.images.io import to_pil
from vultus.images.xmp import Origin, Sign, check_marked, mark_gif, save_marked, write_marked
from vultus.models.snapshot import Snapshot
from vultus.sampling.face_files import Face, FaceList, Pictures, save_faces
from vultus.sampling.generate import PNG, file_of, folder_of, marked, model_of, render
from vultus.sampling.latents import noise, slerp

MISSING_VIDEO = "--mp4 needs PyAV: pip install 'vultus[video]'"
PIXELS = "yuv420p"  # what every player reads; it needs even sides


@checks_arguments
def interpolate(
    snapshot: Snapshot,
    a: Tensor,
    b: Tensor,
    out: str | Path,
    *,
    steps: Steps = 9,
    seed: Seed = 0,
    dtype: torch.dtype | None = None,
    noise_strength: NoiseStrength = 1.0,
    milliseconds: int = 120,
    frames: bool = False,
    mp4: bool = False,
    pictures: Pictures = PNG,
    mark: bool = True,
    signer: Sign | None = None,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
    noted: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Faces along the arc from embedding `a` to `b` [c_dim], all with the same noise.

    Writes between.png (a row of `steps` faces) and between.gif (forward and back, `milliseconds` a frame) into the
    folder `out` and returns the paths of all files. With `frames` also 000000_0.png and so on, listed in faces.jsonl;
    with `mp4` also between.mp4, H.264, as the GIF. The other arguments as in `generate`, but GIF and MP4 are not
    signed; `noted` is added to the lines of faces.jsonl. Raises UserError unless `steps` is 2 to 240, and without PyAV
    for an MP4.
    """
    out = folder_of(out, "between.png and between.gif", remedy="leave the suffix out")
    strip, animation, video = out / "between.png", out / "between.gif", out / "between.mp4"
    read = Inputs([*inputs, *file_of(snapshot)])
    for path in (strip, animation):
        read.check(path)
        if not overwrite:
            check_marked(path)
    if mp4:
        _video_library()
        check_output(video, inputs=read, own=_is_own_video, overwrite=overwrite)
    make_folder(out)
    # torch.linspace rounds differently.
    c = slerp(a, b, torch.from_numpy(np.linspace(0, 1, steps, dtype=np.float32)))
    z = noise(seed, 0, 1, snapshot.network.z_dim) * noise_strength
    images = pictures.resized(render(snapshot.network, z.expand(steps, -1), c, dtype))
    images = marked(images) if mark else images
    origin = Origin(model_of(snapshot), seed, pictures.about(snapshot.network.resolution))
    sheet = lay_out(images, steps)
    save_marked(sheet, strip, origin, watermark=False, signer=signer, inputs=read, overwrite=overwrite)
    there_and_back = [to_pil(image) for image in [*images, *images[1:-1].flip(0)]]
    buffer = io.BytesIO()
    shown = [image.quantize(256) for image in there_and_back]
    options: dict[str, Any] = {"append_images": shown[1:], "duration": milliseconds, "loop": 0}
    shown[0].save(buffer, "GIF", save_all=True, comment=origin.description.encode(), **options)
    write_marked(mark_gif(buffer.getvalue(), origin), animation, inputs=read, overwrite=overwrite)
    paths = [strip, animation]
    if frames:
        faces = [Face(number, number, 0, f"{number:06d}", 0) for number in range(steps)]
        with FaceList(out) as listed:
            saved = save_faces(faces, images, out, steps, origin, signer, read, pictures=pictures, overwrite=overwrite)
            for face, path in zip(faces, saved, strict=True):
                about = {
                    **(noted or {}),
                    "source": "between",
                    "position": round(face.number / (steps - 1), 6),
                    "noise": face.noise,
                }
                listed.add(path, **about, seed=seed, noise_strength=noise_strength, model=origin.model)
        paths += saved
    if mp4:
        _write_video(there_and_back, video, origin, milliseconds)
        paths.append(video)
    return paths


def _video_library() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise UserError(MISSING_VIDEO) from None


def _write_video(images: list[Image.Image], path: Path, origin: Origin, milliseconds: int) -> None:
    """An H.264 video, whose comment says that it is generated."""
    av = _video_library()
    side = images[0].width // 2 * 2
    with atomic_path(path) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4") as container:
                container.metadata["comment"] = origin.description
                container.metadata["encoder"] = "vultus"
                stream = container.add_stream("libx264", rate=Fraction(1000, milliseconds))
                stream.width = stream.height = side
                stream.pix_fmt = PIXELS
                stream.options = {"crf": "14", "threads": "1"}
                for image in images:
                    for packet in stream.encode(av.VideoFrame.from_image(image.crop((0, 0, side, side)))):
                        container.mux(packet)
                for packet in stream.encode():
                    container.mux(packet)
        except av.FFmpegError as error:
            raise UserError(f"{path}: cannot be written ({in_one_line(error)[:120]}); leave --mp4 out") from None


def _is_own_video(path: Path) -> bool:
    av = _video_library()
    try:
        with av.open(str(path)) as container:
            return "AI-generated face" in container.metadata.get("comment", "")
    except (av.FFmpegError, OSError):
        return False

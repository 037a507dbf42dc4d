"""Images that show a training: fixed people x fixed noise, and how their faces change.

samples/<cur_nimg>.png   a row for each person: the photo, then a generated face for each noise vector
samples/<cur_nimg>.npz   the same as arrays, see sample_files.py
samples/progress.png     a column for each person: the photo on top, then the face of the first noise vector, a row for
                         each sample; made from the arrays
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vultus._files import make_folder
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.images.io import grid, to_images, to_pil
from vultus.images.xmp import Origin, save_marked
from vultus.models.generators import GeneratorNetwork
from vultus.sampling.latents import noise
from vultus.training.sample_files import GAP, LABELLED_SIDE, Samples, read_sample, sample_paths, write_samples

ROWS = 12  # of the progress strip, with the row of photos; a long run shows a selection of its samples
PEOPLE, VARIANTS, SEED = 8, 5, 1
STRIP = "progress.png"
MARGIN = 64  # pixels on the left, for the number of images seen


class SampleGrid:
    """The people and the noise that all samples of a run show.

    Args:
        folder: where the samples are written.
        photos: uint8 [P, 3, R, R], a photo of each person.
        c: embeddings [P, c_dim].
        z: noise [K, z_dim].
    """

    def __init__(self, folder: Path, photos: Tensor, c: Tensor, z: Tensor) -> None:
        self.folder, self.photos, self.c, self.z = folder, photos, c, z

    @classmethod
    def of_dataset(cls, dataset: PreparedDataset, folder: Path, z_dim: int) -> SampleGrid:
        """The first PEOPLE people of the test split, or of `dataset` where there is none, under VARIANTS vectors."""
        with contextlib.suppress(UserError):  # no test split
            dataset = dataset.with_split("test")
        batch = dataset.batch(dataset.people(PEOPLE))
        return cls(folder, batch.images, batch.c, noise(SEED, 0, VARIANTS, z_dim))

    def draw(self, generator: GeneratorNetwork, cur_nimg: int, device: torch.device | str, dtype: torch.dtype) -> Path:
        """Generate the samples of this generator and write all three files; returns the path of the sheet.

        The sheet is written last: where it is, the samples are complete.
        """
        people, variants = len(self.photos), len(self.z)
        z = self.z.repeat(people, 1).to(device, dtype)
        with torch.inference_mode():
            x = generator(z, self.c.repeat_interleave(variants, 0).to(device))
        generated = to_images(x).cpu().unflatten(0, (people, variants))
        path = make_folder(self.folder) / f"{cur_nimg:010d}.png"
        write_samples(path.with_suffix(".npz"), self.photos.numpy(), generated.numpy())
        self.strip(cur_nimg)
        sheet = torch.cat([self.photos[:, None], generated], 1).flatten(0, 1)
        labels = ["photo", *["generated"] * variants] if self.photos.shape[-1] >= LABELLED_SIDE else []
        _save(grid(sheet, variants + 1, gap=GAP, labels=labels), path, cur_nimg)
        return path

    def complete(self, cur_nimg: int) -> bool:
        """Whether the samples after so many images are written."""
        return (self.folder / f"{cur_nimg:010d}.png").is_file()

    def strip(self, cur_nimg: int) -> Path:
        """Write the progress strip from the samples of up to `cur_nimg` images, those of earlier sessions included."""
        people, side = len(self.photos), self.photos.shape[-1]
        rows: list[tuple[str, list[Image.Image]]] = [("photo", [to_pil(photo) for photo in self.photos])]
        rows += [
            (f"{samples.cur_nimg:,}", [to_pil(faces[0]) for faces in samples.generated])
            for samples in self._chosen(cur_nimg)
        ]
        strip = Image.new("RGB", (MARGIN + people * (side + GAP), len(rows) * (side + GAP)), "white")
        draw = ImageDraw.Draw(strip)
        for row, (label, faces) in enumerate(rows):
            for column, face in enumerate(faces[:people]):
                strip.paste(face, (MARGIN + column * (side + GAP), row * (side + GAP)))
            position = (4, row * (side + GAP) + side // 2 - 6)
            draw.text(position, label, fill="black", font=ImageFont.load_default(11))
        path = self.folder / STRIP
        _save(strip, path, cur_nimg)
        return path

    def _chosen(self, cur_nimg: int) -> list[Samples]:
        """Up to ROWS - 1 samples, evenly spread from the first to the last; an unreadable one is left out."""
        paths = [path for nimg, path in sample_paths(self.folder) if nimg <= cur_nimg]
        count = min(len(paths), ROWS - 1)
        samples: list[Samples] = []
        for k in range(count):
            path = paths[round(k * (len(paths) - 1) / max(count - 1, 1))]
            with contextlib.suppress(UserError):
                samples.append(read_sample(path, self.photos.shape[-1]))
        return samples


def _save(sheet: Image.Image, path: Path, cur_nimg: int) -> None:
    """Save without a watermark: these sheets show the generator's pixels unchanged, beside real photos."""
    origin = Origin("", detail=f"in training, after {cur_nimg} images", photos=True)
    save_marked(sheet, path, origin, watermark=False)

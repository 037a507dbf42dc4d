"""The pictures that show a training: fixed people x fixed noise, and how they came to be.

samples/<nimg>.png     a row a person: the real photo, then a face for each noise
samples/progress.png   a column a person: the real photo on top, then the face of the first noise, a row a sample
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vultus._files import make_folder
from vultus.images.io import cell, grid, to_images
from vultus.images.xmp import Origin, save_marked
from vultus.models.generators import GeneratorNetwork

ROWS = 12  # of the strip, the photos among them: a long run shows every so-manieth sample
MARGIN = 64  # pixels for the images seen, beside a row


class Samples:
    """The people and the noise that every sheet of a run shows.

    Args:
        folder: where the sheets are written.
        photos: uint8 [P, 3, R, R], a photo of each person.
        c: embeddings [P, c_dim].
        z: noise [K, z_dim].
    """

    def __init__(self, folder: Path, photos: Tensor, c: Tensor, z: Tensor) -> None:
        self.folder, self.photos, self.c, self.z = folder, photos, c, z
        self._labelled = photos.shape[-1] >= 64  # a word needs the width

    def draw(self, generator: GeneratorNetwork, cur_nimg: int, device: torch.device | str, dtype: torch.dtype) -> Path:
        """Write the sheet of this generator."""
        people, noises = len(self.photos), len(self.z)
        z = self.z.repeat(people, 1).to(device, dtype)
        with torch.inference_mode():
            x = generator(z, self.c.repeat_interleave(noises, 0).to(device))
        made = to_images(x).cpu().unflatten(0, (people, noises))
        sheet = torch.cat([self.photos[:, None], made], 1).flatten(0, 1)
        labels = ["photo", *["made"] * noises] if self._labelled else []
        path = make_folder(self.folder) / f"{cur_nimg:010d}.png"
        _save(grid(sheet, noises + 1, labels=labels), path, cur_nimg)
        return path

    def strip(self, cur_nimg: int) -> Path:
        """Write the strip, from the sheets of up to `cur_nimg` images: it needs no memory of earlier sessions."""
        paths = [path for path in sorted(self.folder.glob("[0-9]*.png")) if int(path.stem) <= cur_nimg]
        count = min(len(paths), ROWS - 1)
        chosen = [paths[round(k * (len(paths) - 1) / max(count - 1, 1))] for k in range(count)]
        people, side = len(self.photos), self.photos.shape[-1]
        strip = Image.new("RGB", (MARGIN + people * (side + 2), (len(chosen) + 1) * (side + 2)), "white")
        draw = ImageDraw.Draw(strip)
        for row, path in enumerate([chosen[0], *chosen]):
            with Image.open(path) as sheet:
                for person in range(people):
                    # Row 0 is the photos: the first column of any sheet.
                    picture = cell(sheet, person, min(row, 1), side, labelled=self._labelled)
                    strip.paste(picture, (MARGIN + person * (side + 2), row * (side + 2)))
            text = f"{int(path.stem):,}" if row else "photo"
            draw.text((4, row * (side + 2) + side // 2 - 6), text, fill="black", font=ImageFont.load_default(11))
        path = self.folder / "progress.png"
        _save(strip, path, cur_nimg)
        return path


def _save(sheet: Image.Image, path: Path, cur_nimg: int) -> None:
    """With pixels as the generator made them: whoever watches a training wants to see those, beside real photos."""
    origin = Origin("", detail=f"in training, after {cur_nimg} images", photos=True)
    save_marked(sheet, path, origin, watermark=False)

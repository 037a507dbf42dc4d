"""Images of many faces: the same faces as `generate` writes, in the right cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tiny_parts import DIM, SIDE, TinyGenerator
from vultus.errors import UserError
from vultus.images.io import from_pil
from vultus.models.snapshot import Snapshot
from vultus.sampling.conditioning import ConditionSource
from vultus.sampling.generate import generate
from vultus.sampling.grids import identity_sheet, interpolation_sheet, noise_sheet
from vultus.sampling.interpolate import interpolate

CELL = SIDE + 2


@pytest.fixture
def snapshot() -> Snapshot:
    return Snapshot(TinyGenerator(noise=0.5), {}, {"generator": {"c_dim": DIM}})


@pytest.fixture
def c() -> torch.Tensor:
    return F.normalize(torch.randn(3, DIM, generator=torch.Generator().manual_seed(0)), dim=1)


def cell(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    return np.asarray(sheet.crop((column * CELL, row * CELL, column * CELL + SIDE, row * CELL + SIDE)))


def test_identities_as_generate_writes_them(snapshot: Snapshot, c: torch.Tensor, tmp_path: Path) -> None:
    sheet = identity_sheet(snapshot, c, noises=2, seed=4, noise_strength=0.7)
    source = ConditionSource(3, [(["a", "b", "c"], c)])
    generate(snapshot, source, tmp_path / "grid.png", num=2, seed=4, grid=True, noise_strength=0.7)
    with Image.open(tmp_path / "grid.png") as expected:
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))


def test_identities_beside_their_photos(snapshot: Snapshot, c: torch.Tensor) -> None:
    photos = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    sheet = identity_sheet(snapshot, c, photos, noises=2)
    assert sheet.size == (3 * CELL - 2, 3 * CELL - 2)
    shown = from_pil([Image.fromarray(cell(sheet, row, 0)) for row in range(3)])
    assert torch.equal(shown, photos)
    alone = identity_sheet(snapshot, c, noises=2)
    assert np.array_equal(cell(sheet, 2, 2), cell(alone, 2, 1))
    with pytest.raises(UserError, match="photos of 16 pixels do not fit beside faces of 32"):
        identity_sheet(snapshot, c, photos[..., ::2, ::2])


def test_noise_of_increasing_strength(snapshot: Snapshot, c: torch.Tensor) -> None:
    sheet = noise_sheet(snapshot, c[0], strengths=(0, 0.5, 1), noises=2, seed=4)
    assert sheet.size == (3 * CELL - 2, 2 * CELL - 2)
    assert np.array_equal(cell(sheet, 0, 0), cell(sheet, 1, 0))  # no noise: the same face
    assert not np.array_equal(cell(sheet, 0, 1), cell(sheet, 1, 1))
    identities = identity_sheet(snapshot, c, noises=2, seed=4)
    assert np.array_equal(cell(sheet, 1, 2), cell(identities, 0, 1))  # factor 1: the usual noise


def test_interpolation_as_the_command_writes_it(snapshot: Snapshot, c: torch.Tensor, tmp_path: Path) -> None:
    sheet = interpolation_sheet(snapshot, c, steps=5, noises=2, seed=4)
    assert sheet.size == (5 * CELL - 2, 4 * CELL - 2)
    for row, (a, b) in ((0, (0, 1)), (2, (1, 2))):
        interpolate(snapshot, c[a], c[b], tmp_path, steps=5, seed=4, overwrite=True)
        with Image.open(tmp_path / "between.png") as strip:
            assert np.array_equal(np.asarray(sheet.crop((0, row * CELL, sheet.width, row * CELL + SIDE))), strip)
    assert np.array_equal(cell(sheet, 0, 4), cell(sheet, 2, 0))  # the end of an arc is the start of the next
    assert np.array_equal(cell(sheet, 1, 4), cell(sheet, 3, 0))
    assert not np.array_equal(cell(sheet, 0, 0), cell(sheet, 1, 0))
    with pytest.raises(UserError, match="two embeddings"):
        interpolation_sheet(snapshot, c[:1])

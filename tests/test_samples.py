"""The sample files of a run folder: arrays beside sheets, sheets of earlier versions, damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vultus._formats import VERSIONS
from vultus.training.sample_files import cells_of_sheet, read_samples, write_samples
from vultus.training.sample_grid import SampleGrid


class Noise(torch.nn.Module):
    """Generates pixels that depend on noise and embedding alone."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        random = torch.Generator().manual_seed(int(1e6 * float(z.sum() + c.sum())) % 2**31)
        return torch.rand(len(z), 3, self.side, self.side, generator=random) * 2 - 1


def grid(folder: Path, side: int) -> SampleGrid:
    photos = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return SampleGrid(folder, photos, torch.randn(3, 4), torch.randn(2, 5))


@pytest.mark.parametrize("side", [32, 64])
def test_arrays_and_sheet_are_the_same_pixels(side: int, tmp_path: Path) -> None:
    """With labels above the columns, which a sheet of larger images has, and without."""
    samples = grid(tmp_path, side)
    for nimg in (0, 8):
        sheet = samples.draw(Noise(side), nimg, "cpu", torch.float32)  # type: ignore[arg-type]
    new, messages = read_samples(tmp_path, side)
    assert messages == []
    assert [(each.cur_nimg, each.path.name) for each in new] == [(0, "0000000000.npz"), (8, "0000000008.npz")]
    assert np.array_equal(new[1].photos, samples.photos.numpy())
    assert new[1].generated.shape == (3, 2, 3, side, side)
    photos, generated = cells_of_sheet(sheet, side)
    assert np.array_equal(photos, new[1].photos)
    assert np.array_equal(generated, new[1].generated)
    with np.load(tmp_path / "0000000008.npz") as file:
        assert int(file["format"]) == VERSIONS["samples"]
    (tmp_path / "0000000000.npz").unlink()  # as earlier versions left it
    old, messages = read_samples(tmp_path, side)
    assert messages == []
    assert [each.path.name for each in old] == ["0000000000.png", "0000000008.npz"]
    assert np.array_equal(old[0].generated, new[0].generated)


def test_unreadable_samples_are_named_and_left_out(tmp_path: Path) -> None:
    samples = grid(tmp_path, 32)
    for nimg in (0, 8, 16, 24, 32, 40):
        samples.draw(Noise(32), nimg, "cpu", torch.float32)  # type: ignore[arg-type]
    (tmp_path / "0000000000.npz").write_bytes(b"not an archive")
    whole = (tmp_path / "0000000008.npz").read_bytes()
    (tmp_path / "0000000008.npz").write_bytes(whole[: len(whole) // 2])
    write_samples(
        tmp_path / "0000000016.npz", np.zeros((3, 3, 32, 32), np.uint8), np.zeros((2, 2, 3, 32, 32), np.uint8)
    )
    (tmp_path / "0000000024.npz").unlink()
    Image.new("RGB", (201, 100)).save(tmp_path / "0000000024.png")
    (tmp_path / "0000000032.npz").unlink()
    (tmp_path / "0000000032.png").write_bytes(b"not an image")
    good, messages = read_samples(tmp_path, 32)
    assert [each.cur_nimg for each in good] == [40]
    assert len(messages) == 5
    for name, message in zip(("00.npz", "08.npz", "16.npz", "24.png", "32.png"), messages, strict=True):
        assert f"{name}: no samples of 32x32 pixels" in message
    assert samples.strip(40).is_file()
    assert read_samples(tmp_path / "none", 32) == ([], [])


def test_samples_are_read_without_torch() -> None:
    code = "import sys, vultus.training.sample_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

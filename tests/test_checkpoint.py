from pathlib import Path

import pytest
import safetensors.torch
import torch

from vultus.config import GeneratorConfig, to_dict
from vultus.errors import UserError
from vultus.models.generators import build_generator
from vultus.models.snapshot import load_snapshot, save_snapshot
from vultus.training.checkpoint import load_checkpoint, save_checkpoint

CONFIG = GeneratorConfig(resolution=32, base_width=8, max_width=16)


def write_snapshot(path: Path, **options: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    generator = build_generator(**to_dict(CONFIG)).eval()
    people = {"mean": torch.randn(512), "factor": torch.randn(512, 4)}
    save_snapshot(path, network=generator, population=people, metadata={"generator": to_dict(CONFIG)}, **options)
    return generator


def test_snapshot_round_trip(tmp_path: Path) -> None:
    generator = write_snapshot(tmp_path / "snapshot.safetensors")
    for path in (tmp_path, tmp_path / "snapshot.safetensors"):
        snapshot = load_snapshot(path)
        z, c = torch.randn(2, 100), torch.randn(2, 512)
        assert torch.equal(snapshot.network(z, c), generator(z, c))
        assert snapshot.population["factor"].shape == (512, 4)
        assert not snapshot.network.training


def test_float16_snapshot_is_half_as_large_and_computes_in_float32(tmp_path: Path) -> None:
    generator = write_snapshot(tmp_path / "full.safetensors")
    write_snapshot(tmp_path / "half.safetensors", dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * (tmp_path / "full.safetensors").stat().st_size
    z, c = torch.randn(2, 100), torch.randn(2, 512)
    x = load_snapshot(tmp_path / "half.safetensors").network(z, c)
    assert x.dtype == torch.float32
    assert (x - generator(z, c)).abs().max() < 0.02


def test_damaged_snapshots_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.safetensors"
    write_snapshot(path)
    data = path.read_bytes()
    for cut in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"snapshot\.safetensors: damaged"):
            load_snapshot(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a vultus snapshot"):
        load_snapshot(path)
    with pytest.raises(UserError, match="no such snapshot"):
        load_snapshot(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="train into it first"):
        load_snapshot(tmp_path / "empty")


def test_snapshot_of_another_generator(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.safetensors"
    generator = build_generator(**to_dict(CONFIG))
    wrong = to_dict(CONFIG) | {"base_width": 4}
    save_snapshot(path, network=generator, population={}, metadata={"generator": wrong})
    with pytest.raises(UserError, match="weights do not fit"):
        load_snapshot(path)
    save_snapshot(path, network=generator, population={}, metadata={"generator": wrong | {"depth": 3}})
    with pytest.raises(UserError, match="unknown key depth"):
        load_snapshot(path)


def test_last_checkpoints_are_kept(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    for nimg in (8, 16, 24):
        save_checkpoint(tmp_path, {"cur_nimg": nimg}, nimg, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "checkpoint-0000000016.pt",
        "checkpoint-0000000024.pt",
    ]
    newest = load_checkpoint(tmp_path)
    assert newest is not None
    assert newest[0]["cur_nimg"] == 24
    newest[1].write_bytes(b"cut")
    with pytest.raises(UserError, match="delete it to resume from the one before"):
        load_checkpoint(tmp_path)


def test_checkpoints_have_a_version(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"cur_nimg": 8}, 8, keep=1)
    assert torch.load(path, weights_only=True) == {"format": 2, "cur_nimg": 8}
    torch.save({"cur_nimg": 8}, path)  # as earlier versions wrote it
    assert load_checkpoint(tmp_path) == ({"format": 2, "cur_nimg": 8}, path)
    torch.save({"format": 99, "cur_nimg": 8}, path)
    with pytest.raises(UserError, match=r"checkpoint-0000000008\.pt: checkpoint of version 99.*newer vultus"):
        load_checkpoint(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path)

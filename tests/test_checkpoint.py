import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vultus.config import GeneratorConfig, to_dict
from vultus.errors import UserError
from vultus.models.generators import build_generator
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot, save_snapshot
from vultus.training.checkpoint import checkpoints, load_checkpoint, load_init, remove_old, save_checkpoint

CONFIG = GeneratorConfig(resolution=32, base_width=8, max_width=16)


def write_snapshot(path: Path, **options: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    generator = build_generator(**to_dict(CONFIG)).eval()
    population = {"mean": torch.randn(512), "factor": torch.randn(512, 4)}
    save_snapshot(path, network=generator, population=population, metadata={"generator": to_dict(CONFIG)}, **options)
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


def test_the_embedded_snapshot_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of this name does not hide it
    snapshot, by_path = load_snapshot("default"), load_snapshot(default_snapshot())
    assert snapshot.path == by_path.path == default_snapshot()
    z, c = torch.randn(1, snapshot.network.z_dim), gallery()[:1]
    assert torch.equal(snapshot.network(z, c), by_path.network(z, c))
    assert torch.allclose(gallery().norm(dim=1), torch.ones(64), atol=1e-3)


def test_a_network_is_saved_without_a_card_and_not_uploaded(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "snapshot.safetensors")
    network = load_snapshot(tmp_path).network
    network.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
        "people.safetensors",
    ]
    z, c = torch.randn(2, 100), torch.randn(2, 512)
    assert torch.equal(type(network).from_pretrained(tmp_path / "saved")(z, c), network(z, c))
    for publish in (network.push_to_hub, lambda name: network.save_pretrained(tmp_path / "no", push_to_hub=True)):
        with pytest.raises(UserError, match="vultus publish"):
            publish("user/name")
    assert not (tmp_path / "no").exists()
    with pytest.raises(TypeError, match="save_pretrained takes no repo_id"):
        network.save_pretrained(tmp_path / "no", repo_id="user/name")


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


def test_checkpoints_are_found_in_the_order_of_their_images(tmp_path: Path) -> None:
    for name in ("checkpoint-0000000016.pt", "checkpoint-0001000000.pt", "checkpoint-0000000008.pt"):
        (tmp_path / name).touch()
    for name in ("checkpoint-0000000024.pt.tmp", "old-checkpoint-1.pt", "snapshot.safetensors"):
        (tmp_path / name).touch()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["checkpoint-0000000008.pt", "checkpoint-0000000016.pt", "checkpoint-0001000000.pt"]
    remove_old(tmp_path, 0)
    assert len(checkpoints(tmp_path)) == 3
    remove_old(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == found[1:]
    remove_old(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(("size", "limit"), [(100_000, 50_000), (10, 100)])
def test_a_checkpoint_that_cannot_be_written_is_named_and_the_last_one_stays(
    tmp_path: Path, size: int, limit: int
) -> None:
    """A limit on the size of files, which is reached in a write, or as the buffer is written at the end."""
    last = save_checkpoint(tmp_path, {"cur_nimg": 8}, 8, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_checkpoint(tmp_path, {"cur_nimg": 16, "gan": torch.zeros(size)}, 16, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "checkpoint-0000000016.pt")
    assert list(tmp_path.iterdir()) == [last]


class Harm:
    """What a pickle of it does when it is read: make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    only = "it is the only one: start over with --fresh"
    path = save_checkpoint(tmp_path, {"cur_nimg": 8, "gan": torch.zeros(1000)}, 8, keep=0)

    def refused(kind: str, remedy: str) -> None:
        newest = checkpoints(tmp_path)[-1]
        with pytest.raises(UserError) as caught:
            load_checkpoint(tmp_path)
        assert str(caught.value) == f"{newest}: cannot be read ({kind}); {remedy}"
        assert caught.value.__suppress_context__

    with zipfile.ZipFile(path) as archive:
        members = [(member, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for number, (member, data) in enumerate(members):
            archive.writestr(member.filename, data, zipfile.ZIP_DEFLATED if number == 1 else zipfile.ZIP_STORED)
    refused("ValueError", only)  # a part that unpacks to more than it takes
    torch.save({"cur_nimg": 8, "gan": Harm(tmp_path / "harmed")}, path)
    refused("UnpicklingError", only)
    assert not (tmp_path / "harmed").exists()
    path.write_bytes(b"cut")
    refused("BadZipFile", only)
    save_checkpoint(tmp_path, {"cur_nimg": 16}, 16, keep=0).write_bytes(b"cut")
    refused("BadZipFile", "delete it to resume from the one before")


def test_weights_for_another_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_init(str(tmp_path))
    assert str(caught.value) == (
        f"--init {tmp_path}: no checkpoint-*.pt is in this folder; give a run folder that has one"
    )
    for nimg in (8, 16):
        gan = {"G": {"w": torch.tensor([nimg])}, "G_ema": {}, "G_optim": {"m": torch.zeros(1)}, "D_optim": {}}
        save_checkpoint(tmp_path, {"cur_nimg": nimg, "gan": gan}, nimg, keep=0)
    init = load_init(str(tmp_path))
    assert (init.folder, init.cur_nimg) == (tmp_path, 16)
    assert init.networks == {"G": {"w": torch.tensor([16])}, "G_ema": {}}

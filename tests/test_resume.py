"""What `train` does in a folder that holds a run already: resume, refuse, start over, or only say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from test_launch import OPTIONS, SMALL
from test_train import assert_same, state, without_facenet
from vultus._files import folder_lock, read_json, write_json
from vultus.cli.main import main
from vultus.errors import UserError
from vultus.models.facenet import FaceNet
from vultus.models.snapshot import load_snapshot
from vultus.training import launch
from vultus.training.checkpoint import save_checkpoint

SNAPSHOT = "snapshot.safetensors"


@pytest.fixture(autouse=True)
def _without_facenet(monkeypatch: pytest.MonkeyPatch) -> None:
    without_facenet(monkeypatch)


class Run:
    """A data set and a run folder, with the command and the function that train there."""

    def __init__(self, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self.out, self.capsys = data, out, capsys

    def command(self, *more: str, images: int = 8) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `vultus train`."""
        self.capsys.readouterr()
        run = ["train", "--preset", "tiny", "--data", str(self.data), "--out", str(self.out), "--images", str(images)]
        code = main([*run, *OPTIONS, *more])
        return code, *self.capsys.readouterr()

    def function(self, **more: Any) -> Path:
        """`vultus.train`."""
        given: dict[str, Any] = {"data": self.data, "out": self.out, "images": 8, "settings": SMALL, "device": "cpu"}
        return launch.train("tiny", **given | more)

    def refused(self, *more: str, images: int = 8) -> str:
        """The error message of the command, which is also that of --dry-run and of the function; nothing changes."""
        before = contents(self.out)
        for arguments in (more, (*more, "--dry-run")):
            code, _, error = self.command(*arguments, images=images)
            assert code == 2
            assert error.count("\n") == 1
        if not more:
            with pytest.raises(UserError) as caught:
                self.function(images=images)
            assert error == f"vultus: error: {caught.value}\n"
        assert contents(self.out) == before
        return error

    def plan(self, *more: str, images: int = 8) -> dict[str, str]:
        """What --dry-run prints; it changes nothing."""
        before = contents(self.out)
        code, printed, _ = self.command("--dry-run", *more, images=images)
        assert code == 0
        assert contents(self.out) == before
        lines = (line.split(":", 1) for line in printed.splitlines())
        return {key: value.strip() for key, value in lines}


@pytest.fixture
def run(tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tiny_dataset(), tmp_path / "run", capsys)


@pytest.fixture
def trained(run: Run) -> Run:
    """A run that was trained for 8 images."""
    run.function()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def without_checkpoints(out: Path) -> None:
    for path in out.glob("checkpoint-*.pt"):
        path.unlink()


def test_a_snapshot_without_checkpoint_is_never_overwritten(trained: Run) -> None:
    without_checkpoints(trained.out)
    for images in (8, 16):
        error = trained.refused(images=images)
        assert f"{trained.out / SNAPSHOT}: a snapshot is here, but no checkpoint" in error
        assert "--fresh" in error
    (trained.out / SNAPSHOT).unlink()
    assert "the checkpoint of 8 images that was saved here is missing" in trained.refused()
    (trained.out / "config.json").unlink()
    assert "config.json is missing beside stats.jsonl" in trained.refused()


@pytest.mark.parametrize("checkpoints", [True, False])
def test_fresh_moves_the_old_run_aside(trained: Run, checkpoints: bool) -> None:
    """Twice; nothing is lost, also not what is no part of the run."""
    (trained.out / "notes.txt").write_text("mine")
    if not checkpoints:
        without_checkpoints(trained.out)
    before = contents(trained.out)
    code, printed, error = trained.command("--fresh", "--seed", "7")
    assert (code, printed.strip()) == (0, str(trained.out / SNAPSHOT))
    assert f"the run that was here is in {trained.out / 'old-1'}" in error
    assert contents(trained.out / "old-1") | {"notes.txt": b"mine"} == before
    assert read_json(trained.out / "config.json")["config"]["seed"] == 7
    assert state(trained.out)["cur_nimg"] == 8
    second = {name: data for name, data in contents(trained.out).items() if not name.startswith(("old-", "notes"))}
    trained.function(fresh=True)
    assert contents(trained.out / "old-2") == second
    assert contents(trained.out / "old-1") | {"notes.txt": b"mine"} == before
    assert read_json(trained.out / "config.json")["config"]["seed"] == 0  # the preset's, not that of the run before
    assert load_snapshot(trained.out / "old-1").metadata["cur_nimg"] == 8


def test_fresh_is_the_run_of_an_empty_folder(trained: Run, tmp_path: Path) -> None:
    trained.function(images=12, fresh=True)
    other = Run(trained.data, tmp_path / "other", trained.capsys)
    other.function(images=12, fresh=True)  # nothing to move
    assert not list(other.out.glob("old-*"))
    assert_same(state(trained.out)["gan"], state(other.out)["gan"])


def test_fresh_moves_nothing_if_the_run_would_be_refused(trained: Run) -> None:
    for more in (["--optim.batch", "500"], ["--generator.c_dim", "128"], ["--device", "tpu"], ["--track", "paper"]):
        trained.refused("--fresh", *more)


def test_dry_run_says_what_would_happen(run: Run) -> None:
    plan = run.plan("--seed", "3")
    assert plan["would"] == "start at image 0"
    assert plan["preset"] == "tiny, method gan"
    assert plan["budget"] == "8 images, in batches of 4"
    assert plan["resolution"] == "32 pixels"
    assert plan["device"] == "cpu, float32"
    assert plan["seed"] == "3"
    assert plan["data set"] == f"{run.data}: 12 photos of 4 people to train on"
    assert plan["run folder"] == str(run.out)
    assert not run.out.exists()
    run.command()
    assert run.plan()["would"] == "do nothing: the budget is used up (8 images)"
    assert run.plan(images=16)["would"] == "resume at image 8, from checkpoint-0000000008.pt"
    assert run.plan("--fresh")["would"] == f"move the run that is there into {run.out / 'old-1'}, then start at image 0"
    before = contents(run.out)
    assert run.function(dry_run=True, images=16) == run.out / SNAPSHOT
    assert "resume at image 8" in run.capsys.readouterr().out
    assert contents(run.out) == before


def test_dry_run_names_facenet_where_it_is_needed(run: Run, tiny_dataset: Callable[..., Path]) -> None:
    run.data = tiny_dataset("named", encoder=FaceNet.id)
    plan = run.plan("--loss.identity_weight", "1")
    assert plan["FaceNet"] == "needed, the weights would be downloaded"


def test_another_run_or_data_set_is_refused(trained: Run, tiny_dataset: Callable[..., Path]) -> None:
    error = trained.refused("--seed", "5")
    assert "was begun with other settings (seed was 0, now 5); use those, move that run aside with --fresh" in error
    trained.data = tiny_dataset("others", seed=5)
    assert f"was begun on other data than {trained.data}" in trained.refused()
    trained.command("--fresh")
    assert (
        read_json(trained.out / "config.json")["data"]["content_sha256"]
        == (read_json(trained.data / "manifest.json")["content_sha256"])
    )


def test_places_that_are_no_run_folder(run: Run, tmp_path: Path) -> None:
    data = run.data
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (tmp_path / "file", "file: a file stands where a folder is needed"),
        (tmp_path / "file" / "run", "file: a file stands where a folder is needed"),
        (data, "data: a prepared data set is in this folder"),
    ):
        run.out = out
        assert message in run.refused()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_use_is_refused(trained: Run) -> None:
    with folder_lock(trained.out, "train"):
        for more in ([], ["--fresh"]):
            assert "another process is at work in this folder" in trained.refused(*more)


def test_a_deleted_snapshot_is_written_again(trained: Run) -> None:
    before = safetensors.torch.load_file(trained.out / SNAPSHOT)
    (trained.out / SNAPSHOT).unlink()
    assert trained.function() == trained.out / SNAPSHOT
    assert_same(safetensors.torch.load_file(trained.out / SNAPSHOT), before)


def test_a_part_of_a_pass_is_at_least_one_step(run: Run) -> None:
    assert run.function(images=None, epochs=0.001).is_file()
    assert state(run.out)["cur_nimg"] == 4


def test_a_damaged_checkpoint_names_the_remedy(trained: Run) -> None:
    path = next(trained.out.glob("checkpoint-*.pt"))
    path.write_bytes(b"cut")
    for more in ([], ["--dry-run"]):
        code, _, error = trained.command(*more)
        assert code == 2
        assert f"{path}: cannot be read" in error
        assert "it is the only one: start over with --fresh" in error
    assert "then start at image 0" in trained.plan("--fresh")["would"]
    assert trained.command("--fresh")[0] == 0
    assert (trained.out / "old-1" / path.name).read_bytes() == b"cut"


def test_keep_0_keeps_all_checkpoints(tmp_path: Path) -> None:
    for nimg in (8, 16, 24):
        save_checkpoint(tmp_path, {"cur_nimg": nimg}, nimg, keep=0)
    assert len(list(tmp_path.iterdir())) == 3


# --- data that do not fit the networks --------------------------------------------------------------------------------


def test_images_of_a_size_that_no_network_has(run: Run, tiny_dataset: Callable[..., Path]) -> None:
    run.data = tiny_dataset("hundred", resolution=100)
    error = run.refused()
    assert "holds images of 100 pixels; the side of images to train on must be one of 32, 64, 128, 256, 512" in error
    assert "--resolution" in error


def test_embeddings_of_another_length(run: Run, tiny_dataset: Callable[..., Path]) -> None:
    data = run.data
    networks = ["--generator.c_dim", "128", "--discriminator.c_dim", "128"]
    assert f"--generator.c_dim is 128 but {data} holds embeddings of 512" in run.refused(*networks)
    assert f"--generator.c_dim is 128 but {data} holds embeddings of 512" in run.refused(*networks[:2])
    run.data = tiny_dataset("short", dim=128)  # what is not given follows the data
    other = ["--generator.c_dim", "64", "--discriminator.c_dim", "64"]
    error = "holds embeddings of 128 numbers; give --generator.c_dim 128 --discriminator.c_dim 128"
    assert error in run.refused(*other)
    assert run.command()[0] == 0


def test_a_manifest_that_does_not_fit_its_shards(run: Run) -> None:
    manifest = read_json(run.data / "manifest.json")
    manifest["encoder"]["dim"] = 128
    write_json(run.data / "manifest.json", manifest)
    assert "manifest.json: encoder.dim is 128, but shard-00000.arrow holds 512" in run.refused()


def test_losses_of_another_encoder_than_the_data(
    run: Run, tiny_dataset: Callable[..., Path], random_facenet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "load_facenet", lambda **_: random_facenet)
    run.data = tiny_dataset("short", dim=128)
    networks = ["--generator.c_dim", "128", "--discriminator.c_dim", "128"]
    error = run.refused(*networks, "--loss.identity_weight", "1")
    assert "holds embeddings of tiny-test (128 numbers), but the losses compare with those of facenet" in error
    assert not run.out.exists()
    code, _, error = run.command(*networks)
    assert code == 0
    assert "no validation on unseen people" in error


# --- begin with the weights of another run ----------------------------------------------------------------------------


def test_init_begins_with_the_weights_of_another_run(run: Run, tmp_path: Path) -> None:
    """All tensors of the same shape, for a run with other settings; it resumes without them; the other is unchanged."""
    assert run.command()[0] == 0
    before = contents(run.out)
    second = Run(run.data, tmp_path / "second", run.capsys)
    frozen = ["--optim.lr", "1e-12", "--loss.mse_weight", "3", "--init", str(run.out)]
    code, _, error = second.command(*frozen)
    assert code == 0
    assert f"weights of {run.out} after 8 images\n" in error
    assert read_json(second.out / "config.json")["init"] == {"run": run.out.name, "cur_nimg": 8}
    ours, theirs = (state(folder)["gan"]["G"] for folder in (second.out, run.out))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours if key.endswith("weight"))
    code, _, error = second.command(*frozen[:-2], images=16)
    assert code == 0
    assert "resuming from" in error
    assert "init" in read_json(second.out / "config.json")
    assert contents(run.out) == before


def test_init_of_other_networks_takes_what_has_the_same_shape(run: Run, tmp_path: Path) -> None:
    assert run.command()[0] == 0
    second = Run(run.data, tmp_path / "second", run.capsys)
    code, _, error = second.command("--init", str(run.out), "--discriminator.base_width", "12")
    assert code == 0
    assert "tensors have other shapes or names and start afresh" in error


def test_init_of_a_folder_without_a_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    assert f"--init {tmp_path}: no checkpoint-*.pt is in this folder" in run.refused("--init", str(tmp_path))


def test_fresh_from_the_run_that_is_moved_aside(run: Run) -> None:
    assert run.command()[0] == 0
    code, _, error = run.command("--fresh", "--init", str(run.out))
    assert code == 0
    assert "after 8 images" in error
    assert (run.out / "old-1" / SNAPSHOT).is_file()


def test_a_resumed_run_needs_no_init(run: Run, tmp_path: Path) -> None:
    """Its own checkpoint counts, even where the other run is gone."""
    assert run.command()[0] == 0
    code, _, error = run.command("--init", str(tmp_path / "gone"), images=16)
    assert code == 0
    assert "resuming from checkpoint-0000000008.pt" in error


def test_init_again_where_the_first_checkpoint_was_not_reached(run: Run, tmp_path: Path) -> None:
    """A run that was killed early has its settings only, and begins with the same weights again."""
    assert run.command()[0] == 0
    second = Run(run.data, tmp_path / "second", run.capsys)
    assert second.command("--init", str(run.out))[0] == 0
    for path in second.out.iterdir():
        if path.name not in ("config.json", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, _, error = second.command("--init", str(run.out))
    assert code == 0
    assert f"weights of {run.out} after 8 images" in error
    assert read_json(second.out / "config.json")["init"] == {"run": run.out.name, "cur_nimg": 8}

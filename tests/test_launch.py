"""A training from Python and from the command line are one run; options of the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from test_train import assert_same, losses, state, without_facenet
from vultus._files import read_json, write_json
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.presets import get_preset
from vultus.training import launch
from vultus.training.trainer import Budget, train

SMALL: dict[str, Any] = {
    "generator": {"base_width": 8, "max_width": 16},
    "discriminator": {"base_width": 8, "max_width": 16},
    "optim.batch": 4,
    "dtype": "float32",
    "log_every_nimg": 4,
    "checkpoint_every_nimg": 8,
}
OPTIONS = ["--generator.base_width", "8", "--generator.max_width", "16", "--discriminator.base_width", "8",
           "--discriminator.max_width", "16", "--optim.batch", "4", "--dtype", "float32", "--log_every_nimg", "4",
           "--checkpoint_every_nimg", "8", "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def _without_facenet(monkeypatch: pytest.MonkeyPatch) -> None:
    without_facenet(monkeypatch)


def test_the_function_and_the_command_are_the_same_run(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another resolution than the preset's, in two sessions."""
    data = tiny_dataset(resolution=64)
    for images in (8, 16):
        options = ["--images", str(images), *OPTIONS, "--loss.mse_weight", "3", "--seed", "5"]
        assert main(["train", "--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "a"), *options]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "snapshot.safetensors")
        settings = SMALL | {"loss": {"mse_weight": 3}, "seed": 5}
        path = launch.train("tiny", data=data, out=tmp_path / "b", images=images, settings=settings, device="cpu")
        assert path == tmp_path / "b" / "snapshot.safetensors"
    assert read_json(tmp_path / "a" / "config.json") == read_json(tmp_path / "b" / "config.json")
    assert read_json(tmp_path / "a" / "config.json")["config"]["generator"]["resolution"] == 64
    assert_same(state(tmp_path / "a")["gan"], state(tmp_path / "b")["gan"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    snapshots = [safetensors.torch.load_file(tmp_path / run / "snapshot.safetensors") for run in "ab"]
    assert_same(*snapshots)


def test_the_data_set_is_opened_once(
    tiny_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, opened = tiny_dataset(), []
    open_shard = PreparedDataset._open

    def count(self: PreparedDataset, name: str) -> Any:
        opened.append(name)
        return open_shard(self, name)

    monkeypatch.setattr(PreparedDataset, "_open", count)
    run = ["train", "--preset", "tiny", "--data", str(data), "--images", "4", *OPTIONS]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    assert opened == ["shard-00000.arrow"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "small"}, "preset small: no such preset"),
        ({"images": 8, "hours": 1.0}, "images and hours are both budgets; give one"),
        ({"images": 8, "settings": {"epochs": 1}}, "images and epochs are both budgets; give one"),
        ({"data": "nowhere"}, "nowhere: not a prepared data set"),
        ({"settings": {"optim.lrr": 1}}, r"settings: unknown key optim\.lrr"),
        ({"settings": {"preset": "tiny"}}, "preset is an argument of its own"),
        ({"device": "tpu"}, "tpu: not available"),
        ({"track": ["paper"]}, "no such tracker"),
        ({"preset": "vultus-cpu", "settings": {"optim.batch": 4}}, "FaceNet|facenet|weights"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str, tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    values: dict[str, Any] = {"data": tiny_dataset(), "out": tmp_path / "run"} | arguments
    with pytest.raises(UserError, match=message) as caught:
        launch.train(values.pop("preset", "tiny"), **values)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_epochs_are_a_budget(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    launch.train("tiny", data=tiny_dataset(), out=tmp_path / "run", epochs=2, settings=SMALL, device="cpu")
    assert state(tmp_path / "run")["cur_nimg"] == 24  # two passes over 12 photos


def help_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["train", *options, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_settings_of_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    tiny, recipe = help_of(capsys, "--preset", "tiny"), help_of(capsys)
    assert "--loss.label_smoothing" in tiny
    assert "--loss.kl_weight" not in tiny
    assert "--loss.kl_weight" in recipe
    assert "--loss.label_smoothing" not in recipe
    assert "--loss.kl_weight" in help_of(capsys, "--preset", "tiny", "--method", "coded")


def test_method_of_a_yaml_file(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, settings = tiny_dataset(), tmp_path / "settings.yaml"
    settings.write_text(
        "method: coded\ndiscriminator:\n  kind: projection\nloss:\n  coded_fraction: 0.5\n  kl_weight: 0.01\n"
    )
    run = ["train", "--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--images", "8", *OPTIONS]
    assert main([*run, "--config", str(settings)]) == 0
    config = read_json(tmp_path / "run" / "config.json")["config"]
    assert (config["method"], config["loss"]["kl_weight"]) == ("cvae-gan", 0.01)
    assert "G_kl" in losses(tmp_path / "run")[0]
    settings.write_text("loss:\n  warmup_nimg: 100\n")
    capsys.readouterr()
    assert main([*run, "--config", str(settings)]) == 2
    assert "loss.warmup_nimg: this version no longer has it" in capsys.readouterr().err


def test_a_run_folder_of_version_1_is_resumed(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    """Config and checkpoint without `format`, samples without arrays; the result is that of one run."""
    data, tiny = tiny_dataset(), get_preset("tiny")
    config = replace(
        tiny,
        generator=replace(tiny.generator, base_width=8, max_width=16),
        discriminator=replace(tiny.discriminator, base_width=8, max_width=16),
        optim=replace(tiny.optim, batch=4),
        dtype="float32",
        checkpoint_every_nimg=8,
    )
    for out, totals in ((tmp_path / "whole", (16,)), (tmp_path / "old", (8, 16))):
        for total in totals:
            if total == 16 and out.name == "old":
                record = read_json(out / "config.json")
                del record["format"]
                record["config"]["loss"] |= {"adversarial": "bce", "gamma": 0.0, "penalty_every": 4, "kl_weight": 0.0}
                record["config"]["optim"]["lr_fall"] = 0.0
                write_json(out / "config.json", record)
                path = out / "checkpoint-0000000008.pt"
                checkpoint = torch.load(path, weights_only=True)
                del checkpoint["format"]
                torch.save(checkpoint, path)
                for arrays in (out / "samples").glob("*.npz"):
                    arrays.unlink()
            train(config, data=data, out=out, budget=Budget(total_nimg=total))
    assert_same(state(tmp_path / "whole")["gan"], state(tmp_path / "old")["gan"])
    assert read_json(tmp_path / "old" / "config.json") == read_json(tmp_path / "whole" / "config.json")
    strips = [(tmp_path / run / "samples" / "progress.png").read_bytes() for run in ("whole", "old")]
    assert strips[0] == strips[1]

"""Configs: strict reading, the settings of each method, and config.json of earlier versions."""

import json
from pathlib import Path
from typing import Any

import pytest

from vultus._files import write_json
from vultus._run_config import read_run_config
from vultus.config import (
    CVAEGANConfig,
    GANConfig,
    check_config,
    differences,
    from_dict,
    merged,
    to_dict,
    train_config,
    with_method,
)
from vultus.errors import UserError
from vultus.presets import PRESETS, fitted, get_preset


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_round_trip(preset: str) -> None:
    config = get_preset(preset)
    assert config.preset == preset
    assert train_config(json.loads(json.dumps(to_dict(config))), "test") == config
    check_config(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lrr": 1.0}}, r"file\.yaml: unknown key optim\.lrr; known are .*lr"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr must be a number above 0 up to 1, not fast"),
        ({"optim": {"batch": 1.5}}, r"optim\.batch must be a whole number from 1 to 1e9, not 1\.5"),
        ({"optim": 3}, r"optim must be a mapping"),
        ({"generator": {"kind": "vae"}}, r"generator\.kind must be one of dcgan, conditional-norm"),
        ({"loader": {"mirror": 1}}, r"loader\.mirror must be true or false, not 1"),
        ({"method": "vae"}, r"file\.yaml: method vae: no such method; there are gan, cvae-gan"),
        ({"method": 1}, r"file\.yaml: method must be one of"),
        ({"loss": {"augment": 0.5}}, r"file\.yaml: loss\.augment is not a setting of method gan; leave it out"),
        ({"method": "cvae-gan", "loss": {"label_smoothing": 0.1}}, r"not a setting of method cvae-gan"),
        ({"loss": {"gamma": 0.5}}, r"file\.yaml: loss\.gamma: this version no longer has it; leave it out"),
    ],
)
def test_strict(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_config(values, "file.yaml")


def test_a_method_has_its_own_loss() -> None:
    gan, cvae_gan = GANConfig(), CVAEGANConfig()
    assert hasattr(gan.loss, "label_smoothing")
    assert not hasattr(gan.loss, "kl_weight")
    assert hasattr(cvae_gan.loss, "kl_weight")
    assert not hasattr(cvae_gan.loss, "label_smoothing")
    assert train_config({"method": "coded"}, "test") == cvae_gan  # its name in earlier versions
    with pytest.raises(UserError, match="unknown key"):
        from_dict(GANConfig, {"losses": {}}, "test")


def test_another_method_keeps_the_shared_settings() -> None:
    preset = get_preset("vultus-cpu")
    gan = with_method(preset, "gan")
    assert isinstance(gan, GANConfig)
    assert (gan.loss.mse_weight, gan.loss.label_smoothing) == (10.0, 0.0)
    assert gan.generator == preset.generator
    assert with_method(preset, "coded") is preset


def test_settings_are_nested_or_dotted() -> None:
    tiny = get_preset("tiny")
    config = merged(tiny, {"optim.lr": 1, "optim": {"batch": 4}, "seed": 3}, "settings")
    assert (config.optim.lr, config.optim.batch, config.seed) == (1.0, 4, 3)
    assert config.loss == tiny.loss
    other = merged(tiny, {"method": "coded", "loss.kl_weight": 0.5, "discriminator.kind": "projection"}, "settings")
    assert isinstance(other, CVAEGANConfig)
    assert (other.loss.kl_weight, other.loss.mse_weight) == (0.5, tiny.loss.mse_weight)
    for wrong, message in (
        ({"optim.lrr": 1.0}, r"settings: unknown key optim\.lrr"),
        ({"optim": 1, "optim.lr": 1.0}, r"settings: optim\.lr is given beside a value for optim"),
        ({"loss.kl_weight": 1.0}, r"loss\.kl_weight is not a setting of method gan"),
    ):
        with pytest.raises(UserError, match=message):
            merged(tiny, wrong, "settings")


def test_differences_are_dotted_keys() -> None:
    a, b = to_dict(get_preset("reference-mse")), to_dict(get_preset("reference-dcgan"))
    assert "optim.batch" in differences(a, b)
    assert differences(a, a) == []


def test_resolution_follows_the_data() -> None:
    config = fitted(get_preset("tiny"), 64)
    assert (config.generator.resolution, config.discriminator.resolution) == (64, 64)


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="reference-dcgan, reference-mse"):
        get_preset("reference")


# --- config.json ------------------------------------------------------------------------------------------------------

FOREIGN = {"cvae-gan": {"label_smoothing": 0.0}, "gan": {"kl_weight": 0.0, "augment_until": 1.0, "mismatch": 0.0}}


def version_1(preset: str, **changes: Any) -> dict[str, Any]:
    """The config of a preset as version 1 wrote it: all loss settings in every run, and those since removed."""
    config = to_dict(get_preset(preset))
    old = config["method"] == "cvae-gan"
    config["loss"] |= FOREIGN[config["method"]]
    config["loss"] |= {"adversarial": "hinge" if old else "bce", "warmup_nimg": 0, "gamma": 0.0, "penalty_every": 4}
    config["optim"]["lr_fall"] = 0.0
    config["method"] = "coded" if old else "gan"
    for key, value in changes.items():
        section, _, name = key.partition("_")
        config[section][name] = value
    return config


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_config_of_version_1_is_upgraded(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"config": version_1(preset, loss_penalty_every=7), "data": {"content_sha256": "0"}})
    record = read_run_config(path)
    assert record["format"] == 2
    assert record["data"] == {"content_sha256": "0"}
    assert train_config(record["config"], str(path)) == get_preset(preset)
    write_json(path, record)
    assert read_run_config(path) == record


@pytest.mark.parametrize(
    ("preset", "change", "key"),
    [
        ("tiny", {"loss_gamma": 10.0}, r"loss\.gamma is 10\.0"),
        ("tiny", {"loss_adversarial": "relativistic"}, r"loss\.adversarial is relativistic"),
        ("tiny", {"loss_adversarial": "hinge"}, r"loss\.adversarial is hinge"),
        ("vultus-cpu", {"loss_warmup_nimg": 8_000}, r"loss\.warmup_nimg is 8000"),
        ("vultus-cpu", {"optim_lr_fall": 0.25}, r"optim\.lr_fall is 0\.25"),
    ],
)
def test_a_removed_setting_in_use_is_named(preset: str, change: dict[str, Any], key: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"config": version_1(preset, **change), "data": {}})
    with pytest.raises(UserError, match=rf"config\.json: {key}, a setting that this version no longer has"):
        read_run_config(path)


def test_what_is_no_run_config_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    damaged = [{"config": config, "data": {}} for config in (1, {"optim": 1}, {"loss": []}, {"method": []})]
    for value in ([], {}, {"config": {}}, *damaged):
        write_json(path, value)
        with pytest.raises(UserError, match=r"config\.json: not the config of a run"):
            read_run_config(path)
    write_json(path, {"format": 99, "config": {}, "data": {}})
    with pytest.raises(UserError, match=r"config\.json: run config of version 99"):
        read_run_config(path)

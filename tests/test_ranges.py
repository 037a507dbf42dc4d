"""Every number has a range, and a value out of it is one line that names the option, key or argument: commands, files
and Python functions."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import yaml

import vultus
from vultus._ranges import Count, Seed, Share, Side, checked, checks_arguments, from_text, parts
from vultus.cli.demo import demo
from vultus.cli.main import main
from vultus.config import CONFIGS, CVAEGANConfig, GANConfig, OptimConfig, check_config, merged, setting_types
from vultus.errors import UserError
from vultus.presets import get_preset
from vultus.training.trainer import Budget

METHODS = {"gan": "tiny", "cvae-gan": "vultus-cpu"}
SETTINGS = [
    pytest.param(method, key, hint, id=f"{method}-{key}")
    for method, config in CONFIGS.items()
    for key, hint in setting_types(config).items()
    if key not in ("preset", "method")
]
# A setting for which 0 means something.
ZERO = {
    "seed", "keep", "generator.projection", "optim.beta1", "optim.beta2", "optim.ema_nimg", "optim.ema_rampup",
    "loader.max_images", "loss.mse_size", "loss.mse_nimg", "loss.identity_nimg", "loss.identity_start",
    "loss.label_smoothing", "loss.mismatch", "loss.augment", "loss.augment_until", "loss.feature_match",
    "loss.coded_fraction", "loss.identity_fraction", "loss.feature_fraction", "loss.adversarial_weight",
    "loss.mse_weight", "loss.identity_weight", "loss.kl_weight", "loss.perceptual_weight", "loss.patch_weight",
    "loss.feature_weight", "loss.kl_free", "loss.texture_weight", "loss.texture_fraction", "loss.second_weight",
    "loss.second_fraction", "generator.noise_maps", "generator.fine_width", "discriminator.fine_width",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    """What is tested here once ran without end."""

    def stop(*_: Any) -> None:
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error message of a command that is refused: one line, exit code 2."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("vultus: error: ")


def bad_values(key: str, hint: Any) -> list[Any]:
    """Values that no setting of this type takes."""
    kind = parts(hint)[0]
    if get_origin(kind) is Literal:
        return ["best", 3, math.nan]
    if kind is bool:
        return ["perhaps", 2, math.nan]
    wrong = [-1, 10**30, math.nan, math.inf, -math.inf, "many", [1], {"a": 1}, True]
    return wrong + ([0] if key not in ZERO else []) + ([1.5] if kind is int else [])


def test_every_setting_has_a_range() -> None:
    for config in CONFIGS.values():
        for key, hint in setting_types(config).items():
            kind, numbers, _ = parts(hint)
            assert (numbers is not None) == (kind in (int, float)), key
            if numbers is not None:
                assert (0 in numbers) == (key in ZERO), key


@pytest.mark.parametrize(("method", "key", "hint"), SETTINGS)
def test_a_bad_setting_names_the_option(
    method: str, key: str, hint: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On the command line, in a file, in Python, and where a config is built by hand."""
    preset = get_preset(METHODS[method])
    run = ["train", "--preset", METHODS[method], "--data", "d", "--out", str(tmp_path / "run")]
    file = tmp_path / "settings.yaml"
    section, _, name = key.rpartition(".")
    for value in bad_values(key, hint):
        if not isinstance(value, list | dict | bool):
            error = refused(capsys, *run, f"--{key}={value}")
            assert error.startswith(f"--{key} must be "), error
            assert error.endswith(f", not {value}"), error
        file.write_text(yaml.safe_dump({section: {name: value}} if section else {name: value}))
        error = refused(capsys, *run, "--config", str(file))
        assert error.startswith(f"{file}: {key}"), error
        with pytest.raises(UserError, match=rf"^settings: {key} must be ") as caught:
            merged(preset, {key: value}, "settings")
        assert "\n" not in str(caught.value)
        part = replace(getattr(preset, section), **{name: value}) if section else value
        with pytest.raises(UserError, match=rf"^settings: {key} must be "):
            check_config(replace(preset, **{section or name: part}))
    assert not (tmp_path / "run").exists()


COMMANDS: list[tuple[list[str], str]] = [
    (["generate", "default", "--random", "1", "--out", "o"], "num batch seed steps random"),
    (["evaluate", "default", "--data", "d"], "noises limit batch seed"),
    (["audit", "--data", "d"], "limit batch seed"),
    (["probe", "--data", "d"], "limit edited batch seed"),
    (["serve"], "faces queue megabytes megapixels seconds port"),
    (["publish", "default", "--repo", "a/b", "--dry-run"], "seed"),
    (["prepare", "photos", "--out", "o"], "resolution limit test_fraction"),
    (["embed", "photos", "--out", "o.npz"], "limit"),
    (["demo", "--out", "o"], "seconds seed"),
    (["synthesize", "--people", "2", "--out", "o"], "people per-person min-angle seed workers"),
    (["train", "--data", "d", "--out", "o"], "hours images epochs seed"),
]


@pytest.mark.parametrize(
    ("command", "option"), [pytest.param(words, name, id=f"{words[0]}-{name}") for words, all_ in COMMANDS
                            for name in all_.split()]
)  # fmt: skip
def test_numbers_of_every_command(
    command: list[str], option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    zero = ["0"] if option not in ("seed", "port", "test_fraction", "min-angle") else []
    for value in ["-1", "nan", "inf", "x", "", str(2**64), *zero]:
        error = refused(capsys, *command, f"--{option}={value}")
        assert error.startswith(f"--{option} must be "), error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: vultus.train("tiny", data="d", out="o", images=0),
        lambda: vultus.train("tiny", data="d", out="o", hours=-1.0),
        lambda: vultus.train("tiny", data="d", out="o", hours=math.nan),
        lambda: vultus.train("tiny", data="d", out="o", epochs=math.inf),
        lambda: Budget(total_nimg=-5),
        lambda: Budget(hours=0.0),
        lambda: demo("o", seconds=-5.0),
        lambda: demo("o", seed=-1),
        lambda: vultus.evaluate("default", data="d", noises=0),
        lambda: vultus.evaluate("default", data="d", seed=2**64),
        lambda: vultus.publish("default", "a/b", dry_run=True, seed=-1),
        lambda: vultus.load("default").sample_identities(1, seed=-1),
        lambda: vultus.load("default").sample(np.ones((1, 512)), num=0),
    ],
)
def test_numbers_of_python_functions(call: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^[-\w]+ must be a (whole )?number (from|above) \d[^\n]*, not [^\n]+$"):
        call()
    assert os.listdir(tmp_path) == []


def test_the_limits_themselves_are_allowed() -> None:
    for value, hint in (
        (0, Seed),
        (2**64 - 1, Seed),
        (1, Count),
        (0, Share),
        (1.0, Share),
        (32, Side),
        (None, int | None),
    ):
        assert checked(value, hint, "x") == value
    assert checked(np.int64(3), Count, "x") == 3
    assert type(checked(1, Share, "x")) is float
    assert from_text("1e-4", Share, "x") == 1e-4
    assert from_text("null", Count | None, "x") is None
    with pytest.raises(UserError, match=r"^x must be one of 32, 64, 128, 256, 512, 1024, not 100$"):
        checked(100, Side, "x")


def test_arguments_are_checked_however_they_are_given() -> None:
    @checks_arguments
    def function(first: Count, *, second: Share | None = None) -> tuple[int, float | None]:
        return first, second

    assert function(2, second=0.5) == (2, 0.5)
    for arguments, keywords in (((0,), {}), ((), {"first": 0}), ((1,), {"second": 2.0})):
        with pytest.raises(UserError, match="must be"):
            function(*arguments, **keywords)


def test_settings_that_do_not_fit_together() -> None:
    tiny = get_preset("tiny")
    for settings, message in (
        ({"generator.c_dim": 128}, r"--generator\.c_dim is 128 but --discriminator\.c_dim is 512"),
        ({"generator.resolution": 64}, r"--generator\.resolution is 64 but --discriminator\.resolution is 32"),
        ({"generator.kind": "conditional-norm", "generator.projection": 1}, r"--generator\.projection is 1"),
        ({"method": "cvae-gan"}, r"--discriminator\.kind projection"),
        (
            {"loss.identity_weight": 1, "loss.identity_sizes": 20},
            r"--loss\.identity_size 96 with --loss\.identity_sizes 20 goes down to 20 pixels",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_config(merged(tiny, settings, "settings"))
    with pytest.raises(UserError, match=r"optim\.batch must be"):
        check_config(GANConfig(optim=OptimConfig(batch=0)))
    assert isinstance(get_preset("vultus-cpu"), CVAEGANConfig)


# --- files of settings ------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 20 aliases"),
        ("[" * 500, "nested more than 20 levels deep"),
        ("a: " + "x" * 70_000, "larger than 64 KiB"),
        (b"\xff\xfe\x00binary", "not a text file in UTF-8"),
        (b"", "settings as `key: value` are needed, but there is nothing"),
        ("- optim\n", "there is a list"),
        ("optim\n", "there is text"),
        ("optim: 3\n", "optim: settings as `key: value` are needed, but there is a number"),
        ("optim: {lr: 1\n", "not valid YAML"),
        ("seed: " + "9" * 5_000, "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("optim: {rate: 1}\n", "unknown key optim.rate; known are optim.batch, "),
        ("loss: {kl_weight: 1}\n", "loss.kl_weight is not a setting of method gan"),
        ("loss: {gamma: 1}\n", "loss.gamma: this version no longer has it"),
        ("images: -5\n", "images must be a whole number from 1 to 1e12, not -5"),
        ("hours: .nan\n", "hours must be a number above 0 up to 100000, not nan"),
        ("data: 3\n", "data must be text, not 3"),
        ("preset: best\n", "preset best: no such preset; there are "),
        ("method: vae\n", "method vae: no such method; there are "),
    ],
)
def test_a_bad_file_is_named(
    content: str | bytes, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_data: Path
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    run = ["train", "--preset", "tiny", "--out", str(tmp_path / "run"), "--data", str(tiny_data)]
    error = refused(capsys, *run, "--config", str(path))
    assert error.startswith(f"{path}: ")
    assert message in error


@pytest.mark.parametrize("command", ["generate none --random 1 --out o", "evaluate none --data d"])
@pytest.mark.parametrize("strength", ["-1", "4.1", "1e30", "nan"])
def test_the_noise_strength_is_an_option_with_a_range(
    command: str, strength: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is checked like the others, before the snapshot is loaded."""
    expected = f"--noise_strength must be a number from 0 to 4, not {strength}"
    assert refused(capsys, *command.split(), "--noise_strength", strength) == expected


def test_whole_numbers_may_be_written_as_the_limits_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_data: Path
) -> None:
    run = ["train", "--preset", "tiny", "--data", str(tiny_data), "--out", str(tmp_path / "run"), "--dry-run"]
    (tmp_path / "settings.yaml").write_text("optim: {batch: 8e0}\nlog_every_nimg: 2e3\n")
    assert main([*run, "--images", "1e3", "--config", str(tmp_path / "settings.yaml")]) == 0
    assert "1000 images, in batches of 8" in capsys.readouterr().out.replace(",000", "000")
    assert refused(capsys, *run, "--images", "1e13") == "--images must be a whole number from 1 to 1e12, not 1e13"
    for text in ("1e-3", "1.5e3", "1e300"):
        assert refused(capsys, *run, "--images", text).endswith(f"not {text}")


@pytest.mark.slow
def test_too_little_memory_is_one_line(tmp_path: Path, tiny_data: Path) -> None:
    resource = pytest.importorskip("resource")
    limit = 12 * 2**30  # bytes of addresses; the network below needs 17 GB for one matrix
    run = ["train", "--preset", "tiny", "--data", str(tiny_data), "--out", str(tmp_path / "run"), "--images", "16"]
    done = subprocess.run(
        [sys.executable, "-m", "vultus", *run, "--generator.projection", "65536", "--generator.z_dim", "65536"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("vultus: error: not enough memory; lower --optim.batch, ")
    assert "Traceback" not in done.stderr


def test_only_regular_files_are_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    run = ["train", "--preset", "tiny", "--data", "d", "--out", "o"]
    for path, reason in (
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "a folder, not a file"),
        (tmp_path / "none.yaml", "no such file"),
    ):
        assert refused(capsys, *run, "--config", str(path)) == f"{path}: {reason}"


def test_some_aliases_and_all_forms_of_settings_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_data: Path
) -> None:
    """Files, sections and options, each over those before it; --print_config gives a file that --config reads."""
    path, section = tmp_path / "settings.yaml", tmp_path / "section.yaml"
    path.write_text("generator: &g {base_width: 8}\ndiscriminator: *g\noptim.lr: 1e-3\nseed: 3\nhours: null\n")
    section.write_text("beta1: 0.25\n")
    run = ["train", "--preset", "tiny", "--data", str(tiny_data), "--out", str(tmp_path / "run"), "--print_config"]
    more = [
        "--config",
        str(path),
        "--optim",
        str(section),
        "--loader",
        "{mirror: true}",
        "--seed=4",
        "--optim.beta2=0.9",
    ]
    assert main([*run, *more]) == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert (config["generator"]["base_width"], config["discriminator"]["base_width"]) == (8, 8)
    assert config["optim"] | {"lr": 0.001, "beta1": 0.25, "beta2": 0.9} == config["optim"]
    assert (config["loader"]["mirror"], config["seed"]) == (True, 4)
    path.write_text(printed)
    assert main([*run, "--config", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_every_choice_can_be_given() -> None:
    for config in CONFIGS.values():
        for key, hint in setting_types(config).items():
            kind = parts(hint)[0]
            for choice in get_args(kind) if get_origin(kind) is Literal else ():
                assert from_text(choice, hint, key) == choice

"""The program as a user starts it: commands, error messages of one line, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vultus
from vultus.cli.main import COMMANDS, main
from vultus.models.snapshot import default_snapshot


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error message of a command, which is one line; its exit code is 2."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vultus: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: vultus {command}" in shown
    assert "options:" in shown


def test_usage_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert main([]) == 2
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == vultus.__version__
    assert "no such command: paint; the commands are demo, prepare" in error_of(capsys, "paint")


def test_usage_needs_neither_torch_nor_the_modules_of_the_commands() -> None:
    program = "import sys; from vultus.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "vultus.cli.main" in loaded
    assert not loaded & {"torch", "numpy", "datasets", *(f"vultus.cli.{name}" for name in COMMANDS)}


def test_the_program_returns_the_exit_code() -> None:
    done = subprocess.run([sys.executable, "-m", "vultus", "paint"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("vultus: error: no such command")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--data", "none", "--out", "run"], "none: not a prepared data set"),
        (["train", "--preset", "best", "--data", "d", "--out", "r"], "--preset best: no such preset"),
        (["train", "--method", "vae", "--data", "d", "--out", "r"], "--method vae: no such method"),
        (["train", "--data", "d", "--out", "r", "--optim.lrr", "1"], "optim.lrr"),
        (["train", "--data", "d", "--out", "r", "--optim.lr", "fast"], "optim.lr"),
        (["train", "--data", "d", "--out", "r", "--hours", "1", "--images", "3"], "--hours and --images"),
        (["train", "--data", "d"], "out"),
        (["generate", "none.safetensors", "--random", "1", "--out", "o"], "none.safetensors: no such snapshot"),
        (["generate", "default", "--out", "o"], "give one of --embeddings"),
        (["generate", "default", "--random", "1", "--out", "o", "--device", "tpu"], "--device tpu: not available"),
        (["generate", "default", "--random", "1", "--grid", "--num", "9999", "--out", "o"], "do not fit in one grid"),
        (["generate", "default", "--between", "random:1", "random:x", "--out", "o"], "random:x: a random identity is"),
        (["evaluate", "default", "--data", "none"], "none: not a prepared data set"),
        (["prepare", "/nonexistent-folder", "--out", "o"], "/nonexistent-folder"),
        (["report", "nowhere"], "nowhere: no such run folder"),
        (["report", "."], ".: not a run folder (no config.json); give the --out of vultus train"),
        (["report", "a", "b"], "a report of several runs needs --out FOLDER"),
        (["report", "a", "--public"], "--public needs --wandb"),
        (["demo", "--secondss", "1"], "--secondss"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *arguments)


def test_config_file_over_preset_and_options_over_both(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset()
    settings = tmp_path / "settings.yaml"
    settings.write_text("optim:\n  lr: 3.0e-4\n  batch: 4\ngenerator:\n  base_width: 8\n  max_width: 8\n")
    arguments = ["train", "--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--images", "8"]
    assert main([*arguments, "--config", str(settings), "--optim.lr", "1e-4", "--device", "cpu"]) == 0
    capsys.readouterr()
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["preset"] == "tiny"
    assert config["optim"]["lr"] == 1e-4
    assert config["optim"]["batch"] == 4
    assert config["generator"]["resolution"] == 32
    assert config["loss"]["mse_weight"] == 10
    settings.write_text("optim:\n  learning_rate: 1\n")
    assert "learning_rate" in error_of(capsys, *arguments, "--config", str(settings))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((3, 128), np.float32), "128"),
        (np.full((3, 512), np.nan, np.float32), "nan"),
        (np.zeros((3, 512), np.float32), "zero"),
    ],
    ids=["128 dims", "NaN", "all zero"],
)
def test_bad_embeddings(array: np.ndarray, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "e.npy", array)
    error = error_of(
        capsys, "generate", "default", "--embeddings", str(tmp_path / "e.npy"), "--out", str(tmp_path / "o")
    )
    assert expected in error.lower()
    assert "e.npy" in error


def test_generate_from_the_embedded_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random identities, and an interpolation between two of them."""
    assert main(["generate", "default", "--random", "3", "--num", "2", "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "o")
    images = sorted((tmp_path / "o").glob("*.png"))
    assert len(images) == 6
    for path in images:
        with Image.open(path) as image:
            assert image.size == (128, 128)
            assert np.asarray(image).std() > 20
    assert main(["generate", "default", "--between", "random:1", "random:2", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "between.gif").stat().st_size > 10_000


def test_truncated_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(default_snapshot().read_bytes()[:100_000])
    assert "cut.safetensors: damaged" in error_of(capsys, "generate", str(path), "--random", "1", "--out", "o")


def test_read_only_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mount = tmp_path / "readonly"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mount)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a read-only tmpfs needs root")
    try:
        error = error_of(capsys, "generate", "default", "--random", "1", "--out", str(mount / "o"))
        assert "Read-only file system" in error
        assert str(mount) in error
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.slow
def test_commands_on_real_faces(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """prepare -> train -> evaluate -> generate as in the README, small."""
    monkeypatch.setenv("VULTUS_WEIGHTS", str(shared / "weights"))
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    device = ["--device", "cpu"]
    assert main(["prepare", str(shared / "celeba"), "--out", "data", "--limit", "40", *device]) == 0
    small = ["--generator.base_width", "8", "--generator.max_width", "32", "--discriminator.base_width", "8",
             "--discriminator.max_width", "32", "--optim.batch", "8"]  # fmt: skip
    assert main(["train", "--data", "data", "--out", "run", "--images", "16", *small, *device]) == 0
    capsys.readouterr()
    evaluate = ["evaluate", "run", "default", "--data", "data", "--limit", "8", "--out", "evaluated", *device]
    assert main(evaluate) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "evaluated" / "table.md").read_text(encoding="utf-8").strip()
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text(encoding="utf-8"))
    identity = {name: result["metrics"]["identity_facenet"]["value"] for name, result in results.items()}
    assert identity["default"] > identity["run"]
    assert (tmp_path / "evaluated" / "default-faces.jpg").is_file()
    assert main([*evaluate, "--judge", "dlib", "missing.onnx"]) == 2
    assert "missing.onnx: no such file" in capsys.readouterr().err
    photo = tmp_path / "photo.png"
    import pyarrow.parquet as pq

    first = pq.read_table(next((shared / "celeba").glob("test-*.parquet"))).column("image")[0].as_py()
    photo.write_bytes(first["bytes"])
    assert main(["generate", "default", "--photos", str(photo), "--align", "false", "--num", "4", "--grid",
                 "--out", "faces.png"]) == 0  # fmt: skip
    with Image.open("faces.png") as image:
        assert image.width >= 4 * 128

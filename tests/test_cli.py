"""The program as a user starts it: verbs, their errors in one line, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vultus.cli.main import main
from vultus.models.snapshot import default_snapshot


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vultus", *arguments], capture_output=True, text=True, check=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of error of a command that must exit with 2."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vultus: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("verb", ["demo", "prepare", "train", "generate", "evaluate", "publish", "report"])
def test_help_of_every_verb(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0
    assert f"vultus {verb}" in done.stdout


def test_usage_version_and_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "prepare" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()
    assert "no such verb: paint" in refused(capsys, "paint")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--data", "none", "--out", "run"], "none: not a prepared data set"),
        (["train", "--preset", "best", "--data", "d", "--out", "r"], "--preset best: no such preset"),
        (["train", "--data", "d", "--out", "r", "--optim.lrr", "1"], "optim.lrr"),
        (["train", "--data", "d", "--out", "r", "--optim.lr", "fast"], "optim.lr"),
        (["train", "--data", "d", "--out", "r", "--hours", "1", "--images", "3"], "--hours and --images"),
        (["train", "--data", "d"], "out"),
        (["generate", "none.safetensors", "--random", "1", "--out", "o"], "none.safetensors: no such snapshot"),
        (["generate", "default", "--out", "o"], "give one of --embeddings"),
        (["generate", "default", "--random", "1", "--grid", "--num", "9999", "--out", "o"], "do not fit on one sheet"),
        (["evaluate", "default", "--data", "none"], "none: not a prepared data set"),
        (["prepare", "/nonexistent-folder", "--out", "o"], "/nonexistent-folder"),
        (["report", "nowhere"], "nowhere: no such run folder"),
        (["report", "."], ".: not a run folder (no config.json); give the --out of vultus train"),
        (["report", "a", "b"], "a report of several runs needs --out FOLDER"),
        (["report", "a", "--public"], "--public goes with --wandb"),
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
    assert expected in refused(capsys, *arguments)


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
    assert "learning_rate" in refused(capsys, *arguments, "--config", str(settings))


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
    error = refused(
        capsys, "generate", "default", "--embeddings", str(tmp_path / "e.npy"), "--out", str(tmp_path / "o")
    )
    assert expected in error.lower()
    assert "e.npy" in error


def test_generate_from_the_embedded_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the embedded default: random people, and the way between two."""
    assert main(["generate", "default", "--random", "3", "--num", "2", "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "o")
    pictures = sorted((tmp_path / "o").glob("*.png"))
    assert len(pictures) == 6
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (128, 128)
            assert np.asarray(picture).std() > 20
    assert main(["generate", "default", "--between", "random:1", "random:2", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "between.gif").stat().st_size > 10_000


def test_snapshot_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(default_snapshot().read_bytes()[:100_000])
    assert "cut.safetensors: damaged" in refused(capsys, "generate", str(path), "--random", "1", "--out", "o")


def test_read_only_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mount = tmp_path / "readonly"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mount)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a read-only tmpfs needs root")
    try:
        error = refused(capsys, "generate", "default", "--random", "1", "--out", str(mount / "o"))
        assert "Read-only file system" in error
        assert str(mount) in error
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_all_verbs_on_real_faces(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """prepare -> train -> evaluate -> generate by the README's words, small."""
    monkeypatch.setenv("VULTUS_WEIGHTS", str(shared / "weights"))
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    device = ["--device", "cpu"]
    assert main(["prepare", str(shared / "celeba"), "--out", "data", "--limit", "120", *device]) == 0
    small = ["--generator.base_width", "8", "--generator.max_width", "32", "--discriminator.base_width", "8",
             "--discriminator.max_width", "32", "--optim.batch", "16"]  # fmt: skip
    assert main(["train", "--data", "data", "--out", "run", "--images", "48", *small, *device]) == 0
    capsys.readouterr()
    evaluate = ["evaluate", "run", "default", "--data", "data", "--limit", "12", "--out", "evaluated", *device]
    assert main([*evaluate, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    found = {name: result["metrics"]["identity_facenet"]["value"] for name, result in results.items()}
    assert found["default"] > found["run"]
    assert main(evaluate) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "evaluated" / "table.md").read_text(encoding="utf-8").strip()
    assert (tmp_path / "evaluated" / "default-faces.jpg").is_file()
    assert main([*evaluate, "--judge", "dlib", "missing.onnx"]) == 2
    assert "missing.onnx: no such file" in capsys.readouterr().err
    photo = tmp_path / "photo.png"
    import pyarrow.parquet as pq

    first = pq.read_table(next((shared / "celeba").glob("test-*.parquet"))).column("image")[0].as_py()
    photo.write_bytes(first["bytes"])
    assert main(["generate", "default", "--photos", str(photo), "--align", "false", "--num", "4", "--grid",
                 "--out", "faces.png"]) == 0  # fmt: skip
    with Image.open("faces.png") as picture:
        assert picture.width >= 4 * 128

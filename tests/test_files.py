"""Atomic writing, folder locks that end with their process, and errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vultus import _files as files
from vultus._files import atomic_path, file_stem, folder_lock, is_locked, make_folder, read_json, write_json
from vultus.errors import UserError, in_one_line

SRC = Path(files.__file__).resolve().parents[1]

# Locks the folder argv[1], reports it, and then waits for the end of its input.
HOLDER = """
import sys
from pathlib import Path
from vultus._files import folder_lock
with folder_lock(Path(sys.argv[1]), "train"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_locked_folder_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    assert is_locked(tmp_path)
    refused = pytest.raises(UserError, match=r"another process .* or prepare into another --out")
    with refused as caught, folder_lock(tmp_path, "prepare"):
        pass
    assert str(caught.value).startswith(f"{tmp_path}: ")
    holder.communicate("")
    assert not is_locked(tmp_path)


def test_a_killed_process_leaves_the_folder_free(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait(100)
    assert (tmp_path / ".lock").exists()
    assert not is_locked(tmp_path)
    with folder_lock(tmp_path, "train"):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lost"), folder_lock(tmp_path, "train"):
        raise ValueError("lost")
    assert not is_locked(tmp_path)


def test_a_question_creates_no_lock_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_package_needs_no_part_of_unix() -> None:
    """Imports of the root modules and of the data sets where a module and a function of Unix are missing."""
    code = (
        "import filelock, torch.multiprocessing, datasets, huggingface_hub\n"  # what they need is their concern
        "import os, sys\n"
        "sys.modules['fcntl'] = None\n"
        "vars(os).pop('sched_getaffinity', None)\n"
        "from vultus._files import processors\n"
        "import vultus.cli.main, vultus.data.prepare, vultus.models.snapshot, vultus._prefetch\n"
        "assert processors() >= 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError), atomic_path(path) as temporary, open(temporary, "w") as file:
        file.writelines(["half", None])
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(OSError, match="No such file") as caught:
        write_json(path, {})
    assert caught.value.filename == str(path)


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        make_folder(tmp_path / "file" / "b")


def test_names_of_files() -> None:
    assert file_stem("runs/mine (test)") == "runs-mine--test"
    assert file_stem("../..") == "snapshot"


def test_errors_in_one_line() -> None:
    assert in_one_line(ValueError("a\n  b\tc")) == "a b c"
    assert in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line(ValueError("x" * 1000))) == 200

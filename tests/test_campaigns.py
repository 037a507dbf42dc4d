"""Short forms of the campaigns: commands that are disturbed, readers of damaged files; docs/reliability.md has more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vultus.errors import UserError
from vultus.evaluation.results import read_results
from vultus.sampling.face_files import read_faces
from vultus.training.run_log import read_stats

ROOT = Path(__file__).resolve().parents[1]


def campaign(name: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", f"tests.campaigns.{name}", "--folder", str(tmp_path), "--report", str(report)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert report.is_file(), done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert done.returncode == 0, json.dumps(found, indent=1)[:4000]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the campaign forks")
def test_disturbed_commands_finish_with_the_undisturbed_result(tmp_path: Path) -> None:
    given = ["--command", "prepare", "train", "generate", "--disturbance", "write", "--trials", "1", "--seed", "4"]
    found = campaign("crash", tmp_path, *given)["commands"]
    assert all(each["write"] == each["write"] | {"trials": 1, "disturbed": 1, "losses": 0} for each in found.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign reads /proc")
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    readers = ["image", "published", "prepared", "embeddings", "checkpoint", "samples", "results", "faces", "synthesis"]
    found = campaign("hostile_files", tmp_path, "--reader", *readers, "--cases", "12", "--seed", "4")
    assert {name: each["cases"] for name, each in found.items()} == dict.fromkeys(readers, 12)


def test_lines_that_are_nested_deeply(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"[" * 200_000 + b'\n\xff\n{"cur_nimg": 4}\n')
    assert read_stats(path) == [{"cur_nimg": 4}]
    with pytest.raises(UserError, match="line 1 does not say"):
        read_faces(path)


@pytest.mark.parametrize("row", ['{"value": 1, "low": "x", "high": 2}', '{"value": 1' + "0" * 400 + "}"])
def test_results_that_no_table_can_show(row: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"a": {"format": 2, "metrics": {"mse": ROW}}}'.replace("ROW", row))
    with pytest.raises(UserError, match="not the results of vultus evaluate"):
        read_results(tmp_path)

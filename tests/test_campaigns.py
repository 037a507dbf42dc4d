"""Short forms of the campaigns: disturbed commands, damaged files, a server under load; see docs/reliability.md."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from campaigns.server import judge_latency
from campaigns.steady import Kind, Load, Sample
from vultus.errors import UserError
from vultus.evaluation.results import read_results
from vultus.sampling.face_files import read_faces
from vultus.training.run_log import read_stats

ROOT = Path(__file__).resolve().parents[1]


def campaign(name: str, tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", f"tests.campaigns.{name}", "--folder", str(tmp_path), "--report", str(report)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert report.is_file(), done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert done.returncode == code, json.dumps(found, indent=1)[:4000]
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


SHORT = ["--minutes", "0", "--control", "0.5", "--phase", "0.5", "--recovery", "0.5", "--pause", "0.5", "--burst", "80",
         "--seconds", "4", "--header-seconds", "1", "--idle-seconds", "1", "--megabytes", "0.5", "--queue", "16",
         "--connections", "300"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign reads /proc and uses several addresses of one host")
def test_server_under_load_with_faults(tmp_path: Path) -> None:
    found = campaign("server", tmp_path, *SHORT, "--fault", "together", "--rate", "2")
    faults = {name.partition(":")[0] for name in found["faults"]}
    assert faults == {"slow", "half-open", "disconnect", "oversized", "token", "malformed", "burst"}
    assert sum(each["answers"].get("200", 0) for each in found["steady"].values()) > 5
    assert found["statuses_of_the_server"].keys() >= {"200", "400", "401", "408", "413", "422"}


LEAKY = """
import os, sys
from vultus.cli.main import main
from vultus.serving.engine import Engine
print(os.environ["VULTUS_TOKEN"], file=sys.stderr)
Engine.random_identities = None
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign reads /proc and uses several addresses of one host")
def test_findings_of_the_server_campaign(tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(LEAKY)
    given = ["--fault", "token", "--rate", "20", "--program", str(tmp_path / "leaky.py")]
    found = campaign("server", tmp_path, *SHORT, *given, code=1)
    texts = " ".join(each["finding"] for each in found["findings"])
    for words in (
        "log: token or name 0",
        "random-1: status 500 is not due",
        "log: a traceback",
        "answers of status 500",
    ):
        assert words in texts
    assert "right-" not in texts, "the findings do not repeat the token"


class Answers(BaseHTTPRequestHandler):
    """/same, /other, which differs each time, /busy and /busy-soon, the latter with Retry-After, and /none."""

    count = 0

    def do_GET(self) -> None:
        Answers.count += 1
        if self.path == "/none":
            return
        self.send_response(429 if self.path.startswith("/busy") else 200)
        body = str(Answers.count if self.path == "/other" else 0).encode()
        self.send_header("Content-Length", str(len(body)))
        if self.path == "/busy-soon":
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="the campaign uses several addresses of one host")
def test_answers_that_are_not_due_are_found() -> None:
    kinds = {name: Kind(name, 1, "GET", f"/{name}", bytes.isdigit, same=bytes.decode) for name in
             ("same", "other", "busy", "busy-soon", "none")}  # fmt: skip

    async def ask(load: Load) -> list[list[str]]:
        found = []
        for names in (["same"] * 2, ["other"] * 2, ["busy-soon"], ["none"]):
            for name in names:
                await load.request(kinds[name], time.monotonic())
            found.append(load.findings[:])
            load.findings.clear()
        with load.overloads.during():
            for name in ("busy-soon", "busy"):
                await load.request(kinds[name], time.monotonic())
                found.append(load.findings[:])
        await load.client.aclose()
        return found

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        load = Load(f"http://127.0.0.1:{server.server_address[1]}", "token", list(kinds.values()), 1.0, 0)
        same, other, outside, none, during, without = asyncio.run(ask(load))
        server.shutdown()
        thread.join()
    assert same == during == []
    assert other == ["other: another answer than the first one"]
    assert "is not due" in outside[0]
    assert "no answer" in none[0]
    assert "without Retry-After" in without[0]


def test_latency_is_judged_by_that_of_control_windows() -> None:
    random = np.random.default_rng(0)
    slow_until = {"recovers": 8.0, "stays": 30.0}
    samples, windows = [], [("recovers", 100.0, 125.0), ("stays", 200.0, 225.0)]
    for start in np.arange(0, 230, 0.1):
        late = any(start - end < slow_until[name] for name, end, last in windows if end <= start < last)
        samples.append(Sample(float(start), float(random.uniform(0.01, 0.05)) + 0.5 * late, "page", 200))
    report, findings = judge_latency(samples, [(0.0, 30.0), (130.0, 160.0)], windows)
    assert report["judged"]
    assert report["after"]["recovers"]["recovered_s"] == [8.0]
    assert report["after"]["stays"]["recovered_s"] == [None]
    assert [line.partition(":")[2].partition(":")[0] for line in findings] == [" after stays"] * 2
    assert not judge_latency(samples[::5], [(0.0, 30.0)], windows)[0]["judged"], "too few requests"


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

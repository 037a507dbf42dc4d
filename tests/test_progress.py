"""Progress on stderr: few whole lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vultus import _progress
from vultus._progress import message, progress

SRC = Path(_progress.__file__).resolve().parents[1]

LOOP = """
import time
from vultus import _progress
_progress.INTERVAL = 0.2
start = time.monotonic()
with _progress.progress(100, title="prepare", initial=10) as shown:
    for number in range(90):
        time.sleep(0.01)
        shown.show({"loss": f"{number / 10:.1f}"})
        shown.update()
        if number == 50:
            _progress.message("note: half of it")
print(time.monotonic() - start)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC)}


def test_a_log_gets_few_lines() -> None:
    done = subprocess.run([sys.executable, "-c", LOOP], env=environment(), capture_output=True, check=True)
    assert b"\r" not in done.stderr
    assert b"\x1b" not in done.stderr
    lines = done.stderr.decode().splitlines()
    assert "note: half of it" in lines
    lines.remove("note: half of it")
    assert 2 <= len(lines) <= float(done.stdout) / 0.2 + 1
    for line in lines:
        assert re.fullmatch(r"prepare: \d+/100 \(\d+%\) img, \S+ img/s, \d+ s, loss \d\.\d", line), line
    assert lines[-1].startswith("prepare: 100/100 (100%) img, ")
    assert lines[-1].endswith("loss 8.9")


def test_a_terminal_gets_a_bar() -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    termios = pytest.importorskip("termios", reason="this system has no pseudo-terminals")
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with subprocess.Popen(
        [sys.executable, "-c", LOOP], env=environment(), stdout=subprocess.DEVNULL, stderr=terminal
    ) as process:
        os.close(terminal)
        text = b""
        while True:
            try:
                block = os.read(main, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not block:
                break
            text += block
    os.close(main)
    assert process.returncode == 0
    assert text.count(b"\r") > 3
    assert b"100/100" in text
    assert b"note: half of it" in text


def test_the_interval_is_ten_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress(None, title="prepare") as shown:
        for _ in range(240):
            now += 0.125
            shown.update(2)
    assert capsys.readouterr().err.splitlines() == [
        "prepare: 160 img, 16 img/s, 10 s",
        "prepare: 320 img, 16 img/s, 20 s",
        "prepare: 480 img, 16 img/s, 30 s",
    ]


def test_the_final_state_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(5, unit="face") as shown:
        shown.show({}, total=4)
        shown.update(4)
    assert re.fullmatch(r"progress: 4/4 \(100%\) face, \S+ face/s, 0 s\n", capsys.readouterr().err)


def test_the_state_at_an_error_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with progress(5) as shown:
            shown.update(2)
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        interrupted()
    assert capsys.readouterr().err.startswith("progress: 2/5 (40%)")


def test_nothing_done_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(5, initial=5):
        pass
    assert capsys.readouterr().err == ""


def test_a_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    message("note: no FaceNet")
    assert capsys.readouterr().err == "note: no FaceNet\n"

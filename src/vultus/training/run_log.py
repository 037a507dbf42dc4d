"""The log of a run: `stats.jsonl` always, and trackers by name.

The trainer writes to a RunLog. Every line is in stats.jsonl before a tracker gets it, so the file is complete: a
tracker that is added later, or that failed in an earlier session, receives from it the lines that it does not have yet.
`tracking.json` holds, for each tracker, the id of its run and how far it has received the log. It is written before a
line is sent, so that a killed process may lose one line of a tracker but never sends a line twice.

Each tracker runs in a process of its own (trackers.py), fed by a thread of its own: the training never waits for it.
The first failure of a tracker is reported in one line and ends that tracker for this session.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vultus._files import json_value, read_json, write_text
from vultus._progress import message
from vultus.errors import UserError
from vultus.training.trackers import NEEDS

MAX_QUEUED = 10_000  # calls that may wait for a tracker; beyond that it has failed
CLOSING = 60.0  # seconds that all trackers together have at the end
MEASURED = "train"  # prefix of the trainer's own values in the trackers


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that does not exist or is not installed."""
    for name in names:
        if name not in NEEDS:
            raise UserError(f"--track {name}: no such tracker; there are {', '.join(NEEDS)}")
        if importlib.util.find_spec(NEEDS[name]) is None:
            raise UserError(f"--track {name}: {NEEDS[name]} is not installed; run pip install 'vultus[track]'")


def read_stats(path: Path, cur_nimg: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a stats.jsonl up to `cur_nimg` images; an incomplete line, of a killed process, is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json_value(line)
            if values["cur_nimg"] <= cur_nimg:
                lines.append(values)
    return lines


def cut_stats(path: Path, cur_nimg: int) -> None:
    """Remove the lines after `cur_nimg` images: steps that are repeated must not be logged twice."""
    if path.is_file():
        lines = read_stats(path, cur_nimg)
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


class RunLog:
    """The log that the trainer writes to. Use it as a context.

    Args:
        out: the run folder.
        trackers: names from trackers.NEEDS; they are installed.
        project: the trackers' project.
        config: objects that describe the run, by title.
        cur_nimg: images seen by the checkpoint that the run resumes from.
    """

    def __init__(
        self, out: Path, *, trackers: Sequence[str], project: str, config: dict[str, Any], cur_nimg: int
    ) -> None:
        self._latest: dict[str, float] = {}
        stats = out / "stats.jsonl"
        missed = [event for line in read_stats(stats, cur_nimg) for event in self._events(line)]
        sheets = [path for path in (out / "samples").glob("[0-9]*.png") if int(path.stem) <= cur_nimg]
        missed += [_image("samples", path, int(path.stem)) for path in sheets]
        missed.sort(key=lambda event: int(event["arguments"]["step"]))
        self._file = open(stats, "a", encoding="utf-8")  # noqa: SIM115
        state = _State(out / "tracking.json") if trackers else None
        self._threads = [_Feeder(name, out, project, config, state, missed) for name in trackers if state]

    def __enter__(self) -> RunLog:
        """The trackers are starting already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for thread in self._threads:
            thread.put({"call": "close", "arguments": {"complete": kind is None}})
        deadline = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.finish(max(deadline - time.monotonic(), 0.1))

    def log(self, values: dict[str, Any], cur_nimg: int, evaluator: str | None = None) -> None:
        """One line of values: the trainer's own, or an evaluator's."""
        line: dict[str, Any] = {"cur_nimg": cur_nimg} | ({"evaluator": evaluator} if evaluator else {}) | values
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for event in self._events(line):
            self._send(event)

    def image(self, name: str, path: Path, cur_nimg: int) -> None:
        """An image file in the run folder."""
        self._send(_image(name, path, cur_nimg))

    def artifact(self, path: Path, metadata: dict[str, Any], cur_nimg: int) -> None:
        """A file to store, with a table of metrics: those in its metadata, and the latest of every evaluator."""
        stored = metadata.get("metrics") or {}
        metrics = {name: value.get("value") if isinstance(value, dict) else value for name, value in stored.items()}
        table = [[name, value] for name, value in (metrics | self._latest).items()]
        arguments = {"path": str(path), "metadata": metadata, "table": table, "step": cur_nimg}
        self._send({"call": "artifact", "kind": "snapshot", "arguments": arguments})

    def _events(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        kind = line.get("evaluator", MEASURED)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "cur_nimg"}
        values = {f"{kind}/{key}": value for key, value in numbers.items()}
        if kind != MEASURED:
            self._latest |= values
        return [{"call": "log", "kind": kind, "arguments": {"values": values, "step": line["cur_nimg"]}}]

    def _send(self, event: dict[str, Any]) -> None:
        for thread in self._threads:
            thread.put(event)


def _image(name: str, path: Path, cur_nimg: int) -> dict[str, Any]:
    return {"call": "image", "kind": name, "arguments": {"name": name, "path": str(path), "step": cur_nimg}}


class _State:
    """tracking.json: {tracker: {project, id, sent: {kind: images seen}}}."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.entries: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}

    def _write(self) -> None:
        # Not flushed to disk as by _files.write_json: every call writes it, and after a power failure the worst case is
        # a tracker that begins a new run.
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(self.entries, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)

    def opened(self, name: str, id: str) -> None:
        """Store the id of a tracker's run."""
        with self._lock:
            self.entries[name]["id"] = id
            self._write()

    def sent(self, name: str, events: Sequence[dict[str, Any]]) -> None:
        """Store that these calls are about to be made."""
        with self._lock:
            for event in events:
                self.entries[name]["sent"][event["kind"]] = event["arguments"]["step"]
            if events:
                self._write()


class _Feeder:
    """The thread and the process of one tracker."""

    def __init__(
        self,
        name: str,
        out: Path,
        project: str,
        config: dict[str, Any],
        state: _State,
        missed: list[dict[str, Any]],
    ) -> None:
        self.name = name
        self._state = state
        entry = state.entries.get(name)
        if entry is None or entry["project"] != project:
            entry = state.entries[name] = {"project": project, "id": None, "sent": {}}
        self._entry = entry
        self._missed = [event for event in missed if self._is_new(event)]
        names = {"project": project, "name": out.resolve().name, "id": entry["id"]}
        self._open = {"call": "open", "arguments": {"out": str(out.resolve()), "config": config} | names}
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._failed = False
        self._process: subprocess.Popen[str] | None = None
        self._location = ""
        self._thread = threading.Thread(target=self._run, name=f"vultus-{name}", daemon=True)
        self._thread.start()

    # --- for the trainer ------------------------------------------------------------------------------------------

    def put(self, event: dict[str, Any]) -> None:
        """Queue a call; never waits."""
        if self._failed:
            return
        if self._queue.qsize() > MAX_QUEUED:
            self._fail(f"{MAX_QUEUED} calls are waiting for it")
            return
        self._queue.put(event)

    def finish(self, seconds: float) -> None:
        """Wait so many seconds for the tracker to end after `close`, and print where its records are."""
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._failed:
            self._fail("it did not end in time")
        if self._location and not self._failed:
            print(f"{self.name}: {self._location}", file=sys.stderr)

    # --- in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._process = _start(self.name)
            self._state.opened(self.name, self._call(self._open))
            self._state.sent(self.name, self._missed)  # once for all of them: there may be many
            for event in self._missed:
                self._call(event)
            self._location = str(self._call({"call": "where", "arguments": {}}))
            while not self._failed:
                event = self._queue.get()
                if event["call"] == "close":
                    self._call(event)
                    break
                if self._is_new(event):
                    self._state.sent(self.name, [event])
                    self._call(event)
        except Exception as error:  # an error of a tracker must not end the training
            self._fail(str(error) or type(error).__name__)
        self._end()

    def _is_new(self, event: dict[str, Any]) -> bool:
        return bool(event["arguments"]["step"] > self._entry["sent"].get(event["kind"], -1))

    def _call(self, event: dict[str, Any]) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"call": event["call"], "arguments": event["arguments"]}) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise RuntimeError(f"its process ended (exit code {process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()

    def _fail(self, reason: str) -> None:
        if self._failed:
            return
        self._failed = True
        shown = " ".join(reason.split())[:200]
        message(f"vultus: warning: {self.name} is off for the rest of this session: {shown}")
        if self._process is not None:
            self._process.kill()


def _start(name: str) -> subprocess.Popen[str]:
    """Start the tracker's process: Ctrl-C does not reach it, and it sends no telemetry and no error reports."""
    source = str(Path(__file__).resolve().parents[2])
    quiet = {
        "DO_NOT_TRACK": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_ERROR_REPORTING": "false",
    }
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "vultus.training.trackers", name],
        env=quiet | dict(os.environ) | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )

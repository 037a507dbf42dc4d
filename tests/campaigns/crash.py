"""Disturb the commands at random moments; then the same command must finish with the undisturbed result.

    python -m tests.campaigns.crash --trials 100 --seed 0 --report report.json
    python -m tests.campaigns.crash --command prepare train --disturbance kill disk --trials 20

Disturbances:

- kill: SIGKILL at a random moment of the duration of the undisturbed command, one to three times.
- write: SIGKILL before a random file operation that writes, one to three times.
- disk: the disk, a small tmpfs, is full at a random write; then it has room.
- storm: two to six SIGTERM and SIGINT within a few hundredths of a second.
- two: two processes with the same command on one folder, the second a random moment later.

A loss is a trial after which the same command does not end with 0, or its result is not that of the undisturbed command
byte for byte (results.EXCLUDED lists what is not compared), or that left a half-written file under a final name, a
traceback, or a process that hung. The exit code is 1 if there was a loss.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import scenes  # first: it replaces functions that the other modules import
from .children import Child, Ended, Writes
from .results import EXCLUDED, broken, differences, result, without_earlier_checkpoints
from .scenes import COMMANDS, OUT, Scene, Stage

DISTURBANCES = ("kill", "write", "disk", "storm", "two")
IN_USE = "another process is at work in this folder"
PAGE = 4096


class Trials:
    """The trials of one command.

    Args:
        stage: the inputs.
        scene: the command.
        work: an empty folder, the working directory of the command; the same for every trial, as paths are recorded.
        seed: of the moments.
    """

    def __init__(self, stage: Stage, scene: Scene, work: Path, seed: int) -> None:
        self.stage, self.scene, self.work = stage, scene, work
        self.random = random.Random(f"{seed} {scene.name}")
        self.disk = work / "disk"
        first, second = (self._undisturbed() for _ in range(2))
        unequal = differences(first[0], second[0])
        if unequal:
            raise SystemExit(f"{scene.name}: two undisturbed runs differ: {unequal}")
        self.expected, self.seconds, self.size = first[0], min(first[1], second[1]), first[2]
        self.operations = self._operations()

    # --- running the command --------------------------------------------------------------------------------------

    def clear(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.disk.mkdir(parents=True)
        self.stage.uploads.clear()

    def start(self, name: str = "1", before: Callable[[], None] | None = None) -> Child:
        return Child(self.scene.arguments, self.work, name=name, before=before)

    def result(self) -> dict[str, bytes]:
        uploaded = {f"uploaded: {name}": data for name, data in self.stage.uploaded().items()}
        return result(self.work / OUT) | uploaded

    def _undisturbed(self) -> tuple[dict[str, bytes], float, int]:
        self.clear()
        ended = self.start().wait()
        if ended.code != 0:
            raise SystemExit(f"{self.scene.name}: the undisturbed run failed: {ended.stderr}")
        files = [path for path in self.disk.rglob("*") if path.is_file()]
        size = sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)
        return self.result(), ended.seconds, size

    def _operations(self) -> int:
        self.clear()
        writes = Writes(self.disk)
        counted = self.work / "counted"

        def before() -> None:
            import vultus.cli.main as cli

            command, run = self.scene.arguments[0], cli._function(self.scene.arguments[0])

            def counting(arguments: Any) -> int:
                code = run(arguments)
                counted.write_text(str(writes.count))
                return code

            cli._function = lambda name: counting if name == command else run  # type: ignore[assignment]
            writes.install()

        assert self.start(before=before).wait().code == 0
        return int(counted.read_text())

    # --- one trial ------------------------------------------------------------------------------------------------

    def trial(self, disturbance: str) -> dict[str, Any]:
        """{"hit": whether the command was disturbed before its end, "losses": [...], and how it was disturbed}."""
        self.clear()
        found: dict[str, Any] = getattr(self, f"_{disturbance}")()
        found["losses"] += broken(self.work / OUT)
        if disturbance == "disk" and self._mounted():
            self._remount(1 << 30)
        ended = self.start("again").wait()
        if ended.code != 0:
            found["losses"].append(f"the same command again: exit code {ended.code}: {ended.stderr[-400:]}")
        else:
            compared = without_earlier_checkpoints if disturbance == "storm" else dict
            found["losses"] += differences(compared(self.expected), compared(self.result()))
        found["losses"] += traces(ended, "the same command again")
        if disturbance == "disk" and self._mounted():
            subprocess.run(["umount", str(self.disk)], check=True)
        return found

    def _kill(self) -> dict[str, Any]:
        moments, hit, losses = [], False, []
        for _ in range(self.random.choice((1, 1, 2, 3))):
            moments.append(round(self.random.uniform(0, self.seconds), 3))
            child = self.start()
            time.sleep(moments[-1])
            child.send(signal.SIGKILL)
            ended = child.wait()
            hit |= ended.killed
            losses += traces(ended, "before it was killed")
        return {"moments": moments, "hit": hit, "losses": losses}

    def _write(self) -> dict[str, Any]:
        moments, hit, losses = [], False, []
        for _ in range(self.random.choice((1, 1, 2, 3))):
            moments.append(self.random.randint(1, self.operations))
            ended = self.start(before=Writes(self.disk, kill=moments[-1]).install).wait()
            hit |= ended.killed
            losses += traces(ended, "before it was killed")
        return {"operations": moments, "hit": hit, "losses": losses}

    def _disk(self) -> dict[str, Any]:
        size = self.random.randrange(PAGE, max(self.size, 2 * PAGE), PAGE)
        if MOUNTS:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.disk)], check=True)
            ended = self.start().wait()
        else:  # no file may become longer than this; the error is another one, the handling is the same
            size = self.random.randrange(0, max(map(len, self.expected.values()), default=1))
            ended = self.start(before=lambda: _limit_file_size(size)).wait()
        losses = traces(ended, "with a full disk")
        lines = ended.stderr.splitlines()
        if ended.code not in (0, 2):
            losses.append(f"full disk: exit code {ended.code}: {ended.stderr[-400:]}")
        if ended.code == 2 and (sum("vultus: error:" in line for line in lines) != 1 or "error:" not in lines[-1]):
            losses.append(f"full disk: no single line of error: {ended.stderr[-400:]}")
        left = [path.name for path in (self.work / OUT).rglob(".*.tmp")]
        losses += [f"full disk: temporary file left: {name}" for name in left]
        return {"size": size, "hit": ended.code == 2, "losses": losses}

    def _storm(self) -> dict[str, Any]:
        start = self.random.uniform(0, self.seconds)
        sent = [self.random.choice((signal.SIGTERM, signal.SIGINT)) for _ in range(self.random.randint(2, 6))]
        child = self.start()
        time.sleep(start)
        for number in sent:
            child.send(number)
            time.sleep(self.random.expovariate(100))
        ended = child.wait(limit=self.seconds * 3 + 30)
        losses = traces(ended, "after signals")
        if ended.code not in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
            losses.append(f"signals: exit code {ended.code}: {ended.stderr[-400:]}")
        return {"moment": round(start, 3), "signals": sent, "hit": ended.code != 0, "losses": losses}

    def _two(self) -> dict[str, Any]:
        delay = self.random.choice((0.0, self.random.uniform(0, self.seconds)))
        children = [self.start("1")]
        time.sleep(delay)
        hit = children[0].running()
        children.append(self.start("2"))
        both = [child.wait() for child in children]
        losses = [line for ended in both for line in traces(ended, "of two processes")]
        codes = sorted(ended.code for ended in both)
        refused = [ended for ended in both if ended.code == 2]
        if codes not in ([0, 0], [0, 2]):
            losses += [f"two processes: exit codes {codes}: {ended.stderr[-300:]}" for ended in both if ended.code]
        losses += [
            f"two processes: {ended.stderr[-300:]}" for ended in refused if IN_USE not in ended.stderr.splitlines()[-1]
        ]
        if not losses:
            losses += [f"two processes: {line}" for line in differences(self.expected, self.result())]
        return {"delay": round(delay, 3), "hit": hit, "refused": len(refused), "losses": losses}

    def _mounted(self) -> bool:
        return os.path.ismount(self.disk)

    def _remount(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.disk)], check=True)


def traces(ended: Ended, when: str) -> list[str]:
    """Losses that the output of a process shows."""
    lines = [f"{when}: hung"] if ended.hung else []
    if "Traceback" in ended.stderr or "Exception ignored" in ended.stderr:
        lines.append(f"{when}: a traceback: {ended.stderr[-1500:]}")
    return lines


def _limit_file_size(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


MOUNTS = False  # whether a small disk can be mounted


def in_own_namespace() -> None:
    """Where it may not mount, start this program again in a user namespace in which it may, if there are such."""
    if _may_mount() or "VULTUS_CAMPAIGN" in os.environ or shutil.which("unshare") is None:
        return
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0:
        os.environ["VULTUS_CAMPAIGN"] = "1"
        arguments = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "-rm", *arguments])


def run(
    commands: list[str], disturbances: list[str], *, trials: int, seed: int, root: Path, until: float = float("inf")
) -> dict[str, Any]:
    """The report: {command: {disturbance: {"trials", "disturbed", "losses"}}}."""
    global MOUNTS
    MOUNTS = "disk" in disturbances and _may_mount()
    report: dict[str, Any] = {"commands": {}, "excluded": EXCLUDED, "full_disk": "tmpfs" if MOUNTS else "RLIMIT_FSIZE"}
    inputs = root / "inputs"
    inputs.mkdir()
    with scenes.staged(inputs) as stage:
        for name in commands:
            scene = stage.scenes[name]
            missing = [need for need in scene.needs if importlib.util.find_spec(need) is None]
            if missing:
                report["commands"][name] = {"skipped": f"{missing[0]} is not installed"}
                continue
            work = Trials(stage, scene, root / "work", seed)
            about = {"seconds": round(work.seconds, 2), "operations": work.operations, "files": len(work.expected)}
            report["commands"][name] = found = {"undisturbed": about}
            for disturbance in disturbances:
                outcomes: list[dict[str, Any]] = []
                while len(outcomes) < trials and time.time() < until:
                    outcomes.append(work.trial(disturbance))
                lost = [outcome for outcome in outcomes if outcome["losses"]]
                found[disturbance] = {
                    "trials": len(outcomes),
                    "disturbed": sum(outcome["hit"] for outcome in outcomes),
                    "refused": sum(outcome.get("refused", 0) for outcome in outcomes),
                    "losses": len(lost),
                    "lost": lost[:5],
                }
                shown = {key: value for key, value in found[disturbance].items() if key != "lost"}
                print(f"{name:<9} {disturbance:<6} {json.dumps(shown)}", file=sys.stderr, flush=True)
    return report


def losses(report: dict[str, Any]) -> int:
    """The losses in a report."""
    return sum(part.get("losses", 0) for found in report["commands"].values() for part in found.values()
               if isinstance(part, dict))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb the commands at random moments.")
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--disturbance", nargs="+", choices=DISTURBANCES, default=list(DISTURBANCES))
    parser.add_argument("--trials", type=int, default=100, help="of each disturbance of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial after this time")
    parser.add_argument("--folder", type=Path, help="for temporary files; default: that of the system")
    parser.add_argument("--report", type=Path, help="JSON file to write; default: stdout")
    options = parser.parse_args()
    if "disk" in options.disturbance:
        in_own_namespace()
    until = time.time() + options.minutes * 60
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        found = run(options.command, options.disturbance, trials=options.trials, seed=options.seed,
                    root=Path(root).resolve(), until=until)  # fmt: skip
    text = json.dumps(found, indent=2, default=str)
    if options.report:
        options.report.write_text(text + "\n")
    else:
        print(text)
    return 1 if losses(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())

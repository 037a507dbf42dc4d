"""Python programs in processes of their own: forks of one process that has imported torch, which takes two seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PARENT = """
import json, os, signal, sys, traceback, warnings
import torch
for line in sys.stdin:
    task = json.loads(line)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            signal.alarm(240)
            for number, path in ((1, task["stdout"]), (2, task["stderr"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.clear()
            os.environ.update(task["environment"])
            warnings.simplefilter("error")
            sys.argv = ["-c", *task["arguments"]]
            exec(compile(task["program"], "program", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
TESTS = Path(__file__).resolve().parent
PATHS = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])


@dataclass
class Done:
    """Exit code (minus the signal that ended the process), and what was printed."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Start it with a folder for its files; `run` starts a process. Warnings are errors there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            env=os.environ | {"PYTHONPATH": PATHS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.parent.communicate()  # closes its standard input, at which it ends

    def run(self, program: str, *arguments: str, environment: dict[str, str] | None = None) -> Done:
        """Run the text of a program; it finds vultus and the modules of tests/."""
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        stdout, stderr = self.folder / "stdout", self.folder / "stderr"
        task = {"program": program, "arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}
        given = dict(os.environ if environment is None else environment)
        self.parent.stdin.write(json.dumps(task | {"environment": given}) + "\n")
        self.parent.stdin.flush()
        code = int(self.parent.stdout.readline())
        return Done(code, stdout.read_text(), stderr.read_text())

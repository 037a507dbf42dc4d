"""Python programs in processes of their own: forks of one process that has imported torch, which takes two seconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PARENT = """
import json, os, signal, sys, traceback, warnings
import torch
for line in sys.stdin:
    task = json.loads(line)
    processes = []
    for environment, stdout, stderr in task["processes"]:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                signal.alarm(240)
                for number, path in ((1, stdout), (2, stderr)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                os.environ.clear()
                os.environ.update(environment)
                if len(task["processes"]) > 1:
                    torch.set_num_threads(1)  # as torchrun does
                warnings.simplefilter("error")
                sys.argv = ["-c", *task["arguments"]]
                exec(compile(task["program"], "program", "exec"), {"__name__": "__main__"})
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        processes.append(process)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]), flush=True)
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
        return self._run(program, arguments, [dict(os.environ if environment is None else environment)])[0]

    def run_together(self, program: str, *arguments: str, count: int = 2) -> list[Done]:
        """Run it in `count` processes with the variables that torchrun sets."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        numbers = map(str, range(count))
        return self._run(program, arguments, [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in numbers])

    def _run(self, program: str, arguments: Sequence[str], environments: list[dict[str, str]]) -> list[Done]:
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        files = [(self.folder / f"{number}.out", self.folder / f"{number}.err") for number in range(len(environments))]
        processes = [(each, str(out), str(err)) for each, (out, err) in zip(environments, files, strict=True)]
        task = {"program": program, "arguments": arguments, "processes": processes}
        self.parent.stdin.write(json.dumps(task) + "\n")
        self.parent.stdin.flush()
        codes = json.loads(self.parent.stdout.readline())
        return [Done(code, *(each.read_text() for each in both)) for code, both in zip(codes, files, strict=True)]

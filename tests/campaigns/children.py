"""The command line in forked children of a process that has imported everything: a trial costs no interpreter start."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 180.0  # seconds after which a child hangs


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (minus the signal that ended it), output, seconds; `hung`: killed after LIMIT."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    hung: bool = False

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL and not self.hung


class Child:
    """A forked child that runs `vultus ARGUMENTS` in the folder `work`, in a process group of its own.

    `before` is called in the child, before the command.
    """

    def __init__(
        self, arguments: Sequence[str], work: Path, *, name: str = "1", before: Callable[[], None] | None = None
    ) -> None:
        self.files = work / f"{name}.stdout", work / f"{name}.stderr"
        self.start = time.monotonic()
        self._ended: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(arguments, work, self.files, before)

    def send(self, number: int) -> None:
        if self._poll() is None:
            os.kill(self.pid, number)

    def running(self) -> bool:
        return self._poll() is None

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for its end; after `limit` seconds it is killed."""
        hung = False
        while self._poll() is None:
            if not hung and time.monotonic() - self.start > limit:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.003)
        assert self._ended is not None
        seconds = time.monotonic() - self.start
        texts = [path.read_text(errors="replace") if path.is_file() else "" for path in self.files]
        return Ended(self._ended, *texts, seconds, hung)

    def _poll(self) -> int | None:
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended


def _run(arguments: Sequence[str], work: Path, files: tuple[Path, Path], before: Callable[[], None] | None) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setpgid(0, 0)
        for number, path in zip((1, 2), files, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(work)
        os.environ["VULTUS_CACHE"] = str(work / "disk" / "cache")
        from vultus.cli.main import main

        sys.argv = ["vultus", *arguments]
        if before is not None:
            before()
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # a traceback is a finding
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Writes:
    """An audit hook that counts writing file operations below a folder, and kills the process before the `kill`-th.

    Counted are opening for writing, renaming, removing, and making a folder. What libraries write outside Python's own
    functions (safetensors, Arrow) is not seen, but the rename that follows it is.
    """

    def __init__(self, folder: Path, kill: int | None = None) -> None:
        self.folder, self.kill, self.count = str(folder), kill, 0

    def install(self) -> None:
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(os.fspath(path)).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

"""What a run was made with: versions, git revision, hardware; one entry a session in <run folder>/run.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vultus._files import processors, read_json, write_json


class Session:
    """One sitting of a run, kept up to date in run.json.

    run.json: `data` (content_sha256, counts, licence of the data set) and `sessions`, each with `began` (UTC),
    `seconds`, `from_nimg`, `cur_nimg`, `command`, `versions`, `git`, `hardware`, `dtype`, `trackers`.
    """

    def __init__(
        self, out: Path, *, data: dict[str, Any], device: str, dtype: str, cur_nimg: int, trackers: list[str]
    ) -> None:
        self._path = out / "run.json"
        self.entry: dict[str, Any] = {
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "from_nimg": cur_nimg,
            "cur_nimg": cur_nimg,
            "command": sys.argv,
            "versions": versions(),
            "git": revision(),
            "hardware": hardware(device),
            "dtype": dtype,
            "trackers": trackers,
        }
        before = read_json(self._path)["sessions"] if self._path.is_file() else []
        self._record = {"data": data, "sessions": [*before, self.entry]}
        write_json(self._path, self._record)

    def update(self, cur_nimg: int, seconds: float) -> None:
        """How far this session has come: images seen by the run, seconds of training in this session."""
        self.entry |= {"cur_nimg": cur_nimg, "seconds": round(seconds, 1)}
        write_json(self._path, self._record)


def versions() -> dict[str, str]:
    """Of vultus, torch and Python."""
    import torch

    return {
        "vultus": importlib.metadata.version("vultus"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def revision() -> dict[str, Any] | None:
    """{revision, dirty} of the git checkout that this code runs from; None for an installed copy."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside somebody's repository is not a checkout
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"revision": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: str) -> dict[str, Any]:
    """What `device` is, in words and numbers: processor, cores that may be used, threads, memory, GPU."""
    import torch

    found: dict[str, Any] = {
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": processors(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: str) -> dict[str, float]:
    """Most memory that this process has held so far, in MiB: its own, and what it has on a GPU. No waiting for one."""
    import resource

    import torch

    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    found = {"peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if device.startswith("cuda"):
        found["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return found

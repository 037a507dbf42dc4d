"""What a run was made with: versions, git revision, hardware; one entry for each session in <run folder>/run.json."""

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
    """One process that trains a run, kept up to date in run.json.

    run.json: `data` (content_sha256, counts, licence of the data set) and `sessions`, each with `began` (UTC),
    `seconds`, `from_nimg`, `cur_nimg`, `command`, `versions`, `git`, `hardware`, `dtype`, `processes`, `trackers`.
    """

    def __init__(
        self,
        out: Path,
        *,
        data: dict[str, Any],
        device: str,
        dtype: str,
        cur_nimg: int,
        trackers: list[str],
        processes: int = 1,
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
            "processes": processes,
            "trackers": trackers,
        }
        before = read_json(self._path)["sessions"] if self._path.is_file() else []
        self._record = {"data": data, "sessions": [*before, self.entry]}
        write_json(self._path, self._record)

    def update(self, cur_nimg: int, seconds: float) -> None:
        """Record the images seen by the run, and the seconds of training in this session."""
        self.entry |= {"cur_nimg": cur_nimg, "seconds": round(seconds, 1)}
        write_json(self._path, self._record)


def versions() -> dict[str, str]:
    """Versions of vultus, torch and Python."""
    import torch

    return {
        "vultus": importlib.metadata.version("vultus"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def revision() -> dict[str, Any] | None:
    """{revision, dirty} of the git checkout that this code runs from; None for an installed copy."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # fails in an environment inside another project's repository
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"revision": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: str) -> dict[str, Any]:
    """What `device` is: CPU, usable cores, threads, memory in GiB (where the system reports it), and the GPU."""
    import torch

    values: dict[str, Any] = {
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": processors(),
        "threads": torch.get_num_threads(),
    }
    if sys.platform != "win32":
        values["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        values |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return values


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: str) -> dict[str, float]:
    """The largest memory that this process has held so far, in MiB: `peak_memory_mib` of its own (where the system
    reports it), `peak_gpu_memory_mib` on a GPU. It does not wait for the GPU."""
    import torch

    values = {}
    if sys.platform != "win32":  # there is no module `resource` on Windows
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
        values["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if device.startswith("cuda"):
        values["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return values

"""The server campaign's view of the server's process: memory, open files, threads, and what is in its log."""

from __future__ import annotations

import base64
import contextlib
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

MEMORY = ("Rss", "Pss", "Anonymous")


def memory(pid: int) -> dict[str, float]:
    """Resident, proportional and anonymous memory in MiB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    values = {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}
    return {name: round(values[name], 1) for name in MEMORY}


def medians(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each key."""
    return {name: round(statistics.median(value[name] for value in values), 1) for name in MEMORY}


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Of each key, as a share."""
    return {name: round(after[name] / before[name] - 1, 4) for name in MEMORY}


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def leaks(log: str, *, secrets: Iterable[str], files: Iterable[bytes], embeddings: Iterable[np.ndarray]) -> list[str]:
    """What a log holds of tokens and names, of the bytes of photos, and of the numbers of embeddings.

    The findings do not repeat what they are about.
    """
    from test_logs import traces_of_bytes, traces_of_numbers

    found = []
    for number, secret in enumerate(secrets):
        if secret in log or base64.b64encode(secret.encode()).decode() in log:
            found.append(f"log: token or name {number}")
    for number, data in enumerate(files):
        if any(trace in log for trace in traces_of_bytes(data)):
            found.append(f"log: a part of photo {number}")
    for number, values in enumerate(embeddings):
        binary = values.astype("<f4").tobytes()
        if any(f".{digits}" in log for digits in traces_of_numbers(values)):
            found.append(f"log: numbers of embedding {number}")
        if any(trace in log for trace in traces_of_bytes(binary)):
            found.append(f"log: bytes of embedding {number}")
    return found


def waited(pid: int) -> float:
    """Seconds that the threads that live now were ready to run, but had no processor: contention with other programs."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9

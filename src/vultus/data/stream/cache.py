"""The local cache of a stream: embeddings, the index of each file, the photos for validation. Bounded in bytes.

A value is named by the sha256 of all that it depends on, so it never goes stale. Where there is no room, values that
other runs left are removed, the least recently used first; those of this run never: a pass reads each of them once, so
removing one for another would gain nothing. What finds no room is computed again in each pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from vultus._download import cache_folder
from vultus._files import atomic_path, json_value
from vultus._formats import VERSIONS
from vultus._progress import message

Arrays = dict[str, npt.NDArray[Any]]


class Cache:
    """Arrays with text, in files of the user's cache folder.

    Args:
        limit: bytes of all files together; 0 keeps nothing.
        option: how messages name the limit.
        folder: default: `stream` in the cache folder.

    Attributes:
        full: whether a value found no room.
    """

    def __init__(self, limit: int, *, option: str = "--cache_gb", folder: Path | None = None) -> None:
        self._folder = folder or cache_folder() / "stream"
        self._limit, self._option = limit, option
        self._own: set[str] = set()
        self._used: int | None = None
        self._lock = threading.Lock()
        self.full = False

    @staticmethod
    def key(*parts: Any) -> str:
        """The name of a value that depends on these JSON values."""
        return hashlib.sha256(json.dumps([VERSIONS["stream cache"], *parts], sort_keys=True).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.safetensors"

    def get(self, key: str) -> tuple[Arrays, Any] | None:
        """The arrays and the JSON value under a key; None if they are not there or cannot be read."""
        path = self._path(key)
        self._own.add(str(path))
        try:
            with safetensors.safe_open(path, "np") as file:
                value = json_value(file.metadata()["value"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            os.utime(path)  # now the last one to be removed
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return arrays, value

    def put(self, key: str, arrays: Arrays, value: Any = None) -> bool:
        """Keep a value. Returns whether there was room for it; the first time that there is none, a note says so."""
        path = self._path(key)
        self._own.add(str(path))
        if not self._limit:
            return False
        data = safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"value": json.dumps(value)}
        )
        with self._lock:
            try:
                if not self._make_room(len(data)):
                    self._note(f"the cache of the stream is full ({self._option} {self._limit / 1e9:g})")
                    return False
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    temporary.write_bytes(data)
            except OSError as error:
                self._note(f"{self._folder}: can't be written ({error.strerror})")
                return False
            self._used = (self._used or 0) + len(data)
        return True

    def _note(self, reason: str) -> None:
        if not self.full:
            message(f"note: {reason}; the embeddings that find no room are computed again in each pass")
        self.full = True

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes more are within the limit, once what other runs left is removed."""
        if self._used is None:
            self._used = sum(status.st_size for _, status in self._files())
        if self._used + size <= self._limit:
            return True
        others = [(status.st_mtime_ns, path, status.st_size) for path, status in self._files() if path not in self._own]
        for _, path, length in sorted(others):
            with contextlib.suppress(OSError):
                os.unlink(path)
                self._used -= length
            if self._used + size <= self._limit:
                return True
        return False

    def _files(self) -> list[tuple[str, os.stat_result]]:
        found = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(OSError):
                found.append((str(path), path.stat()))
        return found

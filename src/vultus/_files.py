"""Atomic writing of files, and the lock of a folder that only one process may write to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vultus.errors import UserError

LOCK = ".lock"  # name of the lock file in a folder
MAX_JSON = 1 << 28  # bytes; the largest are the results of an evaluation


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success flush it to disk and rename it to `path`.

    A reader sees the old file or the new one, never a part of it, even after `kill -9` or a power failure. On an
    exception the temporary file is removed and `path` is unchanged. What a process that was killed left in the folder
    is removed too. Raises OSError with the file name `path`.
    """
    path = Path(path)
    _remove_leftovers(os.path.abspath(path.parent), os.getpid())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{_host()}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only files that are open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The error of a full disk has no file name; the user needs to know which file could not be written.
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@functools.cache
def _host() -> str:
    """This machine (or container) in the names of temporary files: several may share a disk, each with its own ids."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


@functools.lru_cache(maxsize=64)
def _remove_leftovers(folder: str, process: int) -> None:
    """Remove the temporary files in `folder` of processes of this machine that have ended; once for each process."""
    if os.name == "nt":  # where os.kill(id, 0) ends the process
        return
    pattern = re.compile(rf"\..+\.(\d+)\.{_host()}\.tmp")
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = pattern.fullmatch(entry.name)
            if found and int(found[1]) != process and not _runs(int(found[1])):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_bytes(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises UserError that names the file.

    Only regular files are read: a device has no end, and a named pipe may never give anything.
    """
    path = Path(path)
    if not path.is_file():
        reason = "a folder, not a file" if path.is_dir() else "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: {reason}")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: larger than {limit >> 10} KiB, which is the limit for such a file")
    return data


def json_value(text: str | bytes) -> Any:
    """The value of JSON. Raises ValueError if it is none, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises UserError that names the file if it is missing or not JSON."""
    data = read_bytes(path, limit=MAX_JSON)
    try:
        return json_value(data.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it or restore it from a copy") from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stem(name: str) -> str:
    """`name` with every character that file names may not contain replaced by `-`; "snapshot" if nothing is left."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip("-.") or "snapshot"


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents, if missing. Raises UserError if the path is a file."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file stands where a folder is needed; choose another --out") from None
    return path


def processors() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def folder_lock(folder: Path, command: str) -> Iterator[None]:
    """Lock `folder` for this process. Raises UserError if another process holds the lock.

    `command` (prepare, train, ...) is named in the message. The operating system holds the lock on `folder/.lock` and
    releases it when the process ends, also by `kill -9`; a file that remains does not block the next process.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another process is at work in this folder; wait until it ends, or {command} into another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`; False where the lock file is missing or cannot be opened."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder of another user, or on a read-only disk: nothing can be said
        return False

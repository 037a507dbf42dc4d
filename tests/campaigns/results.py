"""The result of a command as bytes that can be compared: a folder without what differs from run to run."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import torch

TEMPORARY = re.compile(r"^\..+\.tmp$")

# What is left out of the comparison, and why. Anything else is compared byte for byte.
EXCLUDED = {
    ".lock": "the lock file of a folder: empty, and filelock may remove it",
    "stats.jsonl: seconds, images_per_s, data_wait, peak_memory_mib": "measured times and memory",
    "run.json: sessions": "an entry for each process that trained: its times and its command",
    "checkpoint-*.pt: seconds": "time of training; all tensors and all other values are compared",
    "checkpoint-*.pt before the last one, after signals": "a training that is stopped writes a checkpoint where it "
    "stops, which is one of the last --keep",
    "results.json, table.md: seconds": "time of the evaluation",
    "snapshot.safetensors of a training: hours; order of the metadata": "time of training; the library of the format "
    "writes entries in any order. All tensors and all other metadata are compared",
}
MEASURED = ("seconds", "images_per_s", "data_wait", "peak_memory_mib")


def result(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of every file in `folder`, without EXCLUDED."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            files[path.relative_to(folder).as_posix()] = _comparable(path)
    return files


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """What is missing, superfluous or different, as lines."""
    lines = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"superfluous: {name}" for name in sorted(found.keys() - expected.keys())]
    return lines + [
        f"different: {name}" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]
    ]


def without_earlier_checkpoints(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without all checkpoints but the last."""
    earlier = sorted(name for name in files if name.startswith("checkpoint-"))[:-1]
    return {name: data for name, data in files.items() if name not in earlier}


def _comparable(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "stats.jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        return json.dumps([{k: v for k, v in line.items() if k not in MEASURED} for line in lines]).encode()
    if path.name == "run.json":
        return json.dumps({key: value for key, value in json.loads(data).items() if key != "sessions"}).encode()
    if path.name == "results.json":
        return re.sub(rb'"seconds": [0-9.]+', b"", data)
    if path.name == "table.md":
        return re.sub(rb"\n\| seconds .*", b"", data)
    if path.suffix == ".pt":
        state = torch.load(io.BytesIO(data), weights_only=True)
        state.pop("seconds")
        return _digest(state).encode()
    if path.name == "snapshot.safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = {key: _without_hours(value) for key, value in header.pop("__metadata__", {}).items()}
        return json.dumps([header, metadata], sort_keys=True).encode() + data[8 + length :]
    return data


def _without_hours(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, dict):
        value.pop("hours", None)
    return value


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        array = value.detach().contiguous()
        return f"{array.dtype}{list(array.shape)}" + hashlib.sha256(array.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_digest(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_digest, value)) + "]"
    return repr(value)


# --- files under a final name are whole -------------------------------------------------------------------------------


def broken(folder: Path) -> list[str]:
    """The files under a final name that cannot be read.

    Temporary files are allowed after `kill -9`. The last line of stats.jsonl, which is appended to, may be incomplete:
    its reader leaves it out.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or TEMPORARY.match(path.name) or path.name == ".lock":
            continue
        try:
            _read(path)
        except Exception as error:
            found.append(f"half-written: {path.relative_to(folder)} ({type(error).__name__}: {str(error)[:80]})")
    return found


def _read(path: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import safetensors.torch
    from PIL import Image

    data = path.read_bytes()
    if path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".jsonl":
        lines = data.split(b"\n")
        for line in lines[:-1]:
            json.loads(line)
        if path.name != "stats.jsonl" and lines[-1]:
            raise ValueError("the last line is incomplete")
    elif path.suffix == ".safetensors":
        safetensors.torch.load(data)
    elif path.suffix == ".pt":
        torch.load(io.BytesIO(data), weights_only=True)
    elif path.suffix in (".png", ".jpg"):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    elif path.suffix == ".npz":
        with np.load(io.BytesIO(data)) as arrays:
            assert all(arrays[name] is not None for name in arrays.files)
    elif path.suffix == ".npy":
        np.load(io.BytesIO(data))
    elif path.suffix == ".arrow":
        pa.ipc.open_file(data).read_all()
    elif path.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(onnx.load_from_string(data))
    elif path.suffix == ".md":
        assert data.endswith(b"\n")

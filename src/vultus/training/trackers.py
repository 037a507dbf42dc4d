"""The trackers behind `--track`, each in a process of its own: `python -P -m vultus.training.trackers NAME`.

A tracker's library prints, starts servers, waits for a network and registers exit handlers. In its own process it does
so without stopping or slowing the training. run_log.py starts the process and sends one JSON object per line to its
standard input, `{"call": method, "arguments": {...}}`; each is answered by one line on standard output, `{"ok": value}`
or `{"error": text}`. The end of the input, also after `kill -9` of the training, closes the tracker.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import warnings
from pathlib import Path
from typing import Any, Protocol

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # name: module


class Tracker(Protocol):
    """The interface of a tracker. `step` is the number of images seen; it never decreases. A failure raises."""

    def open(self, out: Path, project: str, name: str, id: str | None, config: dict[str, Any]) -> str:
        """Begin the run `name`, or resume the run `id`. Returns the run's id."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Named values."""

    def image(self, name: str, path: str, step: int) -> None:
        """A PNG file."""

    def artifact(self, path: str, metadata: dict[str, Any], table: list[list[Any]], step: int) -> None:
        """A file to store, with its metadata and its metrics: rows of [name, value]."""

    def where(self) -> str:
        """How to see what was tracked: a command or an address."""

    def close(self, complete: bool) -> None:
        """End the run; `complete` is False where the training failed or was killed."""


class TensorBoard:
    """Event files in <out>/tensorboard, written by TensorBoard's own writer, without torch."""

    def open(self, out: Path, project: str, name: str, id: str | None, config: dict[str, Any]) -> str:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._out = out
        self._writer = EventFileWriter(str(out / "tensorboard"))
        if id is None:
            for key, value in config.items():
                self._text(key, f"```json\n{json.dumps(value, indent=2)}\n```", 0)
        return "tensorboard"

    def _add(self, step: int, **value: Any) -> None:
        import time

        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value)])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        self._add(step, tag=f"{tag}/text_summary", metadata=kind, tensor=tensor)
        self._writer.flush()

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._add(step, tag=name, simple_value=value)
        self._writer.flush()  # so that TensorBoard shows it now, and a full disk is an error here

    def image(self, name: str, path: str, step: int) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as image:
            width, height = image.size
        data = Path(path).read_bytes()
        summary = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._add(step, tag=name, image=summary)
        self._writer.flush()

    def artifact(self, path: str, metadata: dict[str, Any], table: list[list[Any]], step: int) -> None:
        rows = ["| metric | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in table)]
        text = json.dumps(metadata, indent=2)
        self._text("snapshot", "\n".join([f"`{path}`", "", *rows, "", f"```json\n{text}\n```"]), step)

    def where(self) -> str:
        return f"tensorboard --logdir {self._out}"

    def close(self, complete: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, with its files in <out>/wandb. Offline unless there is an API key or WANDB_MODE is set."""

    def open(self, out: Path, project: str, name: str, id: str | None, config: dict[str, Any]) -> str:
        # Copies of artifacts that wait for an upload go into the run folder, not into the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(out / "wandb" / "data"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(out / "wandb" / "cache"))
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb_key() else "offline")
        self._offline = mode in ("offline", "dryrun")
        self._out, self._name = out, name
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=id or secrets.token_hex(4),
            dir=str(out),
            config=config,
            mode=mode,
            resume=None if self._offline else "allow",  # W&B joins offline sessions of one id when they are uploaded
            settings=wandb.Settings(console="off", silent=True),
        )
        return str(self._run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def image(self, name: str, path: str, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(path)}, step=step)

    def artifact(self, path: str, metadata: dict[str, Any], table: list[list[Any]], step: int) -> None:
        import wandb

        allowed = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in self._name)
        artifact = wandb.Artifact(f"{allowed}-snapshot"[:128], type="model", metadata=metadata)
        artifact.add_file(path)
        if table:
            rows = [[name, None if value is None else float(value)] for name, value in table]
            artifact.add(wandb.Table(columns=["figure", "value"], data=rows), "figures")
        self._run.log_artifact(artifact, aliases=["latest", f"images-{step}"])

    def where(self) -> str:
        if self._offline:
            return f"wandb sync {self._out}/wandb/offline-run-*-{self._run.id}"
        return str(self._run.url or "")

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


def wandb_key() -> bool:
    """Whether wandb can log in without a prompt."""
    import netrc
    from urllib.parse import urlsplit

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class Trackio:
    """trackio, with its database in <out>/trackio; with TRACKIO_DIR, several runs share one database."""

    def open(self, out: Path, project: str, name: str, id: str | None, config: dict[str, Any]) -> str:
        self._folder = os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))
        self._project = project
        if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
            os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise it asks the Hugging Face hub for the owner of the token
        # It reports failures, such as a full disk, as warnings, some from another thread.
        self._warned: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: self._warned.append(" ".join(str(message).split()))
        import trackio

        self._run = trackio.init(
            project=project,
            name=name,
            config=config,
            resume="never" if id is None else "must",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if id is not None and self._run.id != id:
            raise RuntimeError(f"{self._folder} holds another run named {name}")
        self._check()
        return str(self._run.id)

    def _check(self) -> None:
        failures = [text for text in self._warned if "trackio" in text.lower()]
        self._warned.clear()
        if failures:
            raise RuntimeError(failures[0])

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)
        self._check()

    def image(self, name: str, path: str, step: int) -> None:
        import trackio

        self._run.log({name: trackio.Image(path, caption=f"{step} images")}, step=step)
        self._check()

    def artifact(self, path: str, metadata: dict[str, Any], table: list[list[Any]], step: int) -> None:
        import trackio

        artifact = trackio.Artifact(f"{self._run.name}-snapshot", type="model", metadata=metadata)
        artifact.add_file(path)
        self._run.log_artifact(artifact, aliases=[f"images-{step}"])
        if table:
            self._run.log({"snapshot": trackio.Table(columns=["figure", "value"], data=table)}, step=step)
        self._check()

    def where(self) -> str:
        return f"TRACKIO_DIR={self._folder} trackio show --project {self._project}"

    def close(self, complete: bool) -> None:
        self._run.finish()
        self._check()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def serve(name: str) -> None:
    """Answer calls on standard input until it ends."""
    # Trackers print to standard output, so it is redirected to stderr; the answers go to a copy of the original.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tracker = TRACKERS[name]()
    opened = False
    for line in sys.stdin:
        call = json.loads(line)
        arguments = call["arguments"]
        if call["call"] == "open":
            arguments["out"] = Path(arguments["out"])
        try:
            answer = {"ok": getattr(tracker, call["call"])(**arguments)}
        except (Exception, SystemExit) as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        opened = call["call"] != "close" and (opened or (call["call"] == "open" and "ok" in answer))
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:
            break
    if opened:
        tracker.close(False)


if __name__ == "__main__":
    serve(sys.argv[1])

"""The command line: one verb per function. Results go to stdout, progress to stderr, a user's error is one line."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from vultus.cli.demo_command import demo_verb
from vultus.cli.detect import detect_verb
from vultus.cli.evaluate import evaluate_verb
from vultus.cli.export import export_verb
from vultus.cli.generate import generate_verb
from vultus.cli.prepare import prepare_verb
from vultus.cli.publish import publish_verb
from vultus.cli.report import report_verb
from vultus.cli.serve import serve_command
from vultus.cli.train import train_verb
from vultus.errors import Stopped, UserError

DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO}

VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (demo_verb, "faces from the embedded snapshot, and a small training; needs no data and no network"),
    "prepare": (prepare_verb, "photos -> prepared data set: crops with their face embeddings"),
    "train": (train_verb, "prepared data set -> run folder with checkpoints and a snapshot"),
    "generate": (generate_verb, "snapshot + embeddings, photos or random people -> pictures"),
    "serve": (serve_command, "snapshot -> a web page and an HTTP API"),
    "detect": (detect_verb, "pictures -> whether they say that they are synthetic"),
    "evaluate": (evaluate_verb, "snapshot + prepared data set -> figures on people never seen"),
    "report": (report_verb, "run folders -> a page of curves, faces and figures; or a report on W&B"),
    "publish": (publish_verb, "snapshot -> a folder with a model card, on the Hugging Face hub"),
    "export": (export_verb, "snapshot -> one ONNX file, which needs no PyTorch"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code (0 done, 2 an error the user can mend, 128 + n stopped by signal n)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(importlib.metadata.version("vultus"))
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _error(f"no such verb: {verb}; there are {', '.join(VERBS)}")
    try:
        return VERBS[verb][0](rest)
    except UserError as error:
        return _error(str(error))
    except Stopped as stopped:
        return 128 + stopped.signal
    except argparse.ArgumentError as error:
        return _error(f"{' '.join(str(error).split())} (see vultus {verb} --help)")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in DISK_ERRORS):
            raise
        remedy = "make room or choose another place" if error.errno in DISK_ERRORS else "choose another place"
        return _error(f"{error.filename or 'output'}: {error.strerror}; {remedy}, then run the same command again")


def _error(message: str) -> int:
    print(f"vultus: error: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: vultus VERB [OPTIONS]   (vultus VERB --help)", ""]
    lines += [f"  {verb:<10} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(lines)

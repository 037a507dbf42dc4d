"""The entry point: find the command, run it, turn errors into a message and an exit code.

The command `NAME` is the function `NAME_command(arguments) -> exit code` of the module vultus.cli.NAME, which is
imported only when it runs. Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from vultus.errors import Stopped, UserError

# Errors of the disk itself, and what to do. Others of the operating system are reported only if they name a file.
DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "make the disk writable",
    errno.EIO: "check the disk",
}

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in messages of torch
# What uses less memory.
LESS_MEMORY = {
    "train": "lower --optim.batch, --generator.base_width or --discriminator.base_width",
    "generate": "lower --batch, or --num with --grid",
    "evaluate": "lower --batch",
}

COMMANDS = {
    "demo": "generate faces with the embedded snapshot and train a small network; needs no data and no network",
    "prepare": "photos -> prepared data set: crops with their face embeddings",
    "embed": "photos -> file of face embeddings",
    "train": "prepared data set -> run folder with checkpoints and a snapshot",
    "generate": "snapshot + embeddings, photos or random identities -> face images",
    "synthesize": "snapshot -> labelled data set of people who do not exist",
    "serve": "snapshot -> web page and HTTP API",
    "detect": "images -> whether they are marked as synthetic",
    "evaluate": "snapshot + prepared data set -> metrics on identities that were not trained on",
    "audit": "snapshot + prepared data set -> what leaked templates reveal, with and without protections",
    "probe": "prepared data set -> what can be read from its embeddings, and directions for --edit",
    "report": "run folders -> page of curves, faces and metrics, or a report on Weights & Biases",
    "publish": "snapshot -> folder with a model card, uploaded to the Hugging Face hub",
    "export": "snapshot -> one ONNX file, which runs without PyTorch",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 user error, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(importlib.metadata.version("vultus"))
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _error(f"no such command: {command}; the commands are {', '.join(COMMANDS)}")
    # OpenBLAS reads it when numpy is imported, which must not have happened yet. With several threads it sums in
    # another order, so the watermark would depend on their number; for matrices of 128x128 they also cost time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return _function(command)(rest)
    except UserError as error:
        return _error(str(error))
    except Stopped as stopped:
        return 128 + stopped.signal
    except argparse.ArgumentError as error:
        return _error(f"{' '.join(str(error).split())} (see vultus {command} --help)")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in DISK_ERRORS):
            raise
        remedy = f"{DISK_ERRORS[error.errno]} or " if error.errno in DISK_ERRORS else ""
        message = f"{error.filename or 'output'}: {error.strerror}; {remedy}choose another place"
        return _error(f"{message}, then run the same command again")
    except (MemoryError, RuntimeError) as error:  # torch has no exception of its own for the memory of the CPU
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return _error(f"not enough memory; {LESS_MEMORY.get(command, 'close other programs')}")


def _function(command: str) -> Callable[[Sequence[str]], int]:
    module = importlib.import_module(f"vultus.cli.{command}")
    function: Callable[[Sequence[str]], int] = getattr(module, f"{command}_command")
    return function


def _error(message: str) -> int:
    print(f"vultus: error: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: vultus COMMAND [OPTIONS]   (options of a command: vultus COMMAND --help)", ""]
    lines += [f"  {command:<11} {description}" for command, description in COMMANDS.items()]
    return "\n".join(lines)

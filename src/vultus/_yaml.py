"""YAML that a user gives, read within limits, so that no file can make a command hang or use up the memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from vultus._files import read_bytes
from vultus.errors import UserError, in_one_line

MAX_BYTES = 1 << 16
MAX_DEPTH = 20  # of mappings and lists in one another
MAX_ALIASES = 20  # a few thousand nested ones stand for more values than there are atoms


# libyaml's parser, where PyYAML has it, is about ten times as fast: a list of 10,000 numbers takes seconds without it.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, for which 1e-4 is a number (YAML 1.2) and not text (YAML 1.1)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?|\.[0-9])[0-9_]*[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> Any:
    """The value in a YAML file, None for an empty one. Raises UserError as parse_yaml(), and if it cannot be read."""
    try:
        text = read_bytes(path, limit=MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not a text file in UTF-8; settings are YAML, as `vultus train --print_config` prints"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError, in which `where` names it, if it is not YAML or beyond the limits."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{where}: more than {MAX_BYTES >> 10} KiB of settings")
    try:
        _check_limits(text, where)
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}: not valid YAML ({in_one_line(Exception(error.problem))}{line})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML ({in_one_line(error)})") from None


def _check_limits(text: str, where: str) -> None:
    """Read the events one by one, before anything is built of them."""
    depth = aliases = 0
    for event in yaml.parse(text, _Loader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep; settings have two levels")
        if aliases > MAX_ALIASES:
            raise UserError(f"{where}: more than {MAX_ALIASES} aliases (*name); write the values out")

"""The parser of the commands: argparse's, with types that have a range and messages that name the option as typed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_origin

from vultus._engines import Engine
from vultus._ranges import Count, Seed, allowed, from_text, parts
from vultus.errors import UserError


class Options(argparse.Namespace):
    """The parsed options, as attributes and by name."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors of one line.

    The `type` of an argument is a type hint: str, int, float, bool (given as true or false), a Literal, a type of
    _ranges.py, or one of them with `| None`.

    Args:
        why_unknown: a function that says of a wrong option, without its dashes, why it is wrong; or "".
        options: of argparse.ArgumentParser.
    """

    def __init__(self, *, why_unknown: Callable[[str], str] | None = None, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options | {"exit_on_error": False})
        self._why_unknown = why_unknown

    def add_argument(self, *names: str, type: Any = None, **options: Any) -> argparse.Action:
        """See argparse; `type` as described above."""
        return add_typed(super().add_argument, *names, type=type, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The Options in `args`. Raises UserError, or argparse.ArgumentError, for wrong ones."""
        options, unknown = self.parse_known_args(args, namespace or Options())
        for word in unknown:
            name = word[2:].partition("=")[0] if word.startswith("--") else ""
            if self._why_unknown is not None and (reason := self._why_unknown(name)):
                raise UserError(f"--{reason}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{' '.join(message.split())} (see {self.prog} --help)")


def add_workers(parser: ArgumentParser, text: str) -> None:
    """Add --workers, with this help text, and --engine."""
    parser.add_argument("--workers", type=Count | None, help=text)
    parser.add_argument(
        "--engine",
        type=Engine,
        default="processes",
        help="of --workers: processes of this machine, or a Ray cluster (extra `scale`)",
    )


def add_device(parser: ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu")


def add_measuring(parser: ArgumentParser, seed: str) -> None:
    """Add the options of commands that measure: --seed, of what this text says, --batch, --device and --json."""
    parser.add_argument("--seed", type=Seed, default=0, help=seed)
    parser.add_argument("--batch", type=Count, default=32, help="photos at a time; does not change the results")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_typed(add: Callable[..., argparse.Action], *names: str, type: Any, **options: Any) -> argparse.Action:
    """Call `add`, the add_argument of argparse's parser or of a group of it, for an argument with a type hint."""
    values = ""
    if type is not None:
        kind, numbers, _ = parts(type)
        shown = next((name for name in names if name.startswith("--")), names[0])
        options["type"] = lambda text: from_text(text, type, shown)
        if kind is bool:
            options.setdefault("metavar", "{true,false}")
        elif get_origin(kind) is Literal:
            options.setdefault("metavar", f"{{{','.join(kind.__args__)}}}")
        elif numbers is not None:
            values = allowed(type).removeprefix("a whole number ").removeprefix("a number ")
    if "help" in options and options["help"] is not argparse.SUPPRESS:
        options["help"] = options["help"].replace("%", "%%")
    action: argparse.Action = add(*names, **options)
    action.values = values  # type: ignore[attr-defined]  # for _Formatter
    return action


class _Formatter(argparse.HelpFormatter):
    """Adds the allowed values and the default to the help of an option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        notes = [getattr(action, "values", "")]
        if action.required and action.option_strings:
            notes.append("required")
        default = " ".join(action.default) if isinstance(action.default, list) else action.default
        if default not in (None, "", argparse.SUPPRESS) and action.nargs != 0:
            shown = str(default).lower() if isinstance(default, bool) else default
            notes.append(f"default: {shown}".replace("%", "%%"))
        added = "; ".join(note for note in notes if note)
        return (action.help or "") + (f" ({added})" if added else "")

"""Progress on stderr: a bar on a terminal, otherwise at most one line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

INTERVAL = 10.0  # seconds between two lines if stderr is not a terminal


def progress(total: int | None, *, title: str = "", unit: str = "img", initial: int = 0) -> Progress:
    """Context manager that shows the progress of `total` items (None: unknown); `initial` of them are already done."""
    return _Bar(total, title, unit, initial) if sys.stderr.isatty() else _Lines(total, title, unit, initial)


def message(text: str) -> None:
    """Print a line to stderr, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr)


class Progress:
    """Interface of both kinds of progress."""

    def __enter__(self) -> Progress:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state and end."""
        self.close()

    def update(self, count: int = 1) -> None:
        """Add `count` items that are done."""
        raise NotImplementedError

    def show(self, values: dict[str, Any], *, total: int | None = None) -> None:
        """Set the values that are shown next to the count, and a new `total`."""
        raise NotImplementedError

    def close(self) -> None:
        """Show the last state and end."""
        raise NotImplementedError


class _Bar(Progress):
    def __init__(self, total: int | None, title: str, unit: str, initial: int) -> None:
        self._bar = tqdm(
            total=total, initial=initial, unit=unit, desc=title or None, file=sys.stderr, dynamic_ncols=True
        )

    def update(self, count: int = 1) -> None:
        """See Progress."""
        self._bar.update(count)

    def show(self, values: dict[str, Any], *, total: int | None = None) -> None:
        """See Progress."""
        self._bar.total = self._bar.total if total is None else total
        self._bar.set_postfix(values)

    def close(self) -> None:
        """See Progress."""
        self._bar.close()


class _Lines(Progress):
    def __init__(self, total: int | None, title: str, unit: str, initial: int) -> None:
        self._total, self._title, self._unit = total, title or "progress", unit
        self._initial = self._done = self._printed = initial
        self._values: dict[str, Any] = {}
        self._start = self._last = time.monotonic()

    def update(self, count: int = 1) -> None:
        """See Progress."""
        self._done += count
        if time.monotonic() - self._last >= INTERVAL:
            self._print()

    def show(self, values: dict[str, Any], *, total: int | None = None) -> None:
        """See Progress."""
        self._values, self._total = values, self._total if total is None else total

    def close(self) -> None:
        """See Progress."""
        if self._done != self._printed:
            self._print()

    def _print(self) -> None:
        self._last, self._printed = time.monotonic(), self._done
        seconds = self._last - self._start
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        total = "" if self._total is None else f"/{self._total} ({self._done / max(self._total, 1):.0%})"
        shown = "".join(f", {key} {value}" for key, value in self._values.items())
        print(
            f"{self._title}: {self._done}{total} {self._unit}, {rate:.3g} {self._unit}/s, {seconds:.0f} s{shown}",
            file=sys.stderr,
            flush=True,
        )

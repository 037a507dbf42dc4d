"""The statistics of the steps between two lines of stats.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
DIVERGED = 1e8  # absolute value of a loss; below 100 in a normal run


class StatisticsWindow:
    """Sums since the last line of statistics, kept on the device until the line is written."""

    def __init__(self, cur_nimg: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._unchecked: list[tuple[int, list[str], dict[str, Tensor]]] = []
        self._start_nimg, self._start, self._waited = cur_nimg, time.monotonic(), 0.0

    def waiting(self, source: Iterator[T]) -> Iterator[T]:
        """The values of `source`; the time that it takes to get them counts as waiting for data."""
        while True:
            start = time.monotonic()
            try:
                value = next(source)
            except StopIteration:
                return
            self._waited += time.monotonic() - start
            yield value

    def add(self, nimg: int, keys: list[str], losses: dict[str, Tensor]) -> None:
        """Count the losses of a step that began after `nimg` images, on the photos with these keys."""
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        # No norm of a gradient is too large: Adam divides by it.
        checked = {name: value for name, value in losses.items() if not name.endswith("_grad_norm")}
        self._unchecked.append((nimg, keys, checked))

    def first_diverged(self) -> tuple[int, list[str], list[str]] | None:
        """(images seen, keys, names of the losses) of the first step since the last call with a diverged loss."""
        steps, self._unchecked = self._unchecked, []
        if not steps or bool(torch.stack([_finite(torch.stack([*step[2].values()])).all() for step in steps]).all()):
            return None
        for nimg, keys, losses in steps:
            names = [name for name, value in losses.items() if not bool(_finite(value))]
            if names:
                return nimg, keys, names
        return None

    def close(self, cur_nimg: int) -> dict[str, float]:
        """Rate, share of time spent waiting for data, and mean losses since the window was opened; opens the next."""
        now = time.monotonic()
        passed = max(now - self._start, 1e-9)
        line = {"images_per_s": round((cur_nimg - self._start_nimg) / passed, 2)}
        line["data_wait"] = round(self._waited / passed, 4)
        line |= {name: round(float(total) / self._counts[name], 6) for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        self._start_nimg, self._start, self._waited = cur_nimg, now, 0.0
        return line


def _finite(losses: Tensor) -> Tensor:
    """Finite and not diverged."""
    return losses.abs() < DIVERGED  # false for nan

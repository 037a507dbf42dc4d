"""The processes of a training: this one alone, or those that torchrun started, which train one generator together.

`torchrun --nproc_per_node 2 -m vultus train ...` runs the same program in every process. Each computes its part of
every batch; gradients are averaged, so that all hold the same weights. The first process alone writes files, draws
samples, validates and reports. What the processes must agree on goes through gloo, between CPUs, so that no GPU waits.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from vultus.errors import UserError, in_one_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # how long a process waits for another one, which may be validating
GOODBYE = 2.0  # seconds that the first process, which may hold the store, waits for the others after an error
_SAID = "vultus/error"  # key of the store, under which the first process with an error stands
_ENDED = "vultus/ended"  # number of the processes that have ended with one


@dataclass(frozen=True)
class Processes:
    """This process, and how many there are.

    Attributes:
        number: of this process, from 0.
        count: of all processes.
    """

    number: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    def broadcast(self, value: T) -> T:
        """The value that the first process has, any object that can be pickled."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, any objects that can be pickled."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def largest(self, values: Sequence[float]) -> list[float]:
        """Of each of these numbers the largest that a process has."""
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return [float(number) for number in numbers]

    def concatenated(self, values: Tensor) -> Tensor:
        """The values [n, ...] of every process one after the other, [count * n, ...], without gradient."""
        if self.count == 1:
            return values
        import torch
        import torch.distributed as dist

        every = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(every, values.contiguous())
        return torch.cat(every)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, without gradient."""
        return self.concatenated(values[None]).mean(0) if self.count > 1 else values

    def scatter(self, parts: Sequence[Tensor] | None, own: Tensor) -> None:
        """Fill `own`, on the CPU, with the part of this process, of those that the first one has."""
        import torch.distributed as dist

        # gloo sends memory as it lies, whatever the strides.
        dist.scatter(own, None if parts is None else [part.contiguous() for part in parts])

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does this before all others: what it downloads or computes, they find in the cache."""
        if self.main:
            yield
        self.gather(None)
        if not self.main:
            yield

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise UserError that names the first of these values that is another one in another process."""
        every = self.gather(values)
        for number, other in enumerate(every):
            for key in dict.fromkeys([*every[0], *other]):
                if every[0].get(key) != other.get(key):
                    raise UserError(
                        f"{key} is {every[0].get(key)} in process 0, but {other.get(key)} in process {number}; start "
                        "all processes with the same command, on the same data"
                    )


ALONE = Processes()


def current() -> Processes:
    """The processes that `joined` has joined; outside of it, this one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    import torch.distributed as dist

    return Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started; nothing to do where it did not.

    An error of the user is said by one process, the first that has it; the others end without a word. Raises UserError
    if a process ends before the others, and where a process has no GPU of its own.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1 or current().count > 1:
        yield current()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group(store=PrefixStore("vultus", store), rank=number, world_size=count, timeout=PATIENCE)
    try:
        yield Processes(number, count)
    except (UserError, argparse.ArgumentError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            if not _is_lost(error):
                raise
            error = UserError(
                f"process {number} of {count}: another process of this training has ended, or cannot be reached "
                f"({in_one_line(error)[:80]}); the same command resumes from the last checkpoint"
            )
        said = str(number).encode()
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that held it
            said = store.compare_set(_SAID, "", str(number))
            store.add(_ENDED, 1)
            end = time.monotonic() + GOODBYE
            while number == 0 and store.add(_ENDED, 0) < count and time.monotonic() < end:
                time.sleep(0.02)
        if said != str(number).encode():
            raise SystemExit(2) from None
        raise error from None
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process is gone."""
    import torch.distributed as dist

    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text

"""Divide work over the ranks that `torchrun` started: several processes, each with its device.

Every rank runs the same program on the same numbers, bit for bit: work is measured in slices, and
results are gathered. An error on one rank is raised on all of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from circuits.system.errors import InputError, NotFiniteError

Result = TypeVar("Result")
Work = Callable[[], Result]
_Error = Exception | None
# How long to wait for a rank that hangs. A rank that died is noticed at once by its connection.
TIMEOUT = timedelta(minutes=30)


class RankError(RuntimeError):
    """Another rank ended, failed or cannot be reached: the work cannot go on."""


class SharedError(InputError):
    """An InputError of one rank, raised on all ranks."""


class SharedNotFiniteError(SharedError, NotFiniteError):
    """A NotFiniteError of one rank, raised on all ranks."""


class Ranks(NamedTuple):
    """The number of this process, and the number of processes."""

    rank: int
    world: int


def ranks() -> Ranks:
    """Return the rank of this process and the number of ranks; (0, 1) when it works alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks(0, 1)


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return ranks().rank == 0


@contextlib.contextmanager
def start() -> Iterator[None]:
    """Work together with the other processes of this `torchrun` inside the `with` block.

    Raises:
        RankError: a rank cannot be reached, or torchrun stops all ranks because one of them ended.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    alone = not launched or os.environ["WORLD_SIZE"] == "1"
    # A script may have made the process group itself.
    if alone or dist.is_initialized():
        yield
        return
    # Objects are exchanged on the CPU by gloo, which notices when a rank dies.
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    with _sigterm_as_error():
        try:
            with _connection_errors():
                dist.init_process_group(backend, timeout=TIMEOUT)
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def share(total: int) -> slice:
    """Return which of `total` items this rank works on."""
    # Shares are consecutive and differ in size by at most one; some may be empty.
    # Rank r takes the items from total * r / world up to total * (r + 1) / world.
    rank, world = ranks()
    first = total * rank // world
    end = total * (rank + 1) // world
    return slice(first, end)


def in_slices(total: int, measure: Callable[[slice], Tensor]) -> Tensor:
    """Measure `total` items, in order, where each rank measures its share; see `gathered`."""
    if ranks().world == 1 or total == 0:
        return measure(slice(0, total))
    mine = share(total)
    has_work = mine.stop > mine.start
    (measured,) = gathered(lambda: [measure(mine)] if has_work else [])
    return measured


def gathered(measure: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Concatenate what `measure` returns on every rank along the leading axis, in order of ranks.

    Ranks without work return an empty list. With several ranks the results are on the CPU.

    Raises:
        InputError: `measure` raised it, on any rank.
        RankError: another rank raised another error, ended or cannot be reached.
    """
    if ranks().world == 1:
        return list(measure())

    def on_cpu() -> list[Tensor]:
        # Cloned, because a view would be sent with everything that it is a view of.
        return [tensor.detach().cpu().clone() for tensor in measure()]

    by_rank = exchanged(on_cpu)
    with_work = [tensors for tensors in by_rank if tensors]
    columns = zip(*with_work, strict=True)
    return list(map(torch.cat, columns))


class _Report(NamedTuple):
    """What a rank sends to the others: its result, or the error to raise there."""

    result: Any = None
    error: _Error = None


def exchanged(function: Work[Result]) -> list[Result]:
    """Return what `function` returns on every rank, in order; errors are those of `gathered`."""
    # The values are pickled, so they should be small.
    if ranks().world == 1:
        return [function()]
    own_error: _Error = None
    try:
        report = _Report(function())
    except RankError:
        # The connection is lost: nobody is left to report to.
        raise
    except Exception as error:
        own_error, report = error, _Report(error=_for_all_ranks(error))
    reports = [report] * ranks().world
    with _connection_errors():
        dist.all_gather_object(reports, report)
    _raise_worst(reports, report, own_error)
    return [each.result for each in reports]


def _raise_worst(reports: list[_Report], own: _Report, own_error: _Error) -> None:
    # Any error but an InputError may be a bug. It comes first, and where it happened it is raised
    # with its traceback.
    if isinstance(own.error, RankError) and own_error is not None:
        raise own_error
    errors = [each.error for each in reports if each.error]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, InputError)) from own_error


def _for_all_ranks(error: Exception) -> Exception:
    if isinstance(error, NotFiniteError):
        return SharedNotFiniteError(str(error))
    if isinstance(error, InputError):
        return SharedError(str(error))
    return RankError(f"rank {ranks().rank} failed: {type(error).__name__}: {error}")


def on_first(function: Work[Result]) -> Result:
    """Call `function` on the first rank only, and return its result on every rank."""
    by_rank = exchanged(lambda: function() if is_first() else None)
    return cast(Result, by_rank[0])


def totals(counts: Mapping[str, int]) -> dict[str, int]:
    """Sum counts over the ranks."""
    by_rank = exchanged(lambda: dict(counts))
    total = {}
    for name in counts:
        total[name] = sum(each[name] for each in by_rank)
    return total


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    """Raise RankError where communication fails, as it does when another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        rank, world = ranks()
        who = f"rank {1 - rank}" if world == 2 else "another rank"
        # Of a message like "[.../pair.cc:537] Read error [127.0.0.1]:10652: Connection reset by
        # peer. This is typically ..." the first sentence, without the source file, is the cause.
        message = re.sub(r"^\[[^\]]*\] ", "", str(error))
        cause = re.split(r"\n|\. ", message)[0]
        raise RankError(f"{who} ended or cannot be reached ({cause})") from error


@contextlib.contextmanager
def _sigterm_as_error() -> Iterator[None]:
    """Raise RankError on SIGTERM, with which torchrun stops the other ranks when one ends."""
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise RankError("stopped by SIGTERM, as torchrun does when another rank ends")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

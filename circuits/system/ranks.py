"""Several processes, each with a device: slices of work over the ranks that `torchrun` started.

Every rank runs the same program and takes the same decisions: what can be divided is measured in slices and gathered, so that all hold
the same numbers, bit for bit. Ranks are in use where a process group of torch.distributed is: the command makes one (`start`), a script
does so itself or calls `start`. With every gather goes a word on whether all went well, so that an error on one rank is raised on all.
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

from circuits.system.errors import InputError

Result = TypeVar("Result")


_Described = tuple[tuple[int, ...], torch.dtype, str]


# A rank that died is noticed at once, by its closed connection; this long others wait for one that hangs.
TIMEOUT = timedelta(minutes=30)


class RankError(RuntimeError):
    """Another rank ended, failed or cannot be reached: the work cannot go on."""


class SharedError(InputError):
    """An InputError of one rank, raised on all of them."""


class Ranks(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    world: int


def ranks() -> Ranks:
    """This process among those that work together; (0, 1) when it works alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks(0, 1)


def is_first() -> bool:
    """Whether this process writes files and speaks to the user."""
    return ranks().rank == 0


@contextlib.contextmanager
def start(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Work together with the other processes of this `torchrun` while this is entered. Alone, or in a group already, it does nothing.

    Args:
        timeout: how long to wait for a rank that hangs.

    Raises:
        RankError: a rank cannot be reached, or torchrun stops them all, as it does when one ends.
    """
    if (
        not dist.is_available()
        or dist.is_initialized()
        or not dist.is_torchelastic_launched()
        or int(os.environ["WORLD_SIZE"]) == 1
    ):
        yield
        return
    # Numbers on GPUs go by NCCL, those on the CPU and the words that go with them by gloo, which notices when a rank dies.
    backend = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    )
    with _stopping_is_an_error():
        try:
            with _reaching():
                dist.init_process_group(backend, timeout=timeout)
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def share(total: int) -> slice:
    """Which of `total` things this rank does: consecutive ones, shares differ by one at most, some are empty."""
    rank, world = ranks()
    return slice(total * rank // world, total * (rank + 1) // world)


def in_slices(total: int, measure: Callable[[slice], Tensor]) -> Tensor:
    """`measure` of all of `total` things, in order, each rank having measured its share of them.

    Raises:
        InputError, RankError: see `gathered`.
    """
    if ranks().world == 1 or total == 0:
        return measure(slice(0, total))
    mine = share(total)
    return gathered(lambda: [measure(mine)] if mine.stop > mine.start else [])[0]


def gathered(measure: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `measure` gives on every rank, joined along the leading dimension in the order of ranks.

    Args:
        measure: tensors that have as many rows as there are, possibly none; a rank that has nothing at all gives none.

    Raises:
        InputError: `measure` raised it, on any rank.
        RankError: another rank raised something else, ended or cannot be reached.
    """
    if ranks().world == 1:
        return list(measure())
    mine: list[Tensor] = []

    def described() -> list[_Described]:
        mine.extend(measure())
        return [(tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in mine]

    by_rank = exchanged(described)
    known = next(known for known in by_rank if known)
    return [
        _joined(
            mine[index] if mine else None,
            [each[index][0][0] if each else 0 for each in by_rank],
            like,
        )
        for index, like in enumerate(known)
    ]


def exchanged(function: Callable[[], Result]) -> list[Result]:
    """What `function` gives on every rank, in the order of ranks: small values. Errors are those of `gathered`."""
    world = ranks().world
    if world == 1:
        return [function()]
    result: Result | None = None
    error: Exception | None = None
    try:
        result = function()
    except RankError:
        raise
    except Exception as raised:
        error = raised
    said: list[Any] = [None] * world
    with _reaching():
        dist.all_gather_object(said, (_told(error), result))
    failed = [(number, *failure) for number, (failure, _) in enumerate(said) if failure]
    # What is no InputError may be our mistake: where it happened it keeps its traceback. First, because it cannot be gone on from.
    if grave := [(number, text) for number, text, mendable in failed if not mendable]:
        if error is not None and not isinstance(error, InputError):
            raise error
        raise RankError(f"rank {grave[0][0]} failed: {grave[0][1]}")
    if failed:
        raise SharedError(failed[0][1]) from error
    return [value for _, value in said]


def on_first(function: Callable[[], Result]) -> Result:
    """What `function` gives on the first rank, which alone calls it. Errors are those of `gathered`."""
    return cast(Result, exchanged(lambda: function() if is_first() else None)[0])


def totals(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts summed over the ranks. Errors are those of `gathered`."""
    by_rank = exchanged(lambda: dict(counts))
    return {name: sum(each[name] for each in by_rank) for name in counts}


def own_gpu() -> torch.device:
    """The GPU of this rank, the current one when it works alone.

    Raises:
        InputError: there are more ranks than GPUs here.
    """
    rank, world = ranks()
    if world == 1:
        return torch.device("cuda")
    local, count = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"rank {rank} is process {local + 1} on this machine, which has {count} GPUs; start {count}, or use device='cpu'."
        )
    return torch.device("cuda", local)


def _told(error: Exception | None) -> tuple[str, bool] | None:
    """An error in words, and whether it is one that the user can mend."""
    if error is None:
        return None
    mendable = isinstance(error, InputError)
    return (str(error) if mendable else f"{type(error).__name__}: {error}"), mendable


def _joined(mine: Tensor | None, rows: Sequence[int], like: _Described) -> Tensor:
    """All ranks' rows, those of this one being `mine`. Gathering wants as many of each: the last ones are filled up."""
    (_, *shape), dtype, kind = like
    device = (
        mine.device if mine is not None else own_gpu() if kind == "cuda" else torch.device("cpu")
    )
    # A group of one's own may carry only what is on a GPU, or on the CPU.
    match dist.get_backend(), device.type:
        case "nccl", "cpu":
            via = own_gpu()
        case "gloo", _:
            via = torch.device("cpu")
        case _:
            via = device
    sent = torch.zeros(max(rows), *shape, dtype=dtype, device=via)
    if mine is not None:
        sent[: len(mine)] = mine
    received = [torch.empty_like(sent) for _ in rows]
    if sent.numel():
        with _reaching():
            dist.all_gather(received, sent)
    return torch.cat([part[:count] for part, count in zip(received, rows, strict=True)]).to(device)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Communication, which fails when another rank ended."""
    try:
        yield
    except RuntimeError as error:
        rank, world = ranks()
        who = f"rank {1 - rank}" if world == 2 else "another rank"
        # Such as "[.../pair.cc:537] Read error [127.0.0.1]:10652: Connection reset by peer. This is typically ...".
        why = re.sub(r"^\[[^\]]*\] ", "", str(error)).split("\n")[0].split(". ")[0]
        raise RankError(f"{who} ended or cannot be reached ({why})") from error


@contextlib.contextmanager
def _stopping_is_an_error() -> Iterator[None]:
    """SIGTERM, by which torchrun stops the other ranks when one ends, is raised as an error, so that a word can be said on where to go on."""
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

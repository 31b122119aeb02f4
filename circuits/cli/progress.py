"""Signs of life on standard error while a command works."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from threading import Timer

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.text import Text

from circuits.system.messages import one_line

# Without a terminal, what is done sooner is not worth a line in a log.
SECONDS_BEFORE_LINE = 1.5

Update = Callable[[int, int], None]


def phase(description: str, *, quiet: bool = False) -> AbstractContextManager[object]:
    """Say what the command does in the `with` block: beside a spinner, on a terminal.

    Elsewhere a line is printed if the work takes longer than a second, unless `quiet`.
    """
    if _draws():
        return Console(stderr=True).status(f"{description} ...")
    return _line(description, quiet=quiet)


@contextlib.contextmanager
def progress_bar(description: str, *, quiet: bool = False) -> Iterator[Update | None]:
    """Show a bar with rate and remaining time, on a terminal; elsewhere as `phase`.

    Yields the function that updates the bar; None if there is none.
    """
    if _draws():
        with _bar(description) as update:
            yield update
    else:
        with _line(description, quiet=quiet):
            yield None


def note(text: str) -> None:
    """Print what a reader should know besides the result, in one line on standard error."""
    sys.stderr.write(f"circuits: note: {one_line(text)}\n")


def is_first_rank() -> bool:
    """Whether this is the process that prints, of those that `torchrun` started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def _draws() -> bool:
    return is_first_rank() and sys.stderr.isatty()


@contextlib.contextmanager
def _line(description: str, *, quiet: bool) -> Iterator[None]:
    text = f"circuits: {description} ...\n"
    timer = Timer(SECONDS_BEFORE_LINE, sys.stderr.write, [text])
    if not quiet and is_first_rank():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _bar(description: str) -> Iterator[Update]:
    columns = Progress.get_default_columns()
    columns += (MofNCompleteColumn(), _RateColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    with bar:
        # The method tells the total with every update.
        row = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


class _RateColumn(ProgressColumn):
    # rich's own column shows a speed only while the total is unknown.
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")

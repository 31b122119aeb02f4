"""Entry point of the `circuits` command.

Options are read, and mistakes in them told, before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import circuits
from circuits.cli.progress import is_first_rank, note, phase
from circuits.system.errors import InputError
from circuits.system.messages import FOR_AUTHORS, one_line, suggestion

HELP = """\
Find, evaluate and compare circuits in transformer language models.

usage: circuits COMMAND [options]        circuits COMMAND --help

commands:
  discover   find a circuit with one method, into a run folder
  evaluate   run a circuit on held-out prompts and print its metrics
  compare    several methods on one task: a table, and an HTML report with curves and drawings
  graph      which features made the model say this token: an attribution graph and its page
  view       explore a graph in the browser, whatever its size
  list       list methods, tasks, metrics and ablations

examples:
  circuits discover --method acdc --threshold 0.01 --task ioi
  circuits discover --method eap-ig --task ioi --size 50
  circuits evaluate runs/ioi/acdc-1a2b3c4d --n 64
  circuits compare --task ioi --methods acdc,eap,eap-ig,random
  circuits discover --method my_method.py --task ioi      a file with your own CircuitDiscoverer
  circuits graph "The capital of the state containing Dallas is"
  circuits list
  torchrun --nproc-per-node=4 -m -- circuits discover ...    share the work among four devices
"""
Words = Sequence[str]
Work = Callable[[], None]
COMMANDS = ("discover", "evaluate", "compare", "graph", "view", "list")
# The ranks that torchrun starts run these commands together; the first runs the others alone.
COMMANDS_OF_ALL_RANKS = ("discover", "compare")


def main(arguments: Words | None = None) -> int:
    """Run the command in `arguments`, by default those of this process.

    Returns the exit status: 0, 2 for invalid input, 1 if another rank ended, 130 if interrupted.
    The reason is printed in one line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    version = f"circuits {circuits.__version__}\n"
    texts = {"-h": HELP, "--help": HELP, "--version": version}
    if command in texts:
        sys.stdout.write(texts[command])
        return 0
    if command not in COMMANDS:
        known = suggestion(command, COMMANDS)
        return _fail(f"there is no command {command!r}; {known} Try circuits --help.", 2)
    if arguments is None:
        # Threads that spin while they wait slow small models down many times on a busy machine.
        # This process belongs to the command, so its environment can be set.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        work = _prepared(command, words[1:])
    except InputError as error:
        # All ranks read the same words.
        return _fail(str(error), 2) if is_first_rank() else 2
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    return _run(command, work)


def _prepared(command: str, words: Words) -> Work:
    """The command's work: a function without arguments."""
    from circuits.cli.parsing.checks import check_paths
    from circuits.cli.parsing.read import read_arguments

    arguments = read_arguments(command, words)
    check_paths(arguments[0])
    with phase("loading PyTorch", quiet="--json" in words):
        module = import_module(f"circuits.cli.{command}")
    return partial(module.command, *arguments)


def _run(command: str, work: Work) -> int:
    from circuits.system.ranks import RankError, SharedError, is_first, start

    first = True
    try:
        # catch_warnings also restores showwarning.
        with warnings.catch_warnings(), start():
            first = is_first()
            warnings.showwarning = _print_note
            if not first:
                warnings.simplefilter("ignore")  # the first rank prints the same
            if first or command in COMMANDS_OF_ALL_RANKS:
                work()
    except InputError as error:
        # The first rank prints errors that all ranks share.
        if first or not isinstance(error, SharedError):
            _fail(str(error), 2)
        return 2
    except RankError as error:
        return _fail(f"{error}.", 1)
    except Warning as warning:
        # Of Python's filters, as PYTHONWARNINGS=error sets them.
        return _fail(f"a warning is an error here: {warning}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it stopped.", 130)
    return 0


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"circuits: {one_line(message)}\n")
    return status


def _print_note(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print a warning in one line, without source lines; deprecations are not for users."""
    if not issubclass(category, FOR_AUTHORS):
        note(str(message))

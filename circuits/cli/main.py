"""The `circuits` command.

`circuits --help` answers without importing torch; each command's own help lists its options.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

HELP = """\
Find, evaluate and compare circuits in transformer language models.

usage: circuits COMMAND [options]        circuits COMMAND --help

commands:
  discover   find a circuit with one method, into a run folder
  evaluate   run a circuit on held-out prompts and print its metrics
  compare    several methods on one task: a table, and an HTML report with curves and drawn circuits
  graph      which features made the model say this token: an attribution graph, and a page to
  explore it
  view       look at a graph in the browser, whatever its size
  list       methods, tasks, metrics and ablations, with what they are

examples:
  circuits discover --method acdc --threshold 0.01 --task ioi
  circuits discover --method eap-ig --task ioi --size 50
  circuits evaluate runs/ioi/acdc-1a2b3c4d --n 64
  circuits compare --task ioi --methods acdc,eap,eap-ig,random
  circuits discover --method my_method.py --task ioi      your own method: a file with a
  CircuitDiscoverer
  circuits graph "The capital of the state containing Dallas is"
  circuits list
  torchrun --nproc-per-node=4 -m -- circuits discover ...    one process per device, which share the
  work
"""
COMMANDS = {
    "discover": "discover",
    "evaluate": "evaluate",
    "compare": "compare",
    "graph": "graph",
    "view": "view",
    "list": "list_choices",
}
# What the processes that torchrun starts do together; the rest the first does alone.
TOGETHER = ("discover", "compare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0, 2 for a mistake in what was given, or 1 when another rank ended,
    each told in one line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"circuits {version('circuits')}\n")
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(
            f"circuits: there is no command {words[0]!r}; there are {', '.join(COMMANDS)}. Try "
            f"circuits --help.\n"
        )
        return 2
    if arguments is None:
        # This process is ours. Threads that spin while they wait make small models many times
        # slower wherever a core is busy otherwise.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from circuits.system.errors import InputError
    from circuits.system.ranks import RankError, SharedError, is_first, start

    first = True
    try:
        with warnings.catch_warnings(), start():
            first = is_first()
            warnings.showwarning = _tell if first else _say_nothing  # put back with the filters
            if first or words[0] in TOGETHER:
                getattr(import_module(f"circuits.cli.{words[0]}"), COMMANDS[words[0]])(words[1:])
    except InputError as error:
        if first or not isinstance(error, SharedError):
            sys.stderr.write(f"circuits: {error}\n")
        return 2
    except RankError as error:
        sys.stderr.write(f"circuits: {error}.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("circuits: interrupted; the same command goes on where it stopped.\n")
        return 130
    return 0


def _tell(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning in one line, without the place in our source.

    Other packages' deprecations are not for the user.
    """
    if not issubclass(category, DeprecationWarning | FutureWarning):
        sys.stderr.write(f"circuits: note: {message}\n")


def _say_nothing(*_: object, **__: object) -> None:
    """What the first rank says already."""

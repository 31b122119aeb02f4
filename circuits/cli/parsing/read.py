"""Read the words of a command, and check what can be checked without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from inspect import getdoc
from io import StringIO
from itertools import chain
from typing import Annotated, Any

import tyro

from circuits.cli.parsing import options
from circuits.cli.parsing.checks import check_options, check_search, listed
from circuits.cli.parsing.methods import adds_names, describe_method, options_of
from circuits.cli.parsing.sweeps import read_sweeps
from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.tasks.families import make_family
from circuits.tasks.metric_names import checked_metric

Words = Sequence[str]
# The options of a group have no prefix.
UNPREFIXED = tyro.conf.arg(name="")
# What a command's function is called with.
Arguments = tuple[Any, ...]
OPTIONS: dict[str, Any] = {
    "discover": options.DiscoverOptions,
    "evaluate": options.EvaluateOptions,
    "compare": options.CompareOptions,
    "graph": options.GraphOptions,
    "view": options.ViewOptions,
    "list": options.ListOptions,
}
# The sides of tyro's boxes, where they are drawn in Unicode or in ASCII.
SIDES = "│|╭╮╰╯+ "
BETWEEN_PARAGRAPHS = re.compile(r"[─-]{3,}")
WRONG_CHOICE = re.compile(r"(invalid choice '(.*)' for .*)\. Expected one of \('(.*)'\)")
BETWEEN_CHOICES = "', '"
UNKNOWN = re.compile(r"Unrecognized options: (\S+?),?(?:\s|$)")


def read_arguments(command: str, words: Words) -> Arguments:
    """What the command's function is called with."""
    _check_not_empty(words, OPTIONS[command])
    if command == "discover":
        return _read_discover(words)
    given = _parsed(OPTIONS[command], command, words)
    check_options(given)
    if command == "compare":
        sweeps = read_sweeps(given)
        planned = chain(*sweeps.values())
        metrics = [each.settings.get("metric") for each in planned]
        _check_names(given, given.methods, metrics)
        return given, sweeps
    named = getattr(given, "metrics", None)
    _check_names(given, "", listed(named) if named else ())
    return (given,)


def _read_discover(words: Words) -> Arguments:
    # The method comes first, because its fields are options, too.
    own: Any = OPTIONS["discover"]
    chosen, _ = _parsed(own, "discover", words, add_help=False, return_unknown_args=True)
    method = describe_method(chosen.method)
    # A field called like one of the command's options gets another name.
    taken = [field.name for field in fields(own)]
    of_method: Any = options_of(method, taken)
    both: Any = tuple[Annotated[own, UNPREFIXED], Annotated[of_method, UNPREFIXED]]
    description = f"{getdoc(own)}\n\nThe options of {method.name} come last."
    known = [*taken, *method.options]
    given, settings = _parsed(both, "discover", words, known, description=description)
    values = vars(settings)
    check_options(given)
    check_search(given, method, values)
    _check_names(given, given.method, [values.get("metric")])
    return given, values


def _parsed(
    kind: Any, command: str, words: Words, known: Iterable[str] | None = None, **settings: Any
) -> Any:
    """What tyro makes of the words; its errors, which are boxes of several lines, in one line."""
    known = [each.name for each in fields(kind)] if known is None else known
    printed = StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(kind, prog=f"circuits {command}", args=words, **settings)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        told = _message(printed.getvalue(), known)
        raise InputError(f"{told} Try circuits {command} --help.") from stopped


def _message(box: str, options: Iterable[str]) -> str:
    """What tyro prints in a box as one line, without what says again how options are written."""
    _title, *lines = [line.strip(SIDES) for line in box.strip().splitlines()]
    paragraphs = []
    for paragraph in BETWEEN_PARAGRAPHS.split(" ".join(lines)):
        text = " ".join(paragraph.split())
        if text and not text.startswith(("For full helptext", "Argument helptext")):
            paragraphs.append(text.partition(" Got errors:")[0].rstrip("."))
    first, *more = paragraphs
    wrong = WRONG_CHOICE.search(first)
    # A misspelt option may be why another is missing.
    unknown = list(filter(None, map(UNKNOWN.match, paragraphs)))
    if wrong:
        # The choices of a union come in any order.
        told, word, choices = wrong.groups()
        return f"{told}; {suggestion(word, sorted(set(choices.split(BETWEEN_CHOICES)) - {'None'}))}"
    if unknown:
        return _unknown(unknown[0][1], options)
    told = "; ".join([first, *more])
    return f"{told[:1].lower()}{told[1:]}."


def _unknown(word: str, options: Iterable[str]) -> str:
    if not word.startswith("-"):
        return (
            f"{word!r} is one word too many: name its option (--OPTION {word}), separate lists by "
            "commas, and put texts with spaces into quotes."
        )
    option, _, _ = word.partition("=")
    return f"there is no option {option}; {suggestion(option, map(_written, options))}"


def _written(name: str) -> str:
    """The name of a field as an option."""
    return f"--{name.replace('_', '-')}"


def _check_not_empty(words: Words, own: Any) -> None:
    """Refuse empty texts, which shell variables that are not set leave behind."""
    named = {_written(field.name) for field in fields(own)}
    before = ""
    for word in words:
        option, equals, value = word.partition("=")
        if not (equals and option.startswith("--")):
            option, value = before, word
        # What fields of methods hold is checked by them.
        is_own = _written(option.removeprefix("--").removeprefix("no-")) in named
        if not value and (is_own or not option.startswith("-")):
            where = option if option.startswith("-") else "a text"
            raise InputError(f"{where} is empty (''): give a value, or leave it out.")
        before = word


def _check_names(given: Any, method: str, metrics: Iterable[str | None]) -> None:
    if not isinstance(given, options.TaskOptions):
        return
    # Others' code may define tasks and metrics when it is imported.
    if adds_names(method):
        return
    if given.task is not None:
        make_family(given.task)
    for metric in metrics:
        if metric is not None:
            checked_metric(metric)

"""One task family per file. Adding a file here adds a task."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import Any, Literal, get_args, get_origin, get_type_hints

from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.tasks.family import REGISTRY, TaskFamily

TRUTHS = {"True": True, "False": False}


def task_families() -> dict[str, type[TaskFamily]]:
    """Every task family by name: those in this folder and the user's own."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return dict(sorted(REGISTRY.items()))


def make_family(name: str, **options: Any) -> TaskFamily:
    """The task family of that name, or an InputError if there is no such family or option.

    >>> make_family("ioi:corruption=swapped").corruption
    'swapped'
    """
    families = task_families()
    # Options may come with the name, as those of methods do on the command line.
    known, *written = name.split(":") if isinstance(name, str) else [name]
    if not isinstance(name, str) or known not in families:
        raise InputError(f"there is no task {known!r}; {suggestion(str(known), families)}")
    family = families[known]
    given = list(map(_read_option, written))
    given += options.items()
    names = [field.name for field in fields(family)]
    for place, (option, _) in enumerate(given):
        if option not in names:
            known_options = suggestion(option, names)
            raise InputError(f"task {known!r} has no option {option!r}; {known_options}")
        if option in dict(given[:place]):
            raise InputError(f"task {name!r}: the option {option!r} is given twice; give it once.")
    try:
        # Options of a user's family may have no default.
        complete = signature(family).bind(**dict(given))
    except TypeError as error:
        raise InputError(f"task {name!r}: {error}; give its options {', '.join(names)}.") from error
    return family(**complete.arguments)


def _read_option(text: str) -> tuple[str, Any]:
    """The name and the value of an option written as name=value."""
    option, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"the option {text!r} of a task has no value; write NAME=VALUE.")
    if value in TRUTHS:
        return option, TRUTHS[value]
    # A number or a list; all else is text.
    with suppress(ValueError, RecursionError):
        return option, json.loads(value)
    return option, value


def task_forms() -> Iterator[str]:
    """Every task family's name, then with each other choice of an option that has few."""
    for name, family in task_families().items():
        yield name
        hints: dict[str, Any] = {}
        # Types that are local to a function are not found.
        with suppress(NameError):
            hints = get_type_hints(family)
        for option in fields(family):
            hint = hints.get(option.name)
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            others = (each for each in choices if each != option.default)
            yield from (f"{name}:{option.name}={choice}" for choice in others)

"""Methods on the command line: found by name or in a file, with their fields as options."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from circuits.cli.options import AblationName
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.discovery.registry import discoverers
from circuits.runs.run_folder import digest
from circuits.system.errors import InputError

Method = type[CircuitDiscoverer]


def find_method(name: str) -> Method:
    """Find a method by its name, or in a file (`file.py`, or `file.py:name` if it has several)."""
    if ".py" in name:
        file, _, chosen = name.partition(":")
        known, error = _methods_in(Path(file)), f"{file} defines"
        if not chosen and len(known) == 1:
            (chosen,) = known
    else:
        chosen, known = name, discoverers()
        error = f"there is no method {name!r}; there are"
    if chosen not in known:
        which = ", ".join(known) or "no CircuitDiscoverer with a name"
        raise InputError(f"{error} {which}. Give --method NAME or FILE.py:NAME.")
    return known[chosen]


def options_of(kind: Method, taken: Collection[str] = ()) -> Any:
    """Make a dataclass of a method's fields as options, with the method's docstring as help.

    Options of the command itself are `taken`: a field of that name becomes `--method-<field>`.
    """
    types = option_types(kind)
    options: list[Any] = []
    for field in dataclasses.fields(kind):
        name = f"method-{field.name}" if field.name in taken else None
        option_type = types[field.name]
        named = tyro.conf.arg(name=name)
        argument: Any = Annotated[option_type, named]
        # A copy, because a dataclass changes the fields that it is made of.
        copied = copy.copy(field)
        options.append((field.name, argument, copied))
    documented = {"__doc__": kind.__doc__}
    return dataclasses.make_dataclass(f"{kind.__name__}Options", options, namespace=documented)


def option_types(kind: Method) -> dict[str, Any]:
    """The types of a method's options, by the names of its fields."""
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: _option_type(name, hints[name]) for name in names}


def _methods_in(file: Path) -> dict[str, Method]:
    """The methods of a Python file, which is run once."""
    # A name of its own, so that a file called torch.py does not replace a module in use.
    name = f"circuits_method_{digest(str(file.resolve()), size=6)}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise InputError(f"there is no Python file {file}.")
        # Dataclasses look up the types of their fields there.
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:
            del sys.modules[name]
            raise InputError(f"{file} cannot be run: {type(error).__name__}: {error}.") from error
    known = discoverers()
    return {method: known[method] for method in known if known[method].__module__ == name}


def _option_type(name: str, hint: Any) -> Any:
    """The type of an option. Objects with names, such as metrics, are given by their name."""
    choices = get_args(hint)
    if str not in choices:
        return hint
    if name == "ablation":
        return AblationName
    return str | None if type(None) in choices else str

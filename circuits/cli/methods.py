"""Methods on the command line: found by name or in a file, with their fields as options."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import docstring_parser
import tyro

from circuits.cli.options import AblationName
from circuits.discovery.discoverer import CircuitDiscoverer
from circuits.discovery.registry import discoverers
from circuits.runs.run_folder import digest
from circuits.system.errors import InputError


def find_method(name: str) -> type[CircuitDiscoverer]:
    """Find a method by its name, or in a file (`file.py`, or `file.py:name` if it has several).

    Raises:
        InputError: there is no such method or file, or the file defines none or several.
    """
    file, _, chosen = name.partition(":") if ".py" in name else ("", "", name)
    known = _methods_in(Path(file)) if file else discoverers()
    if file and not chosen and len(known) == 1:
        (chosen,) = known
    if chosen not in known:
        where = f"{file} defines" if file else f"there is no method {chosen!r}; there are"
        which = ", ".join(known) or "no CircuitDiscoverer with a name"
        raise InputError(f"{where} {which}. Give --method NAME or FILE.py:NAME.")
    return known[chosen]


def options_of(kind: type[CircuitDiscoverer], taken: Collection[str] = ()) -> type:
    """Make a dataclass of a method's fields as options, described by the method's docstring.

    Args:
        kind: the method.
        taken: options of the command itself; a field of the same name becomes `--method-<field>`.
    """
    hints = get_type_hints(kind)
    docstring = docstring_parser.parse(kind.__doc__ or "")
    help_texts = {entry.arg_name: entry.description for entry in docstring.params}
    options: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(kind):
        argument = tyro.conf.arg(
            name=f"method-{field.name}" if field.name in taken else None,
            help=help_texts.get(field.name),
        )
        option_type: Any = _option_type(field.name, hints[field.name])
        default = dataclasses.field(default=field.default, default_factory=field.default_factory)
        options.append((field.name, Annotated[option_type, argument], default))
    made = dataclasses.make_dataclass(f"{kind.__name__}Options", options, frozen=True)
    made.__doc__ = first_line(kind)
    return made


def first_line(documented: object) -> str:
    """The first line of a docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _methods_in(file: Path) -> dict[str, type[CircuitDiscoverer]]:
    """The methods of a Python file, which is run once."""
    # A name of its own, so that a file called torch.py does not replace a module in use.
    name = f"circuits_method_{digest(str(file.resolve()), size=6)}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise InputError(f"there is no Python file {file}.")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:
            del sys.modules[name]
            raise InputError(f"{file} cannot be run: {type(error).__name__}: {error}.") from error
    return {method: kind for method, kind in discoverers().items() if kind.__module__ == name}


def _option_type(name: str, hint: Any) -> Any:
    """The type of an option. Objects with names, such as metrics, are given by their name."""
    choices = get_args(hint)
    if str not in choices:
        return hint
    if name == "ablation":
        return AblationName
    return str | None if type(None) in choices else str

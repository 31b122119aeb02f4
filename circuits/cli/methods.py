"""Methods on the command line: by name or from a file; their options are their dataclass fields,
the help their docstring.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from circuits.system.errors import InputError


def find_method(name: str) -> type[CircuitDiscoverer]:
    """A method by its name, or the one that a Python file defines (`file.py`, or `file.py:name`
    where it defines several).

    Raises:
        InputError: there is no such method or file, or the file defines none or several.
    """
    file, _, chosen = name.partition(":") if ".py" in name else ("", "", name)
    known = _defined_in(Path(file)) if file else discoverers()
    if file and not chosen and len(known) == 1:
        return next(iter(known.values()))
    if chosen not in known:
        where = f"{file} defines" if file else f"there is no method {chosen!r}; there are"
        which = ", ".join(known) or "no CircuitDiscoverer with a name of its own"
        raise InputError(f"{where} {which}. Give --method NAME or FILE.py:NAME.")
    return known[chosen]


def _defined_in(file: Path) -> dict[str, type[CircuitDiscoverer]]:
    """The methods of a Python file, which is run once, as a module that nothing else is called."""
    name = f"circuits_method_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=6).hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise InputError(f"there is no Python file {file}.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise InputError(f"{file} cannot be run: {type(error).__name__}: {error}.") from error
    return {method: kind for method, kind in discoverers().items() if kind.__module__ == name}


def options_of(kind: type[CircuitDiscoverer], taken: Collection[str] = ()) -> type:
    """A dataclass of a method's fields that can be written on a command line, with the help its
    docstring gives.

    A field called as an option of the command itself (`taken`) is written `--method-<field>`.
    """
    hints = get_type_hints(kind)
    described = {
        entry.arg_name: entry.description
        for entry in docstring_parser.parse(kind.__doc__ or "").params
    }
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        kind_of_field: Any = _command_line_type(field.name, hints[field.name])
        name = f"method-{field.name}" if field.name in taken else None
        annotated: Any = Annotated[
            kind_of_field, tyro.conf.arg(name=name, help=described.get(field.name, ""))
        ]
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        fields.append(
            (field.name, annotated)
            if default is dataclasses.MISSING
            else (field.name, annotated, dataclasses.field(default=default))
        )
    made = dataclasses.make_dataclass(f"{kind.__name__}Options", fields, frozen=True)
    made.__doc__ = first_line(kind)
    return made


def _command_line_type(name: str, hint: Any) -> Any:
    """What a field is on the command line: objects with names, such as metrics, are given by them."""
    choices = get_args(hint)
    if str not in choices:
        return hint
    if name == "ablation":
        return AblationName
    return str | None if type(None) in choices else str


def first_line(kind: type) -> str:
    """The first line of a class's docstring."""
    return kind.__doc__.strip().splitlines()[0] if kind.__doc__ else ""

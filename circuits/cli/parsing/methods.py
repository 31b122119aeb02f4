"""Methods on the command line: found by name or in a file, with their fields as options."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterable
from copy import copy
from functools import partial
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

import circuits
from circuits.cli.parsing.method_source import (
    Description,
    Option,
    UnreadableError,
    described_in,
    exists,
    shipped_methods,
)
from circuits.discovery import ENTRY_POINTS
from circuits.system.errors import InputError
from circuits.system.messages import suggestion

AblationName = Literal["resample", "zero", "mean", "mean_by_position", "noise"]


def describe_method(name: str) -> Description:
    """Describe a method, without importing it (and thus torch) where its source says enough."""
    file, chosen = _file_and_method(name)
    try:
        known = shipped_methods() if file is None else described_in(file)
    except UnreadableError:
        known = {}
    if file and not chosen and len(known) == 1:
        (chosen,) = known
    if chosen in known:
        return _with_option_types(known[chosen])
    if known and not adds_names(name) and "circuits.discovery.discoverer" not in sys.modules:
        raise _unknown_method(name, known)
    return describe(find_method(name))


def find_method(name: str) -> type[circuits.CircuitDiscoverer]:
    """Find a method by its name, or in a file (`file.py`, or `file.py:name` if it has several)."""
    file, chosen = _file_and_method(name)
    known = circuits.discoverers() if file is None else _methods_in(file)
    if file and not chosen and len(known) == 1:
        (chosen,) = known
    if chosen not in known:
        raise _unknown_method(name, known)
    return known[chosen]


def adds_names(method: str) -> bool:
    """Whether code that is not of this package comes with a method: it may define tasks, too."""
    return ".py" in method or bool(entry_points(group=ENTRY_POINTS))


def describe(kind: type[circuits.CircuitDiscoverer]) -> Description:
    """Describe a method that is imported."""
    hints = get_type_hints(kind)
    options = {}
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        options[field.name] = Option(hints[field.name], default)
    is_ours = kind.__module__.startswith("circuits.")
    # From Python 3.13 on it is without indentation as it is.
    documentation = inspect.cleandoc(kind.__doc__ or "") or None
    read = Description(kind.name, documentation, options, kind.searches(), is_ours)
    return _with_option_types(read)


def options_of(
    method: Description | type[circuits.CircuitDiscoverer], taken: Collection[str] = ()
) -> Any:
    """Make a dataclass of a method's fields as options, with the method's docstring as help.

    Options of the command itself are `taken`: a field of that name becomes `--method-<field>`.
    """
    if isinstance(method, type):
        method = describe(method)
    fields: list[Any] = []
    for name, option in method.options.items():
        other_name = f"method-{name}" if name in taken else None
        argument: Any = Annotated[option.type, tyro.conf.arg(name=other_name)]
        fields.append((name, argument, _field(option.default)))
    documented = {"__doc__": method.documentation}
    return dataclasses.make_dataclass("MethodOptions", fields, namespace=documented, kw_only=True)


def _field(default: Any) -> Any:
    if default is dataclasses.MISSING:
        return dataclasses.field()
    # A factory may return what a default may not be, such as a list.
    return dataclasses.field(default_factory=partial(copy, default))


def _file_and_method(name: str) -> tuple[Path | None, str]:
    if ".py" not in name:
        return None, name
    path, _, chosen = name.partition(":")
    if not exists(Path(path)):
        raise InputError(f"there is no Python file {path}.")
    return Path(path), chosen


def _unknown_method(name: str, known: Iterable[str]) -> InputError:
    file, chosen = _file_and_method(name)
    if file is None:
        found = f"there is no method {name!r}; {suggestion(name, known)}"
    else:
        defined = ", ".join(known) or "no CircuitDiscoverer with a name"
        found = f"{file} defines {defined}."
        if chosen:
            found = f"{found[:-1]}, and no {chosen!r}."
    return InputError(f"{found} Give --method NAME or FILE.py:NAME.")


def _methods_in(file: Path) -> dict[str, type[circuits.CircuitDiscoverer]]:
    """The methods of a Python file, which is run once."""
    # A name of its own, so that a file called torch.py does not replace a module in use.
    digest = blake2b(str(file.resolve()).encode(), digest_size=6)
    name = f"circuits_method_{digest.hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise InputError(f"{file} is no Python file; give one whose name ends in .py.")
        # Dataclasses look up the types of their fields there.
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise InputError(f"{file} cannot be run: {type(error).__name__}: {error}.") from error
    known = circuits.discoverers()
    return {method: kind for method, kind in known.items() if kind.__module__ == name}


def _with_option_types(method: Description) -> Description:
    options = {}
    for name, option in method.options.items():
        options[name] = option._replace(type=_option_type(name, option.type))
    return dataclasses.replace(method, options=options)


def _option_type(name: str, hint: Any) -> Any:
    """The type of an option. Objects with names, such as metrics, are given by their name."""
    choices = get_args(hint)
    if str not in choices:
        return hint
    if name == "ablation":
        return AblationName
    return str | None if type(None) in choices else str

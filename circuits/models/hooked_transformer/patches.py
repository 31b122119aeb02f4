"""What a user has replaced in the classes and modules of libraries: methods and functions.

A run of a module starts where torch calls it. From there the code of the libraries is followed: it
looks up names in the module itself, and functions in its own file. Whatever is found there, and is
not what the library defined, is a patch. What no such code looks up changes no run.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

RUN = ("forward", "__call__", "_call_impl")
"""How torch runs a module."""

# What a run from tokens to logits does not use of what it may.
NOT_RUN = {"to_tokens", "tokenizer", "loss_fn", "to"}
LIBRARIES = ("transformer_lens", "torch", "einops", "numpy")
STANDARD = sys.stdlib_module_names

Path = tuple[str, ...]
Lookups = tuple[set[str], set[Path], set[str]]
Place = tuple[str, str]
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
# Marks a path that starts at a global name.
GLOBAL = ""


@dataclass
class LookedUp:
    """What a run of a module looks up: names in the module, and functions.

    Functions are found by a name and a module: where they are looked up.
    """

    names: set[str]
    functions: dict[Place, dict[str, Any]]


_KNOWN: WeakKeyDictionary[type, LookedUp] = WeakKeyDictionary()


def patches(kind: type) -> dict[str, str]:
    """Describe what libraries did not define of what a run of a module of this class looks up."""
    of_torch = [name for name in RUN if not _is_original(nn.Module, name)]
    methods = [*patched_members(kind), *of_torch]
    found = {f"the class {kind.__name__}": f"another {name} method" for name in methods}
    functions = looked_up(kind).functions
    for (where, name), names in functions.items():
        value = names.get(name)
        if _is_function(value) and not _is_library(value, name):
            found[where] = f"another {name} function"
    return found


def patched_members(kind: type) -> list[str]:
    """The members of a class that a run uses, and that no library defined there."""
    names = looked_up(kind).names
    return [
        name
        for base in _bases(kind)
        for name in names & vars(base).keys()
        if not _is_original(base, name)
    ]


def looked_up(kind: type) -> LookedUp:
    """Follow the code of libraries from where torch calls a module of this class."""
    if kind in _KNOWN:
        return _KNOWN[kind]
    found = LookedUp(set(), {})
    names = set(RUN)
    while names:
        found.names |= names
        members = (vars(base)[name] for base in _bases(kind) for name in names & vars(base).keys())
        functions = list(filter(None, map(_function_of, members)))
        names = set()
        for function in functions:
            names |= _names_in(kind, function)
            _add_functions(function, found)
        names -= found.names | NOT_RUN
    _KNOWN[kind] = found
    # What has been replaced cannot be followed, and may come back.
    if patches(kind):
        _KNOWN.pop(kind, None)
    return found


def is_library_function(value: object) -> bool:
    """Whether a library made a function, or torch has it built in."""
    return isinstance(value, BuiltinFunctionType) or _root_of(value) in LIBRARIES


def _names_in(kind: type, function: FunctionType) -> set[str]:
    """The names that a method looks up in its module; elsewhere others may have the same name."""
    of_self, paths, others = _lookups(function.__code__)
    # A library's own method may be found in other ways as well, such as by super().
    methods = {
        name
        for base in _bases(kind)
        for name in others & vars(base).keys()
        if _is_original(base, name)
    }
    values = function.__globals__
    longer = (path for path in paths if len(path) > 1)
    of_class = {name for start, name, *_ in longer if values.get(start) in kind.__mro__}
    return of_self | methods | of_class


def _add_functions(function: FunctionType, found: LookedUp) -> None:
    """Add what a function looks up by its global names, and what TransformerLens' functions do."""
    _, paths, _ = _lookups(function.__code__)
    for path in paths:
        place: Any = function.__globals__
        for name in path:
            value = place.get(name)
            if isinstance(value, ModuleType):
                place = vars(value)
                continue
            key = str(place.get("__name__")), name
            if _is_function(value) and key not in found.functions:
                found.functions[key] = place
                is_followed = isinstance(value, FunctionType)
                if is_followed and _root_of(value) == LIBRARIES[0]:
                    _add_functions(value, found)
            break


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_library(value: object, name: str) -> bool:
    """Whether a function is of a library, or of Python, under its own name."""
    if isinstance(value, BuiltinFunctionType):
        return value.__name__ == name
    root = _root_of(value)
    if root == LIBRARIES[0]:
        return getattr(value, "__name__", "") == name
    if root in LIBRARIES:
        return True
    return isinstance(value, FunctionType) and root in STANDARD


def _root_of(value: object) -> str:
    """The library that a function, or the class of another callable, comes from."""
    function = value.__func__ if isinstance(value, MethodType) else value
    if isinstance(function, FunctionType):
        module = function.__globals__.get("__name__", "")
    else:
        module = type(function).__module__
    return str(module).partition(".")[0]


def _bases(kind: type) -> list[type]:
    # Other libraries add methods to `nn.Module` itself, as transformers does.
    return [base for base in kind.__mro__ if base not in nn.Module.__mro__]


def _is_original(base: type, name: str) -> bool:
    """Whether a library defined it there; a wrapper may have another function's name."""
    function = _function_of(vars(base)[name])
    library, _, _ = base.__module__.partition(".")
    if function is None or library not in LIBRARIES:
        return False
    if base is nn.Module:
        return _root_of(function) == "torch"
    is_of_module = function.__globals__.get("__name__") == base.__module__
    return is_of_module and function.__code__.co_qualname == f"{base.__qualname__}.{name}"


def _function_of(member: object) -> FunctionType | None:
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, staticmethod | classmethod):
        member = member.__func__
    return member if isinstance(member, FunctionType) else None


@cache
def _lookups(code: CodeType) -> Lookups:
    """What code looks up: names of its first argument, global names with theirs, and others."""
    first = code.co_varnames[:1]
    of_self: set[str] = set()
    paths: set[Path] = set()
    others: set[str] = set()
    for each in _codes(code):
        others |= {*each.co_names}
        path: Path | None = None
        for step in dis.get_instructions(each):
            if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
                # Some versions of Python load two at once; the second is looked into.
                loaded = step.argval
                if isinstance(loaded, tuple):
                    loaded = loaded[-1]
                path = () if loaded in first else None
            elif step.opname == "LOAD_GLOBAL":
                path = (GLOBAL, step.argval)
            elif path is not None and step.opname in ATTRIBUTES:
                path = (*path, step.argval)
            else:
                path = None
            if path and path[0] is GLOBAL:
                paths.add(path[1:])
            elif path:
                of_self.add(path[0])
    return of_self, paths, others


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)

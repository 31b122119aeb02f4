"""What the command must know of methods, read from their source text.

Importing a method imports torch, which takes seconds. Its name, docstring and fields can be read in
milliseconds, so that help and mistakes are answered at once. What cannot be read is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import circuits

PACKAGE = Path(circuits.__file__).parent
PUBLIC_NAMES = PACKAGE / "__init__.pyi"
METHODS = PACKAGE / "discovery" / "methods"
BASE = "CircuitDiscoverer"
Statements = dict[str, Any]  # of `ast`, by the names that they define
TYPES: Mapping[str, Any] = {each.__name__: each for each in (bool, int, float, str, Path)}


class UnreadableError(Exception):
    """Says what only Python itself can find out, by importing the module."""


class OtherType:
    """Stands for a type that no option has, such as `Metric`."""


class Option(NamedTuple):
    """A field of a method: its type, and its default or MISSING."""

    type: Any
    default: Any


@dataclass(frozen=True)
class Description:
    """A method as the command sees it."""

    name: str
    documentation: str | None
    options: dict[str, Option]
    searches: bool
    is_ours: bool = True


class Definition(NamedTuple):
    """What a name stands for, and the file that says so."""

    file: Path
    node: Any  # of `ast`; which kind, is found out where it is used


@dataclass(frozen=True)
class _Class:
    """A class statement, with the fields that it inherits."""

    node: ast.ClassDef
    is_method: bool = False
    searches: bool = False
    options: dict[str, Option] = field(default_factory=dict)


def described_in(file: Path) -> dict[str, Description]:
    """The methods that a file defines, by name.

    Raises:
        UnreadableError: the file must be imported to find out.
    """
    found = {}
    for node in _definitions(file).values():
        name = _method_name(node) if isinstance(node, ast.ClassDef) else None
        if name is None:
            continue
        read = _class(Definition(file, node))
        if read.is_method:
            documentation = ast.get_docstring(node)
            is_ours = file.is_relative_to(PACKAGE)
            found[name] = Description(name, documentation, read.options, read.searches, is_ours)
    return found


def exists(path: Path) -> bool:
    """Whether there is something at a path that a user names, whatever the name."""
    try:
        return path.exists()
    except (OSError, ValueError):  # no name for a file, or in a folder that may not be read
        return False


@cache
def shipped_methods() -> dict[str, Description]:
    """The methods of this package, by name."""
    found: dict[str, Description] = {}
    for file in METHODS.glob("*.py"):
        found |= described_in(file)
    return dict(sorted(found.items()))


@cache
def _definitions(file: Path) -> Statements:
    """What the names at the top level of a file stand for."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError(file) from error
    found: Statements = {}
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                found[alias.asname or alias.name] = statement
        else:
            found |= _assigned(statement)
    return found


def _assigned(statement: ast.stmt) -> Statements:
    """The name that a statement gives a value, and the value; empty for other statements."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return {name: value}
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.AST() as value):
            return {name: value}
    return {}


def _class(definition: Definition) -> _Class:
    file, node = definition
    if not isinstance(node, ast.ClassDef):
        raise UnreadableError(node)
    bases = [_class(each) for each in _bases(definition)]
    options: dict[str, Option] = {}
    # As in Python, the first base has the last word.
    for base in reversed(bases):
        options |= base.options
    if any(map(_makes_dataclass, node.decorator_list)):
        options |= dict(_own_options(definition))
    is_base = node.name == BASE and file.is_relative_to(PACKAGE)
    is_method = is_base or any(base.is_method for base in bases)
    searches = not is_base and _searches(node, bases)
    return _Class(node, is_method, searches, options)


def _searches(node: ast.ClassDef, bases: Iterable[_Class]) -> bool:
    """As `CircuitDiscoverer.searches`."""
    defined = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    if not defined.isdisjoint(("find_within", "find")):
        return "find_within" in defined
    return any(base.searches for base in bases)


def _bases(definition: Definition) -> Iterator[Definition]:
    for base in definition.node.bases:
        if isinstance(base, ast.Name) and base.id in ("ABC", "object"):
            continue
        yield _resolved(Definition(definition.file, base))


def _resolved(definition: Definition) -> Definition:
    """Follow names and imports inside this package to what they stand for."""
    file, node = definition
    match node:
        case ast.Name(id=name):
            found = _definitions(file).get(name)
        case ast.Attribute(value=ast.Name(id="circuits"), attr=name):
            file, found = PUBLIC_NAMES, _definitions(PUBLIC_NAMES).get(name)
        case _:
            return definition
    if found is None:
        raise UnreadableError(name)
    if isinstance(found, ast.ImportFrom):
        file = _module_file(found, file)
        original = next(each.name for each in found.names if name in (each.asname, each.name))
        found = ast.Name(original)
    return _resolved(Definition(file, found))


def _module_file(statement: ast.ImportFrom, file: Path) -> Path:
    if statement.module == "circuits":
        return PUBLIC_NAMES
    parts = (statement.module or "").split(".")
    is_relative = statement.level == 1 and file == PUBLIC_NAMES
    if not is_relative and parts.pop(0) != "circuits":
        raise UnreadableError(statement.module)
    return PACKAGE.joinpath(*parts).with_suffix(".py")


def _makes_dataclass(decorator: ast.AST) -> bool:
    function = getattr(decorator, "func", decorator)
    name = getattr(function, "id", None) or getattr(function, "attr", None)
    return name == "dataclass"


def _own_options(definition: Definition) -> Iterator[tuple[str, Option]]:
    file, node = definition
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign):
            continue
        if "ClassVar" in ast.unparse(statement.annotation):
            continue
        kind = _type(Definition(file, statement.annotation))
        name, value = ast.unparse(statement.target), statement.value
        default = MISSING if value is None else _default(Definition(file, value))
        yield name, Option(kind, default)


def _method_name(node: ast.ClassDef) -> str | None:
    """The class variable `name`, which a class must set itself to be registered."""
    for statement in node.body:
        value = _assigned(statement).get("name")
        if value is not None:
            return str(_literal(value))
    return None


def _default(definition: Definition) -> Any:
    node = definition.node
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "field":
        settings = {each.arg: each.value for each in node.keywords}
        if not settings.keys() <= {"default", "kw_only", "metadata"}:
            raise UnreadableError(ast.unparse(node))
        if "default" not in settings:
            return MISSING
        node = settings["default"]
    return _literal(_resolved(Definition(definition.file, node)).node)


def _literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UnreadableError(ast.unparse(node)) from error


def _type(definition: Definition) -> Any:
    file, node = definition
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str() as text):
            return _type(Definition(file, ast.parse(text, mode="eval").body))
        case ast.Name(id=name) if name in TYPES:
            return TYPES[name]
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _type(Definition(file, left)) | _type(Definition(file, right))
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[_literal(choices)]
        case ast.Name() | ast.Attribute():
            meaning = _resolved(definition)
            return OtherType if isinstance(meaning.node, ast.ClassDef) else _type(meaning)
    raise UnreadableError(ast.unparse(node))

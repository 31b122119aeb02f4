"""A digest of what the result of a user's code depends on: its source, and the data it holds.

A stored result may only answer for the same code. Three things enter the digest:

- the source of the files that define the code, and of the files beside them that these import;
- the code that was loaded, which can differ from the files (a notebook, an edit without a reload);
- the data that it holds: fields, closures, defaults, and the module globals that it names.

The standard library and installed packages count by their names, and by what a user has put into
their classes; this package counts by all its files.
"""

from __future__ import annotations

import ast
import copyreg
import dis
import functools
import sys
import types
import uuid
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.system.errors import InputError
from circuits.system.tensors import bytes_of, plain_tensor

PACKAGE = __name__.partition(".")[0]
NOT_OWN = {PACKAGE, "torch", *sys.stdlib_module_names}
INSTALLED = {"site-packages", "dist-packages"}
PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes)
CODE_FIELDS = (
    "co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags",
    "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_exceptiontable",
)  # fmt: skip
# What holds functions, and the attributes that hold them.
HOLDERS = (
    staticmethod, classmethod, property, types.MethodType, functools.partial,
    functools.partialmethod, functools.cached_property,
)  # fmt: skip
HELD = ("__func__", "__self__", "func", "args", "keywords", "fget", "fset", "fdel")
BUILTINS = (
    types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType,
)  # fmt: skip
METHOD = ("LOAD_METHOD", "LOAD_ATTR")
# What a function only gives values to tells it nothing: these methods return None.
SET = "[]"
GIVES = {"append", "extend", "insert", "add", "update", "__setitem__", SET}
LOGS = (list, set, dict, deque, OrderedDict, Counter, defaultdict)
# Instructions that name globals; a module that is imported may be one.
OF_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "IMPORT_NAME"}

# Classes derived from these can hold more, and can be called.
EXACT = {tuple, dict, np.ndarray}

Digest = bytes
Known = dict[int, tuple[Digest, Any]]
Entries = Mapping[Any, Any]
Files = dict[Path, bytes]
Paths = Iterator[Path]
Import = tuple[int, str]
Steps = list[dis.Instruction]


@dataclass(frozen=True)
class CodeDigest:
    """A digest, and what it does not cover.

    Attributes:
        text: in hexadecimal digits.
        unknown: what could not be hashed, such as "Mine.lock holds a lock"; empty if all was.
    """

    text: str
    unknown: str = ""

    def key(self) -> str:
        """The digest as a key of stored results; what is not covered is said, and never found."""
        if not self.unknown:
            return self.text
        warnings.warn(
            f"this result cannot be found again and will be computed anew, because {self.unknown}, "
            "which cannot be hashed; hold it elsewhere, or as numbers, texts or tensors.",
            stacklevel=2,
        )
        return f"{self.text} {uuid.uuid4().hex}"


def code_digest(*values: Any) -> CodeDigest:
    """The digest of values, such as methods and metrics, with their code and the data they hold.

    They count as they are now. A list that a function only adds to does not: a metric that notes
    down its calls keeps its digest. Nor do files that it opens, what it looks up by a name in a
    text, or the value of a `functools.cached_property`.
    """
    walk = _Walk(values)
    digests = [walk.digest(value, _name(value)) for value in values]
    files = _with_imported(walk.files)
    sources = sorted(_hash(file.name, source) for file, source in files.items())
    digest = _hash("all", package_digest(), *digests, *sources)
    return CodeDigest(digest.hex(), walk.unknown)


@functools.singledispatch
def stand_in(value: object) -> Any:
    """What counts in the place of an object; None takes what a copy of it would be made of.

    Registered for classes of objects that are large, or that change while they are used.
    """
    return None


@stand_in.register(torch.jit.ScriptFunction)
def _scripted(function: Any) -> tuple[Any, ...]:
    graph = function.inlined_graph
    constants = graph.findAllNodes("prim::Constant")
    values = [each.output().toIValue() for each in constants]
    return graph.str(False), values


@functools.cache
def package_digest() -> Digest:
    """The digest of the source of this package, which is read once in a process."""
    root = Path(__file__).parents[1]
    files = {str(file.relative_to(root)): file for file in root.rglob("*.py")}
    digests = [_hash(name, file.read_bytes()) for name, file in sorted(files.items())]
    return _hash("package", *digests)


def _hash(kind: str, *parts: bytes) -> Digest:
    digest = blake2b(kind.encode(), digest_size=16)
    for part in parts:
        # With the lengths, so that ("a", "bc") and ("ab", "c") differ.
        digest.update(b"%d " % len(part) + part)
    return digest.digest()


def _name(value: Any) -> str:
    """The name of a function or class, or of the class of another value."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}".removeprefix("builtins.")


def _top(module: object) -> str:
    return str(module).partition(".")[0]


def _is_own(module: str | None) -> bool:
    """Whether a module is neither installed nor a part of Python, torch or this package."""
    top = _top(module)
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top not in NOT_OWN and INSTALLED.isdisjoint(Path(file).parts)


class _Walk:
    """Visits values and all that they hold.

    Attributes:
        files: those that define the functions and classes that were visited.
        unknown: the first value that could not be hashed.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.files: set[Path] = set()
        self.unknown = ""
        self._is_own = functools.cache(_is_own)
        # Where the value that is being visited was found.
        self._where = ""
        # Installed packages count by their names, but for those that define the roots themselves.
        for root in roots:
            kind = root if isinstance(root, type) else type(root)
            is_copied = stand_in.dispatch(kind) is stand_in.dispatch(object)
            for each in (root, *kind.__mro__) if is_copied else ():
                self._add_module(getattr(each, "__module__", None))
        # By id. The values are kept, since the id of one that is gone can be given to another.
        self._known: Known = {}

    def digest(self, value: Any, where: str = "") -> Digest:
        """The digest of a value, found at `where`, by default where that which holds it was."""
        if type(value) in PLAIN:
            return _hash(type(value).__name__, repr(value).encode())
        if id(value) not in self._known:
            # Met again inside itself, a value counts as this.
            self._known[id(value)] = _hash("itself"), value
            self._known[id(value)] = self._visit(value, where), value
        found, _ = self._known[id(value)]
        return found

    def _visit(self, value: Any, where: str) -> Digest:
        before = self._where
        self._where = where or before
        try:
            for kinds, visit in _VISITS.items():
                fits = type(value) is kinds if kinds in EXACT else isinstance(value, kinds)
                if fits:
                    return visit(self, value)
            return self._object(value)
        except InputError:
            raise
        # What cannot be copied, such as a lock or an open file, raises errors of any type.
        except Exception:
            self.unknown = self.unknown or f"{self._where} holds a {_name(type(value))}"
            return _hash("unknown")
        finally:
            self._where = before

    def _all(self, kind: str, values: Iterable[Any]) -> Digest:
        return _hash(kind, *map(self.digest, values))

    def _tensor(self, tensor: Tensor) -> Digest:
        data = bytes_of(plain_tensor(tensor.detach()).cpu().contiguous())
        digest = _hash(f"{tensor.dtype} {tuple(tensor.shape)}", data.tobytes())
        return self._with_attributes(digest, tensor)

    def _array(self, array: Any) -> Digest:
        if array.dtype.hasobject:
            return self._object(array)
        return _hash(f"{array.dtype} {array.shape}", array.tobytes())

    def _tuple(self, values: Collection[Any]) -> Digest:
        return self._all(_name(values), values)

    def _set(self, values: Collection[Any]) -> Digest:
        # In an order of their own: that of a set differs between processes.
        members = sorted(map(self.digest, values))
        digest = _hash(_name(values), *members)
        return self._with_attributes(digest, values)

    def _with_attributes(self, digest: Digest, value: Any) -> Digest:
        held = getattr(value, "__dict__", None)
        if not held:
            return digest
        return _hash("with attributes", digest, self._dict(held))

    def _dict(self, values: Entries, where: str = "") -> Digest:
        where = where or self._where
        parts = []
        for key, value in values.items():
            inside = f"{where}.{key}" if isinstance(key, str) else where
            parts += [self.digest(key, where), self.digest(value, inside)]
        return _hash(_name(values), *parts)

    def _code(self, code: types.CodeType) -> Digest:
        held = [getattr(code, field) for field in CODE_FIELDS]
        return self._all("code", held)

    def _function(self, function: types.FunctionType) -> Digest:
        compiled = vars(function).get("_torchdynamo_orig_callable")
        # Decorators copy this from what they are given.
        if compiled is not None and function.__globals__["__name__"].startswith("torch._dynamo."):
            return self._all("compiled", [compiled])
        code = function.__code__
        values: dict[str, Any] = dict(_closure_of(function))
        is_own = self._is_own(function.__globals__.get("__name__"))
        if is_own:
            self._add_file(code.co_filename)
            values |= self._globals_of(function)
        for name in _only_given(code):
            if type(values.get(name)) in LOGS:
                del values[name]
        values |= vars(function)
        values[""] = [function.__defaults__, function.__kwdefaults__, code if is_own else None]
        inside = self._dict(values, function.__qualname__)
        return _hash(_name(function), inside)

    def _globals_of(self, function: types.FunctionType) -> Entries:
        """The globals that a function names, and what it names in modules, and in theirs."""
        steps = [step for step in _steps_of(function.__code__) if step.opcode in dis.hasname]
        global_names = {step.argval for step in steps if step.opname in OF_GLOBALS}
        inside = {step.argval for step in steps if step.opname not in OF_GLOBALS}
        found: dict[str, Any] = {}
        places = [("", function.__globals__)]
        package = function.__globals__.get("__package__")
        for module in _loaded_by(steps, package):
            if self._is_own(module.__name__):
                places.append((f"{module.__name__}.", vars(module)))
        # It grows by modules, which can hold each other.
        for place, held in places:
            names = inside if place else global_names
            for name in sorted(names.intersection(held)):
                value = found[place + name] = held[name]
                if not isinstance(value, types.ModuleType) or not self._is_own(value.__name__):
                    continue
                there = vars(value)
                if all(there is not known for _, known in places):
                    places.append((f"{place}{name}.", there))
        return found

    def _class(self, kind: type) -> Digest:
        parts = []
        for each in kind.__mro__:
            parts.append(_name(each).encode())
            members = _members(each)
            if self._is_own(each.__module__):
                self._add_module(each.__module__)
            else:
                members = self._put_into(each, members)
            parts.append(self._dict(members, each.__qualname__))
        return _hash("class", *parts)

    def _module(self, module: types.ModuleType) -> Digest:
        if self._is_own(module.__name__):
            self._add_module(module.__name__)
        return _hash("module", module.__name__.encode())

    def _holder(self, value: Any) -> Digest:
        held = {name: getattr(value, name, None) for name in HELD}
        return _hash(_name(type(value)), self._dict(held))

    def _reference(self, reference: Any) -> Digest:
        return self._all("reference", [reference()])

    def _builtin(self, value: Any) -> Digest:
        owner = getattr(value, "__self__", None)
        return self._all(_name(value), [owner])

    def _object(self, value: Any) -> Digest:
        """Any other object: its class, and what a copy of it would be made of."""
        kind = type(value)
        if (counted := stand_in(value)) is not None:
            return self._all("stand-in", [kind, counted])
        reduce = copyreg.dispatch_table.get(kind)
        made_of = reduce(value) if reduce else value.__reduce_ex__(4)
        about = [kind, getattr(value, "__wrapped__", None)]
        if isinstance(made_of, str):
            # A copy would be what a module has under this name.
            named = (vars(each).get(made_of) for each in _modules())
            if all(each is not value for each in named):
                raise TypeError(f"no module has {made_of}")
            return self._all(made_of, about)
        function, arguments, *more = made_of
        state, *series = (*more, None, None, None)[:3]
        if isinstance(state, dict):
            kept = [name for name in state if not _is_cache(kind, name)]
            state = {name: state[name] for name in kept} or None
        items, entries = [tuple(each or ()) for each in series]
        copied = state if isinstance(state, dict) else ()
        hidden = self._hidden(value, copied) if self._is_own(kind.__module__) else b""
        return self._all("object", [*about, function, arguments, state, items, entries, hidden])

    def _hidden(self, value: Any, copied: Collection[str]) -> Digest:
        """What an object holds and does not give to a copy, as far as that can be hashed."""
        held = dict(getattr(value, "__dict__", {}))
        for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
            if hasattr(value, name):
                held[name] = getattr(value, name)
        hidden = [name for name in held if name not in copied and not _is_cache(type(value), name)]
        # Locks and open files are hidden since they cannot be copied.
        unknown = self.unknown
        digest = self._dict({name: held[name] for name in hidden})
        self.unknown = unknown
        return digest

    def _put_into(self, kind: type, members: Entries) -> dict[Any, Any]:
        """The members of an installed class: a user's own, and the names of the others."""
        # Torch replaces its own at run time, when something is compiled.
        is_torch = _top(kind.__module__) == "torch"
        told = {}
        for name, member in members.items():
            if self._is_put(member):
                told[name] = member
            elif not is_torch:
                told[name] = _name(member)
        return told

    def _is_put(self, member: Any) -> bool:
        """Whether a member of an installed class is a user's: a function, holder or object."""
        if isinstance(member, HOLDERS):
            is_filled = isinstance(member, functools.partial | functools.partialmethod)
            return is_filled or any(self._is_put(getattr(member, name, None)) for name in HELD)
        module = getattr(member, "__globals__", {}).get("__name__", type(member).__module__)
        return module in sys.modules and self._is_own(module)

    def _add_module(self, name: str | None) -> None:
        if _top(name) not in NOT_OWN:
            self._add_file(getattr(sys.modules.get(str(name)), "__file__", None))

    def _add_file(self, name: str | None) -> None:
        # The code of a console or a notebook has a name such as "<stdin>", and no file.
        if name is not None and Path(name).is_file():
            self.files.add(Path(name).resolve())


# The first that fits. Other objects, lists among them, are visited by what copies are made of.
_VISITS: dict[Any, Any] = {
    Tensor: _Walk._tensor,
    np.ndarray: _Walk._array,
    tuple: _Walk._tuple,
    (set, frozenset): _Walk._set,
    dict: _Walk._dict,
    types.MappingProxyType: _Walk._dict,
    types.CodeType: _Walk._code,
    types.FunctionType: _Walk._function,
    type: _Walk._class,
    types.ModuleType: _Walk._module,
    HOLDERS: _Walk._holder,
    weakref.ReferenceType: _Walk._reference,
    BUILTINS: _Walk._builtin,
}


@functools.lru_cache(maxsize=1024)
def _steps_of(code: types.CodeType) -> Steps:
    """The instructions of code, and of the functions that are defined in it."""
    steps = list(dis.get_instructions(code))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            steps += _steps_of(constant)
    return steps


def _modules() -> list[types.ModuleType]:
    loaded = list(sys.modules.values())
    return [each for each in loaded if isinstance(each, types.ModuleType)]


def _loaded_by(steps: Steps, package: str | None) -> Iterator[types.ModuleType]:
    """The modules that are imported in a function of a package, if they are loaded."""
    for step in steps:
        if step.opname != "IMPORT_NAME":
            continue
        relative = f"{package}.{step.argval}".rstrip(".")
        for name in (step.argval, relative):
            if name in sys.modules:
                yield sys.modules[name]


def _closure_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    cells = function.__closure__ or ()
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        with suppress(ValueError):  # not yet assigned
            yield name, cell.cell_contents


@functools.lru_cache(maxsize=1024)
def _only_given(code: types.CodeType) -> set[str]:
    """The variables with which code does nothing but to give them values, as in calls.append(1)."""
    given, others = set(), set()
    steps = _steps_of(code)
    for at, step in enumerate(steps):
        if step.opname in ("LOAD_DEREF", "LOAD_GLOBAL") and _use(steps[at + 1 :]) in GIVES:
            given.add(step.argval)
        elif step.opname != "LOAD_CLOSURE" and isinstance(step.argval, str):
            # Read, assigned, deleted or an attribute.
            others.add(step.argval)
    return given - others


def _use(steps: Steps) -> str:
    """What is done first with a variable that was loaded: a method that is called, or `SET`."""
    if steps[0].opname in METHOD:
        return str(steps[0].argval)
    # The values that lie above that of the variable, until it is used.
    above = 0
    for step in steps:
        if step.opname == "STORE_SUBSCR" and above == 1:
            return SET
        above += dis.stack_effect(step.opcode, step.arg)
        if above < 1 or step.opname in ("COPY", "SWAP") or step.opcode in dis.hasjrel:
            break
    return ""


def _members(kind: type) -> dict[str, Any]:
    """What a class defines, without what Python and libraries note down in it."""
    members = {}
    for name, value in vars(kind).items():
        is_code = isinstance(value, (types.FunctionType, *HOLDERS))
        if name != "_abc_impl" and (is_code or not name.startswith("__")):
            members[name] = value
    return members


def _is_cache(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), functools.cached_property)


def _with_imported(files: Iterable[Path]) -> Files:
    """Source files, and those that they import, directly or not, from beside them."""
    found: Files = {}
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = file.read_bytes()
            waiting += _imported(file, found[file])
    return found


def _imported(file: Path, source: bytes) -> Paths:
    packages = [folder for folder in file.parents if (folder / "__init__.py").is_file()]
    package = packages[-1] if packages else file
    yield from (folder / "__init__.py" for folder in packages)
    for level, name in _imports(source):
        places = [file.parents[level - 1]] if level else []
        if not level and _top(name) != PACKAGE:
            places = [file.parent, package.parent, *_place_of(_top(name))]
        for path in (path for place in places for path in _paths(place, name)):
            is_own = INSTALLED.isdisjoint(path.parts) or path.is_relative_to(package)
            if is_own and path.is_file():
                yield path.resolve()


@functools.lru_cache(maxsize=1024)
def _imports(source: bytes) -> frozenset[Import]:
    """The modules that a source names in imports, and how many dots stand before each."""
    found = set()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return frozenset()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # What is imported from a package may be a module of it.
            start = f"{node.module}." if node.module else ""
            found |= {(node.level, f"{start}{alias.name}") for alias in node.names}
    return frozenset(found)


def _place_of(top: str) -> Paths:
    """The folder that holds a module or package, which is not executed to find out."""
    if top in NOT_OWN:
        return
    with suppress(ImportError, ValueError, AttributeError):
        spec = find_spec(top)
        if spec is not None:
            folders = spec.submodule_search_locations or [spec.origin or ""]
            yield from (Path(folder).parent for folder in folders)


def _paths(place: Path, name: str) -> Paths:
    """Where a module and the packages that it is in would be."""
    for part in name.split("."):
        yield place / f"{part}.py"
        place /= part
        yield place / "__init__.py"

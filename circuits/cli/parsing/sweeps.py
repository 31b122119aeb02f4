"""What `circuits compare` is to run, read from --methods and --thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING
from io import StringIO
from types import NoneType
from typing import Any, NamedTuple, get_args

import tyro

from circuits.cli.parsing.checks import check_settings, listed
from circuits.cli.parsing.method_source import Description
from circuits.cli.parsing.methods import describe_method
from circuits.cli.parsing.options import CompareOptions
from circuits.system.errors import InputError
from circuits.system.messages import suggestion

RANDOM_SEEDS = 5
Texts = Sequence[str]


class MethodSettings(NamedTuple):
    """A method, as --methods names it, and its settings."""

    method: str
    settings: dict[str, Any]


Sweeps = dict[str, list[MethodSettings]]


def read_sweeps(options: CompareOptions) -> Sweeps:
    """What to run for each entry of --methods, by the entry's label in the table."""
    thresholds = _thresholds(options.thresholds)
    sweeps: Sweeps = {}
    for entry in listed(options.methods):
        if not entry:
            raise InputError(
                f"--methods {options.methods!r}: an entry is empty; write methods like acdc,eap."
            )
        name, settings = _name_and_settings(entry)
        method = describe_method(name)
        label = ":".join([method.name, *settings])
        if label in sweeps:
            raise InputError(f"--methods names {label!r} twice; give each entry other settings.")
        sweeps[label] = []
        for more in _variations(method, settings, thresholds, options.ablation):
            values = _values(method, [*settings, *more], entry)
            check_settings(method, values)
            sweeps[label].append(MethodSettings(name, values))
    return sweeps


def _name_and_settings(entry: str) -> tuple[str, list[str]]:
    name, *settings = entry.split(":")
    # FILE.py:NAME is one method, not a file with a setting.
    if name.endswith(".py") and settings and "=" not in settings[0]:
        name = f"{name}:{settings.pop(0)}"
    return name, settings


def _thresholds(text: str) -> list[str]:
    found = listed(text)
    for each in found:
        try:
            float(each)
        except ValueError as error:
            raise InputError(
                f"--thresholds {text!r}: {each!r} is no number; write numbers separated by commas."
            ) from error
    return found


def _variations(
    method: Description, settings: Texts, thresholds: Texts, ablation: str
) -> list[list[str]]:
    """Further settings of each run: of a sweep of thresholds, several random seeds, or one run."""
    # One draw of random scores says little.
    if method.name == "random" and not settings:
        return [[f"seed={seed}"] for seed in range(RANDOM_SEEDS)]
    given = [setting.partition("=")[0] for setting in settings]
    free = method.options.keys() - given
    shared = [f"ablation={ablation}"] if "ablation" in free else []
    if "threshold" not in free:
        return [shared]
    return [[*shared, f"threshold={threshold}"] for threshold in thresholds]


def _values(method: Description, settings: Texts, entry: str) -> dict[str, Any]:
    where = f"--methods {entry!r}"
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in method.options:
            known = suggestion(name, method.options)
            raise InputError(f"{where}: {method.name} has no setting {name!r}; {known}")
        if not equals:
            raise InputError(f"{where}: {name} has no value; write {name}=VALUE.")
        if name in values:
            raise InputError(f"{where}: {name} is given twice.")
        values[name] = _value(method.options[name].type, text, f"{where}: {setting!r}")
    for name, option in method.options.items():
        if option.default is MISSING and name not in values:
            example = f"{method.name}:{name}=VALUE"
            raise InputError(f"{where}: {method.name} needs {name}; write {example}.")
    return values


def _value(hint: Any, text: str, where: str) -> Any:
    try:
        # tyro prints some mistakes in any case, and they are to be one line like all others.
        with redirect_stderr(StringIO()):
            return tyro.cli(hint, args=[text], console_outputs=False)
    except SystemExit as error:
        raise InputError(f"{where} has a wrong value; give {_in_words(hint)}.") from error


def _in_words(hint: Any) -> str:
    """A type as a reader sees it: "float", or "clean or corrupted or both"."""
    parts = get_args(hint)
    if parts:
        return " or ".join(map(_in_words, parts))
    if hint is bool:
        return "True or False"
    return "None" if hint is NoneType else getattr(hint, "__name__", str(hint))

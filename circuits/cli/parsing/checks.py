"""Mistakes in options that are told before torch is imported, and options that hold lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from circuits.cli.parsing.method_source import Description, exists
from circuits.cli.parsing.options import DiscoverOptions, EvaluateOptions, TaskOptions
from circuits.discovery.threshold import check_threshold
from circuits.system.errors import InputError
from circuits.system.numbers import whole

LEAST = {"n": 1, "n_eval": 1, "size": 0, "start_size": 1, "budget": 1, "leading": 0, "port": 0}
# One layer, or the first and the last of several
LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
MISSING = {
    "circuit": "{} holds no finished run: there is no such folder",
    "data": "--data: there is no file {}",
    "start": "--start: there is no folder {}",
    "folder": "there is no folder {}",
}


def check_options(given: Any) -> None:
    """Refuse numbers that are too small, and prompts that are asked for in two ways."""
    for name, least in LEAST.items():
        number = getattr(given, name, None)
        if number is not None:
            whole(number, f"--{name.replace('_', '-')}", least=least)
    if not isinstance(given, TaskOptions):
        return
    if given.data and given.task:
        raise InputError(
            f"--task {given.task} and --data {given.data} were both given; give one of them."
        )
    # A run that is evaluated may hold prompts of one's own.
    if not isinstance(given, EvaluateOptions):
        check_skipping(given)


def check_skipping(given: TaskOptions) -> None:
    """Refuse to skip prompts of a task, which fit or are left out anyway."""
    if given.skip_misfits and not given.data:
        raise InputError("--skip-misfits needs prompts of your own; add --data FILE.")


def check_paths(given: Any) -> None:
    """Refuse files and folders that are not there."""
    for name, text in MISSING.items():
        path = getattr(given, name, None)
        if isinstance(path, Path) and not exists(path):
            raise InputError(f"{text.format(path)}; check the path.")


def check_search(given: DiscoverOptions, method: Description, settings: dict[str, Any]) -> None:
    """Refuse what contradicts itself in the options of a search."""
    if given.start_size is not None and given.start is None:
        raise InputError(
            f"--start-size {given.start_size} needs the circuit to start from; add --start FOLDER."
        )
    where = [name for name in ("start", "layers") if getattr(given, name) is not None]
    if where and not method.searches:
        raise InputError(
            f"{method.name} does not search, so it cannot be told where by --{where[0]}; leave "
            "that out, or use a method that searches, such as acdc."
        )
    layers_of(given.layers)
    positions_of(given.positions)
    check_settings(method, settings)


def check_settings(method: Description, settings: dict[str, Any]) -> None:
    """Refuse a threshold that no method of this package takes."""
    if method.is_ours and "threshold" in settings:
        check_threshold(settings["threshold"])


def layers_of(text: str | None) -> list[int] | None:
    """The layers that a text such as 0,2-4 names."""
    if text is None:
        return None
    layers: list[int] = []
    for part in listed(text):
        written = LAYERS.fullmatch(part)
        if not written:
            raise InputError(f"--layers {text} names no layers; write them like 6-11 or 0,2-4.")
        first, last = written[1], written[2] or written[1]
        named = range(int(first), int(last) + 1)
        if not named:
            raise InputError(f"--layers {text}: {part} is empty; write it as {last}-{first}.")
        layers += named
    return layers


def positions_of(text: str | None) -> list[str] | int | None:
    """The spans, or the number of positions, that a text such as IO,S1,END or 12 names."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,18}", text):
        return int(text)
    spans = listed(text)
    if not all(spans):
        raise InputError(f"--positions {text!r}: a span has no name; write them like IO,S1,END.")
    return spans


def listed(text: str) -> list[str]:
    """What commas separate."""
    return [each.strip() for each in text.split(",")]

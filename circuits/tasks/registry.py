"""Tasks by name. A file in `families/` that defines a `TaskFamily` adds its task to all of them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, cast

from circuits.system.errors import InputError
from circuits.tasks import families

if TYPE_CHECKING:
    from circuits.tasks.family import TaskFamily
    from circuits.tasks.task import Task

LEAST_SHARE = 0.5
"""How many of the prompts drawn must fit a model, at least."""
WORDS_SHOWN = 8


def task_families() -> dict[str, type[TaskFamily]]:
    """Every kind of task by name: the shipped ones and your own."""
    for module in iter_modules(families.__path__):
        import_module(f"{families.__name__}.{module.name}")
    from circuits.tasks.family import REGISTRY

    return dict(sorted(REGISTRY.items()))


def task_names() -> tuple[str, ...]:
    """The names that `load_task` knows."""
    return tuple(task_families())


def load_task(
    name: str, model: Any, *, n: int, seed: int = 0, split: str = "test", **options: Any
) -> Task:
    """A task by name, on the device of the model.

    The text is drawn from the seed, the same for every model. Prompts whose answers are not single tokens of this model, or whose two
    versions differ in length here, are dropped and not replaced, so that models are compared on the same text: `len(task)` can be below `n`.

    Args:
        name: one of `task_names()`.
        model: it has the tokenizer.
        n: the number of prompts drawn.
        split: "train" or "test". No prompt, clean or corrupted, of one is in the other, whatever the seeds; words are shared.
        options: the family's fields, such as `corruption="swapped"` for ioi.

    Raises:
        InputError: there is no such task, split or option, or it gives too few prompts for this model (with the words to blame).
    """
    from circuits.tasks.prompts import SPLITS
    from circuits.tasks.task import Task
    from circuits.tasks.tokenization import DoesNotFit, PromptTokenizer

    family = make_family(name, **options)
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; choose {' or '.join(map(repr, SPLITS))}.")
    if n < 1:
        raise InputError(f"n={n}: a task needs at least one prompt.")
    encoder = PromptTokenizer.of(model)
    pairs = family.pairs(n, seed, cast(Any, split))
    if len(pairs) < n:
        raise InputError(
            f"task {name!r} has only {len(pairs)} different prompts in this split; ask for n={len(pairs)} or fewer."
        )
    encoded, misfits = [], dict[str, None]()
    for pair in pairs:
        try:
            encoded.append(encoder.encode(pair))
        except DoesNotFit as misfit:
            misfits |= dict.fromkeys(misfit.words)
    if len(encoded) < n * LEAST_SHARE:
        raise InputError(_too_few(name, n, len(encoded), list(misfits), encoder.model_name))
    return Task._from_encoded(encoded, name, family.metric, model)


def make_family(name: str, **options: Any) -> TaskFamily:
    """The kind of task of that name, with its options.

    Raises:
        InputError: there is none, or it has no such option.
    """
    families = task_families()
    if name not in families:
        raise InputError(f"there is no task {name!r}; {_did_you_mean(name, families)}")
    known = [field.name for field in dataclasses.fields(families[name])]
    for option in options:
        if option not in known:
            raise InputError(
                f"task {name!r} has no option {option!r}; {_did_you_mean(option, known)}"
            )
    return families[name](**options)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}there {'are ' + ', '.join(known) if known else 'is none'}."


def _too_few(name: str, n: int, found: int, words: list[str], model_name: str) -> str:
    more = f" and {len(words) - WORDS_SHOWN} more" if len(words) > WORDS_SHOWN else ""
    shown = ", ".join(map(repr, words[:WORDS_SHOWN])) + more
    return (
        f"task {name!r}: only {found} of {n} prompts fit {model_name}, and at least half must; {shown} are not single tokens here, or make the "
        "two prompts of a pair differ in length. Use another model, or prompts of your own (Task.from_prompts)."
    )

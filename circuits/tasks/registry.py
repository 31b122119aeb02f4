"""Tasks by name. A module in `families/` that defines a `TaskFamily` adds its task."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from circuits.models import Model, shape_of
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.kinds import one_of
from circuits.system.messages import quoted
from circuits.system.numbers import WholeNumber, shown, whole
from circuits.system.torch_modes import without_modes
from circuits.tasks.families import make_family, task_families
from circuits.tasks.prompts import SPLITS
from circuits.tasks.task import Task, task_from_encoded
from circuits.tasks.tokenization import Fitting, PromptTokenizer

# The share of the drawn prompts that must fit the model.
MIN_FITTING_SHARE = 0.5
MAX_WORDS_SHOWN = 8
# Drawing more takes minutes; even more would not fit into memory.
MANY_PROMPTS, MOST_PROMPTS = 20_000, 1_000_000


def task_names() -> tuple[str, ...]:
    """The names that `load_task` accepts.

    >>> import circuits
    >>> "ioi" in circuits.task_names()
    True
    """
    return tuple(task_families())


@checked_arguments
@without_modes()
def load_task(
    name: str,
    model: Model,
    *,
    n: WholeNumber,
    seed: WholeNumber = 0,
    split: str = "test",
    prepend_bos: bool | None = None,
    **options: Any,
) -> Task:
    """Load a task by name, on the device of the model.

    The text is drawn from the seed and is the same for every model. Prompts whose answers are not
    single tokens of this model, or whose two versions differ in length, are dropped and not
    replaced. Models are thus compared on the same text, and `len(task)` can be below `n`.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> circuits.load_task("ioi", model, n=16, corruption="swapped")
    Task('ioi', 16 prompts of up to 21 tokens, metric='logit_difference')

    Whether the model can do the task is another question: `circuits.performance(model, task)`.

    Args:
        name: one of `task_names()`; options may follow, as in "ioi:corruption=swapped".
        model: the model whose tokenizer is used.
        n: the number of prompts to draw, at most a million.
        seed: of the random draw.
        split: "train" or "test", which share no prompts, clean or corrupted, whatever the seeds.
        prepend_bos: see `Task.from_prompts`.
        options: fields of the task's family, such as `corruption="swapped"` for ioi.

    Raises:
        InputError: there is no such task, split or option, or too few prompts fit this model.
    """
    family = make_family(name, **options)
    n, seed = _number_of_prompts(n), whole(seed, "seed")
    encoder = PromptTokenizer.of(model, prepend_bos)
    # Drawn before tokenization, so that every model gets the same text.
    pairs = family.pairs(n, seed, one_of(split, "split", SPLITS))
    if len(pairs) < n:
        few = f"task {name!r} has only {len(pairs)} different prompts in this split"
        raise InputError(f"{few}; ask for n={len(pairs)} or fewer.")
    fitting = Fitting(partial(encoder.encode, single=True), skip=True)
    encoded = list(filter(None, map(fitting, pairs)))
    if len(encoded) < len(pairs) * MIN_FITTING_SHARE:
        raise InputError(
            f"task {name!r}: only {len(encoded)} of {len(pairs)} prompts fit "
            f"{shape_of(model).model_name}, and at least half must: {fitting.told()}"
            f"{_to_blame(fitting.words)}. "
            "Use another model, or your own prompts (Task.from_prompts)."
        )
    return task_from_encoded(encoded, family.name, family.metric, model, fitting.left_out)


def _number_of_prompts(given: WholeNumber) -> int:
    n = whole(given, "n", least=1)
    if n > MOST_PROMPTS:
        raise InputError(
            f"n={shown(n)}: a task has at most {MOST_PROMPTS:,} prompts; ask for fewer, or for "
            "several tasks with other seeds."
        )
    if n > MANY_PROMPTS:
        warnings.warn(
            f"drawing {n:,} prompts and making tokens of them takes minutes.", stacklevel=3
        )
    return n


def _to_blame(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    shown, hidden = words[:MAX_WORDS_SHOWN], words[MAX_WORDS_SHOWN:]
    more = f" and {len(hidden)} more" if hidden else ""
    return f" ({quoted(shown)}{more})" if shown else ""

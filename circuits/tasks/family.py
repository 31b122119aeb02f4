"""Task families: each draws prompt pairs of one kind."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from circuits.system.errors import InputError
from circuits.system.fields import CheckedFields
from circuits.tasks.prompts import PromptPair, Split, split_of

# A family is exhausted after this many draws in a row that repeat or belong to the other split.
MAX_REJECTED_DRAWS = 5000


@dataclass(frozen=True)
class TaskFamily(CheckedFields, ABC):
    """Draws prompt pairs of one kind. Its fields are its options.

    Subclass it as a frozen dataclass with a `name`. Defining the class registers it, so that
    `circuits.load_task` and the command line find it.

    >>> import circuits
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class FirstName(circuits.TaskFamily):
    ...     'The first of two names is repeated.'
    ...     name = "first_name"
    ...     def draw(self, random):
    ...         first, second, other = random.sample(["Mary", "John", "Anna", "Paul", "Mark"], 3)
    ...         clean, corrupted = f"So {first} and {second}", f"So {other} and {second}"
    ...         return circuits.PromptPair(clean, corrupted, f" {first}", f" {other}")
    >>> circuits.load_task("first_name", circuits.load_model("toy-world"), n=3)
    Task('first_name', 3 prompts of up to 5 tokens, metric='logit_difference')

    Attributes:
        name: the name by which `load_task` finds the family.
        metric: the name of the metric its tasks are scored by, by default logit_difference.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "logit_difference"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        other = REGISTRY.get(cls.name, cls)
        first, second = [f"{each.__module__}.{each.__qualname__}" for each in (other, cls)]
        # Reloading a module defines the same class again, which is not a clash.
        if first != second:
            raise InputError(f"two tasks are named {cls.name!r}: {first} and {second}.")
        REGISTRY[cls.name] = cls

    @abstractmethod
    def draw(self, random: Random) -> PromptPair:
        """Draw one pair. All chance comes from `random`, and nothing may depend on a model."""

    def pairs(self, n: int, seed: int, split: Split) -> list[PromptPair]:
        """Draw `n` different pairs, or all if there are fewer. Both prompts belong to `split`."""
        # Random seeds itself by the SHA-512 of a string, which is the same in every process.
        random = Random(f"{self.name}-{split}-{seed}")
        pairs: dict[str, PromptPair] = {}
        n_rejected = 0
        while len(pairs) < n and n_rejected < MAX_REJECTED_DRAWS:
            pair = self.draw(random)
            # No text of one split may occur in the other, also as a corrupted prompt.
            texts = filter(None, (pair.clean, pair.corrupted))
            splits = set(map(split_of, texts))
            if pair.clean in pairs or splits != {split}:
                n_rejected += 1
                continue
            n_rejected = 0
            pairs[pair.clean] = pair
        return list(pairs.values())


REGISTRY: dict[str, type[TaskFamily]] = {}

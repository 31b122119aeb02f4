"""Families of tasks: what writes prompt pairs of one kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, ClassVar

from circuits.system.errors import InputError
from circuits.tasks.prompts import PromptPair, Split, split_of

FRUITLESS_DRAWS = 5000
"""After so many prompts in a row that were drawn before or belong to the other split, a family has no more."""


@dataclass(frozen=True)
class TaskFamily(ABC):
    """Writes prompt pairs of one kind, as many as are wanted. Its fields are its options.

    Subclass it as a frozen dataclass with a `name`, and it is registered: `circuits.load_task` finds it.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            other = REGISTRY.get(cls.name)
            if other is not None and (other.__module__, other.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise InputError(
                    f"two tasks are named {cls.name!r}: {other.__module__}.{other.__qualname__} and {cls.__module__}.{cls.__qualname__}."
                )
            REGISTRY[cls.name] = cls

    @abstractmethod
    def draw(self, random: Random) -> PromptPair:
        """One pair, with its answers and spans. All chance comes from `random`, and nothing depends on a model."""

    def stream(self, seed: int, split: Split) -> Iterator[PromptPair]:
        """Different pairs of one split, until the family has no more. Of a pair both prompts belong to the split."""
        random, seen, fruitless = Random(f"{self.name}-{split}-{seed}"), set(), 0
        while fruitless < FRUITLESS_DRAWS:
            pair = self.draw(random)
            if pair.clean in seen or {split_of(pair.clean), split_of(pair.corrupted)} != {split}:
                fruitless += 1
                continue
            fruitless = 0
            seen.add(pair.clean)
            yield pair

    def pairs(self, n: int, seed: int, split: Split) -> list[PromptPair]:
        """The first `n` pairs of the stream, or all when there are fewer."""
        return list(islice(self.stream(seed, split), n))


REGISTRY: dict[str, type[TaskFamily]] = {}

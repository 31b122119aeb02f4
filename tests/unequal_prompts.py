"""Prompts whose corrupted versions have other lengths."""

import circuits
from circuits.tasks.task import Task


def unequal_pair(clean: str, name: str, corrupted: str, other: str) -> circuits.PromptPair:
    """Two prompts that correspond at a name."""
    start, first = clean.index(name), corrupted.index(other)
    return circuits.PromptPair(
        clean,
        corrupted,
        " to",
        " is",
        spans={"NAME": (start, start + len(name))},
        corrupted_spans={"NAME": (first, first + len(other))},
    )


def unequal_task(toy_world) -> Task:
    """Corrupted prompts that are longer than the clean ones, as long, and shorter."""
    pairs = [
        unequal_pair("So Mary and John went", "Mary", "So a great friend and John went", "a great"),
        unequal_pair("So Mary and John went", "Mary", "So Anna and John went", "Anna"),
        unequal_pair("Then a great friend went", "a great friend", "So Mary went", "Mary"),
    ]
    return Task.from_prompts(toy_world, pairs)

"""The span of a graph that each token of a task belongs to."""

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.system.errors import InputError
from circuits.tasks.task import Task

SpanIndices = Int[Tensor, "batch pos"]


def token_spans(graph: Graph, task: Task) -> SpanIndices | None:
    """For each token, the index of its span in `graph.positions`; None if edges are not split.

    Padding gets index 0 if the spans have names.
    """
    if graph.positions is None:
        return None
    if all(isinstance(span, int) for span in graph.positions):
        return _token_positions(task, len(graph.positions))
    # The first span is the rest of each prompt: index 0 for tokens that no other span holds.
    index = torch.zeros_like(task.clean)
    for number, name in enumerate(graph.positions[1:], start=1):
        if name not in task.positions:
            available = ", ".join(task.positions) or "none"
            raise InputError(f"task {task.name!r} has no span {name!r}; it has {available}.")
        mask = task.positions[str(name)]
        # A span that was here before has an index above 0.
        taken = int((index * mask).max())
        if taken:
            names = f"{graph.positions[taken]!r} and {name!r} of task {task.name!r}"
            raise InputError(f"spans {names} share tokens; the spans of a graph must be disjoint.")
        index[mask] = number
    return index


def _token_positions(task: Task, n_positions: int) -> SpanIndices:
    n_tokens = task.clean.shape[1]
    if n_tokens > n_positions:
        raise InputError(
            f"the graph has {n_positions} positions, but task {task.name!r} has prompts of "
            f"{n_tokens} tokens; make it with positions={n_tokens}."
        )
    positions = torch.arange(n_tokens, device=task.clean.device)
    return positions.expand(task.clean.shape)

"""Which span of a position-wise graph each token of a task belongs to."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.system.errors import InputError
from circuits.tasks.task import Task


def token_spans(graph: Graph, task: Task) -> Int[Tensor, "batch pos"] | None:
    """For each token the index of its span in `graph.positions`; None where edges are not split by position. Padding gets the first span.

    Raises:
        InputError: the task lacks a span, two spans share a token, or the prompts are longer than the graph.
    """
    if graph.positions is None:
        return None
    if all(isinstance(position, int) for position in graph.positions):
        if task.clean.shape[1] > len(graph.positions):
            raise InputError(
                f"the graph has {len(graph.positions)} positions, but task {task.name!r} has prompts of {task.clean.shape[1]} tokens; "
                f"make it with positions={task.clean.shape[1]}."
            )
        return torch.arange(task.clean.shape[1], device=task.clean.device).expand(task.clean.shape)
    spans = torch.zeros_like(task.clean)  # the first position is the rest of each prompt
    for index, name in list(enumerate(graph.positions))[1:]:
        if name not in task.positions:
            raise InputError(
                f"task {task.name!r} has no span {name!r}; it has {', '.join(task.positions) or 'none'}."
            )
        here = task.positions[str(name)].to(spans.device)
        if bool((spans[here] != 0).any()):
            other = graph.positions[int(spans[here].max())]
            raise InputError(
                f"spans {other!r} and {name!r} of task {task.name!r} share tokens; a graph's spans must be apart: leave one out."
            )
        spans[here] = index
    return spans

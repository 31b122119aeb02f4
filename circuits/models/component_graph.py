"""The component graph: embeddings, heads, MLPs and logits, and which of them read which others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from circuits.graph.components import Components
from circuits.graph.graph import EdgeMask, Graph, Positions
from circuits.graph.nodes import MLP, Head, Node, check_position_name
from circuits.models.backend import Model, backend, shape_of
from circuits.models.changes import check_model
from circuits.models.identity import identity
from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, ordered_items, python_number, truth, whole
from circuits.system.torch_modes import without_modes

REST = "rest"
"""The span of all tokens that belong to no named span."""


@without_modes()
def component_graph(
    model: Model,
    *,
    split_embed: bool = False,
    positions: Sequence[str] | WholeNumber | None = None,
) -> Graph:
    """Make the graph of all edges between a model's embeddings, heads, MLPs and logits.

    A head reads through three slots, q, k and v. Every target reads every earlier source.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> graph = circuits.component_graph(model)
    >>> print(graph.edges[0], graph.edges[-1])
    embed->a0.h0.q m3->logits

    Args:
        split_embed: make the token and the position embedding two nodes. The model must have
            learned position embeddings.
        positions: names of token spans: every edge is split into one per span, where `rest` is
            the span of all other tokens. Or the length of the prompts, to split by position.

    Raises:
        InputError: the residual stream is not the sum of the nodes, or an option does not fit.
    """
    check_supported(model)
    kind = shape_of(model).positions
    split_embed = truth(split_embed, "split_embed")
    if split_embed and kind != "standard":
        raise InputError(
            f"this model has no position embedding to split off (its positions are {kind}); "
            "use split_embed=False."
        )
    components = components_of(model, split_embed)
    is_causal = shape_of(model).causal
    spans = _spans(positions, shape_of(model).n_ctx)
    graph = Graph.complete(components, spans, causal=is_causal)
    return replace(graph, model=identity(model))


def components_of(model: Model, split_embed: bool) -> Components:
    """Return the facts that decide which edges the model's component graph has."""
    return Components.of(shape_of(model).comparable(), split_embed)


def component_nodes(model: Model, split_embed: bool) -> tuple[Node, ...]:
    """Return the sources, in order of computation."""
    return components_of(model, split_embed).sources


def sources_of(model: Model, target: Node, split_embed: bool) -> int:
    """Return n such that the sources of `target` are the first n of `component_nodes`."""
    return components_of(model, split_embed).n_sources(target)


def reaching_logits(model: Model, graph: Graph) -> Callable[[EdgeMask], EdgeMask]:
    """Return a function from kept edges to those from which a path leads to the logits."""
    # The model is known here even if the graph does not name it.
    components = components_of(model, graph.splits_embedding)
    return graph.paths_in(components).reaching_logits


def computed_nodes(graph: Graph) -> int:
    """Count the heads and MLPs that a run of the model computes, each once whatever its spans."""
    computed = [node for node in graph.nodes if isinstance(node, Head | MLP)]
    return len({node.label for node in computed})


def check_supported(model: Model) -> None:
    """Refuse architectures whose residual stream is not the sum of their nodes."""
    check_model(model)
    found = list(backend(model).unsupported())
    if found:
        raise InputError(
            f"{shape_of(model).model_name} has {' and '.join(found)}: its residual stream is not a "
            "sum of its components, so no component graph exists."
        )


def _spans(positions: Any, longest: int) -> Positions:
    if positions is None:
        return None
    number = python_number(positions)
    if number is not None:
        number = whole(number, "positions")
        if not 1 <= number <= longest:
            raise InputError(
                f"positions={number}: a graph needs at least one position, and the model reads up "
                f"to {longest}; give the length of the prompts."
            )
        return tuple(range(number))
    if isinstance(positions, str):
        raise InputError(
            f"positions={positions!r} is one string; "
            "give a sequence of span names, such as ['S1', 'S2', 'END']."
        )
    positions = ordered_items(positions, "positions")
    for name in positions:
        check_position_name(name)
    names = {REST, *positions}
    if len(names) != len(positions) + 1:
        raise InputError(
            f"span names must differ from each other and from {REST!r}; got {list(positions)}."
        )
    return (REST, *positions)

"""The component graph: embeddings, heads, MLPs and logits, and which of them read which others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT, SLOTS
from circuits.graph.graph import Graph
from circuits.graph.nodes import (
    MLP,
    Embed,
    Head,
    Logits,
    Node,
    PosEmbed,
    TokenEmbed,
    at_position,
    check_position_name,
)
from circuits.models import Model, check_model
from circuits.models.identity import identity
from circuits.system.errors import InputError
from circuits.system.numbers import WholeNumber, items, python_number, whole

REST = "rest"
"""The span of all tokens that belong to no named span."""

POST_NORM_ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")

Spans = tuple[str | int, ...] | None
EdgeMask = Bool[Tensor, " edge"]
EdgeColumn = Int[Tensor, " edge"]
# Component, slot and number of sources of everything that reads.
Reads = Int[np.ndarray, "read 3"]


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
    kind = model.cfg.positional_embedding_type
    if split_embed and kind != "standard":
        raise InputError(
            f"this model has no position embedding to split off (its positions are {kind}); "
            "use split_embed=False."
        )
    graph = _complete_graph(model, split_embed, _spans(positions))
    return replace(graph, model=identity(model))


def _complete_graph(model: Model, split_embed: bool, spans: Spans) -> Graph:
    """Make the graph of all edges, without the identity of the model."""
    components = (*component_nodes(model, split_embed), Logits())
    names = spans or (None,)
    reads = []
    for number, node in enumerate(components):
        n_sources = sources_of(model, node, split_embed)
        slots = range(len(SLOTS)) if isinstance(node, Head) else [NO_SLOT]
        reads += [(number, slot, n_sources) for slot in slots]
    source, target, slot = _edge_columns(np.array(reads), len(names))
    nodes = tuple(at_position(node, span) for node in components for span in names)
    is_causal = model.cfg.attention_dir == "causal"
    return Graph(nodes, source, target, slot, spans, is_causal)


def _edge_columns(reads: Reads, n_spans: int) -> list[EdgeColumn]:
    """Source, target and slot of all edges: of each read in turn, and there of each span."""
    # Integers in numpy, because a model of a hundred layers has millions of edges.
    component, slot, n_sources = reads.T
    n_edges = n_sources.repeat(n_spans)
    run = np.arange(len(n_edges)).repeat(n_edges)
    first_of_run = n_edges.cumsum() - n_edges
    source = np.arange(len(run)) - first_of_run[run]
    read, span = np.divmod(run, n_spans)
    # Component c at span s is node c * n_spans + s.
    columns = [source * n_spans + span, component[read] * n_spans + span, slot[read]]
    return list(map(torch.from_numpy, columns))


def reaching_logits(model: Model, graph: Graph) -> Callable[[EdgeMask], EdgeMask]:
    """Return a function from kept edges to those from which a path leads to the logits."""
    # Edges of the model that the graph lacks are never ablated, so paths lead along them as well.
    whole = _complete_graph(model, graph.splits_embedding, graph.positions)
    if len(graph) == len(whole):
        return graph.reaching_logits
    # Paths are followed in the whole graph, where the edges that the graph lacks are kept.
    indices = list(map(whole.index, graph.edges))
    index_in_whole = torch.tensor(indices)

    def reaching(kept: EdgeMask) -> EdgeMask:
        kept_in_whole = torch.ones(len(whole), dtype=torch.bool)
        kept_in_whole[index_in_whole] = kept
        return whole.reaching_logits(kept_in_whole)[index_in_whole]

    return reaching


def component_nodes(model: Model, split_embed: bool) -> tuple[Node, ...]:
    """Return the sources, in order of computation."""
    nodes: list[Node] = [Embed()]
    if split_embed:
        nodes = [TokenEmbed(), PosEmbed()]
    for layer in range(model.cfg.n_layers):
        heads = range(model.cfg.n_heads)
        nodes += [Head(layer, head) for head in heads]
        if not model.cfg.attn_only:
            nodes.append(MLP(layer))
    return tuple(nodes)


def computed_nodes(graph: Graph) -> int:
    """Count the heads and MLPs that a run of the model computes, each once whatever its spans."""
    computed = [node for node in graph.nodes if isinstance(node, Head | MLP)]
    return len({node.label for node in computed})


def sources_of(model: Model, target: Node, split_embed: bool) -> int:
    """Return n such that the sources of `target` are the first n of `component_nodes`."""
    # Sources are ordered as embeddings, heads of layer 0, MLP of layer 0, heads of layer 1 ...
    cfg = model.cfg
    n_embeddings = 2 if split_embed else 1
    per_layer = cfg.n_heads if cfg.attn_only else cfg.n_heads + 1
    match target:
        case Head(layer=layer):
            return n_embeddings + layer * per_layer
        case MLP(layer=layer):
            # In a parallel block the MLP reads what the heads of its layer read.
            own_heads = 0 if cfg.parallel_attn_mlp else cfg.n_heads
            return n_embeddings + layer * per_layer + own_heads
        case Logits():
            return n_embeddings + cfg.n_layers * per_layer
    # Embeddings read nothing.
    return 0


def check_supported(model: Model) -> None:
    """Refuse architectures whose residual stream is not the sum of their nodes."""
    check_model(model)
    cfg = model.cfg
    architecture, positions = cfg.original_architecture, cfg.positional_embedding_type
    reasons = {
        "norms after attention and MLP, as in Gemma 2 and 3": (
            cfg.use_normalization_before_and_after
        ),
        f"norms after attention and MLP ({architecture})": architecture in POST_NORM_ARCHITECTURES,
        "shortformer positions, which enter queries and keys but not the residual stream": (
            positions == "shortformer"
        ),
        "query and key norms that mix heads (OLMoE)": architecture == "OlmoeForCausalLM",
        "4-bit weights": cfg.load_in_4bit,
        f"layers spread over {cfg.n_devices} devices": cfg.n_devices > 1,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise InputError(
            f"{cfg.model_name} has {' and '.join(found)}: its residual stream is not a sum of its "
            "components, so no component graph exists."
        )


def _spans(positions: Any) -> Spans:
    if positions is None:
        return None
    number = python_number(positions)
    if number is not None:
        if number < 1:
            raise InputError(
                f"positions={number}: a graph needs at least one position; "
                "give the length of the prompts."
            )
        return tuple(range(whole(number, "positions")))
    if isinstance(positions, str):
        raise InputError(
            f"positions={positions!r} is one string; "
            "give a sequence of span names, such as ['S1', 'S2', 'END']."
        )
    positions = items(positions, "positions")
    for name in positions:
        check_position_name(name)
    names = {REST, *positions}
    if len(names) != len(positions) + 1:
        raise InputError(
            f"span names must differ from each other and from {REST!r}; got {list(positions)}."
        )
    return (REST, *positions)

"""The component graph: embeddings, heads, MLPs and logits, and which of them read what which others write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.edges import NO_SLOT
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
from circuits.models import Model
from circuits.models.identity import identity
from circuits.system.errors import InputError

REST = "rest"
POST_NORM_ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def component_graph(
    model: Model, *, split_embed: bool = False, positions: Sequence[str] | int | None = None
) -> Graph:
    """Every edge between components: embeddings, heads (read in q, k and v), MLPs and the logits.

    Args:
        split_embed: token and position embedding as two nodes (only where positions are learned embeddings).
        positions: names of spans, and every edge is split by span, the rest of each prompt being the span `rest`; or a number of positions.

    Raises:
        InputError: the model's residual stream is not the plain sum of its nodes, or the options do not fit the model.
    """
    check_supported(model)
    if split_embed and not has_position_embedding(model):
        kind = model.cfg.positional_embedding_type
        raise InputError(
            f"this model has no position embedding to split off (its positions are {kind}); use split_embed=False."
        )
    spans = _spans(positions)
    components = component_nodes(model, split_embed)
    nodes = [
        at_position(node, span) for node in (*components, Logits()) for span in spans or (None,)
    ]
    width = len(spans) if spans else 1
    # Columns of integers, not edges one by one: a model of a hundred layers has millions.
    columns = [
        _incoming(row, slot, sources, width) for row, slot, sources in _reads(model, split_embed)
    ]
    source, target, slot = (
        torch.from_numpy(column.copy()) for column in np.concatenate(columns, axis=1)
    )
    return Graph(
        tuple(nodes),
        source,
        target,
        slot,
        spans,
        model.cfg.attention_dir == "causal",
        identity(model),
    )


def _reads(model: Model, split_embed: bool) -> Iterator[tuple[int, int, int]]:
    """Each slot of each component, by their numbers, and how many sources it has."""
    for row, target in enumerate((*component_nodes(model, split_embed), Logits())):
        if not isinstance(target, Embed | TokenEmbed | PosEmbed):
            for slot in (0, 1, 2) if isinstance(target, Head) else (NO_SLOT,):
                yield row, slot, sources_of(model, target, split_embed)


def _incoming(target: int, slot: int, sources: int, width: int) -> Int[np.ndarray, "column edge"]:
    """Source, target and slot of the edges into one slot of one component, for each of `width` spans its first `sources` components."""
    spans, components = np.repeat(np.arange(width), sources), np.tile(np.arange(sources), width)
    return np.stack(
        [components * width + spans, target * width + spans, np.full(width * sources, slot)]
    )


def reaching_logits(
    model: Model, graph: Graph
) -> Callable[[Bool[Tensor, " edge"]], Bool[Tensor, " edge"]]:
    """A function from the kept edges to those of them from which a path leads to the logits.

    Where the graph lacks edges of the model, which are then never ablated, paths lead along them as well.
    """
    split_embed = any(isinstance(node, TokenEmbed | PosEmbed) for node in graph.nodes)
    if len(graph) == sum(sources for _, _, sources in _reads(model, split_embed)) * len(
        graph.positions or (None,)
    ):
        return graph.reaching_logits
    names = None if graph.positions is None else [name for name in graph.positions if name != REST]
    spans: Any = len(names) if names and isinstance(names[0], int) else names
    whole = component_graph(model, split_embed=split_embed, positions=spans)
    edges = {edge: index for index, edge in enumerate(whole.edges)}
    place = torch.tensor([edges[edge] for edge in graph.edges])

    def reaching(kept: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        everywhere = torch.ones(len(whole), dtype=torch.bool)
        everywhere[place] = kept
        return whole.reaching_logits(everywhere)[place]

    return reaching


def component_nodes(model: Model, split_embed: bool) -> tuple[Node, ...]:
    """The nodes that write, in order of computation."""
    layers = [
        node
        for layer in range(model.cfg.n_layers)
        for node in (
            *(Head(layer, head) for head in range(model.cfg.n_heads)),
            *(() if model.cfg.attn_only else (MLP(layer),)),
        )
    ]
    return (*((TokenEmbed(), PosEmbed()) if split_embed else (Embed(),)), *layers)


def computed_nodes(graph: Graph) -> int:
    """How many nodes a run of the model computes: heads and MLPs, each counted once where edges are split by position."""
    return len({at_position(node, None) for node in graph.nodes if isinstance(node, Head | MLP)})


def sources_of(model: Model, target: Node, split_embed: bool) -> int:
    """How many of `component_nodes` are sources of `target`: always the first ones."""
    embeddings = 2 if split_embed else 1
    per_layer = model.cfg.n_heads + (0 if model.cfg.attn_only else 1)
    match target:
        case Head(layer=layer):
            return embeddings + layer * per_layer
        case MLP(layer=layer):
            # In a parallel block the MLP reads what the heads of its layer read, not what they write.
            return (
                embeddings
                + layer * per_layer
                + (0 if model.cfg.parallel_attn_mlp else model.cfg.n_heads)
            )
        case Logits():
            return embeddings + model.cfg.n_layers * per_layer
    return 0


def has_position_embedding(model: Model) -> bool:
    """Whether learned position embeddings are added to the residual stream."""
    return bool(model.cfg.positional_embedding_type == "standard")


def check_supported(model: Model) -> None:
    """Refuse, by name, architectures whose residual stream is not the plain sum of their nodes.

    Raises:
        InputError: with every reason there is.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"expected a HookedTransformer, got {type(model).__name__}; load it with circuits.load_model."
        )
    cfg = model.cfg
    reasons = {
        "norms after attention and MLP, as in Gemma 2 and 3": cfg.use_normalization_before_and_after,
        f"norms after attention and MLP ({cfg.original_architecture})": cfg.original_architecture
        in POST_NORM_ARCHITECTURES,
        "shortformer positions, which enter queries and keys but not the residual stream": cfg.positional_embedding_type
        == "shortformer",
        "query and key norms that mix heads (OLMoE)": cfg.original_architecture
        == "OlmoeForCausalLM",
        "4-bit weights": cfg.load_in_4bit,
        f"layers spread over {cfg.n_devices} devices": cfg.n_devices > 1,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise InputError(
            f"{cfg.model_name} has {' and '.join(found)}: its residual stream is not a sum of its components; no component graph exists."
        )


def _spans(positions: Sequence[str] | int | None) -> tuple[str | int, ...] | None:
    if positions is None:
        return None
    if isinstance(positions, int):
        if positions < 1:
            raise InputError(
                f"positions={positions}: a graph needs at least one position; give the length of the prompts."
            )
        return tuple(range(positions))
    if isinstance(positions, str):
        raise InputError(
            f"positions={positions!r} is one string; give a sequence of span names, such as ['S1', 'S2', 'END']."
        )
    for name in positions:
        check_position_name(name)
    if len(set(positions)) != len(positions) or REST in positions:
        raise InputError(
            f"span names must differ from each other and from {REST!r}; got {list(positions)}."
        )
    return (REST, *positions)

"""The part of each edge of an attribution graph that passes through each attention head.

With frozen patterns an edge is a sum over paths, and in each layer a path either passes through
one head or stays at its position. The part that passes through head h is

    share_h(s -> t) = sum over positions of V_h(s) . dV_h(t),

where V_h(s) is what source s adds to the head's values, and dV_h(t) the gradient of target t with
respect to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.active_features import (
    ActiveFeatures,
    Sources,
    active_features,
    gather_sources,
)
from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    Nodes,
)
from circuits.attribution.linear_sweep import SweepTargets, feature_targets, logit_targets
from circuits.attribution.local_model import (
    Gradient,
    LocalModel,
    SourceResidual,
    check_transcoders,
    freeze,
)
from circuits.attribution.tensor_table import join_rows, row_numbers, select_rows, true_rows
from circuits.models import Model
from circuits.models.identity import identity
from circuits.system.errors import InputError
from circuits.transcoders.transcoder import Transcoders

# Sources, and targets, that are carried through the layers together.
NODES_AT_ONCE = 128
# In this layout, the sum over positions of products of vectors is one product of matrices.
BY_NODE = "head pos node d_head -> head node (pos d_head)"
ValuesByNode = Float[Tensor, "head node pos_and_d_head"]

NodeNumbers = Int[Tensor, " _"]
EdgeNumbers = Int[Tensor, " edge"]


@torch.no_grad()
def head_shares(
    model: Model, transcoders: Transcoders, graph: FeatureGraph
) -> Float[Tensor, "edge layer head"]:
    """Compute the part of every edge's weight that passes through each head.

    In each layer, the rest of the weight passes no head. The result has edges x layers x heads
    entries, so prune the graph first.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> transcoders = circuits.load_transcoders("toy-world-plt")
    >>> graph = circuits.AttributionGraph(transcoders).attribute(model, [1, 2, 3])
    >>> small = circuits.pruned(graph, node_threshold=0.5)
    >>> shares = circuits.head_shares(model, transcoders, small)
    >>> shares.shape == (len(small), model.cfg.n_layers, model.cfg.n_heads)
    True

    Raises:
        InputError: the graph was not made with this model and these transcoders.
    """
    _check_graph(model, transcoders, graph)
    local, sources = _local_sources(model, transcoders, graph)
    shares = graph.weight.new_zeros(len(graph), len(local.layers), model.cfg.n_heads)
    on_device = graph.to(local.embedding.device)
    for layer, edge, share in _shares(local, transcoders, sources, on_device):
        shares[edge.to(shares.device), layer] = share.to(shares)
    return shares


def _local_sources(
    model: Model, transcoders: Transcoders, graph: FeatureGraph
) -> tuple[LocalModel, Sources]:
    leading = 1 if graph.transcoders is None else graph.transcoders.leading
    (local,) = freeze(model, transcoders, [graph.tokens.cpu()])
    (features,) = active_features([local], transcoders, leading=leading)
    return local, gather_sources(local, transcoders, features, leading=leading)


def _shares(
    local: LocalModel, transcoders: Transcoders, sources: Sources, graph: FeatureGraph
) -> Iterator[tuple[int, EdgeNumbers, Float[Tensor, "edge head"]]]:
    """The shares of some edges in one layer at a time."""
    column = _feature_columns(graph, sources)
    source_nodes, source_place = graph.source.unique(return_inverse=True)
    target_nodes, target_place = graph.target.unique(return_inverse=True)
    targets = _targets(local, transcoders, graph, target_nodes)
    for i, source in enumerate(source_nodes.split(NODES_AT_ONCE)):
        nodes = select_rows(graph.nodes, source)
        values = list(_source_values(local, sources, nodes, column[source]))
        for j, rows in enumerate(row_numbers(target_nodes).split(NODES_AT_ONCE)):
            in_block = (source_place // NODES_AT_ONCE == i) & (target_place // NODES_AT_ONCE == j)
            edge = true_rows(in_block)
            s, t = source_place[edge] % NODES_AT_ONCE, target_place[edge] % NODES_AT_ONCE
            for layer, products in _products(local, select_rows(targets, rows), values):
                yield layer, edge, products[:, s, t].T


def _check_graph(model: Model, transcoders: Transcoders, graph: FeatureGraph) -> None:
    if graph.directions is None:
        raise InputError(
            "this graph came from another program and does not say what it explains; "
            "make the graph with this package to split its edges by head."
        )
    check_transcoders(model, transcoders)
    for what, made_with, given in (
        ("a model", graph.model, identity(model)),
        ("transcoders", graph.transcoders, transcoders.identity),
    ):
        if made_with is not None and made_with.weights != given.weights:
            raise InputError(
                f"the graph was made with {what} of other weights than {given.name!r} has; "
                "give those it was made with."
            )


def _feature_columns(graph: FeatureGraph, sources: Sources) -> NodeNumbers:
    # The column of each feature in `Sources.order`; -1 for other nodes.
    nodes = true_rows(graph.nodes.kind == FEATURE)
    active = _feature_keys(sources.features)
    number = active.get_indexer(_feature_keys(select_rows(graph.nodes, nodes)))
    if (number < 0).any():
        inactive = int(nodes[int(number.argmin())])
        raise InputError(
            f"{graph.node(inactive)} does not fire in this model: the graph was made with "
            "another model or other transcoders."
        )
    column = torch.full_like(graph.nodes.index, -1)
    column[nodes] = sources.column[torch.from_numpy(number).to(nodes)]
    return column


def _feature_keys(table: ActiveFeatures | Nodes) -> pd.MultiIndex:
    keys = (table.layer, table.position, table.index)
    return pd.MultiIndex.from_arrays([key.tolist() for key in keys])


def _targets(
    local: LocalModel, transcoders: Transcoders, graph: FeatureGraph, numbers: NodeNumbers
) -> SweepTargets:
    """The nodes with these ascending numbers as targets: features, then directions."""
    assert graph.directions is not None
    nodes = select_rows(graph.nodes, numbers)
    features = select_rows(nodes, nodes.kind == FEATURE)
    explained = select_rows(nodes, nodes.kind == TARGET)
    active = ActiveFeatures(features.layer, features.position, features.index, features.activation)
    vectors = graph.directions.to(local.embedding)[explained.index]
    no_bias = vectors.new_zeros(len(vectors))
    directions = logit_targets(local, vectors, no_bias, explained.position)
    return join_rows([feature_targets(local, transcoders, active), directions])


def _source_values(
    local: LocalModel, sources: Sources, nodes: Nodes, column: NodeNumbers
) -> Iterator[ValuesByNode]:
    """What some nodes, with these columns in `Sources.order`, add to all values by layer."""
    length, d_model = local.embedding.shape
    residual = local.embedding.new_zeros(length, len(column), d_model)
    tokens = true_rows(nodes.kind == EMBEDDING)
    position = nodes.position[tokens]
    residual[position, tokens] = local.embedding[position]
    for layer, frozen in enumerate(local.layers):
        values = frozen.values(residual)
        read = residual
        residual = residual + frozen.attention_output(values)
        if frozen.skip is not None:
            read = read if local.parallel else residual
            residual = residual + frozen.skip_output(read)
        _add_mlp_sources(residual, sources, layer, nodes, column)
        yield rearrange(values, BY_NODE)


def _add_mlp_sources(
    residual: SourceResidual, sources: Sources, layer: int, nodes: Nodes, column: NodeNumbers
) -> None:
    # error_l
    errors = true_rows((nodes.kind == ERROR) & (nodes.layer == layer))
    position = nodes.position[errors]
    residual[position, errors] += sources.errors[layer, position]
    # out_n = activation x decoder row
    outputs = sources.outputs[layer]
    features, rows = (column[:, None] == outputs.columns).nonzero(as_tuple=True)
    residual[nodes.position[features], features] += outputs.rows[rows]


def _products(
    local: LocalModel, targets: SweepTargets, values: Sequence[ValuesByNode]
) -> Iterator[tuple[int, Float[Tensor, "head source target"]]]:
    """The shares of every head in edges from sources, with these values, to all targets."""
    gradient = local.embedding.new_zeros(len(local.tokens), *targets.vector.shape)
    _add_at_mlp_input(gradient, None, targets, len(local.layers))
    for layer in reversed(range(len(local.layers))):
        frozen = local.layers[layer]
        skip = frozen.skip_gradient(gradient)
        if not local.parallel:
            _add_at_mlp_input(gradient, skip, targets, layer)
        at_values = frozen.value_gradient(gradient)
        # share_h(s -> t) = sum over positions of V_h(s) . dV_h(t)
        yield layer, values[layer] @ rearrange(at_values, BY_NODE).mT
        frozen.add_attention_gradient(at_values, gradient)
        if local.parallel:
            _add_at_mlp_input(gradient, skip, targets, layer)


def _add_at_mlp_input(
    gradient: Gradient, skip: Gradient | None, targets: SweepTargets, layer: int
) -> None:
    """Add what arrives where the MLP reads: through the skip, and from targets that read there."""
    if skip is not None:
        gradient += skip
    here = true_rows(targets.layer == layer)
    gradient[targets.position[here], here] += targets.vector[here]

"""The part of each edge of an attribution graph that passes through each attention head.

With frozen patterns an edge is a sum over paths, and in each layer a path either passes through
one head or stays at its position. The part that passes through head h is

    share_h(s -> t) = sum over positions of V_h(s) . dV_h(t)

for what source s adds to the head's values and the gradient of target t with respect to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from circuits.attribution.edge_weights import SweepTargets, feature_targets, logit_targets
from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    Nodes,
    check_is_feature_graph,
)
from circuits.attribution.local_model import Gradient, LocalModel, check_transcoders, freeze
from circuits.attribution.tensor_table import join_rows, row_numbers, select_rows, true_rows
from circuits.models import Model, shape_of
from circuits.models.identity import has_weights
from circuits.system.errors import InputError
from circuits.system.torch_modes import without_modes
from circuits.transcoders.transcoder import Transcoders

# Sources, and targets, that are carried through the layers together.
NODES_AT_ONCE = 128
# In this layout, the sum over positions of products of vectors is one product of matrices.
BY_NODE = "head pos node d_head -> head node (pos d_head)"
ValuesByNode = Float[Tensor, "head node pos_and_d_head"]
HeadProducts = Float[Tensor, "head source target"]

NodeNumbers = Int[Tensor, " _"]
EdgeNumbers = Int[Tensor, " edge"]
# The shares of some edges in one layer.
Shares = tuple[int, EdgeNumbers, Float[Tensor, "edge head"]]


@torch.no_grad()
@without_modes()
def head_shares(
    model: Model, transcoders: Transcoders, graph: FeatureGraph
) -> Float[Tensor, "edge layer head"]:
    """Compute the part of every edge's weight that passes through each head.

    In each layer, the rest of the weight passes no head. The result has edges x layers x heads
    entries, so prune the graph first.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> transcoders = circuits.load_transcoders("toy-world-plt")
    >>> graph = circuits.AttributionGraph(transcoders).attribute(model, [0, 2, 3])
    >>> small = circuits.pruned(graph, node_threshold=0.5)
    >>> shares = circuits.head_shares(model, transcoders, small)
    >>> shares.shape == (len(small), model.cfg.n_layers, model.cfg.n_heads)
    True

    Raises:
        InputError: the graph was not made with this model and these transcoders.
    """
    _check_graph(model, transcoders, graph)
    n_edges, cfg = len(graph), shape_of(model)
    shape = (n_edges, cfg.n_layers, cfg.n_heads)
    shares = graph.weight.new_zeros(shape)
    if not n_edges:
        return shares
    sweep = _HeadSweep.of(model, transcoders, graph)
    for layer, edge, share in sweep.shares():
        edge = edge.to(shares.device)
        shares[edge, layer] = share.to(shares)
    return shares


def _check_graph(model: Model, transcoders: Transcoders, graph: FeatureGraph) -> None:
    check_is_feature_graph(graph)
    if graph.directions is None:
        raise InputError(
            "this graph came from another program and does not say what it explains; "
            "make the graph with this package to split its edges by head."
        )
    check_transcoders(model, transcoders)
    others = []
    if graph.model is not None and not has_weights(model, graph.model):
        others.append(f"a model of other weights than {shape_of(model).model_name!r} has")
    made_with, given = graph.transcoders, transcoders.identity
    if made_with is not None and made_with.weights != given.weights:
        others.append(f"transcoders of other weights than {given.name!r} has")
    if others:
        raise InputError(f"the graph was made with {others[0]}; give those it was made with.")


@dataclass(frozen=True, eq=False)
class _HeadSweep:
    """Computes the shares of a graph on the device of its local model."""

    transcoders: Transcoders
    local: LocalModel
    sources: Sources
    graph: FeatureGraph

    @staticmethod
    def of(model: Model, transcoders: Transcoders, graph: FeatureGraph) -> _HeadSweep:
        leading = 1 if graph.transcoders is None else graph.transcoders.leading
        prompt = graph.tokens.cpu()
        [local] = freeze(model, transcoders, [prompt])
        [features] = active_features([local], transcoders, leading=leading)
        sources = gather_sources(local, transcoders, features, leading=leading)
        graph = graph.to(local.embedding.device)
        return _HeadSweep(transcoders, local, sources, graph)

    def shares(self) -> Iterator[Shares]:
        """Yield each layer's shares of edges by head, a block of sources and targets at a time."""
        graph, column = self.graph, self._columns()
        sources, source_place = graph.source.unique(return_inverse=True)
        targets, target_place = graph.target.unique(return_inverse=True)
        readers = self._readers(graph.nodes[targets])
        target_rows = row_numbers(targets).split(NODES_AT_ONCE)
        for source_block, source in enumerate(sources.split(NODES_AT_ONCE)):
            nodes = graph.nodes[source]
            values = list(self._source_values(nodes, column[source]))
            for target_block, rows in enumerate(target_rows):
                from_block = source_place // NODES_AT_ONCE == source_block
                into_block = target_place // NODES_AT_ONCE == target_block
                edge = true_rows(from_block & into_block)
                source_row = source_place[edge] % NODES_AT_ONCE
                target_row = target_place[edge] % NODES_AT_ONCE
                block_readers = select_rows(readers, rows)
                for layer, products in self._products(block_readers, values):
                    yield layer, edge, products[:, source_row, target_row].T

    def _columns(self) -> NodeNumbers:
        # The place of each feature in `Sources.order`; -1 for other nodes.
        nodes = self.graph.nodes
        features = true_rows(nodes.kind == FEATURE)
        active = self._keys(self.sources.features)
        wanted = self._keys(nodes[features])
        number = torch.searchsorted(active, wanted)
        number = number.clamp(max=len(active) - 1)
        inactive = features[active[number] != wanted]
        if len(inactive):
            raise InputError(
                f"{self.graph.node(int(inactive[0]))} does not fire in this model: the graph was "
                "made with another model or other transcoders."
            )
        column = torch.full_like(nodes.index, -1)
        column[features] = self.sources.column[number]
        return column

    def _keys(self, table: ActiveFeatures | Nodes) -> NodeNumbers:
        # One ascending number per feature.
        length = len(self.local.tokens)
        place = table.layer * length + table.position
        return place * self.transcoders.n_features + table.index

    def _readers(self, nodes: Nodes) -> SweepTargets:
        """The targets among these nodes: features, then directions."""
        assert self.graph.directions is not None
        features = nodes[nodes.kind == FEATURE]
        explained = nodes[nodes.kind == TARGET]
        active = ActiveFeatures(
            features.layer, features.position, features.index, features.activation
        )
        into_features = feature_targets(self.local, self.transcoders, active)
        directions = self.graph.directions[explained.index]
        directions = directions.to(self.local.embedding)
        no_bias = directions.new_zeros(len(directions))
        position = explained.position
        into_directions = logit_targets(self.local, directions, no_bias, position)
        return join_rows([into_features, into_directions])

    def _source_values(self, nodes: Nodes, column: NodeNumbers) -> Iterator[ValuesByNode]:
        # What sources, with these columns in `Sources.order`, add to all values by layer.
        local = self.local
        length, d_model = local.embedding.shape
        shape = (length, len(nodes), d_model)
        residual = local.embedding.new_zeros(shape)
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
            # error_l
            in_layer = nodes.layer == layer
            errors = true_rows(in_layer & (nodes.kind == ERROR))
            position = nodes.position[errors]
            error = self.sources.errors[layer, position]
            residual[position, errors] += error
            # out_n = activation x decoder row
            outputs = self.sources.outputs[layer]
            same = column[:, None] == outputs.columns
            features, rows = same.nonzero(as_tuple=True)
            position = nodes.position[features]
            residual[position, features] += outputs.rows[rows]
            yield rearrange(values, BY_NODE)

    def _products(
        self, targets: SweepTargets, values: Sequence[ValuesByNode]
    ) -> Iterator[tuple[int, HeadProducts]]:
        # The shares of every head in edges from sources, with these values, to all targets.
        local = self.local
        gradient = targets.zero_gradient(len(local.tokens))
        _add_at_mlp_input(gradient, None, targets, len(local.layers))
        for layer, frozen in reversed([*enumerate(local.layers)]):
            skip = frozen.skip_gradient(gradient)
            # The MLP reads the residual stream after attention, in a parallel block before it.
            if not local.parallel:
                _add_at_mlp_input(gradient, skip, targets, layer)
            at_values = frozen.value_gradient(gradient)
            # share_h(s -> t) = sum over positions of V_h(s) . dV_h(t)
            by_node = rearrange(at_values, BY_NODE)
            yield layer, values[layer] @ by_node.mT
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
    position = targets.position[here]
    gradient[position, here] += targets.vector[here]

"""Run circuits of transcoder features: everything outside the circuit is ablated, nothing is
frozen.

A circuit keeps the nodes that its edges touch, and with a node all its occurrences in a prompt. At
every position the output of layer l's MLP becomes

    MLP_l(x) + sum over the nodes n outside the circuit that write there of  c_n - out_n(x)

with out_n(x) what the node writes in this run (a feature's activation times its decoder rows, or
the
error) and c_n what it writes on the corrupted prompt, zero, or its mean. Biases and skip
connections
stay as they are. Token embeddings outside the circuit are replaced in the same way.

A feature that is inactive on the clean prompt is in no circuit, with one exception: the circuit
that
keeps every edge of a graph with all active features is the model itself. With one edge less, such
features take their values on the corrupted prompt, so curves over sizes jump at their last point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution.local_model import check_transcoders, compute_dtype, read_by_features
from circuits.attribution.pooling import spans_of
from circuits.graph.graph import Graph, PooledFeatureGraph
from circuits.graph.nodes import Error, Feature, TokenEmbed
from circuits.models import (
    Hook,
    Model,
    ModelWeights,
    frozen,
    mlp_output_hook,
    mlp_residual_hook,
    output_hook,
    plain_inputs,
    run_to_residual,
    unembed,
)
from circuits.models.component_graph import REST
from circuits.models.identity import check_fits
from circuits.models.source_outputs import keeper
from circuits.running.ablation import Ablation
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.tasks.metrics import check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.transcoder import Transcoders

CPU_BYTES = 1 << 30

KeptEdges = Bool[Tensor, "variant edge"]
NodeMask = Bool[Tensor, " node"]
Stream = Float[Tensor, "batch pos d_model"]
Activations = Float[Tensor, "batch pos feature"]

EMBEDDING_HOOK = output_hook(TokenEmbed())


def transcoders_of(graph: PooledFeatureGraph, given: Transcoders | None) -> Transcoders:
    """The transcoders whose features are a graph's nodes: those given, or those the graph names.

    Raises:
        InputError: they are not the ones the graph was made with, or cannot be found again.
    """
    made_with = graph.transcoders
    if given is None and not made_with.source:
        raise InputError(
            f"the graph's transcoders {made_with.name!r} were not loaded from a file; hand them "
            f"over "
            "with transcoders=."
        )
    found = load_transcoders(made_with.source) if given is None else given
    if found.identity.weights != made_with.weights:
        where = f" in {made_with.source}" if given is None else ""
        raise InputError(
            f"the transcoders {found.name!r}{where} have other weights than those the graph was "
            f"made "
            f"with ({made_with.name!r})."
        )
    return found


@dataclass(frozen=True, eq=False)
class NodeOutputs:
    """What features, errors and tokens write on some prompts, or what replaces it.

    Attributes:
        features: activations, by layer.
        errors: by layer, before the norm after the MLP if transcoders write there.
        tokens: the token embeddings.
    """

    features: Sequence[Activations]
    errors: Sequence[Stream]
    tokens: Stream

    def map(
        self, function: Callable[[Tensor], Tensor], tokens: Callable[[Tensor], Tensor] | None = None
    ) -> NodeOutputs:
        """A function of every tensor; of the token embeddings, `tokens` if given."""
        return NodeOutputs(
            [function(part) for part in self.features],
            [function(part) for part in self.errors],
            (tokens or function)(self.tokens),
        )

    def __add__(self, other: NodeOutputs) -> NodeOutputs:
        return NodeOutputs(
            [a + b for a, b in zip(self.features, other.features, strict=True)],
            [a + b for a, b in zip(self.errors, other.errors, strict=True)],
            self.tokens + other.tokens,
        )


@dataclass(frozen=True, eq=False)
class FeatureExecutor:
    """Runs circuits of one graph of features on one task, see `executor.Executor`.

    Attributes:
        means: of the ablation, taken over all prompts.
        counts: batches are model runs.
    """

    model: Model
    transcoders: Transcoders
    graph: PooledFeatureGraph
    task: Task
    ablation: Ablation
    max_memory: int | None = None
    means: NodeOutputs | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"node_evaluations": 0, "batches": 0})

    @staticmethod
    def prepare(
        model: Model,
        graph: Graph,
        task: Task,
        ablation: Ablation,
        *,
        transcoders: Transcoders | None = None,
        max_memory: int | None = None,
    ) -> FeatureExecutor:
        """Take means if the ablation needs them.

        Raises:
            InputError: model, transcoders, graph and task do not fit together.
        """
        assert isinstance(graph, PooledFeatureGraph)
        found = transcoders_of(graph, transcoders)
        check_transcoders(model, found)
        check_fits(model, graph)
        check_task(model, task)
        if ablation.name == "given":
            raise InputError(
                "circuits of features are ablated by resample, zero, mean or mean_by_position; "
                "outputs cannot be given."
            )
        spans = [name for name in graph.positions or () if name != REST]
        missing = [name for name in spans if name not in task.positions]
        if missing:
            raise InputError(
                f"the circuit is split by the positions {missing}, which the task {task.name!r} "
                f"does "
                "not name."
            )
        task = task.to(model.cfg.device)
        ready = FeatureExecutor(model, found, graph, task, ablation, max_memory)
        return replace(ready, means=ready._means()) if ablation.takes_means else ready

    def logits(self, kept: KeptEdges) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored row."""
        return self.map(kept, lambda logits: logits)

    def map(self, kept: KeptEdges, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of the logits, one circuit at a time."""
        circuits = [self._kept_nodes(row) for row in kept]
        parts = [self._part_logits(self.task[part], circuits) for part in self._parts()]
        logits = torch.cat(parts, dim=1)
        check_finite(logits)
        return torch.cat([function(each[None]) for each in logits])

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """Ignored: nothing is reused from circuit to circuit."""

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """None: a circuit is a run of the model."""
        return 0.0

    def _kept_nodes(self, kept: Bool[Tensor, " edge"]) -> NodeMask | None:
        """The nodes that kept edges touch; None for the model itself."""
        if self.graph.transcoders.whole and bool(kept.all()):
            return None
        touched = torch.zeros(len(self.graph.nodes), dtype=torch.bool)
        touched[self.graph.source[kept]] = True
        touched[self.graph.target[kept]] = True
        return touched

    def _parts(self) -> list[slice]:
        """The prompts in parts that fit into memory."""
        widths = self.transcoders.n_features + self.transcoders.d_model
        prompt_bytes = 12 * self.transcoders.n_layers * widths * self.task.clean.shape[1]
        budget = memory_budget(self.model.cfg.device, self.max_memory, cpu_bytes=CPU_BYTES)
        size = max(1, budget // prompt_bytes)
        return [slice(start, start + size) for start in range(0, len(self.task), size)]

    def _part_logits(
        self, part: Task, circuits: Sequence[NodeMask | None]
    ) -> Float[Tensor, "variant scored vocab"]:
        with frozen(self.model), plain_inputs(self.model), torch.no_grad():
            clean = self._record(part.clean, part)
            replaced = self._replaced(part, clean)
            residuals = [self._run(part, clean, replaced, circuit) for circuit in circuits]
            return torch.stack([unembed(self.model, each[part.scored]) for each in residuals])

    def _replaced(self, part: Task, clean: NodeOutputs) -> NodeOutputs:
        """c_n of every node n."""
        if self.means is not None:
            return self.means.map(lambda mean: mean[:, : part.clean.shape[1]])
        if self.ablation.name == "zero":
            return clean.map(torch.zeros_like)
        return self._record(part.corrupted, part)

    def _record(self, tokens: Int[Tensor, "batch pos"], part: Task) -> NodeOutputs:
        """out_n of every node n when the model runs on these prompts."""
        seen: dict[str, Tensor] = {}
        layers = range(self.transcoders.n_layers)
        names = [EMBEDDING_HOOK, *map(self._read_hook, layers), *map(self._written_hook, layers)]
        hooks = [(name, keeper(seen, name)) for name in names]
        run_to_residual(self.model, tokens, part.mask, hooks)
        inputs = {layer: self._inputs(layer, seen[self._read_hook(layer)]) for layer in layers}
        features = {layer: self._encode(layer, inputs[layer], part) for layer in layers}
        errors = []
        for layer in layers:
            # error = MLP output - transcoder output
            explained = self.transcoders.output(layer, features, inputs[layer])
            errors.append(self._after_leading(seen[self._written_hook(layer)] - explained))
        return NodeOutputs(list(features.values()), errors, seen[EMBEDDING_HOOK])

    def _run(
        self, part: Task, clean: NodeOutputs, replaced: NodeOutputs, circuit: NodeMask | None
    ) -> Stream:
        """The last residual stream of one circuit."""
        self.counts["batches"] += 1
        if circuit is None:
            return run_to_residual(self.model, part.clean, part.mask)
        stays = _Staying.of(self.graph, circuit, part, self.transcoders)
        inputs: dict[int, Tensor] = {}
        features: dict[int, Tensor] = {}
        changes: dict[int, Tensor] = {}  # c_n - out_n of features outside the circuit

        def replace_tokens(embedding: Tensor) -> Tensor:
            return torch.where(stays.tokens[..., None], embedding, replaced.tokens.to(embedding))

        def reader(layer: int) -> Hook:
            def read(residual: Tensor) -> None:
                inputs[layer] = self._inputs(layer, residual)
                features[layer] = self._encode(layer, inputs[layer], part)
                kept = stays.features(layer) & (clean.features[layer] != 0)
                change = replaced.features[layer] - features[layer]
                changes[layer] = self._after_leading(torch.where(kept, 0.0, change))

            return read

        def writer(layer: int) -> Hook:
            def write(output: Tensor) -> Tensor:
                error = output - self.transcoders.output(layer, features, inputs[layer])
                kept = stays.errors(layer)[..., None]
                error_change = torch.where(kept, 0.0, replaced.errors[layer] - error)
                change = self._after_leading(error_change) + self.transcoders.decode(changes, layer)
                return output + change.to(output)

            return write

        layers = range(self.transcoders.n_layers)
        hooks: list[tuple[str, Hook]] = [(EMBEDDING_HOOK, replace_tokens)]
        hooks += [(self._read_hook(layer), reader(layer)) for layer in layers]
        hooks += [(self._written_hook(layer), writer(layer)) for layer in layers]
        return run_to_residual(self.model, part.clean, part.mask, hooks)

    def _read_hook(self, layer: int) -> str:
        return mlp_residual_hook(self.model, layer)

    def _written_hook(self, layer: int) -> str:
        return mlp_output_hook(self.model, layer, before_norm=self.transcoders.writes == "mlp")

    def _inputs(self, layer: int, residual: Stream) -> Stream:
        """What the features of a layer read."""
        weights = ModelWeights(self.model)
        normalized = weights.normalized(layer, residual)
        scale = None if normalized is None else normalized[1]
        norm = weights.linear_norm(layer, "ln2", scale)
        return read_by_features(self.transcoders, norm, residual.to(compute_dtype(self.model)))[1]

    def _encode(self, layer: int, inputs: Stream, part: Task) -> Activations:
        return self._after_leading(self.transcoders.encode(layer, inputs, part.mask))

    def _after_leading(self, values: Tensor) -> Tensor:
        """Set values to 0, in place, at the leading positions, which have no features or errors."""
        values[:, : self.graph.transcoders.leading] = 0
        return values

    def _means(self) -> NodeOutputs:
        """Means over all prompts, padding left out."""
        total: NodeOutputs | None = None
        n_tokens = n_later = torch.zeros((), device=self.model.cfg.device)
        axes = (0, 1) if self.ablation.name == "mean" else (0,)
        for prompts in self._parts():
            part = self.task[prompts]
            tokens = part.clean if self.ablation.over == "clean" else part.corrupted
            with frozen(self.model), plain_inputs(self.model), torch.no_grad():
                outputs = self._record(tokens, part)
            real, later = self._real_tokens(part)
            sums = outputs.map(_weighted_sum(later, axes), tokens=_weighted_sum(real, axes))
            n_tokens = n_tokens + real.sum(axes, keepdim=True)
            n_later = n_later + later.sum(axes, keepdim=True)
            total = sums if total is None else total + sums
        assert total is not None
        length = self.task.clean.shape[1]
        return total.map(
            lambda value: (value / n_later.clamp(min=1)).expand(1, length, -1),
            tokens=lambda value: (value / n_tokens.clamp(min=1)).expand(1, length, -1),
        )

    def _real_tokens(self, part: Task) -> tuple[Float[Tensor, "batch pos 1"], ...]:
        """1 at real tokens; and at those after the leading positions, since features and errors do
        not exist there and must not count in their means.
        """
        positions = torch.arange(part.mask.shape[1], device=part.mask.device)
        is_later = positions >= self.graph.transcoders.leading
        masks = (part.mask, part.mask & is_later)
        return tuple(mask.to(compute_dtype(self.model))[..., None] for mask in masks)


def _weighted_sum(weights: Tensor, axes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda value: (value * weights).sum(axes, keepdim=True)


@dataclass(frozen=True, eq=False)
class _Staying:
    """Where each node of a circuit stays on some prompts.

    Attributes:
        spans: the span of each position; zeros in a graph without positions.
        feature_spans: by layer, whether each feature stays at a span.
        error_spans: whether each layer's error stays at a span.
        tokens: where token embeddings stay.
    """

    spans: Int[Tensor, "batch pos"]
    feature_spans: Sequence[Bool[Tensor, "span feature"]]
    error_spans: Bool[Tensor, "layer span"]
    tokens: Bool[Tensor, "batch pos"]

    @staticmethod
    def of(graph: Graph, circuit: NodeMask, part: Task, transcoders: Transcoders) -> _Staying:
        """Spread the nodes of a circuit over the positions of each prompt."""
        device, names = part.clean.device, graph.positions or (None,)
        n_layers, n_spans = transcoders.n_layers, len(names)
        features = torch.zeros(n_layers, n_spans, transcoders.n_features, dtype=torch.bool)
        errors = torch.zeros(n_layers, n_spans, dtype=torch.bool)
        tokens = torch.zeros(n_spans, dtype=torch.bool)
        for number in circuit.nonzero().flatten().tolist():
            match graph.nodes[number]:
                case Feature(layer=layer, index=index, position=position):
                    features[layer, names.index(position), index] = True
                case Error(layer=layer, position=position):
                    errors[layer, names.index(position)] = True
                case TokenEmbed(position=position):
                    tokens[names.index(position)] = True
        if graph.positions is None:
            spans = torch.zeros(part.clean.shape, dtype=torch.long)
        else:
            spans = spans_of(part.positions, tuple(map(str, names)))
        return _Staying(
            spans.to(device), list(features.to(device)), errors.to(device), tokens[spans].to(device)
        )

    def features(self, layer: int) -> Bool[Tensor, "batch pos feature"]:
        return self.feature_spans[layer][self.spans]

    def errors(self, layer: int) -> Bool[Tensor, "batch pos"]:
        return self.error_spans[layer][self.spans]

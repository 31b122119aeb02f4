"""Run circuits of transcoder features: all outside the circuit is ablated, nothing is frozen.

A circuit keeps the nodes that its edges touch, and with a node all its occurrences in a prompt. At
every position the output of layer l's MLP becomes

    MLP_l(x) + sum over the nodes n outside the circuit that write there of  c_n - out_n(x)

with out_n(x) what the node writes in this run (a feature's activation times its decoder rows, or
the error) and c_n what it writes on the corrupted prompt, zero, or its mean. Biases and skip
connections stay as they are. Token embeddings outside the circuit are replaced in the same way.

A feature that is inactive on the clean prompt is in no circuit, with one exception: the circuit
that keeps every edge of a graph with all active features is the model itself. With one edge less,
such features take their values on the corrupted prompt, so curves over sizes jump at their last
point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution.local_model import (
    check_transcoders,
    compute_dtype,
    norm_at,
    read_by_features,
)
from circuits.attribution.pooling import spans_of
from circuits.graph.graph import EdgeMask, Graph, PooledFeatureGraph
from circuits.graph.nodes import Error, Feature, Node, TokenEmbed
from circuits.models import (
    Hook,
    Model,
    check_fits,
    frozen,
    mlp_output_hook,
    mlp_residual_hook,
    output_hook,
    plain_inputs,
    run_to_residual,
    shape_of,
    unembed,
)
from circuits.models.component_graph import REST
from circuits.running.ablation import NAMES, Ablation, add_sums, mean_of
from circuits.running.settings import NO_RUNS, Counts, OfLogits, VariantLogits
from circuits.running.variants import KeptEdges, Variants
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.tasks.metrics import check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.transcoder import Transcoders

CPU_BYTES = 1 << 30

Circuit = Sequence[Node]
Hooks = Sequence[tuple[str, Hook]]
Tokens = Int[Tensor, "batch pos"]
Stream = Float[Tensor, "batch pos d_model"]

Part = tuple[type[Node], int]
"""The features or the errors of a layer, or the token embeddings (of layer 0)."""

NodeOutputs = dict[Part, Float[Tensor, "#batch #pos _"]]
"""Activations of features; errors, before a norm that follows them; and token embeddings."""

NodePlaces = dict[Part, Bool[Tensor, "batch pos _"]]
"""At which positions nodes stay."""

TOKENS: Part = (TokenEmbed, 0)


def transcoders_of(graph: PooledFeatureGraph, given: Transcoders | None) -> Transcoders:
    """The transcoders whose features are a graph's nodes: those given, or those the graph names."""
    made_with = graph.transcoders
    if given is None and not made_with.source:
        raise InputError(
            f"the graph's transcoders {made_with.name!r} were not loaded from a file; hand them "
            "over with transcoders=."
        )
    found = load_transcoders(made_with.source) if given is None else given
    if found.identity.weights != made_with.weights:
        where = f" in {made_with.source}" if given is None else ""
        raise InputError(
            f"the transcoders {found.name!r}{where} have other weights than those the graph was "
            f"made with ({made_with.name!r})."
        )
    return found


def _check_usable(graph: Graph, task: Task, ablation: Ablation) -> None:
    """Refuse prompts, ablations and positions that circuits of features cannot be run with."""
    if task.alignment is not None and ablation.name == "resample":
        raise InputError(
            f"circuits of features need corrupted prompts of the lengths of the clean ones, "
            f"which task {task.name!r} has not; ablate by zero or mean."
        )
    if ablation.name == "given":
        raise InputError(
            f"circuits of features are ablated by {', '.join(NAMES)}; outputs cannot be given."
        )
    named = {REST, *task.positions}
    missing = [name for name in graph.positions or () if name not in named]
    if missing:
        raise InputError(
            f"the circuit is split by the positions {missing}, which the task {task.name!r} "
            "does not name."
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
    counts: Counts = field(default_factory=NO_RUNS.copy)

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
        """Check that all fits together, and take means if the ablation needs them."""
        assert isinstance(graph, PooledFeatureGraph)
        found = transcoders_of(graph, transcoders)
        check_transcoders(model, found)
        check_fits(model, graph)
        check_task(model, task)
        _check_usable(graph, task, ablation)
        task = task.to(shape_of(model).device)
        executor = FeatureExecutor(model, found, graph, task, ablation, max_memory)
        if not ablation.takes_means:
            return executor
        with frozen(model), plain_inputs(model), torch.no_grad():
            return replace(executor, means=executor._means())

    def logits(self, kept: KeptEdges) -> VariantLogits:
        """Logits of every circuit at every scored row."""
        return self.map(Variants.of(kept), lambda logits: logits)

    def map(self, variants: Variants, function: OfLogits) -> Tensor:
        """`function` of the logits, one circuit at a time."""
        circuits = [*map(self._kept_nodes, variants.dense())]
        with frozen(self.model), plain_inputs(self.model), torch.no_grad():
            tasks = self._parts(self.task)
            parts = [self._part_logits(prompts, circuits) for prompts in tasks]
        logits = torch.cat(parts, dim=1)
        check_finite(logits, self.model)
        return torch.cat([function(each[None]) for each in logits])

    def near(self, kept: EdgeMask) -> None:
        """Ignored: nothing is reused from circuit to circuit."""

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """None: a circuit is a run of the model."""
        return 0.0

    def _kept_nodes(self, kept: EdgeMask) -> Circuit | None:
        """The nodes that kept edges touch; None for the model itself."""
        # With all active features among its nodes, the whole graph leaves nothing to replace.
        if self.graph.transcoders.whole and kept.all():
            return None
        graph = self.graph
        ends = [graph.source[kept], graph.target[kept]]
        numbers = torch.cat(ends).unique().tolist()
        return [graph.nodes[index] for index in numbers]

    def _parts(self, task: Task) -> list[Task]:
        """The prompts of a task in parts that fit into memory."""
        # Features and errors in float32 on the clean prompts, as replaced, and in the circuit.
        shape = self.transcoders
        widths = shape.n_features + shape.d_model
        length = task.clean.shape[1]
        prompt_bytes = 12 * shape.n_layers * widths * length
        budget = memory_budget(shape_of(self.model).device, self.max_memory, cpu_bytes=CPU_BYTES)
        size = max(1, budget // prompt_bytes)
        return [task[start : start + size] for start in range(0, len(task), size)]

    def _part_logits(self, prompts: Task, circuits: Sequence[Circuit | None]) -> VariantLogits:
        clean = _Run(self, prompts)
        # Without a replacement this run is that of the whole model.
        whole = clean.residual(prompts.clean)
        replacing = self._replacing(prompts, clean.outputs)
        logits = []
        for circuit in circuits:
            residual = whole
            if circuit is not None:
                staying = self._staying(prompts, circuit, clean.outputs)
                run = _Run(self, prompts, staying, replacing)
                residual = run.residual(prompts.clean)
            scored = residual[prompts.scored]
            logits.append(unembed(self.model, scored))
        self.counts["batches"] += len(circuits)
        return torch.stack(logits)

    def _replacing(self, prompts: Task, clean: NodeOutputs) -> NodeOutputs:
        """c_n of every node n."""
        if self.means is not None:
            return self.means
        if self.ablation.name == "zero":
            return {part: torch.zeros_like(value) for part, value in clean.items()}
        tokens, hooks = self.ablation.counterfactual_run(self.model, prompts)
        corrupted = _Run(self, prompts)
        corrupted.residual(tokens, hooks)
        return corrupted.outputs

    def _staying(self, prompts: Task, circuit: Circuit, clean: NodeOutputs) -> NodePlaces:
        """Where the nodes of a circuit write out_n; elsewhere they write c_n."""
        spans = torch.zeros_like(prompts.clean)
        if self.graph.positions is not None:
            names = tuple(map(str, self.graph.positions))
            spans = spans_of(prompts.positions, names).to(spans)
        by_span = self._by_span(circuit)
        staying = {part: nodes[spans] for part, nodes in by_span.items()}
        # A feature that is inactive on the clean prompt is in no circuit.
        for layer in range(self.transcoders.n_layers):
            staying[Feature, layer] &= clean[Feature, layer] != 0
        return staying

    def _by_span(self, circuit: Circuit) -> dict[Part, Bool[Tensor, "span _"]]:
        """The nodes of a circuit."""
        spans = self.graph.positions or (None,)
        n_layers, n_spans = self.transcoders.n_layers, len(spans)
        # Written in numpy and moved once: on a GPU each node would be an operation of its own.
        features = np.zeros((n_layers, n_spans, self.transcoders.n_features), dtype=bool)
        errors = np.zeros((n_layers, n_spans, 1), bool)
        tokens = np.zeros((n_spans, 1), bool)
        for node in circuit:
            match node:
                case Feature(layer, index, position):
                    features[layer, spans.index(position), index] = True
                case Error(layer, position):
                    errors[layer, spans.index(position)] = True
                case TokenEmbed(position):
                    tokens[spans.index(position)] = True
        device = shape_of(self.model).device
        found: dict[Part, Bool[Tensor, "span _"]] = {TOKENS: torch.from_numpy(tokens).to(device)}
        for kind, by_layer in (Feature, features), (Error, errors):
            moved = torch.from_numpy(by_layer).to(device)
            found |= {(kind, layer): nodes for layer, nodes in enumerate(moved)}
        return found

    def _means(self) -> NodeOutputs:
        """Means over all prompts, padding left out."""
        axes = self.ablation.axes
        n_tokens = self.task.clean.shape[1]
        averaged = self.ablation.averaged(self.model, self.task)
        sums: NodeOutputs = {}
        for prompts in self._parts(averaged):
            run = _Run(self, prompts)
            run.residual(prompts.clean)
            add_sums(sums, run.outputs, prompts.mask, axes)
        # The leading positions have no features and errors, so they do not count in their means.
        later = averaged.mask.clone()
        later[:, : self.graph.transcoders.leading] = False
        means = {}
        for part, total in sums.items():
            counted = averaged.mask if part == TOKENS else later
            means[part] = mean_of(total, counted, axes, n_tokens)
        return means


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of the model, in which what nodes write is recorded and some of it replaced.

    Attributes:
        staying: where nodes write out_n.
        replacing: c_n, which they write elsewhere; without it nothing is replaced.
        outputs: out_n of every node n so far.
        inputs: what the features of each layer read.
        features: their activations.
        changes: of these activations, c_n - out_n where they are replaced.
    """

    executor: FeatureExecutor
    prompts: Task
    staying: NodePlaces = field(default_factory=dict)
    replacing: NodeOutputs = field(default_factory=dict)
    outputs: NodeOutputs = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)

    def residual(self, tokens: Tokens, hooks: Hooks = ()) -> Stream:
        """Run the model, under more hooks; return the residual stream after the last layer."""
        model, transcoders = self.executor.model, self.executor.transcoders
        before_norm = transcoders.writes == "mlp"
        embedding = output_hook(TokenEmbed())
        all_hooks = [*hooks, (embedding, self.embed)]
        for layer in range(transcoders.n_layers):
            writes = mlp_output_hook(model, layer, before_norm=before_norm)
            reads = mlp_residual_hook(model, layer)
            all_hooks.append((reads, partial(self.read, layer)))
            all_hooks.append((writes, partial(self.write, layer)))
        return run_to_residual(model, tokens, self.prompts.mask, all_hooks)

    def embed(self, embedding: Stream) -> Stream:
        self.outputs[TOKENS] = embedding
        if not self.replacing:
            return embedding
        replacing = self.replacing[TOKENS].to(embedding)
        return torch.where(self.staying[TOKENS], embedding, replacing)

    def read(self, layer: int, residual: Stream) -> None:
        inputs = self._feature_inputs(layer, residual)
        self.inputs[layer] = inputs
        active = self.executor.transcoders.encode(layer, inputs, self.prompts.mask)
        self.features[layer] = self._after_leading(active)
        self.changes[layer] = self._change((Feature, layer), active)

    def _feature_inputs(self, layer: int, residual: Stream) -> Stream:
        model = self.executor.model
        norm = norm_at(model, layer, "ln2", residual)
        stream = residual.to(compute_dtype(model))
        _, inputs = read_by_features(self.executor.transcoders, norm, stream)
        return inputs

    def write(self, layer: int, output: Stream) -> Stream:
        transcoders = self.executor.transcoders
        explained = transcoders.output(layer, self.features, self.inputs[layer])
        # error = MLP output - transcoder output
        error = self._after_leading(output - explained)
        change = self._change((Error, layer), error)
        if not self.replacing:
            return output
        change = change + transcoders.decode(self.changes, layer)
        return output + change.to(output)

    def _change(self, part: Part, own: Tensor) -> Tensor:
        """c_n - out_n of nodes outside the circuit, and 0 of the others."""
        self.outputs[part] = own
        if not self.replacing:
            return own
        # c_n - out_n
        change = self.replacing[part] - own
        change = change.masked_fill_(self.staying[part], 0)
        return self._after_leading(change)

    def _after_leading(self, values: Tensor) -> Tensor:
        """Set values to 0, in place, at the leading positions, which have no features or errors."""
        leading = self.executor.graph.transcoders.leading
        values[:, :leading] = 0
        return values

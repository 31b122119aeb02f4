"""Running circuits of features: the model computes, with every feature, error and token outside the circuit ablated. Nothing is frozen.

A circuit keeps the nodes that its edges touch; in each prompt every instance of a kept node stays. At every position the output of layer l's MLP
becomes

    MLP_l(x) + sum over nodes outside the circuit that write there: c - out(x)

out(x) is what the node writes in this very run (a feature's activation times its decoder rows, or the error) and c what it writes on the
corrupted prompt, zero, or its mean. Biases and skips stay as they are. Token embeddings outside the circuit are replaced likewise.
Features that are inactive on the clean prompt are outside every circuit but one: a circuit that keeps every edge of a graph with all active features
is the model itself. With a single edge less, such features take their values on the corrupted prompt, so curves over sizes jump at their last point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution.local_model import check_transcoders, read_by_features, wide
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


def transcoders_of(graph: PooledFeatureGraph, given: Transcoders | None) -> Transcoders:
    """The transcoders whose features are a graph's nodes: those handed over, or those the graph remembers.

    Raises:
        InputError: they are not the ones the graph was made with, or cannot be found again.
    """
    who = graph.transcoders
    if given is None and not who.source:
        raise InputError(
            f"the graph's transcoders {who.name!r} were not loaded from a file; hand them over with transcoders=."
        )
    found = load_transcoders(who.source) if given is None else given
    if found.identity.weights != who.weights:
        where = f" in {who.source}" if given is None else ""
        raise InputError(
            f"the transcoders {found.name!r}{where} have other weights than those the graph was made with ({who.name!r})."
        )
    return found


@dataclass(frozen=True, eq=False)
class Recorded:
    """What features, errors and tokens write on some prompts, or what replaces it.

    Attributes:
        features: activations, by layer.
        errors: by layer, before a norm after the MLP where transcoders write there.
        tokens: the token embeddings.
    """

    features: Sequence[Float[Tensor, "batch pos feature"]]
    errors: Sequence[Float[Tensor, "batch pos d_model"]]
    tokens: Float[Tensor, "batch pos d_model"]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Recorded:
        """The same with a function of every tensor."""
        return Recorded(
            [function(part) for part in self.features],
            [function(part) for part in self.errors],
            function(self.tokens),
        )


@dataclass(frozen=True, eq=False)
class FeatureExecutor:
    """Runs circuits of one graph of features on one task.

    Attributes:
        leading: at so many first positions there are no features.
        means: of the ablation, taken once over all prompts.
        counts: of model runs.
    """

    model: Model
    transcoders: Transcoders
    graph: PooledFeatureGraph
    task: Task
    ablation: Ablation
    leading: int
    max_memory: int | None = None
    means: Recorded | None = None
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
        """Take means where the ablation needs them.

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
                "circuits of features are ablated by resample, zero, mean or mean_by_position; outputs cannot be given."
            )
        if graph.positions is not None and (
            missing := [
                name for name in graph.positions if name != REST and name not in task.positions
            ]
        ):
            raise InputError(
                f"the circuit is split by the positions {missing}, which the task {task.name!r} does not name."
            )
        ready = FeatureExecutor(
            model,
            found,
            graph,
            task.to(model.cfg.device),
            ablation,
            graph.transcoders.leading,
            max_memory,
        )
        return ready._with_means() if ablation.name.startswith("mean") else ready

    def logits(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored row."""
        return self.map(kept, lambda logits: logits)

    def map(
        self, kept: Bool[Tensor, "variant edge"], function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`function` of the logits, one circuit at a time."""
        nodes = [None if self._is_model(row) else self._touched(row) for row in kept]
        pieces = [
            self._piece(slice(start, start + self._prompts_at_once), nodes)
            for start in range(0, len(self.task), self._prompts_at_once)
        ]
        logits = torch.cat(pieces, 1)
        check_finite(logits)
        return torch.cat([function(one[None]) for one in logits])

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """Nothing is kept between circuits."""

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """A circuit is a run of the model."""
        return 0.0

    def _is_model(self, kept: Bool[Tensor, " edge"]) -> bool:
        return self.graph.transcoders.whole and bool(kept.all())

    def _touched(self, kept: Bool[Tensor, " edge"]) -> Bool[Tensor, " node"]:
        """The nodes that kept edges touch."""
        touched = torch.zeros(len(self.graph.nodes), dtype=torch.bool)
        touched[self.graph.source[kept]] = True
        touched[self.graph.target[kept]] = True
        return touched

    @property
    def _prompts_at_once(self) -> int:
        per_token = (
            12
            * self.transcoders.n_layers
            * (self.transcoders.n_features + self.transcoders.d_model)
        )
        budget = memory_budget(self.model.cfg.device, self.max_memory, cpu_bytes=CPU_BYTES)
        return max(1, budget // (per_token * self.task.clean.shape[1]))

    def _piece(
        self, prompts: slice, circuits: Sequence[Bool[Tensor, " node"] | None]
    ) -> Float[Tensor, "variant scored vocab"]:
        piece = self.task[prompts]
        with frozen(self.model), plain_inputs(self.model), torch.no_grad():
            clean = self._record(piece.clean, piece)
            replaced = self._replaced(piece, clean)
            residuals = [self._run(piece, clean, replaced, circuit) for circuit in circuits]
            return torch.stack(
                [unembed(self.model, residual[piece.scored]) for residual in residuals]
            )

    def _replaced(self, piece: Task, clean: Recorded) -> Recorded:
        match self.ablation.name:
            case "resample":
                return self._record(piece.corrupted, piece)
            case "zero":
                return clean.mapped(torch.zeros_like)
        assert self.means is not None
        return self.means.mapped(lambda mean: mean[:, : piece.clean.shape[1]])

    def _record(self, tokens: Int[Tensor, "batch pos"], piece: Task) -> Recorded:
        """What features, errors and tokens write when the model runs on these prompts."""
        seen: dict[str, Tensor] = {}
        layers = range(self.transcoders.n_layers)
        names = [output_hook(TokenEmbed())] + [
            hook(layer) for layer in layers for hook in (self._reads, self._writes)
        ]
        run_to_residual(
            self.model, tokens, piece.mask, [(name, keeper(seen, name)) for name in names]
        )
        inputs = {layer: self._inputs(layer, seen[self._reads(layer)]) for layer in layers}
        features = {layer: self._encode(layer, inputs[layer], piece) for layer in layers}
        errors = [
            seen[self._writes(layer)] - self.transcoders.output(layer, features, inputs[layer])
            for layer in layers
        ]
        for error in errors:
            error[:, : self.leading] = 0
        return Recorded(list(features.values()), errors, seen[output_hook(TokenEmbed())])

    def _run(
        self,
        piece: Task,
        clean: Recorded,
        replaced: Recorded,
        circuit: Bool[Tensor, " node"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The last residual stream of one circuit."""
        self.counts["batches"] += 1
        if circuit is None:
            return run_to_residual(self.model, piece.clean, piece.mask)
        keep = self._kept(piece, circuit)
        inputs: dict[int, Tensor] = {}
        features: dict[int, Tensor] = {}
        changes: dict[int, Tensor] = {}

        def tokens(embedding: Tensor) -> Tensor:
            return torch.where(keep.tokens[..., None], embedding, replaced.tokens.to(embedding))

        def reader(layer: int) -> Hook:
            def read(residual: Tensor) -> None:
                inputs[layer] = self._inputs(layer, residual)
                features[layer] = self._encode(layer, inputs[layer], piece)
                stays = keep.features(layer) & (clean.features[layer] != 0)
                changes[layer] = torch.where(stays, 0.0, replaced.features[layer] - features[layer])
                changes[layer][:, : self.leading] = 0

            return read

        def writer(layer: int) -> Hook:
            def write(output: Tensor) -> Tensor:
                error = output - self.transcoders.output(layer, features, inputs[layer])
                gone = torch.where(
                    keep.errors(layer)[..., None], 0.0, replaced.errors[layer] - error
                )
                gone[:, : self.leading] = 0
                return output + (gone + self.transcoders.decode(changes, layer)).to(output)

            return write

        layers = range(self.transcoders.n_layers)
        hooks: list[tuple[str, Hook]] = [(output_hook(TokenEmbed()), tokens)]
        hooks += [(self._reads(layer), reader(layer)) for layer in layers] + [
            (self._writes(layer), writer(layer)) for layer in layers
        ]
        return run_to_residual(self.model, piece.clean, piece.mask, hooks)

    def _kept(self, piece: Task, circuit: Bool[Tensor, " node"]) -> _Kept:
        return _Kept.of(self.graph, circuit, piece, self.transcoders)

    def _reads(self, layer: int) -> str:
        return mlp_residual_hook(self.model, layer)

    def _writes(self, layer: int) -> str:
        return mlp_output_hook(self.model, layer, before_norm=self.transcoders.writes == "mlp")

    def _inputs(
        self, layer: int, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        parts = ModelWeights(self.model)
        normalized = parts.normalized(layer, residual)
        norm = parts.linear_norm(layer, "ln2", None if normalized is None else normalized[1])
        return read_by_features(self.transcoders, norm, residual.to(wide(self.model)))[1]

    def _encode(
        self, layer: int, inputs: Float[Tensor, "batch pos d_model"], piece: Task
    ) -> Float[Tensor, "batch pos feature"]:
        activations = self.transcoders.encode(layer, inputs, piece.mask)
        activations[:, : self.leading] = 0
        return activations

    def _with_means(self) -> FeatureExecutor:
        """Means over all prompts, of the clean or the corrupted ones, padding left out."""
        total, counts = None, [torch.zeros((), device=self.model.cfg.device)] * 2
        axes = (0, 1) if self.ablation.name == "mean" else (0,)
        for start in range(0, len(self.task), self._prompts_at_once):
            piece = self.task[start : start + self._prompts_at_once]
            with frozen(self.model), plain_inputs(self.model), torch.no_grad():
                part = self._record(
                    piece.clean if self.ablation.over == "clean" else piece.corrupted, piece
                )
            # There are no features and errors at the leading positions, which do not count in their means.
            late = piece.mask & (
                torch.arange(piece.mask.shape[1], device=piece.mask.device) >= self.leading
            )
            everywhere, later = (
                weight.to(wide(self.model))[..., None] for weight in (piece.mask, late)
            )
            summed = Recorded(
                [(value * later).sum(axes, keepdim=True) for value in part.features],
                [(value * later).sum(axes, keepdim=True) for value in part.errors],
                (part.tokens * everywhere).sum(axes, keepdim=True),
            )
            counts = [
                count + weight.sum(axes, keepdim=True)
                for count, weight in zip(counts, (later, everywhere), strict=True)
            ]
            total = summed if total is None else _added(total, summed)
        assert total is not None
        of_features, of_tokens = (count.clamp(min=1) for count in counts)
        length = self.task.clean.shape[1]
        return replace(
            self,
            means=Recorded(
                [(value / of_features).expand(1, length, -1) for value in total.features],
                [(value / of_features).expand(1, length, -1) for value in total.errors],
                (total.tokens / of_tokens).expand(1, length, -1),
            ),
        )


def _added(a: Recorded, b: Recorded) -> Recorded:
    return Recorded(
        [x + y for x, y in zip(a.features, b.features, strict=True)],
        [x + y for x, y in zip(a.errors, b.errors, strict=True)],
        a.tokens + b.tokens,
    )


@dataclass(frozen=True, eq=False)
class _Kept:
    """Where each node of a circuit stays, on some prompts.

    Attributes:
        by_span: for features, whether each is kept at a span, by layer.
        spans: the number of the span of each position; zeros in a graph without positions.
        error_by_span: likewise for errors.
        tokens: where token embeddings stay.
    """

    by_span: Sequence[Bool[Tensor, "span feature"]]
    error_by_span: Bool[Tensor, "layer span"]
    spans: Int[Tensor, "batch pos"]
    tokens: Bool[Tensor, "batch pos"]

    @staticmethod
    def of(
        graph: Graph, circuit: Bool[Tensor, " node"], piece: Task, transcoders: Transcoders
    ) -> _Kept:
        """Spread the nodes of a circuit over the positions of each prompt."""
        device, names = piece.clean.device, graph.positions or (None,)
        layers, features = transcoders.n_layers, transcoders.n_features
        by_span = torch.zeros(layers, len(names), features, dtype=torch.bool)
        errors, tokens = (
            torch.zeros(layers, len(names), dtype=torch.bool),
            torch.zeros(len(names), dtype=torch.bool),
        )
        for number in circuit.nonzero().flatten().tolist():
            match graph.nodes[number]:
                case Feature(layer=layer, index=index, position=position):
                    by_span[layer, names.index(position), index] = True
                case Error(layer=layer, position=position):
                    errors[layer, names.index(position)] = True
                case TokenEmbed(position=position):
                    tokens[names.index(position)] = True
        if graph.positions is None:
            spans = torch.zeros(piece.clean.shape, dtype=torch.long)
        else:
            spans = spans_of(piece.positions, tuple(str(name) for name in graph.positions))
        return _Kept(
            list(by_span.to(device)), errors.to(device), spans.to(device), tokens[spans].to(device)
        )

    def features(self, layer: int) -> Bool[Tensor, "batch pos feature"]:
        """Where each feature of a layer stays."""
        return self.by_span[layer][self.spans]

    def errors(self, layer: int) -> Bool[Tensor, "batch pos"]:
        """Where a layer's error stays."""
        return self.error_by_span[layer][self.spans]

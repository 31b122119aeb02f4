"""Gradients times differences: the engine under EAP and EAP-IG.

score(u -> r) = sum over positions and d_model of (c_u - out_u(clean)) * d damage / d x_r,  where damage is the metric's mean over scored
rows with its direction's sign. It is the predicted damage of ablating the edge.

Two forward passes and one backward pass make one point's scores: the clean run gives outputs, logits and gradients, the corrupted one the
counterfactuals. See `gradients` for the passes and `edge_products` for the products.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.gradients.edge_products import BatchProducts, EdgeProducts, Needed
from circuits.discovery.gradients.gradient_pass import (
    Gradients,
    gradient_pass,
    is_embedding,
    written_hook,
)
from circuits.graph.graph import Graph
from circuits.graph.nodes import MLP, Head, Node, PosEmbed, TokenEmbed
from circuits.models import Model, frozen, output_hook, unembed
from circuits.models.component_graph import check_supported, component_nodes
from circuits.models.source_outputs import SourceOutputs, output_groups, run_and_record
from circuits.running.ablation import Ablation, Changes, Counterfactuals, get_ablation
from circuits.system.errors import InputError
from circuits.system.memory import AllocationMeter, memory_budget, shrinking
from circuits.system.ranks import SharedError, gathered, share
from circuits.tasks.metrics import Metric, check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task

# Below this, per scored row, a gradient is rounding noise: probabilities and logits are of order one.
VANISHING = 1e-6
# Gradients of so many points are multiplied by the changes together: more take more memory, fewer more products.
POINTS_TOGETHER = 5
# On a CPU, where the weights are read anew for every batch.
CPU_BYTES = 1 << 32
# A batch may take so much more than was asked for before it counts as one that does not fit.
SLACK = 1.2


@dataclass(frozen=True)
class GradientPoint:
    """Where a gradient is taken: what `nodes` write is moved to counterfactual + fraction * (clean - counterfactual), the rest follows.

    An empty `nodes` means the embeddings.
    """

    fraction: float
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """What one score per edge cannot hold. All entries are predicted damage; sums over prompts are weighted by their scored rows.

    Attributes:
        graph: the edges.
        nodes: the sources, one per row below.
        rows: scored rows of each prompt.
        edges_by_prompt: damage on each prompt's rows; its mean, weighted by `rows`, is the score.
        sources_by_position: of ablating all outgoing edges of a source at one position, by prompt.
        neurons: of ablating all outgoing edges of one coordinate of a source's output.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    rows: Int[Tensor, " prompt"]
    edges_by_prompt: Float[Tensor, "prompt edge"]
    sources_by_position: Float[Tensor, "prompt source pos"]
    neurons: Float[Tensor, "source d_model"]

    @property
    def edges(self) -> Float[Tensor, " edge"]:
        """The score of each edge."""
        return self._mean(self.edges_by_prompt)

    def node_scores(self) -> dict[Node, float]:
        """The sum of each node's outgoing edges, for every node that has any."""
        sums = torch.zeros(len(self.graph.nodes), dtype=torch.float64).index_add_(
            0, self.graph.source, self.edges.double()
        )
        return {
            self.graph.nodes[index]: float(sums[index])
            for index in self.graph.source.unique().tolist()
        }

    def heads(self) -> Float[Tensor, "layer head"]:
        """Scores of heads, all positions together."""
        scores = {
            node: score
            for node, score in zip(
                self.nodes, self._mean(self.sources_by_position).sum(-1), strict=True
            )
            if isinstance(node, Head)
        }
        layers, heads = (
            max((getattr(node, name) for node in scores), default=-1) + 1
            for name in ("layer", "head")
        )
        result = torch.zeros(layers, heads)
        for node, score in scores.items():
            result[node.layer, node.head] = score
        return result

    def layers(self) -> Float[Tensor, "layer 2"]:
        """Scores of each layer: its heads together, and its MLP."""
        result = torch.zeros(
            max((node.layer for node in self.nodes if isinstance(node, Head | MLP)), default=-1)
            + 1,
            2,
        )
        for node, score in zip(
            self.nodes, self._mean(self.sources_by_position).sum(-1), strict=True
        ):
            if isinstance(node, Head | MLP):
                result[node.layer, int(isinstance(node, MLP))] += score
        return result

    def bootstrap(self, samples: int, *, seed: int = 0) -> Float[Tensor, "sample edge"]:
        """Scores on `samples` draws of the prompts with replacement; no model is run."""
        draws = torch.randint(
            len(self.rows), (samples, len(self.rows)), generator=torch.Generator().manual_seed(seed)
        )
        weights = torch.zeros(samples, len(self.rows)).scatter_add_(
            1, draws, self.rows[draws].float()
        )
        return (weights / weights.sum(1, keepdim=True)) @ self.edges_by_prompt

    def _mean(self, by_prompt: Float[Tensor, " prompt *rest"]) -> Float[Tensor, "*rest"]:
        return torch.tensordot(self.rows.to(by_prompt.dtype) / self.rows.sum(), by_prompt, dims=1)


def attribute_edges(
    model: Model,
    graph: Graph,
    task: Task,
    *,
    metric: Metric,
    ablation: str | Ablation,
    points: Sequence[GradientPoint],
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EdgeAttribution:
    """Scores from the mean of the gradients at `points`, with all their details.

    Args:
        max_memory: bytes that this may allocate on the model's device, to within a fifth; None chooses from what is free.

    Raises:
        InputError: the model, graph and task do not fit together; the metric has no gradient, or one that vanishes at every point; not
            even one prompt fits into `max_memory`.
    """
    sums = _joined(
        lambda: _sums(
            model, graph, task, metric, ablation, points, max_memory, progress, details=True
        ),
        metric,
        details=True,
    )
    rows = torch.bincount(task.row_prompt.cpu(), minlength=len(task))
    weights = rows * len(points)
    return EdgeAttribution(
        graph=graph,
        nodes=component_nodes(
            model, any(isinstance(node, TokenEmbed | PosEmbed) for node in graph.nodes)
        ),
        rows=rows,
        edges_by_prompt=sums.edges.div_(weights[:, None]),
        sources_by_position=sums.positions.div_(weights[:, None, None]),
        neurons=sums.neurons.div_(weights.sum()),
    )


def score_edges(
    model: Model,
    graph: Graph,
    task: Task,
    *,
    metric: Metric,
    ablation: str | Ablation,
    points: Sequence[GradientPoint],
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, " edge"]:
    """The scores alone; arguments and errors are those of `attribute_edges`."""
    sums = _joined(
        lambda: _sums(
            model, graph, task, metric, ablation, points, max_memory, progress, details=False
        ),
        metric,
        details=False,
    )
    return sums.edges[0] / (len(task.row_prompt) * len(points))


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over scored rows and points, on the CPU; without details only those of edges, over all prompts."""

    edges: Float[Tensor, "row edge"]
    positions: Float[Tensor, "prompt node pos"]
    neurons: Float[Tensor, "node d_model"]

    @staticmethod
    def start(products: EdgeProducts, task: Task, prompts: int) -> _Sums:
        """Zeros, for so many prompts of the task."""
        prompts, nodes = (prompts, products.layout.shape[2]) if products.details else (0, 0)
        return _Sums(
            torch.zeros(prompts if products.details else 1, len(products.graph)),
            torch.zeros(prompts, nodes, task.clean.shape[1]),
            torch.zeros(nodes, products.model.cfg.d_model),
        )

    def add(self, batch: BatchProducts, prompts: slice) -> None:
        if not batch.of.details:
            self.edges.add_(batch.by_edge())
            return
        self.edges[prompts] = batch.by_edge()
        self.positions[prompts] = batch.positions.transpose(0, 1).float().cpu()
        self.neurons.add_(batch.neurons.float().cpu())


def _joined(measure: Callable[[], tuple[_Sums, float]], metric: Metric, *, details: bool) -> _Sums:
    """The sums over all prompts, each rank having measured those of its share.

    Raises:
        InputError: the metric's gradient vanishes everywhere.
    """

    def tensors() -> list[Tensor]:
        sums, steepest = measure()
        return [
            sums.edges,
            sums.positions,
            sums.neurons[None],
            torch.tensor([steepest], dtype=torch.float64),
        ]

    edges, positions, neurons, slopes = gathered(tensors)
    if (steepest := float(slopes.max())) < VANISHING:
        raise SharedError(
            f"the gradient of {metric.name} vanishes where it is taken (largest entry {steepest:.1e}), as that of kl does at the clean run: "
            "use gradient_at='corrupted' or 'both', EAPIG, or another metric."
        )
    # Without details every rank has one row of its own.
    return _Sums(
        edges if details or len(edges) == 1 else edges.sum(0, keepdim=True),
        positions,
        neurons.sum(0) if len(neurons) > 1 else neurons[0],
    )


def _sums(
    model: Model,
    graph: Graph,
    task: Task,
    metric: Metric,
    ablation: str | Ablation,
    points: Sequence[GradientPoint],
    max_memory: int | None,
    progress: Callable[[int, int], None] | None,
    *,
    details: bool,
) -> tuple[_Sums, float]:
    """Of this rank's share of the prompts, batch by batch, each as large as memory allows; and the steepest gradient.

    Means that ablation takes are over all prompts.
    """
    check_supported(model)
    check_task(model, task)
    task, ablation = task.to(model.cfg.device), get_ablation(ablation)
    _warn_of_dead_norms(model, ablation, points)
    budget = memory_budget(model.cfg.device, max_memory, cpu_bytes=CPU_BYTES)
    products = EdgeProducts.of(model, graph, details=details, budget=budget)
    needed, mine = _bound(products, task, points), share(len(task))
    count = mine.stop - mine.start
    sums, done, steepest = _Sums.start(products, task, count), 0, 0.0
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        size = min(len(task), needed.prompts(budget))
        counterfactuals = Counterfactuals.prepare(
            model, products.layout.nodes, task, ablation, prompts_per_run=size
        )
        engine, size = _Engine(products, metric, tuple(points), counterfactuals), min(size, count)
        while done < count:
            # The bound is generous: when not all fits by it, the first batch is measured, so that the others fill the memory.
            meter = (
                AllocationMeter(model.parameters())
                if done == 0 and needed.of(count) > budget
                else None
            )
            start = mine.start + done
            (batch, slope), size = shrinking(
                lambda some: engine.batch(task, slice(start, min(start + some, mine.stop)), meter),  # noqa: B023
                size,
                "prompt",
            )
            sums.add(batch, slice(done, done + size))
            del batch
            done, steepest = min(done + size, count), max(steepest, slope)
            if meter is not None:
                needed = Needed(meter.fixed, ceil(meter.growing / size)) | products.least_bytes(
                    task.clean.shape[1], _together(points)
                )
                size = min(count - done, _checked(needed, task, max_memory).prompts(budget))
            if progress:
                progress(done, count)
    return sums, steepest


def _checked(needed: Needed, task: Task, max_memory: int | None) -> Needed:
    """The same.

    Raises:
        InputError: one prompt takes clearly more than the user allows.
    """
    if max_memory is not None and needed.of(1) > SLACK * max_memory:
        raise InputError(
            f"one prompt of {task.clean.shape[1]} tokens needs {needed.of(1):,} bytes, but max_memory={max_memory:,}: "
            "allow more, or use shorter prompts."
        )
    return needed


def _bound(products: EdgeProducts, task: Task, points: Sequence[GradientPoint]) -> Needed:
    """At least what a batch takes: what autograd keeps of a layer, which is up to the model's code, is counted generously."""
    cfg, pos, together = products.model.cfg, task.clean.shape[1], _together(points)
    heads, mlp = cfg.n_heads * cfg.d_head, cfg.d_mlp or 0
    layers = cfg.n_layers * (20 * cfg.d_model + 12 * heads + 10 * mlp + 8 * cfg.n_heads * pos)
    records = (
        2 * (heads + cfg.d_model) + (together - 1) * (3 * heads + 4 * cfg.d_model)
    ) * cfg.n_layers
    logits = 10 * cfg.d_vocab_out * len(task.row_prompt) / len(task)
    passes = ((layers + records + 8 * cfg.d_model) * pos + logits) * cfg.dtype.itemsize
    # Transposed copies of the weights of attention, of gated MLPs and of the unembedding.
    copied = cfg.n_layers * (4 * heads + (3 * mlp if cfg.gated_mlp else 0)) + cfg.d_vocab_out
    fixed = copied * cfg.d_model * cfg.dtype.itemsize
    return Needed(fixed, ceil(passes)) | products.least_bytes(pos, together)


def _together(points: Sequence[GradientPoint]) -> int:
    return min(len(points), POINTS_TOGETHER)


def _warn_of_dead_norms(model: Model, ablation: Ablation, points: Sequence[GradientPoint]) -> None:
    at_zero = ablation.name == "zero" and any(
        point.fraction == 0 and not point.nodes for point in points
    )
    if at_zero and model.cfg.normalization_type is not None:
        warnings.warn(
            "gradients are taken at zero embeddings, where the norms multiply them by hundreds: the scores mean little. "
            "Use EAPIG with quadrature='midpoint', gradient_at='clean', or another ablation.",
            stacklevel=8,
        )


@dataclass(frozen=True, eq=False)
class _Ends:
    """The runs at the clean and the corrupted prompts, and the gradients taken there; `points` are those that are left."""

    clean: SourceOutputs
    clean_logits: Float[Tensor, "scored vocab"]
    changes: Changes
    gradients: list[Gradients]
    points: list[GradientPoint]


@dataclass(frozen=True, eq=False)
class _Engine:
    """What stays the same from batch to batch."""

    products: EdgeProducts
    metric: Metric
    points: tuple[GradientPoint, ...]
    counterfactuals: Counterfactuals

    def batch(
        self, task: Task, indices: slice, meter: AllocationMeter | None
    ) -> tuple[BatchProducts, float]:
        """The products of the prompts `indices`, and the steepest gradient at the logits; `meter` watches the model's passes."""
        task = task[indices]
        products, steepest = self.products.start(task), 0.0
        with meter or contextlib.nullcontext():
            ends = self._ends(task, indices)
        pending = ends.gradients
        for point in ends.points:
            if len(pending) >= POINTS_TOGETHER:
                products.add(ends.changes, pending)
                pending.clear()
            with meter or contextlib.nullcontext():
                override = _override(self.counterfactuals.nodes, point, ends.clean, ends.changes)
                pending.append(self._pass(task, task.clean, override, ends.clean_logits)[0])
            steepest = max(steepest, pending[-1].steepest)
        steepest = max([steepest, *(gradients.steepest for gradients in pending)])
        products.add(ends.changes, pending)
        return products, steepest

    def _ends(self, task: Task, indices: slice) -> _Ends:
        """A point at an end of the line is one of the two runs that are made anyway."""
        points, gradients, nodes = list(self.points), list[Gradients](), self.counterfactuals.nodes
        cut: dict[str, Tensor | None] = {
            output_hook(node): None for node in nodes if is_embedding(node)
        }
        if GradientPoint(1.0) in points:
            points.remove(GradientPoint(1.0))
            found, clean, logits = self._pass(task, task.clean, cut, None)
            gradients.append(found)
        else:
            clean, residual = run_and_record(self.products.model, nodes, task.clean, task.mask)
            logits = unembed(self.products.model, residual[task.scored])
            check_finite(logits)
        corrupted = None
        if GradientPoint(0.0) in points and self.counterfactuals.ablation.name == "resample":
            points.remove(GradientPoint(0.0))
            found, corrupted, _ = self._pass(task, task.corrupted, cut, logits)
            gradients.append(found)
        return _Ends(
            clean,
            logits,
            self.counterfactuals.changes(task, indices, clean, corrupted),
            gradients,
            points,
        )

    def _pass(
        self,
        task: Task,
        tokens: Int[Tensor, "batch pos"],
        override: dict[str, Tensor | None],
        clean_logits: Tensor | None,
    ) -> tuple[Gradients, SourceOutputs, Float[Tensor, "scored vocab"]]:
        of = self.products
        return gradient_pass(
            of.model,
            of.layout.nodes,
            of.layout.targets,
            task,
            tokens,
            override,
            self.metric,
            clean_logits,
            of.details,
        )


def _override(
    nodes: Sequence[Node], point: GradientPoint, clean: SourceOutputs, changes: Changes
) -> dict[str, Tensor | None]:
    """What is put at hook points to move to this point. The embeddings are always among them, in their place if they do not move."""
    result: dict[str, Tensor | None] = {}
    for name, rows in output_groups(nodes):
        first = nodes[rows.start]
        moved = [
            index
            for index, node in enumerate(nodes[rows])
            if (node in point.nodes if point.nodes else is_embedding(node))
        ]
        if not moved:
            result |= {name: None} if is_embedding(first) else {}
            continue
        # Heads write together at one hook point, with their bias.
        here = clean.attention(first.layer) if isinstance(first, Head) else clean.activations[name]
        result[written_hook(first)] = here + (1 - point.fraction) * changes.outputs(rows)[
            moved
        ].sum(0)
    return result

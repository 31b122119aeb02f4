"""Scores of all edges from gradients: the engine of EAP, EAP-IG and methods like them.

    score(u -> r) = sum over positions and d_model of (c_u - out_u(clean)) * d L / d x_r

with c_u the output of source u under ablation, x_r the input of target r, and L the damage: the
metric's mean over scored rows, with the sign that makes more of it worse. The score predicts the
damage of ablating the edge.

One point needs two forward passes and one backward pass: the clean run gives outputs, logits and
gradients, the corrupted run the counterfactuals. `gradient_pass` makes the passes, `edge_products`
the products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.gradients.edge_attribution import EdgeAttribution
from circuits.discovery.gradients.edge_products import BatchProducts, EdgeProducts, Needed
from circuits.discovery.gradients.gradient_pass import (
    GradientPass,
    Gradients,
    PassResult,
    is_embedding,
    written_hook,
)
from circuits.graph.graph import Graph
from circuits.graph.nodes import Head, Node
from circuits.models import Model, frozen, output_hook, unembed
from circuits.models.component_graph import check_supported, component_nodes
from circuits.models.propagation import PropagationRules
from circuits.models.source_outputs import SourceOutputs, output_groups, run_and_record
from circuits.running.ablation import Changes, Counterfactuals
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget, shrinking
from circuits.system.ranks import SharedError, gathered, share
from circuits.tasks.metrics import Metric, check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task

Progress = Callable[[int, int], None]
Override = dict[str, Tensor | None]

# Below this, per scored row, a gradient is rounding noise: probabilities and logits are of order 1.
VANISHING = 1e-6
# Gradients of this many points are multiplied by the changes together. More points take more
# memory, fewer more products.
POINTS_TOGETHER = 5
# The most memory chosen on a CPU, where weights are read anew for every batch.
CPU_BYTES = 1 << 32
# The bound on memory is generous, so a prompt is refused only if it exceeds the limit by this much.
SLACK = 1.2


@dataclass(frozen=True)
class GradientPoint:
    """Where a gradient is taken, on a line from the counterfactual to the clean activations.

    Attributes:
        fraction: 0 is the counterfactual end, 1 the clean end.
        nodes: the nodes whose outputs are moved; empty for the embeddings. The rest follows.
        until: None multiplies the gradient by the whole difference c_u - out_u(clean), and the
            score is the mean over points. A fraction multiplies it by the difference that the
            sources' outputs make on this piece of the line, out_u(fraction) - out_u(until), and
            the score is the sum over points, as conductance needs it.
    """

    fraction: float
    nodes: tuple[Node, ...] = ()
    until: float | None = None


CLEAN_END, COUNTERFACTUAL_END = GradientPoint(1.0), GradientPoint(0.0)


def score_edges(
    model: Model,
    graph: Graph,
    task: Task,
    settings: RunSettings,
    points: Sequence[GradientPoint],
    *,
    rules: PropagationRules | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, " edge"]:
    """The score of every edge.

    Args:
        points: where gradients are taken.
        rules: how gradients pass through nonlinear parts; None differentiates.

    Raises:
        InputError: the model, graph and task do not fit together; the metric has no gradient, or
            one that vanishes at every point; or a single prompt exceeds `max_memory`.
    """
    engine = _Engine.prepare(model, graph, task, settings, points, rules, details=False)
    sums = _over_ranks(engine, progress)
    return sums.edges[0] / (len(task.row_prompt) * engine.points_averaged)


def attribute_edges(
    model: Model,
    graph: Graph,
    task: Task,
    settings: RunSettings,
    points: Sequence[GradientPoint],
    *,
    rules: PropagationRules | None = None,
    progress: Progress | None = None,
) -> EdgeAttribution:
    """The scores in detail; arguments and errors are those of `score_edges`."""
    engine = _Engine.prepare(model, graph, task, settings, points, rules, details=True)
    sums = _over_ranks(engine, progress)
    rows = torch.bincount(task.row_prompt.cpu(), minlength=len(task))
    weights = rows * engine.points_averaged
    return EdgeAttribution(
        graph=graph,
        nodes=component_nodes(model, graph.splits_embedding),
        rows=rows,
        edges_by_prompt=sums.edges.div_(weights[:, None]),
        sources_by_position=sums.positions.div_(weights[:, None, None]),
        neurons=sums.neurons.div_(weights.sum()),
    )


@dataclass(eq=False)
class _Sums:
    """Sums over scored rows and points, on the CPU; without details only `edges`, in one row.

    Attributes:
        steepest: the largest entry of a gradient at the logits.
    """

    edges: Float[Tensor, "row edge"]
    positions: Float[Tensor, "prompt node pos"]
    neurons: Float[Tensor, "node d_model"]
    steepest: float = 0.0

    @staticmethod
    def start(products: EdgeProducts, task: Task, prompts: int) -> _Sums:
        """Zeros for a number of the task's prompts."""
        rows, nodes = (prompts, products.layout.shape[2]) if products.details else (0, 0)
        return _Sums(
            torch.zeros(rows if products.details else 1, len(products.graph)),
            torch.zeros(rows, nodes, task.clean.shape[1]),
            torch.zeros(nodes, products.model.cfg.d_model),
        )

    def add(self, batch: BatchProducts, prompts: slice) -> None:
        if not batch.of.details:
            self.edges.add_(batch.by_edge())
            return
        self.edges[prompts] = batch.by_edge()
        self.positions[prompts] = batch.positions.transpose(0, 1).float().cpu()
        self.neurons.add_(batch.neurons.float().cpu())


def _over_ranks(engine: _Engine, progress: Progress | None) -> _Sums:
    """The sums over all prompts, to which each rank adds its share.

    Raises:
        InputError: the metric's gradient vanishes at every point.
    """

    def tensors() -> list[Tensor]:
        sums = engine.run(progress)
        steepest = torch.tensor([sums.steepest], dtype=torch.float64)
        return [sums.edges, sums.positions, sums.neurons[None], steepest]

    edges, positions, neurons, slopes = gathered(tensors)
    steepest = float(slopes.max())
    if steepest < VANISHING:
        raise SharedError(
            f"the gradient of {engine.metric.name} vanishes where it is taken (largest entry "
            f"{steepest:.1e}), as that of kl does at the clean run: use gradient_at='corrupted' or "
            "'both', EAPIG, or another metric."
        )
    # Without details every rank has one row, which is its sum.
    if not engine.products.details and len(edges) > 1:
        edges = edges.sum(0, keepdim=True)
    neurons = neurons.sum(0) if len(neurons) > 1 else neurons[0]
    return _Sums(edges, positions, neurons, steepest)


@dataclass(eq=False)
class _Ends:
    """The clean run, and what is known from running the ends of the line anyway.

    Attributes:
        changes: c_u - out_u(clean) of every source u.
        gradients: taken at an end.
        points: the points left to run.
    """

    clean: SourceOutputs
    clean_logits: Float[Tensor, "scored vocab"]
    changes: Changes
    gradients: list[Gradients]
    points: list[GradientPoint]


@dataclass(eq=False)
class _Engine:
    """Runs the passes of one task and multiplies their results, batch by batch."""

    products: EdgeProducts
    passes: GradientPass
    task: Task
    settings: RunSettings
    points: tuple[GradientPoint, ...]
    budget: int
    counterfactuals: Counterfactuals | None = field(default=None)

    @staticmethod
    def prepare(
        model: Model,
        graph: Graph,
        task: Task,
        settings: RunSettings,
        points: Sequence[GradientPoint],
        rules: PropagationRules | None,
        *,
        details: bool,
    ) -> _Engine:
        assert settings.metric is not None
        check_supported(model)
        check_task(model, task)
        _warn_of_dead_norms(model, settings, points)
        budget = memory_budget(model.cfg.device, settings.max_memory, cpu_bytes=CPU_BYTES)
        products = EdgeProducts.of(model, graph, details=details, budget=budget)
        layout = products.layout
        passes = GradientPass(
            model,
            layout.nodes,
            layout.targets,
            settings.metric,
            rules or PropagationRules(),
            at_outputs=details,
        )
        task = task.to(model.cfg.device)
        return _Engine(products, passes, task, settings, tuple(points), budget)

    @property
    def metric(self) -> Metric:
        return self.passes.metric

    @property
    def points_averaged(self) -> int:
        """The number of points that the score is the mean of; scores by pieces are sums."""
        return sum(point.until is None for point in self.points) or 1

    def run(self, progress: Progress | None) -> _Sums:
        """The sums over this rank's share of the prompts, in batches that fit into memory."""
        model, task, mine = self.products.model, self.task, share(len(self.task))
        count, done = mine.stop - mine.start, 0
        sums, needed = _Sums.start(self.products, task, count), self._needed()
        self._check(needed)
        with torch.inference_mode(False), torch.no_grad(), frozen(model):
            size = min(len(task), needed.prompts(self.budget))
            # Means that an ablation takes are over all prompts, whichever rank runs them.
            self.counterfactuals = Counterfactuals.prepare(
                model,
                self.products.layout.nodes,
                task,
                self.settings.ablation,
                prompts_per_run=size,
            )
            while done < count:
                start = mine.start + done

                def batch(prompts: int, start: int = start) -> tuple[BatchProducts, float]:
                    return self.batch(slice(start, min(start + prompts, mine.stop)))

                (found, steepest), size = shrinking(batch, min(size, count - done), "prompt")
                sums.add(found, slice(done, done + size))
                del found
                done, sums.steepest = done + size, max(sums.steepest, steepest)
                if progress:
                    progress(done, count)
        return sums

    def batch(self, prompts: slice) -> tuple[BatchProducts, float]:
        """The products of some prompts, and the steepest gradient at the logits."""
        task = self.task[prompts]
        products, ends = self.products.start(task), self._ends(task, prompts)
        pending, steepest = ends.gradients, [0.0, *(each.steepest for each in ends.gradients)]
        for point in ends.points:
            if point.until is not None:
                continue
            if len(pending) >= POINTS_TOGETHER:
                products.add(ends.changes, pending)
                pending.clear()
            pending.append(self._run_point(task, point, ends).gradients)
            steepest.append(pending[-1].steepest)
        if pending:
            products.add(ends.changes, pending)
        steepest += self._add_pieces(products, task, ends)
        return products, max(steepest)

    def _add_pieces(self, products: BatchProducts, task: Task, ends: _Ends) -> list[float]:
        """For each piece of the line, its gradient times the change of the outputs along it."""
        runs: dict[GradientPoint, PassResult] = {}
        steepest = []
        for point in ends.points:
            if point.until is None:
                continue
            start, end = replace(point, until=None), GradientPoint(point.until, point.nodes)
            for each in (start, end):
                if each not in runs:
                    runs[each] = self._run_point(task, each, ends)
            # out_u(fraction) - out_u(until)
            change = Changes(runs[start].outputs - runs[end].outputs)
            products.add(change, [runs[start].gradients])
            steepest.append(runs[start].gradients.steepest)
            runs = {end: runs[end]}  # where the next piece starts
        return steepest

    def _ends(self, task: Task, prompts: slice) -> _Ends:
        """Run the clean prompts, and the corrupted ones for the counterfactuals.

        A point at an end of the line is one of these two runs.
        """
        assert self.counterfactuals is not None
        points, gradients = list(self.points), list[Gradients]()
        nodes, model = self.counterfactuals.nodes, self.products.model
        cut: Override = {output_hook(node): None for node in nodes if is_embedding(node)}
        if CLEAN_END in points:
            points.remove(CLEAN_END)
            run = self.passes.run(task, task.clean, cut, None)
            gradients.append(run.gradients)
            clean, logits = run.outputs, run.logits
        else:
            clean, residual = run_and_record(model, nodes, task.clean, task.mask)
            logits = unembed(model, residual[task.scored])
            check_finite(logits)
        corrupted = None
        if COUNTERFACTUAL_END in points and self.settings.ablation.name == "resample":
            points.remove(COUNTERFACTUAL_END)
            run = self.passes.run(task, task.corrupted, cut, logits)
            gradients.append(run.gradients)
            corrupted = run.outputs
        changes = self.counterfactuals.changes(task, prompts, clean, corrupted)
        return _Ends(clean, logits, changes, gradients, points)

    def _run_point(self, task: Task, point: GradientPoint, ends: _Ends) -> PassResult:
        override = _override(self.passes.nodes, point, ends)
        return self.passes.run(task, task.clean, override, ends.clean_logits)

    def _needed(self) -> Needed:
        """A generous bound on the memory of a batch, since what autograd keeps of a layer depends
        on the model's code.
        """
        cfg, task, together = (
            self.products.model.cfg,
            self.task,
            min(len(self.points), POINTS_TOGETHER),
        )
        pos, heads, mlp = task.clean.shape[1], cfg.n_heads * cfg.d_head, cfg.d_mlp or 0
        autograd = 20 * cfg.d_model + 12 * heads + 10 * mlp + 8 * cfg.n_heads * pos
        records = 2 * (heads + cfg.d_model) + (together - 1) * (3 * heads + 4 * cfg.d_model)
        per_token = cfg.n_layers * (autograd + records) + 8 * cfg.d_model
        logits = 10 * cfg.d_vocab_out * len(task.row_prompt) / len(task)
        # Transposed copies of the weights of attention, of gated MLPs and of the unembedding.
        copied = cfg.n_layers * (4 * heads + (3 * mlp if cfg.gated_mlp else 0)) + cfg.d_vocab_out
        size = cfg.dtype.itemsize
        passes = Needed(copied * cfg.d_model * size, ceil((per_token * pos + logits) * size))
        return passes | self.products.least_bytes(pos, together)

    def _check(self, needed: Needed) -> None:
        limit = self.settings.max_memory
        if limit is not None and needed.of(1) > SLACK * limit:
            raise InputError(
                f"one prompt of {self.task.clean.shape[1]} tokens needs {needed.of(1):,} bytes, "
                f"but max_memory={limit:,}: allow more, or use shorter prompts."
            )


def _override(nodes: Sequence[Node], point: GradientPoint, ends: _Ends) -> Override:
    """What to put at hook points to move a run to a point.

    The embeddings are always among them, unchanged if they do not move: gradients start there.
    """
    result: Override = {}
    for name, rows in output_groups(nodes):
        first = nodes[rows.start]
        moves = [node in point.nodes if point.nodes else is_embedding(node) for node in nodes[rows]]
        if not any(moves):
            if is_embedding(first):
                result[name] = None
            continue
        # Heads write together at one hook point, with their bias.
        heads = isinstance(first, Head)
        here = ends.clean.attention(first.layer) if heads else ends.clean.activations[name]
        moved = ends.changes.outputs(rows)[[index for index, move in enumerate(moves) if move]]
        # counterfactual + fraction * (clean - counterfactual) = clean + (1 - fraction) * change
        result[written_hook(first)] = here + (1 - point.fraction) * moved.sum(0)
    return result


def _warn_of_dead_norms(
    model: Model, settings: RunSettings, points: Sequence[GradientPoint]
) -> None:
    at_zero = any(point.fraction == 0 and not point.nodes for point in points)
    has_norms = model.cfg.normalization_type is not None
    if settings.ablation.name == "zero" and at_zero and has_norms:
        warnings.warn(
            "gradients are taken at zero embeddings, where the norms multiply them by hundreds: "
            "the scores mean little. Use EAPIG with quadrature='midpoint', gradient_at='clean', or "
            "another ablation.",
            stacklevel=6,
        )

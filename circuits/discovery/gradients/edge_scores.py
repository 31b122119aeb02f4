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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from circuits.discovery.discoverer import EdgeScores, Progress, no_progress, report_part
from circuits.discovery.gradients.edge_attribution import EdgeAttribution
from circuits.discovery.gradients.edge_products import BatchProducts, EdgeProducts, target_groups
from circuits.discovery.gradients.gradient_pass import (
    GradientPass,
    Gradients,
    Override,
    PassResult,
    is_embedding,
    written_hook,
)
from circuits.discovery.gradients.memory import bytes_to_judge, needed
from circuits.discovery.gradients.slopes import Logits, OfLogits, rows_of, slopes
from circuits.graph.graph import Graph
from circuits.graph.nodes import Head, Node
from circuits.models import (
    Model,
    cause,
    changes,
    check_differentiable,
    count_not_finite,
    frozen,
    output_hook,
    scored_logits,
    shape_of,
)
from circuits.models.component_graph import check_supported
from circuits.models.propagation import PropagationRules
from circuits.models.source_outputs import SourceOutputs, output_groups, run_and_record
from circuits.running.ablation import Changes, Counterfactuals, check_corrupted
from circuits.running.edge_layout import EdgeLayout
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.memory import in_steps, memory_budget
from circuits.system.ranks import SharedError, SharedNotFiniteError, gathered, ranks, share
from circuits.tasks.metrics import check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task

# Below this, per scored row, a gradient is rounding noise: probabilities and logits are of order 1.
VANISHING = 1e-6
# Gradients of this many points are multiplied by the changes together. More points take more
# memory, fewer more products.
POINTS_TOGETHER = 5
# The most memory chosen on a CPU, where weights are read anew for every batch.
CPU_BYTES = 1 << 32


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

    @property
    def places(self) -> tuple[GradientPoint, GradientPoint]:
        """Where the model is run: here, and at the end of this piece of the line."""
        start = replace(self, until=None)
        if self.until is None:
            return start, start
        return start, replace(start, fraction=self.until)


CLEAN_END, COUNTERFACTUAL_END = GradientPoint(1.0), GradientPoint(0.0)
Step = Callable[[slice], list[Tensor]]
Ends = dict[GradientPoint, Gradients]


@dataclass(eq=False)
class _Line:
    """What is known of a batch before gradients are taken between the ends of the line."""

    task: Task
    # Which prompts of the whole task these are
    prompts: slice
    clean: SourceOutputs
    clean_logits: Logits
    # c_u - out_u(clean) of every source u
    changes: Changes
    # Gradients at the clean and the counterfactual end, where these runs were made anyway
    ends: Ends

    def clean_output(self, name: str, node: Node) -> Tensor:
        """What is written at a hook point; heads write there together, with their bias."""
        if isinstance(node, Head):
            return self.clean.attention(node.layer)
        return self.clean.activations[name]


class EdgeScoring:
    """Runs the passes of one task and multiplies their results, batch by batch.

    Args:
        points: where gradients are taken.
        rules: how gradients pass through nonlinear parts; None differentiates.
        details: whether `attribution` is wanted.
    """

    def __init__(
        self,
        model: Model,
        graph: Graph,
        task: Task,
        settings: RunSettings,
        points: Sequence[GradientPoint],
        *,
        rules: PropagationRules | None = None,
        details: bool = False,
    ) -> None:
        assert settings.metric is not None
        check_supported(model)
        check_differentiable(model)
        check_task(model, task)
        check_corrupted(settings.ablation, task)
        self.resamples = settings.ablation.name == "resample"
        at_corrupted = self.resamples and COUNTERFACTUAL_END in points
        if at_corrupted and task.alignment is not None:
            raise InputError(
                f"gradients at the corrupted prompts need prompts of the clean lengths, which task "
                f"{task.name!r} has not; use gradient_at='clean', or quadrature='midpoint'."
            )
        _warn_of_dead_norms(model, settings, points)
        self.model = model
        self.task = task.to(shape_of(model).device)
        self.settings = settings
        self.metric = settings.metric
        self.points = points
        self.current = points  # those that are taken in one go
        # The number of points that the score is the mean of; scores by pieces are sums.
        whole_lines = [point for point in points if point.until is None]
        self.averaged = len(whole_lines) or 1
        # By where it is taken, the gradient at the logits of all prompts, see `slopes`.
        self.whole: dict[GradientPoint, Logits] = {}
        budget = memory_budget(shape_of(model).device, settings.max_memory, cpu_bytes=CPU_BYTES)
        layout = EdgeLayout.of(model, graph)
        groups = tuple(target_groups(model, layout))
        self.products = EdgeProducts(model, graph, layout, groups, details, budget)
        self.passes = GradientPass(
            model,
            layout.nodes,
            layout.targets,
            rules or PropagationRules(),
            at_outputs=details,
            separate=bool(changes(model)),
        )

    def scores(self, progress: Progress = no_progress) -> EdgeScores:
        """The score of every edge."""
        edges, _, _ = self._over_ranks(progress)
        rows = len(self.task.row_prompt)
        # The mean over scored rows and over points
        return edges.sum(0) / (rows * self.averaged)

    def attribution(self, progress: Progress = no_progress) -> EdgeAttribution:
        """The scores in detail."""
        edges, positions, neurons = self._over_ranks(progress)
        row_prompt = self.task.row_prompt.cpu()
        prompts = len(self.task)
        rows = torch.bincount(row_prompt, minlength=prompts)
        weights = rows * self.averaged
        return EdgeAttribution(
            graph=self.products.graph,
            nodes=self.passes.nodes,
            rows=rows,
            edges_by_prompt=edges.div_(weights[:, None]),
            sources_by_position=positions.div_(weights[:, None, None]),
            neurons=neurons.sum(0) / weights.sum(),
        )

    def _over_ranks(self, progress: Progress) -> list[Tensor]:
        """The products of all prompts, see `BatchProducts.results`; each rank adds its share."""
        total: list[Tensor] = []
        steepest = 0.0
        rounds = self._rounds()
        for number, points in enumerate(rounds):
            self.current, self.whole = points, {}
            reporting = partial(report_part, progress, number, len(rounds))
            *found, neurons, largest = self._gathered(reporting)
            found.append(neurons.sum(0, keepdim=True))
            total = list(map(torch.add, total, found)) if total else found
            steepest = max(steepest, float(largest.max()))
        self._check(total, steepest)
        return total

    def _check(self, products: list[Tensor], steepest: float) -> None:
        if steepest < VANISHING:
            raise SharedError(
                f"the gradient of {self.metric.name} vanishes where it is taken (largest "
                f"entry {steepest:.1e}), as that of kl does at the clean run: use "
                "gradient_at='corrupted' or 'both', EAPIG, or another metric."
            )
        n_bad = sum(map(count_not_finite, products))
        if n_bad:
            raise SharedNotFiniteError(
                f"{n_bad} products of gradients are NaN or infinite: {cause(self.passes.model)}"
            )

    def _rounds(self) -> list[Sequence[GradientPoint]]:
        """All points; fewer at a time where the slopes at all of them may have to be kept."""
        points = self.points
        size = len(points) if self.metric.shipped else POINTS_TOGETHER
        starts = range(0, len(points), size)
        return [points[start : start + size] for start in starts]

    def _gathered(self, progress: Progress) -> list[Tensor]:
        """The results of all ranks' shares of the prompts."""
        logits: list[Tensor] = []
        if ranks().world > 1 and not self.metric.shipped:
            logits = gathered(self._logits)
        return gathered(lambda: self._run(logits, progress))

    def _run(self, logits: list[Tensor], progress: Progress) -> list[Tensor]:
        """The results of this rank's share of the prompts, from the logits of all if they count."""
        results: list[list[Tensor]] = []
        with frozen(self.model), torch.no_grad():
            self.passes.check_honoured(self.task.masked_prompts)
            if logits:
                self._take_slopes(logits)
            for found in self._in_batches(lambda some: self.batch(some).results(), progress):
                if results and not self.products.details:
                    # Added up at once, because there may be many edges.
                    results[0][0] += found[0]
                    found[0] = found[0][:0]
                results.append(found)
        return _joined(results)

    def _in_batches(self, step: Step, progress: Progress = no_progress) -> Iterator[list[Tensor]]:
        """What `step` finds on batches of this rank's prompts that fit into memory."""
        mine = share(len(self.task))
        start, n_mine = mine.start, mine.stop - mine.start
        progress(0, n_mine)

        def batch(prompts: slice) -> list[Tensor]:
            return step(slice(start + prompts.start, start + prompts.stop))

        for done, found in in_steps(batch, n_mine, self._batch_size, "prompt"):
            yield found
            progress(done, n_mine)

    def _logits(self) -> list[Logits]:
        """Of this rank's share of the prompts, the clean logits, and those at every place."""
        with frozen(self.model), torch.no_grad():
            return _joined(self._in_batches(self._batch_logits))

    def _batch_logits(self, prompts: slice) -> list[Logits]:
        task = self.task[prompts]
        clean, logits = self._plain_run(task)
        if self._places == [CLEAN_END]:
            return [logits, logits]
        changes = self._counterfactuals.changes(task, prompts, clean)
        line = _Line(task, prompts, clean, logits, changes, {})
        overrides = (self._override(place, line) for place in self._places)
        run = partial(self.passes.logits, task)
        return [logits, *map(run, overrides)]

    @property
    def _places(self) -> list[GradientPoint]:
        """Where the model is run: at every point, and at the end of its piece of the line."""
        places = [place for point in self.current for place in point.places]
        return list(dict.fromkeys(places))

    def _take_slopes(self, logits: list[Logits]) -> None:
        """Judge the logits of all prompts, from `_logits`, at every place."""
        whole = {}
        device = self.task.clean.device
        # Each is let go when it is judged. Clones are no inference tensors, whoever gathered them.
        clean = logits.pop(0).to(device)
        clean = clean.clone()
        for place in self._places:
            there = logits.pop(0).to(device).clone()
            whole[place] = slopes(self.metric, clean, self.task, there)
        self.whole = whole

    def _slopes(
        self, task: Task, prompts: slice, place: GradientPoint, clean: Logits | None
    ) -> OfLogits:
        """The gradient at the logits of a batch, from them or from those of all prompts."""
        if not self.whole:
            return partial(slopes, self.metric, clean, task)
        rows = rows_of(self.task, prompts)
        return lambda _: self.whole[place][rows]

    def batch(self, prompts: slice) -> BatchProducts:
        """The products of some prompts."""
        task = self.task[prompts]
        if not (self.metric.shipped or self.whole or len(task) == len(self.task)):
            self._take_slopes(self._logits())
        products = self.products.start(task)
        line = self._line(task, prompts)
        self._add_averaged(products, line)
        self._add_pieces(products, line)
        return products

    def _add_averaged(self, products: BatchProducts, line: _Line) -> None:
        """For each point, its gradient times the whole change of the outputs."""
        averaged = [point for point in self.current if point.until is None]
        for start in range(0, len(averaged), POINTS_TOGETHER):
            some = averaged[start : start + POINTS_TOGETHER]
            # No name is left for these gradients, which would keep them during the next passes.
            products.add(line.changes, [self._gradients(point, line) for point in some])

    def _gradients(self, point: GradientPoint, line: _Line) -> Gradients:
        """The gradients at a point; those of an end are taken out of `line`."""
        if point in line.ends:
            return line.ends.pop(point)
        return self._run_point(point, line).gradients

    def _add_pieces(self, products: BatchProducts, line: _Line) -> None:
        """For each piece of the line, its gradient times the change of the outputs along it."""
        runs: dict[GradientPoint, PassResult] = {}
        for point in self.current:
            if point.until is None:
                continue
            for each in point.places:
                if each not in runs:
                    runs[each] = self._run_point(each, line)
            start, end = point.places
            # out_u(fraction) - out_u(until)
            change = runs[start].outputs - runs[end].outputs
            products.add(Changes(change), [runs[start].gradients])
            runs = {end: runs[end]}  # where the next piece starts

    def _line(self, task: Task, prompts: slice) -> _Line:
        """Run the clean and the corrupted prompts; a point at an end is one of these two runs."""
        ends: Ends = {}
        corrupted = None
        clean, logits = self._clean_run(task, prompts, ends)
        if self.resamples and COUNTERFACTUAL_END in self.current:
            slopes = self._slopes(task, prompts, COUNTERFACTUAL_END, logits)
            found = self.passes.run(task, task.corrupted, self._cut, slopes)
            ends[COUNTERFACTUAL_END] = found.gradients
            corrupted = found.outputs
        changes = self._counterfactuals.changes(task, prompts, clean, corrupted)
        return _Line(task, prompts, clean, logits, changes, ends)

    def _clean_run(self, task: Task, prompts: slice, ends: Ends) -> tuple[SourceOutputs, Logits]:
        if CLEAN_END not in self.current:
            return self._plain_run(task)
        slopes = self._slopes(task, prompts, CLEAN_END, None)
        found = self.passes.run(task, task.clean, self._cut, slopes)
        ends[CLEAN_END] = found.gradients
        return found.outputs, found.logits

    def _plain_run(self, task: Task) -> tuple[SourceOutputs, Logits]:
        model = self.passes.model
        clean, residual = run_and_record(model, self.passes.nodes, task.clean, task.mask)
        logits = scored_logits(model, residual, task.scored)
        check_finite(logits, model)
        return clean, logits

    @property
    def _cut(self) -> Override:
        """The embeddings as they are, where gradients start."""
        embeddings = filter(is_embedding, self.passes.nodes)
        return dict.fromkeys(map(output_hook, embeddings))

    def _run_point(self, point: GradientPoint, line: _Line) -> PassResult:
        override = self._override(point, line)
        slopes = self._slopes(line.task, line.prompts, point, line.clean_logits)
        return self.passes.run(line.task, line.task.clean, override, slopes)

    def _override(self, point: GradientPoint, line: _Line) -> Override:
        """What to put at hook points to move the clean run to a point."""
        override = dict(self._cut)
        nodes = self.passes.nodes
        embeddings = filter(is_embedding, nodes)
        moving = set(point.nodes) or set(embeddings)
        for name, rows in output_groups(nodes):
            here = nodes[rows]
            moved = [node in moving for node in here]
            if any(moved):
                clean = line.clean_output(name, here[0])
                change = line.changes.outputs(rows)[moved].sum(0)
                # counterfactual + fraction * (clean - counterfactual)
                #     = clean + (1 - fraction) * change
                value = clean + (1 - point.fraction) * change
                override[written_hook(here[0])] = value
        return override

    @cached_property
    def _counterfactuals(self) -> Counterfactuals:
        """Means that an ablation takes are over all prompts, whichever rank runs them."""
        return Counterfactuals.prepare(
            self.passes.model,
            self.passes.nodes,
            self.task,
            self.settings.ablation,
            prompts_per_run=self._batch_size,
        )

    @cached_property
    def _batch_size(self) -> int:
        """The number of prompts that fit into memory together."""
        together = min(len(self.points), POINTS_TOGETHER)
        task, limit = self.task, self.settings.max_memory
        fixed, per_prompt = needed(self.products, task, together, self.passes.separate)
        smallest, at_once = fixed + per_prompt, ""
        if not self.metric.shipped:
            kept, judging = bytes_to_judge(self.model, task, together)
            fixed += kept
            smallest = max(smallest + kept, judging)
            at_once = f", as {self.metric.name} is given all {len(task.row_prompt)} rows at once"
        if limit is not None and smallest > limit:
            raise InputError(
                f"one prompt of {task.clean.shape[1]} tokens may need up to "
                f"{smallest:,} bytes{at_once}, but max_memory={limit:,}: allow more, or use "
                "shorter prompts."
            )
        fitting = (self.products.budget - fixed) // per_prompt
        return min(len(task), max(1, fitting))


def _joined(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """Each result of all batches, joined along its first axis."""
    columns = zip(*parts, strict=True)
    return list(map(torch.cat, columns))


def _warn_of_dead_norms(
    model: Model, settings: RunSettings, points: Sequence[GradientPoint]
) -> None:
    at_zero = any(point.fraction == 0 and not point.nodes for point in points)
    has_norms = shape_of(model).has_norms
    if settings.ablation.name == "zero" and at_zero and has_norms:
        warnings.warn(
            "gradients are taken at zero embeddings, where the norms multiply them by hundreds: "
            "the scores mean little. Use EAPIG with quadrature='midpoint', gradient_at='clean', or "
            "another ablation.",
            stacklevel=6,
        )

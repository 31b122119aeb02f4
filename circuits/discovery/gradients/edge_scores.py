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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from circuits.discovery.discoverer import EdgeScores, Progress, no_progress
from circuits.discovery.gradients.edge_attribution import EdgeAttribution
from circuits.discovery.gradients.edge_products import BatchProducts, EdgeProducts, target_groups
from circuits.discovery.gradients.gradient_pass import (
    GradientPass,
    Gradients,
    Logits,
    Override,
    PassResult,
    is_embedding,
    written_hook,
)
from circuits.discovery.gradients.memory import needed
from circuits.graph.graph import Graph
from circuits.graph.nodes import Head, Node
from circuits.models import Model, frozen, output_hook, unembed
from circuits.models.component_graph import check_supported
from circuits.models.propagation import PropagationRules
from circuits.models.source_outputs import SourceOutputs, output_groups, run_and_record
from circuits.running.ablation import Changes, Counterfactuals, check_corrupted
from circuits.running.edge_layout import EdgeLayout
from circuits.running.settings import RunSettings
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget, shrinking
from circuits.system.ranks import SharedError, gathered, share
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


CLEAN_END, COUNTERFACTUAL_END = GradientPoint(1.0), GradientPoint(0.0)


@dataclass(eq=False)
class _Line:
    """What is known of a batch before gradients are taken between the ends of the line."""

    clean: SourceOutputs
    clean_logits: Logits
    # c_u - out_u(clean) of every source u
    changes: Changes
    # Gradients at the clean and the counterfactual end, where these runs were made anyway
    ends: dict[GradientPoint, Gradients]

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
        check_task(model, task)
        check_corrupted(settings.ablation, task)
        resamples = settings.ablation.name == "resample"
        if task.alignment is not None and resamples and COUNTERFACTUAL_END in points:
            raise InputError(
                f"gradients at the corrupted prompts need prompts of the clean lengths, which task "
                f"{task.name!r} has not; use gradient_at='clean', or quadrature='midpoint'."
            )
        _warn_of_dead_norms(model, settings, points)
        budget = memory_budget(model.cfg.device, settings.max_memory, cpu_bytes=CPU_BYTES)
        layout = EdgeLayout.of(model, graph)
        groups = tuple(target_groups(model, layout))
        self.task = task.to(model.cfg.device)
        self.settings = settings
        self.points = points
        self.products = EdgeProducts(model, graph, layout, groups, details, budget)
        self.passes = GradientPass(
            model,
            layout.nodes,
            layout.targets,
            settings.metric,
            rules or PropagationRules(),
            at_outputs=details,
        )

    def scores(self, progress: Progress = no_progress) -> EdgeScores:
        """The score of every edge."""
        edges, _, _ = self._over_ranks(progress)
        rows = len(self.task.row_prompt)
        # The mean over scored rows and over points
        return edges.sum(0) / (rows * self._points_averaged)

    def attribution(self, progress: Progress = no_progress) -> EdgeAttribution:
        """The scores in detail."""
        edges, positions, neurons = self._over_ranks(progress)
        row_prompt = self.task.row_prompt.cpu()
        prompts = len(self.task)
        rows = torch.bincount(row_prompt, minlength=prompts)
        weights = rows * self._points_averaged
        return EdgeAttribution(
            graph=self.products.graph,
            nodes=self.passes.nodes,
            rows=rows,
            edges_by_prompt=edges.div_(weights[:, None]),
            sources_by_position=positions.div_(weights[:, None, None]),
            neurons=neurons.sum(0) / weights.sum(),
        )

    @property
    def _points_averaged(self) -> int:
        """The number of points that the score is the mean of; scores by pieces are sums."""
        return sum(point.until is None for point in self.points) or 1

    def _over_ranks(self, progress: Progress) -> list[Tensor]:
        """The products of all prompts, see `BatchProducts.results`; each rank adds its share."""
        *results, slopes = gathered(lambda: self._run(progress))
        steepest = float(slopes.max())
        if steepest < VANISHING:
            raise SharedError(
                f"the gradient of {self.passes.metric.name} vanishes where it is taken (largest "
                f"entry {steepest:.1e}), as that of kl does at the clean run: use "
                "gradient_at='corrupted' or 'both', EAPIG, or another metric."
            )
        return results

    def _run(self, progress: Progress) -> list[Tensor]:
        """The results of this rank's share of the prompts."""
        results: list[list[Tensor]] = []
        with torch.inference_mode(False), torch.no_grad(), frozen(self.passes.model):
            for found in self._batches(progress):
                if results and not self.products.details:
                    # Added up at once, because there may be many edges.
                    results[0][0] += found[0]
                    found[0] = found[0][:0]
                results.append(found)
        return list(map(torch.cat, zip(*results, strict=True)))

    def _batches(self, progress: Progress) -> Iterator[list[Tensor]]:
        """The results of batches that fit into memory."""
        mine = share(len(self.task))
        size = self._batch_size
        start = mine.start

        def batch(prompts: int) -> list[Tensor]:
            some = slice(start, start + prompts)
            return self.batch(some).results()

        while start < mine.stop:
            size = min(size, mine.stop - start)
            found, size = shrinking(batch, size, "prompt")
            start += size
            yield found
            progress(start - mine.start, mine.stop - mine.start)

    def batch(self, prompts: slice) -> BatchProducts:
        """The products of some prompts."""
        task = self.task[prompts]
        products = self.products.start(task)
        line = self._line(task, prompts)
        averaged = [point for point in self.points if point.until is None]
        for start in range(0, len(averaged), POINTS_TOGETHER):
            some = averaged[start : start + POINTS_TOGETHER]
            # No name is left for these gradients, which would keep them during the next passes.
            products.add(line.changes, [self._gradients(task, point, line) for point in some])
        self._add_pieces(products, task, line)
        return products

    def _gradients(self, task: Task, point: GradientPoint, line: _Line) -> Gradients:
        """The gradients at a point; those of an end are taken out of `line`."""
        if point in line.ends:
            return line.ends.pop(point)
        return self._run_point(task, point, line).gradients

    def _add_pieces(self, products: BatchProducts, task: Task, line: _Line) -> None:
        """For each piece of the line, its gradient times the change of the outputs along it."""
        runs: dict[GradientPoint, PassResult] = {}
        for point in self.points:
            if point.until is None:
                continue
            start = replace(point, until=None)
            end = replace(start, fraction=point.until)
            for each in (start, end):
                if each not in runs:
                    runs[each] = self._run_point(task, each, line)
            # out_u(fraction) - out_u(until)
            run = runs[start]
            change = run.outputs - runs[end].outputs
            products.add(Changes(change), [run.gradients])
            runs = {end: runs[end]}  # where the next piece starts

    def _line(self, task: Task, prompts: slice) -> _Line:
        """Run the clean and the corrupted prompts; a point at an end is one of these two runs."""
        ends: dict[GradientPoint, Gradients] = {}
        run, cut = self.passes.run, self._cut
        if CLEAN_END in self.points:
            found = run(task, task.clean, cut, None)
            ends[CLEAN_END] = found.gradients
            clean, logits = found.outputs, found.logits
        else:
            clean, logits = self._plain_run(task)
        corrupted = None
        resamples = self.settings.ablation.name == "resample"
        if resamples and COUNTERFACTUAL_END in self.points:
            found = run(task, task.corrupted, cut, logits)
            ends[COUNTERFACTUAL_END] = found.gradients
            corrupted = found.outputs
        changes = self._counterfactuals.changes(task, prompts, clean, corrupted)
        return _Line(clean, logits, changes, ends)

    def _plain_run(self, task: Task) -> tuple[SourceOutputs, Logits]:
        model, nodes = self.passes.model, self.passes.nodes
        tokens, mask = task.clean, task.mask
        clean, residual = run_and_record(model, nodes, tokens, mask)
        logits = unembed(model, residual[task.scored])
        check_finite(logits)
        return clean, logits

    @property
    def _cut(self) -> Override:
        """The embeddings as they are, where gradients start."""
        embeddings = filter(is_embedding, self.passes.nodes)
        return dict.fromkeys(map(output_hook, embeddings))

    def _run_point(self, task: Task, point: GradientPoint, line: _Line) -> PassResult:
        override = self._override(point, line)
        return self.passes.run(task, task.clean, override, line.clean_logits)

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
        fixed, per_prompt = needed(self.products, task, together)
        if limit is not None and fixed + per_prompt > limit:
            raise InputError(
                f"one prompt of {task.clean.shape[1]} tokens may need up to "
                f"{fixed + per_prompt:,} bytes, but max_memory={limit:,}: allow more, or use "
                "shorter prompts."
            )
        fitting = (self.products.budget - fixed) // per_prompt
        return min(len(task), max(1, fitting))


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

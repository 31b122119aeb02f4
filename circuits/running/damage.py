"""How much worse a metric gets when edges are ablated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.graph import EdgeMask, Graph
from circuits.models import Model, check_model, shape_of
from circuits.models.component_graph import reaching_logits
from circuits.running.ablation import check_corrupted
from circuits.running.executor import Executor, get_executor
from circuits.running.incremental.executor import IncrementalExecutor
from circuits.running.settings import Counts, RunSettings
from circuits.running.variants import KeptEdges, Variants
from circuits.system.ranks import in_slices, totals
from circuits.tasks.metrics import Metric
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task


@dataclass(frozen=True, eq=False)
class DamageMeter:
    """Measures damage: the metric, in its unit, with the sign that makes larger values worse.

    Attributes:
        clean_logits: of the whole model on the clean prompts; of the answers only if the metric
            reads no others, as the task then numbers them.
        reaching_logits: from kept edges to those of them from which a path leads to the logits.
        exact: a meter in float32, if this one computes in lower precision.
    """

    executor: Executor
    metric: Metric
    clean_logits: Float[Tensor, "scored vocab"]
    task: Task
    reaching_logits: Callable[[EdgeMask], EdgeMask]
    exact: DamageMeter | None = None

    @staticmethod
    def prepare(model: Model, graph: Graph, task: Task, settings: RunSettings) -> DamageMeter:
        """Run the clean and the counterfactual prompts once, for all circuits to come."""
        metric, precision = settings.metric, settings.precision
        assert metric is not None
        check_model(model)
        # All that is measured is on the model's device.
        task = task.to(shape_of(model).device)
        check_task(model, task)
        check_corrupted(settings.ablation, task)
        executor = get_executor(model, graph, task, settings)
        # Keeping every edge is the whole model, whichever edges the graph has.
        whole = ~graph.mask([])
        if metric.reads == "answers" and isinstance(executor, IncrementalExecutor):
            tokens, numbered = task.numbering_answers()
            # Without answers the metric says what is missing.
            if len(tokens):
                task, executor = numbered, executor.at_tokens(tokens)
        clean = executor.logits(whole[None])[0]
        reaching = reaching_logits(model, graph)
        meter = DamageMeter(executor, metric, clean, task, reaching)
        # Only the incremental executor has a precision.
        if precision is None or precision.investigated != "float32":
            return meter
        assert isinstance(executor, IncrementalExecutor)
        exact = replace(meter, executor=executor.exact())
        return replace(meter, exact=exact)

    def __call__(self, circuits: Variants | KeptEdges) -> Float[Tensor, " variant"]:
        """Damage of every circuit, mean over scored rows."""
        by_row = self.by_row(circuits)
        return by_row.mean(-1, dtype=torch.float64)

    def by_row(self, circuits: Variants | KeptEdges) -> Float[Tensor, "variant scored"]:
        """Damage of every circuit at every scored row; ranks share the circuits.

        Raises NotFiniteError if the logits or the metric of one of the circuits are not finite.
        """
        variants = Variants.of(circuits)
        run = self.executor.map

        def measure(mine: slice) -> Tensor:
            return run(variants[mine], self._of_logits)

        return in_slices(len(variants), measure).cpu()

    def _of_logits(self, logits: Tensor) -> Tensor:
        return self.metric.damage(logits, self.clean_logits, self.task)

    def near(self, kept: EdgeMask) -> None:
        """Announce that the circuits to come are mostly subsets of this one."""
        self.executor.near(kept)

    @contextmanager
    def counting(self, counts: Counts) -> Iterator[None]:
        """Add what the executor counts inside the block, on all ranks, to `counts`."""
        before = dict(self.executor.counts)
        yield
        after = self.executor.counts
        more = {name: after[name] - before[name] for name in after}
        for name, value in totals(more).items():
            counts[name] = counts.get(name, 0) + value

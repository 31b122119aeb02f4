"""How much worse a metric gets when edges are ablated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.graph import Graph
from circuits.models import Model
from circuits.models.component_graph import reaching_logits
from circuits.running.ablation import Ablation
from circuits.running.executor import Executor, ExecutorName, get_executor
from circuits.running.incremental.executor import IncrementalExecutor
from circuits.running.precision import Precision
from circuits.system.ranks import in_slices
from circuits.tasks.metrics import Metric, get_metric
from circuits.tasks.task import Task


@dataclass(frozen=True, eq=False)
class DamageMeter:
    """How much worse the metric gets with edges ablated: the mean over scored rows, in the metric's unit.

    Attributes:
        reaching_logits: from kept edges to those of them that can matter.
        exact: the same in float32, where this one rounds changes.
    """

    executor: Executor
    metric: Metric
    clean_logits: Float[Tensor, "scored vocab"]
    task: Task
    reaching_logits: Callable[[Bool[Tensor, " edge"]], Bool[Tensor, " edge"]]
    exact: DamageMeter | None = None

    @staticmethod
    def prepare(
        model: Model,
        graph: Graph,
        task: Task,
        *,
        metric: str | Metric | None,
        ablation: str | Ablation,
        executor: ExecutorName = "auto",
        max_memory: int | None = None,
        precision: Precision | None = None,
    ) -> DamageMeter:
        """Run the clean and the counterfactual prompts once, for every circuit that follows.

        Raises:
            InputError: the model, graph and task do not fit together, there is no such metric or ablation, or the logits overflow.
        """
        task = task.to(model.cfg.device)
        chosen = get_metric(metric, task)
        ready = get_executor(
            model,
            graph,
            task,
            ablation=ablation,
            executor=executor,
            max_memory=max_memory,
            precision=precision,
        )
        clean = ready.logits(torch.ones(1, len(graph), dtype=torch.bool))[0]
        meter = DamageMeter(ready, chosen, clean, task, reaching_logits(model, graph))
        if (
            isinstance(ready, IncrementalExecutor)
            and ready.background is not None
            and not ready.background.whole
        ):
            return replace(meter, exact=replace(meter, executor=ready.exact()))
        return meter

    def __call__(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, " variant"]:
        """Mean damage of every circuit."""
        return self.by_row(kept).mean(-1, dtype=torch.float64)

    def by_row(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored"]:
        """Damage of every circuit at every scored row; several ranks measure some circuits each."""

        def measure(mine: slice) -> Tensor:
            return self.executor.map(
                kept[mine], lambda logits: self.metric.damages(logits, self.clean_logits, self.task)
            )

        return in_slices(len(kept), measure).cpu()

    def near(self, kept: Bool[Tensor, " edge"]) -> None:
        """A hint: circuits that follow are mostly subsets of this one."""
        self.executor.near(kept)

"""Running circuits: one door, which chooses the executor by graph and model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.ablation import Ablation, get_ablation, with_means_taken
from circuits.base_run import UnsupportedError
from circuits.circuit import Circuit
from circuits.components import check_fits, check_supported, component_nodes, reaching_logits
from circuits.distributed import in_slices
from circuits.errors import InputError
from circuits.feature_circuits import FeatureExecutor
from circuits.graph import Graph
from circuits.incremental import IncrementalExecutor
from circuits.memory import memory_budget, shrinking
from circuits.metrics import Metric, check_finite, get_metric
from circuits.models import Model, frozen, run_to_residual, unembed
from circuits.patching import EdgeLayout, HookedExecutor, check_task
from circuits.precision import Precision
from circuits.tasks.base import Task
from circuits.transcoders.base import Transcoders

PROMPTS_PER_RUN = 256
# More than a step takes: what is prepared once is the faster the more prompts it is prepared for.
PREPARED_CPU_BYTES = 1 << 32

ExecutorName = Literal["auto", "incremental", "hooks"]


@runtime_checkable
class Executor(Protocol):
    """Runs circuits of one graph on one task, counterfactual outputs at hand."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Nodes computed so far (one node in one circuit), and batches of circuits."""
        ...

    def logits(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored vocab"]:
        """Logits of every circuit at every scored row."""
        ...

    def map(self, kept: Bool[Tensor, "variant edge"], function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of the logits, some circuits at a time."""
        ...

    def near(self, kept: Bool[Tensor, "edge"]) -> None:
        """A hint: circuits that follow are mostly subsets of this one."""
        ...

    def fixed_cost(self, edges: Sequence[int]) -> float:
        """About what a batch costs on top of what each circuit in it does, in circuits, where they lack such edges of the one told of."""
        ...


def get_executor(
    model: Model,
    graph: Graph,
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    executor: ExecutorName = "auto",
    max_memory: int | None = None,
    precision: Precision | None = None,
    transcoders: Transcoders | None = None,
) -> Executor:
    """An executor that keeps what does not change between circuits.

    Args:
        executor: "incremental" recomputes only what changes; "hooks" runs the model's own modules, and is the reference; "auto" takes the
            first where it knows the architecture, and says so where it does not.
        max_memory: bytes that one step may take; None chooses from what is free.
        precision: of the incremental executor; None is float32 throughout.
        transcoders: of a graph of features, which has one executor of its own; None loads those the graph remembers.

    Raises:
        InputError: there is no such executor, it has no such precision, the model, graph and task do not fit together, or memory runs out.
    """
    if executor not in get_args(ExecutorName):
        raise InputError(f"there is no executor {executor!r}; choose 'auto', 'incremental' or 'hooks'.")
    chosen = get_ablation(ablation)
    if graph.transcoders is not None:
        if executor == "incremental" or precision is not None:
            raise InputError("circuits of features are run by hooks, in the model's precision; use executor='auto'.")
        return FeatureExecutor.prepare(model, graph, task, chosen, transcoders=transcoders, max_memory=max_memory)
    if executor == "hooks" and precision is not None:
        raise InputError(f"precision={str(precision)!r} needs the incremental executor; leave out executor='hooks' or the precision.")
    if executor != "hooks":
        try:
            return _prepared(partial(IncrementalExecutor.prepare, precision=precision), model, graph, task, chosen, max_memory)
        except UnsupportedError as error:
            if precision is not None:
                raise InputError(f"{model.cfg.model_name} cannot be run incrementally: {error}; leave out the precision.") from error
            if executor == "incremental":
                raise InputError(f"{model.cfg.model_name} cannot be run incrementally: {error}; use executor='auto'.") from error
            _say_once(f"{model.cfg.model_name} is run by the reference executor, which is slower: {error}.")
    return _prepared(HookedExecutor.prepare, model, graph, task, chosen, max_memory)


def _prepared(
    prepare: Callable[..., Executor], model: Model, graph: Graph, task: Task, ablation: Ablation, max_memory: int | None
) -> Executor:
    return shrinking(lambda _: prepare(model, graph, task, ablation, max_memory=max_memory), 1, "run of the prompts")[0]


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def run_circuits(
    model: Model,
    graph: Graph,
    kept: Bool[Tensor, "variant edge"],
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    executor: ExecutorName = "auto",
    max_memory: int | None = None,
    transcoders: Transcoders | None = None,
) -> Float[Tensor, "variant scored vocab"]:
    """Logits at every scored row of many circuits: row i keeps the edges `kept[i]`, all others are ablated.

    Many prompts are run in pieces, so that what is kept of a piece fits into memory; means are taken over all of them nevertheless.

    Args:
        executor: see `get_executor`.
        max_memory: bytes that what is kept of a piece may take, and again as many for one step; None chooses from what is free.
        transcoders: see `get_executor`.

    Raises:
        InputError: `kept` does not fit the graph, the model, graph and task do not fit together, or the logits overflow.
    """
    if kept.dtype != torch.bool or kept.dim() != 2 or kept.shape[1] != len(graph):
        raise InputError(
            f"kept has shape {tuple(kept.shape)} of {kept.dtype}; it must be [variant, edge] of bool, over {len(graph)} edges."
        )
    if graph.transcoders is not None:
        return get_executor(
            model, graph, task, ablation=ablation, executor=executor, max_memory=max_memory, transcoders=transcoders
        ).logits(kept)
    chosen, size = get_ablation(ablation), _prompts_at_once(model, max_memory, task)
    # Outputs that are given are at hand for all prompts at once.
    if size >= len(task) or chosen.name == "given":
        return get_executor(model, graph, task, ablation=chosen, executor=executor, max_memory=max_memory).logits(kept)
    check_supported(model)
    check_fits(model, graph)
    check_task(model, task)
    chosen = with_means_taken(model, EdgeLayout.of(model, graph).nodes, task.to(model.cfg.device), chosen, prompts_per_run=size)
    fitting = replace(graph, model=None)  # which reads no weights again for every piece
    pieces = (task[start : start + size] for start in range(0, len(task), size))
    return torch.cat(
        [get_executor(model, fitting, piece, ablation=chosen, executor=executor, max_memory=max_memory).logits(kept) for piece in pieces], 1
    )


def _prompts_at_once(model: Model, max_memory: int | None, task: Task) -> int:
    """For how many prompts an executor can be prepared and run one circuit, at least one.

    That takes about six times what all sources write: kept are what they write clean, ablated and in the empty circuit, and a difference;
    of a circuit what changes. By layer, what its slots read, and q, k and v.
    """
    cfg = model.cfg
    per_token = (6 * len(component_nodes(model, split_embed=True)) + 7 * cfg.n_layers) * cfg.d_model * cfg.dtype.itemsize
    return max(1, memory_budget(cfg.device, max_memory, cpu_bytes=PREPARED_CPU_BYTES) // (per_token * task.clean.shape[1]))


def run_circuit(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    executor: ExecutorName = "auto",
    max_memory: int | None = None,
    transcoders: Transcoders | None = None,
) -> Float[Tensor, "scored vocab"]:
    """Logits of one circuit at every scored row: the model computes with every edge outside the circuit ablated.

    Args:
        executor, max_memory, transcoders: see `run_circuits`.

    Raises:
        InputError: the model, circuit and task do not fit together, or the logits overflow.
    """
    return run_circuits(
        model, circuit.graph, circuit.kept[None], task, ablation=ablation, executor=executor, max_memory=max_memory, transcoders=transcoders
    )[0]


def model_logits(model: Model, task: Task, prompts: Literal["clean", "corrupted"] = "clean") -> Float[Tensor, "scored vocab"]:
    """The whole model's logits at every scored row.

    Raises:
        InputError: the logits overflow.
    """
    check_task(model, task)
    task = task.to(model.cfg.device)
    with frozen(model), torch.no_grad():
        parts = [_plain_logits(model, task[start : start + PROMPTS_PER_RUN], prompts) for start in range(0, len(task), PROMPTS_PER_RUN)]
    logits = torch.cat(parts)
    check_finite(logits)
    return logits


def _plain_logits(model: Model, task: Task, prompts: str) -> Float[Tensor, "scored vocab"]:
    tokens = task.clean if prompts == "clean" else task.corrupted
    return unembed(model, run_to_residual(model, tokens, task.mask)[task.scored])


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
    reaching_logits: Callable[[Bool[Tensor, "edge"]], Bool[Tensor, "edge"]]
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
        ready = get_executor(model, graph, task, ablation=ablation, executor=executor, max_memory=max_memory, precision=precision)
        clean = ready.logits(torch.ones(1, len(graph), dtype=torch.bool))[0]
        meter = DamageMeter(ready, chosen, clean, task, reaching_logits(model, graph))
        if isinstance(ready, IncrementalExecutor) and ready.background is not None and not ready.background.whole:
            return replace(meter, exact=replace(meter, executor=ready.exact()))
        return meter

    def __call__(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant"]:
        """Mean damage of every circuit."""
        return self.by_row(kept).mean(-1, dtype=torch.float64)

    def by_row(self, kept: Bool[Tensor, "variant edge"]) -> Float[Tensor, "variant scored"]:
        """Damage of every circuit at every scored row; several ranks measure some circuits each."""

        def measure(mine: slice) -> Tensor:
            return self.executor.map(kept[mine], lambda logits: self.metric.damages(logits, self.clean_logits, self.task))

        return in_slices(len(kept), measure).cpu()

    def near(self, kept: Bool[Tensor, "edge"]) -> None:
        """A hint: circuits that follow are mostly subsets of this one."""
        self.executor.near(kept)

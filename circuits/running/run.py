"""Run circuits: the logits of a model with every edge outside a circuit ablated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.graph import Graph, PooledFeatureGraph, by_edge, check_is_graph
from circuits.models import (
    Model,
    changes,
    check_model,
    frozen,
    run_to_residual,
    scored_logits,
    shape_of,
    told,
)
from circuits.models.component_graph import component_nodes
from circuits.running.ablation import Ablation, check_corrupted, with_means_taken
from circuits.running.edge_layout import check_runnable
from circuits.running.executor import get_executor
from circuits.running.settings import ExecutorName, RunSettings, VariantLogits
from circuits.running.variants import KeptEdges
from circuits.system.errors import InputError
from circuits.system.kinds import one_of
from circuits.system.memory import memory_budget
from circuits.system.numbers import WholeNumber
from circuits.system.tensors import as_tensor, joined
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders

PROMPTS_PER_RUN = 256
# Preparing an executor pays off more the more prompts it is for, so it may take more than a step.
PREPARED_CPU_BYTES = 1 << 32


def run_circuits(
    model: Model,
    graph: Graph,
    kept: Any,
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    executor: ExecutorName = "auto",
    max_memory: WholeNumber | None = None,
    transcoders: Transcoders | None = None,
) -> Float[Tensor, "variant scored vocab"]:
    """Logits of many circuits at every scored row: variant i keeps the edges `kept[i]`.

    Args:
        kept: booleans [variant, edge], as a tensor, an array or lists.
        ablation: what the other edges carry instead.
        executor: "incremental" recomputes only what changes; "hooks" is the reference executor;
            "auto" takes the first where the architecture is known to it.
        max_memory: bytes that the stored runs of a part of the prompts may take, and again as many
            for one step; None chooses from the memory that is free.
        transcoders: for a graph of features; None loads the transcoders that the graph names.

    Raises:
        InputError: `kept` does not fit the graph; the model, graph and task do not fit together;
            or the logits overflow.

    >>> import circuits, torch
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> graph = circuits.component_graph(model)
    >>> kept = torch.stack([graph.mask([]), ~graph.mask([])])  # the empty circuit and the model
    >>> logits = circuits.run_circuits(model, graph, kept, task)
    >>> logits.shape == (2, 4, model.cfg.d_vocab)
    True
    """
    settings = RunSettings.parse(
        ablation=ablation, executor=executor, max_memory=max_memory, transcoders=transcoders
    )
    return run_variants(model, graph, kept, task, settings)


def run_circuit(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    executor: ExecutorName = "auto",
    max_memory: WholeNumber | None = None,
    transcoders: Transcoders | None = None,
) -> Float[Tensor, "scored vocab"]:
    """Logits of one circuit at every scored row: every edge outside the circuit is ablated.

    Args:
        ablation, executor, max_memory, transcoders: see `run_circuits`.

    Raises:
        InputError: the model, circuit and task do not fit together, or the logits overflow.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> whole = circuits.Circuit.full(circuits.component_graph(model))
    >>> circuits.run_circuit(model, whole, task).shape[0]
    4
    """
    settings = RunSettings.parse(
        ablation=ablation, executor=executor, max_memory=max_memory, transcoders=transcoders
    )
    check_is_circuit(circuit)
    kept = circuit.kept[None]
    logits = run_variants(model, circuit.graph, kept, task, settings)
    return logits[0]


@without_modes()
def run_variants(
    model: Model, graph: Graph, kept: KeptEdges, task: Task, settings: RunSettings
) -> VariantLogits:
    """`run_circuits`, with its arguments parsed.

    If the prompts do not fit into memory together they are run in parts; means are still taken
    over all of them.
    """
    check_is_graph(graph)
    kept = as_tensor(by_edge(graph, kept, "kept"), "kept")
    if kept.dtype != torch.bool or kept.shape[1:] != (len(graph),):
        raise InputError(
            f"kept has shape {tuple(kept.shape)} of {kept.dtype}; it must be [variant, edge] of "
            f"bool, over {len(graph)} edges."
        )
    if not len(kept):
        # Executors join what they have computed, and of no circuit there is nothing.
        nothing = graph.mask([])[None]
        return run_variants(model, graph, nothing, task, settings)[:0]
    logits = []
    for own_graph, part, own_settings in parts_that_fit(model, graph, task, settings):
        executor = get_executor(model, own_graph, part, own_settings)
        logits.append(executor.logits(kept))
    return joined(logits, axis=1)


def parts_that_fit(
    model: Model, graph: Graph, task: Task, settings: RunSettings
) -> Iterator[tuple[Graph, Task, RunSettings]]:
    """The task in parts that executors can be prepared for, each with the graph and settings."""
    check_task(model, task)
    check_corrupted(settings.ablation, task)
    size = len(task)
    # The executor of features cuts the prompts itself, and outputs that the user gives are in
    # memory for all prompts already.
    of_features = isinstance(graph, PooledFeatureGraph)
    if not of_features and settings.ablation.name != "given":
        size = _prompts_at_once(model, settings.max_memory, task)
    if size >= len(task):
        yield graph, task, settings
        return
    # Means would be taken before an executor could refuse what does not fit.
    check_runnable(model, graph, task)
    task = task.to(shape_of(model).device)
    nodes = component_nodes(model, graph.splits_embedding)
    ablation = with_means_taken(model, nodes, task, settings.ablation, prompts_per_run=size)
    settings = replace(settings, ablation=ablation)
    # The fit was checked above; without an identity no part reads all weights again.
    graph = replace(graph, model=None)
    for start in range(0, len(task), size):
        yield graph, task[start : start + size], settings


def _prompts_at_once(model: Model, max_memory: int | None, task: Task) -> int:
    """For how many prompts an executor can be prepared and run one circuit; at least one."""
    cfg = shape_of(model)
    # Stored: six times the outputs of all sources (clean, ablated, in the empty circuit, a
    # difference, and the changes in one circuit), and by layer the inputs of its slots, q, k and v.
    n_sources = len(component_nodes(model, split_embed=True))
    rows = 6 * n_sources + 7 * cfg.n_layers
    token_bytes = rows * cfg.d_model * cfg.dtype.itemsize
    bytes_per_prompt = token_bytes * task.clean.shape[1]
    budget = memory_budget(cfg.device, max_memory, cpu_bytes=PREPARED_CPU_BYTES)
    return max(1, budget // bytes_per_prompt)


@without_modes()
def model_logits(
    model: Model, task: Task, prompts: Literal["clean", "corrupted"] = "clean"
) -> Float[Tensor, "scored vocab"]:
    """Logits of the whole model at every scored row, on the clean or the corrupted prompts.

    Raises:
        InputError: the task does not fit the model, there are no such prompts, or the logits
            overflow.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> circuits.model_logits(model, circuits.load_task("ioi", model, n=4)).shape[0]
    4
    """
    check_model(model)
    check_task(model, task)
    one_of(prompts, "prompts", ["clean", "corrupted"])
    task = task.to(shape_of(model).device)
    logits = []
    with frozen(model), torch.no_grad():
        # What a user has changed may mix the prompts of a batch.
        size = 1 if changes(model) else PROMPTS_PER_RUN
        for start in range(0, len(task), size):
            part = task[start : start + size]
            with told(model, getattr(task, prompts)):
                logits.append(_logits(model, part, prompts))
    result = torch.cat(logits)
    check_finite(result, model)
    return result


def _logits(model: Model, task: Task, prompts: str) -> Float[Tensor, "scored vocab"]:
    clean, corrupted = task.masked_prompts
    tokens, mask, scored = clean if prompts == "clean" else corrupted
    # No padding follows the longest prompt, where hooks might act on it.
    length = int(mask.sum(1).max())
    residual = run_to_residual(model, tokens[:, :length], mask[:, :length])
    # Only the scored rows are unembedded: a vocabulary is wide.
    logits = scored_logits(model, residual, scored[:, :length])
    if prompts == "clean":
        return logits
    # Several rows can have the same counterpart.
    number = scored.flatten().cumsum(0).view_as(scored) - 1
    return logits[task.to_clean(number)[task.scored]]

"""Running circuits: one door, which chooses the executor by graph and model."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.models import Model, frozen, run_to_residual, unembed
from circuits.models.component_graph import check_supported, component_nodes
from circuits.models.identity import check_fits
from circuits.running.ablation import Ablation, get_ablation, with_means_taken
from circuits.running.edge_layout import EdgeLayout
from circuits.running.executor import ExecutorName, get_executor
from circuits.system.errors import InputError
from circuits.system.memory import memory_budget
from circuits.tasks.metrics import check_finite
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task
from circuits.transcoders.transcoder import Transcoders

PROMPTS_PER_RUN = 256
# More than a step takes: what is prepared once is the faster the more prompts it is prepared for.
PREPARED_CPU_BYTES = 1 << 32


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
            model,
            graph,
            task,
            ablation=ablation,
            executor=executor,
            max_memory=max_memory,
            transcoders=transcoders,
        ).logits(kept)
    chosen, size = get_ablation(ablation), _prompts_at_once(model, max_memory, task)
    # Outputs that are given are at hand for all prompts at once.
    if size >= len(task) or chosen.name == "given":
        return get_executor(
            model, graph, task, ablation=chosen, executor=executor, max_memory=max_memory
        ).logits(kept)
    check_supported(model)
    check_fits(model, graph)
    check_task(model, task)
    chosen = with_means_taken(
        model,
        EdgeLayout.of(model, graph).nodes,
        task.to(model.cfg.device),
        chosen,
        prompts_per_run=size,
    )
    fitting = replace(graph, model=None)  # which reads no weights again for every piece
    pieces = (task[start : start + size] for start in range(0, len(task), size))
    return torch.cat(
        [
            get_executor(
                model, fitting, piece, ablation=chosen, executor=executor, max_memory=max_memory
            ).logits(kept)
            for piece in pieces
        ],
        1,
    )


def _prompts_at_once(model: Model, max_memory: int | None, task: Task) -> int:
    """For how many prompts an executor can be prepared and run one circuit, at least one.

    That takes about six times what all sources write: kept are what they write clean, ablated and in the empty circuit, and a difference;
    of a circuit what changes. By layer, what its slots read, and q, k and v.
    """
    cfg = model.cfg
    per_token = (
        (6 * len(component_nodes(model, split_embed=True)) + 7 * cfg.n_layers)
        * cfg.d_model
        * cfg.dtype.itemsize
    )
    return max(
        1,
        memory_budget(cfg.device, max_memory, cpu_bytes=PREPARED_CPU_BYTES)
        // (per_token * task.clean.shape[1]),
    )


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
        model,
        circuit.graph,
        circuit.kept[None],
        task,
        ablation=ablation,
        executor=executor,
        max_memory=max_memory,
        transcoders=transcoders,
    )[0]


def model_logits(
    model: Model, task: Task, prompts: Literal["clean", "corrupted"] = "clean"
) -> Float[Tensor, "scored vocab"]:
    """The whole model's logits at every scored row.

    Raises:
        InputError: the logits overflow.
    """
    check_task(model, task)
    task = task.to(model.cfg.device)
    with frozen(model), torch.no_grad():
        parts = [
            _plain_logits(model, task[start : start + PROMPTS_PER_RUN], prompts)
            for start in range(0, len(task), PROMPTS_PER_RUN)
        ]
    logits = torch.cat(parts)
    check_finite(logits)
    return logits


def _plain_logits(model: Model, task: Task, prompts: str) -> Float[Tensor, "scored vocab"]:
    tokens = task.clean if prompts == "clean" else task.corrupted
    return unembed(model, run_to_residual(model, tokens, task.mask)[task.scored])

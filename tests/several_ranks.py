"""Two ranks on this machine, and what `test_distributed` does there: every method, and errors on
one rank. Each rank writes what it found into its folder.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from architectures import random_model, random_task

import circuits
from circuits.running.incremental.batch import VariantRun
from circuits.runs.circuit_run import run
from circuits.system.ranks import RankError, ranks, start

TOKEN_OF_PROMPT = torch.tensor([3, 1, 4, 1, 5])


def own_values(
    logits: torch.Tensor, clean_logits: torch.Tensor, task: circuits.Task
) -> torch.Tensor:
    """A logit for each prompt, known to this function only, against the other rows."""
    token = TOKEN_OF_PROMPT[task.row_prompt]
    standardised = (logits - logits.mean(0)) / (logits.std(0, correction=0) + 1)
    return (standardised + logits).gather(1, token[:, None])[:, 0]


OWN = circuits.Metric("own", own_values, "lower_is_damage")
METHODS: dict[str, circuits.CircuitDiscoverer] = {
    "acdc": circuits.ACDC(0.02),
    # One candidate at a time: more ranks than candidates.
    "acdc-one": circuits.ACDC(0.02, speculate=False),
    "acdc-bfloat16": circuits.ACDC(0.02, precision="bfloat16"),
    "batched-acdc": circuits.BatchedACDC(0.02, group="layer", verify=True),
    "eap": circuits.EAP(),
    "eap-mean": circuits.EAP(gradient_at="corrupted", ablation="mean_by_position"),
    "eap-ig": circuits.EAPIG(),
    "eap-own-metric": circuits.EAP(metric=OWN, gradient_at="both"),
    "eap-ig-own-metric": circuits.EAPIG(metric=OWN, along="activations", steps=2),
    "eap-ig-noise": circuits.EAPIG(ablation="noise"),
    "patching-other-mean": circuits.ActivationPatching(
        ablation=circuits.Ablation("mean", over=random_task(length=12, seed=5))
    ),
    "patching": circuits.ActivationPatching(),
}
TASKS = {
    "several": lambda: random_task(batch=5, ragged=True, several=True),
    "one prompt": lambda: random_task(batch=1),
}


def failing(error: type[Exception] | None) -> circuits.Metric:
    """A metric that cannot be computed on the second rank, but for the whole model; None: it is NaN
    there.
    """
    seen = []

    def values(
        logits: torch.Tensor, clean_logits: torch.Tensor, task: circuits.Task
    ) -> torch.Tensor:
        seen.append(logits)
        if ranks().rank == 1 and len(seen) > 1:
            if error is None:
                return logits[..., 0] * torch.nan
            raise error("no number here")
        return logits[..., 0]

    return circuits.Metric("failing", values, "higher_is_damage")


@contextmanager
def broken_executor() -> Iterator[None]:
    """The second rank's fails with an error that is no user's."""
    whole = VariantRun.execute

    def execute(run: VariantRun) -> torch.Tensor:
        if ranks().rank == 1 and run.n_variants > 1:
            raise ValueError("no number here")
        return whole(run)

    with patch.object(VariantRun, "execute", execute):
        yield


@contextmanager
def little_memory() -> Iterator[None]:
    """The second rank has none for more than two circuits at a time."""
    whole, failed = VariantRun.execute, []

    def execute(run: VariantRun) -> torch.Tensor:
        if ranks().rank == 1 and run.n_variants > 2:
            failed.append(run)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return whole(run)

    with patch.object(VariantRun, "execute", execute):
        yield
    assert bool(failed) == (ranks().rank == 1)


def told(discoverer: circuits.CircuitDiscoverer) -> str:
    """The error that a method ends with."""
    try:
        discoverer.discover(random_model(), random_task())
    except (circuits.InputError, RankError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def as_rank(rank: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    """Work as one of two ranks, in a process of its own."""
    torch.set_num_threads(1)
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="localhost", WORLD_SIZE="2")
    os.environ.update(MASTER_PORT=str(port), RANK=str(rank))
    work(*arguments)


def on_two_ranks(new_process: Callable[..., Any], work: Callable[..., None], *arguments) -> None:
    """Let two ranks work, without torchrun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        new_process(target=as_rank, args=(rank, port, work, *arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0


def save_all(folder: Path) -> None:
    """Everything, on this rank."""
    with start():
        mine = folder / str(ranks().rank)
        for task_name, task in TASKS.items():
            for name, discoverer in METHODS.items():
                discoverer.discover(random_model(), task()).save(mine / task_name / name)
        with little_memory():
            METHODS["acdc"].discover(random_model(), TASKS["several"]()).save(
                mine / "little memory"
            )
        model, task = random_model(), TASKS["several"]()
        with torch.inference_mode():
            own = METHODS["eap-own-metric"].discover(model, task)
        with broken_executor():
            mistake = told(circuits.ActivationPatching())
        details = circuits.EAP().attribute(random_model(), TASKS["several"]())
        summary: dict[str, Any] = {
            "world": ranks().world,
            "in inference mode": own.scores.tolist(),
            "mistake": mistake,
            "by_prompt": details.edges_by_prompt.tolist(),
            "positions": details.sources_by_position.tolist(),
            "neurons": details.neurons.tolist(),
            "reused": [
                run(circuits.EAP(), random_model(), random_task(), out=folder / "runs").reused
                for _ in range(2)
            ],
            "vanishing": told(circuits.EAP(metric="kl")),
            "input error": told(circuits.ActivationPatching(metric=failing(circuits.InputError))),
            "metric's error": told(circuits.ActivationPatching(metric=failing(ValueError))),
            "nan": told(circuits.ACDC(0.02, metric=failing(None))),
        }
        (mine / "summary.json").write_text(json.dumps(summary))

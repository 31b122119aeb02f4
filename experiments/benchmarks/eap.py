"""How close does EAP come to its floor, and does it keep to `max_memory`?

    python experiments/benchmarks/eap.py --threads 1 \\
        --out experiments/benchmarks/results/eap-cpu.json

The floor is what every gradient method needs: one forward pass on the corrupted prompts, and one
forward and one backward pass to the embeddings on the clean prompts, of the plain model with flags
off and parameters frozen. Floor and EAP take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from common import (
    circumstances,
    most_allocated,
    paired_ratio,
    paired_times,
    random_model,
    random_task,
    write_results,
)

import circuits
from circuits.models import Model, frozen


@dataclass(frozen=True)
class Config:
    """Device, prompts and repetitions."""

    device: str = "cpu"
    """Device of the models."""
    threads: int = 1
    """torch threads, for all programs."""
    repeats: int = 15
    """Timed repetitions, after one warm-up."""
    prompts: int = 8
    """Prompts of the model with GPT-2 small's shape."""
    out: Path = Path("runs/benchmarks/eap.json")
    """Result file."""


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    results: dict[str, Any] = {
        "config": {**asdict(config), "out": None},
        **circumstances(config.device),
        "cases": [],
    }
    for name, make in cases(config).items():
        model, task = make()
        results["cases"].append(
            {
                "case": name,
                "tokens": list(task.clean.shape),
                **times(model, task, config),
                "memory": memory(model, task),
            }
        )
        write_results(config.out, results)
        show(results["cases"][-1])


def cases(config: Config) -> dict[str, Callable[[], tuple[Model, circuits.Task]]]:
    """Yield models with their prompts, one after the other."""

    def toy_world() -> tuple[Model, circuits.Task]:
        model = circuits.load_model("toy-world", device=config.device)
        return model, circuits.load_task("ioi", model, n=64)

    def random(shape: str, prompts: int) -> tuple[Model, circuits.Task]:
        model = random_model(shape, config.device)
        return model, random_task(model, prompts, 16)

    return {
        "toy-world, IOI": toy_world,
        "random, 4 layers": lambda: random("4 layers, d_model 256", 16),
        "random, gpt2-small": lambda: random("gpt2-small", config.prompts),
    }


def floor(model: Model, task: circuits.Task) -> None:
    """Two forward passes and one backward pass of the plain model."""

    def leaf(activation: torch.Tensor, hook: object) -> torch.Tensor:
        return activation.detach().requires_grad_()

    with frozen(model):
        with torch.no_grad():
            model(task.corrupted)
        with model.hooks(fwd_hooks=[("hook_embed", leaf)]):
            logits = model(task.clean)[task.scored]
            right, wrong = (
                logits.gather(1, answers[:, :1])
                for answers in (task.row_answers, task.row_wrong_answers)
            )
            (wrong - right).mean().backward()


def times(model: Model, task: circuits.Task, config: Config) -> dict[str, Any]:
    """Seconds of every repetition, and EAP's time divided by the floor's."""
    graph = circuits.component_graph(model)
    programs: dict[str, Callable[[], object]] = {
        "floor": lambda: floor(model, task),
        "discover": lambda: circuits.EAP().discover(model, task),
        "discover, graph given": lambda: circuits.EAP().discover(model, task, graph=graph),
        "attribute": lambda: circuits.EAP().attribute(model, task),
    }
    seconds = paired_times(programs, config.repeats, config.device)
    return {
        "edges": len(graph),
        "seconds": seconds,
        "over_floor": {name: paired_ratio(seconds, name, "floor") for name in programs},
    }


def memory(model: Model, task: circuits.Task) -> list[dict[str, int | None]]:
    """Peak above model and task, for `max_memory` from one prompt's need to that of all prompts.

    None where it is refused.
    """
    device, graph = str(model.cfg.device), circuits.component_graph(model)
    one = most_allocated(lambda: circuits.EAP().discover(model, task[:1], graph=graph), device)
    every = most_allocated(lambda: circuits.EAP().discover(model, task, graph=graph), device)
    rows = []
    for part in (0.1, 0.3, 0.6):
        method = circuits.EAP(max_memory=int(one + part * (every - one)))
        try:
            peak = most_allocated(lambda: method.discover(model, task, graph=graph), device)  # noqa: B023
        except circuits.InputError:
            # The bound on what a prompt needs is generous.
            peak = None
        rows.append({"max_memory": method.max_memory, "peak": peak})
    return rows


def show(case: dict[str, Any]) -> None:
    """Show one case as tables."""
    print(
        f"\n{case['case']}: {case['tokens'][0]} prompts of {case['tokens'][1]} tokens, "
        f"{case['edges']:,} edges"
    )
    seconds = pd.DataFrame(case["seconds"])
    print(
        pd.DataFrame(
            {
                "median s": seconds.median(),
                "least s": seconds.min(),
                "over floor": case["over_floor"],
            }
        )
        .round(4)
        .to_string()
    )
    print(
        pd.DataFrame(case["memory"], dtype=float)
        .assign(ratio=lambda rows: rows["peak"] / rows["max_memory"])
        .round(3)
        .to_string(index=False)
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

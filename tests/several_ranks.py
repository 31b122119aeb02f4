"""What `test_distributed` starts on several ranks: every method, and errors on one rank. Each rank writes what it found into its folder."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from architectures import random_model, random_task

import circuits
from circuits.distributed import RankError, ranks, start
from circuits.run import run

METHODS: dict[str, circuits.CircuitDiscoverer] = {
    "acdc": circuits.ACDC(0.02),
    # One candidate at a time: more ranks than candidates.
    "acdc-one": circuits.ACDC(0.02, speculate=False),
    "eap": circuits.EAP(),
    "eap-mean": circuits.EAP(gradient_at="corrupted", ablation="mean_by_position"),
    "eap-ig": circuits.EAPIG(),
    "patching": circuits.ActivationPatching(),
}
TASKS = {"several": lambda: random_task(batch=5, ragged=True, several=True), "one prompt": lambda: random_task(batch=1)}


def failing(error: type[Exception]) -> circuits.Metric:
    """A metric that cannot be computed on the second rank, but for the whole model."""
    seen = []

    def values(logits: torch.Tensor, clean_logits: torch.Tensor, task: circuits.Task) -> torch.Tensor:
        seen.append(logits)
        if ranks().rank == 1 and len(seen) > 1:
            raise error("no number here")
        return logits[..., 0]

    return circuits.Metric("failing", values, "higher_is_damage")


def told(discoverer: circuits.CircuitDiscoverer) -> str:
    """The error that a method ends with."""
    try:
        discoverer.discover(random_model(), random_task())
    except (circuits.InputError, RankError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    """Everything, on this rank."""
    with start():
        mine = folder / str(ranks().rank)
        for task_name, task in TASKS.items():
            for name, discoverer in METHODS.items():
                discoverer.discover(random_model(), task()).save(mine / task_name / name)
        details = circuits.EAP().attribute(random_model(), TASKS["several"]())
        summary: dict[str, Any] = {
            "world": ranks().world,
            "by_prompt": details.edges_by_prompt.tolist(),
            "positions": details.sources_by_position.tolist(),
            "neurons": details.neurons.tolist(),
            "reused": [run(circuits.EAP(), random_model(), random_task(), out=folder / "runs").reused for _ in range(2)],
            "vanishing": told(circuits.EAP(metric="kl")),
            "input error": told(circuits.ActivationPatching(metric=failing(circuits.InputError))),
            "mistake": told(circuits.ActivationPatching(metric=failing(ValueError))),
        }
        (mine / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

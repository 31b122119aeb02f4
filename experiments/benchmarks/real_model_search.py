"""Exact ACDC on a real model: how long, with how much memory, and are the decisions right?

    python experiments/benchmarks/real_model_search.py FOLDER --threads 1 \\
        --out experiments/benchmarks/results/real-model-search-cpu.json

FOLDER holds a checkpoint; `experiments/real_model.py` makes one of SmolLM2-135M. The naive loop
runs the model with hooks once for every decision. On a real model that takes hours, so it is run at
decisions that are evenly spread over the search, each in the state in which the search was: the
mean is the time of one, and its decisions are compared with the search's. A run with hooks takes
longer the more is ablated, so samples from the beginning alone would not do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import tyro
from common import circumstances, clocked, write_results

import circuits
from circuits.discovery.search.edge_order import edge_order
from circuits.models import Model
from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings

# What may be decided either way, since rounding differs.
BAND = 1e-5
EVERY = 0.02


@dataclass(frozen=True)
class Config:
    """Model, prompts and searches."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The checkpoint."""
    device: str = "cpu"
    """Device of the model."""
    threads: int = 1
    """torch threads, for both programs."""
    prompts: int = 2
    """IOI prompts."""
    thresholds: tuple[float, ...] = (0.03,)
    """Thresholds, in nats for KL and in logits for the logit difference."""
    metrics: tuple[str, ...] = ("kl", "logit_difference")
    """What damage is measured in."""
    orders: tuple[str, ...] = ("topological", "grouped")
    """Orders of the search with KL; other metrics are searched in the first one only."""
    samples: int = 12
    """Decisions for which the naive loop is run, three times each; 0 for none."""
    out: Path = Path("runs/benchmarks/real-model-search.json")
    """Result file."""


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = circuits.load_model(config.folder, device=config.device)
    task = circuits.load_task("ioi", model, n=config.prompts, split="train")
    results: dict[str, Any] = {
        "config": {**asdict(config), "out": None, "folder": config.folder.name},
        **circumstances(config.device),
        "cases": [],
    }
    searches = [
        (metric, order, threshold)
        for metric in config.metrics
        for order in config.orders[: None if metric == "kl" else 1]
        for threshold in config.thresholds
    ]
    for metric, order, threshold in searches:
        method = circuits.ACDC(threshold, metric=metric, order=order)  # type: ignore[arg-type]
        case = measure(model, task, method, config)
        results["cases"].append({"model": config.folder.name, **case})
        write_results(config.out, results)
        print({name: value for name, value in case.items() if name != "record"}, flush=True)


def measure(
    model: Model, task: circuits.Task, method: circuits.ACDC, config: Config
) -> dict[str, Any]:
    """One search, and the naive loop at some of its decisions."""
    with peak_memory(config.device) as peak:
        circuit, seconds = clocked(lambda: method.discover(model, task), config.device)
    record = {name: value for name, value in circuit.record.items() if name != "settings"}
    is_sampled = config.samples and method.order == "topological"
    return {
        "metric": method.metric,
        "order": method.order,
        "threshold": method.threshold,
        "prompts": len(task),
        "tokens": task.clean.shape[1],
        "edges": len(circuit.graph),
        "kept": len(circuit),
        "seconds": seconds,
        "peak_bytes": peak["bytes"],
        "naive": naive(model, task, method, circuit, config) if is_sampled else None,
        "record": record,
    }


def naive(
    model: Model,
    task: circuits.Task,
    method: circuits.ACDC,
    circuit: circuits.Circuit,
    config: Config,
) -> dict[str, Any]:
    """Seconds of one hooked run at each sampled decision, and whether decisions differ."""
    graph = circuit.graph
    settings = RunSettings.parse(task, metric=method.metric, executor="hooks")
    damage = DamageMeter.prepare(model, graph, task, settings)
    order = [edge for trial in edge_order(graph, method.order) for edge in trial.edges]
    tried = [place for place, edge in enumerate(order) if not circuit.scores[edge].isnan()]
    shares = (np.arange(config.samples) + 0.5) / config.samples
    seconds: list[dict[str, float]] = []
    differ = 0
    for place in np.array(tried)[(shares * len(tried)).astype(int)]:
        before = torch.ones(len(graph), dtype=torch.bool)
        before[order[:place]] = circuit.kept[order[:place]]
        without = before.clone()
        without[order[place]] = False
        found = [
            clocked(lambda each=each: damage(each[None]), config.device)
            for each in (without, before, without)  # type: ignore[misc]
        ]
        seconds.append({clock: min(took[clock] for _, took in found) for clock in found[0][1]})
        increase = float(found[0][0] - found[1][0]) - method.threshold
        stays = bool(circuit.kept[order[place]])
        differ += abs(increase) > BAND and stays != (increase >= 0)
    return {"seconds_of_one": seconds, "differ": differ, "evaluations": len(tried)}


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, int]]:
    """Fills in the bytes by which memory grew at most inside of the block."""
    found = {"bytes": 0}
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    process, ended = psutil.Process(), threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(EVERY):
            found["bytes"] = max(found["bytes"], process.memory_info().rss - start)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        ended.set()
        watching.join()


if __name__ == "__main__":
    main(tyro.cli(Config))

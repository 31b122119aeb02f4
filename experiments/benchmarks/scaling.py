"""How do exact ACDC and EAP scale with edges, prompts and prompt length, in time and memory?

    python experiments/benchmarks/scaling.py --threads 1 \\
        --out experiments/benchmarks/results/scaling-cpu.json

Models and prompts are random. Layers (and with them edges), prompts and tokens vary one at a time.
ACDC's threshold is a number of nats divided by the number of edges, so that graphs of any size keep
a similar share of their edges, which the results state. Memory is the peak above model and task,
with default settings and with `max_memory`. `max_memory` bounds everything that EAP takes, but only
one step of ACDC; the state of the model and the current circuit come on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from common import circumstances, clocked, most_allocated, random_model, random_task, write_results

import circuits
from circuits.models import Model


@dataclass(frozen=True)
class Config:
    """Device, sizes and repetitions."""

    device: str = "cpu"
    """Device of the models."""
    threads: int = 1
    """torch threads."""
    repeats: int = 3
    """Timed repetitions, after one warm-up."""
    layers: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of layers; edges grow with their square."""
    prompts: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of prompts."""
    tokens: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of tokens per prompt."""
    middle: tuple[int, int, int] = (3, 8, 16)
    """Layers, prompts and tokens while one of the others varies."""
    heads: int = 8
    """Heads per layer, with d_head 16."""
    nats: float = 6.0
    """Threshold times the number of edges, in nats."""
    max_memory: int = 8 << 20
    """`max_memory` of the second memory measurement, in bytes."""
    out: Path = Path("runs/benchmarks/scaling.json")
    """Result file."""


@dataclass(frozen=True)
class Point:
    """One size of model and task."""

    layers: int
    prompts: int
    tokens: int


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    results: dict[str, Any] = {
        "config": {**asdict(config), "out": None},
        **circumstances(config.device),
        "points": [],
    }
    for measured in measurements(config):
        results["points"].append(measured)
        write_results(config.out, results)
    show(results["points"])


def measurements(config: Config, until: float | None = None) -> Iterator[dict[str, Any]]:
    """Measure one point after the other.

    Only those are measured that begin before `until`, on time.monotonic's clock.
    """
    for point, varied in points(config).items():
        if until is None or time.monotonic() < until:
            yield {"varied": varied, **asdict(point), **measure(point, config)}


def points(config: Config) -> dict[Point, list[str]]:
    """Every point once, and which sizes vary through it."""
    middle = Point(*config.middle)
    found: dict[Point, list[str]] = {}
    for name, sizes in (
        ("layers", config.layers),
        ("prompts", config.prompts),
        ("tokens", config.tokens),
    ):
        for size in sizes:
            found.setdefault(replace(middle, **{name: size}), []).append(name)
    return found


def measure(point: Point, config: Config) -> dict[str, Any]:
    """Seconds of every repetition, memory, and the share that ACDC kept."""
    width = 16 * config.heads
    sizes = {
        "n_layers": point.layers,
        "n_heads": config.heads,
        "d_head": 16,
        "d_model": width,
        "d_mlp": 4 * width,
    }
    model = random_model(
        {**sizes, "n_ctx": point.tokens, "d_vocab": 1000}, config.device, sharpness=4.0
    )
    task, graph = random_task(model, point.prompts, point.tokens), circuits.component_graph(model)
    acdc, eap = circuits.ACDC(config.nats / len(graph)), circuits.EAP()
    programs: dict[str, Callable[[], circuits.Circuit]] = {
        "ACDC": lambda: acdc.discover(model, task, graph=graph),
        "EAP": lambda: eap.discover(model, task, graph=graph),
    }
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "cpu": []} for name in programs
    }
    for repetition in range(config.repeats + 1):
        for name, program in programs.items():
            circuit, took = clocked(program, config.device)
            if name == "ACDC":
                found = circuit
            for clock, value in took.items() if repetition else ():
                seconds[name][clock].append(value)
    limit = config.max_memory
    return {
        "edges": len(graph),
        "threshold": acdc.threshold,
        "kept": len(found),
        "evaluations": found.record["evaluations"],
        "batches": found.record["batches"],
        "seconds": seconds,
        "memory": {
            "ACDC": memory(acdc, model, task, graph, limit),
            "EAP": memory(eap, model, task, graph, limit),
        },
    }


def memory(
    method: circuits.ACDC | circuits.EAP,
    model: Model,
    task: circuits.Task,
    graph: circuits.Graph,
    limit: int,
) -> dict[str, int | None]:
    """Peak memory with default settings and with `max_memory`.

    None if `max_memory` is refused because one prompt needs more.
    """
    device = str(model.cfg.device)
    limited = replace(method, max_memory=limit)
    peaks: dict[str, int | None] = {
        "peak": most_allocated(lambda: method.discover(model, task, graph=graph), device)
    }
    try:
        peaks["peak_with_max_memory"] = most_allocated(
            lambda: limited.discover(model, task, graph=graph), device
        )
    except circuits.InputError:
        peaks["peak_with_max_memory"] = None
    return {**peaks, "max_memory": limit}


def show(measured: list[dict[str, Any]]) -> None:
    """One table for each size that varies."""
    for name in ("layers", "prompts", "tokens"):
        rows = []
        for point in sorted(
            (point for point in measured if name in point["varied"]), key=lambda point: point[name]
        ):
            medians = {
                method: pd.DataFrame(clocks).median() for method, clocks in point["seconds"].items()
            }
            row = {
                "layers": point["layers"],
                "edges": point["edges"],
                "prompts": point["prompts"],
                "tokens": point["tokens"],
            }
            row |= {"kept": point["kept"] / point["edges"]}
            for method, median in medians.items():
                peaks = point["memory"][method]
                row |= {
                    f"{method} wall s": median["wall"],
                    f"{method} CPU s": median["cpu"],
                    f"{method} MB": peaks["peak"] / 1e6,
                }
                row |= {
                    f"{method} MB limited": None
                    if peaks["peak_with_max_memory"] is None
                    else peaks["peak_with_max_memory"] / 1e6
                }
            rows.append(row)
        print(f"\n{name} vary\n{pd.DataFrame(rows).round(3).to_string(index=False)}")


if __name__ == "__main__":
    main(tyro.cli(Config))

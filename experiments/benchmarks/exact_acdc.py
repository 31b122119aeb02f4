"""How much faster is exact ACDC, and are its decisions those of the naive loop?

    python experiments/benchmarks/exact_acdc.py --threads 1 \\
        --out experiments/benchmarks/results/exact-acdc-cpu.json

Three programs take turns in one process: the naive loop, which runs the model with hooks once for
every edge; the incremental executor, one edge at a time; and the incremental executor with
speculation. All start from model and prompts. For the case of the original code, a random model,
that code's counts and CPU seconds were recorded once on one thread; it is not run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from common import circumstances, clocked, random_model, random_task, truncated, write_results

import circuits
from circuits.discovery.search.edge_order import edge_order
from circuits.models import Model
from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings

# Recorded with the original code (Automatic-Circuit-Discovery, transformer-lens 1.6.1, one thread)
# on `original_case`: threshold ->
# evaluations and CPU-seconds.
ORIGINAL = {0.03: (151, 17.1), 0.01: (1341, 69.6), 0.003: (1615, 114.0)}


@dataclass(frozen=True)
class Config:
    """Device, prompts and repetitions."""

    device: str = "cpu"
    """Device of the models."""
    threads: int = 1
    """torch threads, for all programs."""
    repeats: int = 5
    """Timed repetitions of the fast programs, after one warm-up."""
    naive_repeats: int = 1
    """Timed repetitions of the naive loop, after a short warm-up."""
    prompts: tuple[int, ...] = (16, 64)
    """Prompts of toy-world."""
    gpt2_prompts: int = 4
    """Prompts of the model with GPT-2 small's shape."""
    gpt2_edges: int = 200
    """Number of its 32,491 edges to try, evenly spread; the others stay.

    0 tries all of them, without the naive loop.
    """
    out: Path = Path("runs/benchmarks/exact-acdc.json")
    """Result file."""


Case = tuple[Model, circuits.Task, circuits.Graph, float, str]


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    results: dict[str, Any] = {
        "config": {**asdict(config), "out": None},
        **circumstances(config.device),
        "cases": [],
    }
    for name, make in cases(config).items():
        results["cases"].append({"case": name, **measure(*make(), config)})
        write_results(config.out, results)
        show(results["cases"][-1])


def cases(config: Config) -> dict[str, Callable[[], Case]]:
    """Yield model, prompts, graph, threshold and order, one case after the other."""

    def toy_world(prompts: int, threshold: float) -> Case:
        model = circuits.load_model("toy-world", device=config.device)
        task = circuits.load_task("ioi", model, n=prompts, split="train")
        return model, task, circuits.component_graph(model), threshold, "topological"

    def gpt2() -> Case:
        model = random_model("gpt2-small", config.device)
        graph = circuits.component_graph(model)
        if config.gpt2_edges:
            graph = truncated(graph, config.gpt2_edges)
        return model, random_task(model, config.gpt2_prompts, 16), graph, 1e-4, "topological"

    def original(threshold: float) -> Case:
        model, task = original_case(config.device)
        return model, task, circuits.component_graph(model), threshold, "original"

    made: dict[str, Callable[[], Case]] = {}
    for prompts in config.prompts:
        for threshold in (0.002, 0.01, 0.05):
            made[f"toy-world, IOI, {prompts} prompts, {threshold}"] = (
                lambda p=prompts, t=threshold: toy_world(p, t)
            )  # type: ignore[misc]
    for threshold in ORIGINAL:
        made[f"4 layers of 8 heads, original order, {threshold}"] = lambda t=threshold: original(t)  # type: ignore[misc]
    return {**made, "random, gpt2-small": gpt2}


def original_case(device: str) -> tuple[Model, circuits.Task]:
    """The random model and prompts on which the original code was run.

    Weights and tokens come from numpy's seeds 0 and 1.
    """
    layers, width, heads, d_head, d_mlp, vocab, context = 4, 64, 8, 8, 256, 100, 32
    config = {
        "n_layers": layers,
        "d_model": width,
        "n_ctx": context,
        "d_head": d_head,
        "n_heads": heads,
        "d_mlp": d_mlp,
        "d_vocab": vocab,
    }
    random = np.random.RandomState(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.tensor((random.standard_normal(shape) * scale).astype(np.float32))

    weights = {
        "embed.W_E": normal(vocab, width, scale=1.0),
        "pos_embed.W_pos": normal(context, width, scale=0.5),
    }
    for layer in range(layers):
        block = f"blocks.{layer}."
        for slot in "QKV":
            weights[f"{block}attn.W_{slot}"] = normal(
                heads, width, d_head, scale=(1.0 if slot == "V" else 2.0) / width**0.5
            )
            weights[f"{block}attn.b_{slot}"] = normal(heads, d_head, scale=0.1)
        weights[f"{block}attn.W_O"] = normal(heads, d_head, width, scale=1.0 / d_head**0.5)
        weights[f"{block}attn.b_O"] = normal(width, scale=0.1)
        weights[f"{block}mlp.W_in"] = normal(width, d_mlp, scale=1.0 / width**0.5)
        weights[f"{block}mlp.b_in"] = normal(d_mlp, scale=0.1)
        weights[f"{block}mlp.W_out"] = normal(d_mlp, width, scale=1.0 / d_mlp**0.5)
        weights[f"{block}mlp.b_out"] = normal(width, scale=0.1)
    weights["unembed.W_U"] = normal(width, vocab, scale=1.5 / width**0.5)
    weights["unembed.b_U"] = normal(vocab, scale=0.1)
    model = circuits.build_model(
        {**config, "act_fn": "gelu", "normalization_type": "LNPre"}, weights, device=device
    )
    random = np.random.RandomState(1)
    clean = random.randint(0, vocab, (16, 10))
    corrupted = clean.copy()
    for position in (2, 5, 9):
        corrupted[:, position] = random.randint(0, vocab, 16)
    return model, circuits.Task.from_tokens(torch.tensor(clean), torch.tensor(corrupted)).to(device)


def measure(
    model: Model,
    task: circuits.Task,
    graph: circuits.Graph,
    threshold: float,
    order: str,
    config: Config,
) -> dict[str, Any]:
    """Seconds of every repetition, and what the programs decided."""
    methods = {
        name: circuits.ACDC(threshold, order=order, speculate=speculate)  # type: ignore[arg-type]
        for name, speculate in (("incremental", False), ("incremental + speculation", True))
    }
    programs: dict[str, Callable[[], Any]] = {
        name: lambda method=method: method.discover(model, task, graph=graph)  # type: ignore[misc]
        for name, method in methods.items()
    }
    repeats = dict.fromkeys(programs, config.repeats)
    if config.gpt2_edges or model.cfg.n_layers < 12:
        programs["naive"] = lambda: naive(model, task, graph, threshold, order)
        repeats["naive"] = config.naive_repeats
        naive(model, task, graph, threshold, order, most=5)
    found = {name: program() for name, program in programs.items() if name != "naive"}
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "cpu": []} for name in programs
    }
    for repetition in range(max(repeats.values())):
        for name, program in programs.items():
            if repetition < repeats[name]:
                found[name], took = clocked(program, config.device)
                for clock, value in took.items():
                    seconds[name][clock].append(value)
    fast = found["incremental + speculation"]
    other = found.get("naive", found["incremental"])
    return {
        "prompts": len(task),
        "threshold": threshold,
        "edges": len(graph),
        "kept": len(fast),
        "decisions_that_differ": int((fast.kept != other.kept).sum()),
        "record": {
            name: {key: value for key, value in each.record.items() if key != "settings"}
            for name, each in found.items()
        },
        "seconds": seconds,
        "original_code": dict(zip(("evaluations", "cpu_seconds"), ORIGINAL[threshold], strict=True))
        if order == "original"
        else None,
    }


def naive(
    model: Model,
    task: circuits.Task,
    graph: circuits.Graph,
    threshold: float,
    order: str,
    most: int | None = None,
) -> circuits.Circuit:
    """ACDC by its definition: one hooked run of the whole model for every edge."""
    damage = DamageMeter.prepare(
        model,
        graph,
        task,
        RunSettings.parse(task, metric="kl", ablation="resample", executor="hooks"),
    )
    kept, scores = torch.ones(len(graph), dtype=torch.bool), torch.full((len(graph),), torch.nan)
    current, evaluations = float(damage(kept[None])[0]), 0
    for trial in edge_order(graph, order):  # type: ignore[arg-type]
        edges = [edge for edge in trial.edges if kept[edge]]
        if not edges or not damage.reaching_logits(kept)[edges].any():
            kept[edges] = False
            continue
        for group in [edges] if trial.together else [[edge] for edge in edges]:
            without = kept.clone()
            without[group] = False
            new = float(damage(without[None])[0])
            evaluations += 1
            if new - current < threshold:
                kept, current = without, new
            if evaluations == most:
                break
        if evaluations == most:
            break
    return circuits.Circuit(
        graph, scores, kept, record={"evaluations": evaluations, "damage": current}
    )


def show(case: dict[str, Any]) -> None:
    """Show one case as a table."""
    print(
        f"\n{case['case']}: keeps {case['kept']} of {case['edges']:,} edges; "
        f"{case['decisions_that_differ']} decisions differ from the slower"
    )
    medians = {
        name: {clock: float(np.median(values)) for clock, values in clocks.items()}
        for name, clocks in case["seconds"].items()
    }
    rows = {
        name: {
            "wall s": clocks["wall"],
            "CPU s": clocks["cpu"],
            "naive / this": medians["naive"]["cpu"] / clocks["cpu"] if "naive" in medians else None,
            **{
                key: case["record"][name].get(key)
                for key in ("evaluations", "measured", "batches", "node_evaluations")
            },
        }
        for name, clocks in medians.items()
    }
    print(pd.DataFrame(rows).T.round(3).to_string())
    if case["original_code"]:
        print(
            f"the original code: {case['original_code']['evaluations']} evaluations, "
            f"{case['original_code']['cpu_seconds']} CPU-seconds (recorded)"
        )


if __name__ == "__main__":
    main(tyro.cli(Config))

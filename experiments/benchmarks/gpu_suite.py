"""Is everything right on this device, and how fast? Takes ten minutes of a GPU.

    python experiments/benchmarks/gpu_suite.py --device cuda \\
        --out experiments/benchmarks/results/gpu-suite-h100.json
    python experiments/benchmarks/gpu_suite.py --device cpu     # the same parts at a reduced size

On a GPU the model has GPT-2 small's shape (32,491 edges) and random weights, with 100 prompts of 16
tokens. Results are written as they come, so an interrupted run keeps them. A part that would begin
after the time limit is skipped and recorded as skipped.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import eap
import exact_acdc
import scaling
import torch
import tyro
from common import (
    circumstances,
    clocked,
    most_allocated,
    random_model,
    random_task,
    truncated,
    write_results,
)

import circuits
from circuits.discovery.search.edge_order import edge_order
from circuits.models import Model
from circuits.running.damage import DamageMeter
from circuits.running.precision import Background, TypeName
from circuits.running.settings import RunSettings

Results = dict[str, Any]

# Standard deviation of the logits; with one of 1, the edges of GPT-2 small's shape do damage near
# rounding.
SHARPNESS = 4.0
# Batch sizes change the last bits, so that this close to the threshold either decision is right.
BAND = 1e-5
# So many circuits are compared at once.
TOGETHER = 8


@dataclass(frozen=True)
class Size:
    """Sizes of the parts.

    Attributes:
        some: number of edges to try, or of decisions to replay, where the reference takes part.
        double_prompts: prompts on which EAP's scores are compared with those in float64.
    """

    shape: str
    prompts: int
    some: int
    double_prompts: int
    repeats: int
    scaling: scaling.Config


FULL = Size(
    "gpt2-small",
    100,
    200,
    4,
    5,
    scaling.Config(
        layers=(2, 3, 4), prompts=(8, 32, 128), tokens=(8, 16, 64), middle=(3, 32, 16), repeats=2
    ),
)
REDUCED = Size(
    "4 layers, d_model 256",
    8,
    60,
    4,
    2,
    scaling.Config(layers=(1, 2), prompts=(4, 8), tokens=(8, 16), middle=(2, 8, 16), repeats=1),
)


@dataclass(frozen=True)
class Config:
    """Device and time limits."""

    device: str = "cuda"
    """Device of the models; on a CPU the size is reduced."""
    threads: int = 1
    """torch threads on the CPU."""
    limit: float = 540.0
    """No part begins after this many seconds."""
    search_limit: float = 240.0
    """The search over all edges stops after this many seconds."""
    nats: float = 10.0
    """ACDC's threshold times the number of edges."""
    out: Path = Path("runs/benchmarks/gpu-suite.json")
    """Result file."""


@dataclass(frozen=True, eq=False)
class Case:
    """What the parts share; `end` is the deadline on time.monotonic's clock."""

    config: Config
    size: Size
    end: float
    model: Model
    task: circuits.Task
    graph: circuits.Graph

    @property
    def acdc(self) -> circuits.ACDC:
        """Exact ACDC with default settings."""
        return circuits.ACDC(self.config.nats / len(self.graph))

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.config.device).type == "cuda"


def main(config: Config) -> None:
    start = time.monotonic()
    torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to mean float32
    size = FULL if torch.device(config.device).type == "cuda" else REDUCED
    settings = {
        **asdict(config),
        **asdict(size),
        "scaling": {**asdict(size.scaling), "out": None},
        "out": None,
    }
    results: Results = {
        "config": settings,
        **circumstances(config.device),
        "parts": {name: {"skipped": "not reached"} for name in PARTS},
    }
    model = random_model(size.shape, config.device, sharpness=SHARPNESS)
    case = Case(
        config,
        size,
        start + config.limit,
        model,
        random_task(model, size.prompts, 16),
        circuits.component_graph(model),
    )
    for name, part in PARTS.items():
        for found in attempted(part, case):
            results["parts"][name] = {**found, "seconds_so_far": time.monotonic() - start}
            write_results(config.out, results)
        print(
            f"\n{name} ({time.monotonic() - start:.0f} s)\n{json.dumps(results['parts'][name])}",
            flush=True,
        )
    if failed := [name for name, found in results["parts"].items() if "failed" in found]:
        sys.exit(f"failed: {', '.join(failed)}")


def attempted(part: Callable[[Case], Iterator[Results]], case: Case) -> Iterator[Results]:
    """Yield what a part finds as it finds it, or why it found nothing.

    A part that fails does not stop the parts after it.
    """
    if time.monotonic() > case.end:
        yield {"skipped": f"it would have begun after the time limit of {case.config.limit:.0f} s"}
        return
    found: Results = {}
    try:
        for found in part(case):
            yield found
    except Exception:
        yield {**found, "failed": traceback.format_exc().splitlines()[-12:]}


def toy_world(case: Case) -> Iterator[Results]:
    """Find toy-world's circuit on this device and on the CPU."""
    found = {}
    for device in ("cpu", case.config.device):
        model = circuits.load_model("toy-world", device=device)
        found[device] = circuits.ACDC(0.01).discover(
            model, circuits.load_task("ioi", model, n=16, split="train")
        )
    here, there = found[case.config.device], found["cpu"]
    yield {
        "edges": len(here.graph),
        "kept": len(here),
        "decisions_that_differ": int((here.kept != there.kept).sum()),
    }


def executors(case: Case) -> Iterator[Results]:
    """Difference between the executors' logits on random circuits, from a few edges to most."""
    generator = torch.Generator().manual_seed(0)
    densities = torch.linspace(0.02, 0.98, TOGETHER)[:, None]
    kept = torch.rand(TOGETHER, len(case.graph), generator=generator) < densities
    logits = {
        name: circuits.run_circuits(case.model, case.graph, kept, case.task, executor=name)  # type: ignore[arg-type]
        for name in ("incremental", "hooks")
    }
    differences = (logits["incremental"] - logits["hooks"]).abs().amax((1, 2))
    yield {
        "densities": densities.flatten().tolist(),
        "largest_differences": differences.tolist(),
        "largest_logit": float(logits["hooks"].abs().max()),
    }


def decisions(case: Case) -> Iterator[Results]:
    """Search over some edges, and replay every decision with the reference."""
    yield replayed(
        case, case.acdc.discover(case.model, case.task, graph=truncated(case.graph, case.size.some))
    )


def replayed(case: Case, found: circuits.Circuit) -> Results:
    """Measure some decisions of a search again with the reference.

    Returns how many differ, and how far apart the scores are. When the search came to an edge, all
    later edges were still there, and of the earlier ones those that it kept. Edges that were never
    tried change nothing, because their targets do not reach the logits.
    """
    order = torch.tensor(
        [edge for trial in edge_order(found.graph, "topological") for edge in trial.edges]
    )
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    tried = (~found.scores.isnan()).nonzero().flatten()
    tried = tried[torch.linspace(0, len(tried) - 1, min(case.size.some, len(tried))).long()]
    before = found.kept | (place >= place[tried, None])
    after = before.clone()
    after[torch.arange(len(tried)), tried] = False
    damage = DamageMeter.prepare(
        case.model,
        found.graph,
        case.task,
        RunSettings.parse(case.task, metric="kl", ablation="resample", executor="hooks"),
    )
    with_edge, without = (
        torch.cat([damage(some) for some in kept.split(TOGETHER)]) for kept in (before, after)
    )
    increases = without - with_edge
    threshold = case.acdc.threshold
    near = (increases - threshold).abs() <= BAND
    other = (increases >= threshold) != found.kept[tried]
    return {
        "edges": len(found.graph),
        "kept": len(found),
        "threshold": threshold,
        "compared": len(tried),
        "within_band": int(near.sum()),
        "different": int((other & ~near).sum()),
        "different_within_band": int((other & near).sum()),
        "largest_difference_of_scores": float((increases - found.scores[tried]).abs().max()),
    }


def eap_scores(case: Case) -> Iterator[Results]:
    """Difference between EAP's scores on a few prompts and those of a CPU in float64."""
    few = case.task[: case.size.double_prompts]
    here = circuits.EAP().discover(case.model, few, graph=case.graph).scores.double()
    exact = random_model(case.size.shape, "cpu", sharpness=SHARPNESS, dtype=torch.float64)
    there = circuits.EAP().discover(exact, few.to("cpu")).scores.double()
    yield {
        "prompts": len(few),
        "edges": len(here),
        "largest_difference": float((here - there).abs().max()),
        "largest_score": float(there.abs().max()),
        "correlation": float(torch.corrcoef(torch.stack([here, there]))[0, 1]),
    }


def some_edges(case: Case) -> Iterator[Results]:
    """Exact ACDC against the naive loop, in turns, over some edges."""
    config = exact_acdc.Config(device=case.config.device, repeats=case.size.repeats)
    some = truncated(case.graph, case.size.some)
    yield exact_acdc.measure(
        case.model, case.task, some, case.acdc.threshold, "topological", config
    )


def all_edges(case: Case) -> Iterator[Results]:
    """Exact ACDC as a user runs it, once, with warm kernels; then replay some of its decisions."""
    until = min(case.end, time.monotonic() + case.config.search_limit)
    done = (0, 0)

    def progress(targets: int, total: int) -> None:
        nonlocal done
        done = targets, total
        if time.monotonic() > until:
            raise OutOfTimeError

    searches: list[tuple[circuits.Circuit, dict[str, float]]] = []

    def search() -> None:
        def program() -> circuits.Circuit:
            return case.acdc.discover(case.model, case.task, graph=case.graph, progress=progress)

        searches.append(clocked(program, case.config.device))

    result: Results = {
        "prompts": len(case.task),
        "tokens": case.task.clean.shape[1],
        "edges": len(case.graph),
    }
    try:
        peak = most_allocated(search, case.config.device) if case.on_gpu else search()
    except OutOfTimeError:
        yield {**result, "stopped": f"at its time limit, {done[0]} of {done[1]} targets done"}
        return
    circuit, seconds = searches[0]
    record = {key: value for key, value in circuit.record.items() if key != "settings"}
    result |= {
        "kept": len(circuit),
        "threshold": case.acdc.threshold,
        "seconds": seconds,
        "peak": peak,
        "record": record,
    }
    yield result
    yield {**result, "replayed": replayed(case, circuit)}


class OutOfTimeError(Exception):
    """The search over all edges took too long."""


def mixed_precision(case: Case) -> Iterator[Results]:
    """Exact ACDC in float32 and in mixed precision with confirmation, in turns, over some edges."""
    graph = truncated(case.graph, 10 * case.size.some)
    precisions: dict[str, circuits.Precision | None] = {
        "float32": None,
        **{name: circuits.Precision(name) for name in get_args(TypeName)},
    }
    rows: Results = {}
    exact: circuits.Circuit | None = None
    for repetition in range(2):
        for name, precision in precisions.items():
            if repetition and time.monotonic() > case.end:
                return
            search = replace(case.acdc, precision=precision)
            search.discover(
                case.model, case.task, graph=truncated(graph, case.size.some // 4)
            )  # every kernel has run before
            program = partial(search.discover, case.model, case.task, graph=graph)
            found, seconds = clocked(program, case.config.device)
            exact = found if exact is None else exact
            row = rows.setdefault(name, {"seconds": []})
            row["seconds"].append(seconds["wall"])
            row["kernel"] = precision is None or Background.of(precision, case.config.device).kernel
            row["decisions_that_differ"] = int((found.kept != exact.kept).sum())
            row |= {count: found.record.get(count) for count in ("measured", "confirmed", "noise")}
            yield {"edges": len(graph), "precisions": rows}


def eap_times(case: Case) -> Iterator[Results]:
    """EAP's time and memory against its floor."""
    config = eap.Config(device=case.config.device, repeats=2 * case.size.repeats)
    result = {"prompts": len(case.task), **eap.times(case.model, case.task, config)}
    yield result
    yield {**result, "memory": eap.memory(case.model, case.task)}


def sizes(case: Case) -> Iterator[Results]:
    """How both scale."""
    measured: list[Results] = []
    for point in scaling.measurements(
        replace(case.size.scaling, device=case.config.device), until=case.end
    ):
        measured.append(point)
        yield {"points": measured}


# In this order.
PARTS: dict[str, Callable[[Case], Iterator[Results]]] = {
    "toy-world as on the CPU": toy_world,
    "executor against hooks": executors,
    "decisions against hooks": decisions,
    "EAP against double precision": eap_scores,
    "exact ACDC, some edges": some_edges,
    "exact ACDC, all edges": all_edges,
    "mixed precision": mixed_precision,
    "EAP against its floor": eap_times,
    "scaling": sizes,
}


if __name__ == "__main__":
    main(tyro.cli(Config))

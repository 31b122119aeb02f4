"""Is ACDC by speculation exact? Every decision of the fast search against the sequential loop on
the reference executor.

    python experiments/exact_acdc_grid.py                                # toy-world's six tasks at
    five thresholds: minutes on one core
    python experiments/exact_acdc_grid.py --tasks ioi --thresholds 0.01  # one cell of it

The states that the sequential loop meets follow from its decisions. Each is run by the model's own
modules, and what the loop decides there
is compared with what the search decided. Batches change the last bits, so that either decision is
right where an increase lies within
`--band` of the threshold; there the loop takes the search's. Prints a row per task and threshold as
it goes, and writes them all to `--out`.
`largest gap` is the greatest difference, in nats, between an increase that the search measured and
the loop's; `kl` is the loop's, at its end.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import circuits
from circuits.discovery.search.edge_order import edge_order
from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings

COUNTS = ("evaluations", "measured", "batches")


@dataclass(frozen=True)
class Config:
    """Which model, prompts and thresholds."""

    model: str = "toy-world"
    """A name or a folder."""
    tasks: str = ",".join(circuits.task_names())
    """Names of tasks, separated by commas."""
    thresholds: str = "0.001,0.003,0.01,0.03,0.1"
    """In nats, separated by commas."""
    n: int = 16
    """Prompts."""
    band: float = 1e-5
    """How near to its threshold an increase is decided either way, in nats."""
    out: Path = Path("runs/exact-acdc-grid.md")
    """Where the table goes, as markdown."""


def main(config: Config) -> None:
    model = circuits.load_model(config.model)
    rows: list[str] = []
    for name in config.tasks.split(","):
        task = circuits.load_task(name, model, n=config.n, split="train")
        for threshold in map(float, config.thresholds.split(",")):
            circuit = circuits.ACDC(threshold).discover(model, task)
            found = {
                "task": name,
                "threshold": threshold,
                "edges": len(circuit),
                **{count: circuit.record[count] for count in COUNTS},
            }
            found |= against_the_loop(model, circuit, task, threshold, config.band)
            rows += [] if rows else [line(found), line(["---"] * len(found))]
            rows.append(line(found.values()))
            print("\n".join(rows if len(rows) == 3 else rows[-1:]), flush=True)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text("\n".join(rows) + "\n")


def against_the_loop(
    model: circuits.models.Model,
    circuit: circuits.Circuit,
    task: circuits.Task,
    threshold: float,
    band: float,
) -> dict[str, object]:
    """How many decisions of a search the sequential loop takes too, each in the state that the
    decisions before it led to.
    """
    graph = circuit.graph
    damage = DamageMeter.prepare(
        model,
        graph,
        task,
        RunSettings.parse(task, metric="kl", ablation="resample", executor="hooks"),
    )
    kept = torch.ones(len(graph), dtype=torch.bool)
    tried, states, within, different, gap = [], [kept], 0, 0, 0.0
    for trial in edge_order(graph, "topological"):
        edges = list(trial.edges)
        if not damage.reaching_logits(kept)[edges].any():  # all go untried with their target
            different += int(circuit.kept[edges].sum())
            kept = without(kept, edges)
            continue
        for edge in edges:
            tried.append(edge)
            states.append(without(kept, [edge]))
            kept = kept if circuit.kept[edge] else states[-1]
    current, *measured = [
        float(damage(state[None])[0]) for state in states
    ]  # one after the other, as the loop does
    for edge, new in zip(tried, measured, strict=True):
        stays, increase = bool(circuit.kept[edge]), new - current
        gap = max(gap, abs(increase - float(circuit.scores[edge])))
        if abs(increase - threshold) <= band:
            within += 1
        else:
            different += stays != (increase >= threshold)
        current = current if stays else new
    compared = {"decisions compared": len(tried), "within the band": within, "different": different}
    return {**compared, "largest gap": gap, "kl": current}


def without(kept: torch.Tensor, edges: list[int]) -> torch.Tensor:
    """The circuit with these edges removed."""
    result = kept.clone()
    result[edges] = False
    return result


def line(cells: Iterable[object]) -> str:
    """A row of a markdown table, numbers to three digits."""
    return (
        "| "
        + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
        + " |"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

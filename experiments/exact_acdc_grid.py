"""Does speculation change ACDC's decisions? Replay every one with the sequential loop.

    python experiments/exact_acdc_grid.py
    python experiments/exact_acdc_grid.py --tasks ioi --thresholds 0.01   # part of it

The first command runs toy-world's six tasks at five thresholds and takes minutes on one core.

The states of the sequential loop follow from its decisions. Each state is run by the model's own
modules, and the loop's decision is compared with that of the search. Batching changes the last bits
of a sum, so either decision is right where an increase is within `--band` of the threshold; there
the loop follows the search. Prints one row per task and threshold, and writes them to `--out`.

`largest gap` is the largest difference, in nats, between an increase measured by the search and the
loop's; `kl` is the loop's final KL.
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
    """Model, prompts and thresholds."""

    model: str = "toy-world"
    """Model name or folder."""
    tasks: str = ",".join(circuits.task_names())
    """Task names, separated by commas."""
    thresholds: str = "0.001,0.003,0.01,0.03,0.1"
    """Thresholds in nats, separated by commas."""
    n: int = 16
    """Prompts."""
    band: float = 1e-5
    """Increases this close to the threshold, in nats, may be decided either way."""
    out: Path = Path("runs/exact-acdc-grid.md")
    """Output file for the markdown table."""


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
    """Replay a search's decisions with the sequential loop, each in the state that earlier ones led
    to.
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

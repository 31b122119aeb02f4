"""What does removing many edges at once cost? Batched-edge ACDC against exact ACDC.

    python experiments/batched_acdc.py
    python experiments/batched_acdc.py --tasks ioi --groups target,32 --n 8   # part of it

The first command takes a few minutes on one core. It prints the means over tasks and writes one row
per task into `--out`. An edge is "flipped" if only one of the two searches keeps it.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from markdown_tables import markdown

import circuits
from circuits.evaluation.similarity import overlap

COUNTS = (
    "evaluations",
    "joint_measurements",
    "bisections",
    "batches",
    "node_evaluations",
    "largest_excess",
    "excess_left",
)


@dataclass(frozen=True)
class Config:
    """Model, prompts and settings."""

    model: str = "toy-world"
    """Model name or folder."""
    tasks: str = ",".join(circuits.task_names())
    """Task names, separated by commas."""
    thresholds: str = "0.003,0.03"
    """Separated by commas."""
    groups: str = "target,layer,8,32"
    """Separated by commas."""
    n: int = 16
    """Prompts to search on; as many held-out prompts to evaluate on."""
    out: Path = Path("runs/batched-acdc")
    """Output folder: the table as CSV and JSON, its means as markdown."""


def main(config: Config) -> None:
    model = circuits.load_model(config.model)
    rows = []
    for name in config.tasks.split(","):
        train, test = (
            circuits.load_task(name, model, n=config.n, split=split) for split in ("train", "test")
        )
        for threshold in map(float, config.thresholds.split(",")):
            exact = circuits.ACDC(threshold).discover(model, train)
            rows.append(row(model, exact, exact, train, test, threshold, "exact", False))
            for group in config.groups.split(","):
                for verify in (False, True):
                    method = circuits.BatchedACDC(
                        threshold, group=int(group) if group.isdecimal() else group, verify=verify
                    )
                    rows.append(
                        row(
                            model,
                            method.discover(model, train),
                            exact,
                            train,
                            test,
                            threshold,
                            group,
                            verify,
                        )
                    )
        print(f"{name} done", flush=True)
    table = pd.DataFrame(rows)
    config.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(config.out / "by-task.csv", index=False)
    table.to_json(config.out / "by-task.json", orient="records", indent=1)
    means = (
        table.drop(columns="task")
        .groupby(["threshold", "group", "verify"], sort=False)
        .mean()
        .reset_index()
    )
    print(means.round(3).to_string(index=False))
    (config.out / "means.md").write_text(markdown(means))


def row(
    model: circuits.models.Model,
    found: circuits.Circuit,
    exact: circuits.Circuit,
    train: circuits.Task,
    test: circuits.Task,
    threshold: float,
    group: str,
    verify: bool,
) -> dict[str, object]:
    """Compare one search with exact ACDC."""
    both = [circuits.evaluate(model, found, task, metrics=["kl"]).kl for task in (train, test)]
    agreement = {
        "edges": len(found),
        "flipped": int((found.kept != exact.kept).sum()),
        "jaccard": overlap(found, exact),
    }
    counts = {name: found.record.get(name, 0) for name in COUNTS}
    setting = {"task": train.name, "threshold": threshold, "group": group, "verify": verify}
    return {**setting, **agreement, "kl": both[0], "kl_held_out": both[1], **counts}


if __name__ == "__main__":
    main(tyro.cli(Config))

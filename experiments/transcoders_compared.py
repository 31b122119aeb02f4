"""Which transcoders explain toy-world best: per layer, with a skip, or cross-layer?

    python experiments/transcoders_compared.py            # six tasks: about two minutes on one core
    python experiments/transcoders_compared.py --tasks ioi --n 8

For each kind and task: active features per prompt, features left after pruning, replacement and
completeness score (means over held-out prompts), and how faithful circuits of equal size are. A
circuit is the edges of highest |score| on the train split, run on the test split with everything
else resampled. Writes one row per task into `--out`, and the means as markdown.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from markdown_tables import markdown

import circuits
from circuits.attribution.feature_graph import FEATURE

KINDS = ("toy-world-plt", "toy-world-skip-plt", "toy-world-clt")


@dataclass(frozen=True)
class Config:
    """Tasks and sizes."""

    tasks: str = ",".join(circuits.task_names())
    """Task names, separated by commas."""
    n: int = 16
    """Prompts to find circuits on; as many held-out prompts to evaluate on."""
    sizes: str = "3,10,100,1000,3000"
    """Circuit sizes in edges, separated by commas."""
    out: Path = Path("runs/transcoders-compared")
    """Output folder for the tables."""


def main(config: Config) -> None:
    model = circuits.load_model("toy-world")
    rows = []
    for name in config.tasks.split(","):
        train, test = (
            circuits.load_task(name, model, n=config.n, split=split) for split in ("train", "test")
        )
        for kind in KINDS:
            method = circuits.AttributionGraph(circuits.load_transcoders(kind))
            rows.append(
                {
                    "task": name,
                    "transcoders": kind,
                    **graphs(method, model, test),
                    **faithfulness(method, model, train, test, config),
                }
            )
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    config.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(config.out / "by-task.csv", index=False)
    means = table.drop(columns="task").groupby("transcoders", sort=False).mean()
    (config.out / "means.md").write_text(markdown(means.reset_index()) + "\n" + markdown(table))
    print(means.to_string())


def graphs(
    method: circuits.AttributionGraph, model: object, task: circuits.Task
) -> dict[str, float]:
    """Means over a task's prompts; the graphs explain the most probable next tokens."""
    prompts = [task.clean[row, : int(task.lengths[row])] for row in range(len(task))]
    found = method.attribute_all(model, prompts)
    rows = []
    for graph in found:
        small = circuits.pruned(graph)
        per_token = int(graph.is_kind(FEATURE).sum()) / (graph.n_layers * (len(graph.tokens) - 1))
        rows.append(
            {
                "active by layer and token": per_token,
                "features": int(graph.is_kind(FEATURE).sum()),
                "features after pruning": int(small.is_kind(FEATURE).sum()),
                "replacement": circuits.replacement_score(graph),
                "completeness": circuits.completeness_score(graph),
            }
        )
    return pd.DataFrame(rows).mean().to_dict()


def faithfulness(
    method: circuits.AttributionGraph,
    model: object,
    train: circuits.Task,
    test: circuits.Task,
    config: Config,
) -> dict[str, float]:
    """KL at each size, and faithfulness in the task's metric at the largest."""
    found = method.discover(model, train)
    ranked = circuits.Circuit.full(found.graph, found.scores)
    sizes = [min(int(size), len(ranked)) for size in config.sizes.split(",")]
    curve = circuits.faithfulness_curve(model, ranked, test, sizes)
    kls = {
        f"KL at {size:,} edges": float(curve.loc[curve["edges"] == size, "kl"].iloc[0])
        for size in sizes
    }
    return {**kls, f"faithfulness at {sizes[-1]:,}": float(curve["faithfulness"].iloc[-1])}


if __name__ == "__main__":
    main(tyro.cli(Config))

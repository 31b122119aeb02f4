"""How close do EAP and EAP-IG come to the measured damage of ablating each edge alone?

    python experiments/gradients_against_patching.py
    python experiments/gradients_against_patching.py --model gpt2 --n 8

The first command runs toy-world on IOI and takes under a minute on two cores. The second patches
32,491 edges, which takes hours on a CPU. Prints a correlation per method, over all edges and by
target layer, and writes a scatter plot of each into `--out`.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

import circuits
from circuits.evaluation.similarity import score_correlation, score_table
from circuits.plotting.figures import score_scatter


@dataclass(frozen=True)
class Config:
    """Model and prompts."""

    model: str = "toy-world"
    """Model name or folder."""
    task: str = "ioi"
    """Task name."""
    n: int = 16
    """Prompts."""
    out: Path = Path("runs/gradients-against-patching")
    """Output folder for the scatter plots."""


def main(config: Config) -> None:
    model = circuits.load_model(config.model)
    task = circuits.load_task(config.task, model, n=config.n, split="train")
    exact = circuits.ActivationPatching(metric=task.metric).discover(model, task)
    methods = {
        "eap": circuits.EAP(metric=task.metric),
        "eap, both ends": circuits.EAP(metric=task.metric, gradient_at="both"),
        "eap-ig": circuits.EAPIG(metric=task.metric),
        "eap-ig, activations": circuits.EAPIG(metric=task.metric, along="activations"),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, method in methods.items():
        found = method.discover(model, task)
        scores = score_table(found, exact)
        rows[name] = {
            "pearson": score_correlation(found, exact, "pearson"),
            "spearman": score_correlation(found, exact),
            **by_layer(scores),
        }
        figure = score_scatter(scores, x_name=name, y_name="exact patching")
        figure.write_html(
            config.out / f"{name.replace(', ', '-').replace(' ', '-')}.html", include_plotlyjs=True
        )
    print(pd.DataFrame(rows).T.round(3).to_string())


def by_layer(scores: pd.DataFrame) -> dict[str, float]:
    """Pearson's correlation over the edges into each layer, and into the logits."""
    targets = [circuits.parse_edge(edge).target for edge in scores.index]
    layers = [
        f"layer {target.layer}" if isinstance(target, circuits.Head | circuits.MLP) else "logits"
        for target in targets
    ]
    return {str(layer): group["x"].corr(group["y"]) for layer, group in scores.groupby(layers)}


if __name__ == "__main__":
    main(tyro.cli(Config))

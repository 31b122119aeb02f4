"""Do edges interact, and how long are the paths that carry a circuit's effect?

    python experiments/edge_independence.py
    python experiments/edge_independence.py --tasks ioi --states 20       # part of it

The first command runs toy-world's six tasks and takes minutes on one core.

Interaction. Batched-edge ACDC assumes independence. Let H be a state of an ACDC search, e1 the next
edge and e2 a later one. The decision on e2 should not depend on e1:

    KL(G || H - e2) - KL(G || H) < T   if and only if   KL(G || H - e1 - e2) - KL(G || H - e1) < T

A pair for which this fails is a flip. States are drawn without replacement from the states in which
the search measured an edge. In each state, `pairs` edges e2 are drawn for each relation between the
two targets: the same node, another node of the same layer, or another layer. The logits count as a
layer. Only undecided edges that reach the logits are drawn. Pairs of one state share e1 and H, so
intervals are a bootstrap over states. A bootstrap of a rate of 0 or 1 has no width; such rates get
Wilson's interval with the number of states as the sample size.

Path lengths (after Veit, Wilber and Belongie 2016, https://arxiv.org/abs/1605.06431). The circuit
is cut down to the union of its paths of at most k edges from an embedding to the logits. The share
of the effect that is left is

    (KL(empty) - KL(cut)) / (KL(empty) - KL(circuit)).

Edges of short paths can also form longer paths, which the table counts; for k up to 2 there are
none. A share can lie outside of 0 to 1, since removing a path can help.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from markdown_tables import markdown
from plotly.subplots import make_subplots

import circuits
from circuits.discovery.search.edge_order import edge_order
from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings

RELATIONS = ("same target", "same layer", "different layer")


@dataclass(frozen=True)
class Config:
    """Model, prompts and samples."""

    model: str = "toy-world"
    """Model name or folder."""
    tasks: str = ",".join(circuits.task_names())
    """Task names, separated by commas."""
    thresholds: str = "0.003,0.01,0.03"
    """Separated by commas."""
    n: int = 16
    """Prompts."""
    states: int = 60
    """Sampled states per search."""
    pairs: int = 3
    """Sampled pairs per relation and state."""
    seed: int = 0
    """Seed for states, pairs and the bootstrap."""
    out: Path = Path("runs/edge-independence")
    """Output folder: pairs and rates (CSV), figure (HTML), tables (markdown)."""


def main(config: Config) -> None:
    model = circuits.load_model(config.model)
    random, pairs, paths = np.random.default_rng(config.seed), [], []
    for name in config.tasks.split(","):
        task = circuits.load_task(name, model, n=config.n, split="train")
        for threshold in map(float, config.thresholds.split(",")):
            circuit = circuits.ACDC(threshold).discover(model, task)
            meter = DamageMeter.prepare(
                model,
                circuit.graph,
                task,
                RunSettings.parse(task, metric="kl", ablation="resample"),
            )
            paths += [
                {"task": name, "threshold": threshold, **row}
                for row in by_path_length(circuit, meter)
            ]
            pairs += [
                {"task": name, "threshold": threshold, **row}
                for row in sampled_pairs(circuit, meter, config, random)
            ]
        print(f"{name} done", flush=True)
    frame = pd.DataFrame(pairs)
    for name in ("h", "h_without_e1"):
        frame[f"harmless_in_{name}"] = frame[f"increase_in_{name}"] < frame["threshold"]
    frame["relation"] = pd.Categorical(frame["relation"], RELATIONS)
    frame["flip"] = frame["harmless_in_h"] != frame["harmless_in_h_without_e1"]
    config.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(config.out / "pairs.csv", index=False)
    lengths = pd.DataFrame(paths)
    lengths.to_csv(config.out / "paths.csv", index=False)
    rates(frame, ["task", "threshold", "relation"], random).to_csv(
        config.out / "by-task-and-relation.csv", index=False
    )
    by_relation = rates(frame, ["threshold", "relation"], random)
    tables = {
        "By relation": with_intervals(by_relation),
        "By task": with_intervals(rates(frame, ["task", "threshold"], random)),
        "Share of the effect by k (longer paths in the cut)": by_k(lengths),
    }
    text = "\n".join(f"## {title}\n\n{markdown(table)}" for title, table in tables.items())
    (config.out / "tables.md").write_text(text)
    figure(by_relation, lengths).write_html(
        config.out / "edge-independence.html", include_plotlyjs=True
    )
    print(text)


def sampled_pairs(
    circuit: circuits.Circuit, meter: DamageMeter, config: Config, random: np.random.Generator
) -> list[dict[str, object]]:
    """Measure the increase of removing e2 with and without e1, in sampled states of the search."""
    graph, rows = circuit.graph, []
    order = [edge for trial in edge_order(graph, "topological") for edge in trial.edges]
    tried = [turn for turn, edge in enumerate(order) if not circuit.scores[edge].isnan()]
    turns = sorted(
        random.choice(tried, size=min(config.states, len(tried)), replace=False).tolist()
    )
    for turn in turns:
        kept = torch.ones(len(graph), dtype=torch.bool)
        kept[order[:turn]] = circuit.kept[order[:turn]]
        meter.near(kept)
        live, first = meter.reaching_logits(kept), order[turn]
        chosen = draw(
            [edge for edge in order[turn + 1 :] if live[edge]], first, graph, config.pairs, random
        )
        without = kept.repeat(2 + 2 * len(chosen), 1)
        without[1::2, first] = False  # every second row is the one before it, without e1
        for number, (second, _) in enumerate(chosen):
            without[2 + 2 * number : 4 + 2 * number, second] = False
        whole, alone, *found = meter(without).tolist()
        for (second, relation), one, both in zip(chosen, found[::2], found[1::2], strict=True):
            edges = {
                "state": turn,
                "e1": str(graph.edges[first]),
                "e2": str(graph.edges[second]),
                "relation": relation,
            }
            rows.append(
                {
                    **edges,
                    "increase_of_e1": alone - whole,
                    "increase_in_h": one - whole,
                    "increase_in_h_without_e1": both - alone,
                }
            )
    return rows


def draw(
    edges: list[int], first: int, graph: circuits.Graph, most: int, random: np.random.Generator
) -> list[tuple[int, str]]:
    """Draw edges for each relation between their target and that of `first`."""
    by_relation: dict[str, list[int]] = {relation: [] for relation in RELATIONS}
    target = graph.edges[first].target
    for edge in edges:
        other = graph.edges[edge].target
        same_layer = getattr(other, "layer", None) == getattr(target, "layer", None)
        by_relation[
            RELATIONS[0] if other == target else RELATIONS[1] if same_layer else RELATIONS[2]
        ].append(edge)
    return [
        (edge, relation)
        for relation, among in by_relation.items()
        for edge in random.choice(among, size=min(most, len(among)), replace=False).tolist()
    ]


def rates(frame: pd.DataFrame, by: list[str], random: np.random.Generator) -> pd.DataFrame:
    """Flip rates with 95 % intervals.

    For all pairs, for those where an increase exceeds T / 10, and for those whose e1 is harmless.
    """
    matters = (
        frame[["increase_of_e1", "increase_in_h", "increase_in_h_without_e1"]].max(axis=1)
        > frame["threshold"] / 10
    )
    subsets = {
        "all": frame,
        "matter": frame[matters],
        "e1 harmless": frame[frame["increase_of_e1"] < frame["threshold"]],
    }
    rows = []
    for key, part in frame.groupby(by, observed=True):
        row: dict[str, object] = dict(zip(by, key, strict=True))
        for name, subset in subsets.items():
            here = subset.loc[subset.index.intersection(part.index)]
            low, high = interval(here, random)
            row |= {
                f"{name}: pairs": len(here),
                f"{name}: flips": here["flip"].mean(),
                f"{name}: low": low,
                f"{name}: high": high,
            }
        flips = part[part["flip"]]
        interaction = (part["increase_in_h_without_e1"] - part["increase_in_h"]).abs()
        rows.append(
            {
                **row,
                "flips to harmful": flips["harmless_in_h"].mean(),
                "interaction, 95th percentile": interaction.quantile(0.95),
            }
        )
    return pd.DataFrame(rows)


def interval(
    pairs: pd.DataFrame, random: np.random.Generator, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the flip rate.

    A bootstrap over states (of every task and threshold), or Wilson's interval if nothing varies.
    """
    states = pairs.groupby(["task", "threshold", "state"])["flip"].agg(["sum", "count"]).to_numpy()
    if not len(states):
        return math.nan, math.nan
    flips, total = states.sum(0)
    if flips in (0, total):
        n, z = len(states), 1.96
        far = z * z / (n + z * z)
        return (0.0, far) if flips == 0 else (1 - far, 1.0)
    sums = states[random.integers(len(states), size=(draws, len(states)))].sum(1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


def by_path_length(circuit: circuits.Circuit, meter: DamageMeter) -> list[dict[str, object]]:
    """For each k: the number of paths of k edges, and the effect of paths of at most k edges."""
    graph, kept = circuit.graph, circuit.kept.nonzero().flatten().tolist()
    source, target, far = graph.source.tolist(), graph.target.tolist(), len(graph.nodes)
    below = [
        0 if isinstance(node, circuits.Embed) else far for node in graph.nodes
    ]  # edges to the next embedding
    above = [0 if isinstance(node, circuits.Logits) else far for node in graph.nodes]
    for edge in kept:  # graph order: every edge into a node stands before those out of it
        below[target[edge]] = min(below[target[edge]], below[source[edge]] + 1)
    for edge in reversed(kept):
        above[source[edge]] = min(above[source[edge]], above[target[edge]] + 1)
    through = torch.tensor([below[source[edge]] + 1 + above[target[edge]] for edge in kept])
    counts = paths_by_length(graph, kept)
    lengths = range(1, int(np.flatnonzero(counts).max(initial=0)) + 1)
    cuts = torch.zeros(len(lengths) + 2, len(graph), dtype=torch.bool)
    for row, length in enumerate(lengths):
        cuts[row, torch.tensor(kept)[through <= length]] = True
    cuts[-2] = circuit.kept
    *damages, whole, empty = meter(cuts).tolist()
    return [
        {
            "k": k,
            "paths of k edges": int(counts[k]),
            "edges on paths of at most k": int(cut.sum()),
            "longer paths of these edges": int(
                paths_by_length(graph, cut.nonzero().flatten().tolist())[k + 1 :].sum()
            ),
            "share of the effect": (empty - damage) / (empty - whole),
        }
        for k, cut, damage in zip(lengths, cuts, damages, strict=False)
    ]


def paths_by_length(graph: circuits.Graph, kept: list[int]) -> np.ndarray:
    """Count the paths of each length from an embedding to the logits.

    A head that is read in two slots gives two paths.
    """
    counts = np.zeros((len(graph.nodes), len(graph.nodes) + 1), dtype=np.int64)
    counts[
        [index for index, node in enumerate(graph.nodes) if isinstance(node, circuits.Embed)], 0
    ] = 1
    for edge in kept:
        counts[graph.target[edge], 1:] += counts[graph.source[edge], :-1]
    return counts[
        [index for index, node in enumerate(graph.nodes) if isinstance(node, circuits.Logits)]
    ].sum(0)


def figure(by_relation: pd.DataFrame, lengths: pd.DataFrame) -> go.Figure:
    """Plot flip rates by threshold and relation, and the share of the effect by path length."""
    middle = sorted(lengths["threshold"].unique())[lengths["threshold"].nunique() // 2]
    titles = (
        "Flips among pairs that matter",
        f"Effect of paths of at most k edges, T = {middle:g}",
    )
    result = make_subplots(cols=2, subplot_titles=titles)
    for relation, part in by_relation.groupby("relation", sort=False):
        rate = part["matter: flips"]
        bars = {
            "type": "data",
            "array": part["matter: high"] - rate,
            "arrayminus": rate - part["matter: low"],
        }
        result.add_scatter(
            x=part["threshold"],
            y=rate,
            error_y=bars,
            name=str(relation),
            mode="lines+markers",
            row=1,
            col=1,
        )
    for task, part in lengths[lengths["threshold"] == middle].groupby("task", sort=False):
        result.add_scatter(
            x=part["k"],
            y=part["share of the effect"],
            name=str(task),
            mode="lines+markers",
            row=1,
            col=2,
        )
    result.update_xaxes(title="threshold (nats)", type="log", col=1).update_xaxes(
        title="k", dtick=1, col=2
    )
    return result.update_yaxes(title="flip rate", rangemode="tozero", col=1).update_yaxes(
        title="share", col=2
    )


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Put each rate, its interval and the number of pairs into one column."""
    columns: dict[str, object] = {}
    for name in table:
        subset, _, what = str(name).partition(": ")
        if not what:
            columns[str(name)] = table[name]
        elif what == "flips":
            parts = table[
                [f"{subset}: {each}" for each in ("flips", "low", "high", "pairs")]
            ].to_numpy()
            columns[f"flips, {subset}"] = [
                f"{rate:.1%} ({low:.1%} to {high:.1%}) of {pairs:.0f}"
                for rate, low, high, pairs in parts
            ]
    return pd.DataFrame(columns)


def by_k(lengths: pd.DataFrame) -> pd.DataFrame:
    """One row per circuit, one column per k."""
    cells = [
        f"{share:.3f} ({longer:.0f})"
        for share, longer in lengths[
            ["share of the effect", "longer paths of these edges"]
        ].to_numpy()
    ]
    wide = lengths.assign(cell=cells).pivot(index=["task", "threshold"], columns="k", values="cell")
    return wide.fillna("").rename(columns=lambda k: f"k = {k}").reset_index()


if __name__ == "__main__":
    main(tyro.cli(Config))

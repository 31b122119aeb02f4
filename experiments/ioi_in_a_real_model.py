"""Does a model its authors never saw have the heads of the IOI circuit, and do they do their work?

    python experiments/ioi_in_a_real_model.py FOLDER       # a folder with SmolLM2-135M-Instruct

Wang et al. 2022 (https://arxiv.org/abs/2211.00593) found classes of heads in GPT-2 small by where
they look in "When Mary and John went to the store, John gave a drink to":

    previous token   from each token to the one before
    duplicate token  from the second John (S2) to the first (S1)
    induction        from S2 to the token after S1
    S-inhibition     from the end to S2; they make the name movers look away from it
    name mover       from the end to Mary (IO), which they copy into the logits

The train split finds, the test split judges.

- EAP-IG and ACDC find circuits. A head counts if either keeps an edge of it that reaches the
  logits.
- A head belongs to the class in whose direction it looks most, if that is `attention` or more on
  average. A head that looks for a repeated name (duplicate token, induction) must do so at most
  half as much on the corrupted prompts, where no name is repeated.
- A name mover whose edge into the logits lowers the logit difference (by more than two standard
  errors) is a negative name mover.

The threshold was chosen after a first look at a dozen heads, whose mean attention was 0.42 to 0.81.

On the test split, heads and edges are ablated. What that does is the logit difference lost: that of
the model minus that of the circuit which lacks these edges, by prompt. Each set of heads is
compared with random sets of heads of no class, as many in each layer where there are as many.
Intervals are a bootstrap over prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro
from markdown_tables import markdown

import circuits

# From which span to which the heads of a class look.
LOOKS = {
    "duplicate token": ("S2", "S1"),
    "induction": ("S2", "S1+1"),
    "S-inhibition": ("END", "S2"),
    "name mover": ("END", "IO"),
}
OF_REPEATS = ("duplicate token", "induction")
NEGATIVE = "negative name mover"
CLASSES = ("previous token", *LOOKS, NEGATIVE)
BOTH = "both kinds of name mover"
# Source, target, and the slot in which the second is expected to read the first. All are from the
# paper, but for the second, which is in ACDC's circuit, and the last: the class is in three layers.
READS = (
    ("previous token", "induction", "k"),
    ("duplicate token", "induction", "q"),
    ("duplicate token", "S-inhibition", "v"),
    ("induction", "S-inhibition", "v"),
    ("S-inhibition", "name mover", "q"),
    ("S-inhibition", NEGATIVE, "q"),
    ("S-inhibition", "S-inhibition", "q"),
)
# At most as many random sets of sources, and of targets, for each path: there are many paths.
PATH_DRAWS = 1
# Prompts at a time: the logits of a hundred circuits take 20 MB for every prompt.
AT_ONCE = 16
RESAMPLES = 2000

Heads = list[str]
Edges = torch.Tensor
ByHead = dict[str, torch.Tensor]
"""One number per head and prompt [layer head prompt], by class."""


@dataclass(frozen=True)
class Config:
    """Model, prompts and searches."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or name of the model."""
    train_n: int = 64
    """Prompts drawn to search on; those that do not fit the model are dropped."""
    test_n: int = 40
    """Prompts drawn to judge on."""
    acdc_n: int = 8
    """Prompts of ACDC, the first of the train split."""
    threshold: float = 0.02
    """Of ACDC, in nats."""
    size: float = 0.005
    """Share of the edges that EAP-IG keeps."""
    attention: float = 0.3
    """Mean attention from which on a head belongs to a class."""
    draws: int = 5
    """Random sets of heads for each set of a class."""
    seed: int = 0
    """Of random sets and of the bootstrap."""
    threads: int = 1
    """torch threads."""
    out: Path = Path("runs/ioi-in-a-real-model")
    """Output folder: circuits, tables, figure. Tables that are there are not made again."""


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = circuits.load_model(config.model)
    train = circuits.load_task("ioi", model, n=config.train_n, split="train")
    test = circuits.load_task("ioi", model, n=config.test_n, split="test")
    lab = Lab(model, circuits.component_graph(model), test, config)
    found = circuits_found(lab, train)
    kept = {name: set(heads_of(circuit)) for name, circuit in found.items()}
    path = config.out / "classes.csv"
    if not path.exists():
        pd.Series(classify(lab, train), name="class").rename_axis("head").to_csv(path)
    classes = dict(pd.read_csv(path).itertuples(index=False))
    members = {
        kind: [head for head in of_class(classes, kind) if head in set.union(*kept.values())]
        for kind in CLASSES
    }
    members = {kind: heads for kind, heads in members.items() if heads}
    print({kind: " ".join(heads) for kind, heads in members.items()}, flush=True)

    tables = {
        "The circuits": lambda: faithfulness(lab, found),
        "How many heads": lambda: head_counts(lab, classes, kept),
        "The heads": lambda: head_table(lab, members, kept),
        "Paths": lambda: paths(lab, members, classes),
        "Attention": lambda: attention_lost(lab, members),
        "Knock-outs": lambda: knock_outs(lab, members, classes),
        "Paths through paths": lambda: mediation(lab, members),
        "Backup": lambda: backup(lab, members, set.union(*kept.values())),
    }
    circuit = circuit_of_heads(lab, members, found)
    types = {head: kind for kind, heads in members.items() for head in heads}
    title = f"IOI heads of {model.cfg.model_name}"
    drawing = circuits.draw_circuit(circuit, title=title, types=types)
    (config.out / "heads.svg").write_text(drawing)
    text = lab.described(train)
    for title, made in tables.items():
        path = config.out / f"{title.lower().replace(' ', '-')}.csv"
        if not path.exists():
            made().to_csv(path, index=False)
        text += f"\n\n## {title}\n\n{markdown(pd.read_csv(path, keep_default_na=False))}"
        (config.out / "tables.md").write_text(text)
        print(f"{title} done", flush=True)
    print(text)


# --- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """The model with the prompts that judge, and what is measured on them."""

    model: object
    graph: circuits.Graph
    task: circuits.Task
    config: Config

    @property
    def heads(self) -> Heads:
        """All heads of the model, layer by layer."""
        return [str(node) for node in self.graph.nodes if isinstance(node, circuits.Head)]

    def edges(
        self, sources: Iterable[str] | None, targets: Iterable[str] | None = None, slot: str = ""
    ) -> Edges:
        """The edges from these sources into these targets, or from and into all."""
        graph = self.graph
        chosen = torch.ones(len(graph), dtype=torch.bool)
        if sources is not None:
            chosen &= graph.node_mask(list(sources))[graph.source]
        if targets is not None:
            chosen &= graph.node_mask(list(targets))[graph.target]
        return chosen & (graph.slot == "qkv".index(slot)) if slot else chosen

    def lost(
        self,
        ablated: Mapping[Hashable, Edges],
        *,
        ablation: str = "resample",
        task: circuits.Task | None = None,
    ) -> pd.DataFrame:
        """The logit difference lost by ablating edges: a row per prompt, a column per entry."""
        task = task or self.task
        dropped = torch.stack([~self.edges(None), *ablated.values()])
        # Means are those over all prompts, whichever part runs.
        replacing = circuits.Ablation("mean", over=task) if ablation == "mean" else ablation
        parts = []
        for start in range(0, len(task), AT_ONCE):
            part = task[start : start + AT_ONCE]
            logits = circuits.run_circuits(
                self.model, self.graph, ~dropped, part, ablation=replacing
            )
            parts.append(circuits.METRICS["logit_difference"](logits, logits[0], part))
        first, *others = torch.cat(parts, dim=1)
        columns = zip(ablated, others, strict=True)
        return pd.DataFrame({name: (first - values).numpy() for name, values in columns})

    def interval(self, values: Iterable[float], digits: int = 2) -> str:
        """A mean over prompts, with its interval of 95 %."""
        values = np.asarray(values, dtype=float)
        random = np.random.default_rng(self.config.seed)
        means = random.choice(values, (RESAMPLES, len(values))).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def others(self, heads: Heads, classes: Mapping[str, str]) -> list[Heads]:
        """Random sets of heads of no class, as many in each layer as there are of these."""
        random = Random(f"{self.config.seed} {heads}")
        pools = {
            layer: [h for h in self.heads if layer_of(h) == layer and h not in classes]
            for layer in map(layer_of, heads)
        }
        counts = Counter(map(layer_of, heads))
        return [
            [
                head
                for layer, pool in pools.items()
                for head in random.sample(pool, min(counts[layer], len(pool)))
            ]
            for _ in range(self.config.draws)
        ]

    def looks(self, task: circuits.Task, circuit: circuits.Circuit | None = None) -> ByHead:
        """Where heads look: attention [layer head prompt] in the direction of each class.

        Args:
            circuit: attention is that in its run; by default in that of the whole model.
        """
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.model.cfg.n_layers)]
        ablation = "zero" if circuit is None else "resample"
        circuit = circuit or circuits.Circuit.full(self.graph)
        seen = circuits.circuit_activations(self.model, circuit, task, names, ablation=ablation)
        patterns = torch.stack([seen[name] for name in names])  # layer prompt head query key
        rows = torch.arange(len(task))
        at = {span: mask.int().argmax(1) for span, mask in task.positions.items()}
        found = {
            kind: patterns[:, rows, :, at[query], at[key]].permute(1, 2, 0)
            for kind, (query, key) in {**LOOKS, "to S1": ("END", "S1")}.items()
        }
        # The second token has only the first before it, where heads look that look nowhere.
        before = patterns.diagonal(-1, -2, -1)[..., 1:]
        counted = task.mask[:, None, 2:]
        found["previous token"] = ((before * counted).sum(-1) / counted.sum(-1)).permute(0, 2, 1)
        return found

    def described(self, train: circuits.Task) -> str:
        """What was measured on what."""
        cfg = self.model.cfg
        return (
            f"{cfg.model_name} ({cfg.n_layers} layers, {cfg.n_heads} heads), {len(train)} prompts "
            f"to search on (ACDC: {self.config.acdc_n}), {len(self.task)} held-out prompts."
        )


def heads_of(circuit: circuits.Circuit) -> Heads:
    """The heads of which the circuit keeps an edge that reaches the logits."""
    kept = circuit.connected()
    return [str(node) for node in kept.nodes if isinstance(node, circuits.Head)]


def layer_of(head: str) -> int:
    return circuits.parse_node(head).layer


# --- finding the heads -------------------------------------------------------------------------


def circuits_found(lab: Lab, train: circuits.Task) -> dict[str, circuits.Circuit]:
    """The circuits of both methods, found on the train split."""
    config = lab.config
    searches = {
        "EAP-IG": (circuits.EAPIG(), train),
        "ACDC": (circuits.ACDC(config.threshold), train[: config.acdc_n]),
    }
    found = {
        name: circuits.run(method, lab.model, task, out=config.out).circuit
        for name, (method, task) in searches.items()
    }
    return found | {"EAP-IG": found["EAP-IG"].top(round(config.size * len(lab.graph)))}


def classify(lab: Lab, train: circuits.Task) -> dict[str, str]:
    """The class of every head of the model that has one, on the train split."""
    clean = mean_looks(lab, lab.looks(train))
    corrupted = mean_looks(lab, lab.looks(corrupted_prompts(train)))
    for kind in OF_REPEATS:
        clean[kind] = clean[kind].where(corrupted[kind] <= clean[kind] / 2, 0)
    most = clean[["previous token", *LOOKS]]
    classes = most.idxmax(axis=1)[most.max(axis=1) >= lab.config.attention]
    movers = classes.index[classes == "name mover"]
    direct = lab.lost({head: lab.edges([head], ["logits"]) for head in movers}, task=train)
    is_negative = direct.mean() < -2 * direct.sem()
    classes[is_negative.index[is_negative]] = NEGATIVE
    return classes.to_dict()


def of_class(classes: Mapping[str, str], kind: str) -> Heads:
    """The heads of a class, kept or not."""
    return [head for head, its in classes.items() if its == kind]


def mean_looks(lab: Lab, looks: ByHead) -> pd.DataFrame:
    """Mean attention over prompts: a row per head, a column per class."""
    means = {kind: values.mean(-1).flatten().numpy() for kind, values in looks.items()}
    return pd.DataFrame(means, index=lab.heads)


def corrupted_prompts(task: circuits.Task) -> circuits.Task:
    """The corrupted prompts, as clean ones."""
    return circuits.Task.from_tokens(
        task.corrupted, lengths=task.lengths, positions=task.positions, name=task.name
    )


# --- tables ------------------------------------------------------------------------------------


def faithfulness(lab: Lab, found: Mapping[str, circuits.Circuit]) -> pd.DataFrame:
    """How good the circuits are on held-out prompts."""
    points = circuits.faithfulness_points(lab.model, list(found.values()), lab.task)
    whole = lab.lost({"empty circuit": lab.edges(None)})
    logits = circuits.model_logits(lab.model, lab.task)
    model = circuits.METRICS["logit_difference"](logits, logits, lab.task)
    points.insert(0, "circuit", list(found))
    points["logit difference of the model"] = lab.interval(model)
    points["lost in the empty circuit"] = lab.interval(whole["empty circuit"])
    return points


def head_counts(lab: Lab, classes: Mapping[str, str], kept: Mapping[str, set[str]]) -> pd.DataFrame:
    """How many heads look like each class, and how many of them the methods keep."""
    rows = []
    either = set.union(*kept.values())
    for kind in (*CLASSES, "none"):
        all_of_it = set(of_class(classes, kind))
        if kind == "none":
            all_of_it = set(lab.heads) - set(classes)
        rows.append(
            {"class": kind, "heads": len(all_of_it)}
            | {f"kept by {name}": len(all_of_it & heads) for name, heads in kept.items()}
            | {"kept by either": len(all_of_it & either)}
        )
    total = {"class": "all", "heads": len(lab.heads)}
    total |= {f"kept by {name}": len(heads) for name, heads in kept.items()}
    return pd.DataFrame([*rows, total | {"kept by either": len(either)}])


def head_table(
    lab: Lab, members: Mapping[str, Heads], kept: Mapping[str, set[str]]
) -> pd.DataFrame:
    """Every head of a class: where it looks, and what is lost without it."""
    names = [head for heads in members.values() for head in heads]
    looks = lab.looks(lab.task)
    corrupted = mean_looks(lab, lab.looks(corrupted_prompts(lab.task)))
    abba = lab.task.positions["IO"].int().argmax(1) < lab.task.positions["S1"].int().argmax(1)
    alone = {
        ablation: lab.lost({head: lab.edges([head]) for head in names}, ablation=ablation)
        for ablation in ("resample", "mean")
    }
    direct = lab.lost({head: lab.edges([head], ["logits"]) for head in names})
    movers = members.get("name mover", [])
    moved = lab.lost({head: lab.edges([head], movers, "q") for head in names})
    raised, lowered = copied(lab, names)
    rows = []
    for kind, heads in members.items():
        direction = direction_of(kind)
        rest = mean_looks(lab, looks).drop(heads)[direction].mean()
        by_head = dict(zip(lab.heads, looks[direction].flatten(0, 1), strict=True))
        for head in heads:
            row = {"class": kind, "head": head}
            row["kept by"] = " and ".join(name for name in kept if head in kept[name])
            row["attention"] = lab.interval(by_head[head])
            row["ABBA"], row["BABA"] = (
                float(by_head[head][rows_of].mean()) for rows_of in (abba, ~abba)
            )
            row["corrupted"] = float(corrupted[direction][head])
            row["other heads"] = float(rest)
            for ablation, losses in alone.items():
                row[f"lost alone, {ablation}"] = lab.interval(losses[head])
            row["lost, edge into the logits"] = lab.interval(direct[head])
            row["lost, edges into q of name movers"] = lab.interval(moved[head])
            row["names raised"], row["names lowered"] = raised[head], lowered[head]
            rows.append(row)
    return pd.DataFrame(rows)


def direction_of(kind: str) -> str:
    """The class whose direction of looking a class has."""
    return "name mover" if kind == NEGATIVE else kind


def copied(lab: Lab, heads: Heads) -> tuple[dict[str, float], dict[str, float]]:
    """How often a head that looks at a name raises it, or lowers it, more than nearly all tokens.

    The share of the prompts' names (IO, S1 and S2) whose token is among the five largest entries,
    or the five smallest, of v W_O W_U, where v is the value at the name.
    """
    model, task = lab.model, lab.task
    hooks = {head: f"blocks.{layer_of(head)}.attn.hook_v" for head in heads}
    full = circuits.Circuit.full(lab.graph)
    seen = circuits.circuit_activations(
        model, full, task, sorted(set(hooks.values())), ablation="zero"
    )
    spans = [task.positions[span] for span in ("IO", "S1", "S2")]
    names = torch.cat([task.clean[span] for span in spans])
    raised, lowered = {}, {}
    with torch.no_grad():
        for head, hook in hooks.items():
            node = circuits.parse_node(head)
            values = torch.cat([seen[hook][:, :, node.head][span] for span in spans])
            written = values @ model.blocks[node.layer].attn.W_O[node.head]
            logits = model.unembed(model.ln_final(written[None]))[0]
            for found, sign in ((raised, 1), (lowered, -1)):
                top = (sign * logits).topk(5).indices
                found[head] = float((top == names[:, None]).any(1).float().mean())
    return raised, lowered


def knock_outs(lab: Lab, members: Mapping[str, Heads], classes: Mapping[str, str]) -> pd.DataFrame:
    """What is lost without the heads of a class, and without as many others of the same layers."""
    movers = [head for kind in ("name mover", NEGATIVE) for head in members.get(kind, [])]
    sets, rows = {**members, BOTH: movers}, []
    for ablation in ("resample", "mean"):
        ablated = {"everything": lab.edges(None)}
        for kind, heads in sets.items():
            unkept = [head for head in of_class(classes, kind) if head not in heads]
            ablated[kind], ablated[kind, "not kept"] = lab.edges(heads), lab.edges(unkept)
            for number, others in enumerate(lab.others(heads, classes)):
                ablated[kind, "random", number] = lab.edges(others)
        lost = lab.lost(ablated, ablation=ablation)
        for kind, heads in sets.items():
            row = {"ablation": ablation, "class": kind, "heads": len(heads)}
            row |= {"lost": lab.interval(lost[kind]), "share": share(lost, kind)}
            row["lost, random heads"] = spread(lost, kind, "random")
            row["lost, heads of the class not kept"] = lab.interval(lost[kind, "not kept"])
            rows.append(row)
    return pd.DataFrame(rows)


def share(lost: pd.DataFrame, key: Hashable) -> float:
    """What is lost, as a share of what is lost when everything is ablated."""
    return float(lost[key].mean() / lost["everything"].mean())


def spread(lost: pd.DataFrame, key: str, which: str) -> str:
    """The mean of what random sets lose, and its range."""
    random = lost[[name for name in lost if isinstance(name, tuple) and name[:2] == (key, which)]]
    means = random.mean()
    if len(means) < 2:
        return "".join(f"{mean:.2f}" for mean in means)
    return f"{means.mean():.2f} ({means.min():.2f} to {means.max():.2f})"


def paths(lab: Lab, members: Mapping[str, Heads], classes: Mapping[str, str]) -> pd.DataFrame:
    """What is lost without the edges from one class into another, by slot, and into the logits."""
    expected = {f"{source} -> {target}.{slot}" for source, target, slot in READS}
    ablated = {"everything": lab.edges(None)}
    for name, (sources, targets, slot) in class_paths(members).items():
        ablated[name] = lab.edges(sources, targets, slot)
        if name in expected:
            for number, others in enumerate(lab.others(sources, classes)[:PATH_DRAWS]):
                ablated[name, "sources", number] = lab.edges(others, targets, slot)
            for number, others in enumerate(lab.others(targets, classes)[:PATH_DRAWS]):
                ablated[name, "targets", number] = lab.edges(sources, others, slot)
    lost, rows = lab.lost(ablated), []
    for name in class_paths(members):
        if not ablated[name].any():
            continue
        row = {"path": name, "expected": "yes" if name in expected else ""}
        row["edges"] = int(ablated[name].sum())
        row |= {"lost": lab.interval(lost[name]), "share": share(lost, name)}
        row["lost, random sources"] = spread(lost, name, "sources")
        row["lost, random targets"] = spread(lost, name, "targets")
        rows.append(row)
    return pd.DataFrame(rows)


def class_paths(members: Mapping[str, Heads]) -> dict[str, tuple[Heads, Heads, str]]:
    """Sources, targets and slot of the paths between classes, and from each into the logits."""
    between = {
        f"{source} -> {target}.{slot}": (members[source], members[target], slot)
        for source, target, _ in READS
        if {source, target} <= members.keys()
        for slot in "qkv"
    }
    return between | {f"{kind} -> logits": (its, ["logits"], "") for kind, its in members.items()}


def mediation(lab: Lab, members: Mapping[str, Heads]) -> pd.DataFrame:
    """Does what one path carries go on along the next? Then little is lost once that is ablated."""
    known, rows = class_paths(members), []
    chains = (
        ("previous token -> induction.k", "induction -> S-inhibition.v"),
        ("duplicate token -> induction.q", "induction -> S-inhibition.v"),
        ("duplicate token -> S-inhibition.v", "S-inhibition -> name mover.q"),
        ("induction -> S-inhibition.v", "S-inhibition -> name mover.q"),
        ("S-inhibition -> name mover.q", "name mover -> logits"),
    )
    chains = [chain for chain in chains if known.keys() >= set(chain)]
    ablated = {}
    for first, second in chains:
        ablated |= {path: lab.edges(*known[path]) for path in (first, second)}
        ablated[first, second] = ablated[first] | ablated[second]
    lost = lab.lost(ablated)
    for first, second in chains:
        row = {"path": first, "then": second, "lost": lab.interval(lost[first])}
        besides = lost[first, second] - lost[second]
        rows.append({**row, "lost once the next is ablated": lab.interval(besides)})
    return pd.DataFrame(rows)


def attention_lost(lab: Lab, members: Mapping[str, Heads]) -> pd.DataFrame:
    """Where a class looks when the heads that it is said to depend on are knocked out."""
    questions = (
        ("name mover", "S-inhibition", ("name mover", "to S1", "S-inhibition")),
        ("S-inhibition", "induction", ("S-inhibition",)),
    )
    whole, rows = lab.looks(lab.task), []
    for looking, absent, directions in questions:
        if not {looking, absent} <= members.keys():
            continue
        circuit = circuits.Circuit.from_edges(lab.graph, ~lab.edges(members[absent]))
        runs = {"model": whole, "without them": lab.looks(lab.task, circuit)}
        numbers = [lab.heads.index(head) for head in members[looking]]
        for direction in directions:
            query, key = {**LOOKS, "to S1": ("END", "S1")}[direction]
            row = {"class": looking, "knocked out": absent, "attention": f"{query} -> {key}"}
            for name, looks in runs.items():
                row[name] = lab.interval(looks[direction].flatten(0, 1)[numbers].mean(0))
            rows.append(row)
    return pd.DataFrame(rows)


def backup(lab: Lab, members: Mapping[str, Heads], kept: set[str]) -> pd.DataFrame:
    """Which heads write more into the logits once the name movers are knocked out.

    The other heads of their layers and later that a method keeps, by their edges into the logits.
    """
    movers = members.get("name mover", [])
    if not movers:
        return pd.DataFrame()
    first, absent = min(map(layer_of, movers)), lab.edges(movers)
    late = [head for head in lab.heads if layer_of(head) >= first]
    others = [head for head in late if head in kept and head not in movers]
    edges = {head: lab.edges([head], ["logits"]) for head in others}
    together = {(head, "too"): its | absent for head, its in edges.items()}
    lost = lab.lost({**edges, **together, "movers": absent})
    before = lost[others]
    after = pd.DataFrame({head: lost[head, "too"] - lost["movers"] for head in others})
    growth = (after - before).mean().sort_values(ascending=False)
    rows = [
        {
            "head": head,
            "lost, edge into the logits": lab.interval(before[head]),
            "without the name movers": lab.interval(after[head]),
            "growth": lab.interval(after[head] - before[head]),
        }
        for head in [*growth.index[:5], *growth.index[-3:]]
    ]
    return pd.DataFrame(rows)


def circuit_of_heads(
    lab: Lab, members: Mapping[str, Heads], found: Mapping[str, circuits.Circuit]
) -> circuits.Circuit:
    """The edges between heads of the classes, and into the logits, that a method keeps."""
    names = [head for heads in members.values() for head in heads]
    kept = torch.stack([circuit.kept for circuit in found.values()]).any(0)
    kept &= lab.edges(names, [*names, "logits"])
    return circuits.Circuit(lab.graph, found["EAP-IG"].scores, kept)


if __name__ == "__main__":
    main(tyro.cli(Config))

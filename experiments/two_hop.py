"""Does the attribution graph of "the capital of the state containing Dallas is" show Texas, and does the answer go by way of it?

    python experiments/two_hop.py                     # 100 held-out prompts: about two minutes on one core
    python experiments/two_hop.py --transcoders toy-world-plt --n 20

A state's own features are those that fire on its name, where one-hop prompts name it, and on the names of at most `--others` other states. For each
two-hop prompt: does the pruned graph that explains the answer hold one, so that it lies on a path to the answer? And by how much does the
answer's logit (less the mean logit) fall when all of the state's features that are active are ablated, against ablating as many random active
features of the same layers? Attention is not frozen and all MLPs see the change. The same is done with the facts given in the prompt,
"Dallas lies in the state of Texas. The capital of the state containing Dallas is", where the state has to pass through its name or not at all.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import pandas as pd
import torch
import tyro

import circuits
from circuits.tasks.two_hop import STATES

ONE_HOP = ("The capital of {state} is", "{state} is governed from")
GIVEN = "{city} lies in the state of {state} . {prompt}"


@dataclass(frozen=True)
class Config:
    """Which transcoders and prompts."""

    transcoders: str = "toy-world-clt"
    """Embedded ones, or a folder."""
    n: int = 100
    """Held-out prompts."""
    others: int = 3
    """A state's own features fire on the names of at most so many other states."""
    draws: int = 5
    """Random sets of features for each prompt."""
    out: Path = Path("runs/two-hop")
    """Where the results go."""


def main(config: Config) -> None:
    model, transcoders = circuits.load_model("toy-world"), circuits.load_transcoders(config.transcoders)
    own = own_features(model, transcoders, config.others)
    print(f"features of their own: {sum(bool(features) for features in own.values())} of {len(own)} states, "
          f"{sum(map(len, own.values())) / len(own):.1f} on average")  # fmt: skip
    pairs = circuits.load_task("two_hop", model, n=config.n, split="test").prompts or ()
    results = {}
    for family in ("two-hop", "facts given"):
        rows = pd.DataFrame([row(model, transcoders, own, pair, family, config) for pair in pairs])
        results[family] = {
            "prompts": len(rows),
            "answered": int(rows["answered"].sum()),
            "state's features active": int((rows["active"] > 0).sum()),
            "in the pruned graph": int(rows["in graph"].sum()),
            **{f"mean {name}": float(rows[name].mean()) for name in ("active", "fall", "random fall")},
            **{f"mean {name} where active": float(rows.loc[rows["active"] > 0, name].mean()) for name in ("fall", "random fall")},
            "answer changes": int(rows["changed"].sum()),
            "answer changes at random": float(rows["random changed"].sum()),
        }
        print(family, json.dumps(results[family], indent=1), flush=True)
        config.out.mkdir(parents=True, exist_ok=True)
        rows.to_csv(config.out / f"{family.replace(' ', '-')}.csv", index=False)
    (config.out / "results.json").write_text(json.dumps({"config": {**asdict(config), "out": None}, **results}, indent=1) + "\n")


def own_features(model: object, transcoders: circuits.Transcoders, others: int) -> dict[str, set[tuple[int, int]]]:
    """By state, the (layer, feature) pairs that fire on its name in every one-hop prompt, and on few other states' names in any."""
    fires = {state: [on_name(model, transcoders, prompt.format(state=state), state) for prompt in ONE_HOP] for state in STATES}
    everywhere = {state: set.intersection(*found) for state, found in fires.items()}
    anywhere = {state: set.union(*found) for state, found in fires.items()}
    return {
        state: {feature for feature in features if sum(feature in anywhere[other] for other in STATES if other != state) <= others}
        for state, features in everywhere.items()
    }


def on_name(model: object, transcoders: circuits.Transcoders, prompt: str, state: str) -> set[tuple[int, int]]:
    """What fires where the prompt has the state's name."""
    position = model.to_str_tokens(prompt).index(state)
    activations = circuits.intervene(model, transcoders, prompt, [[]]).activations
    return {(layer, index) for layer, part in enumerate(activations) for index in part[0, position].nonzero().flatten().tolist()}


def row(
    model: object,
    transcoders: circuits.Transcoders,
    own: dict[str, set[tuple[int, int]]],
    pair: circuits.PromptPair,
    family: str,
    config: Config,
) -> dict[str, float | bool | str]:
    """One prompt's numbers."""
    (answer,) = pair.answers
    state = next(state for state, (capital, _) in STATES.items() if capital == answer.strip())
    city = next(city for city in STATES[state][1] if city in pair.clean)
    prompt = pair.clean if family == "two-hop" else GIVEN.format(city=city, state=state, prompt=pair.clean)
    graph = circuits.AttributionGraph(transcoders).attribute(model, prompt, explain=[answer])
    names = model.to_str_tokens(prompt)
    given = names.index(state) if state in names else -1
    active = {(n.layer, n.index, n.position) for n in features_of(graph) if (n.layer, n.index) in own[state] and n.position != given}
    kept = {(n.layer, n.index, n.position) for n in features_of(circuits.pruned(graph))}
    falls, changed = ablated(model, transcoders, prompt, answer, graph, sorted(active), config)
    top = circuits.intervene(model, transcoders, prompt, [[]]).logits[0, -1].argmax()
    return {
        "prompt": prompt,
        "state": state,
        "answered": int(top) == graph.targets[0].token,
        "active": len(active),
        "in graph": bool(active & kept),
        "fall": falls[0],
        "random fall": sum(falls[1:]) / config.draws,
        "changed": changed[0],
        "random changed": sum(changed[1:]) / config.draws,
    }


def features_of(graph: circuits.FeatureGraph) -> list[circuits.Feature]:
    """A graph's features."""
    return [node for node in map(graph.node, range(len(graph.nodes))) if isinstance(node, circuits.Feature)]


def ablated(
    model: object,
    transcoders: circuits.Transcoders,
    prompt: str,
    answer: str,
    graph: circuits.FeatureGraph,
    active: Sequence[tuple[int, int, int]],
    config: Config,
) -> tuple[list[float], list[bool]]:
    """Falls of the answer's logit, and whether the most probable token changes: without the state's features, and without random ones."""
    random, token = Random(f"two-hop {prompt}"), graph.targets[0].token
    pool = {layer: sorted(str(node) for node in features_of(graph) if node.layer == layer) for layer in range(graph.n_layers)}
    sets = [[f"f{layer}.{index}@{position}" for layer, index, position in active]]
    for _ in range(config.draws):
        counts = {layer: sum(one[0] == layer for one in active) for layer in pool}
        sets.append([name for layer, count in counts.items() for name in random.sample(pool[layer], count)])
    variants = [[], *([circuits.Intervention.ablate(name) for name in some] for some in sets)]
    with torch.no_grad():
        last = circuits.intervene(model, transcoders, prompt, variants, freeze_attention=False).logits[:, -1]
    logit = last[:, token] - last.mean(-1)
    return (logit[0] - logit[1:]).tolist(), (last.argmax(-1)[1:] != last[0].argmax()).tolist()


if __name__ == "__main__":
    main(tyro.cli(Config))

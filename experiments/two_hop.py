"""Does toy-world think of Texas when asked for the capital of the state containing Dallas?

    python experiments/two_hop.py                     # about three minutes on one core
    python experiments/two_hop.py --transcoders toy-world-plt --n 20

A feature belongs to a state if it fires on the state's name in both one-hop prompts and on the
names of at most `--others` other states. Two questions for each prompt:

- Does the pruned graph that explains the answer contain a feature of the state?
- How much does the answer's logit (minus the mean logit) fall when all active features of the state
  are ablated, compared with as many random active features of the same layers? Attention is not
  frozen, and all MLPs see the change.

The same is measured with the fact stated before the question, and with chained facts, where the
question names the state. There, features that fire on the name itself count too. Both are also
asked with a wrong state. If the answer stays that of the city's real state, the model has memorised
the composed fact and ignores the given one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import pandas as pd
import torch
import tyro
from markdown_tables import markdown

import circuits
from circuits.tasks.families.two_hop import STATES

ONE_HOP = ("The capital of {state} is", "{state} is governed from")
FAMILIES = {
    "two-hop": "{prompt}",
    "fact given": "{city} lies in the state of {state} . {prompt}",
    "facts chained": "{city} lies in the state of {state} . The capital of {state} is",
}


@dataclass(frozen=True)
class Config:
    """Transcoders and prompts."""

    transcoders: str = "toy-world-clt"
    """Name of an embedded set, or a folder."""
    n: int = 100
    """Held-out prompts."""
    others: int = 7
    """A state's features fire on the names of at most this many other states."""
    draws: int = 5
    """Random sets of features per prompt."""
    out: Path = Path("runs/two-hop")
    """Output folder."""


def main(config: Config) -> None:
    if config.draws < 1:
        raise circuits.InputError(
            f"draws={config.draws}: give 1 or more random sets for each prompt."
        )
    model, transcoders = (
        circuits.load_model("toy-world"),
        circuits.load_transcoders(config.transcoders),
    )
    own = own_features(model, transcoders, config.others)
    print(
        f"features of their own: {sum(bool(features) for features in own.values())} of {len(own)} "
        f"states, "
        f"{sum(map(len, own.values())) / len(own):.1f} on average"
    )
    pairs = circuits.load_task("two_hop", model, n=config.n, split="test").prompts or ()
    results = {}
    for family in FAMILIES:
        rows = pd.DataFrame([row(model, transcoders, own, pair, family, config) for pair in pairs])
        results[family] = summarized(rows) | (
            wrong_state(model, pairs, family) if family != "two-hop" else {}
        )
        print(family, json.dumps(results[family], indent=1), flush=True)
        config.out.mkdir(parents=True, exist_ok=True)
        rows.to_csv(config.out / f"{family.replace(' ', '-')}.csv", index=False)
    (config.out / "results.md").write_text(
        markdown(pd.DataFrame(results).rename_axis("").reset_index())
    )
    (config.out / "results.json").write_text(
        json.dumps({"config": {**asdict(config), "out": None}, **results}, indent=1) + "\n"
    )


def summarized(rows: pd.DataFrame) -> dict[str, float | None]:
    """Summary of one family of prompts."""
    shown = rows[rows["active"] > 0]
    return {
        "prompts": len(rows),
        "answered": int(rows["answered"].sum()),
        "state's features active": len(shown),
        "in the pruned graph": int(rows["in graph"].sum()),
        **{
            f"mean {name}": float(rows[name].mean())
            for name in ("logit", "active", "fall", "random fall")
        },
        **{
            f"mean {name} where active": float(shown[name].mean()) if len(shown) else None
            for name in ("fall", "random fall")
        },
        "answer changes": int(rows["changed"].sum()),
        "answer changes at random": float(rows["random changed"].sum()),
    }


def wrong_state(model: object, pairs: Sequence[circuits.PromptPair], family: str) -> dict[str, int]:
    """How often the answer is the capital of the city's real state, and how often that of the named
    one.
    """
    random, follows = Random(f"two-hop {family}"), {"the city": 0, "the state named": 0}
    for pair in pairs:
        state, city = whereabouts(pair)
        other = random.choice([name for name in STATES if name != state])
        prompt = FAMILIES[family].format(city=city, state=other, prompt=pair.clean)
        with torch.no_grad():
            said = model.to_string(model(model.to_tokens(prompt))[0, -1].argmax()).strip()
        follows["the city"] += said == STATES[state][0]
        follows["the state named"] += said == STATES[other][0]
    return {
        f"with a wrong state, the answer follows {what}": count for what, count in follows.items()
    }


def whereabouts(pair: circuits.PromptPair) -> tuple[str, str]:
    """The state and the city."""
    (answer,) = pair.answers
    state = next(state for state, (capital, _) in STATES.items() if capital == answer.strip())
    return state, next(city for city in STATES[state][1] if city in pair.clean)


def own_features(
    model: object, transcoders: circuits.Transcoders, others: int
) -> dict[str, set[tuple[int, int]]]:
    """The (layer, feature) pairs of each state.

    They fire on the state's name in every one-hop prompt, and on few other states' names in any.
    """
    fires = {
        state: [
            on_name(model, transcoders, prompt.format(state=state), state) for prompt in ONE_HOP
        ]
        for state in STATES
    }
    everywhere = {state: set.intersection(*found) for state, found in fires.items()}
    anywhere = {state: set.union(*found) for state, found in fires.items()}
    return {
        state: {
            feature
            for feature in features
            if sum(feature in anywhere[other] for other in STATES if other != state) <= others
        }
        for state, features in everywhere.items()
    }


def on_name(
    model: object, transcoders: circuits.Transcoders, prompt: str, state: str
) -> set[tuple[int, int]]:
    """The features that fire on the state's name in a prompt."""
    position = model.to_str_tokens(prompt).index(state)
    activations = circuits.intervene(model, transcoders, prompt, [[]]).activations
    return {
        (layer, index)
        for layer, part in enumerate(activations)
        for index in part[0, position].nonzero().flatten().tolist()
    }


def row(
    model: object,
    transcoders: circuits.Transcoders,
    own: dict[str, set[tuple[int, int]]],
    pair: circuits.PromptPair,
    family: str,
    config: Config,
) -> dict[str, float | bool | str]:
    """Measure one prompt."""
    (answer,), (state, city) = pair.answers, whereabouts(pair)
    prompt = FAMILIES[family].format(city=city, state=state, prompt=pair.clean)
    graph = circuits.AttributionGraph(transcoders).attribute(model, prompt, explain=[answer])
    active = {place for place in places(graph) if place[:2] in own[state]}
    logit, falls, changed, answered = ablated(model, transcoders, prompt, graph, active, config)
    return {
        "prompt": prompt,
        "state": state,
        "answered": answered,
        "active": len(active),
        "in graph": bool(active & places(circuits.pruned(graph))),
        "logit": logit,
        "fall": falls[0],
        "random fall": sum(falls[1:]) / config.draws,
        "changed": changed[0],
        "random changed": sum(changed[1:]) / config.draws,
    }


def places(graph: circuits.FeatureGraph) -> set[tuple[int, int, int]]:
    """Layer, index and position of each feature of a graph."""
    nodes = map(graph.node, range(len(graph.nodes)))
    return {
        (node.layer, node.index, node.position)
        for node in nodes
        if isinstance(node, circuits.Feature)
    }


def ablated(
    model: object,
    transcoders: circuits.Transcoders,
    prompt: str,
    graph: circuits.FeatureGraph,
    active: set[tuple[int, int, int]],
    config: Config,
) -> tuple[float, list[float], list[bool], bool]:
    """The effect of ablating the state's features, and of ablating random ones.

    Returns the answer's logit, its falls, whether the most probable token changes (each for the
    state's features first, then for the random draws), and whether the answer is the most probable
    token.
    """
    random, token = Random(f"two-hop {prompt}"), graph.targets[0].token
    others = sorted(places(graph) - active)
    sets = [sorted(active)]
    for _ in range(config.draws):
        layers = [layer for layer, _, _ in sorted(active)]
        pools = {layer: [place for place in others if place[0] == layer] for layer in set(layers)}
        sets.append(
            [
                place
                for layer in sorted(pools)
                for place in random.sample(pools[layer], layers.count(layer))
            ]
        )
    variants = [
        [
            circuits.Intervention.ablate(f"f{layer}.{index}@{position}")
            for layer, index, position in some
        ]
        for some in [[], *sets]
    ]
    with torch.no_grad():
        last = circuits.intervene(
            model, transcoders, prompt, variants, freeze_attention=False
        ).logits[:, -1]
    logit, said = last[:, token] - last.mean(-1), last.argmax(-1)
    return (
        float(logit[0]),
        (logit[0] - logit[1:]).tolist(),
        (said[1:] != said[0]).tolist(),
        int(said[0]) == token,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

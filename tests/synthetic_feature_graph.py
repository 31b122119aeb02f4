"""Attribution graphs of any size without a model: random features with forward edges, most of them
weak and a few strong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.attribution.feature_graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    TARGET,
    FeatureGraph,
    LogitTarget,
    Nodes,
)

SENTENCE = (
    "<bos> Fact: the capital of the state containing Dallas is the city of Austin , "
    "and the capital of California is"
).split(" ")


def synthetic_graph(
    *,
    words: Sequence[str] = SENTENCE,
    layers: int = 4,
    features: int = 60,
    edges: int = 2000,
    labels: Sequence[str] = (" Sacramento", " Austin", " the"),
) -> FeatureGraph:
    """A graph whose nodes and edges stand in the order that `FeatureGraph` promises."""
    generator = torch.Generator().manual_seed(0)
    nodes = _nodes(len(words), layers, features, len(labels), generator)
    source, target = _pairs(nodes, edges, generator)
    weight = torch.randn(len(source), generator=generator) ** 3
    stays = torch.where(
        nodes.position[source] == nodes.position[target],
        torch.rand(len(source), generator=generator),
        0.0,
    )
    return FeatureGraph(
        nodes=nodes,
        source=source,
        target=target,
        weight=weight,
        direct=weight * stays,
        constants=torch.randn(len(nodes), 2, generator=generator)
        * (nodes.layer >= 0)[:, None]
        * (nodes.kind != ERROR)[:, None],
        constant_names=("mlp_bias", "own_bias"),
        tokens=torch.arange(len(words)) + 100,
        words=tuple(words),
        targets=tuple(LogitTarget(label, 1000 + number) for number, label in enumerate(labels)),
        n_layers=layers,
    )


def _nodes(
    positions: int, layers: int, features: int, targets: int, generator: torch.Generator
) -> Nodes:
    # Later positions have more features, the last one most of all.
    room = torch.linspace(1.0, 3.0, positions)
    room[-1] = 9.0
    layer = torch.randint(layers, (4 * features,), generator=generator)
    position = torch.multinomial(room, 4 * features, replacement=True, generator=generator)
    index = torch.randint(1 << 14, (4 * features,), generator=generator)
    key = ((layer * positions + position) * (1 << 14) + index).unique()
    key = key[torch.randperm(len(key), generator=generator)[:features].sort().values]
    place = torch.arange(positions)
    kind = torch.tensor([FEATURE, ERROR, EMBEDDING, TARGET]).repeat_interleave(
        torch.tensor([features, layers * positions, positions, targets])
    )
    rest = len(kind) - features
    probability = torch.zeros(len(kind))
    probability[len(kind) - targets :] = 0.6 * 0.4 ** torch.arange(targets)
    return Nodes(
        kind=kind,
        layer=torch.cat(
            [
                key >> 14,
                torch.arange(layers).repeat_interleave(positions),
                place * 0 - 1,
                torch.full((targets,), layers),
            ]
        )
        // torch.where(kind == FEATURE, positions, 1),
        position=torch.cat(
            [
                (key >> 14) % positions,
                place.repeat(layers),
                place,
                torch.full((targets,), positions - 1),
            ]
        ),
        index=torch.cat(
            [
                key % (1 << 14),
                torch.zeros(layers * positions, dtype=torch.long),
                place + 100,
                torch.arange(targets),
            ]
        ),
        activation=torch.cat(
            [torch.rand(features, generator=generator) * 5, torch.full((rest,), torch.nan)]
        ),
        probability=probability,
    )


def _pairs(nodes: Nodes, edges: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random edges that go forward in layers and not backward in positions, ordered by target, then
    source.
    """
    n = len(nodes)
    into, out = (
        (torch.isin(nodes.kind, torch.tensor(kinds))).nonzero().flatten()
        for kinds in ([FEATURE, TARGET], [FEATURE, ERROR, EMBEDDING])
    )
    if len(into) * len(out) <= 1 << 22:
        target, source = torch.cartesian_prod(into, out).T
    else:
        target, source = (
            column[torch.randint(len(column), (6 * edges,), generator=generator)]
            for column in (into, out)
        )
    forward = (nodes.layer[source] < nodes.layer[target]) & (
        nodes.position[source] <= nodes.position[target]
    )
    key = (target[forward] * n + source[forward]).unique()
    key = key[torch.randperm(len(key), generator=generator)[:edges].sort().values]
    return key % n, key // n

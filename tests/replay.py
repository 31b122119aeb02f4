"""ACDC replayed from its definition, with the reference executor: the states of the sequential
search follow from its decisions.
"""

import torch
from meters import damage_meter

from circuits.discovery.search.edge_order import edge_order
from circuits.discovery.search_space import SearchSpace
from circuits.graph.circuit import Circuit

# Batch sizes change the last bits, so that this close to the threshold either decision is right.
BAND = 1e-5


def assert_sequential(
    found: Circuit,
    model,
    task,
    threshold: float,
    *,
    metric="kl",
    order="topological",
    ablation="resample",
    space: SearchSpace | None = None,
) -> int:
    """Every decision of `found` is the one that the sequential loop makes in the state that the
    decisions before it led to; in a search space, of the edges to try.

    Returns how many were measured.
    """
    graph = found.graph
    damage = damage_meter(model, graph, task, metric=metric, ablation=ablation, executor="hooks")
    space = space or SearchSpace.parse(graph)
    kept = space.kept.clone()
    tried: list[tuple[list[int], bool, torch.Tensor]] = []
    for trial in edge_order(graph, order):
        edges = [edge for edge in trial.edges if kept[edge] and space.tried[edge]]
        if not edges or not damage.reaching_logits(kept)[edges].any():
            assert not found.kept[edges].any(), (
                "edges into a target that does not reach the logits go untried"
            )
            kept[edges] = False
            continue
        for group in [edges] if trial.together else [[edge] for edge in edges]:
            without = kept.clone()
            without[group] = False
            removed = not found.kept[group].any()
            if (
                removed and trial.together
            ):  # it may also have stayed, and lost its edges one by one later
                before, after = damage(torch.stack([kept, without])).tolist()
                removed = after - before < threshold
            tried.append((group, removed, without))
            kept = without if removed else kept
    assert torch.equal(kept, found.kept)
    start, *measured = damage(
        torch.stack([space.kept, *(without for _, _, without in tried)])
    ).tolist()
    for (group, removed, _), new in zip(tried, measured, strict=True):
        if abs(new - start - threshold) > BAND:
            assert removed == (new - start < threshold), [str(graph.edges[edge]) for edge in group]
        start = new if removed else start
    return len(tried)

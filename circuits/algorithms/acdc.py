"""ACDC: automatic circuit discovery, exact and sequential.

Conmy, Mavor-Parker, Lynch, Heimersheim and Garriga-Alonso 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability"
(https://arxiv.org/abs/2304.14997), section 3. Start from the whole graph; from the logits up, remove each edge whose removal raises the
damage by less than a threshold, given all that was removed before. A target that no longer reaches the logits loses its edges untried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.ablation import Ablation
from circuits.circuit import Circuit
from circuits.components import component_graph, computed_nodes
from circuits.discoverer import SPEED_ONLY, Checkpoint, CircuitDiscoverer, Progress
from circuits.distributed import ranks, totals
from circuits.edge_order import OrderName, Trial, edge_order
from circuits.errors import InputError
from circuits.execution import DamageMeter
from circuits.graph import Graph
from circuits.metrics import Metric
from circuits.models import Model
from circuits.nodes import Head
from circuits.tasks.base import Task

State = dict[str, Any]

# How often a guess fails that rests on a measurement in a neighbouring state; and the most edges to speculate on at once, for each
# of the ranks that share them.
WRONG_AFTER_MEASURING, LARGEST_BATCH = 0.08, 256
NEVER = 1 << 62


@dataclass(frozen=True)
class ACDC(CircuitDiscoverer):
    """Remove, one at a time from the logits up, every edge whose removal does less damage than the threshold.

    Scores are the measured increases in damage, each in the state the search was in; edges never tried on their own stay unscored.
    The sequential decisions are found in batches, by speculation: guess the next ones (an edge shares the fate of the last one from its
    source into such a slot), measure each in the state in which the guess would leave the search, and accept as many as turn out as guessed, and the first that does not. Whatever the guess, every decision
    was measured in the state of the sequential search.

    Reference: Conmy et al. 2023, https://arxiv.org/abs/2304.14997

    Attributes:
        threshold: the largest increase in damage an edge may cost and still go, in the metric's unit (nats for KL).
        metric: what damage is measured in.
        ablation: what a removed edge carries instead.
        order: in which order edges are tried; "original" is that of the authors' code, with its group tests.
        speculate: measure several decisions at once; False measures one after the other.
        absolute: compare the size of the change with the threshold, so that edges which hurt are kept too.
        max_memory: bytes that one step may take; by default chosen from what is free.
    """

    name: ClassVar[str] = "acdc"
    threshold: float
    metric: str | Metric = "kl"
    ablation: str | Ablation = "resample"
    order: OrderName = "topological"
    speculate: bool = field(default=True, metadata=SPEED_ONLY)
    absolute: bool = False
    max_memory: int | None = field(default=None, kw_only=True, metadata=SPEED_ONLY)

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(f"threshold={self.threshold} must be a number of at least 0; 0.01 is a usual one for KL.")

    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        graph = component_graph(model) if graph is None else graph
        saved = Checkpoint.open(checkpoint, self, graph, task)
        damage = DamageMeter.prepare(model, graph, task, metric=self.metric, ablation=self.ablation, max_memory=self.max_memory)
        return self._search(graph, damage, saved, progress)

    def _search(
        self, graph: Graph, damage: DamageMeter, saved: Checkpoint, progress: Progress | None, guess: Bool[Tensor, "edge"] | None = None
    ) -> Circuit:
        """The search itself, with `guess` the edges that it is expected to keep; None: guess from its own decisions."""
        chains = list(_chains(graph, edge_order(graph, self.order)))
        start = _as_tensors(self._start(graph, damage, guess))
        alike = None if guess is not None else _alike(graph)
        state: State = {name: value if value.dim() else value.item() for name, value in saved.restore(start).items()}
        for commit in range(state["commits"]):
            damage.near(state["removed_at"] > commit)  # along the same way, so that rounding is the same as without a break
        for number in range(state["next"], len(chains)):
            for _ in self._follow(chains[number], state, graph, damage, alike):
                saved.save(_as_tensors(state))
            state |= {"next": number + 1, "decided": 0, "surveyed": 0, "began": state["commits"]}
            saved.save(_as_tensors(state))
            if progress:
                progress(number + 1, len(chains))
        return Circuit(graph, state["scores"], state["kept"], record=self.record(**_summary(state, graph)))

    def _start(self, graph: Graph, damage: DamageMeter, guess: Bool[Tensor, "edge"] | None) -> State:
        """The whole graph, nothing tried.

        `commits` counts the states that the executor was told of, `removed_at` says after how many an edge went (NEVER: it is kept). Of the
        chain at hand, which `began` after so many, `decided` groups of edges are done and `surveyed` have been measured; `expected` says of
        each whether it stays, `guess` of each edge of the graph.
        """
        kept = torch.ones(len(graph), dtype=torch.bool)
        start = {"kept": kept, "scores": torch.full((len(graph),), torch.nan), "damage": float(damage(kept[None])[0])}
        chain = {"removed_at": torch.full((len(graph),), NEVER), "expected": torch.zeros_like(kept)}
        chain["guess"] = torch.zeros_like(kept) if guess is None else guess
        return {**start, **chain, **dict.fromkeys(("next", "commits", "began", "decided", "surveyed", *COUNTS), 0)}

    def _follow(
        self, chain: list[Trial], state: State, graph: Graph, damage: DamageMeter, alike: Int[np.ndarray, "edge"] | None
    ) -> Iterator[None]:
        """Decide on the edges of a chain, a batch at a time, and write the decisions into `state`."""
        groups = self._groups(chain, state, damage)
        targets = [int(graph.target[group[0]]) for group in groups]
        fixed_costs: dict[int, float] = {}
        guess, expected = state["guess"].numpy(), state["expected"].numpy()
        while (done := state["decided"]) < len(groups):
            before = dict(damage.executor.counts)
            if done == 0 or targets[done] != targets[done - 1]:
                damage.near(state["kept"])
                state["commits"] += 1
            if self.speculate and targets[done] not in fixed_costs:
                first = groups[targets.index(targets[done])]
                fixed_costs[targets[done]] = damage.executor.fixed_cost(_without(state["removed_at"] >= state["commits"], [first]))
            size = self._batch_size(state, fixed_costs[targets[done]]) if self.speculate else 1
            batch = groups[done : done + size]
            for row in range(max(done, state["surveyed"]), done + len(batch)):
                expected[row] = guess[groups[row]].any()
            decided, seen = self._decide(batch, expected[done : done + len(batch)].tolist(), state, damage)
            expected[done : done + len(seen)] = seen
            if alike is not None:
                for group, stays in zip(batch[:decided], seen, strict=False):
                    guess[alike == alike[group[0]]] = stays
            state |= {"surveyed": max(state["surveyed"], done + len(seen)), "decided": done + decided}
            for name, value in totals({name: value - before[name] for name, value in damage.executor.counts.items()}).items():
                state[name] += value
            yield

    def _groups(self, chain: list[Trial], state: State, damage: DamageMeter) -> list[list[int]]:
        """The edges of a chain that are removed together, most of them alone, as they stood when it began; dead ones go at once."""
        standing = state["removed_at"] > state["began"]
        kept, live = standing.numpy(), damage.reaching_logits(standing).numpy()
        groups: list[list[int]] = []
        for trial in chain:
            edges = [edge for edge in trial.edges if kept[edge]]
            if edges and not live[edges].any():
                self._remove(edges, state)
            elif edges:
                groups += [edges] if trial.together else [[edge] for edge in edges]
        return groups

    def _remove(self, edges: list[int], state: State) -> None:
        # Through numpy, whose indexing takes a tenth of the time.
        state["kept"].numpy()[edges] = False
        state["removed_at"].numpy()[edges] = state["commits"]

    def _batch_size(self, state: State, fixed_cost: float) -> int:
        """How many decisions to speculate on: as many as make the cost of a decision that will hold the smallest."""
        # Guesses fail as often as they did so far; at first, one in eight.
        wrong = (state["wrong"] + 1) / (state["evaluations"] + 8)
        surveyed = state["surveyed"] - state["decided"]
        fixed_cost *= (world := ranks().world)  # ranks share what circuits cost, and each has the rest
        best, best_size, holding, accepted = 0.0, 1, 1.0, 0.0
        for size in range(1, LARGEST_BATCH * world + 1):
            accepted += holding
            holding *= 1 - (WRONG_AFTER_MEASURING if size <= surveyed else wrong)
            if accepted / (fixed_cost + size) > best:
                best, best_size = accepted / (fixed_cost + size), size
        return best_size

    def _decide(self, groups: list[list[int]], expected: list[bool], state: State, damage: DamageMeter) -> tuple[int, list[bool]]:
        """Measure each removal as if those before it went as expected (True: kept).

        Returns:
            How many decisions were measured in the state they are made in, at least one; and what was seen of all, a better guess.
        """
        without = state["kept"].repeat(len(groups), 1)
        masks, scores = without.numpy(), state["scores"].numpy()
        for row, (group, stays) in enumerate(zip(groups, expected, strict=True)):
            masks[row if stays else slice(row, None), group] = False
        try:
            measured = damage(without).tolist()
        except InputError:
            if len(groups) == 1:
                raise
            # What cannot be measured may be a state in which the search would never be.
            return self._decide(groups[:1], expected[:1], state, damage)
        increases, seen = [], []
        current = state["damage"]
        for stays, found in zip(expected, measured, strict=True):
            increases.append(found - current)
            seen.append((abs(found - current) if self.absolute else found - current) >= self.threshold)
            current = current if stays else found
        decided = next((row + 1 for row in range(len(groups)) if seen[row] != expected[row]), len(groups))
        for group, increase, stays, found in zip(groups[:decided], increases, seen, measured, strict=False):
            if len(group) == 1:
                scores[group[0]] = increase
            if not stays:
                self._remove(group, state)
                state["damage"] = found
        counted = {"measured": len(groups), "evaluations": decided, "wrong": int(seen[decided - 1] != expected[decided - 1])}
        for name, more in counted.items():
            state[name] += more
        return decided, seen


COUNTS = ("evaluations", "measured", "wrong", "batches", "node_evaluations")


def _chains(graph: Graph, trials: list[Trial]) -> Iterator[list[Trial]]:
    """Trials whose decisions are speculated on together: into one target, or the group tests of one layer."""

    def place(trial: Trial) -> tuple[bool, object]:
        target = int(graph.target[trial.edges[0]])
        node = graph.nodes[target]
        return trial.together, node.layer if trial.together and isinstance(node, Head) else target

    for _, chain in groupby(trials, key=place):
        yield list(chain)


def _alike(graph: Graph) -> Int[np.ndarray, "edge"]:
    """The same number for edges from one source into the same slot of any target: they are often decided alike."""
    return (graph.source * 4 + graph.slot).numpy()


def _without(kept: Bool[Tensor, "edge"], groups: list[list[int]]) -> Bool[Tensor, "variant edge"]:
    """The circuit without each of the groups."""
    masks = kept.repeat(len(groups), 1)
    for mask, group in zip(masks, groups, strict=True):
        mask[group] = False
    return masks


def _as_tensors(state: State) -> dict[str, Tensor]:
    return {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)
        for name, value in state.items()
    }


def _summary(state: State, graph: Graph) -> dict[str, Any]:
    """What the record says of the search."""
    counts = {name: state[name] for name in COUNTS}
    nodes = computed_nodes(graph)
    return {
        **counts,
        "accepted": counts["evaluations"] / max(1, counts["measured"]),
        # Against one forward pass, which computes every node, for every edge.
        "saving": len(graph) * nodes / max(1, counts["node_evaluations"]),
        "damage": state["damage"],
    }

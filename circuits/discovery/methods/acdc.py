"""ACDC: automatic circuit discovery, exact and sequential.

Conmy, Mavor-Parker, Lynch, Heimersheim and Garriga-Alonso 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability"
(https://arxiv.org/abs/2304.14997), section 3. Start from the whole graph; from the logits up, remove each edge whose removal raises the
damage by less than a threshold, given all that was removed before. A target that no longer reaches the logits loses its edges untried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, CircuitDiscoverer, Progress
from circuits.discovery.gradients.edge_scores import GradientPoint, score_edges
from circuits.discovery.search.confirmation import confirm
from circuits.discovery.search.edge_order import OrderName, Trial, edge_order
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.graph.nodes import Head
from circuits.models import Model
from circuits.models.component_graph import component_graph, computed_nodes
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.running.precision import Precision, get_precision
from circuits.system.errors import InputError
from circuits.system.ranks import ranks, totals
from circuits.tasks.metrics import Metric, get_metric
from circuits.tasks.task import Task

State = dict[str, Any]
GuessName = Literal["own", "removed", "eap"]

# How often a guess fails that rests on a measurement in a neighbouring state; and the most edges to speculate on at once, for each
# of the ranks that share them.
WRONG_AFTER_MEASURING, LARGEST_BATCH = 0.08, 256
NEVER = 1 << 62
# At one end alone some metrics have no slope: KL has none at the clean run.
BOTH_ENDS = (GradientPoint(0.0), GradientPoint(1.0))


@dataclass(frozen=True)
class ACDC(CircuitDiscoverer):
    """Remove, one at a time from the logits up, every edge whose removal does less damage than the threshold.

    Scores are the measured increases in damage, each in the state the search was in; edges never tried on their own stay unscored.
    The sequential decisions are found in batches, by speculation: guess the next ones, measure each in the state in which the guess would
    leave the search, and accept as many as turn out as guessed, and the first that does not. Whatever the guess, every decision was
    measured in the state of the sequential search.

    Reference: Conmy et al. 2023, https://arxiv.org/abs/2304.14997

    Attributes:
        threshold: the largest increase in damage an edge may cost and still go, in the metric's unit (nats for KL).
        metric: what damage is measured in.
        ablation: what a removed edge carries instead.
        order: in which order edges are tried; "original" is that of the authors' code, with its group tests.
        speculate: measure several decisions at once; False measures one after the other.
        absolute: compare the size of the change with the threshold, so that edges which hurt are kept too.
        precision: the type of what lies downstream of the edges under test: "bfloat16", "float16", "float8_e4m3" or "int8", or in Python a
            `Precision`; None is float32 throughout. Whatever comes near the threshold is measured in float32.
        guess: what decisions are expected to be. "own": that of an edge is the last one on an edge from its source into such a slot;
            "removed": every edge goes; "eap": an edge stays whose EAP score (gradient taken at both ends) reaches the threshold.
        max_memory: bytes that one step may take; by default chosen from what is free.
    """

    name: ClassVar[str] = "acdc"
    threshold: float
    metric: str | Metric = "kl"
    ablation: str | Ablation = "resample"
    order: OrderName = "topological"
    speculate: bool = field(default=True, metadata=SPEED_ONLY)
    absolute: bool = False
    precision: str | Precision | None = None
    guess: GuessName = field(default="own", kw_only=True, metadata=SPEED_ONLY)
    max_memory: int | None = field(default=None, kw_only=True, metadata=SPEED_ONLY)

    def __post_init__(self) -> None:
        get_precision(self.precision)
        if not self.threshold >= 0:
            raise InputError(
                f"threshold={self.threshold} must be a number of at least 0; 0.01 is a usual one for KL."
            )
        if self.guess not in get_args(GuessName):
            raise InputError(
                f"guess={self.guess!r}: choose 'own', 'removed' or 'eap'; a circuit is given to `sweep`."
            )

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
        saved = Checkpoint.open(checkpoint, self.identity(), graph, task)
        guess = self._guess(model, graph, task)
        return self._search(graph, self._meter(model, graph, task), saved, progress, guess)

    def sweep(
        self,
        model: Model,
        task: Task,
        thresholds: Sequence[float],
        *,
        graph: Graph | None = None,
        guess: Circuit | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> list[Circuit]:
        """What `discover` finds at each of some thresholds, in the order given; this method's own threshold plays no part.

        Clean and counterfactual prompts are run once for all. The searches go from the highest threshold down, and each is expected to keep
        what the one before it kept, which is wrong less often than what a search expects on its own.

        Args:
            graph: the edges to consider; None takes the component graph.
            guess: what the search at the highest threshold is expected to keep, such as a circuit found on fewer prompts; None takes the
                method's own guess.
            checkpoint: a folder with a file for each threshold, from which a sweep goes on when it was interrupted.
            progress: called with (done, total), over all thresholds.

        Raises:
            InputError: there is no threshold, or one below 0; `guess` is over another graph; `checkpoint` is a file, or holds another
                sweep's; the model, task, graph or settings cannot be used.
        """
        thresholds = [float(threshold) for threshold in thresholds]
        methods = [
            replace(self, threshold=threshold)
            for threshold in sorted(set(thresholds), reverse=True)
        ]
        if not methods:
            raise InputError(
                "there are no thresholds to sweep over; give at least one, such as 0.01."
            )
        if checkpoint is not None and Path(checkpoint).is_file():
            raise InputError(
                f"checkpoint={checkpoint} is a file; a sweep has a file for each threshold: give a folder."
            )
        graph = component_graph(model) if graph is None else graph
        if guess is not None and guess.graph != graph:
            raise InputError(
                f"guess is over another graph ({len(guess.graph)} edges, positions {guess.graph.positions}) than the sweep ({len(graph)} edges, "
                f"positions {graph.positions}); give a circuit over the same one."
            )
        expected = methods[0]._guess(model, graph, task) if guess is None else guess.kept
        damage = self._meter(model, graph, task)
        found: dict[float, Circuit] = {}
        for method in methods:
            file = (
                None if checkpoint is None else Path(checkpoint) / f"{method.threshold}.safetensors"
            )
            part = _part_of(progress, len(found), len(methods))
            circuit = method._search(
                graph, damage, Checkpoint.open(file, method.identity(), graph, task), part, expected
            )
            found[method.threshold], expected = circuit, circuit.kept
        return [found[threshold] for threshold in thresholds]

    def _meter(self, model: Model, graph: Graph, task: Task) -> DamageMeter:
        memory, precision = self.max_memory, get_precision(self.precision)
        return DamageMeter.prepare(
            model,
            graph,
            task,
            metric=self.metric,
            ablation=self.ablation,
            max_memory=memory,
            precision=precision,
        )

    def _guess(self, model: Model, graph: Graph, task: Task) -> Bool[Tensor, " edge"] | None:
        """The edges that the search is expected to keep; None where it learns that on its way."""
        if self.guess == "own":
            return None
        if self.guess == "removed":
            return torch.zeros(len(graph), dtype=torch.bool)
        metric = get_metric(self.metric, task)
        try:
            scores = score_edges(
                model,
                graph,
                task,
                metric=metric,
                ablation=self.ablation,
                points=BOTH_ENDS,
                max_memory=self.max_memory,
            )
        except InputError as error:
            raise InputError(
                f"guess='eap' cannot be had: {error} Or take guess='own', which needs no gradient."
            ) from error
        return (scores.abs() if self.absolute else scores) >= self.threshold

    def _search(
        self,
        graph: Graph,
        damage: DamageMeter,
        saved: Checkpoint,
        progress: Progress | None,
        guess: Bool[Tensor, " edge"] | None,
    ) -> Circuit:
        """The search itself, with `guess` the edges that it is expected to keep; None: at first none, then as its own decisions go."""
        chains = list(_chains(graph, edge_order(graph, self.order)))
        start = _as_tensors(self._start(graph, damage, guess))
        alike = _alike(graph) if guess is None else None
        state: State = {
            name: value if value.dim() else value.item()
            for name, value in saved.restore(start).items()
        }

        def keep() -> None:
            if saved.path is not None:
                saved.save(_as_tensors(state))

        for commit in range(state["commits"] if state["next"] < len(chains) else 0):
            damage.near(
                state["removed_at"] > commit
            )  # along the same way, so that rounding is the same as without a break
        for number in range(state["next"], len(chains)):
            for _ in self._follow(chains[number], state, graph, damage, alike):
                keep()
            state |= {"next": number + 1, "decided": 0, "surveyed": 0, "began": state["commits"]}
            keep()
            if progress:
                progress(number + 1, len(chains))
        in_float32 = {}
        if damage.exact is not None:
            in_float32 = {"damage": float(damage.exact(state["kept"][None])[0])}
            if self._confirms:
                in_float32 |= {"confirmed": state["confirmed"], "noise": state["noise"]}
        return Circuit(
            graph,
            state["scores"],
            state["kept"],
            record=self.record(**_summary(state, graph) | in_float32),
        )

    def _start(
        self, graph: Graph, damage: DamageMeter, guess: Bool[Tensor, " edge"] | None
    ) -> State:
        """The whole graph, nothing tried.

        `commits` counts the states that the executor was told of, `removed_at` says after how many an edge went (NEVER: it is kept). Of the
        chain at hand, which `began` after so many, `decided` groups of edges are done and `surveyed` have been measured; `expected` says of
        each whether it stays, `guess` of each edge of the graph.
        """
        kept = torch.ones(len(graph), dtype=torch.bool)
        start = {
            "kept": kept,
            "scores": torch.full((len(graph),), torch.nan),
            "damage": float(damage(kept[None])[0]),
        }
        chain = {"removed_at": torch.full((len(graph),), NEVER), "expected": torch.zeros_like(kept)}
        chain["guess"] = torch.zeros_like(kept) if guess is None else guess
        return {
            **start,
            **chain,
            "noise": 0.0,
            **dict.fromkeys(
                ("next", "commits", "began", "decided", "surveyed", "confirmed", *COUNTS), 0
            ),
        }

    def _follow(
        self,
        chain: list[Trial],
        state: State,
        graph: Graph,
        damage: DamageMeter,
        alike: Int[np.ndarray, " edge"] | None,
    ) -> Iterator[None]:
        """Decide on the edges of a chain, a batch at a time, and write the decisions into `state`."""
        groups = self._groups(chain, state, damage)
        targets = graph.target.numpy()[[group[0] for group in groups]].tolist()
        fixed_costs: dict[int, float] = {}
        guess, expected = state["guess"].numpy(), state["expected"].numpy()
        while (done := state["decided"]) < len(groups):
            before = dict(damage.executor.counts)
            if first := done == 0 or targets[done] != targets[done - 1]:
                damage.near(state["kept"])
                state["commits"] += 1
            if self.speculate and targets[done] not in fixed_costs:
                fixed_costs[targets[done]] = damage.executor.fixed_cost(
                    groups[targets.index(targets[done])]
                )
            size = self._batch_size(state, fixed_costs[targets[done]]) if self.speculate else 1
            batch = groups[done : done + size]
            for row in range(max(done, state["surveyed"]), done + len(batch)):
                expected[row] = guess[groups[row]].any()
            decided, seen = self._decide(
                batch, expected[done : done + len(batch)].tolist(), state, damage, first=first
            )
            expected[done : done + len(seen)] = seen
            if alike is not None:
                for group, stays in zip(batch[:decided], seen, strict=False):
                    guess[alike == alike[group[0]]] = stays
            state |= {
                "surveyed": max(state["surveyed"], done + len(seen)),
                "decided": done + decided,
            }
            for name, value in totals(
                {name: value - before[name] for name, value in damage.executor.counts.items()}
            ).items():
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
        fixed_cost *= (
            world := ranks().world
        )  # ranks share what circuits cost, and each has the rest
        sizes = np.arange(1, LARGEST_BATCH * world + 1)
        # Of so many decisions that many will be accepted: one, and one more for each guess before it that holds.
        holding = np.where(sizes <= surveyed, 1 - WRONG_AFTER_MEASURING, 1 - wrong).cumprod()
        accepted = 1 + holding.cumsum() - holding
        return int(sizes[(accepted / (fixed_cost + sizes)).argmax()])

    def _decide(
        self,
        groups: list[list[int]],
        expected: list[bool],
        state: State,
        damage: DamageMeter,
        *,
        first: bool,
    ) -> tuple[int, list[bool]]:
        """Measure each removal as if those before it went as expected (True: kept); the first of a target tell how noisy it is.

        Returns:
            How many decisions were measured in the state they are made in, at least one; and what was seen of all, a better guess.
        """
        without = _without(state["kept"], groups, expected)
        # What each is compared with: the last one before it that is expected to go, or the present state, which comes last.
        before, last = [], len(groups)
        for row, stays in enumerate(expected):
            before.append(last)
            last = last if stays else row
        try:
            increases, values = self._measure(without, np.array(before), state, damage, first=first)
        except InputError:
            if len(groups) > 1:
                # What cannot be measured may be a state in which the search would never be.
                return self._decide(groups[:1], expected[:1], state, damage, first=first)
            if damage.exact is None:
                raise
            in_float32 = replace(damage, executor=damage.exact.executor)
            increases, values = self._measure(
                without, np.array(before), state, in_float32, first=first
            )
        seen = (self._compared(increases) >= self.threshold).tolist()
        decided = next(
            (row + 1 for row in range(len(groups)) if seen[row] != expected[row]), len(groups)
        )
        alone = [row for row in range(decided) if len(groups[row]) == 1]
        state["scores"].numpy()[[groups[row][0] for row in alone]] = increases[alone]
        if gone := [row for row in range(decided) if not seen[row]]:
            self._remove([edge for row in gone for edge in groups[row]], state)
            state["damage"] = float(values[gone[-1]])
        counted = {
            "measured": len(groups),
            "evaluations": decided,
            "wrong": int(seen[decided - 1] != expected[decided - 1]),
        }
        for name, more in counted.items():
            state[name] += more
        return decided, seen

    def _measure(
        self,
        without: Bool[Tensor, "row edge"],
        before: Int[np.ndarray, " row"],
        state: State,
        damage: DamageMeter,
        *,
        first: bool,
    ) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " state"]]:
        """Increases in damage, and the damage in every state, the present one last."""
        exact = damage.exact
        if exact is None:
            values = np.array([*damage(without).tolist(), state["damage"]])
            return values[:-1] - values[before], values
        without = torch.cat(
            [without, state["kept"][None]]
        )  # the present state too, since rounding depends on the base
        values = damage(without).numpy().copy()
        increases = values[:-1] - values[before]
        if self._confirms:
            state["noise"], more = confirm(
                increases,
                values,
                before,
                lambda increases: np.abs(self._compared(increases) - self.threshold),
                lambda states: exact(without[torch.from_numpy(states)]).numpy(),
                state["noise"],
                sample=first,
            )
            state["confirmed"] += more
        return increases, values

    @property
    def _confirms(self) -> bool:
        precision = get_precision(self.precision)
        return precision is not None and precision.confirm

    def _compared(self, increases: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
        """What is compared with the threshold."""
        return np.abs(increases) if self.absolute else increases


COUNTS = ("evaluations", "measured", "wrong", "batches", "node_evaluations")


def _chains(graph: Graph, trials: list[Trial]) -> Iterator[list[Trial]]:
    """Trials whose decisions are speculated on together: into one target, or the group tests of one layer."""

    def place(trial: Trial) -> tuple[bool, object]:
        target = int(graph.target[trial.edges[0]])
        node = graph.nodes[target]
        return trial.together, node.layer if trial.together and isinstance(node, Head) else target

    for _, chain in groupby(trials, key=place):
        yield list(chain)


def _without(
    kept: Bool[Tensor, " edge"], groups: list[list[int]], expected: list[bool]
) -> Bool[Tensor, "row edge"]:
    """What is measured to decide on disjoint groups of kept edges: each row lacks one, and those before it that are expected to go."""
    row, group = (
        np.arange(len(groups))[:, None],
        np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
    )
    gone = (row == group) | (row > group) & ~np.array(expected)[group]
    without = np.repeat(kept.numpy()[None], len(groups), axis=0)
    without[:, np.concatenate(groups)] = ~gone
    return torch.from_numpy(without)


def _part_of(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """The progress of one of several searches, each of as many steps, as that of all."""
    return progress and (lambda done, total: progress(number * total + done, parts * total))


def _alike(graph: Graph) -> Int[np.ndarray, " edge"]:
    """The same number for edges from one source into the same slot of any target: they are often decided alike."""
    return (graph.source * 4 + graph.slot).numpy()


def _as_tensors(state: State) -> dict[str, Tensor]:
    return {
        name: torch.tensor(value, dtype=torch.float64)
        if isinstance(value, float)
        else torch.as_tensor(value)
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

"""ACDC: automatic circuit discovery, exact and sequential.

Conmy, Mavor-Parker, Lynch, Heimersheim and Garriga-Alonso 2023, "Towards Automated Circuit
Discovery for Mechanistic Interpretability" (https://arxiv.org/abs/2304.14997), section 3.

`sequential` below is the algorithm of the paper. By default the same decisions are found many at a
time (`search.speculation`), and in low precision doubtful ones are confirmed in float32
(`search.confirmation`); neither changes the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import override

from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, Progress, Resumable, progress_of, report_part
from circuits.discovery.gradients.edge_scores import EdgeScoring, GradientPoint
from circuits.discovery.search.edge_order import Chain, OrderName, chains
from circuits.discovery.search.measurement import Measurement
from circuits.discovery.search.speculation import Speculation
from circuits.discovery.search.state import Search, SearchState
from circuits.discovery.search_space import SearchSpace, kept_over
from circuits.discovery.threshold import check_threshold
from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.graph import EdgeMask, Graph
from circuits.models import Model
from circuits.models.component_graph import computed_nodes
from circuits.running.ablation import Ablation
from circuits.running.damage import DamageMeter
from circuits.running.precision import Precision, get_precision
from circuits.system.errors import InputError
from circuits.system.files import path_of
from circuits.system.numbers import ordered_items, real
from circuits.system.torch_modes import without_modes
from circuits.tasks.metrics import Metric
from circuits.tasks.task import Task

GuessName = Literal["own", "removed", "eap"]

# What the record says of a search's state.
RECORDED = ("evaluations", "measured", "wrong", "batches", "node_evaluations")
# KL has no slope at the clean run, so EAP's guess takes the gradient at both ends.
BOTH_ENDS = (GradientPoint(0.0), GradientPoint(1.0))


def sequential(search: Search, measure: Measurement) -> None:
    """Try edge after edge, from the logits back to the embeddings."""
    # H is the circuit so far, L its damage, tau the threshold.
    for groups in search.undecided():
        now = groups[:1]  # one edge, or all edges into a slot in the original code's group tests
        increases, damages = measure.one(groups[0])
        # Remove e if L(H \ e) - L(H) < tau.
        stays = ~measure.harmless(increases)
        search.decide_all(now, increases, damages, stays)


@dataclass(frozen=True)
class ACDC(Resumable):
    """Remove edges, one at a time from the logits back, whose removal does little damage.

    The search starts from the whole graph, or from a circuit, see `discover`. An edge is removed if
    its removal raises the damage by less than the threshold, given all that was removed before.
    Edges into a target that no longer reaches the logits are removed without being tried. Scores
    are the measured increases in damage; edges never tried alone have no score.

    Reference: Conmy et al. 2023, https://arxiv.org/abs/2304.14997

    Attributes:
        threshold: an edge is removed if its removal raises the damage by less than this, in the
            metric's unit (nats for KL).
        metric: what damage is measured in.
        ablation: what a removed edge carries instead.
        order: the order in which edges are tried, which is part of the result. "topological" tries
            every edge; "original" is that of the authors' code, with its group tests; "grouped"
            tries all edges into a slot at once before it tries each, which takes about half as
            many evaluations in a large model.
        speculate: measure several decisions at once; False measures one after the other.
        absolute: compare the size of the change with the threshold, so that edges that hurt are
            kept too.
        precision: the type of what is computed downstream of the edges under test: "bfloat16",
            "float16", "float8_e4m3" or "int8", or in Python a `Precision`. None is float32
            throughout. What comes near the threshold is measured again in float32.
        guess: what speculation expects. "own": an edge stays if removing the last one from its
            source into such a slot raised the damage by two thresholds; "removed": every edge is
            removed; "eap": an edge stays if its EAP score (gradient taken at both ends) reaches the
            threshold.
        max_memory: bytes that one step may take; None chooses from the memory that is free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4, split="train")
    >>> circuit = circuits.ACDC(threshold=0.1).discover(model, task)
    >>> 0 < len(circuit) < 60, circuit.record["method"]
    (True, 'acdc')
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
        check_threshold(self.threshold)

    @override
    def find_within(
        self, model: Model, task: Task, space: SearchSpace, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        order = chains(space.graph, self.order, space.tried)
        if saved.is_new:
            progress(0, len(order))
        guess = self._guess(model, space.graph, task)
        meter = self.meter(model, space.graph, task)
        return self._search(space, order, meter, saved, progress, guess)

    @without_modes()
    def sweep(
        self,
        model: Model,
        task: Task,
        thresholds: Iterable[float],
        *,
        graph: Graph | None = None,
        guess: Circuit | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
        **part: Any,
    ) -> list[Circuit]:
        """The circuits that `discover` finds at several thresholds, in the order given.

        Cheaper than separate searches: the prompts are run once, and each search expects to keep
        what the search at the next higher threshold kept. The method's own threshold is not used.

        Args:
            graph: the edges to consider; None takes the component graph.
            guess: what the search at the highest threshold is expected to keep, such as a circuit
                found on fewer prompts; None takes the method's own guess.
            checkpoint: a folder with one file per threshold, from which an interrupted sweep
                resumes.
            progress: called with (done, total), over all thresholds.
            part: where to search, as in `discover`: `start`, `frozen_in`, `frozen_out`, `layers`
                and `nodes`.

        Raises:
            InputError: there is no threshold, or a negative one; `guess` is over another graph;
                `checkpoint` is a file, or belongs to another sweep; or the model, task, graph or
                settings cannot be used.
        """
        wanted = [real(each, "threshold") for each in ordered_items(thresholds, "thresholds")]
        descending = sorted(set(wanted), reverse=True)
        methods = [replace(self, threshold=each) for each in descending]
        space = self.search_space(model, graph, **part)
        if not wanted:
            raise InputError("there are no thresholds to sweep over; give at least one, like 0.01.")
        folder = None if checkpoint is None else _folder(checkpoint)
        # Before the metric is called, since it may note that down.
        saved_at = []
        for method in methods:
            file = None if folder is None else folder / f"{method.threshold}.safetensors"
            saved_at.append(method.checkpoint_at(file, model, space, task))
        if guess is None:
            stays = methods[0]._guess(model, space.graph, task)
        else:
            check_is_circuit(guess)
            stays = kept_over(space.graph, guess, "guess")
        meter = self.meter(model, space.graph, task)
        order = chains(space.graph, self.order, space.tried)
        found: dict[float, Circuit] = {}
        report = progress_of(progress)
        pairs = zip(methods, saved_at, strict=True)
        for number, (method, saved) in enumerate(pairs):
            reporting = partial(report_part, report, number, len(methods))
            circuit = method._search(space, order, meter, saved, reporting, stays)
            found[method.threshold] = circuit
            stays = circuit.kept
        return [found[threshold] for threshold in wanted]

    def _search(
        self,
        space: SearchSpace,
        order: list[Chain],
        meter: DamageMeter,
        saved: Checkpoint,
        progress: Progress,
        stays: EdgeMask | None,
    ) -> Circuit:
        """Search from the saved state on; `stays=None` guesses from the search's own decisions."""
        state = SearchState.start(space, meter, stays)
        search = Search(space, meter, order, state, saved, progress)
        measure = Measurement(search, self.threshold, self.absolute, self._confirms)
        if self.speculate:
            learns = stays is None
            Speculation(search, measure, learns).run()
        else:
            sequential(search, measure)
        record = self.record(**self._record_fields(search))
        return Circuit(space.graph, state.scores, state.kept, record=record)

    def _record_fields(self, search: Search) -> dict[str, Any]:
        """What the record says of a finished search."""
        state, space = search.state, search.space
        found = {name: getattr(state, name) for name in RECORDED}
        found["search_space"] = space.counts()
        found["accepted"] = state.evaluations / max(1, state.measured)
        # Baseline: one forward pass, which computes every node, for every edge tried.
        n_tried = int(space.tried.sum())
        all_nodes = n_tried * computed_nodes(space.graph)
        found["saving"] = all_nodes / max(1, state.node_evaluations)
        found["damage"] = _final_damage(search)
        if search.meter.exact is not None and self._confirms:
            found |= {"confirmed": state.confirmed, "noise": state.noise}
        return found

    def _guess(self, model: Model, graph: Graph, task: Task) -> EdgeMask | None:
        """The edges that the search is expected to keep; None if it learns that on its way."""
        if self.guess == "own":
            return None
        if self.guess == "removed":
            return torch.zeros(len(graph), dtype=torch.bool)
        settings = self.run_settings(task)
        try:
            scoring = EdgeScoring(model, graph, task, settings, BOTH_ENDS)
            scores = scoring.scores()
        except InputError as error:
            raise InputError(
                f"guess='eap' cannot be had: {error} Or take guess='own', which needs no gradient."
            ) from error
        if self.absolute:
            scores = scores.abs()
        return scores >= self.threshold

    @property
    def _confirms(self) -> bool:
        precision = get_precision(self.precision)
        return precision is not None and precision.confirm


def _final_damage(search: Search) -> float:
    """The damage of the circuit found, in float32."""
    exact, state = search.meter.exact, search.state
    if exact is None:
        return state.damage
    return float(exact(state.kept[None]))


def _folder(checkpoint: str | Path) -> Path:
    folder = path_of(checkpoint)
    if folder.is_file():
        raise InputError(
            f"checkpoint={checkpoint} is a file; a sweep has a file for each threshold: give a "
            "folder."
        )
    return folder

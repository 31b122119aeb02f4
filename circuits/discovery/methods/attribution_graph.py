"""Attribution graphs: which transcoder features, at which positions, made the model say this.

Ameisen, Lindsey et al. 2025, "Circuit tracing"
(https://transformer-circuits.pub/2025/attribution-graphs/methods.html). For one prompt `attribute`
gives the graph itself. For a task `discover` pools the graphs of its prompts into a circuit:

1. freeze the model on the prompt, and find the active features;
2. build the graph by one linear sweep, and prune it by influence;
3. pool nodes over prompts, by named position if the task names positions. An edge's score is its
   summed effect on what is explained; an edge is kept if some prompt's pruned graph keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from circuits.attribution.active_features import active_features
from circuits.attribution.build import (
    Direction,
    build_feature_graph,
    difference_direction,
)
from circuits.attribution.explained import Explained, directions_of, most_probable, words_of
from circuits.attribution.feature_graph import FeatureGraph
from circuits.attribution.influence import prune
from circuits.attribution.local_model import LocalModel, freeze
from circuits.attribution.pooling import Pooled, spans_of
from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, Progress, Resumable
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph
from circuits.graph.identity import TranscodersIdentity
from circuits.models import Model
from circuits.models.component_graph import REST
from circuits.models.identity import identity
from circuits.system.errors import InputError
from circuits.tasks.task import Task
from circuits.tasks.tokenization import prompt_tokens
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.transcoder import Transcoders

PROMPTS_AT_ONCE = 16

Prompt = str | Sequence[int] | Int[Tensor, " _"]
# Settings that play no part in the graph of one prompt.
TASK_SETTINGS = ("by_position", "kept_only", "max_memory")


@dataclass(frozen=True)
class AttributionGraph(Resumable):
    """Attribute what a model says to active transcoder features, and to the tokens they come from.

    Reference: Ameisen, Lindsey et al. 2025, Circuit tracing,
    https://transformer-circuits.pub/2025/attribution-graphs/methods.html

    Attributes:
        transcoders: a folder, a hub address (hf://owner/name), the name of a set that ships with
            this package, or loaded transcoders.
        budget: the number of features that get edges into them, the most influential ones; None
            takes all active features.
        at_a_time: with a budget, the number of features chosen before influence is computed again.
        most_logits: the largest number of most probable next tokens that the graph explains.
        probability: explain no more tokens than reach this probability together.
        node_threshold: the share of influence that the kept nodes make.
        edge_threshold: the share that the kept edges make of what is then left.
        leading: the number of positions at the start of a prompt without features and errors: 1 for
            a beginning-of-sequence token, 4 for instruction-tuned Gemma 3, 0 for models whose
            prompts begin with a word.
        by_position: pool the features of a task's prompts by named position; None does so if the
            task names positions.
        kept_only: pool only the edges that pruning keeps. With wide transcoders there are too many
            others.
        max_memory: bytes that the sweep over targets may take; None chooses from the memory that is
            free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> method = circuits.AttributionGraph("toy-world-plt")
    >>> graph = method.attribute(model, "The capital of Texas is", explain=[" Austin"])
    >>> circuits.pruned(graph)
    FeatureGraph(...)
    """

    name: ClassVar[str] = "attribution-graph"
    transcoders: str | Path | Transcoders
    budget: int | None = None
    at_a_time: int = 512
    most_logits: int = 10
    probability: float = 0.95
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    leading: int = 1
    by_position: bool | None = None
    kept_only: bool = False
    max_memory: int | None = field(default=None, metadata=SPEED_ONLY)

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("at_a_time", 1), ("most_logits", 1), ("leading", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise InputError(f"{name}={value!r}: give a whole number, {least} or more.")
        for name in ("probability", "node_threshold", "edge_threshold"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise InputError(f"{name}={value!r}: give a share above 0 and up to 1.")
        if not isinstance(self.transcoders, str | Path | Transcoders):
            raise InputError(
                f"transcoders={self.transcoders!r}: give loaded ones, a folder, or the name of a "
                "set that ships with this package."
            )

    def search_graph(self, model: Model, graph: Graph | None) -> Graph:
        """The empty graph: the method finds the nodes itself.

        Raises:
            InputError: a graph with edges was given.
        """
        if graph is not None and graph.nodes:
            raise InputError(
                f"{self.name} makes its graph of features itself and takes none; leave out graph, "
                "split_embed and positions."
            )
        return Graph.empty(identity(model))

    def identity(self) -> dict[str, Any]:
        """Method, settings, and a fingerprint of the transcoders' weights."""
        return {**super().identity(), "transcoders": self.loaded.identity.weights}

    @property
    def loaded(self) -> Transcoders:
        """The transcoders themselves."""
        if isinstance(self.transcoders, Transcoders):
            return self.transcoders
        return load_transcoders(self.transcoders)

    def attribute(
        self, model: Model, prompt: Prompt, *, explain: Sequence[Explained] | None = None
    ) -> FeatureGraph:
        """The graph of one prompt, unpruned, on the CPU; `circuits.pruned` keeps what matters.

        Args:
            prompt: text, or token ids.
            explain: what the graph explains; None takes the most probable next tokens. A token
                stands for its logit minus the mean logit, since the softmax does not see the mean;
                a pair of tokens for the difference of their logits.

        Raises:
            InputError: the transcoders do not fit the model; the prompt is empty or too long, or no
                feature is active on it; or what is to be explained is not one token.
        """
        wanted = None if explain is None else [explain]
        return self.attribute_all(model, [prompt], explain=wanted)[0]

    def attribute_all(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        *,
        explain: Sequence[Sequence[Explained] | None] | None = None,
    ) -> list[FeatureGraph]:
        """The graphs of several prompts, which are run together.

        Raises:
            InputError: see `attribute`; or `explain` has another length than `prompts`.
        """
        if isinstance(prompts, str):
            raise InputError(
                f"attribute_all takes a list of prompts; for one, attribute(model, {prompts!r})."
            )
        wanted = [None] * len(prompts) if explain is None else list(explain)
        if len(wanted) != len(prompts):
            raise InputError(
                f"there are {len(prompts)} prompts and {len(wanted)} entries in explain; give one "
                "for each."
            )
        tokens = [torch.as_tensor(prompt_tokens(model, prompt)) for prompt in prompts]
        settings = {
            name: value for name, value in self.settings().items() if name not in TASK_SETTINGS
        }
        builder = _Builder(self, model, self.loaded)
        graphs = []
        for number, local, features in builder.frozen(tokens):
            asked = wanted[number]
            if asked is None:
                directions = builder.most_probable(local)
            else:
                directions = directions_of(model, local, asked)
            graph = builder.graph(local, features, directions).to("cpu")
            made_with = builder.made_with
            graph = replace(graph, model=identity(model), transcoders=made_with, settings=settings)
            graphs.append(graph)
        return graphs

    @override
    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        empty, builder = self.search_graph(model, graph), _Builder(self, model, self.loaded)
        names = self._span_names(task)
        spans = None if names is None else spans_of(task.positions, names)
        saved = Checkpoint.open(checkpoint, self.identity(), empty, task)
        stored = saved.restore({"next": torch.tensor(0), **vars(Pooled.nothing())})
        done = int(stored.pop("next"))
        pooled = Pooled(**stored)
        while done < len(task):
            rows = range(done, min(done + PROMPTS_AT_ONCE, len(task)))
            prompts = [task.clean[row, : int(task.lengths[row])] for row in rows]
            parts = []
            for number, local, features in builder.frozen(prompts):
                row = rows[number]
                directions = builder.scored_directions(local, task, row)
                found = builder.graph(local, features, directions)
                kept = prune(
                    found, node_threshold=self.node_threshold, edge_threshold=self.edge_threshold
                )
                span = None if spans is None else spans[row]
                parts.append(Pooled.of(found, kept.edges, span, kept_only=self.kept_only))
            # Several prompts at a time, because the whole union is sorted each time.
            pooled, done = Pooled.together([pooled, *parts]), rows.stop
            saved.save({"next": torch.tensor(done), **vars(pooled)})
            if progress is not None:
                progress(done, len(task))
        return self._circuit(pooled, names, task, builder)

    def _circuit(
        self, pooled: Pooled, names: tuple[str, ...] | None, task: Task, builder: _Builder
    ) -> Circuit:
        label = "top" if task.answers is None else "answer"
        graph, place = pooled.graph(names, label, identity(builder.model), builder.made_with)
        scores = pooled.scores[place] / int(task.scored.sum())
        keeping = pooled.keeping[place]
        kept_by = keeping[keeping > 0].tolist()
        record = self.record(prompts=len(task), kept_by_prompts=kept_by)
        return Circuit(graph, scores.float(), keeping > 0, record=record)

    def _span_names(self, task: Task) -> tuple[str, ...] | None:
        by_position = bool(task.positions) if self.by_position is None else self.by_position
        if by_position and not task.positions:
            raise InputError(
                f"by_position=True, but the task {task.name!r} names no positions; use "
                "by_position=False."
            )
        return (REST, *task.positions) if by_position else None


@dataclass(frozen=True)
class _Builder:
    """Builds graphs of one model with one set of transcoders."""

    method: AttributionGraph
    model: Model
    transcoders: Transcoders

    @property
    def made_with(self) -> TranscodersIdentity:
        whole = self.method.budget is None and not self.method.kept_only
        return replace(self.transcoders.identity, leading=self.method.leading, whole=whole)

    def frozen(self, prompts: Sequence[Int[Tensor, " _"]]) -> Iterator[tuple[int, LocalModel, Any]]:
        """Each prompt's number, local model and active features, a few prompts at a time."""
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[start : start + PROMPTS_AT_ONCE]
            locals_ = freeze(self.model, self.transcoders, list(some))
            features = active_features(locals_, self.transcoders, leading=self.method.leading)
            for number, (local, active) in enumerate(zip(locals_, features, strict=True)):
                yield start + number, local, active

    def graph(
        self, local: LocalModel, features: Any, directions: Sequence[Direction]
    ) -> FeatureGraph:
        method = self.method
        return build_feature_graph(
            local,
            self.transcoders,
            features,
            directions,
            words=words_of(self.model, local.tokens.tolist()),
            budget=method.budget,
            at_a_time=method.at_a_time,
            leading=method.leading,
            max_memory=method.max_memory,
        )

    def most_probable(self, local: LocalModel, position: int | None = None) -> list[Direction]:
        method = self.method
        return most_probable(
            self.model,
            local,
            most=method.most_logits,
            probability=method.probability,
            position=position,
        )

    def scored_directions(self, local: LocalModel, task: Task, row: int) -> list[Direction]:
        """What one prompt of a task is judged by.

        Answers against wrong answers, answers alone, or the most probable tokens.
        """
        if task.answers is None:
            right, wrong = None, None
        else:
            right = _tokens(task.answers[row])
            wrong = None if task.wrong_answers is None else _tokens(task.wrong_answers[row])
        directions = []
        for position in task.scored[row].nonzero().flatten().tolist():
            if right is None:
                directions += self.most_probable(local, position)
            else:
                directions.append(difference_direction(local, right, wrong, "answer", position))
        return directions


def _tokens(padded: Int[Tensor, " k"]) -> list[int]:
    """Tokens without the padding, which is -1."""
    return padded[padded >= 0].tolist()

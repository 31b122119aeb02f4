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

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from circuits.attribution.active_features import ActiveFeatures, active_features
from circuits.attribution.build import Direction, build_feature_graph, difference_direction
from circuits.attribution.explained import Explained, directions_of, most_probable, words_of
from circuits.attribution.feature_graph import FeatureGraph
from circuits.attribution.influence import prune
from circuits.attribution.local_model import LocalModel, freeze
from circuits.attribution.pooling import Pooled, spans_of
from circuits.discovery.checkpoint import Checkpoint
from circuits.discovery.discoverer import SPEED_ONLY, JsonObject, Progress, Resumable
from circuits.graph.circuit import Circuit
from circuits.graph.graph import Graph, check_is_graph
from circuits.graph.identity import TranscodersIdentity
from circuits.models import Model, check_model
from circuits.models.component_graph import REST
from circuits.models.identity import identity
from circuits.system.errors import InputError
from circuits.system.files import path_of
from circuits.system.numbers import ordered_items, python_number, shown, whole
from circuits.system.torch_modes import without_modes
from circuits.tasks.readers.tokens import Prompt, each_prompt, split_encoding
from circuits.tasks.task import Task
from circuits.tasks.tokenization import prompt_tokens
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.transcoder import Transcoders

PROMPTS_AT_ONCE = 16
# For each prompt, what is to be explained; None stands for the most probable tokens.
Wanted = Sequence[Sequence[Explained] | None]
# What to explain, from a prompt's number and local model.
Directions = Callable[[int, LocalModel], list[Direction]]
NumberedGraphs = Iterator[tuple[int, FeatureGraph]]
# From the prompt of that number on.
GraphsFrom = Callable[[int], NumberedGraphs]
# Settings that play no part in the graph of one prompt.
TASK_SETTINGS = ("by_position", "kept_only", "max_memory")
LEAST = {"budget": 1, "at_a_time": 1, "most_logits": 1, "leading": 0}


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
        for name, least in LEAST.items():
            number = getattr(self, name)
            if number is not None:
                whole(number, name, least=least)
        for name in ("probability", "node_threshold", "edge_threshold"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise InputError(f"{name}={value!r}: give a share above 0 and up to 1.")
        if isinstance(self.transcoders, os.PathLike):
            object.__setattr__(self, "transcoders", path_of(self.transcoders))
        if not isinstance(self.transcoders, str | Path | Transcoders):
            raise InputError(
                f"transcoders={self.transcoders!r}: give loaded ones, a folder, or the name of a "
                "set that ships with this package."
            )

    def search_graph(self, model: Model, graph: Graph | None) -> Graph:
        """The empty graph, since the method finds the nodes itself; another is an InputError."""
        if graph is None:
            return Graph.empty(identity(model))
        check_is_graph(graph)
        if graph.nodes:
            raise InputError(
                f"{self.name} makes its graph of features itself and takes none; leave out graph, "
                "split_embed and positions."
            )
        return Graph.empty(identity(model))

    def identity(self) -> dict[str, Any]:
        """Method, settings, and a fingerprint of the transcoders' weights."""
        weights = self.loaded.identity.weights
        return {**super().identity(), "transcoders": weights}

    @property
    def loaded(self) -> Transcoders:
        """The transcoders themselves; given as a folder or a name, they are read anew."""
        if isinstance(self.transcoders, Transcoders):
            self.transcoders.check()
            return self.transcoders
        return load_transcoders(self.transcoders)

    def attribute(
        self,
        model: Model,
        prompt: Prompt,
        *,
        explain: Sequence[Explained] | None = None,
        prepend_bos: bool | None = None,
    ) -> FeatureGraph:
        """The graph of one prompt, unpruned, on the CPU; `circuits.pruned` keeps what matters.

        Args:
            prompt: text, or token ids.
            explain: a list of what the graph explains; None takes the most probable next tokens. A
                token stands for its logit minus the mean logit, since the softmax does not see the
                mean; a tuple of two tokens, or of two lists of tokens, for the difference of their
                (mean) logits.
            prepend_bos: True begins the prompt with exactly one BOS token, which it may bring;
                False takes it as it is; None is the model's default for text, and False for ids.

        Raises:
            InputError: the transcoders do not fit the model; the prompt is empty or too long, or no
                feature is active on it; or what is to be explained is not one token.
        """
        wanted = None if explain is None else [explain]
        return self.attribute_all(model, [prompt], explain=wanted, prepend_bos=prepend_bos)[0]

    @without_modes()
    def attribute_all(
        self,
        model: Model,
        prompts: Any,
        *,
        explain: Wanted | None = None,
        prepend_bos: bool | None = None,
    ) -> list[FeatureGraph]:
        """The graphs of several prompts, which are run together.

        Args:
            prompts: a list of prompts as for `attribute`, or a tokenizer's output for several.
            explain: for each prompt, what its graph explains.

        Raises:
            InputError: see `attribute`; or `explain` has another length than `prompts`.
        """
        check_model(model)
        prompts = _listed_prompts(prompts)
        wanted = _wanted(prompts, explain)
        directions = partial(self._asked_directions, model, wanted)
        transcoders = self.loaded
        described = self._described(model, transcoders)
        token_ids = [prompt_tokens(model, prompt, prepend_bos) for prompt in prompts]
        tokens = list(map(torch.as_tensor, token_ids))
        graphs = self._graphs(model, transcoders, tokens, directions)
        on_cpu = (graph.to("cpu") for _, graph in graphs)
        return [replace(graph, **described) for graph in on_cpu]

    def _described(self, model: Model, transcoders: Transcoders) -> JsonObject:
        """What the graph of a prompt records of its making."""
        settings = self.settings()
        for name in TASK_SETTINGS:
            del settings[name]
        made_with = self._made_with(transcoders)
        return {"model": identity(model), "transcoders": made_with, "settings": settings}

    @override
    def find(
        self, model: Model, task: Task, graph: Graph, saved: Checkpoint, progress: Progress
    ) -> Circuit:
        names = self._span_names(task)
        if saved.is_new:
            progress(0, len(task))
        transcoders = self.loaded
        graphs = partial(self._task_graphs, model, transcoders, task)
        pooled = self._pooled(graphs, task, names, saved, progress)
        label = "top" if task.answers is None else "answer"
        made_with = self._made_with(transcoders)
        of_model = identity(model)
        graph, place = pooled.graph(names, label, of_model, made_with)
        rows = int(task.scored.sum())
        scores = pooled.scores[place] / rows
        keeping = pooled.keeping[place]
        kept = keeping > 0
        prompts = keeping[kept].tolist()
        record = self.record(prompts=len(task), kept_by_prompts=prompts)
        return Circuit(graph, scores.float(), kept, record=record)

    def _pooled(
        self,
        graphs: GraphsFrom,
        task: Task,
        names: tuple[str, ...] | None,
        saved: Checkpoint,
        progress: Progress,
    ) -> Pooled:
        """The pruned graphs of all prompts, pooled."""
        spans = None if names is None else spans_of(task.positions, names)
        nothing = vars(Pooled.nothing())
        stored = saved.restore({"next": torch.tensor(0), **nothing})
        done = int(stored.pop("next"))
        pooled = Pooled(**stored)
        parts: list[Pooled] = []
        for row, found in graphs(done):
            span = None if spans is None else spans[row]
            parts.append(self._pooled_over_positions(found, span))
            done = row + 1
            if len(parts) == PROMPTS_AT_ONCE or done == len(task):
                # Several prompts at a time, because the whole union is sorted each time.
                pooled = Pooled.together([pooled, *parts])
                parts.clear()
                number = torch.tensor(done)
                saved.save({"next": number} | vars(pooled))
                progress(done, len(task))
        return pooled

    def _task_graphs(
        self, model: Model, transcoders: Transcoders, task: Task, first: int
    ) -> NumberedGraphs:
        lengths = task.lengths.tolist()
        prompts = [task.clean[row, :length] for row, length in enumerate(lengths)]
        directions = partial(self._scored_directions, model, task)
        return self._graphs(model, transcoders, prompts, directions, first=first)

    def _pooled_over_positions(
        self, graph: FeatureGraph, spans: Int[Tensor, " pos"] | None
    ) -> Pooled:
        pruned = prune(
            graph, node_threshold=self.node_threshold, edge_threshold=self.edge_threshold
        )
        return Pooled.of(graph, pruned.edges, spans, kept_only=self.kept_only)

    def _graphs(
        self,
        model: Model,
        transcoders: Transcoders,
        prompts: Sequence[Int[Tensor, " _"]],
        directions: Directions,
        *,
        first: int = 0,
    ) -> NumberedGraphs:
        """The number and the graph of each prompt from `first` on; a few are run together."""
        for start in range(first, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[start : start + PROMPTS_AT_ONCE]
            locals_ = freeze(model, transcoders, list(some))
            features = active_features(locals_, transcoders, leading=self.leading)
            pairs = zip(locals_, features, strict=True)
            for number, (local, active) in enumerate(pairs, start):
                explained = directions(number, local)
                yield number, self._graph(model, transcoders, local, active, explained)

    def _graph(
        self,
        model: Model,
        transcoders: Transcoders,
        local: LocalModel,
        active: ActiveFeatures,
        explained: list[Direction],
    ) -> FeatureGraph:
        return build_feature_graph(
            local,
            transcoders,
            active,
            explained,
            words=words_of(model, local.tokens.tolist()),
            budget=self.budget,
            at_a_time=self.at_a_time,
            leading=self.leading,
            max_memory=self.max_memory,
        )

    def _most_probable(
        self, model: Model, local: LocalModel, position: int | None = None
    ) -> list[Direction]:
        return most_probable(
            model, local, most=self.most_logits, probability=self.probability, position=position
        )

    def _asked_directions(
        self, model: Model, wanted: Wanted, number: int, local: LocalModel
    ) -> list[Direction]:
        """What the user asks of a prompt, or the most probable tokens."""
        asked = wanted[number]
        if asked is None:
            return self._most_probable(model, local)
        return directions_of(model, local, asked)

    def _scored_directions(
        self, model: Model, task: Task, row: int, local: LocalModel
    ) -> list[Direction]:
        """Answers against wrong answers, answers alone, or the most probable tokens."""
        scored = task.scored[row].nonzero()
        positions = scored.flatten().tolist()
        if task.answers is None:
            return [
                each
                for position in positions
                for each in self._most_probable(model, local, position)
            ]
        prompt = task[row : row + 1]
        right, wrong = prompt.row_answers, prompt.row_wrong_answers
        assert right is not None
        directions = []
        for number, position in enumerate(positions):
            others = None if wrong is None else _tokens(wrong[number])
            tokens = _tokens(right[number])
            directions.append(difference_direction(local, tokens, others, "answer", position))
        return directions

    def _made_with(self, transcoders: Transcoders) -> TranscodersIdentity:
        is_whole = self.budget is None and not self.kept_only
        return replace(transcoders.identity, leading=self.leading, whole=is_whole)

    def _span_names(self, task: Task) -> tuple[str, ...] | None:
        by_position = bool(task.positions) if self.by_position is None else self.by_position
        if by_position and not task.positions:
            raise InputError(
                f"by_position=True, but the task {task.name!r} names no positions; use "
                "by_position=False."
            )
        return (REST, *task.positions) if by_position else None


def _listed_prompts(given: Any) -> list[Any]:
    prompts = ordered_items(each_prompt(given), "prompts")
    # One encoded text is a list of numbers, or of pairs of a number and its mask.
    for prompt in prompts:
        if python_number(split_encoding(prompt)[0]) is not None:
            raise InputError(
                f"{shown(prompt)} is no prompt, which is a text or a list of token ids; give a "
                "list of prompts, or one to attribute."
            )
    return prompts


def _wanted(prompts: Sequence[Prompt], explain: Wanted | None) -> Wanted:
    """What to explain of each prompt."""
    wanted = [None] * len(prompts)
    if explain is not None:
        wanted = ordered_items(explain, "explain")
    if len(wanted) != len(prompts):
        raise InputError(
            f"there are {len(prompts)} prompts and {len(wanted)} entries in explain; give one "
            "for each."
        )
    return wanted


def _tokens(padded: Int[Tensor, " k"]) -> list[int]:
    """Tokens without the padding, which is -1."""
    return padded[padded >= 0].tolist()

"""Attribution graphs: which features, at which positions, made the model say this token (Ameisen et
al. 2025; Lindsey et al. 2025).

For one prompt, attention patterns and the divisors of norms are held fixed and every MLP is
replaced by transcoder features and an error. What is
left is linear, so the weight of every edge is exact within that model; `circuits.linear_sweep`
computes them without autograd. For a task, the
graphs of its prompts are pooled into one circuit, which can be run like any other.

We differ from circuit-tracer (Hanna et al. 2025), whose numbers the tests compare with, in speed
and in what is kept: what is in no node
(biases, position embeddings, the MLPs at the first position) is kept as constants, so that the
edges into a node account for its whole
pre-activation, and every edge knows the part of it that attention carries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.attribution.active_features import ActiveFeatures, active_features
from circuits.attribution.build import (
    Budget,
    Direction,
    build_feature_graph,
    difference_direction,
    token_direction,
    top_logits,
)
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
from circuits.tasks.tokenization import DoesNotFit, PromptTokenizer, prompt_tokens
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.transcoder import Transcoders

PROMPTS_AT_ONCE = 16

Explained = str | int | tuple[str | int, str | int] | Direction
"""What a graph explains: a token (its text or id), a token against another, or any direction after
the last norm.
"""


@dataclass(frozen=True)
class AttributionGraph(Resumable):
    """Attribute what a model says to the transcoder features that fire on the way, and to the
    tokens they come from.

    Reference: Ameisen, Lindsey et al. 2025, Circuit tracing,
    https://transformer-circuits.pub/2025/attribution-graphs/methods.html

    Attributes:
        transcoders: a folder, a hub address (hf://owner/name), the name of embedded ones, or loaded
            ones.
        budget: how many features get edges into them, the most influential ones; None: all active
            features.
        at_a_time: with a budget, how many features are chosen before influence is computed anew.
        most_logits: the graph explains the most probable next tokens, at most so many,
        probability: and no more than reach this probability together.
        node_threshold: the share of influence that the kept nodes make.
        edge_threshold: the share that the kept edges make of what is then left.
        leading: so many first positions have no features and errors: 1 for a beginning-of-sequence
            token, 4 for instruction-tuned Gemma 3, 0
            for models whose prompts begin with a word.
        by_position: pool the features of a task's prompts by named position; None: where the task
            names positions.
        kept_only: only edges that pruning keeps enter the pooled graph of a task, which with wide
            transcoders has far too many otherwise.
        max_memory: bytes that carrying targets down may take; None chooses from what is free.
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
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < least
            ):
                raise InputError(f"{name}={value!r}: give a whole number, {least} or more.")
        for name in ("probability", "node_threshold", "edge_threshold"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise InputError(f"{name}={value!r}: give a share above 0 and up to 1.")
        if not isinstance(self.transcoders, str | Path | Transcoders):
            raise InputError(
                f"transcoders={self.transcoders!r}: give loaded ones, a folder, or the name of a "
                f"set that ships with this package."
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
        """Method and settings, and which weights the transcoders have."""
        return {**super().identity(), "transcoders": self.loaded.identity.weights}

    @property
    def loaded(self) -> Transcoders:
        """The transcoders themselves."""
        return (
            self.transcoders
            if isinstance(self.transcoders, Transcoders)
            else load_transcoders(self.transcoders)
        )

    def attribute(
        self,
        model: Model,
        prompt: str | Sequence[int] | Int[Tensor, " pos"],
        *,
        explain: Sequence[Explained] | None = None,
    ) -> FeatureGraph:
        """The graph of one prompt, unpruned, on the CPU; `circuits.pruned` keeps what matters.

        Args:
            prompt: text, or token ids as they are.
            explain: what it leads up to; None: the most probable next tokens. Of a token it is the
                logit less the mean of all logits, which the
                softmax does not see; of a pair of tokens the difference of their logits.

        Raises:
            InputError: the transcoders do not fit the model; the prompt is empty or too long, or no
                feature fires on it; what is to be
                explained is not one token.
        """
        return self.attribute_all(model, [prompt], explain=None if explain is None else [explain])[
            0
        ]

    def attribute_all(
        self,
        model: Model,
        prompts: Sequence[str | Sequence[int] | Int[Tensor, " _"]],
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
                f"for each."
            )
        transcoders, who, graphs = self.loaded, identity(model), []
        tokens = [prompt_tokens(model, prompt) for prompt in prompts]
        of_tasks = ("by_position", "kept_only", "max_memory")
        settings = {name: value for name, value in self.settings().items() if name not in of_tasks}
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = slice(start, start + PROMPTS_AT_ONCE)
            locals_ = freeze(model, transcoders, tokens[some])
            for local, features, asked in zip(
                locals_,
                active_features(locals_, transcoders, leading=self.leading),
                wanted[some],
                strict=True,
            ):
                directions = (
                    self._most_probable(model, local)
                    if asked is None
                    else _directions(model, local, asked)
                )
                graph = self._graph(model, transcoders, local, features, directions)
                graphs.append(
                    replace(
                        graph.to("cpu"),
                        model=who,
                        transcoders=self._made_with(transcoders),
                        settings=settings,
                    )
                )
        return graphs

    def discover(
        self,
        model: Model,
        task: Task,
        *,
        graph: Graph | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        progress: Progress | None = None,
    ) -> Circuit:
        self.search_graph(model, graph)
        transcoders, names = self.loaded, self._spans(task)
        spans = None if names is None else spans_of(task.positions, names)
        who = identity(model)
        state = Checkpoint.open(checkpoint, self.identity(), Graph.empty(who), task)
        start = state.restore({"next": torch.tensor(0), **vars(Pooled.nothing())})
        pooled, first = (
            Pooled(**{name: part for name, part in start.items() if name != "next"}),
            int(start["next"]),
        )
        label = "top" if task.answers is None else "answer"
        for begin in range(first, len(task), PROMPTS_AT_ONCE):
            rows = range(begin, min(begin + PROMPTS_AT_ONCE, len(task)))
            locals_ = freeze(
                model, transcoders, [task.clean[row, : int(task.lengths[row])] for row in rows]
            )
            parts = []
            for row, local, features in zip(
                rows,
                locals_,
                active_features(locals_, transcoders, leading=self.leading),
                strict=True,
            ):
                found = self._graph(
                    model, transcoders, local, features, self._scored(model, local, task, row)
                )
                kept = prune(
                    found, node_threshold=self.node_threshold, edge_threshold=self.edge_threshold
                )
                parts.append(
                    Pooled.of(
                        found,
                        kept.edges,
                        None if spans is None else spans[row],
                        kept_only=self.kept_only,
                    )
                )
            # Many at once: each time the whole union is sorted.
            pooled = Pooled.together([pooled, *parts])
            state.save({"next": torch.tensor(rows.stop), **vars(pooled)})
            if progress is not None:
                progress(rows.stop, len(task))
        whole, place = pooled.graph(names, label, who, self._made_with(transcoders))
        keeping = pooled.keeping[place]
        record = self.record(prompts=len(task), kept_by_prompts=keeping[keeping > 0].tolist())
        return Circuit(
            whole,
            (pooled.scores[place] / int(task.scored.sum())).float(),
            keeping > 0,
            record=record,
        )

    def _made_with(self, transcoders: Transcoders) -> TranscodersIdentity:
        return replace(
            transcoders.identity,
            leading=self.leading,
            whole=self.budget is None and not self.kept_only,
        )

    def _graph(
        self,
        model: Model,
        transcoders: Transcoders,
        local: LocalModel,
        features: ActiveFeatures,
        directions: Sequence[Direction],
    ) -> FeatureGraph:
        words = (
            PromptTokenizer.of(model).words(local.tokens.tolist())
            if model.tokenizer is not None
            else [f"#{t}" for t in local.tokens.tolist()]
        )
        return build_feature_graph(
            local,
            transcoders,
            features,
            directions,
            words=words,
            budget=Budget(self.budget, self.at_a_time),
            leading=self.leading,
            max_memory=self.max_memory,
        )

    def _most_probable(
        self, model: Model, local: LocalModel, position: int | None = None, share: float = 1.0
    ) -> list[Direction]:
        tokens = top_logits(
            local, most=self.most_logits, probability=self.probability, position=position
        )
        return [
            token_direction(local, token, _word(model, token), weight * share, position)
            for token, weight in tokens
        ]

    def _scored(self, model: Model, local: LocalModel, task: Task, row: int) -> list[Direction]:
        """What one prompt of a task is judged by: answers against wrong answers, answers alone, or
        what the model says.
        """
        directions = []
        for position in task.scored[row].nonzero().flatten().tolist():
            right, wrong = (
                None if part is None else part[row][part[row] >= 0].tolist()
                for part in (task.answers, task.wrong_answers)
            )
            if right is None:
                directions += self._most_probable(model, local, position)
            else:
                directions.append(difference_direction(local, right, wrong, "answer", position))
        return directions

    def _spans(self, task: Task) -> tuple[str, ...] | None:
        by_position = bool(task.positions) if self.by_position is None else self.by_position
        if by_position and not task.positions:
            raise InputError(
                f"by_position=True, but the task {task.name!r} names no positions; use "
                f"by_position=False."
            )
        return (REST, *task.positions) if by_position else None


def _word(model: Model, token: int) -> str:
    return f"#{token}" if model.tokenizer is None else PromptTokenizer.of(model).words([token])[0]


def _directions(model: Model, local: LocalModel, wanted: Sequence[Explained]) -> list[Direction]:
    """What was asked for, as directions.

    Raises:
        InputError: nothing was, or something that is no token, pair or direction of this model, or
            twice the same.
    """
    if isinstance(wanted, str | int | Direction) or not len(wanted):
        raise InputError(
            f"explain={wanted!r}: give a list of tokens, pairs of tokens or Directions, at least "
            f"one."
        )
    found = [_direction(model, local, one) for one in wanted]
    names = [(one.label if one.token is None else one.token, one.position) for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"explain holds {twice[0][0]!r} twice; give each once, and Directions different labels."
        )
    return found


def _direction(model: Model, local: LocalModel, wanted: Explained) -> Direction:
    if isinstance(wanted, Direction):
        return _checked(local, wanted)
    if isinstance(wanted, tuple):
        if len(wanted) != 2:
            raise InputError(
                f"explain holds {wanted!r}; a pair is (token, other token), whose logits' "
                f"difference is explained."
            )
        right, wrong = (_token(model, local, one) for one in wanted)
        if right == wrong:
            raise InputError(
                f"explain holds {wanted!r}: a token against itself; give two different ones."
            )
        label = f"{_word(model, right)} - {_word(model, wrong)}"
        return difference_direction(
            local, [right], [wrong], label if _names_a_node(label) else f"#{right} - #{wrong}"
        )
    token = _token(model, local, wanted)
    return token_direction(
        local, token, _word(model, token), float(local.logits().softmax(-1)[token])
    )


def _checked(local: LocalModel, wanted: Direction) -> Direction:
    width, length = local.embedding.shape[1], len(local.tokens)
    if not isinstance(wanted.vector, Tensor):
        raise InputError(
            f"the Direction {wanted.label!r} has {wanted.vector!r} for a vector; give a tensor of "
            f"{width} numbers."
        )
    if not math.isfinite(wanted.bias) or not 0 < wanted.weight < math.inf:
        raise InputError(
            f"the Direction {wanted.label!r} has bias {wanted.bias} and weight {wanted.weight}: "
            f"give finite ones, the weight above 0."
        )
    if (
        wanted.vector.shape != (width,)
        or not torch.isfinite(wanted.vector).all()
        or not wanted.vector.any()
    ):
        shape = tuple(wanted.vector.shape)
        raise InputError(
            f"the Direction {wanted.label!r} has a vector of shape {shape}; it must be {width} "
            f"finite numbers, not all zero."
        )
    if wanted.position is not None and not 0 <= wanted.position < length:
        raise InputError(
            f"the Direction {wanted.label!r} is at position {wanted.position} of a prompt of "
            f"{length} tokens."
        )
    if wanted.token is None and not _names_a_node(wanted.label):
        raise InputError(
            f"a Direction cannot be called {wanted.label!r}, because nodes are: use a word that is "
            f"no number, without @."
        )
    return wanted


def _names_a_node(label: str) -> bool:
    return bool(label) and "@" not in label and not label.isdecimal()


def _token(model: Model, local: LocalModel, wanted: str | int) -> int:
    if isinstance(wanted, str):
        encoder = PromptTokenizer.of(model)
        prompt = str(encoder.tokenizer.decode(local.tokens.tolist(), skip_special_tokens=True))
        try:
            return encoder.answer(prompt, wanted)
        except DoesNotFit:
            if wanted.startswith(" "):
                raise
            # Words are shown without the space before them.
            return encoder.answer(prompt, f" {wanted}")
    vocabulary = local.unembedding.shape[1]
    if not isinstance(wanted, int) or not 0 <= wanted < vocabulary:
        raise InputError(
            f"{wanted!r} is no token of this model's; give its text, or an id from 0 to "
            f"{vocabulary - 1}."
        )
    return wanted

"""Ablation: what a source's output is replaced by on the edges outside a circuit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from circuits.graph.nodes import Node, TokenEmbed, parse_node
from circuits.models import Hook, Model, frozen, output_hook, shape_of
from circuits.models.source_outputs import SourceOutputs, check_honoured, run_and_record
from circuits.running.noise import embedding_noise
from circuits.system.errors import InputError
from circuits.system.fields import CheckedFields
from circuits.system.kinds import expect
from circuits.system.messages import quoted, suggestion
from circuits.system.numbers import shown
from circuits.system.tensors import as_tensor
from circuits.tasks.model_fit import check_task
from circuits.tasks.task import Task

NAMES = ("resample", "zero", "mean", "mean_by_position", "noise")

# Which attributes each ablation reads.
OPTIONS = {
    "mean": ("over",),
    "mean_by_position": ("over",),
    "noise": ("scale", "seed", "span"),
    "given": ("outputs",),
}

Nodes = tuple[Node, ...]
GivenOutputs = Mapping[Node | str, Tensor]
Outputs = Float[Tensor, "source batch pos d_model"]
TokenIds = Int[Tensor, "batch pos"]
TokenMask = Bool[Tensor, "batch pos"]
Axes = tuple[int, ...]
Sums = dict[Any, Tensor]
NamedHooks = list[tuple[str, Hook]]


@dataclass(frozen=True, eq=False)
class Ablation(CheckedFields):
    """What replaces the output of each source.

    Attributes:
        name: "resample", the source's output on the corrupted prompt; "zero"; "mean", its mean over
            prompts and positions; "mean_by_position", its mean over prompts at each position;
            "noise", its output on the clean prompt with noise on the token embeddings; or "given",
            the tensors in `outputs`.
        over: which prompts means are taken over: the task's "clean" or "corrupted" ones, or the
            clean prompts of another task. Padding is left out. At a position that one prompt alone
            reaches, its mean by position is its own output, so nothing is ablated there.
        outputs: for "given", a tensor for every source (or its text) that broadcasts to
            [batch, pos, d_model].
        scale: of noise, in standard deviations of all entries of the token embedding W_E.
        seed: of noise. A prompt's noise depends on the seed and its clean tokens alone, not on the
            other prompts or the device.
        span: of noise, the tokens that get it, a span of the task; None means all tokens of the
            prompts, without those of an answer that were appended.

    >>> import circuits
    >>> str(circuits.Ablation("mean", over="corrupted"))
    'mean over corrupted'
    >>> str(circuits.Ablation("noise", scale=1, span="S1"))
    'noise scale=1.0 span=S1'
    """

    name: str = "resample"
    over: Literal["clean", "corrupted"] | Task = "clean"
    outputs: GivenOutputs | None = None
    scale: float = 3.0
    seed: int = 0
    span: str | None = None

    def __post_init__(self) -> None:
        if self.name not in (*NAMES, "given"):
            raise InputError(
                f"there is no ablation {self.name!r}; {suggestion(self.name, NAMES)} Or write "
                "Ablation('given', outputs=...)."
            )
        self._check_over()
        if self.name == "given" and self.outputs is None:
            raise InputError(
                "Ablation('given') needs outputs; write Ablation('given', outputs={node: tensor})."
            )
        if self.outputs is not None:
            object.__setattr__(self, "outputs", _as_tensors(self.outputs))
        unread = [name for name in self._set if name not in OPTIONS.get(self.name, ())]
        if unread:
            reading = [name for name, options in OPTIONS.items() if unread[0] in options]
            raise InputError(
                f"Ablation({self.name!r}) has no {unread[0]}; leave it out, or choose "
                f"{' or '.join(map(repr, reading))}."
            )
        if not 0 < self.scale < math.inf:
            raise InputError(
                f"Ablation(scale={self.scale}): noise needs a positive number of standard "
                "deviations, such as 3.0."
            )

    def _check_over(self) -> None:
        named = isinstance(self.over, str) and self.over in ("clean", "corrupted")
        if not isinstance(self.over, Task) and not named:
            raise InputError(
                f"Ablation(over={shown(self.over)}): means are taken over 'clean' or 'corrupted' "
                "prompts, or over the clean prompts of another Task."
            )

    @property
    def _set(self) -> list[str]:
        """The options that differ from their defaults."""
        options = fields(self)[1:]
        return [each.name for each in options if getattr(self, each.name) != each.default]

    @property
    def takes_means(self) -> bool:
        """Whether it depends on all prompts of a task at once."""
        return self.name.startswith("mean")

    @property
    def axes(self) -> Axes:
        """The axes of [batch, pos, ...] that means are taken over."""
        by_position = self.name == "mean_by_position"
        return (0,) if by_position else (0, 1)

    def averaged(self, model: Model, task: Task) -> Task:
        """The prompts that means are taken over, as the clean prompts of a task on its device.

        They are padded so that they have as many positions as `task`, or more.

        Raises:
            InputError: the other task does not fit the model; or means are taken by position, and
                the prompts of `task` are longer.
        """
        other = self.over if isinstance(self.over, Task) else task
        check_task(model, other)
        tokens = task.corrupted if self.over == "corrupted" else other.clean
        n_tokens = task.clean.shape[1]
        longest = int(task.lengths.max())
        longest_averaged = int(other.lengths.max())
        if self.name == "mean_by_position" and longest > longest_averaged:
            raise InputError(
                f"task {task.name!r} has prompts of {longest} tokens, and those of {other.name!r} "
                f"have {longest_averaged} at most, so later positions have no mean; use the "
                "ablation 'mean', or longer prompts."
            )
        n_missing = max(0, n_tokens - tokens.shape[1])
        padded = pad(tokens, (0, n_missing))
        found = Task.from_tokens(padded, padded, lengths=other.lengths, name=other.name)
        return found.to(task.clean.device)

    def counterfactual_run(self, model: Model, task: Task) -> tuple[TokenIds, NamedHooks]:
        """Of resample and noise: the prompts to run, and the hooks to run them with."""
        if self.name != "noise":
            return task.corrupted, []
        noise = embedding_noise(model, task, self.scale, self.seed, self.span)
        hook = output_hook(TokenEmbed()), noise.add
        return task.clean, [hook]

    def __str__(self) -> str:
        if self.outputs is not None:
            return f"given {_digest(self.outputs)}"
        if self.name == "noise":
            options = [f"{name}={getattr(self, name)}" for name in self._set]
            return " ".join([self.name, *options])
        if isinstance(self.over, Task):
            return f"{self.name} over {self.over.name} {self.over.digest()}"
        return self.name if self.over == "clean" else f"{self.name} over {self.over}"


def _as_tensors(outputs: object) -> dict[Node | str, Tensor]:
    """The outputs that a user gives, as tensors of real numbers."""
    if not isinstance(outputs, Mapping):
        raise InputError(
            f"Ablation(outputs=...) is a {type(outputs).__name__}; give a dict with a tensor for "
            "every source."
        )
    tensors = {}
    for node, value in outputs.items():
        try:
            tensor = as_tensor(value, "it").detach()
        except InputError as error:
            raise InputError(
                f"the output given for {node} is a {type(value).__name__}: {error}"
            ) from error
        if tensor.is_complex():
            raise InputError(f"the output given for {node} is complex; give real numbers.")
        tensors[node] = tensor
    return tensors


def _digest(outputs: GivenOutputs) -> str:
    digest = hashlib.blake2b(digest_size=4)
    # Sorted, so that the order in which outputs are given does not matter.
    for node in sorted(outputs, key=str):
        tensor = outputs[node].cpu()
        digest.update(f"{node} {tuple(tensor.shape)}".encode())
        numbers = tensor.double().contiguous()
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def get_ablation(ablation: str | Ablation) -> Ablation:
    """The ablation of that name."""
    if isinstance(ablation, Ablation):
        return ablation
    expect(ablation, str, "an ablation", f"choose {quoted(NAMES)}, or make a circuits.Ablation")
    return Ablation(ablation)


def check_corrupted(ablation: Ablation, task: Task) -> None:
    """Raise an InputError if an ablation uses corrupted prompts and there are none that differ."""
    if ablation.name != "resample" and ablation.over != "corrupted":
        return
    if task.alignment is not None:
        if ablation.name != "resample":
            raise InputError(
                f"{ablation} needs corrupted prompts of the lengths of the clean ones, which task "
                f"{task.name!r} has not; use resample, zero, or means over clean prompts."
            )
        return
    differs = (task.clean != task.corrupted) & task.mask
    if not differs.any():
        raise InputError(
            f"the corrupted prompts of task {task.name!r} are the clean ones, so the ablation "
            f"{ablation} would change nothing; give other ones, or ablate by zero or mean."
        )


def with_means_taken(
    model: Model, nodes: Nodes, task: Task, ablation: Ablation, *, prompts_per_run: int
) -> Ablation:
    """An ablation that is the same on any part of the task: means become given outputs."""
    if not ablation.takes_means:
        return ablation
    with frozen(model), torch.no_grad():
        means = _means(model, nodes, task, ablation, prompts_per_run)
        outputs = means.outputs()
    return Ablation("given", outputs=dict(zip(nodes, outputs, strict=True)))


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Computes c_u, what replaces each source's output, for any prompts of a task.

    Attributes:
        means: taken over all prompts of the task, if the ablation takes means.
        given: for all prompts of the task, if the ablation gives outputs or zeros.
    """

    model: Model
    nodes: Nodes
    ablation: Ablation
    means: SourceOutputs | None
    given: Outputs | None

    @staticmethod
    def prepare(
        model: Model,
        nodes: Nodes,
        task: Task,
        ablation: Ablation,
        *,
        prompts_per_run: int | None = None,
    ) -> Counterfactuals:
        """Take the means that the ablation needs over a task, or check the outputs that it gives.

        With `prompts_per_run=None`, all prompts run at once.
        """
        means = given = None
        if ablation.takes_means:
            size = prompts_per_run or len(task)
            means = _means(model, nodes, task, ablation, size)
        elif ablation.name in ("zero", "given"):
            cfg = shape_of(model)
            # Zeros are a view of one number, so they take no memory.
            zero = torch.zeros(1, dtype=cfg.dtype, device=cfg.device)
            given = zero.expand(len(nodes), *task.clean.shape, cfg.d_model)
            if ablation.outputs is not None:
                given = _given(nodes, ablation.outputs, given)
        return Counterfactuals(model, nodes, ablation, means, given)

    def on(self, task: Task) -> Outputs:
        """c_u of every source u, on the task that this was prepared for."""
        if self.given is not None:
            return self.given
        outputs = self._recorded(task).outputs()
        # Means are those of one prompt, and of one position if taken over positions.
        return outputs.expand(-1, *task.clean.shape, -1)

    def changes(
        self,
        task: Task,
        prompts: slice,
        clean: SourceOutputs,
        corrupted: SourceOutputs | None = None,
    ) -> Changes:
        """c_u - out_u(clean) of every source u, on a part of the task: these of its prompts."""
        if self.given is not None:
            return Changes(clean, self.given[:, prompts])
        replacing = corrupted or self._recorded(task)
        return Changes(replacing - clean)

    def _recorded(self, task: Task) -> SourceOutputs:
        if self.means is not None:
            return self.means
        tokens, hooks = self.ablation.counterfactual_run(self.model, task)
        if self.ablation.name == "noise":
            return run_and_record(self.model, self.nodes, tokens, task.mask, hooks)[0]
        outputs, _ = run_and_record(self.model, self.nodes, tokens, task.corrupted_mask)
        activations = {name: task.to_clean(each) for name, each in outputs.activations.items()}
        return replace(outputs, activations=activations)


@dataclass(frozen=True, eq=False)
class Changes:
    """How ablation changes each source's output, stored as small as it comes.

    Attributes:
        kept: the changes; if outputs are given, the clean outputs.
        given: the outputs that are given instead, if any.
    """

    kept: SourceOutputs
    given: Outputs | None = None

    def outputs(self, rows: slice = slice(None)) -> Outputs:
        """The changes of the nodes `rows`; all heads of a layer together."""
        outputs = self.kept.outputs(rows)
        if self.given is None:
            return outputs
        # c_u - out_u, in place of out_u
        return torch.sub(self.given[rows], outputs, out=outputs)


def add_sums(sums: Sums, new: Mapping[Any, Tensor], mask: TokenMask, axes: Axes) -> None:
    """Add the sums of activations [batch, pos, ...] over the tokens that count, by name."""
    for name, value in new.items():
        # In float32 at least; the axes after [batch, pos] broadcast.
        wide = torch.promote_types(value.dtype, torch.float32)
        ones = [1] * (value.dim() - 2)
        weights = mask.to(wide)
        weights = weights.reshape(*mask.shape, *ones)
        total = (value * weights).sum(axes, keepdim=True)
        sums[name] = sums.get(name, 0) + total


def _means(
    model: Model, nodes: Nodes, task: Task, ablation: Ablation, prompts_per_run: int
) -> SourceOutputs:
    """Means of the outputs. A head's mean output is mean(z) @ W_O, so storing mean(z) is enough."""
    sums: Sums = {}
    axes = ablation.axes
    n_tokens = task.clean.shape[1]
    averaged = ablation.averaged(model, task)
    if isinstance(ablation.over, Task):
        # The prompts of the task itself are checked where circuits are run.
        check_honoured(model, nodes, averaged.masked_prompts[:1])
    # As many tokens at once as `prompts_per_run` prompts of the task have.
    size = max(1, prompts_per_run * n_tokens // averaged.clean.shape[1])
    for start in range(0, len(averaged), size):
        part = averaged[start : start + size]
        run, _ = run_and_record(model, nodes, part.clean, part.mask)
        add_sums(sums, run.activations, part.mask, axes)
    means = {}
    for name, total in sums.items():
        mean = mean_of(total, averaged.mask, axes, n_tokens)
        means[name] = mean.to(shape_of(model).dtype)
    return SourceOutputs(model, nodes, means)


def mean_of(total: Tensor, mask: TokenMask, axes: Axes, n_tokens: int) -> Tensor:
    """The mean at the first positions, from a sum over the tokens of a mask, see `add_sums`."""
    # Beyond the longest prompt there is no mean, and no real token reads it.
    counts = mask.sum(axes, keepdim=True)
    counts = counts.clamp(min=1)[..., None]
    mean = total.flatten(2) / counts
    # Prompts of another task may have more positions.
    return mean.view_as(total)[:, :n_tokens]


def _given(nodes: Nodes, outputs: GivenOutputs, like: Outputs) -> Outputs:
    """The outputs of all sources, broadcast to the shape of `like`."""
    given: dict[Node, Tensor] = {}
    for name, tensor in outputs.items():
        node = parse_node(name) if isinstance(name, str) else name
        if node in given:
            raise InputError(f"outputs are given for {node} twice; give each source one.")
        given[node] = tensor.to(like)
    _check_given(given, nodes, like.shape[1:])
    # Outputs that are the same for all prompts or positions are stored once.
    three_axes = like.new_zeros(1, 1, 1)
    tensors = [given[node] for node in nodes]
    _, *same_shape = torch.broadcast_tensors(three_axes, *tensors)
    return torch.stack(same_shape).expand(like.shape)


def _check_given(given: dict[Node, Tensor], nodes: Nodes, shape: torch.Size) -> None:
    unknown = [str(node) for node in given if node not in nodes]
    if unknown:
        raise InputError(
            f"outputs are given for {', '.join(unknown[:8])}, which write nothing in this graph; "
            f"its sources are {nodes[0]} ... {nodes[-1]}."
        )
    missing = [str(node) for node in nodes if node not in given]
    if missing:
        raise InputError(
            f"no outputs are given for {', '.join(missing[:8])}; give every source one (a zero "
            "tensor ablates to zero)."
        )
    for node, tensor in given.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"the output given for {node} has entries that are not finite in {tensor.dtype}; "
                "give numbers in the range of the model's data type."
            )
        try:
            tensor.expand(shape)
        except RuntimeError as error:
            raise InputError(
                f"the output given for {node} has shape {tuple(tensor.shape)}; it must "
                f"broadcast to {tuple(shape)}."
            ) from error

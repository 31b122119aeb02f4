"""Ablation: what a source's output is replaced by on the edges outside a circuit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.nodes import Node, parse_node
from circuits.models import Model, frozen
from circuits.models.source_outputs import SourceOutputs, run_and_record
from circuits.system.errors import InputError
from circuits.tasks.task import Task

NAMES = ("resample", "zero", "mean", "mean_by_position")

Nodes = tuple[Node, ...]
GivenOutputs = Mapping[Node | str, Tensor]
Outputs = Float[Tensor, "source batch pos d_model"]
TokenIds = Int[Tensor, "batch pos"]
TokenMask = Bool[Tensor, "batch pos"]
Axes = tuple[int, ...]
Sums = dict[Any, Tensor]


@dataclass(frozen=True, eq=False)
class Ablation:
    """What replaces the output of each source.

    Attributes:
        name: "resample", the source's output on the corrupted prompt; "zero"; "mean", its mean over
            prompts and positions; "mean_by_position", its mean over prompts at each position; or
            "given", the tensors in `outputs`.
        over: which prompts means are taken over, "clean" or "corrupted". Padding is left out.
        outputs: for "given", a tensor for every source (or its text) that broadcasts to
            [batch, pos, d_model].

    >>> import circuits
    >>> str(circuits.Ablation("mean", over="corrupted"))
    'mean over corrupted'
    """

    name: str = "resample"
    over: str = "clean"
    outputs: GivenOutputs | None = None

    def __post_init__(self) -> None:
        if self.name not in (*NAMES, "given"):
            raise InputError(
                f"there is no ablation {self.name!r}; there are {', '.join(NAMES)}, or "
                "Ablation('given', outputs=...)."
            )
        if self.over not in ("clean", "corrupted"):
            raise InputError(
                f"Ablation(over={self.over!r}): means are taken over 'clean' or 'corrupted' "
                "prompts."
            )
        has_outputs = self.outputs is not None
        if has_outputs != (self.name == "given"):
            raise InputError(
                "an Ablation has outputs exactly when its name is 'given'; write "
                "Ablation('given', outputs={node: tensor})."
            )

    @property
    def takes_means(self) -> bool:
        """Whether it depends on all prompts of a task at once."""
        return self.name.startswith("mean")

    @property
    def axes(self) -> Axes:
        """The axes of [batch, pos, ...] that means are taken over."""
        by_position = self.name == "mean_by_position"
        return (0,) if by_position else (0, 1)

    def averaged(self, task: Task) -> TokenIds:
        """The prompts of a task that means are taken over."""
        return task.clean if self.over == "clean" else task.corrupted

    def __str__(self) -> str:
        if self.outputs is not None:
            return f"given {_digest(self.outputs)}"
        over_corrupted = self.takes_means and self.over == "corrupted"
        return f"{self.name} over corrupted" if over_corrupted else self.name


def _digest(outputs: GivenOutputs) -> str:
    digest = hashlib.blake2b(digest_size=4)
    # Sorted, so that the order in which outputs are given does not matter.
    for node in sorted(outputs, key=str):
        tensor = outputs[node].detach().cpu()
        digest.update(f"{node} {tuple(tensor.shape)}".encode())
        numbers = tensor.double().contiguous()
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def get_ablation(ablation: str | Ablation) -> Ablation:
    """The ablation of that name."""
    return ablation if isinstance(ablation, Ablation) else Ablation(ablation)


def check_corrupted(ablation: Ablation, task: Task) -> None:
    """Raise an InputError if an ablation uses corrupted prompts and there are none that differ."""
    if ablation.name != "resample" and not str(ablation).endswith("over corrupted"):
        return
    if task.alignment is not None:
        if ablation.name != "resample":
            raise InputError(
                f"{ablation} needs corrupted prompts of the lengths of the clean ones, which task "
                f"{task.name!r} has not; use resample, zero, or means over clean prompts."
            )
        return
    if not ((task.clean != task.corrupted) & task.mask).any():
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
        means = _means(model, nodes, task, ablation, prompts_per_run).outputs()
    return Ablation("given", outputs=dict(zip(nodes, means, strict=True)))


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Computes c_u, what replaces each source's output, for any prompts of a task.

    Attributes:
        means: taken over all prompts of the task, if the ablation takes means.
        given: for all prompts of the task, if the ablation gives outputs or zeros.
    """

    model: Model
    nodes: Nodes
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
        elif ablation.name != "resample":
            cfg = model.cfg
            # Zeros are a view of one number, so they take no memory.
            zero = torch.zeros(1, dtype=cfg.dtype, device=cfg.device)
            given = zero.expand(len(nodes), *task.clean.shape, cfg.d_model)
            if ablation.outputs is not None:
                given = _given(nodes, ablation.outputs, given)
        return Counterfactuals(model, nodes, means, given)

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
        """c_u - out_u(clean) of every source u, on a part of the task: these of its prompts.

        Args:
            corrupted: outputs on the corrupted prompts, where the ablation uses them, if known.
        """
        if self.given is not None:
            return Changes(clean, self.given[:, prompts])
        replacing = corrupted or self._recorded(task)
        return Changes(replacing - clean)

    def _recorded(self, task: Task) -> SourceOutputs:
        if self.means is not None:
            return self.means
        tokens, mask = task.corrupted, task.corrupted_mask
        outputs, _ = run_and_record(self.model, self.nodes, tokens, mask)
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


def masked_sum(value: Tensor, mask: TokenMask, axes: Axes) -> Tensor:
    """The sum of activations [batch, pos, ...] at tokens that count, in float32 at least."""
    wide = torch.promote_types(value.dtype, torch.float32)
    # The axes after [batch, pos] broadcast.
    ones = [1] * (value.dim() - 2)
    weights = mask.to(wide)
    weights = weights.reshape(*mask.shape, *ones)
    return (value * weights).sum(axes, keepdim=True)


def add_sums(sums: Sums, new: Mapping[Any, Tensor], mask: TokenMask, axes: Axes) -> None:
    """Add the sums of activations, by name, over the tokens that count."""
    for name, value in new.items():
        total = masked_sum(value, mask, axes)
        sums[name] = sums.get(name, 0) + total


def _means(
    model: Model, nodes: Nodes, task: Task, ablation: Ablation, prompts_per_run: int
) -> SourceOutputs:
    """Means of the outputs. A head's mean output is mean(z) @ W_O, so storing mean(z) is enough."""
    sums: Sums = {}
    axes = ablation.axes
    for start in range(0, len(task), prompts_per_run):
        part = task[start : start + prompts_per_run]
        tokens = ablation.averaged(part)
        run, _ = run_and_record(model, nodes, tokens, part.mask)
        add_sums(sums, run.activations, part.mask, axes)
    # Beyond the longest prompt there is no mean, and no real token reads it.
    counts = task.mask.sum(axes, keepdim=True)
    counts = counts.clamp(min=1)[..., None]
    means = {}
    for name, total in sums.items():
        mean = total.flatten(2) / counts
        means[name] = mean.view_as(total).to(model.cfg.dtype)
    return SourceOutputs(model, nodes, means)


def _given(nodes: Nodes, outputs: GivenOutputs, like: Outputs) -> Outputs:
    """The outputs of all sources, broadcast to the shape of `like`."""
    given = {}
    for name, tensor in outputs.items():
        node = parse_node(name) if isinstance(name, str) else name
        given[node] = tensor
    _check_given(given, nodes, like.shape[1:])
    # Outputs that are the same for all prompts or positions are stored once.
    three_axes = like.new_zeros(1, 1, 1)
    tensors = [given[node].to(like) for node in nodes]
    _, *same_shape = torch.broadcast_tensors(three_axes, *tensors)
    return torch.stack(same_shape).expand(like.shape)


def _check_given(given: dict[Node, Tensor], nodes: Nodes, shape: torch.Size) -> None:
    unknown = [str(node) for node in given if node not in nodes]
    if unknown:
        raise InputError(
            f"outputs are given for {', '.join(unknown)}, which write nothing in this graph; its "
            f"sources are {nodes[0]} ... {nodes[-1]}."
        )
    missing = [str(node) for node in nodes if node not in given]
    if missing:
        raise InputError(
            f"no outputs are given for {', '.join(missing[:8])}; give every source one (a zero "
            "tensor ablates to zero)."
        )
    for node, tensor in given.items():
        try:
            tensor.expand(shape)
        except RuntimeError as error:
            raise InputError(
                f"the output given for {node} has shape {tuple(tensor.shape)}; it must "
                f"broadcast to {tuple(shape)}."
            ) from error

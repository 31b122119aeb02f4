"""Ablation: what a source's output is replaced by on the edges outside a circuit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.nodes import Node, parse_node
from circuits.models import Model, frozen
from circuits.models.source_outputs import SourceOutputs, run_and_record, source_outputs
from circuits.system.errors import InputError
from circuits.tasks.task import Task

NAMES = ("resample", "zero", "mean", "mean_by_position")

Outputs = Float[Tensor, "source batch pos d_model"]


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
    outputs: Mapping[Node | str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.name not in (*NAMES, "given"):
            raise InputError(
                f"there is no ablation {self.name!r}; there are {', '.join(NAMES)}, or "
                "Ablation('given', outputs=...)."
            )
        if self.over not in ("clean", "corrupted"):
            raise InputError(
                f"Ablation(over={self.over!r}): means are taken over 'clean' or 'corrupted' "
                f"prompts."
            )
        if (self.name == "given") != (self.outputs is not None):
            raise InputError(
                "an Ablation has outputs exactly when its name is 'given'; write "
                "Ablation('given', outputs={node: tensor})."
            )

    @property
    def takes_means(self) -> bool:
        """Whether it depends on all prompts of a task at once."""
        return self.name.startswith("mean")

    def __str__(self) -> str:
        if self.outputs is not None:
            return f"given {_digest(self.outputs)}"
        over_corrupted = self.takes_means and self.over == "corrupted"
        return f"{self.name} over corrupted" if over_corrupted else self.name


def _digest(outputs: Mapping[Node | str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for node, tensor in sorted(outputs.items(), key=lambda item: str(item[0])):
        digest.update(f"{node} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def get_ablation(ablation: str | Ablation) -> Ablation:
    """The ablation of that name.

    Raises:
        InputError: there is none.
    """
    return ablation if isinstance(ablation, Ablation) else Ablation(ablation)


def with_means_taken(
    model: Model, nodes: tuple[Node, ...], task: Task, ablation: Ablation, *, prompts_per_run: int
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
    """

    model: Model
    nodes: tuple[Node, ...]
    ablation: Ablation
    means: SourceOutputs | None

    @staticmethod
    def prepare(
        model: Model,
        nodes: tuple[Node, ...],
        task: Task,
        ablation: Ablation,
        *,
        prompts_per_run: int | None = None,
    ) -> Counterfactuals:
        """Take the means that the ablation needs.

        Args:
            task: all prompts that means are taken over.
            prompts_per_run: None runs all of them at once.
        """
        means = None
        if ablation.takes_means:
            means = _means(model, nodes, task, ablation, prompts_per_run or len(task))
        return Counterfactuals(model, nodes, ablation, means)

    def on(self, task: Task, prompts: slice = slice(None)) -> Outputs:
        """c_u of every source u.

        Args:
            task: the prompts to compute it for.
            prompts: their place among all prompts of the task.
        """
        model, (batch, pos) = self.model, task.clean.shape
        shape = (len(self.nodes), batch, pos, model.cfg.d_model)
        if self.means is not None:
            return self.means.outputs()[:, :, :pos].expand(shape)
        match self.ablation.name:
            case "resample":
                return source_outputs(model, self.nodes, task.corrupted, task.mask)
            case "zero":
                zero = torch.zeros(1, dtype=model.cfg.dtype, device=model.cfg.device)
                return zero.expand(shape)
        return _given(model, self.nodes, slice(None), self.ablation, prompts, shape)

    def changes(
        self,
        task: Task,
        prompts: slice,
        clean: SourceOutputs,
        corrupted: SourceOutputs | None = None,
    ) -> Changes:
        """c_u - out_u(clean) of every source u.

        Args:
            task, prompts: as in `on`.
            clean: the sources' outputs on the clean prompts.
            corrupted: the same on the corrupted prompts, if that run was made already.
        """
        if self.means is not None:
            return Changes(self.means - clean)
        match self.ablation.name:
            case "resample":
                if corrupted is None:
                    run = run_and_record(self.model, self.nodes, task.corrupted, task.mask)
                    corrupted = run[0]
                return Changes(corrupted - clean)
            case "zero":
                return Changes(-clean)
        return Changes(clean, self.ablation, prompts)


@dataclass(frozen=True, eq=False)
class Changes:
    """How ablation changes each source's output, stored as small as it comes.

    Attributes:
        kept: the changes; if outputs are given, the clean outputs.
        given: the ablation that gives outputs, if one does, and the prompts it is for.
    """

    kept: SourceOutputs
    given: Ablation | None = None
    prompts: slice | None = None

    def outputs(self, rows: slice = slice(None)) -> Outputs:
        """The changes of the nodes `rows`; all heads of a layer together."""
        outputs = self.kept.outputs(rows)
        if self.given is None or self.prompts is None:
            return outputs
        model, nodes, shape = self.kept.model, self.kept.nodes, tuple(outputs.shape)
        return _given(model, nodes, rows, self.given, self.prompts, shape).sub_(outputs)


def _means(
    model: Model, nodes: tuple[Node, ...], task: Task, ablation: Ablation, prompts_per_run: int
) -> SourceOutputs:
    """Means of the outputs. A head's mean output is mean(z) @ W_O, so storing mean(z) is enough."""
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(())
    axes = (0, 1) if ablation.name == "mean" else (0,)
    for start in range(0, len(task), prompts_per_run):
        part = task[start : start + prompts_per_run]
        tokens = part.clean if ablation.over == "clean" else part.corrupted
        run, _ = run_and_record(model, nodes, tokens, part.mask)
        for name, value in run.activations.items():
            dtype = torch.promote_types(value.dtype, torch.float32)
            real = _like(part.mask.to(dtype), value)
            total = (value * real).sum(axes, keepdim=True)
            sums[name] = sums[name] + total if name in sums else total
        count = part.mask.sum(axes, keepdim=True)
        counts = counts.to(count.device) + count
    # Beyond the longest prompt there is no mean, and no real token reads it.
    counts = counts.clamp(min=1)
    means = {
        name: (value / _like(counts, value)).to(model.cfg.dtype) for name, value in sums.items()
    }
    return SourceOutputs(model, nodes, means)


def _like(by_token: Float[Tensor, "#batch #pos"] | Tensor, value: Tensor) -> Tensor:
    """A tensor over [batch, pos], with axes appended until it broadcasts with `value`."""
    return by_token.reshape(*by_token.shape, *[1] * (value.dim() - 2))


def _given(
    model: Model,
    nodes: tuple[Node, ...],
    rows: slice,
    ablation: Ablation,
    prompts: slice,
    shape: tuple[int, ...],
) -> Outputs:
    """The outputs that the ablation gives for the nodes `rows`."""
    given = {
        parse_node(node) if isinstance(node, str) else node: tensor
        for node, tensor in (ablation.outputs or {}).items()
    }
    if unknown := [str(node) for node in given if node not in nodes]:
        raise InputError(
            f"outputs are given for {', '.join(unknown)}, which write nothing in this graph; its "
            f"sources are {nodes[0]} ... {nodes[-1]}."
        )
    if missing := [str(node) for node in nodes if node not in given]:
        raise InputError(
            f"no outputs are given for {', '.join(missing[:8])}; give every source one (a zero "
            "tensor ablates to zero)."
        )
    result = torch.empty(shape, dtype=model.cfg.dtype, device=model.cfg.device)
    for index, node in enumerate(nodes[rows]):
        tensor = given[node].to(result)
        by_prompt = tensor.dim() == 3 and tensor.shape[0] != 1
        try:
            result[index] = tensor[prompts] if by_prompt else tensor
        except RuntimeError as error:
            raise InputError(
                f"the output given for {node} has shape {tuple(given[node].shape)}; it must "
                f"broadcast to {shape[1:]}."
            ) from error
    return result

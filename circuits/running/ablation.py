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


@dataclass(frozen=True, eq=False)
class Ablation:
    """What replaces a source's output, each node its own.

    Attributes:
        name: "resample" = its output on the corrupted prompt; "zero"; "mean" = its mean over prompts and positions;
            "mean_by_position" = its mean over prompts, at each position; "given" = `outputs`.
        over: which prompts the means are taken over. Padding is left out.
        outputs: for "given": node (or its text) -> a tensor that broadcasts to [batch, pos, d_model]; every source must be named.
    """

    name: str = "resample"
    over: str = "clean"
    outputs: Mapping[Node | str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.name not in (*NAMES, "given"):
            raise InputError(
                f"there is no ablation {self.name!r}; there are {', '.join(NAMES)}, or Ablation('given', outputs=...)."
            )
        if self.over not in ("clean", "corrupted"):
            raise InputError(
                f"Ablation(over={self.over!r}): means are taken over 'clean' or 'corrupted' prompts."
            )
        if (self.name == "given") != (self.outputs is not None):
            raise InputError(
                "an Ablation has outputs exactly when its name is 'given'; write Ablation('given', outputs={node: tensor})."
            )

    def __str__(self) -> str:
        if self.outputs is not None:
            return f"given {self._digest()}"
        return (
            f"{self.name} over {self.over}"
            if self.name.startswith("mean") and self.over != "clean"
            else self.name
        )

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=4)
        for node, tensor in sorted((self.outputs or {}).items(), key=lambda item: str(item[0])):
            digest.update(
                f"{node} {tuple(tensor.shape)}".encode()
                + tensor.detach().cpu().double().contiguous().numpy().tobytes()
            )
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
    """The same ablation for any part of a task: of one that takes means, the outputs given, which are means over all of its prompts."""
    if not ablation.name.startswith("mean"):
        return ablation
    with frozen(model), torch.no_grad():
        means = _means(model, nodes, task, ablation, prompts_per_run).outputs()
    return Ablation("given", outputs=dict(zip(nodes, means, strict=True)))


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Hands out what replaces each source's output, for any prompts of a task. Means are taken once, over all of its prompts."""

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
        """`task` holds all prompts that means are taken over, in runs of so many (None: all at once)."""
        means = None
        if ablation.name.startswith("mean"):
            means = _means(model, nodes, task, ablation, prompts_per_run or len(task))
        return Counterfactuals(model, nodes, ablation, means)

    def on(
        self, task: Task, indices: slice = slice(None)
    ) -> Float[Tensor, "source batch pos d_model"]:
        """The replacements for the prompts of `task`, which are the prompts `indices` of the whole task."""
        batch, pos = task.clean.shape
        shape = (len(self.nodes), batch, pos, self.model.cfg.d_model)
        match self.ablation.name:
            case "resample":
                return source_outputs(self.model, self.nodes, task.corrupted, task.mask)
            case "zero":
                return torch.zeros(
                    1, dtype=self.model.cfg.dtype, device=self.model.cfg.device
                ).expand(shape)
            case "given":
                return _given(
                    self.model, self.nodes, slice(None), self.ablation.outputs or {}, indices, shape
                )
        assert self.means is not None
        return self.means.outputs()[:, :, :pos].expand(shape)

    def changes(
        self,
        task: Task,
        indices: slice,
        clean: SourceOutputs,
        corrupted: SourceOutputs | None = None,
    ) -> Changes:
        """The replacements less what the clean run wrote, kept small.

        Args:
            clean: what the sources wrote on the clean prompts of `task`, which are the prompts `indices` of the whole task.
            corrupted: likewise on the corrupted prompts, if that run was made already.
        """
        match self.ablation.name:
            case "resample":
                return Changes(
                    (
                        corrupted
                        or run_and_record(self.model, self.nodes, task.corrupted, task.mask)[0]
                    )
                    - clean
                )
            case "zero":
                return Changes(-clean)
            case "given":
                return Changes(clean, self.ablation, indices)
        assert self.means is not None
        return Changes(self.means - clean)


@dataclass(frozen=True, eq=False)
class Changes:
    """By how much ablation changes what each source writes.

    Attributes:
        kept: the changes; where an ablation's outputs are given, what the clean run wrote.
        given: that ablation, for these prompts.
    """

    kept: SourceOutputs
    given: Ablation | None = None
    indices: slice | None = None

    def outputs(self, rows: slice = slice(None)) -> Float[Tensor, "source batch pos d_model"]:
        """The changes of the nodes `rows`; of a layer's heads all together."""
        outputs = self.kept.outputs(rows)
        if self.given is None or self.indices is None:
            return outputs
        replaced = _given(
            self.kept.model,
            self.kept.nodes,
            rows,
            self.given.outputs or {},
            self.indices,
            tuple(outputs.shape),
        )
        return replaced.sub_(outputs)


def _means(
    model: Model, nodes: tuple[Node, ...], task: Task, ablation: Ablation, prompts_per_run: int
) -> SourceOutputs:
    """Of what heads write the mean is W_O times the mean of z, so that little has to be kept."""
    sums: dict[str, Tensor] = {}
    total = torch.zeros(())
    for start in range(0, len(task), prompts_per_run):
        piece = task[start : start + prompts_per_run]
        run, _ = run_and_record(
            model, nodes, piece.clean if ablation.over == "clean" else piece.corrupted, piece.mask
        )
        axes = (0, 1) if ablation.name == "mean" else (0,)
        for name, value in run.activations.items():
            weights = piece.mask.to(torch.promote_types(value.dtype, torch.float32)).reshape(
                *piece.mask.shape, *[1] * (value.dim() - 2)
            )
            part = (value * weights).sum(axes, keepdim=True)
            sums[name] = sums[name] + part if name in sums else part
        count = piece.mask.sum(axes, keepdim=True)
        total = total.to(count.device) + count
    # Past the longest prompt a position has no mean; nothing real reads it.
    total = total.clamp(min=1)
    means = {
        name: (value / total.reshape(*total.shape, *[1] * (value.dim() - 2))).to(model.cfg.dtype)
        for name, value in sums.items()
    }
    return SourceOutputs(model, nodes, means)


def _given(
    model: Model,
    nodes: tuple[Node, ...],
    rows: slice,
    outputs: Mapping[Node | str, Tensor],
    indices: slice,
    shape: tuple[int, ...],
) -> Float[Tensor, "source batch pos d_model"]:
    """The outputs given for the nodes `rows`."""
    by_node = {
        parse_node(node) if isinstance(node, str) else node: tensor
        for node, tensor in outputs.items()
    }
    if unknown := [str(node) for node in by_node if node not in nodes]:
        raise InputError(
            f"outputs are given for {', '.join(unknown)}, which write nothing in this graph; its sources are {nodes[0]} ... {nodes[-1]}."
        )
    if missing := [str(node) for node in nodes if node not in by_node]:
        raise InputError(
            f"no outputs are given for {', '.join(missing[:8])}; give every source one (a zero tensor ablates to zero)."
        )
    result = torch.empty(shape, dtype=model.cfg.dtype, device=model.cfg.device)
    for index, node in enumerate(nodes[rows]):
        tensor = by_node[node].to(result)
        tensor = tensor[indices] if tensor.dim() == 3 and tensor.shape[0] != 1 else tensor
        try:
            result[index] = tensor
        except RuntimeError as error:
            raise InputError(
                f"the output given for {node} has shape {tuple(by_node[node].shape)}; it must broadcast to {shape[1:]}."
            ) from error
    return result

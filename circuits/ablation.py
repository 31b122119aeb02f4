"""Ablation: what a source's output is replaced by on the edges outside a circuit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.errors import InputError
from circuits.models import Model
from circuits.nodes import Node, parse_node
from circuits.outputs import source_outputs
from circuits.tasks.base import Task

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
            raise InputError(f"there is no ablation {self.name!r}; there are {', '.join(NAMES)}, or Ablation('given', outputs=...).")
        if self.over not in ("clean", "corrupted"):
            raise InputError(f"Ablation(over={self.over!r}): means are taken over 'clean' or 'corrupted' prompts.")
        if (self.name == "given") != (self.outputs is not None):
            raise InputError("an Ablation has outputs exactly when its name is 'given'; write Ablation('given', outputs={node: tensor}).")

    def __str__(self) -> str:
        if self.outputs is not None:
            return f"given {self._digest()}"
        return f"{self.name} over {self.over}" if self.name.startswith("mean") and self.over != "clean" else self.name

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=4)
        for node, tensor in sorted((self.outputs or {}).items(), key=lambda item: str(item[0])):
            digest.update(f"{node} {tuple(tensor.shape)}".encode() + tensor.detach().cpu().double().contiguous().numpy().tobytes())
        return digest.hexdigest()


def get_ablation(ablation: str | Ablation) -> Ablation:
    """The ablation of that name.

    Raises:
        InputError: there is none.
    """
    return ablation if isinstance(ablation, Ablation) else Ablation(ablation)


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Hands out what replaces each source's output, for any prompts of a task. Means are taken once, over all of its prompts."""

    model: Model
    nodes: tuple[Node, ...]
    ablation: Ablation
    fixed: Float[Tensor, "source 1 pos_or_1 d_model"] | None

    @staticmethod
    def prepare(model: Model, nodes: tuple[Node, ...], task: Task, ablation: Ablation) -> Counterfactuals:
        """`task` holds all prompts that means are taken over."""
        fixed = None
        if ablation.name.startswith("mean"):
            fixed = _means(model, nodes, task, ablation)
        return Counterfactuals(model, nodes, ablation, fixed)

    def on(self, task: Task, indices: slice = slice(None)) -> Float[Tensor, "source batch pos d_model"]:
        """The replacements for the prompts of `task`, which are the prompts `indices` of the whole task."""
        batch, pos = task.clean.shape
        shape = (len(self.nodes), batch, pos, self.model.cfg.d_model)
        match self.ablation.name:
            case "resample":
                return source_outputs(self.model, self.nodes, task.corrupted, task.mask)
            case "zero":
                return torch.zeros(1, dtype=self.model.cfg.dtype, device=self.model.cfg.device).expand(shape)
            case "given":
                return _given(self.model, self.nodes, self.ablation.outputs or {}, indices, shape)
        assert self.fixed is not None
        return self.fixed[:, :, :pos].expand(shape)


def _means(model: Model, nodes: tuple[Node, ...], task: Task, ablation: Ablation) -> Float[Tensor, "source 1 pos_or_1 d_model"]:
    tokens = task.clean if ablation.over == "clean" else task.corrupted
    outputs = source_outputs(model, nodes, tokens, task.mask)
    weights = task.mask.to(outputs.dtype)[None, :, :, None]
    axes = (1, 2) if ablation.name == "mean" else (1,)
    # Past the longest prompt a position has no mean; nothing real reads it.
    return (outputs * weights).sum(axes, keepdim=True) / weights.sum(axes, keepdim=True).clamp(min=1)


def _given(
    model: Model, nodes: tuple[Node, ...], outputs: Mapping[Node | str, Tensor], indices: slice, shape: tuple[int, ...]
) -> Float[Tensor, "source batch pos d_model"]:
    by_node = {parse_node(node) if isinstance(node, str) else node: tensor for node, tensor in outputs.items()}
    if unknown := [str(node) for node in by_node if node not in nodes]:
        raise InputError(
            f"outputs are given for {', '.join(unknown)}, which write nothing in this graph; its sources are {nodes[0]} ... {nodes[-1]}."
        )
    if missing := [str(node) for node in nodes if node not in by_node]:
        raise InputError(f"no outputs are given for {', '.join(missing[:8])}; give every source one (a zero tensor ablates to zero).")
    result = torch.empty(shape, dtype=model.cfg.dtype, device=model.cfg.device)
    for index, node in enumerate(nodes):
        tensor = by_node[node].to(result)
        tensor = tensor[indices] if tensor.dim() == 3 and tensor.shape[0] != 1 else tensor
        try:
            result[index] = tensor
        except RuntimeError as error:
            raise InputError(
                f"the output given for {node} has shape {tuple(by_node[node].shape)}; it must broadcast to {shape[1:]}."
            ) from error
    return result

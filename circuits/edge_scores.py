"""Gradients times differences: the engine under EAP and EAP-IG.

score(u -> r) = sum over positions and d_model of (c_u - out_u(clean)) * d damage / d x_r,  where damage is the metric's mean over scored
rows with its direction's sign. It is the predicted damage of ablating the edge.

No per-head flags of TransformerLens are needed, which make a forward and backward pass about nine times slower: what heads write comes
from z and W_O, and the gradient at a head's q input is that of q pulled back through W_Q and the norm before attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.ablation import Ablation, Counterfactuals, get_ablation
from circuits.components import check_fits, check_supported, sources_of
from circuits.errors import InputError
from circuits.execution import model_logits
from circuits.graph import SLOTS, Graph
from circuits.metrics import Metric
from circuits.models import (
    Components,
    Hook,
    Model,
    attention_output_hook,
    frozen,
    input_hook,
    output_hook,
    projection_hook,
    residual_hook,
    run_to_residual,
    separate_inputs,
    unembed,
)
from circuits.nodes import MLP, Embed, Head, Node, PosEmbed, TokenEmbed
from circuits.outputs import source_outputs
from circuits.patching import EdgeLayout
from circuits.spans import token_spans
from circuits.tasks.base import Task

# Source outputs of one batch of prompts stay below this many bytes.
BATCH_BYTES = 1 << 29
# Below this, per scored row, a gradient is rounding noise: probabilities and logits are of order one.
VANISHING = 1e-6


@dataclass(frozen=True)
class GradientPoint:
    """Where a gradient is taken: what `nodes` write is moved to counterfactual + fraction * (clean - counterfactual), the rest follows.

    An empty `nodes` means the embeddings.
    """

    fraction: float
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """What one score per edge cannot hold. All entries are predicted damage; sums over prompts are weighted by their scored rows.

    Attributes:
        graph: the edges.
        nodes: the sources, one per row below.
        rows: scored rows of each prompt.
        edges_by_prompt: damage on each prompt's rows; its mean, weighted by `rows`, is the score.
        sources_by_position: of ablating all outgoing edges of a source at one position, by prompt.
        neurons: of ablating all outgoing edges of one coordinate of a source's output.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    rows: Int[Tensor, "prompt"]
    edges_by_prompt: Float[Tensor, "prompt edge"]
    sources_by_position: Float[Tensor, "prompt source pos"]
    neurons: Float[Tensor, "source d_model"]

    @property
    def edges(self) -> Float[Tensor, "edge"]:
        """The score of each edge."""
        return self._mean(self.edges_by_prompt)

    def node_scores(self) -> dict[Node, float]:
        """The sum of each node's outgoing edges, for every node that has any."""
        sums = torch.zeros(len(self.graph.nodes), dtype=torch.float64).index_add_(0, self.graph.source, self.edges.double())
        return {self.graph.nodes[index]: float(sums[index]) for index in self.graph.source.unique().tolist()}

    def heads(self) -> Float[Tensor, "layer head"]:
        """Scores of heads, all positions together."""
        scores = {
            node: score
            for node, score in zip(self.nodes, self._mean(self.sources_by_position).sum(-1), strict=True)
            if isinstance(node, Head)
        }
        layers, heads = (max((getattr(node, name) for node in scores), default=-1) + 1 for name in ("layer", "head"))
        result = torch.zeros(layers, heads)
        for node, score in scores.items():
            result[node.layer, node.head] = score
        return result

    def layers(self) -> Float[Tensor, "layer 2"]:
        """Scores of each layer: its heads together, and its MLP."""
        result = torch.zeros(max((node.layer for node in self.nodes if isinstance(node, Head | MLP)), default=-1) + 1, 2)
        for node, score in zip(self.nodes, self._mean(self.sources_by_position).sum(-1), strict=True):
            if isinstance(node, Head | MLP):
                result[node.layer, int(isinstance(node, MLP))] += score
        return result

    def bootstrap(self, samples: int, *, seed: int = 0) -> Float[Tensor, "sample edge"]:
        """Scores on `samples` draws of the prompts with replacement; no model is run."""
        draws = torch.randint(len(self.rows), (samples, len(self.rows)), generator=torch.Generator().manual_seed(seed))
        weights = torch.zeros(samples, len(self.rows)).scatter_add_(1, draws, self.rows[draws].float())
        return (weights / weights.sum(1, keepdim=True)) @ self.edges_by_prompt

    def _mean(self, by_prompt: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "*rest"]:
        return torch.tensordot(self.rows.to(by_prompt.dtype) / self.rows.sum(), by_prompt, dims=1)


def attribute_edges(
    model: Model,
    graph: Graph,
    task: Task,
    *,
    metric: Metric,
    ablation: str | Ablation,
    points: Sequence[GradientPoint],
    progress: Callable[[int, int], None] | None = None,
) -> EdgeAttribution:
    """Scores from the mean of the gradients at `points`.

    Raises:
        InputError: the model, graph and task do not fit together; the metric has no gradient, or one that vanishes at every point.
    """
    check_supported(model)
    check_fits(model, graph)
    task = task.to(model.cfg.device)
    engine = _Engine(model, graph, EdgeLayout.of(model, graph), metric, tuple(points))
    clean_logits = model_logits(model, task)
    parts, largest = [], 0.0
    _warn_of_dead_norms(model, ablation, points)
    with torch.inference_mode(False), frozen(model), separate_inputs(model, heads=False):
        with torch.no_grad():
            counterfactuals = Counterfactuals.prepare(model, engine.layout.nodes, task, get_ablation(ablation))
        for piece in _pieces(engine, task):
            *part, steepest = engine.attribute(task[piece], counterfactuals.on(task[piece], piece), clean_logits[_rows(task, piece)])
            parts.append(part)
            largest = max(largest, steepest)
            if progress:
                progress(min(piece.stop, len(task)), len(task))
    if largest < VANISHING:
        raise InputError(
            f"the gradient of {metric.name} vanishes where it is taken (largest entry {largest:.1e}), as that of kl does at the clean run: "
            "use gradient_at='corrupted' or 'both', EAPIG, or another metric."
        )
    edges, positions, neurons = zip(*parts, strict=True)
    rows = torch.bincount(task.row_prompt.cpu(), minlength=len(task))
    neuron_scores = torch.stack(neurons).sum(0) / len(task.row_prompt)
    return EdgeAttribution(graph, engine.layout.nodes, rows, torch.cat(edges), torch.cat(positions), neuron_scores)


def _warn_of_dead_norms(model: Model, ablation: str | Ablation, points: Sequence[GradientPoint]) -> None:
    at_zero = get_ablation(ablation).name == "zero" and any(point.fraction == 0 and not point.nodes for point in points)
    if at_zero and model.cfg.normalization_type is not None:
        warnings.warn(
            "gradients are taken at zero embeddings, where the norms multiply them by hundreds: the scores mean little. "
            "Use EAPIG with quadrature='midpoint', gradient_at='clean', or another ablation.",
            stacklevel=4,
        )


def _pieces(engine: _Engine, task: Task) -> list[slice]:
    cfg = engine.model.cfg
    size = max(1, BATCH_BYTES // (len(engine.layout.nodes) * task.clean.shape[1] * cfg.d_model * cfg.dtype.itemsize))
    return [slice(start, start + size) for start in range(0, len(task), size)]


def _rows(task: Task, piece: slice) -> Tensor:
    prompts = torch.arange(len(task), device=task.row_prompt.device)[piece]
    return torch.isin(task.row_prompt, prompts)


@dataclass(frozen=True, eq=False)
class _Engine:
    """What stays the same from batch to batch."""

    model: Model
    graph: Graph
    layout: EdgeLayout
    metric: Metric
    points: tuple[GradientPoint, ...]

    def attribute(
        self, task: Task, counterfactuals: Float[Tensor, "source batch pos d_model"], clean_logits: Float[Tensor, "scored vocab"]
    ) -> tuple[Float[Tensor, "prompt edge"], Float[Tensor, "prompt source pos"], Float[Tensor, "source d_model"], float]:
        """Per-prompt edge and source scores (divided by the prompt's rows), neuron scores summed over rows, and the steepest gradient."""
        layout = self.layout
        clean = source_outputs(self.model, layout.nodes, task.clean, task.mask)
        differences = counterfactuals - clean
        gradients, steepest = self._mean_gradients(task, clean, counterfactuals, clean_logits)
        spans = token_spans(self.graph, task)
        dense = torch.zeros(len(task), *layout.shape, device=differences.device, dtype=differences.dtype)
        downstream = torch.zeros_like(differences)
        row = 0
        for (node, _, count), gradient in zip(layout.targets, gradients, strict=True):
            sources = sources_of(self.model, node, isinstance(layout.nodes[0], TokenEmbed))
            dense[:, :, row : row + count, :sources] = _products(differences[:sources], gradient, spans, layout.shape[0])
            downstream[:sources] += gradient.sum(0)
            row += count
        rows = torch.bincount(task.row_prompt, minlength=len(task)).to(dense.dtype)
        edges = dense[:, layout.span, layout.target, layout.source] / rows[:, None]
        by_coordinate = differences * downstream
        positions = by_coordinate.sum(-1).transpose(0, 1) / rows[:, None, None]
        return edges.float().cpu(), positions.float().cpu(), by_coordinate.sum((1, 2)).float().cpu(), steepest

    def _mean_gradients(
        self,
        task: Task,
        clean: Float[Tensor, "source batch pos d_model"],
        counterfactuals: Float[Tensor, "source batch pos d_model"],
        clean_logits: Float[Tensor, "scored vocab"],
    ) -> tuple[list[Float[Tensor, "target batch pos d_model"]], float]:
        """The gradient of the damage, summed over scored rows, at each target: the mean over the points; and the steepest at the logits."""
        total: list[Tensor] = []
        largest = 0.0
        for point in self.points:
            override = self._override(point, clean, counterfactuals)
            gradients, at_logits = self._gradients(task, override, clean_logits)
            largest = max(largest, float(at_logits.abs().max()))
            total = gradients if not total else [a + b for a, b in zip(total, gradients, strict=True)]
        return [gradient / len(self.points) for gradient in total], largest

    def _override(
        self,
        point: GradientPoint,
        clean: Float[Tensor, "source batch pos d_model"],
        counterfactuals: Float[Tensor, "source batch pos d_model"],
    ) -> dict[Node, Float[Tensor, "batch pos d_model"]]:
        """What nodes write at this point. The embeddings are always among them: gradients start there, the weights having none."""
        moved = point.nodes or tuple(node for node in self.layout.nodes if isinstance(node, Embed | TokenEmbed | PosEmbed))
        return {
            node: torch.lerp(counterfactuals[index], clean[index], point.fraction if node in moved else 1.0)
            for index, node in enumerate(self.layout.nodes)
            if node in moved or isinstance(node, Embed | TokenEmbed | PosEmbed)
        }

    def _gradients(
        self, task: Task, override: Mapping[Node, Float[Tensor, "batch pos d_model"]], clean_logits: Float[Tensor, "scored vocab"]
    ) -> tuple[list[Float[Tensor, "target batch pos d_model"]], Float[Tensor, "scored vocab"]]:
        """One forward and one backward pass: the gradient at every target, and at the logits."""
        read: dict[str, Tensor] = {}
        residuals = [residual_hook(layer) for layer in range(self.model.cfg.n_layers)]
        names = [_gradient_hook(self.model, node, slot) for node, slot, _ in self.layout.targets[:-1]]
        keep = [(name, _keeper(read, name)) for name in dict.fromkeys([*residuals, *names])]
        with torch.enable_grad():
            final = run_to_residual(self.model, task.clean, task.mask, [*_override_hooks(self.model, override), *keep])
            logits = unembed(self.model, final[task.scored])
            damage = self.metric.damage(logits, clean_logits, task).sum()
            if not damage.requires_grad:
                raise InputError(f"metric {self.metric.name!r} has no gradient; choose a differentiable one, such as logit_difference.")
            wanted = [name for name in names if read[name].requires_grad]
            *found, at_final, at_logits = torch.autograd.grad(damage, [*(read[name] for name in wanted), final, logits], allow_unused=True)
        # Nothing flows back past an activation that is fixed.
        reached = {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}
        gradients = [reached[name] if name in reached else torch.zeros_like(read[name]) for name in names]
        pulled = [
            _pull_back(self.model, node.layer, slot, gradient, read[residuals[node.layer]])
            if isinstance(node, Head) and slot
            else gradient[None]
            for (node, slot, _), gradient in zip(self.layout.targets, [*gradients, at_final], strict=True)
        ]
        return pulled, at_logits


def _keeper(read: dict[str, Tensor], name: str) -> Hook:
    def keep(activation: Tensor) -> None:
        read[name] = activation

    return keep


def _products(
    differences: Float[Tensor, "source batch pos d_model"],
    gradient: Float[Tensor, "target batch pos d_model"],
    spans: Int[Tensor, "batch pos"] | None,
    n_spans: int,
) -> Float[Tensor, "batch span target source"]:
    """Inner products of differences and gradients over the tokens of each prompt's span."""
    if spans is None:
        return torch.einsum("ubpd,rbpd->bru", differences, gradient)[:, None]
    by_token = torch.einsum("ubpd,rbpd->bpru", differences, gradient)
    result = by_token.new_zeros(by_token.shape[0], n_spans, *by_token.shape[2:])
    return result.scatter_add_(1, spans[:, :, None, None].expand_as(by_token), by_token)


def _gradient_hook(model: Model, node: Node, slot: str | None) -> str:
    return projection_hook(node.layer, slot) if isinstance(node, Head) and slot in SLOTS else input_hook(model, node, slot)


def _override_hooks(model: Model, override: Mapping[Node, Float[Tensor, "batch pos d_model"]]) -> Iterator[tuple[str, Hook]]:
    """Hooks that fix what the given nodes write (the heads of a layer all together), cutting the gradient there."""
    attention: dict[int, list[Tensor]] = {}
    for node, value in override.items():
        if isinstance(node, Head):
            attention.setdefault(node.layer, []).append(value)
        else:
            yield output_hook(node), _fix(value)
    for layer, values in attention.items():
        yield attention_output_hook(layer), _fix(sum(values[1:], values[0]) + Components(model).output_bias(layer))


def _fix(value: Tensor) -> Hook:
    return lambda activation: value.detach().clone().requires_grad_()


def _pull_back(
    model: Model, layer: int, slot: str, gradient: Float[Tensor, "batch pos head d_head"], residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "head batch pos d_model"]:
    """The gradient at each head's own input, from that at its q, k or v: back through the projection and the norm."""
    at_norm = torch.einsum("bphe,hde->hbpd", gradient, Components(model).projection(layer, slot))
    with torch.enable_grad():
        residual = residual.detach().requires_grad_()
        normed = Components(model).attention_norm(layer, residual)
        return torch.autograd.grad(normed, residual, at_norm, is_grads_batched=True)[0]

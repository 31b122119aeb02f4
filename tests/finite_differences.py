"""The derivative of the damage with respect to ablating an edge, from its definition."""

from itertools import product

import torch
from transformer_lens.model_bridge import TransformerBridge

import circuits
from circuits.models import hooked, run_to_residual, unembed
from circuits.models.source_outputs import source_outputs
from circuits.running.edge_layout import EdgeLayout
from circuits.tasks.metrics import get_metric


def differentiated_by_hand(model, graph, task, metric) -> torch.Tensor:
    """d damage / d ablation of every edge, by autograd through the definition: hooks that mix in
    each source's change by a weight per edge.
    """
    layout = EdgeLayout.of(model, graph)
    clean = source_outputs(model, layout.nodes, task.clean, task.mask)
    corrupted = source_outputs(model, layout.nodes, task.corrupted, task.mask)
    step = 1e-4
    scores = []
    damage = get_metric(metric, task)
    whole = circuits.model_logits(model, task)
    for edge in graph.edges:
        values = []
        for sign in (1, -1):
            change = sign * step * (corrupted - clean)[layout.nodes.index(edge.source)]
            values.append(
                float(damage.damage(nudged_logits(model, task, edge, change), whole, task).mean())
            )
        scores.append((values[0] - values[1]) / (2 * step))
    return torch.tensor(scores)


def nudged_logits(model, task, edge, change) -> torch.Tensor:
    """The clean run with `change` added to what one slot of one target reads."""

    def nudge(point, arguments, activation):
        if edge.slot is None:
            return activation + change
        return activation.index_add(2, torch.tensor([edge.target.head]), change[:, :, None])

    layer = getattr(edge.target, "layer", model.cfg.n_layers - 1)
    name = {None: "hook_mlp_in"}.get(edge.slot, f"hook_{edge.slot}_input")
    name = "hook_resid_post" if isinstance(edge.target, circuits.Logits) else name
    if isinstance(model, TransformerBridge):
        # It has no hook points for separate inputs: those of this package.
        point = f"blocks.{layer}.{name}"
        with torch.no_grad(), hooked(model, [(point, lambda x: nudge(None, None, x))]):
            residual = run_to_residual(model, task.clean, task.mask)
        return unembed(model, residual[task.scored]).detach()
    flags = ("use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention")
    # A layer of another model has settings of its own.
    configs = [model.cfg, *(block.cfg for block in model.blocks)]
    configs += [block.attn.cfg for block in model.blocks]
    for cfg, flag in product(configs, flags):
        setattr(cfg, flag, flag != "use_hook_mlp_in" or not model.cfg.attn_only)
    # TransformerLens' own table of hook points is that of the layers that were there first.
    handle = model.get_submodule(f"blocks.{layer}.{name}").register_forward_hook(nudge)
    with torch.no_grad():
        logits = model(task.clean)[task.scored]
    handle.remove()
    for cfg, flag in product(configs, flags):
        setattr(cfg, flag, False)
    return logits

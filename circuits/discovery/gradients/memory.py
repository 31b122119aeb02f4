"""How much memory the gradients and products of a batch of prompts take."""

from __future__ import annotations

from math import ceil, prod

from circuits.discovery.gradients.edge_products import EdgeProducts
from circuits.models import Model, shape_of
from circuits.tasks.task import Task


def needed(products: EdgeProducts, task: Task, points: int, separate: bool) -> tuple[int, int]:
    """Bytes that a batch needs at most: a fixed number, and a number for each prompt."""
    # The bound is generous, since what autograd keeps of a layer depends on the model's code.
    cfg = shape_of(products.model)
    pos = task.clean.shape[1]
    scored = len(task.row_prompt)
    logits = 10 * cfg.d_vocab_out * scored / len(task)
    per_token = _numbers_per_token(products, pos, points)
    if separate:
        # q, k and v inputs of every head, their gradients, and what autograd keeps of their norms.
        per_token += (points + 6) * 3 * cfg.n_layers * cfg.n_heads * cfg.d_model
    per_prompt = pos * per_token + logits
    dense = prod(products.layout.shape)
    if products.details:
        per_prompt += 2 * dense
    fixed = _copied_weights(products.model) + dense
    size = cfg.dtype.itemsize
    return fixed * size, ceil(per_prompt * size)


def bytes_to_judge(model: Model, task: Task, points: int) -> tuple[int, int]:
    """Bytes that the logits of all prompts need: while batches are run, and while judged at once.

    Only metrics that do not come with this package are given them all.
    """
    size = shape_of(model).dtype.itemsize
    numbers = shape_of(model).d_vocab_out * len(task.row_prompt)
    # The clean logits, and those or their slopes at each point and at the end of a piece.
    kept = (points + 2) * size * numbers
    # What autograd keeps of a metric, which computes in float32 at least.
    return kept, kept + 10 * max(size, 4) * numbers


def _copied_weights(model: Model) -> int:
    """Transposed copies of the weights of attention, of gated MLPs and of the unembedding."""
    cfg = shape_of(model)
    in_layer = 4 * cfg.n_heads * cfg.d_head
    if cfg.gated_mlp:
        in_layer += 3 * (cfg.d_mlp or 0)
    in_layers = cfg.n_layers * in_layer
    return cfg.d_model * (in_layers + cfg.d_vocab_out)


def _numbers_per_token(products: EdgeProducts, pos: int, points: int) -> int:
    cfg = shape_of(products.model)
    d_model = cfg.d_model
    heads = cfg.n_heads * cfg.d_head
    mlp = cfg.d_mlp or 0
    # In each layer: clean outputs and changes, with gradients at every point ...
    gradients = 3 * heads + 4 * d_model
    records = 2 * (heads + d_model) + points * gradients
    # ... and, while a pass is made, what autograd keeps.
    autograd = 16 * d_model + 9 * heads
    autograd += 10 * mlp + 8 * cfg.n_heads * pos
    # Or, while products are made, gradients at the inputs of the widest group of targets, the
    # changes of one layer's heads, and, with positions, products by token.
    rows = d_model * (2 * products.widest + 3 * cfg.n_heads + 4)
    if products.graph.positions is not None:
        rows += products.widest * len(products.layout.nodes)
    largest = max(cfg.n_layers * autograd, rows)
    return cfg.n_layers * records + largest + 8 * d_model

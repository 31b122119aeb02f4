"""An estimate of what a batch of circuits costs, from its plan."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.running.incremental.plan import Plan, Step
from circuits.running.incremental.sublayer_run import TaskModel

# Multiplications that take as long as the fixed overhead of a step. The figure for a CPU was
# measured. The one for a GPU is a guess: similar overhead, products a hundred times as fast.
OVERHEAD = {"cpu": 1e7, "cuda": 1e9}


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a batch."""

    # Memory that each circuit takes.
    bytes: int
    # Overhead of the batch, in units of the cost of one circuit.
    fixed: float

    @staticmethod
    def of(plan: Plan, model: TaskModel) -> Cost:
        """The cost of a plan if no two circuits share the inputs of a head."""
        weight = model.unembedding.weight
        peak = products = n_rows = 0
        for step in plan.steps:
            numbers, step_products = _step_cost(step, model)
            peak = max(peak, numbers)
            products += step_products
        for tokens, sources in plan.changed.items():
            n_rows += len(sources) * len(tokens)
        held = n_rows * weight.shape[0] + peak
        on_cpu = weight.device.type == "cpu"
        overhead = OVERHEAD["cpu" if on_cpu else "cuda"]
        overhead *= 1 + len(plan.steps)
        n_bytes = held * weight.element_size()
        return Cost(max(1, n_bytes), overhead / max(1, products))


def _step_cost(step: Step, model: TaskModel) -> tuple[int, int]:
    """The numbers that a step holds at once, and the multiplications that it makes."""
    cfg, slot = model.shape, step.block.slot
    written = len(step.numbers) * len(step.tokens)
    read = 0
    for update in step.inputs:
        read += len(update.rows) * len(update.tokens)
    inputs = 4 * read * cfg.d_model
    if slot == "logits":
        logits = written * cfg.d_vocab_out
        return inputs + 5 * logits, logits * cfg.d_model
    if slot == "mlp":
        hidden = written * (cfg.d_mlp or 0)
        n_matrices = 2 + cfg.gated_mlp
        return inputs + 3 * hidden, n_matrices * hidden * cfg.d_model
    projected = read * cfg.d_head
    scores = written * model.window.readable.shape[1]
    outputs = written * cfg.d_model
    products = (read + written) * cfg.d_head * cfg.d_model
    attention = 3 * (projected + scores) + 2 * outputs
    return inputs + attention, products

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
    """Estimated cost of a batch.

    Attributes:
        bytes: memory that each circuit takes.
        fixed: overhead of the batch, in units of the cost of one circuit.
    """

    bytes: int
    fixed: float

    @staticmethod
    def of(plan: Plan, model: TaskModel) -> Cost:
        """The cost of a plan if no two circuits share the inputs of a head."""
        weight = model.unembedding.weight
        held = sum(len(sources) * len(tokens) for tokens, sources in plan.changed.items())
        peak = products = 0
        for step in plan.steps:
            numbers, step_products = _step_cost(step, model)
            peak = max(peak, numbers)
            products += step_products
        held = held * len(weight) + peak
        overhead = OVERHEAD.get(weight.device.type, OVERHEAD["cuda"]) * (1 + len(plan.steps))
        return Cost(max(1, held * weight.element_size()), overhead / max(1, products))


def _step_cost(step: Step, model: TaskModel) -> tuple[int, int]:
    """The numbers that a step holds at once, and the multiplications that it makes."""
    cfg, written = model.model.cfg, len(step.nodes) * len(step.tokens)
    read = sum(len(update.rows) * len(update.tokens) for update in step.inputs)
    numbers = 4 * read * cfg.d_model
    if step.block.source is None:
        numbers += 5 * written * cfg.d_vocab_out
        return numbers, written * cfg.d_model * cfg.d_vocab_out
    if step.block.slot is None:
        hidden = written * (cfg.d_mlp or 0)
        return numbers + 3 * hidden, hidden * cfg.d_model * (2 + cfg.gated_mlp)
    scores = written * model.window.readable.shape[1]
    numbers += 3 * read * cfg.d_head + 3 * scores + 2 * written * cfg.d_model
    return numbers, (read + written) * cfg.d_head * cfg.d_model

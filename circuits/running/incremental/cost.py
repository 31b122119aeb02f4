"""An estimate of what a batch of circuits costs, from its plan."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.running.incremental.plan import Plan, Step
from circuits.running.incremental.rates import Rates
from circuits.running.incremental.sublayer_run import TaskModel

# Weights of up to this many bytes stay in a cache between batches.
CACHE_BYTES = 1 << 25


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
        of_logits = model.unembedding.weight
        costs = [_StepCost.of(step, model) for step in plan.steps]
        n_rows = 0
        for tokens, sources in plan.changed.items():
            n_rows += len(sources) * len(tokens)
        peak = max((each.numbers for each in costs), default=0)
        held = n_rows * of_logits.shape[0] + peak
        rates = Rates.of(of_logits.device)
        overhead = rates.step * (1 + len(costs))
        n_weights = sum(each.weights for each in costs)
        if n_weights * of_logits.element_size() > CACHE_BYTES:
            overhead += rates.weight * n_weights
        products = sum(each.products for each in costs)
        n_bytes = held * of_logits.element_size()
        return Cost(max(1, n_bytes), overhead / max(1, products))


@dataclass(frozen=True)
class _StepCost:
    """Of a step for one circuit: the numbers that it holds at once, and what it multiplies."""

    numbers: int
    products: int
    # How many weights are read, however many circuits there are.
    weights: int

    @staticmethod
    def of(step: Step, model: TaskModel) -> _StepCost:
        cfg, slot = model.shape, step.block.slot
        written = len(step.numbers) * len(step.tokens)
        read = 0
        for update in step.inputs:
            read += len(update.rows) * len(update.tokens)
        inputs = 4 * read * cfg.d_model
        if slot == "logits":
            # The logits of a few variants at a time are held, which is no part of their cost.
            n_weights = model.unembedding.weight.numel()
            return _StepCost(inputs, written * n_weights, n_weights)
        if slot == "mlp":
            d_mlp = cfg.d_mlp or 0
            weights_of_neuron = (2 + cfg.gated_mlp) * cfg.d_model
            hidden = written * d_mlp
            products = hidden * weights_of_neuron
            return _StepCost(inputs + 3 * hidden, products, d_mlp * weights_of_neuron)
        projected = read * cfg.d_head
        scores = written * model.window.readable.shape[1]
        outputs = written * cfg.d_model
        weights_of_slot = cfg.d_head * cfg.d_model
        products = (read + written) * weights_of_slot
        attention = 3 * (projected + scores) + 2 * outputs
        n_slots = 1 + len(step.inputs)
        weights = len(step.numbers) * n_slots * weights_of_slot
        return _StepCost(inputs + attention, products, weights)

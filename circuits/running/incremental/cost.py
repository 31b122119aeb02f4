"""What a batch of circuits costs, from the plan of what is computed."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.running.incremental.plan import Plan
from circuits.running.incremental.sublayer_run import Parts

# What could be multiplied and added in the time that a step takes however little it computes. The figure for a CPU was measured; that for a
# GPU, whose steps take about as long but multiply a hundred times as fast, was not.
OVERHEAD = {"cpu": 1e7, "cuda": 1e9}


@dataclass(frozen=True)
class Cost:
    """Of one more circuit, and of the batch whatever its size.

    Attributes:
        bytes: about how much memory one more circuit takes.
        products: about how many multiplications.
        fixed: what a batch costs on top, in circuits.
    """

    bytes: int
    products: int
    fixed: float

    @staticmethod
    def of(plan: Plan, parts: Parts) -> Cost:
        """The cost of running a plan, if no circuits share what some nodes read."""
        cfg, window, output = parts.model.cfg, parts.window, parts.unembedding.weight
        tokens = {True: len(window), False: window.scored}
        held = (len(plan.wide) * tokens[True] + len(plan.changed) * tokens[False]) * cfg.d_model
        peak = products = 0
        for step in plan.steps:
            read = sum(len(read.rows) * tokens[read.wide] for read in step.reads)
            here, width = tokens[step.wide], cfg.d_mlp or 0
            numbers = 4 * read * cfg.d_model
            if not len(step.sources):
                numbers += 5 * here * cfg.d_vocab_out
                products += here * cfg.d_model * cfg.d_vocab_out
            elif step.reads[0].place.slot is None:
                numbers += 3 * here * width
                products += here * cfg.d_model * width * (2 + cfg.gated_mlp)
            else:
                numbers += 3 * read * cfg.d_head + len(step.sources) * here * (
                    3 * window.readable.shape[1] + 2 * cfg.d_model
                )
                products += (read + len(step.sources) * here) * cfg.d_head * cfg.d_model
            peak = max(peak, numbers)
        products = max(1, products)
        overhead = OVERHEAD.get(output.device.type, OVERHEAD["cuda"]) * (1 + len(plan.steps))
        return Cost(max(1, (held + peak) * output.element_size()), products, overhead / products)

"""How far two computations of the same thing may differ, and how far they do."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.layers.weights import ModelWeights

Rows = Float[Tensor, "row number"]
LogitRows = Float[Tensor, "row vocab"]

SMALL = (torch.float16, torch.bfloat16)
# How many tokens of the prompts that models are compared on are past a window of attention.
PAST_WINDOW = 8
# Logits that are so far below the largest have probabilities of 0 in float32: e^-88 = 6e-39.
NEGLIGIBLE = 88
# Rounding makes what is computed in two ways differ by less than this share of its size; a missing
# term makes it differ by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
# The same for whole rows, computed in the same order in both ways, where rounding averages out.
ROW_TOLERANCE = TOLERANCE | {torch.float16: 0.01, torch.bfloat16: 0.03}


def compared_rows(weights: ModelWeights, found: Tensor, expected: Tensor) -> tuple[Rows, Rows]:
    """The rows of two activations or logits to compare, in float32.

    These are all, or in half precision and with experts those that differ least: a token goes to
    the experts that score highest, and rounding may tip the scales for a few. A quarter is left
    out, of the last tokens and of the others: only the last may pass a window of attention.
    """
    found = found.float()
    expected = expected.to(found)
    gaps = (found - expected).norm(dim=-1)
    kept = torch.ones_like(gaps, dtype=torch.bool)
    if weights.shape.dtype in SMALL and weights.has_experts:
        for part in (slice(-PAST_WINDOW), slice(-PAST_WINDOW, None)):
            some = gaps[..., part]
            if some.numel():
                # What is not a number is kept.
                kept[..., part] = ~(some > some.quantile(0.75))
    return found[kept], expected[kept]


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference between two tensors, as a share of the largest expected number."""
    size = expected.abs().max()
    gap = (found - expected).abs().max()
    return float(gap / size.clamp(min=1e-30))


def row_gap(found: Tensor, expected: Tensor) -> float:
    """The mean difference of rows as a share of their size: |a - b| / |b|, whatever rows share.

    One token's huge activations, which many models have, do not hide those of the others.
    """
    centred = expected - expected.mean(-1, keepdim=True)
    size = centred.norm(dim=-1).clamp(min=1e-30)
    gap = (found - expected).norm(dim=-1) / size
    return float(gap.square().mean().sqrt())


def logit_gap(found: LogitRows, expected: LogitRows) -> float:
    """The largest difference between logits, as a share of their size.

    The size is that of the logit itself, or if larger of the largest that counts: next to a token
    that is masked by -1e9 a difference in all others must not look like rounding.
    """
    counts = expected > expected.amax(-1, keepdim=True) - NEGLIGIBLE
    size = expected.abs()
    largest = size.masked_fill(~counts, 0).max()
    gap = (found - expected).abs()
    size = size.clamp(min=largest).clamp(min=1e-30)
    share = gap / size
    return float(share.max())

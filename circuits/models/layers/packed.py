"""Products of a few rows with a wide matrix, such as the unembedding, on a CPU.

For float32 torch calls MKL, which takes two to three times as long over them on AMD as oneDNN,
torch's other library: 34 ms instead of 15 for 20 rows of 576 x 49,152 (AMD EPYC, one core, torch
2.13). oneDNN needs a copy of the matrix in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.layers.functional import multiply

Matrix = Float[Tensor, "d_in d_out"]
Rows = Float[Tensor, "n d_in"]
Products = Float[Tensor, "n d_out"]
Product = Callable[[Rows, Tensor | None], Products]

# A copy takes 0.2 s there, and pays off after about this many products of 20 rows, so as many come
# first. The gain is large for wide matrices only: for 576 x 1,536 it is a quarter. The layout is
# made for products of about this many rows.
CALLS_BEFORE, SMALLEST, TYPICAL_ROWS = 8, 1 << 22, 64


@dataclass
class PackedProduct:
    """`multiply`, which copies a wide matrix once it has been used a few times.

    Attributes:
        most_bytes: the largest matrix to copy.
    """

    most_bytes: int
    _n_calls: int = 0
    _packed: Product | None = field(default=None, repr=False)

    def __call__(self, x: Rows, weight: Matrix, bias: Tensor | None = None) -> Products:
        """Compute x @ weight + bias, always of the same matrix."""
        self._n_calls += 1
        if self._n_calls == CALLS_BEFORE and weight.nbytes <= self.most_bytes:
            self._packed = packed(weight)
        if self._packed is None:
            return multiply(x, weight, bias)
        return self._packed(x, bias)


def packed(weight: Matrix) -> Product | None:
    """Return a function that multiplies rows by `weight`; None where it would be no faster."""
    on_cpu = weight.device.type == "cpu"
    if not on_cpu or weight.dtype != torch.float32 or weight.numel() < SMALLEST:
        return None
    # oneDNN has the transposed matrix, as in a linear layer.
    weight = weight.detach()
    transposed = weight.T.contiguous()
    row = transposed[:1]
    try:
        stored = torch.ops.mkldnn._reorder_linear_weight(transposed, TYPICAL_ROWS)
        product = partial(_linear, stored)
        found, expected = product(row, None), row @ weight
    except (AttributeError, RuntimeError):
        # These operations are torch's own: another build or version may not have them.
        return None
    is_right = torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    return product if is_right else None


def _linear(stored: Tensor, rows: Rows, bias: Tensor | None) -> Products:
    return torch.ops.mkldnn._linear_pointwise(rows, stored, bias, "none", [], "")

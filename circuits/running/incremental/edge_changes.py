"""The edges in which a batch of circuits differs from its base."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from circuits.running.incremental.base_state import BaseRun, Variants, row_selection
from circuits.running.incremental.plan import Edges, Indices, TargetMask
from circuits.running.incremental.sublayer_run import RunContext
from circuits.running.incremental.tokens import TokenSet

Differences = Float[Tensor, "column token d_model"]


@dataclass(frozen=True, eq=False)
class EdgeChanges:
    """The edges in which some variant M differs from the base M0.

    Attributes:
        targets: whether an edge into a target changes.
        edges: whether an edge changes.
        rows, columns: the targets and the sources between which edges change.
        signs: M[u, r] - M0[u, r] between these: -1 for an ablated edge, +1 for a restored one.
    """

    context: RunContext
    base: BaseRun
    targets: TargetMask
    edges: Edges
    rows: Indices
    columns: Int[np.ndarray, " column"]
    signs: Float[np.ndarray, "variant span row column"]
    _differences: dict[TokenSet, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(context: RunContext, base: BaseRun, kept: Variants) -> EdgeChanges:
        """Compare variants with the base."""
        layout, new, old = context.model.layout, kept.numpy(), base.kept.numpy()
        changed = np.flatnonzero((new != old).any(axis=0))
        axes = (layout.span, layout.target, layout.source)
        span, target, source = (axis.numpy()[changed] for axis in axes)
        edges = np.zeros_like(context.possible)
        edges[target, source] = True
        targets = np.any(edges, axis=1)
        rows, columns = np.flatnonzero(targets), np.flatnonzero(np.any(edges, axis=0))
        if len(columns) and columns[-1] - columns[0] < 2 * len(columns):
            # Take those in between too: consecutive sources are a view, others would be copied.
            columns = np.arange(columns[0], columns[-1] + 1)
        # M[u, r] - M0[u, r]
        shape = (len(kept), layout.shape[0], len(rows), len(columns))
        signs = np.zeros(shape, dtype=np.float32)
        row, column = np.searchsorted(rows, target), np.searchsorted(columns, source)
        signs[:, span, row, column] = new[:, changed].astype(np.float32) - old[changed]
        return EdgeChanges(context, base, targets, edges, rows, columns, signs)

    def signs_into(self, rows: Indices) -> Float[np.ndarray, "variant span _ column"]:
        """The signs of the edges into some of `rows`."""
        return self.signs[:, :, np.searchsorted(self.rows, rows)]

    def differences(self, tokens: TokenSet) -> Differences:
        """out0_u - c_u of the sources `columns`, with out0 of the base."""
        if tokens not in self._differences:
            sources = row_selection(self.columns, self.base.outputs.device)
            found = self.context.differences[tokens][sources]
            if self.base.changed[self.columns].any():
                outputs = tokens.select(self.base.outputs)[sources]
                found = outputs - tokens.select(self.context.counterfactuals)[sources]
            self._differences[tokens] = found
        return self._differences[tokens]

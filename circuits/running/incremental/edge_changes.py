"""Edges that differ from a base in some variant, and what they bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.running.incremental.base_state import State, contiguous
from circuits.running.incremental.sublayer_run import Known


@dataclass(frozen=True, eq=False)
class Flips:
    """Edges that differ from a base in some variant.

    Attributes:
        targets: whether edges into a target do.
        edges: whether one between a target and a source does.
        rows, columns: the targets and sources they connect.
        signs: kept minus kept in the base, by variant, span, row and column.
        ablated: what the sources write in the base, minus their counterfactuals: at the scored tokens, and at all of them where needed.
    """

    targets: Bool[np.ndarray, " target"]
    edges: Bool[np.ndarray, "target source"]
    rows: Int[np.ndarray, " row"]
    columns: Int[np.ndarray, " column"]
    signs: Float[np.ndarray, "variant span row column"]
    ablated: Callable[[bool], Float[Tensor, "column token d_model"]]

    @staticmethod
    def of(known: Known, base: State, kept: Bool[Tensor, "variant edge"]) -> Flips:
        """How the variants differ from the base."""
        layout, counterfactuals = known.parts.layout, known.counterfactuals
        wanted, held = kept.numpy(), base.kept.numpy()
        changed = np.flatnonzero((wanted != held).any(axis=0))
        target, source = layout.target.numpy()[changed], layout.source.numpy()[changed]
        edges = np.zeros_like(known.possible)
        edges[target, source] = True
        targets = np.any(edges, axis=1)
        rows, columns = np.flatnonzero(targets), np.flatnonzero(np.any(edges, axis=0))
        if len(columns) and columns[-1] - columns[0] < 2 * len(columns):
            columns = np.arange(
                columns[0], columns[-1] + 1
            )  # side by side, so that they need not be copied
        signs = np.zeros((len(kept), layout.shape[0], len(rows), len(columns)), dtype=np.float32)
        values = wanted[:, changed].astype(np.float32) - held[changed]
        signs[
            :,
            layout.span.numpy()[changed],
            np.searchsorted(rows, target),
            np.searchsorted(columns, source),
        ] = values

        def ablated(wide: bool) -> Tensor:
            index = contiguous(columns, counterfactuals.device)
            if not base.changed[columns].any():
                return known.removed[wide][index]
            window = known.parts.window
            written, replaced = (
                part if wide else window.narrow(part) for part in (base.outputs, counterfactuals)
            )
            return written[index] - replaced[index]

        return Flips(targets, edges, rows, columns, signs, cache(ablated))

    def signs_into(
        self, rows: Int[np.ndarray, "*rows"]
    ) -> Float[np.ndarray, "variant span *rows column"]:
        """The signs of edges into some of the rows."""
        return self.signs[:, :, np.searchsorted(self.rows, rows)]

    def only(self, variants: slice) -> Flips:
        """Of some of the variants."""
        return replace(self, signs=self.signs[variants])

    def after_base(self) -> Flips:
        """With the base itself as one more variant, the first."""
        return replace(self, signs=np.concatenate([np.zeros_like(self.signs[:1]), self.signs]))

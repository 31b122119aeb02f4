"""The edges in which a batch of circuits differs from its base."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from circuits.running.incremental.base_state import BaseRun, Outputs
from circuits.running.incremental.plan import Indices, row_selection
from circuits.running.incremental.sublayer_run import TaskModel
from circuits.running.incremental.tokens import TokenSet, Window
from circuits.running.variants import Variants

Signs = Float[np.ndarray, "variant span _ _"]
Differences = Float[Tensor, "column 1 token d_model"]


@dataclass(frozen=True, eq=False)
class SourceDifferences:
    """out_u - c_u of sources u."""

    # c_u of every source u.
    counterfactuals: Outputs
    # The differences of the whole model.
    of_whole: dict[TokenSet, Outputs]

    @staticmethod
    def of(whole: BaseRun, counterfactuals: Outputs, window: Window) -> SourceDifferences:
        """Compute those of the whole model, at all tokens and at the scored ones."""
        of_whole = {
            tokens: tokens.select(whole.outputs) - tokens.select(counterfactuals)
            for tokens in (window.all, window.scored)
        }
        return SourceDifferences(counterfactuals, of_whole)

    def between(self, base: BaseRun, sources: Indices, tokens: TokenSet) -> Outputs:
        """out0_u - c_u, with out0 of a base."""
        rows = row_selection(sources, base.outputs.device)
        # Mostly the base is still the whole model up to the sources that are in question.
        if not base.changed[sources].any():
            return self.of_whole[tokens][rows]
        outputs = tokens.select(base.outputs)[rows]
        return outputs - tokens.select(self.counterfactuals)[rows]


@dataclass(frozen=True, eq=False)
class EdgeChanges:
    """The edges in which some variant M differs from the base M0."""

    model: TaskModel
    base: BaseRun
    source_differences: SourceDifferences
    # The targets and the sources between which edges change.
    rows: Indices
    columns: Indices
    # The place of each target in `rows` and of each source in `columns`; -1 for all others.
    row_of: Int[np.ndarray, " target"]
    column_of: Int[np.ndarray, " source"]
    # M[u, r] - M0[u, r] between these: -1 for an ablated edge, +1 for a restored one. The last row
    # and the last column are zero: those of all other targets and sources.
    signs: Signs
    _differences: dict[TokenSet, Tensor] = field(init=False, default_factory=dict)

    @staticmethod
    def of(
        model: TaskModel, base: BaseRun, source_differences: SourceDifferences, variants: Variants
    ) -> EdgeChanges:
        """Compare variants with the base."""
        changed, new = variants.differing_from(base.kept)
        old = base.kept.numpy()[changed]
        span, target, source = model.layout.places(changed)
        n_spans, n_targets, n_sources = model.layout.shape
        rows, columns = _distinct(target), _columns(source)
        row_of = _places(rows, n_targets)
        column_of = _places(columns, n_sources)
        n_rows, n_columns = len(rows) + 1, len(columns) + 1
        shape = (len(variants), n_spans, n_rows, n_columns)
        signs = np.zeros(shape, dtype=np.float32)
        between = span, row_of[target], column_of[source]
        # M[u, r] - M0[u, r]
        signs[:, *between] = new
        signs[:, *between] -= old
        return EdgeChanges(model, base, source_differences, rows, columns, row_of, column_of, signs)

    def of_variants(self, variants: slice, *, base_first: bool) -> EdgeChanges:
        """Those of some variants, behind the base as one more variant if `base_first`."""
        signs = self.signs[variants]
        if base_first:
            of_base = np.zeros_like(signs[:1])
            signs = np.concatenate([of_base, signs])
        return replace(self, signs=signs)

    def into(self, rows: Indices) -> Signs:
        """The signs of the edges from `columns` into these targets."""
        places = self.row_of[rows]
        return self.signs[:, :, places, :-1]

    def between(self, rows: Indices, sources: list[int]) -> Signs:
        """The signs of the edges from these sources into these targets."""
        into_rows = self.signs[:, :, self.row_of[rows]]
        return into_rows[..., self.column_of[sources]]

    def differences(self, tokens: TokenSet) -> Differences:
        """out0_u - c_u of the sources `columns`, with out0 of the base, as one variant."""
        if tokens not in self._differences:
            found = self.source_differences.between(self.base, self.columns, tokens)
            self._differences[tokens] = found[:, None]
        return self._differences[tokens]


def _columns(sources: Indices) -> Indices:
    """The distinct sources; with those in between, where these are few."""
    columns = _distinct(sources)
    # Consecutive sources are a view of a tensor, others would be copied.
    if len(columns):
        between = np.arange(columns[0], columns[-1] + 1)
        if len(between) <= 2 * len(columns):
            return between
    return columns


def _distinct(numbers: Indices) -> Indices:
    """The different numbers, in order."""
    # `np.unique` takes several times as long on a few small numbers.
    counts = np.bincount(numbers)
    return np.flatnonzero(counts)


def _places(numbers: Indices, size: int) -> Indices:
    """Where each number below `size` is in `numbers`; -1 if nowhere."""
    places = np.full(size, -1)
    places[numbers] = np.arange(len(numbers))
    return places

"""Circuits that differ in few edges, without a mask over all edges for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.graph.graph import EdgeMask

KeptEdges = Bool[Tensor, "variant edge"]
Numbers = Int[np.ndarray, " some"]
Stays = Bool[np.ndarray, "variant some"]


@dataclass(frozen=True, eq=False)
class Variants:
    """Variants of a circuit.

    Attributes:
        common: the edges of the circuit.
        edges: those in which variants may differ from it, each once.
        stays: which of these each variant keeps.
    """

    common: EdgeMask
    edges: Numbers
    stays: Stays

    @staticmethod
    def of(kept: KeptEdges) -> Variants:
        """The circuits with these masks."""
        masks = kept.cpu()
        common = masks.any(0)
        some = (masks != common).any(0)
        edges = np.flatnonzero(some.numpy())
        return Variants(common, edges, masks.numpy()[:, edges])

    @staticmethod
    def without_each(common: EdgeMask, edges: Sequence[int]) -> Variants:
        """A circuit without each of some edges, alone."""
        numbers = np.array(edges, dtype=np.int64)
        return Variants(common, numbers, ~np.eye(len(numbers), dtype=bool))

    def __len__(self) -> int:
        """The number of circuits."""
        return len(self.stays)

    def __getitem__(self, rows: slice | Numbers) -> Variants:
        """Some of the circuits."""
        return replace(self, stays=self.stays[rows])

    def with_circuit(self) -> Variants:
        """These, and the circuit itself as the last."""
        kept = self.common.numpy()[self.edges]
        return replace(self, stays=np.vstack([self.stays, kept]))

    @property
    def union(self) -> EdgeMask:
        """The edges that some variant keeps."""
        kept = self.common.clone()
        kept.numpy()[self.edges] = self.stays.any(0)
        return kept

    @property
    def n_kept(self) -> int:
        """The number of edges of all variants together."""
        n_common = int(self.common.sum()) - int(self.common.numpy()[self.edges].sum())
        return len(self) * n_common + int(self.stays.sum())

    def differing_from(self, other: EdgeMask) -> Numbers:
        """The edges, in order, in which some variant differs from another circuit."""
        theirs = other.numpy()
        differs = self.common.numpy() != theirs
        of_some = self.stays != theirs[self.edges]
        differs[self.edges] = of_some.any(0)
        return np.flatnonzero(differs)

    def keep(self, numbers: Numbers) -> Stays:
        """Which of some edges, given in order, each variant keeps."""
        shape = (len(self), 1)
        kept = np.tile(self.common.numpy()[numbers], shape)
        asked = np.isin(self.edges, numbers)
        places = np.searchsorted(numbers, self.edges[asked])
        kept[:, places] = self.stays[:, asked]
        return kept

    def dense(self) -> KeptEdges:
        """A mask for each circuit."""
        kept = self.common.repeat(len(self), 1)
        kept.numpy()[:, self.edges] = self.stays
        return kept

"""Circuits that differ in few edges, without a mask over all edges for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
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
    def of(circuits: Variants | KeptEdges) -> Variants:
        """The circuits with these masks; variants are returned as they are."""
        if isinstance(circuits, Variants):
            return circuits
        masks = circuits.cpu().numpy()
        common = masks.any(0)
        differ = masks != common
        edges = np.flatnonzero(differ.any(0))
        stays = masks[:, edges]
        return Variants(torch.from_numpy(common), edges, stays)

    @staticmethod
    def without_each(common: EdgeMask, edges: Sequence[int]) -> Variants:
        """A circuit without each of some edges, alone."""
        numbers = np.array(edges, dtype=np.int64)
        gone = np.eye(len(numbers), dtype=bool)
        return Variants(common, numbers, ~gone)

    def __len__(self) -> int:
        """The number of circuits."""
        return len(self.stays)

    def __getitem__(self, rows: slice | Numbers) -> Variants:
        """Some of the circuits."""
        return replace(self, stays=self.stays[rows])

    def with_circuit(self) -> Variants:
        """These, and the circuit itself as the last."""
        kept = self.common.numpy()[self.edges]
        stays = np.vstack([self.stays, kept])
        return replace(self, stays=stays)

    @cached_property
    def union(self) -> EdgeMask:
        """The edges that some variant keeps."""
        kept = self.common.clone()
        kept.numpy()[self.edges] = self.stays.any(0)
        return kept

    @property
    def n_kept(self) -> int:
        """The number of edges of all variants together."""
        common = self.common.numpy().copy()
        common[self.edges] = False
        n_common = int(common.sum())
        return len(self) * n_common + int(self.stays.sum())

    def differing_from(self, other: EdgeMask) -> tuple[Numbers, Stays]:
        """The edges in which some variant differs from another circuit, and which it keeps."""
        common = self.common.numpy()
        theirs = other.numpy()
        differs = common != theirs
        of_variants = self.stays != theirs[self.edges]
        some = of_variants.any(0)
        differs[self.edges] = some
        numbers = np.flatnonzero(differs)
        shape = (len(self), len(numbers))
        stays = np.empty(shape, dtype=bool)
        stays[:] = common[numbers]
        places = np.searchsorted(numbers, self.edges[some])
        stays[:, places] = self.stays[:, some]
        return numbers, stays

    def dense(self) -> KeptEdges:
        """A mask for each circuit."""
        kept = self.common.repeat(len(self), 1)
        kept.numpy()[:, self.edges] = self.stays
        return kept

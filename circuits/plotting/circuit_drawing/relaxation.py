"""Places of vertices in their rows: near to their neighbours in other rows, with room between them.

Rows are swept one after another, after Sugiyama et al. (1981).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

N_SWEEPS = 10
# Vertices are all of a drawing, members those of one row.
Places = Float[np.ndarray, " vertex"]
Numbers = Int[np.ndarray, " vertex"]
MemberPlaces = Float[np.ndarray, " member"]
Members = Int[np.ndarray, " member"]
Distances = Float[np.ndarray, " between"]
LinkEnds = Int[np.ndarray, " link"]
Links = tuple[LinkEnds, LinkEnds]


@dataclass(frozen=True)
class Pull:
    """The neighbours in other rows that the vertices of a row are drawn to."""

    members: Members  # the vertices of the row
    pulled: LinkEnds  # which of the members, once for each of its neighbours
    neighbours: LinkEnds

    def wanted(self, x: Places) -> MemberPlaces:
        """Return the mean place of the neighbours of each vertex, or its own if it has none."""
        places = x[self.members]
        count = len(self.members)
        pulling = x[self.neighbours]
        sums = np.bincount(self.pulled, pulling, count)
        counts = np.bincount(self.pulled, minlength=count)
        has = counts > 0
        np.divide(sums, counts, places, where=has)
        return places


@dataclass(frozen=True)
class Room:
    """How much room vertices need in a row."""

    size: Places  # with half of the gap to the neighbours on each side
    ribbon: Numbers  # where neighbours are of the same ribbon,
    saved: float  # so much room is saved between them

    def distances(self, ordered: Members) -> Distances:
        """Return the least distance of each vertex from the next one to its right."""
        half = self.size[ordered] / 2
        distances = half[1:] + half[:-1]
        same = np.diff(self.ribbon[ordered]) == 0
        distances[same] -= self.saved
        return distances


def relaxed(row: Numbers, room: Room, links: Links) -> Places:
    """Place the vertices of each row.

    Args:
        row: the row of each vertex, counted from the top.
        links: pairs of neighbours, the lower ones and the upper ones.
    """
    lower, upper = links
    below = list(_pulls(row, upper, lower))
    above = list(_pulls(row, lower, upper))
    ends = np.concatenate([lower, upper])
    others = np.concatenate([upper, lower])
    both = list(_pulls(row, ends, others))
    # Following the row before untangles the edges; following both rows straightens them.
    untangling = below[::-1] + above
    straightening = both[::-1] + both
    x = np.zeros(len(row))
    for pull in N_SWEEPS * untangling + N_SWEEPS * straightening:
        _place(x, pull, room)
    return x


def separated(wanted: MemberPlaces, distances: Distances) -> MemberPlaces:
    """Move places so that each has at least its distance from the next one, in this order.

    The largest move is as small as it can be.
    """
    # With all distances left of it subtracted, places may touch but not swap. This is isotonic
    # regression. In the maximum norm its solution is the mean of the largest value up to each
    # place and the smallest one from there on.
    offsets = np.append(0.0, np.cumsum(distances))
    free = wanted - offsets
    largest = np.maximum.accumulate(free)
    from_end = free[::-1]
    smallest = np.minimum.accumulate(from_end)[::-1]
    return (largest + smallest) / 2 + offsets


def _pulls(row: Numbers, pulled: LinkEnds, neighbours: LinkEnds) -> Iterator[Pull]:
    """Group pairs of neighbours by the row of the pulled one, from the top."""
    row_of_link = row[pulled]
    for number in np.unique(row):
        members = np.flatnonzero(row == number)
        links = row_of_link == number
        places = np.searchsorted(members, pulled[links])
        yield Pull(members, places, neighbours[links])


def _place(x: Places, pull: Pull, room: Room) -> None:
    """Move each vertex of a row to the mean place of its neighbours, as far as there is room."""
    members, wanted = pull.members, pull.wanted(x)
    # Ties stay in the order in which they are.
    order = np.lexsort((x[members], wanted))
    ordered = members[order]
    distances = room.distances(ordered)
    x[ordered] = separated(wanted[order], distances)

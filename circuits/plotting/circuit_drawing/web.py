"""The vertices of a layered drawing, after Sugiyama et al. (1981): nodes, and waypoints of edges.

An edge that passes rows gets an invisible waypoint in each, so that it runs between the nodes.
Vertices are numbered, nodes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np

from circuits.graph.edges import Edge
from circuits.plotting.circuit_drawing.relaxation import Links, Places, Room, relaxed

# Edges that leave the same node can run closer together than others, as a ribbon.
NODE_GAP, WAYPOINT_GAP, RIBBON_GAP = 14.0, 3.0, 1.2


@dataclass
class Web:
    """Vertices in their rows and columns, and the edges that run along them."""

    rows: list[int] = field(default_factory=list)  # from the top
    columns: list[int] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    # The number of the node, or of the source of the edge
    ribbons: list[int] = field(default_factory=list)
    # The numbers of the source of an edge, of its waypoints and of its target
    chains: dict[Edge, list[int]] = field(default_factory=dict)
    n_nodes: int = 0

    def add_node(self, row: int, column: int, width: float) -> int:
        """Add a node before any edge, and return its number."""
        number = self.n_nodes
        self._add([row], column, width, number)
        self.n_nodes += 1
        return number

    def connect(self, edge: Edge, source: int, target: int, width: float) -> None:
        """Add an edge, with waypoints in the column of its source."""
        first = len(self.rows)
        below, above = self.rows[source], self.rows[target]
        passed = range(below - 1, above, -1)
        self._add(passed, self.columns[source], width, source)
        waypoints = range(first, len(self.rows))
        self.chains[edge] = [source, *waypoints, target]

    def places(self) -> Places:
        """Return where the vertices are in their columns."""
        lower, upper = self.links()
        column, width = np.array(self.columns), np.array(self.widths)
        # Columns are laid out one by one, so what is in another one cannot pull.
        same = column[lower] == column[upper]
        gap = np.full(len(width), WAYPOINT_GAP)
        gap[: self.n_nodes] = NODE_GAP
        saved = WAYPOINT_GAP - RIBBON_GAP
        room = Room(width + gap, np.array(self.ribbons), saved)
        # The rows of one column come after those of another one.
        rows = column * len(width) + self.rows
        return relaxed(rows, room, (lower[same], upper[same]))

    def links(self) -> Links:
        """Return each vertex but the last along each edge, and the next one."""
        pairs = map(pairwise, self.chains.values())
        lower, upper = zip(*chain.from_iterable(pairs), strict=True)
        return np.array(lower), np.array(upper)

    def clearances(self, x: Places) -> Places:
        """Return how far each vertex is from the nearest node in its row; infinity without one."""
        row, width = np.array(self.rows), np.array(self.widths)
        clear = np.full(len(row), np.inf)
        for node in range(self.n_nodes):
            beside = row == row[node]
            distance = np.abs(x - x[node])
            distance -= (width + width[node]) / 2
            clear[beside] = np.minimum(clear, distance)[beside]
        return clear

    def _add(self, rows: Iterable[int], column: int, width: float, ribbon: int) -> None:
        for row in rows:
            self.rows.append(row)
            self.columns.append(column)
            self.widths.append(width)
            self.ribbons.append(ribbon)

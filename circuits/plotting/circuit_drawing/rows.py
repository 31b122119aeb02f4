"""The rows of a drawing: which there are, how far apart they are, and which layers have none.

Rows are counted from the top. Lengths are in pixels; as in SVG, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from circuits.graph.nodes import MLP, Error, Feature, Logits, Node

NODE_HEIGHT, FOLD_HEIGHT = 22.0, 18.0
# Around the rows of a layer is a band; there is a gap between bands.
BAND_PADDING, BAND_GAP = 8.0, 5.0
# The height between rows grows with how far edges move to the side there, so that they do not run
# into each other.
MIN_ROW_GAP, MAX_ROW_GAP, SLOPE = 16.0, 52.0, 0.55

# The layer of a node, and whether it follows attention.
RowKey = tuple[float, bool]
# Embeddings and logits have layers of their own.
INPUTS, OUTPUT = -1, math.inf
FOOT: RowKey = (INPUTS - 1, False)


@dataclass(frozen=True)
class Fold:
    """A run of layers without a node, which a thin mark stands for."""

    first: int
    last: int
    middle: float

    @property
    def text(self) -> str:
        """The layers that are left out."""
        single = self.first == self.last
        return f"layer {self.first}" if single else f"layers {self.first} to {self.last}"


def row_key(node: Node) -> RowKey:
    """Return the layer of a node and whether it follows attention; sorting by it gives the rows."""
    outside = OUTPUT if isinstance(node, Logits) else INPUTS
    layer: float = getattr(node, "layer", outside)
    return layer, isinstance(node, MLP | Feature | Error)


def stacked(
    keys: Sequence[RowKey], moves: Sequence[float], n_layers: int
) -> tuple[list[float], list[Fold]]:
    """Return the top of each row and of the space below, and the layers that are left out.

    Args:
        keys: the rows that have nodes, from the top.
        moves: below each row but the last one, how far edges move to the side.
    """
    tops, folds = [], []
    above, bottom = OUTPUT, -MIN_ROW_GAP
    for (layer, _), move in zip([*keys, FOOT], [0.0, *moves, 0.0], strict=True):
        least = MIN_ROW_GAP if layer == above else 2 * BAND_PADDING + BAND_GAP
        left_out = [number for number in range(n_layers) if layer < number < above]
        if left_out:
            least = 2 * BAND_PADDING + FOLD_HEIGHT
        gap = max(least, min(SLOPE * move, MAX_ROW_GAP))
        if left_out:
            folds.append(Fold(left_out[0], left_out[-1], bottom + gap / 2))
        tops.append(bottom + gap)
        above, bottom = layer, bottom + gap + NODE_HEIGHT
    return tops, folds

"""The rows of a drawing: which there are, how far apart they are, and which layers have none.

Rows are counted from the top. Lengths are in pixels; as in SVG, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class Stack:
    """Rows on top of each other: the top of each, the layers that are left out, and the height."""

    tops: list[float] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    height: float = 0.0


def stacked(keys: Sequence[RowKey], moves: Sequence[float], n_layers: int) -> Stack:
    """Place the rows that have nodes, from the top.

    Args:
        moves: below each row but the last one, how far edges move to the side.
    """
    stack = Stack()
    above, bottom = OUTPUT, -MIN_ROW_GAP
    # Layers can be left out above the first row and below the last one, too.
    spaces = zip([*keys, FOOT], [0.0, *moves, 0.0], strict=True)
    for (layer, _), move in spaces:
        least = MIN_ROW_GAP if layer == above else 2 * BAND_PADDING + BAND_GAP
        left_out = [at for at in range(n_layers) if layer < at < above]
        if left_out:
            least = 2 * BAND_PADDING + FOLD_HEIGHT
        gap = max(least, min(SLOPE * move, MAX_ROW_GAP))
        if left_out:
            middle = bottom + gap / 2
            fold = Fold(min(left_out), max(left_out), middle)
            stack.folds.append(fold)
        stack.tops.append(bottom + gap)
        above, bottom = layer, bottom + gap + NODE_HEIGHT
    stack.height = stack.tops.pop()
    return stack

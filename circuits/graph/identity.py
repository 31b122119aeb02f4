"""Which model, and which transcoders, a graph was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a graph was made from.

    Attributes:
        shape: numbers of layers, heads and so on. A model of another shape is refused.
        weights: a fingerprint; empty if it is not known. Other weights give a warning.
    """

    name: str
    shape: Mapping[str, Any]
    weights: str


@dataclass(frozen=True)
class TranscodersIdentity:
    """The transcoders whose features are the nodes of a graph.

    Attributes:
        source: the path or address they were loaded from; empty if they were made in memory.
        weights: a fingerprint.
        leading: the number of positions at the start of a prompt that have no features.
        whole: True if every active feature is a node, False if a budget or pruning left some out.
    """

    name: str
    source: str
    weights: str
    leading: int = 1
    whole: bool = True

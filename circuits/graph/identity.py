"""Which model, and which transcoders, a graph was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a graph was made from: its shape, which must fit, and a fingerprint of its weights, which should."""

    name: str
    shape: Mapping[str, Any]
    weights: str


@dataclass(frozen=True)
class TranscodersIdentity:
    """Which transcoders a graph of features was made with.

    Attributes:
        source: where they came from; empty where they were made in memory.
        weights: a fingerprint.
        leading: so many first positions of a prompt have no features.
        whole: every active feature is a node, as against those in a budget, or on edges that pruning kept.
    """

    name: str
    source: str
    weights: str
    leading: int = 1
    whole: bool = True

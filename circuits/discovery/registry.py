"""Every method by name."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from circuits.discovery.discoverer import _REGISTRY, CircuitDiscoverer

ENTRY_POINTS = "circuits.discoverers"


def discoverers() -> dict[str, type[CircuitDiscoverer]]:
    """Every method by name: the shipped ones, other installed packages' (entry-point group `circuits.discoverers`), and your own."""
    importlib.import_module("circuits.discovery.methods")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return dict(sorted(_REGISTRY.items()))

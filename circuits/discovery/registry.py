"""Every discovery method by name."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from circuits.discovery import ENTRY_POINTS
from circuits.discovery.discoverer import REGISTRY, CircuitDiscoverer


def discoverers() -> dict[str, type[CircuitDiscoverer]]:
    """Every method by name: shipped ones, those of other installed packages, and your own.

    Other packages offer methods through the entry-point group `circuits.discoverers`.

    >>> import circuits
    >>> circuits.discoverers()["acdc"] is circuits.ACDC
    True
    """
    importlib.import_module("circuits.discovery.methods")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return dict(sorted(REGISTRY.items()))

"""One task family per file. Adding a file here adds a task."""

from importlib import import_module
from pkgutil import iter_modules

from circuits.tasks.family import REGISTRY, TaskFamily


def task_families() -> dict[str, type[TaskFamily]]:
    """Every task family by name: those in this folder and the user's own."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return dict(sorted(REGISTRY.items()))

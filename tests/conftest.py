"""Shared by all tests: one thread each (the suite runs one process per core), and the embedded
model loaded once.
"""

import gc
import multiprocessing
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from unequal_prompts import unequal_task

import circuits
from circuits.tasks.families import task_families
from circuits.tasks.family import REGISTRY

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep what is imported out of garbage collections, which would look at all of it each time."""
    gc.freeze()


@pytest.fixture(scope="session")
def toy_world():
    return circuits.load_model("toy-world", device="cpu")


@pytest.fixture(scope="session")
def unequal(toy_world):
    return unequal_task(toy_world)


@pytest.fixture(scope="session")
def new_process():
    """Starts functions in processes like new interpreters, but for imports, which take seconds:
    each is a copy of a process that has made them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["circuits.models", "circuits.models.loading.load"])
    return context.Process


@pytest.fixture
def only_shipped_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tasks that other tests and examples have defined."""
    for name, family in task_families().items():
        if not family.__module__.startswith("circuits.tasks.families."):
            monkeypatch.delitem(REGISTRY, name)


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Without the runtime type checks of the test suite, which take a third of its time; and what
    a user sees who passes something of a wrong type.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

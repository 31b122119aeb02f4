"""Options that commands share, and how they become a model and a task."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from circuits.models import EMBEDDED, Model, load_model
from circuits.system.errors import InputError
from circuits.tasks.registry import load_task
from circuits.tasks.task import Task

DEFAULT_TASK = "ioi"
# The options of a group have no prefix.
T = TypeVar("T")
Unprefixed = Annotated[T, tyro.conf.arg(name="")]
AblationName = Literal["resample", "zero", "mean", "mean_by_position"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to use, and how to load it."""

    model: str | None = None
    """toy-world (the default), a name TransformerLens knows (gpt2, pythia-160m), or a folder."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default CUDA if there is one."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""
    json: bool = False
    """Print JSON for programs instead of tables."""

    def load_model(self) -> Model:
        """Load the model."""
        dtype = getattr(torch, self.dtype)
        return load_model(self.model or EMBEDDED, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class TaskOptions(ModelOptions):
    """Which prompts to use."""

    task: str | None = None
    """The name of a task; `circuits list` shows them. By default ioi."""
    data: Path | None = None
    """Your own prompts instead of a task: a file of JSON lines, a JSON list or a table (.csv,
    .tsv) with clean, corrupted, answer and wrong_answer; EAP-IG's and MIB's data too. All prompts
    are used for discovery and for evaluation."""
    seed: int | None = None
    """Seed for drawing prompts; by default 0."""

    def load_task(self, model: Model, n: int, split: str) -> Task:
        """Load n prompts from a split of the task, or all of the user's own prompts."""
        if self.data and self.task:
            raise InputError(
                f"--task {self.task} and --data {self.data} were both given; give one of them."
            )
        if self.data:
            name = re.sub(r"[^\w+-]+", "-", self.data.stem) or "data"
            return Task.from_file(self.data, model, name=name)
        name, seed = self.task or DEFAULT_TASK, self.seed or 0
        return load_task(name, model, n=n, seed=seed, split=split)

    def notes(self) -> dict[str, Any]:
        """What a record says of how the model and the prompts were chosen."""
        return {
            "model": self.model or EMBEDDED,
            "task": self.task or DEFAULT_TASK,
            "data": str(self.data) if self.data else None,
            "seed": self.seed or 0,
        }

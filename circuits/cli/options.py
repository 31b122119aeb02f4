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
    """Your own prompts instead of a task: a JSONL file. Each line is an object with clean,
    corrupted, answer and wrong_answer. All prompts are used for discovery and for evaluation."""
    seed: int | None = None
    """Seed for drawing prompts; by default 0."""
    skip_misfits: bool = False
    """Leave out pairs of --data that do not fit the model, instead of refusing the file."""
    prepend_bos: bool | None = None
    """Begin each prompt with exactly one BOS token, or (False) take text as it is; by default as
    the model does."""

    def load_task(self, model: Model, n: int, split: str) -> Task:
        """Load n prompts from a split of the task, or all of the user's own prompts."""
        if self.data and self.task:
            raise InputError(
                f"--task {self.task} and --data {self.data} were both given; give one of them."
            )
        if self.data:
            name = re.sub(r"[^\w+-]+", "-", self.data.stem) or "data"
            skip, bos = self.skip_misfits, self.prepend_bos
            return Task.from_jsonl(self.data, model, name=name, prepend_bos=bos, skip_misfits=skip)
        name, seed = self.task or DEFAULT_TASK, self.seed or 0
        bos = self.prepend_bos
        return load_task(name, model, n=n, seed=seed, split=split, prepend_bos=bos)

    def notes(self) -> dict[str, Any]:
        """What a record says of how the model and the prompts were chosen."""
        return {
            "model": self.model or EMBEDDED,
            "task": self.task or DEFAULT_TASK,
            "data": str(self.data) if self.data else None,
            "seed": self.seed or 0,
            "prepend_bos": self.prepend_bos,
            "skip_misfits": self.skip_misfits,
        }

"""Shared by the benchmarks: machine records, paired timing, random models, result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

import circuits
from circuits.models import Model, build_model

Result = TypeVar("Result")

PACKAGES = ("torch", "transformer-lens", "transformer-circuits")

# Shapes of HookedTransformerConfig.
SHAPES: dict[str, dict[str, Any]] = {
    "4 layers, d_model 256": {
        "n_layers": 4,
        "d_model": 256,
        "n_ctx": 16,
        "d_head": 32,
        "n_heads": 8,
        "d_mlp": 1024,
        "d_vocab": 1000,
    },
    "gpt2-small": {
        "n_layers": 12,
        "d_model": 768,
        "n_ctx": 1024,
        "d_head": 64,
        "n_heads": 12,
        "d_mlp": 3072,
        "d_vocab": 50257,
    },
}


def random_model(
    shape: str | Mapping[str, Any],
    device: str,
    *,
    seed: int = 0,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model of a given shape with random weights.

    Weights are scaled so that activations stay of order one.

    Args:
        shape: the name of one of `SHAPES`, or a similar dictionary.
        sharpness: the standard deviation of the logits. At one, the edges of a large model do less
            damage than rounding.
        dtype: what the weights are converted to; they are drawn in float32.
    """
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    config = {
        **sizes,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in _parameter_shapes(config).items():
        fan = 1 if name.endswith(("W_E", "W_pos")) or len(size) == 1 else size[-2]
        weights[name] = (
            torch.randn(size, generator=generator) / fan**0.5
            if len(size) > 1
            else torch.full(size, float(name.endswith(".w")))
        )
    weights["unembed.W_U"] *= sharpness
    return build_model(config, weights, device=device, dtype=dtype)


def random_task(model: Model, prompts: int, tokens: int, *, seed: int = 0) -> circuits.Task:
    """Random prompts, corrupted in every fourth token; the last is scored by a logit difference."""
    generator = torch.Generator().manual_seed(seed)
    clean, other = (
        torch.randint(model.cfg.d_vocab, (prompts, tokens), generator=generator) for _ in range(2)
    )
    corrupted = torch.where(torch.arange(tokens) % 4 == 0, other, clean)
    answers = torch.stack(
        [torch.randperm(model.cfg.d_vocab, generator=generator)[:2] for _ in range(prompts)]
    )
    return circuits.Task.from_tokens(
        clean, corrupted, answers[:, 0], answers[:, 1], name="random"
    ).to(model.cfg.device)


def truncated(graph: circuits.Graph, edges: int) -> circuits.Graph:
    """Some of a graph's edges, evenly spread; a search tries these and keeps the others."""
    some = torch.linspace(0, len(graph) - 1, min(edges, len(graph))).long()
    chosen = torch.zeros(len(graph), dtype=torch.bool)
    chosen[some] = True
    return graph.only(chosen)


def _parameter_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        # TransformerLens 4 has no such class; what else is in this file does not need it.
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        settings = HookedTransformerConfig(**config, init_weights=False, device="meta")
        model = HookedTransformer(settings, move_to_device=False)
        return {name: parameter.shape for name, parameter in model.named_parameters()}


def clocked(program: Callable[[], Result], device: str) -> tuple[Result, dict[str, float]]:
    """A program's result, and its wall-clock and CPU seconds (of all threads, not of a GPU)."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = program()
    _wait(device)
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def paired_times(
    programs: Mapping[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every repetition; the programs take turns, after one warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repetition in range(repeats + 1):
        for name, program in programs.items():
            took = clocked(program, device)[1]
            if repetition:
                seconds[name].append(took["wall"])
    return seconds


def paired_ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """The median over repetitions of one program's time divided by another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def most_allocated(program: Callable[[], object], device: str) -> int:
    """Peak bytes handed out by torch's allocator, above what was allocated before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        program()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        program()
    held = most = 0
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def circumstances(device: str) -> dict[str, Any]:
    """Hardware, versions, commit, and whether float32 products on a GPU are exact."""
    on_gpu = torch.device(device).type == "cuda"
    gpu = {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
    }
    return {
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            **gpu,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "commit": _commit(),
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _cpu() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    """The version; None if it is run from a folder without installation."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _commit() -> str | None:
    """The commit of this checkout, with `+` if files differ from it.

    None outside of a checkout, unless CIRCUITS_COMMIT names one.
    """
    if "CIRCUITS_COMMIT" in os.environ:
        return os.environ["CIRCUITS_COMMIT"]
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")

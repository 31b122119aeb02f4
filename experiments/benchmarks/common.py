"""What benchmarks share: a record of the machine, paired timing, models with random weights, result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformerConfig

import circuits
from circuits.models import Model, build_model

PACKAGES = ("torch", "transformer-lens", "circuits")

# Shapes of HookedTransformerConfig.
SHAPES: dict[str, dict[str, Any]] = {
    "4 layers, d_model 256": {"n_layers": 4, "d_model": 256, "n_ctx": 16, "d_head": 32, "n_heads": 8, "d_mlp": 1024, "d_vocab": 1000},
    "gpt2-small": {"n_layers": 12, "d_model": 768, "n_ctx": 1024, "d_head": 64, "n_heads": 12, "d_mlp": 3072, "d_vocab": 50257},
}


def random_model(shape: str, device: str, *, seed: int = 0) -> Model:
    """A model of that shape whose weights are drawn from the seed, scaled so that activations stay of order one."""
    config = {**SHAPES[shape], "act_fn": "gelu_new", "normalization_type": "LN", "positional_embedding_type": "standard"}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in _parameter_shapes(config).items():
        fan = 1 if name.endswith(("W_E", "W_pos")) or len(size) == 1 else size[-2]
        weights[name] = torch.randn(size, generator=generator) / fan**0.5 if len(size) > 1 else torch.full(size, float(name.endswith(".w")))
    return build_model(config, weights, device=device)


def random_task(model: Model, prompts: int, tokens: int, *, seed: int = 0) -> circuits.Task:
    """Random prompts, corrupted in every fourth token, scored at the last by a logit difference."""
    generator = torch.Generator().manual_seed(seed)
    clean, other = (torch.randint(model.cfg.d_vocab, (prompts, tokens), generator=generator) for _ in range(2))
    corrupted = torch.where(torch.arange(tokens) % 4 == 0, other, clean)
    answers = torch.stack([torch.randperm(model.cfg.d_vocab, generator=generator)[:2] for _ in range(prompts)])
    return circuits.Task.from_tokens(clean, corrupted, answers[:, 0], answers[:, 1], name="random").to(model.cfg.device)


def _parameter_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        settings = HookedTransformerConfig(**config, init_weights=False, device="meta")
        return {name: parameter.shape for name, parameter in Model(settings, move_to_device=False).named_parameters()}


def paired_times(programs: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every repetition, the programs taking turns after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repetition in range(repeats + 1):
        for name, program in programs.items():
            _wait(device)
            start = time.perf_counter()
            program()
            _wait(device)
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """The median over repetitions of one program's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def most_allocated(program: Callable[[], object], device: str) -> int:
    """The most bytes that torch's allocator gave out at one time, above what it had given out before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        program()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        program()
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def circumstances(device: str) -> dict[str, Any]:
    """Hardware, versions and commit."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu, "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _cpu() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of this checkout, with `+` when files differ from it; None outside of a checkout."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")

"""Attribution graphs against circuit-tracer 0.5.0, on the same weights and tokens.

    python experiments/benchmarks/attribution_graph.py --venvs peers \\
        --out experiments/benchmarks/results/attribution-graph-cpu.json

Both compute the full graph, with every active feature as a target, in separate processes that take
turns on one thread. circuit-tracer pins older versions, so its environment is made in `--venvs`.
The time is that of the call that returns the graph, after one warm-up call. Memory is the growth of
the process's peak after loading. A second table shows our time and memory by prompt length and
number of active features.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import circumstances, clocked, most_allocated, random_model, write_results
from eap_peers import environment
from safetensors.torch import load_file, save_file

import circuits
from circuits.models import Model
from circuits.transcoders.activations import JumpReLU
from circuits.transcoders.transcoder import Encoder, Transcoders

# The cases of the tests, and a larger random model.
PUBLISHED = {
    "case: 3 layers, d_model 64": "attribution_graph_case",
    "case: 4 layers, d_model 128": "attribution_graph_case_large",
}
SIZES: dict[str, dict[str, int]] = {
    "random: 4 layers, d_model 128": {
        "n_layers": 4,
        "d_model": 128,
        "n_heads": 4,
        "d_head": 32,
        "d_mlp": 512,
        "d_vocab": 1000,
        "n_ctx": 128,
    },
    "random: 8 layers, d_model 512": {
        "n_layers": 8,
        "d_model": 512,
        "n_heads": 8,
        "d_head": 64,
        "d_mlp": 2048,
        "d_vocab": 1000,
        "n_ctx": 128,
    },
}
FEATURES = {"random: 4 layers, d_model 128": 1024, "random: 8 layers, d_model 512": 512}
COMPARED = (*PUBLISHED, "random: 8 layers, d_model 512")
SHAPE = (
    "n_layers",
    "d_model",
    "n_heads",
    "d_head",
    "d_mlp",
    "d_vocab",
    "n_ctx",
    "act_fn",
    "normalization_type",
    "eps",
)
DATA = Path(__file__).parents[2] / "tests" / "data"
# circuit-tracer's time depends on how many targets it takes at once: its default, and fewer.
PROGRAMS = {"ours": 0, "circuit-tracer": 512, "circuit-tracer, batch 64": 64}


@dataclass(frozen=True)
class Config:
    """Sizes and repetitions."""

    venvs: Path
    """Folder outside of the project for circuit-tracer's environment.

    It is made there, or found from an earlier run.
    """
    tokens: int = 16
    """Tokens of the prompt."""
    active: float = 0.05
    """Share of features that are active at each position."""
    repeats: int = 3
    """Timed repetitions, after one warm-up."""
    constraint: str = "torch==2.13.0"
    """A torch version that both environments share."""
    out: Path = Path("runs/benchmarks/attribution-graph.json")
    """Result file."""


def main(config: Config) -> None:
    torch.set_num_threads(1)
    config.venvs.mkdir(parents=True, exist_ok=True)
    python = environment(config, "circuit-tracer", ["circuit-tracer==0.5.0", "safetensors"])  # type: ignore[arg-type]
    results: dict[str, Any] = {
        **circumstances("cpu"),
        "tokens": config.tokens,
        "active": config.active,
        "cases": [],
        "alone": [],
    }
    for name in COMPARED:
        folder = write_case(
            config.venvs / "graph-case",
            *(published(name) if name in PUBLISHED else case(name, config.tokens, config.active)),
        )
        results["cases"].append({"case": name, **compare(python, folder, config.repeats)})
        print(json.dumps(results["cases"][-1], indent=1))
        write_results(config.out, results)
    for size, length, active in [
        (size, length, active)
        for size in SIZES
        for length, active in ((16, 0.05), (32, 0.05), (64, 0.05), (64, 0.02))
    ]:
        results["alone"].append(alone(size, length, active))
        print(json.dumps(results["alone"][-1]))
        write_results(config.out, results)


Case = tuple[dict[str, Any], Model, Transcoders, torch.Tensor]
"""The model's configuration, the model, its transcoders and the prompt."""


def published(name: str) -> Case:
    """A test case: weights and tokens for which circuit-tracer's graph is known."""
    folder = DATA / PUBLISHED[name]
    content, weights = (
        json.loads((folder / "expected.json").read_text()),
        load_file(folder / "case.safetensors"),
    )
    config = {part: content["config"][part] for part in SHAPE}
    model = circuits.build_model(
        config,
        {
            key.removeprefix("model."): part
            for key, part in weights.items()
            if key.startswith("model.")
        },
        device="cpu",
    )
    parts = zip(weights["clt.W_enc"], weights["clt.b_enc"], weights["clt.threshold"], strict=True)
    encoders = [Encoder(weight, bias, JumpReLU(threshold)) for weight, bias, threshold in parts]
    decoders = [weights[f"clt.W_dec_{layer}"] for layer in range(len(encoders))]
    return (
        config,
        model,
        Transcoders(encoders, decoders, list(weights["clt.b_dec"])),
        weights["tokens"].long(),
    )


def case(size: str, tokens: int, active: float) -> Case:
    """A random model and cross-layer transcoder, with the given share of active features."""
    model = random_model(SIZES[size], "cpu")
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, model.cfg.d_vocab, (tokens,), generator=generator)
    prompt[0] = 1
    layers, width, n = model.cfg.n_layers, model.cfg.d_model, FEATURES[size]
    _, cache = model.run_with_cache(prompt[None])
    encoders = []
    for layer in range(layers):
        weight = torch.randn(n, width, generator=generator) / width**0.5
        pre = cache[f"blocks.{layer}.hook_resid_mid"][0, 1:] @ weight.T
        encoders.append(
            Encoder(
                weight,
                torch.zeros(n),
                JumpReLU(pre.quantile(1 - active).clamp(min=0.0).expand(n).clone()),
            )
        )
    decoders = [
        torch.randn(n, layers - layer, width, generator=generator) * 0.2 / width**0.5
        for layer in range(layers)
    ]
    config = {
        **SIZES[size],
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
    }
    return config, model, Transcoders(encoders, decoders, [torch.zeros(width)] * layers), prompt


def write_case(
    folder: Path,
    config: dict[str, Any],
    model: Model,
    transcoders: Transcoders,
    tokens: torch.Tensor,
) -> Path:
    """Write weights in published formats, and tokens, for both programs to read."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "clt").glob("*"):
        old.unlink()
    circuits.save_transcoders(transcoders, folder / "clt")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()},
        folder / "model.safetensors",
    )
    write_results(folder / "case.json", {"config": config, "tokens": tokens.tolist()})
    return folder


def compare(python: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Time and memory of both programs, and the difference of their adjacency matrices."""
    answers = {
        name: folder / f"{name.replace(', ', '-').replace(' ', '-')}.json" for name in PROGRAMS
    }
    processes = {
        name: started(python if batch else Path(sys.executable), batch, folder, answers[name])
        for name, batch in PROGRAMS.items()
    }
    took: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(repeats + 1):
        for name in PROGRAMS:
            took[name].append(again(processes[name]))
    for process in processes.values():
        process.communicate("stop\n")
    found = {name: load_file(answers[name].with_suffix(".safetensors")) for name in PROGRAMS}
    theirs, ours = (found[name]["adjacency"] for name in ("circuit-tracer", "ours"))
    seconds = {
        name: {clock: [one[clock] for one in each[1:]] for clock in ("wall", "cpu")}
        for name, each in took.items()
    }
    return {
        "versions": json.loads(answers["circuit-tracer"].read_text())["versions"],
        **json.loads(answers["ours"].read_text()),
        "same_features": torch.equal(
            found["ours"]["features"].long(), found["circuit-tracer"]["features"].long()
        ),
        "largest_difference": float((ours - theirs).abs().max()),
        "largest_edge": float(theirs.abs().max()),
        "seconds": seconds,
        "times_slower": {
            name: {clock: ratio(seconds, name, clock) for clock in ("wall", "cpu")}
            for name in PROGRAMS
            if name != "ours"
        },
        # The first call takes the memory; later ones use it again.
        "peak_above_loaded_bytes": {
            name: each[0]["peak_above_loaded_bytes"] for name, each in took.items()
        },
    }


def ratio(seconds: dict[str, dict[str, list[float]]], name: str, clock: str) -> float:
    """The median over repetitions of a program's time divided by ours."""
    return statistics.median(
        b / a for a, b in zip(seconds["ours"][clock], seconds[name][clock], strict=True)
    )


def started(python: Path, batch: int, folder: Path, answer: Path) -> subprocess.Popen[str]:
    """Start a program that waits for lines: ours, or circuit-tracer with a batch size."""
    script = (
        Path(__file__).parent / "peers" / ("circuit_tracer_graph.py" if batch else "our_graph.py")
    )
    command = [str(python), "-W", "ignore", str(script), str(folder), str(answer), str(batch)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=threads,
    )


def again(process: subprocess.Popen[str]) -> dict[str, float]:
    """One repetition."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    print("again", file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("took "):
            return json.loads(line.removeprefix("took "))
    raise RuntimeError(process.stderr.read()[-3000:])


def alone(size: str, length: int, active: float) -> dict[str, Any]:
    """Our time and memory at one prompt length and one share of active features."""
    _, model, transcoders, tokens = case(size, length, active)
    method = circuits.AttributionGraph(transcoders)
    method.attribute(model, tokens)
    graph, took = clocked(lambda: method.attribute(model, tokens), "cpu")
    memory = most_allocated(lambda: method.attribute(model, tokens), "cpu")
    features = int((graph.nodes.kind == 0).sum())
    return {
        "case": size,
        "tokens": length,
        "active": active,
        "features": features,
        "edges": len(graph),
        "seconds": took,
        "peak_bytes": memory,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))

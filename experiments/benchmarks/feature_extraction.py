"""How long does it take to find the active features, against published loops and the hardware?

    python experiments/benchmarks/feature_extraction.py --threads 1 \\
        --out experiments/benchmarks/results/feature-extraction-cpu.json
    python experiments/benchmarks/feature_extraction.py --device cuda  # the published size

Five programs take turns in one process and must find the same nodes:

- the published loop over layers and positions, which reads each number with `.item()`;
- the same with one `.tolist()` per position;
- its authors' later version, vectorised over positions;
- that version with a list of Python tuples as its result, like the loops;
- ours.

The floor is the larger of two times: that of the matrix products at the speed of one large product,
and that of reading weights and hidden states and writing the result at the speed of a copy. Product
and copy take turns with the programs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from common import circumstances, clocked, most_allocated, write_results

from circuits.transcoders.activations import ReLU
from circuits.transcoders.extraction import ExtractedFeatures, extract_features
from circuits.transcoders.transcoder import Encoder, Transcoders


@dataclass(frozen=True)
class Size:
    """Size of the case, and its precision."""

    layers: int
    features: int
    d_model: int
    positions: int
    dtype: str
    product: int
    """Rows and columns of the large product."""
    copy: int
    """Bytes of the copy."""


SIZES = {
    "reduced": Size(4, 4096, 512, 128, "float32", 1024, 1 << 28),
    # 23 layers of Qwen2.5-32B, as published with "4.8x faster feature extraction".
    "published": Size(23, 12288, 5120, 256, "bfloat16", 8192, 1 << 32),
}
SLOWEST = "loop, .item()"
# What is added to every pre-activation, of standard deviation one: more than `top_k` features fire
# at each position, or about one in a hundred.
BIASES = {"many fire": -0.5, "one in a hundred fires": -2.33}


@dataclass(frozen=True)
class Config:
    """Device, size and repetitions."""

    device: str = "cpu"
    """Device of weights and hidden states."""
    threads: int = 1
    """torch threads, for all programs."""
    repeats: int = 9
    """Timed repetitions, after one warm-up."""
    loop_repeats: int = 3
    """Repetitions of the `.item()` loop, which takes seconds on a GPU."""
    size: Literal["auto", "reduced", "published"] = "auto"
    """auto: the published size on a GPU, a reduced size on a CPU."""
    top_k: int = 50
    """Largest number of features per position and layer."""
    threshold: float = 0.01
    """Smallest activation of a feature."""
    out: Path = Path("runs/benchmarks/feature-extraction.json")
    """Result file."""


Nodes = list[tuple[int, int, int, float]]
States = dict[int, torch.Tensor]


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    on_gpu = torch.device(config.device).type == "cuda"
    name = config.size if config.size != "auto" else "published" if on_gpu else "reduced"
    results: dict[str, Any] = {
        "config": {**asdict(config), "size": name, "out": None},
        **circumstances(config.device),
        "cases": [],
    }
    for case, bias in BIASES.items():
        results["cases"].append(
            {"case": case, **asdict(SIZES[name]), **measure(SIZES[name], bias, config)}
        )
        write_results(config.out, results)
        show(results["cases"][-1])


@torch.no_grad()
def measure(size: Size, bias: float, config: Config) -> dict[str, Any]:
    """Seconds of every repetition of programs and floor, and what the programs find."""
    transcoders, states = random_case(size, bias, config.device)
    programs = extractors(transcoders, states, config)
    found = {name: as_nodes(program()) for name, program in programs.items()}
    same = {name: compared(nodes, found[SLOWEST], size) for name, nodes in found.items()}
    if wrong := {name: each for name, each in same.items() if each["beyond_rounding"]}:
        raise SystemExit(f"nodes differ by more than rounding: {wrong}")
    n = size.product
    left, right = (
        torch.randn(n, n, device=config.device).to(getattr(torch, size.dtype)) for _ in range(2)
    )
    source = torch.zeros(size.copy // 4, device=config.device)
    goal = torch.empty_like(source)
    hardware: dict[str, Callable[[], Any]] = {
        "large product": lambda: left @ right,
        "copy": lambda: goal.copy_(source),
    }
    seconds = in_turns({**programs, **hardware}, config)
    return {
        "nodes": len(found["ours"]),
        "compared_with_the_loop": same,
        "floor": floor(size, config, seconds, len(found["ours"])),
        "memory": {
            name: most_allocated(programs[name], config.device) for name in ("vectorised", "ours")
        },
        "seconds": seconds,
    }


def random_case(size: Size, bias: float, device: str) -> tuple[Transcoders, States]:
    """Random encoders and hidden states; pre-activations have variance one and mean `bias`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    dtype = getattr(torch, size.dtype)
    encoders = [
        Encoder(
            (normal(size.features, size.d_model) / size.d_model**0.5).to(dtype),
            torch.full((size.features,), bias, dtype=dtype, device=device),
            ReLU(),
        )
        for _ in range(size.layers)
    ]
    nothing = torch.zeros(1, 1, size.d_model, dtype=dtype, device=device)
    decoders = [nothing.expand(size.features, 1, size.d_model)] * size.layers
    states = {
        layer: normal(1, size.positions, size.d_model).to(dtype) for layer in range(size.layers)
    }
    return Transcoders(encoders, decoders, [nothing[0, 0]] * size.layers), states


def extractors(
    transcoders: Transcoders, states: States, config: Config
) -> dict[str, Callable[[], Any]]:
    """The programs to compare, by name."""
    k, threshold = config.top_k, config.threshold
    weights = [(encoder.weight, encoder.bias) for encoder in transcoders.encoders]

    def loop() -> Nodes:
        nodes = []
        for layer, (weight, bias) in enumerate(weights):
            for position in range(states[layer].shape[1]):
                values, indices = torch.topk(
                    torch.relu(weight @ states[layer][0, position] + bias), k
                )
                for rank in range(k):
                    if values[rank].item() >= threshold:
                        nodes.append(
                            (layer, position, int(indices[rank].item()), float(values[rank].item()))
                        )
        return nodes

    def loop_of_lists() -> Nodes:
        nodes = []
        for layer, (weight, bias) in enumerate(weights):
            for position in range(states[layer].shape[1]):
                values, indices = torch.topk(
                    torch.relu(weight @ states[layer][0, position] + bias), k
                )
                pairs = zip(indices.tolist(), values.tolist(), strict=True)
                nodes += [
                    (layer, position, index, value) for index, value in pairs if value >= threshold
                ]
        return nodes

    def vectorised() -> tuple[torch.Tensor, ...]:
        parts = []
        for layer, (weight, bias) in enumerate(weights):
            values, indices = torch.topk(torch.relu(states[layer][0] @ weight.T + bias), k, dim=-1)
            position, rank = torch.where(values >= threshold)
            parts.append(
                (
                    torch.full_like(position, layer),
                    position,
                    indices[position, rank],
                    values[position, rank],
                )
            )
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    return {
        SLOWEST: loop,
        "loop, .tolist()": loop_of_lists,
        "vectorised": vectorised,
        "vectorised, Python list": lambda: as_nodes(vectorised()),
        "ours": lambda: extract_features(states, transcoders, k, threshold),
    }


def as_nodes(found: Nodes | tuple[torch.Tensor, ...] | ExtractedFeatures) -> Nodes:
    """A program's result as (layer, position, index, activation) tuples."""
    if isinstance(found, list):
        return found
    columns = (
        (found.layer, found.position, found.index, found.activation)
        if isinstance(found, ExtractedFeatures)
        else found
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


def compared(nodes: Nodes, reference: Nodes, size: Size) -> dict[str, Any]:
    """Compare two results.

    Returns how many nodes only one of them has, and how many of those rounding does not explain; it
    can change which feature is the k-th largest.
    """
    mine, theirs = ({node[:3]: node[3] for node in each} for each in (nodes, reference))
    tolerance = 8 * torch.finfo(getattr(torch, size.dtype)).eps
    least: dict[tuple[int, int], float] = {}
    for (layer, position, _), value in theirs.items():
        least[layer, position] = min(value, least.get((layer, position), value))
    either = mine | theirs
    different = mine.keys() ^ theirs.keys()
    beyond = [
        node
        for node in different
        if abs(either[node] - least.get(node[:2], 0.0)) > tolerance * max(1.0, either[node])
    ]
    largest = max(
        (abs(mine[node] - theirs[node]) for node in mine.keys() & theirs.keys()), default=0.0
    )
    return {
        "nodes_that_differ": len(different),
        "beyond_rounding": len(beyond),
        "largest_difference": largest,
    }


def in_turns(
    programs: dict[str, Callable[[], Any]], config: Config
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repetition by both clocks; programs take turns, after one warm-up turn."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "cpu": []} for name in programs
    }
    for repetition in range(config.repeats + 1):
        for name, program in programs.items():
            # The slow loop has run once already, to be compared with.
            if name == SLOWEST and not 1 <= repetition <= config.loop_repeats:
                continue
            for clock, value in clocked(program, config.device)[1].items():
                if repetition:
                    seconds[name][clock].append(value)
    return seconds


def floor(
    size: Size, config: Config, seconds: dict[str, dict[str, list[float]]], nodes: int
) -> dict[str, float]:
    """Operations, bytes, speeds, and the smallest possible time."""
    clock = the_clock(config.device)
    width = getattr(torch, size.dtype).itemsize
    flop = 2 * size.layers * size.features * size.d_model * size.positions
    # Weights and hidden states are read once; of each node three numbers of 8 bytes and its
    # activation are written.
    moved = size.layers * (size.features + size.positions) * size.d_model * width + nodes * (
        3 * 8 + width
    )
    flop_per_second = 2 * size.product**3 / statistics.median(seconds["large product"][clock])
    bytes_per_second = 2 * size.copy / statistics.median(seconds["copy"][clock])
    products, traffic = flop / flop_per_second, moved / bytes_per_second
    return {
        "flop": flop,
        "bytes": moved,
        "flop_per_second": flop_per_second,
        "bytes_per_second": bytes_per_second,
        "seconds_of_products": products,
        "seconds_of_traffic": traffic,
        "seconds": max(products, traffic),
    }


def the_clock(device: str) -> str:
    """CPU time on a CPU, since other programs lengthen wall-clock time there."""
    return "wall" if torch.device(device).type == "cuda" else "cpu"


def show(case: dict[str, Any]) -> None:
    """Show one case as a table."""
    least = case["floor"]["seconds"]
    print(
        f"\n{case['case']}: {case['layers']} layers of {case['features']:,} features, d_model "
        f"{case['d_model']}, {case['positions']} positions, "
        f"{case['dtype']}: {case['nodes']:,} nodes; floor {1e3 * least:.2f} ms "
        f"({case['floor']['flop'] / 1e12:.3f} TFLOP at "
        f"{case['floor']['flop_per_second'] / 1e12:.2f} TFLOP/s, "
        f"{case['floor']['bytes'] / 1e9:.3f} GB at "
        f"{case['floor']['bytes_per_second'] / 1e9:.1f} GB/s)"
    )
    rows = {}
    for name, clocks in case["seconds"].items():
        wall, cpu = (1e3 * statistics.median(clocks[clock]) for clock in ("wall", "cpu"))
        differ = case["compared_with_the_loop"].get(name, {}).get("nodes_that_differ")
        rows[name] = {
            "wall ms": wall,
            "CPU ms": cpu,
            "CPU / floor": cpu / 1e3 / least,
            "nodes that differ": differ,
        }
    print(pd.DataFrame(rows).T.round(2).to_string())


if __name__ == "__main__":
    main(tyro.cli(Config))

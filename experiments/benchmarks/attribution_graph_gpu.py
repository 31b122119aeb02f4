"""How long does a graph take on a model of Gemma-2-2b's shape?

    python experiments/benchmarks/attribution_graph_gpu.py --device cuda \\
        --out experiments/benchmarks/results/gemma-graph-NAME.json
    python experiments/benchmarks/attribution_graph_gpu.py       # a reduced size, on a CPU

16,384 features a layer, 64 tokens and 7,500 targets. The weights of model and transcoders are
random; thresholds are set so that the given share of features is active. Targets are chosen by
influence, in steps or all at once, in float32 and in TF32. The floor is the time of all matrix
products at the speed of one large product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import circumstances, clocked, most_allocated, write_results
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import HookedTransformer, HookedTransformerConfig

import circuits
from circuits.models import Model, frozen, mlp_residual_hook, run_to_residual
from circuits.models.source_outputs import keepers
from circuits.transcoders.activations import JumpReLU
from circuits.transcoders.transcoder import Encoder, Transcoders

GEMMA = {
    "act_fn": "gelu_pytorch_tanh",
    "normalization_type": "RMS",
    "gated_mlp": True,
    "positional_embedding_type": "rotary",
    "use_normalization_before_and_after": True,
    "attn_scores_soft_cap": 50.0,
    "output_logits_soft_cap": 30.0,
}
FULL = {
    "n_layers": 26,
    "d_model": 2304,
    "n_heads": 8,
    "n_key_value_heads": 4,
    "d_head": 256,
    "rotary_dim": 256,
    "d_mlp": 9216,
    "d_vocab": 256000,
}
REDUCED = {
    "n_layers": 6,
    "d_model": 256,
    "n_heads": 8,
    "n_key_value_heads": 4,
    "d_head": 32,
    "rotary_dim": 32,
    "d_mlp": 1024,
    "d_vocab": 4000,
}


@dataclass(frozen=True)
class Config:
    """Sizes and repetitions."""

    device: str = "cpu"
    """The full size on cuda, a reduced size on cpu."""
    tokens: int = 64
    """Tokens of the prompt."""
    targets: int = 7500
    """Features with incoming edges; a tenth of it at the reduced size."""
    active: float = 0.005
    """Share of active features: 80 of 16,384."""
    dtype: str = "float32"
    """Of model and transcoders."""
    repeats: int = 3
    """Timed repetitions, after one warm-up."""
    out: Path = Path("runs/benchmarks/gemma-graph.json")
    """Result file."""


@torch.no_grad()
def main(config: Config) -> None:
    full, dtype = torch.device(config.device).type == "cuda", getattr(torch, config.dtype)
    sizes, features, targets = (
        (FULL, 16384, config.targets) if full else (REDUCED, 2048, config.targets // 10)
    )
    generator = torch.Generator(config.device).manual_seed(0)
    model = random_model(sizes, config.device, dtype, generator)
    tokens = torch.randint(
        model.cfg.d_vocab, (config.tokens,), generator=generator, device=config.device
    )
    transcoders = random_transcoders(model, tokens, features, config.active, generator)
    results: dict[str, Any] = {
        **circumstances(config.device),
        "sizes": sizes,
        "features": features,
        "dtype": config.dtype,
        "runs": [],
    }
    for at_a_time, tf32 in ((1024, False), (targets, False), *([(targets, True)] if full else [])):
        method = circuits.AttributionGraph(transcoders, budget=targets, at_a_time=at_a_time)
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
        found = measured(lambda method=method: method.attribute(model, tokens), config)
        torch.backends.cuda.matmul.allow_tf32 = before
        results["runs"].append(
            {
                "targets": targets,
                "at_a_time": at_a_time,
                "tokens": config.tokens,
                "allow_tf32": tf32,
                **found,
            }
        )
        print(results["runs"][-1], flush=True)
        write_results(config.out, results)


def measured(program: Callable[[], circuits.FeatureGraph], config: Config) -> dict[str, Any]:
    """Graph size, time, memory, and the time of its products at the speed of one large product."""
    took = [clocked(program, config.device) for _ in range(config.repeats + 1)][1:]
    graph = took[0][0]
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: in_place}
    ) as counter:
        program()
    # Whatever the model's precision, all is in float32 from where the graph begins.
    left, right = (torch.randn(4096, 4096, device=config.device) for _ in range(2))
    products = [
        clocked(lambda: left @ right, config.device)[1]["wall"] for _ in range(config.repeats + 1)
    ][1:]
    rate = 2 * 4096**3 / statistics.median(products)
    floor = {
        "flop": counter.get_total_flops(),
        "flop_per_second": rate,
        "seconds": counter.get_total_flops() / rate,
    }
    return {
        "nodes": len(graph.nodes),
        "edges": len(graph),
        "seconds": [seconds for _, seconds in took],
        "floor": floor,
        "peak_bytes": most_allocated(program, config.device),
    }


def in_place(into: torch.Size, left: torch.Size, right: torch.Size, **rest: Any) -> int:
    """Count the operations of `addmm_`, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def random_model(
    sizes: dict[str, int], device: str, dtype: torch.dtype, generator: torch.Generator
) -> Model:
    """Made on the device, to avoid copying two billion numbers."""
    model = HookedTransformer(
        HookedTransformerConfig(
            **GEMMA, **sizes, n_ctx=128, init_weights=False, device=device, dtype=dtype
        )
    )
    for name, parameter in model.named_parameters():
        fan = 1 if name.endswith("W_E") else parameter.shape[-2] if parameter.dim() > 1 else 1
        parameter.normal_(
            0.0, fan**-0.5, generator=generator
        ) if parameter.dim() > 1 else parameter.fill_(float(name.endswith(".w")))
    return model.eval()


def random_transcoders(
    model: Model, tokens: torch.Tensor, features: int, active: float, generator: torch.Generator
) -> Transcoders:
    """Per layer and reading after the norm, like the published ones for this model."""
    seen: dict[str, torch.Tensor] = {}
    layers, width = range(model.cfg.n_layers), model.cfg.d_model
    names = [mlp_residual_hook(model, layer) for layer in layers]
    with frozen(model):
        run_to_residual(
            model,
            tokens[None],
            torch.ones_like(tokens[None], dtype=torch.bool),
            keepers(seen, names),
        )
    like = {"device": tokens.device, "dtype": model.cfg.dtype}
    encoders, decoders = [], []
    for name in names:
        residual = seen[name][0, 1:].float()
        normed = (residual / residual.square().mean(-1, keepdim=True).sqrt()).to(model.cfg.dtype)
        weight = torch.randn(features, width, generator=generator, **like) * width**-0.5
        pre = (normed @ weight.T).float()
        threshold = pre.flatten().kthvalue(int(pre.numel() * (1 - active))).values.expand(features)
        encoders.append(
            Encoder(
                weight,
                torch.zeros(features, **like),
                JumpReLU(threshold.to(model.cfg.dtype).clone()),
            )
        )
        decoders.append(
            torch.randn(features, 1, width, generator=generator, **like) * 0.2 * width**-0.5
        )
    return Transcoders(
        encoders, decoders, [torch.zeros(width, **like)] * len(names), reads="normalized"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

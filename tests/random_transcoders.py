"""Random transcoders for random models: about one feature in eight fires."""

from typing import Any

import torch
from architectures import ARCHITECTURES, random_model

from circuits.models import Model
from circuits.transcoders.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from circuits.transcoders.transcoder import Encoder, Transcoders

KINDS = ("plt", "skip-plt", "clt", "skip-clt")

# Architectures with MLPs, and those whose residual stream is no sum of components, which the local
# replacement model can follow all the same.
WITH_MLPS: dict[str, dict[str, Any]] = {
    name: config for name, config in ARCHITECTURES.items() if name != "attention_only"
} | {
    "gemma2": {
        **ARCHITECTURES["gemma"],
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 9.0,
    },
    "sinks": {**ARCHITECTURES["llama"], "use_attention_sinks": True},
}


def model_of(architecture: str, **changes: Any) -> Model:
    if architecture == "local_attention" and "n_layers" in changes:
        changes["attn_types"] = (["global", "local"] * changes["n_layers"])[: changes["n_layers"]]
    base = architecture if architecture in ARCHITECTURES else "gpt2"
    return random_model(
        base, **{**({} if architecture in ARCHITECTURES else WITH_MLPS[architecture]), **changes}
    )


def random_transcoders(
    model: Model,
    kind: str = "plt",
    *,
    features: int = 40,
    activation: str = "jump_relu",
    reads: str | None = None,
    seed: int = 3,
) -> Transcoders:
    layers, width = model.cfg.n_layers, model.cfg.d_model
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def fires(layer: int) -> Activation:
        match activation:
            case "relu":
                return ReLU()
            case "topk":
                return TopK(5)
            case "batch_topk":
                return BatchTopK(5)
        return JumpReLU(drawn(features).abs() * 0.3 + 1.0)

    across = kind.endswith("clt")
    return Transcoders(
        encoders=[
            Encoder(
                drawn(features, width, scale=width**-0.5), drawn(features, scale=0.3), fires(layer)
            )
            for layer in range(layers)
        ],
        decoders=[
            drawn(features, layers - layer if across else 1, width, scale=0.5)
            for layer in range(layers)
        ],
        decoder_biases=[drawn(width, scale=0.3) for _ in range(layers)],
        skips=[drawn(width, width, scale=0.3 * width**-0.5) for _ in range(layers)]
        if kind.startswith("skip")
        else None,
        reads=reads or ("residual" if across else "mlp_input"),
        writes="residual" if across else "mlp",
        name=f"random {kind}",
    )

"""Small random models of every supported shape, and tasks of random tokens for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from zoo import bridge_to, hugging_face_model

from circuits.models import HAS_HOOKED_TRANSFORMER, Model
from circuits.models.loading import native
from circuits.models.loading.placement import Placement
from circuits.tasks.task import Task

if HAS_HOOKED_TRANSFORMER:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

of_hooked_transformers = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="about the inside of a HookedTransformer"
)

VOCAB = 50

SMALL = {
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 4,
    "d_head": 6,
    "d_mlp": 32,
    "n_ctx": 16,
    "d_vocab": VOCAB,
    "act_fn": "gelu",
}
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 6}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"normalization_type": "LN"},
    "folded_norms": {"normalization_type": "LNPre"},
    "no_norms": {"normalization_type": None},
    "attention_only": {
        "normalization_type": "LN",
        "attn_only": True,
        "d_mlp": None,
        "act_fn": None,
    },
    "pythia": {
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 2,
    },
    "gptj": {
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "rotary_adjacent_pairs": True,
        **ROTARY,
    },
    "llama": {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "silu",
        "n_key_value_heads": 2,
        "final_rms": True,
        **ROTARY,
    },
    "qwen3": {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "silu",
        "n_key_value_heads": 2,
        "use_qk_norm": True,
        **ROTARY,
    },
    "gemma": {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "gelu_new",
        "n_key_value_heads": 1,
        **ROTARY,
    },
    "soft_caps": {
        "normalization_type": "RMS",
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 3.0,
        **ROTARY,
    },
    "alibi": {"normalization_type": "LN", "positional_embedding_type": "alibi"},
    "local_attention": {
        "normalization_type": "LN",
        "use_local_attn": True,
        "window_size": 4,
        "attn_types": ["global", "local"],
    },
    "bidirectional": {"normalization_type": "LN", "attention_dir": "bidirectional"},
}


# For versions of TransformerLens that do not build them: the same architectures in Hugging Face's
# transformers, and what their settings are called.
SETTINGS = {
    "d_vocab": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_key_value_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "n_ctx": "max_position_embeddings",
}
OF_GPTJ = SETTINGS | {
    "d_model": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "d_mlp": "n_inner",
    "n_ctx": "n_positions",
}
OF_GPT_NEO = SETTINGS | {"n_layers": "num_layers", "n_heads": "num_heads"}
UNTIED = {"tie_word_embeddings": False}
THIRD = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1 / 3}
HUGGING_FACE: dict[str, tuple[Callable[..., Any], dict[str, str], dict[str, Any]]] = {
    "pythia": (transformers.GPTNeoXConfig, SETTINGS, {"rope_parameters": THIRD}),
    "gptj": (transformers.GPTJConfig, OF_GPTJ, {"rotary_dim": 6}),
    "llama": (transformers.LlamaConfig, SETTINGS, {}),
    "qwen3": (transformers.Qwen3Config, SETTINGS, {}),
    "gemma": (transformers.GemmaConfig, SETTINGS, {}),
    "alibi": (transformers.BloomConfig, SETTINGS, {}),
    "local_attention": (transformers.GPTNeoConfig, OF_GPT_NEO, {"window_size": 4}),
}
# What these configurations say otherwise, or always.
IMPLIED = {
    "normalization_type", "parallel_attn_mlp", "positional_embedding_type", "rotary_dim", "act_fn",
    "rotary_adjacent_pairs", "gated_mlp", "final_rms", "use_qk_norm", "use_local_attn",
    "window_size", "attn_types",
}  # fmt: skip
BEFORE = ("embed.W_E", "pos_embed.W_pos")
AFTER = ("ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U")
IN_BLOCK = (
    "ln1.w", "ln1.b", "ln2.w", "ln2.b", "attn.W_Q", "attn.W_O", "attn.b_Q", "attn.b_O", "attn.W_K",
    "attn.W_V", "attn.b_K", "attn.b_V", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out",
)  # fmt: skip


def random_model(
    architecture: str = "gpt2", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Model:
    """A model with random weights and biases, large enough that every component matters.

    Where TransformerLens has no HookedTransformer it is a bridge: of the same model if
    TransformerLens builds it, of one of the same architecture in Hugging Face's transformers if
    there is one, and else the test is skipped.
    """
    config = {**SMALL, **ARCHITECTURES[architecture], **changes}
    if HAS_HOOKED_TRANSFORMER:
        given = {**config, "init_weights": False, "device": "cpu", "dtype": dtype}
        hooked = HookedTransformer(HookedTransformerConfig(**given))
        fill(dict(hooked.named_parameters()), config, seed)
        return hooked.eval()
    if architecture in HUGGING_FACE:
        return bridge_to(of_hugging_face(architecture, config, seed, dtype))
    skip_if_lacked(config)
    model = native.build(config, None, Placement(torch.device("cpu"), dtype))
    fill(dict(sorted(native.weights_of(model).items(), key=order)), config, seed)
    return model


def skip_if_lacked(config: dict[str, Any]) -> None:
    """Skip a test of a model that this version of TransformerLens does not build."""
    allowed = {} if HAS_HOOKED_TRANSFORMER else native.LACKED
    for name, plain in allowed.items():
        if config.get(name, plain[0]) not in plain:
            pytest.skip(f"no {name}={config[name]} in this version of TransformerLens")


def of_hugging_face(
    architecture: str, config: dict[str, Any], seed: int, dtype: torch.dtype
) -> Any:
    kind, names, settings = HUGGING_FACE[architecture]
    unknown = set(config) - set(names) - IMPLIED
    if unknown:
        pytest.skip(f"no {architecture} with {unknown} in this version of TransformerLens")
    sizes = {name: config[ours] for ours, name in names.items() if ours in config}
    if architecture == "local_attention":
        settings = {**settings, "attention_types": [[[kind], 1] for kind in config["attn_types"]]}
    return hugging_face_model(kind(**sizes, **settings, **UNTIED), seed=seed, dtype=dtype)


def order(item: tuple[str, Tensor]) -> tuple[int, int, int]:
    """Where a parameter is in a HookedTransformer, so that it has the same random numbers."""
    name, _ = item
    if name.startswith("blocks."):
        _, layer, rest = name.split(".", 2)
        return 1, int(layer), IN_BLOCK.index(rest)
    names = (
        "embed.W_E",
        "pos_embed.W_pos",
        "ln_final.w",
        "ln_final.b",
        "unembed.W_U",
        "unembed.b_U",
    )
    return (0 if "embed.W_" in name and name != "unembed.W_U" else 2), 0, names.index(name)


def weight(model: Model, name: str) -> Tensor:
    """A weight by its name in a HookedTransformer, to be read or changed in place."""
    if native.is_native(model):
        return native.weights_of(model)[name].detach()
    return model.get_parameter(name).detach()


@torch.no_grad()
def fill(parameters: dict[str, Tensor], config: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        fan = parameter.shape[-2] if parameter.dim() > 1 else 25
        # Without norms the residual stream grows from layer to layer.
        scale = (
            1.0
            if name.endswith(("W_E", "W_pos"))
            else (0.5 if config["normalization_type"] is None else 1.5) / fan**0.5
        )
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator) * scale
            + (1.0 if name.endswith(".w") else 0.0)
        )


def random_task(
    *, batch: int = 6, length: int = 8, seed: int = 1, ragged: bool = False, several: bool = False
) -> Task:
    """Random clean prompts, corrupted in three tokens, with two answers and one wrong answer
    each.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(VOCAB, (batch, length), generator=generator)
    corrupted = clean.clone()
    for position in (1, 2, length // 2):
        corrupted[:, position] = torch.randint(VOCAB, (batch,), generator=generator)
    lengths = (
        torch.randint(length // 2 + 1, length + 1, (batch,), generator=generator)
        if ragged
        else torch.full((batch,), length)
    )
    lengths[0] = length
    scored = torch.zeros(batch, length, dtype=torch.bool)
    scored[torch.arange(batch), lengths - 1] = True
    if several:
        scored[::2, length // 2] = True
    answers = torch.randint(VOCAB, (batch, 2), generator=generator)
    return Task.from_tokens(
        clean,
        corrupted,
        answers,
        (answers[:, 0] + 7) % VOCAB,
        lengths=lengths,
        answer_positions=scored,
        metric="logit_difference",
    )

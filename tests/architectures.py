"""Small random models of every supported shape, and tasks of random tokens for them."""

from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from circuits.tasks.task import Task

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


def random_model(
    architecture: str = "gpt2", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> HookedTransformer:
    """A model with random weights and biases, large enough that every component matters."""
    config = HookedTransformerConfig(
        **{
            **SMALL,
            **ARCHITECTURES[architecture],
            **changes,
            "init_weights": False,
            "device": "cpu",
            "dtype": dtype,
        }
    )
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter.shape[-2] if parameter.dim() > 1 else 25
            # Without norms the residual stream grows from layer to layer.
            scale = (
                1.0
                if name.endswith(("W_E", "W_pos"))
                else (0.5 if config.normalization_type is None else 1.5) / fan**0.5
            )
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * scale
                + (1.0 if name.endswith(".w") else 0.0)
            )
    return model.eval()


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

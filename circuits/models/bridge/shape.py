"""The shape of a bridge, and what keeps it from having a component graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from circuits.models.bridge import parts
from circuits.models.shape import ModelShape

# Classes of attention that compute softmax(q k^T) v from linear maps q, k, v and o.
ATTENTION = (
    "AttentionBridge",
    "PositionEmbeddingsAttentionBridge",
    "JointQKVAttentionBridge",
    "JointQKVPositionEmbeddingsAttentionBridge",
    "ALiBiJointQKVAttentionBridge",
    "MPTALiBiAttentionBridge",
    "BloomAttentionBridge",
    "CodeGenAttentionBridge",
    "_Cohere2AttentionBridge",
    "_SmolLM3AttentionBridge",
)
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def bridge_shape(model: TransformerBridge) -> ModelShape:
    """Return sizes and kinds, from the modules as far as they tell."""
    cfg, config = model.cfg, parts.config_of(model)
    block: Any = model.blocks[0]
    mlp = parts.child(block, "mlp")
    linear = None if mlp is None else parts.child(mlp, "in")
    weight = next(model.original_model.parameters())
    d_head = cfg.d_head
    keys = parts.child(parts.child(block, "attn"), "k")
    return ModelShape(
        model_name=str(cfg.model_name),
        n_layers=len(model.blocks),
        n_heads=cfg.n_heads,
        n_key_value_heads=parts.matrix(keys).shape[1] // d_head,
        d_model=cfg.d_model,
        d_head=d_head,
        d_mlp=cfg.d_mlp if linear is None else parts.matrix(linear).shape[1],
        d_vocab=len(parts.original(model.embed).weight),
        d_vocab_out=parts.matrix(model.unembed).shape[1],
        n_ctx=_context(model),
        dtype=weight.dtype,
        device=weight.device,
        positions=_positions(model),
        default_prepend_bos=bool(cfg.default_prepend_bos),
        causal=getattr(cfg, "attention_dir", "causal") == "causal",
        attn_only=mlp is None,
        parallel_attn_mlp=_is_parallel(model),
        gated_mlp=mlp is not None and parts.child(mlp, "gate") is not None and linear is not None,
        has_norms=parts.child(model, "ln_final") is not None,
        has_norms_before=parts.child(block, "ln1") is not None,
        has_norms_after=parts.child(block, "ln1_post") is not None,
        clips=bool(getattr(config, "clip_qkv", None)),
        n_devices=1,
    )


def unsupported(model: TransformerBridge) -> Iterator[str]:
    """Say why the residual stream is not the sum of the model's components."""
    if model.blocks and parts.child(model.blocks[0], "ln1_post") is not None:
        yield "norms after attention and MLP, as in Gemma 2 and 3"


def _context(model: TransformerBridge) -> int:
    config = parts.config_of(model)
    sizes = [getattr(config, name, None) for name in LENGTHS]
    found = [size for size in sizes if isinstance(size, int) and size > 0]
    longest = found[0] if found else int(model.cfg.n_ctx)
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Longer prompts are turned by other angles, from their first token on.
        longest = rope.get("original_max_position_embeddings") or longest
    return int(min(longest, parts.LONGEST))


def _positions(model: TransformerBridge) -> str:
    if parts.child(model, "pos_embed") is not None:
        return "standard"
    if parts.slopes(model, model.cfg.n_heads) is not None:
        return "alibi"
    return "rotary"


def _is_parallel(model: TransformerBridge) -> bool:
    """Whether MLPs read what heads read."""
    block: Any = model.blocks[0]
    if parts.child(block, "mlp") is None:
        return False
    if parts.child(block, "ln2") is None and parts.child(block, "ln2_post") is None:
        return parts.child(block, "ln1") is not None
    config = parts.config_of(model)
    for name in ("use_parallel_residual", "parallel_attn"):
        if (stated := getattr(config, name, None)) is not None:
            return bool(stated)
    return bool(model.cfg.parallel_attn_mlp)

"""The shape of a bridge, and what keeps it from having a component graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from circuits.models.bridge import parts
from circuits.models.layers.shape import ModelShape

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
NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def bridge_shape(model: TransformerBridge) -> ModelShape:
    """Return sizes and kinds, from the modules as far as they tell."""
    cfg, d_head = model.cfg, model.cfg.d_head
    block: Any = model.blocks[0]
    mlp = parts.child(block, "mlp")
    linear = mlp and parts.child(mlp, "in")
    gate = mlp and parts.child(mlp, "gate")
    weight = next(model.original_model.parameters())
    vocabulary, _ = parts.original(model.embed).weight.shape
    _, unembedded = parts.matrix(model.unembed).shape
    keys = parts.matrix(block.attn.k)
    return ModelShape(
        model_name=str(cfg.model_name),
        n_layers=len(model.blocks),
        n_heads=cfg.n_heads,
        n_key_value_heads=keys.shape[1] // d_head,
        d_model=cfg.d_model,
        d_head=d_head,
        d_mlp=parts.matrix(linear).shape[1] if linear else cfg.d_mlp,
        d_vocab=vocabulary,
        d_vocab_out=unembedded,
        n_ctx=context(parts.config_of(model)) or int(cfg.n_ctx),
        dtype=weight.dtype,
        device=weight.device,
        positions=_positions(model),
        default_prepend_bos=bool(cfg.default_prepend_bos),
        causal=getattr(cfg, "attention_dir", "causal") == "causal",
        attn_only=mlp is None,
        parallel_attn_mlp=_is_parallel(model),
        gated_mlp=bool(gate and linear),
        has_norms=parts.child(model, "ln_final") is not None,
        has_norms_before=parts.child(block, "ln1") is not None,
        has_norms_after=parts.child(block, "ln1_post") is not None,
        clips=bool(parts.clip(model, 0)),
        n_devices=1,
    )


def unreadable(model: TransformerBridge) -> Iterator[str]:
    """Say why the pass of this package cannot compute what the model does."""
    if not hasattr(model, "blocks"):
        yield "no blocks of attention and MLP one after the other"
        return
    for block in model.blocks:
        attention = parts.child(block, "attn")
        if not attention or not parts.child(attention, "q"):
            kind = type(parts.original(attention or block)).__name__
            yield f"layers that are no attention with queries, keys and values ({kind})"
            return
        if type(attention).__name__ not in ATTENTION:
            kind = type(parts.original(attention)).__name__
            yield f"attention of a class that is not known ({kind})"
            return
    width = parts.original(model.embed).weight.shape[1]
    if width != model.cfg.d_model:
        yield f"token embeddings of another width ({width}) than the residual stream"
    yield from _unknown_norms(model)


def unsupported(model: TransformerBridge) -> Iterator[str]:
    """Say why the residual stream is not the sum of the model's components."""
    first: Any = model.blocks[0]
    norm = parts.child(first, "ln1_post")
    if norm is None:
        return
    if parts.child(first, "ln1") is None:
        yield "norms after attention and MLP, and none before"
    found = parts.norm_weights(norm)
    biases = found.bias, parts.bias(first.attn.o)
    if found.centres or any(bias is not None for bias in biases):
        yield "a bias or a mean in its norms after attention, of which heads have no share"


def _unknown_norms(model: TransformerBridge) -> Iterator[str]:
    block: Any = model.blocks[0]
    for slot in "qk":
        norm = parts.child(block.attn, f"{slot}_norm")
        if norm is None:
            continue
        weight = getattr(parts.original(norm), "weight", None)
        if weight is None or weight.dim() > 1:
            yield "query and key norms that differ between heads"
            return
        if len(weight) != model.cfg.d_head:
            yield "query and key norms that mix heads, as in OLMo 2 and OLMoE"
            return
    if getattr(model.cfg, "qk_norm_after_rope", False):
        yield "query and key norms after the rotation"
    found = [parts.child(block, name) for name in NORMS]
    for norm in [*found, parts.child(model, "ln_final")]:
        if norm and not parts.norm_weights(norm).is_plain:
            module = parts.original(norm)
            if module is norm:
                yield "no norm where its class has one, as OPT with do_layer_norm_before=False"
                return
            yield f"norms of a class that is not known ({type(module).__name__})"
            return


def context(settings: Any) -> int | None:
    """Return how many tokens a configuration allows, as far as positions are known."""
    sizes = (getattr(settings, name, None) for name in LENGTHS)
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    if not known:
        return None
    longest = known[0]
    rope: Any = getattr(settings, "rope_parameters", None) or {}
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
    before, *norms_of_mlp = (parts.child(block, name) for name in ("ln1", "ln2", "ln2_post"))
    if not any(norms_of_mlp):
        return before is not None
    stated = parts.setting(model, "use_parallel_residual", "parallel_attn")
    return bool(model.cfg.parallel_attn_mlp if stated is None else stated)

"""The shape of a model in words of our own, whichever class it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelShape:
    """Sizes and kinds that decide what a model computes, where, and in which type.

    Attributes:
        model_name: for messages.
        n_key_value_heads: heads of k and v; as many as `n_heads` where none is shared.
        d_mlp: the hidden width of an MLP, or of one expert; None without MLPs.
        d_vocab: token embeddings.
        d_vocab_out: logits.
        n_ctx: the longest prompt of which the positions are known.
        positions: "standard" for a learned embedding in the residual stream, "rotary", "alibi",
            "none", or another word for a kind that nothing here knows.
        default_prepend_bos: whether texts begin with the BOS token unless one says otherwise.
        causal: whether a position attends to earlier ones only.
        attn_only: whether it has no MLPs.
        parallel_attn_mlp: whether an MLP reads what the heads of its layer read.
        gated_mlp: whether MLPs multiply two linear maps.
        has_norms: whether it has any.
        has_norms_before: before attention and MLP, unlike OLMo 2.
        has_norms_after: after attention and MLP, as in Gemma 2 and 3.
        clips: whether q, k and v are clipped, which makes values a nonlinear function.
        n_devices: over which its layers are spread.
    """

    model_name: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    dtype: torch.dtype
    device: torch.device
    positions: str
    default_prepend_bos: bool
    causal: bool
    attn_only: bool
    parallel_attn_mlp: bool
    gated_mlp: bool
    has_norms: bool
    has_norms_before: bool
    has_norms_after: bool
    clips: bool
    n_devices: int

    @property
    def repeats(self) -> int:
        """How many query heads share one head of k and v."""
        return self.n_heads // self.n_key_value_heads

    def comparable(self) -> dict[str, Any]:
        """What makes circuits of one model meaningless in another, for files.

        In the words of the first version of the files, in which None stands for heads of k and v
        that are not shared.
        """
        shared = self.n_key_value_heads if self.repeats > 1 else None
        # Only where it is so: files of the first version do not name it.
        coupled = {"has_norms_after": True} if self.has_norms_after else {}
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_key_value_heads": shared,
            "d_model": self.d_model,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "d_vocab": self.d_vocab,
            "attn_only": self.attn_only,
            "parallel_attn_mlp": self.parallel_attn_mlp,
            **coupled,
        }

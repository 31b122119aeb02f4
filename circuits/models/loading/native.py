"""Models that TransformerLens builds itself, without Hugging Face, as bridges.

They take the configurations and weights of a HookedTransformer, of those kinds that TransformerLens
has here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from circuits.models.backend import backend
from circuits.models.layers.functional import NormWeights, WeightedMLP
from circuits.models.layers.weights import ModelWeights
from circuits.models.loading.placement import Placement
from circuits.system.errors import InputError

NATIVE = "TransformerLensNative"
# Settings of a HookedTransformer that these models lack, by what they are when they do nothing.
LACKED: dict[str, tuple[object, ...]] = {
    "attention_dir": ("causal",), "use_local_attn": (False,), "use_qk_norm": (False,),
    "parallel_attn_mlp": (False,), "clip_qkv": (None,), "use_attention_sinks": (False, None),
    "num_experts": (None,), "use_logn_attn": (False, None), "post_embedding_ln": (False,),
    "use_normalization_before_and_after": (False,), "scale_attn_by_inverse_layer_idx": (False,),
    "positional_embedding_type": ("standard",), "use_NTK_by_parts_rope": (False,),
    "attn_scores_soft_cap": (-1, 0, None), "output_logits_soft_cap": (-1, 0, None),
    "use_attn_scale": (True,), "gated_mlp": (False,),
    "act_fn": ("gelu", "gelu_new", "relu", "silu", None),
}  # fmt: skip

Weights = Mapping[str, Tensor]
Named = Iterator[tuple[str, Tensor]]
# The configurations that models were built from.
_CONFIGS: WeakKeyDictionary[TransformerBridge, dict[str, Any]] = WeakKeyDictionary()


def is_native(model: object) -> TypeGuard[TransformerBridge]:
    """Whether TransformerLens has built a bridge itself."""
    return isinstance(model, TransformerBridge) and model.cfg.architecture == NATIVE


def config_of(model: TransformerBridge) -> dict[str, Any]:
    """Return the configuration that a model was built from."""
    if model in _CONFIGS:
        return dict(_CONFIGS[model])
    return _plain(model.cfg.to_dict())


def build(
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    placement: Placement,
) -> TransformerBridge:
    """Build a model without weights of its own."""
    lacked = [
        f"{name}={config[name]!r}"
        for name, plain in LACKED.items()
        if name in config and config[name] not in plain
    ]
    if lacked:
        raise InputError(
            f"the configuration makes no TransformerBridge, which has no {' or '.join(lacked)}; "
            "build it with transformer-lens<4, as a HookedTransformer."
        )
    known = {**config, "architecture": NATIVE}
    try:
        settings = TransformerBridgeConfig.from_dict(known)
        with torch.random.fork_rng(devices=[]):
            model = TransformerBridge.boot_native(
                settings,
                tokenizer=tokenizer,
                device=placement.device,
                dtype=placement.dtype,
            )
    # It raises errors of several types.
    except Exception as error:
        raise InputError(
            f"the configuration makes no model ({type(error).__name__}: {str(error)[:120]}); give "
            "one such as model.cfg.to_dict()."
        ) from error
    name = config.get("model_name")
    # As in a HookedTransformer.
    model.cfg.model_name = name if isinstance(name, str) else "custom"
    _CONFIGS[model] = _plain(config)
    return model.eval()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration can be written to a file; types and devices are chosen anew."""
    kinds = (str, int, float, bool, list, type(None))
    left = {"device", "dtype"}
    kept = ((name, value) for name, value in config.items() if name not in left)
    return {name: value for name, value in kept if isinstance(value, kinds)}


def weights_of(model: TransformerBridge) -> dict[str, Tensor]:
    """Return views of the weights, by TransformerLens' names of those of a HookedTransformer."""
    return dict(_named(backend(model).weights))


def weights_named_as(given: Weights, model: TransformerBridge) -> Weights:
    """Return the model's weights by the names that are given: of TransformerLens or of bridges."""
    named_as_bridge = model.state_dict()
    if given.keys() <= named_as_bridge.keys():
        return named_as_bridge
    return weights_of(model)


@torch.no_grad()
def fill(weights: Weights, given: Weights) -> None:
    """Copy numbers into a model's weights."""
    for name, view in weights.items():
        view.copy_(given[name])


def _named(weights: ModelWeights) -> Named:
    shape = weights.shape
    yield "embed.W_E", weights.embedding()
    positions = weights.position_embedding()
    if positions is not None:
        yield "pos_embed.W_pos", positions
    for layer in range(shape.n_layers):
        block = f"blocks.{layer}"
        yield from _of_norm(f"{block}.ln1", weights.norm(layer, "ln1"))
        for slot in "qkv":
            # TransformerLens' mark for shared heads.
            mark = "_" if slot != "q" and shape.repeats > 1 else ""
            yield f"{block}.attn.{mark}W_{slot.upper()}", weights.projection(layer, slot)
            yield f"{block}.attn.{mark}b_{slot.upper()}", weights.projection_bias(layer, slot)
        yield f"{block}.attn.W_O", weights.output_projection(layer)
        yield f"{block}.attn.b_O", weights.output_bias(layer)
        if not shape.attn_only:
            yield from _of_norm(f"{block}.ln2", weights.norm(layer, "ln2"))
            yield from _of_mlp(f"{block}.mlp", weights.feed_forward(layer))
    yield from _of_norm("ln_final", weights.norm(None, "ln_final"))
    unembedding = weights.unembedding()
    yield "unembed.W_U", unembedding.weight
    yield "unembed.b_U", unembedding.bias


def _of_norm(name: str, norm: NormWeights | None) -> Named:
    if norm is not None and norm.weight is not None:
        yield f"{name}.w", norm.weight
    if norm is not None and norm.bias is not None:
        yield f"{name}.b", norm.bias


def _of_mlp(name: str, mlp: Any) -> Named:
    assert isinstance(mlp, WeightedMLP)
    yield f"{name}.W_in", mlp.weight_in
    yield f"{name}.b_in", mlp.bias_in
    yield f"{name}.W_out", mlp.weight_out
    yield f"{name}.b_out", mlp.bias_out

"""Reading the parts of a bridge: its modules, linear maps, norms and tables of positions.

A bridge gives the modules of a Hugging Face model TransformerLens' names, and wraps each. What is
read here is the wrapped module, so that nothing depends on how the wrappers compute.
"""

from __future__ import annotations

import sys
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from circuits.models.layers.functional import NormWeights, Rotation

# Angles of positions are known up to this one.
LONGEST = 1 << 15
Table = Float[Tensor, "ctx pair"]
ACTIVATION_MODULES = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
ACTIVATION_SETTINGS = (
    "hidden_act", "hidden_activation", "activation_function", "activation", "act_fn",
)  # fmt: skip

# Of a model, by kind of layer.
_TABLES: WeakKeyDictionary[nn.Module, dict[Any, tuple[Table, Table] | None]] = WeakKeyDictionary()
# Which number is added to the weight of a kind of norm; None where the equation is another.
_OFFSETS: dict[type, int | None] = {}


def child(owner: Any, name: str) -> Any:
    """Return a part of a bridge, or None if it has none of this name, or one that does nothing."""
    found = owner._modules.get(name)
    return None if found is None or isinstance(original(found), nn.Identity) else found


def original(component: Any) -> Any:
    """Return the module that a part of a bridge wraps."""
    found = component
    while (inner := found._modules.get("_original_component")) is not None:
        found = inner
    return found


def config_of(model: TransformerBridge) -> Any:
    """Return the configuration of the wrapped model, or the bridge's own if it has none."""
    return getattr(model.original_model, "config", model.cfg)


def matrix(component: Any) -> Float[Tensor, "d_in d_out"]:
    """Return the matrix of a linear map, as a view."""
    module = original(component)
    weight: Tensor = module.weight
    # GPT-2's maps are stored the other way round.
    return weight if isinstance(module, Conv1D) else weight.T


def bias(component: Any) -> Float[Tensor, " d_out"] | None:
    """Return the bias of a linear map, if it has one."""
    return getattr(original(component), "bias", None)


def full_bias(component: Any) -> Float[Tensor, " d_out"]:
    """Return the bias of a linear map; zeros where it has none."""
    found = bias(component)
    if found is not None:
        return found
    weight = matrix(component)
    return weight.new_zeros(weight.shape[1])


def norm_weights(component: Any) -> NormWeights:
    """Return a norm; one that computes something else than the equation is called as it is."""
    module = original(component)
    name = type(module).__name__
    centres = "RMS" not in name
    weight: Tensor | None = getattr(module, "weight", None)
    eps = _first(module, "variance_epsilon", "eps", "epsilon", default=1e-5)
    plain = NormWeights(module, centres, weight, getattr(module, "bias", None), eps)
    offset = _offset(plain)
    if offset is None:
        return NormWeights(module, centres, None, None, eps, is_plain=False)
    if not offset or weight is None:
        return plain
    # Gemma: y = (1 + w) x / s
    return NormWeights(module, centres, weight + offset, plain.bias, eps)


def activation(model: TransformerBridge, mlp: Any) -> Any:
    """Return the activation function of an MLP."""
    module = original(mlp)
    found = _first(module, *ACTIVATION_MODULES, default=None)
    if found is not None:
        return found
    name = _first(config_of(model), *ACTIVATION_SETTINGS, default=None)
    return ACT2FN[name] if isinstance(name, str) else _first(mlp, "_activation_fn", default=None)


def rotation(model: TransformerBridge, layer: int, n_ctx: int) -> Rotation | None:
    """Return the rotation of a layer's queries and keys; None where there is none."""
    attention = original(model.blocks[layer].attn)
    if not _rotates(attention):
        return None
    tables = _tables(model, layer, n_ctx)
    if tables is None:
        return None
    cos, sin = tables
    adjacent = _turns_adjacent(attention)
    # [ctx, pairs]: both dimensions of a pair have the same angle.
    if adjacent:
        return Rotation(cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), adjacent)
    return Rotation(torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), adjacent)


def slopes(model: TransformerBridge, n_heads: int) -> Float[Tensor, " head"] | None:
    """Return the slopes of ALiBi, if the model has it."""
    names = vars(sys.modules[type(original(model.blocks[0].attn)).__module__])
    if build := names.get("build_mpt_alibi_tensor"):
        alibi = build(n_heads, 2, alibi_bias_max=config_of(model).attn_config.alibi_bias_max)
        return alibi[:, 0, 1] - alibi[:, 0, 0]
    build = names.get("build_alibi_tensor")
    if build is None or not getattr(config_of(model), "alibi", True):
        return None
    alibi = build(torch.ones(1, 2), n_heads, torch.float32)
    slope = alibi[:, 0, 1]
    # Falcon scales the sum of scores and slopes, BLOOM only the scores.
    attention = original(model.blocks[0].attn)
    is_scaled = "Falcon" in type(attention).__name__
    return slope * attention.inv_norm_factor if is_scaled else slope


def _offset(norm: NormWeights) -> int | None:
    """What is added to a norm's weight, found out once for each class by trying it."""
    kind = type(norm.module)
    if kind not in _OFFSETS:
        _OFFSETS[kind] = _found_offset(norm)
    return _OFFSETS[kind]


@torch.no_grad()
def _found_offset(norm: NormWeights) -> int | None:
    module, weight = norm.module, norm.weight
    like = weight if weight is not None else torch.zeros(_width(module))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, like.shape[-1], generator=generator).to(like)
    expected = module(x)
    for offset in (0, 1):
        shifted = None if weight is None else weight + offset
        tried = NormWeights(module, norm.centres, shifted, norm.bias, norm.eps)
        gap = (tried(x) - expected).abs().max()
        if gap < 0.01 * expected.abs().max():
            return offset
    return None


def _width(module: nn.Module) -> int:
    shape = _first(module, "normalized_shape", default=(2,))
    return int(shape[-1])


def _rotates(attention: nn.Module) -> bool:
    """Whether a layer rotates queries and keys at all, as all but a few do."""
    if "Cohere2" in type(attention).__name__:
        return attention.sliding_window is not None
    return bool(getattr(attention, "use_rope", True))


def _turns_adjacent(attention: nn.Module) -> bool:
    """Whether pairs are dimensions 2i and 2i + 1, not i and i + half the width."""
    names = vars(sys.modules[type(attention).__module__])
    if "rotate_every_two" in names or type(attention).__name__ == "NativeAttention":
        return True
    turn = names.get("rotate_half")
    return turn is not None and bool(turn(torch.arange(4.0))[1] == 0)


def _tables(model: TransformerBridge, layer: int, n_ctx: int) -> tuple[Table, Table] | None:
    attention = original(model.blocks[layer].attn)
    kind = getattr(attention, "layer_type", None)
    like = next(model.original_model.parameters())
    known = _TABLES.setdefault(model, {})
    key = kind, like.device, like.dtype
    if key not in known:
        known[key] = _made_tables(model, attention, kind, min(n_ctx, LONGEST))
    return known[key]


@torch.no_grad()
def _made_tables(
    model: TransformerBridge, attention: nn.Module, kind: str | None, length: int
) -> tuple[Table, Table] | None:
    """The cosine and sine of each position and pair of dimensions."""
    embedded = getattr(attention, "embed_positions", None)
    if isinstance(embedded, Tensor):
        # GPT-J: the sines of all pairs, then the cosines.
        sin, cos = embedded[:length].chunk(2, -1)
        return cos, sin
    native = getattr(attention, "rotary", None)
    if native is not None:
        return native.cos_cached[:length, ::2], native.sin_cached[:length, ::2]
    modules = model.original_model.named_modules()
    found = [module for name, module in modules if name.endswith("rotary_emb")]
    if not found:
        return None
    like = next(model.original_model.parameters())
    positions = torch.arange(length, device=like.device)[None]
    rotary = original(found[0])
    takes_kind = "layer_type" in signature(rotary.forward).parameters
    chosen = {"layer_type": kind} if takes_kind else {}
    cos, sin = rotary(like.new_zeros(1, 1, 1), positions, **chosen)
    return _per_pair(cos[0]), _per_pair(sin[0])


def _per_pair(table: Float[Tensor, "ctx rotated"]) -> Table:
    """Reduce a table in which each pair's angle may be there twice."""
    half = table.shape[-1] // 2
    if torch.equal(table[:, :half], table[:, half:]):
        return table[:, :half]
    if torch.equal(table[:, ::2], table[:, 1::2]):
        return table[:, ::2]
    return table


def _first(owner: Any, *names: str, default: Any) -> Any:
    for name in names:
        found = getattr(owner, name, None)
        if found is not None:
            return found
    return default

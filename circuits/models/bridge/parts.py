"""Reading the parts of a bridge: its modules, linear maps, norms and tables of positions.

A bridge gives the modules of a Hugging Face model TransformerLens' names, and wraps each. What is
read here is the wrapped module, so that nothing depends on how the wrappers compute.
"""

from __future__ import annotations

import sys
from copy import copy
from dataclasses import replace
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from circuits.models.bridge.changes import state
from circuits.models.layers.functional import NormWeights, Rotation

# Angles of positions are known up to this one.
LONGEST = 1 << 15
Table = Float[Tensor, "ctx pair"]
ACTIVATION_MODULES = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
ACTIVATION_SETTINGS = (
    "hidden_act", "hidden_activation", "activation_function", "activation", "act_fn",
)  # fmt: skip

# Of a model, by kind of layer: what the angles were made of, and their tables.
Turning = tuple[Any, Rotation | None]
_ROTATIONS: WeakKeyDictionary[nn.Module, dict[Any, Turning]] = WeakKeyDictionary()
# Which number is added to the weight of a kind of norm; None where the equation is another.
_OFFSETS: dict[Any, int | None] = {}


def child(owner: Any, name: str) -> Any:
    """Return a part of a bridge, or None if it has none of this name, or one that does nothing."""
    found = owner._modules.get(name)
    if found is None or isinstance(original(found), nn.Identity):
        return None
    return found


def original(component: Any) -> Any:
    """Return the module that a part of a bridge wraps."""
    found = component
    while (inner := found._modules.get("_original_component")) is not None:
        found = inner
    return found


def config_of(model: TransformerBridge) -> Any:
    """Return the configuration of the wrapped model, or the bridge's own if it has none."""
    return getattr(model.original_model, "config", model.cfg)


def first_of(owner: Any, *names: str) -> Any:
    """Return the first attribute that there is and that is not None; None if there is none."""
    found = (getattr(owner, name, None) for name in names)
    return next((each for each in found if each is not None), None)


def setting(model: TransformerBridge, *names: str) -> Any:
    """Return what the configuration states under the first of these names, None if nothing."""
    return first_of(config_of(model), *names)


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
    eps = first_of(module, "variance_epsilon", "eps", "epsilon")
    eps = 1e-5 if eps is None else eps
    plain = NormWeights(module, centres, weight, bias(component), eps)
    offset = _offset(plain)
    if offset is None:
        return replace(plain, weight=None, bias=None, is_plain=False)
    if not offset or weight is None:
        return plain
    # Gemma: y = (1 + w) x / s
    return replace(plain, weight=weight + offset)


def activation(model: TransformerBridge, mlp: Any) -> Any:
    """Return the activation function of an MLP."""
    found = first_of(original(mlp), *ACTIVATION_MODULES)
    if found is not None:
        return found
    name = setting(model, *ACTIVATION_SETTINGS)
    return ACT2FN[name] if isinstance(name, str) else first_of(mlp, "_activation_fn")


def rotation(model: Any, layer: int, n_ctx: int) -> Rotation | None:
    """Return the rotation of a layer's queries and keys; None where there is none."""
    attention = original(model.blocks[layer].attn)
    if not _rotates(attention):
        return None
    kind = getattr(attention, "layer_type", None)
    like = next(model.original_model.parameters())
    turning = _rotary(model) or first_of(attention, "rotary") or attention
    made_of = like.device, like.dtype, state(turning)
    known = _ROTATIONS.setdefault(model, {})
    before, found = known.get(kind, (None, None))
    if before != made_of:
        found = _made_rotation(model, attention, min(n_ctx, LONGEST))
        known[kind] = made_of, found
    return found


def clip(model: TransformerBridge, layer: int) -> float | None:
    """Return the largest number that queries, keys and values may be, if there is one."""
    attention = original(model.blocks[layer].attn)
    stated = setting(model, "clip_qkv")
    return getattr(attention, "clip_qkv", stated)


def slopes(model: TransformerBridge, n_heads: int) -> Float[Tensor, " head"] | None:
    """Return the slopes of ALiBi, if the model has it."""
    attention = original(model.blocks[0].attn)
    names = _names_beside(attention)
    if build := names.get("build_mpt_alibi_tensor"):
        largest = setting(model, "attn_config").alibi_bias_max
        alibi = build(n_heads, 2, alibi_bias_max=largest)[:, 0]
        return alibi[:, 1] - alibi[:, 0]
    build = names.get("build_alibi_tensor")
    if build is None or setting(model, "alibi") is False:
        return None
    mask = torch.ones(1, 2)
    slope = build(mask, n_heads, torch.float32)[:, 0, 1]
    # Falcon scales the sum of scores and slopes, BLOOM only the scores.
    is_scaled = "Falcon" in type(attention).__name__
    return slope * attention.inv_norm_factor if is_scaled else slope


def _offset(norm: NormWeights) -> int | None:
    """What is added to a norm's weight, found out once for each kind by trying it."""
    kind = type(norm.module), norm.weight is None, norm.bias is None
    if kind not in _OFFSETS:
        _OFFSETS[kind] = _found_offset(norm)
    return _OFFSETS[kind]


@torch.no_grad()
def _found_offset(norm: NormWeights) -> int | None:
    # A copy whose weights are known: those of the model may be anything.
    module = copy(norm.module)
    width = _width(module) if norm.weight is None else norm.weight.shape[-1]
    given: dict[str, nn.Parameter | None] = dict(module._parameters)
    for name, values in given.items():
        if values is not None:
            given[name] = nn.Parameter(torch.full((width,), 0.5))
    module._parameters = given
    x = torch.randn((1, 3, width), generator=torch.Generator().manual_seed(0))
    try:
        expected = module.forward(x)
    # A norm of a kind that is not known may need anything.
    except Exception:
        return None
    weight, bias = given.get("weight"), given.get("bias")
    for offset in (0, 1):
        shifted = None if weight is None else weight + offset
        found = NormWeights(module, norm.centres, shifted, bias, norm.eps)(x)
        if (found - expected).abs().max() < 0.01:
            return offset
    return None


def _width(module: nn.Module) -> int:
    shape = first_of(module, "normalized_shape") or (2,)
    return int(shape[-1])


def _names_beside(module: nn.Module) -> dict[str, Any]:
    """What is defined in the file of a module's class."""
    return vars(sys.modules[type(module).__module__])


def _rotates(attention: nn.Module) -> bool:
    """Whether a layer rotates queries and keys at all, as all but a few do."""
    if "Cohere2" in type(attention).__name__:
        return attention.sliding_window is not None
    return bool(getattr(attention, "use_rope", True))


def _turns_adjacent(attention: nn.Module) -> bool:
    """Whether pairs are dimensions 2i and 2i + 1, not i and i + half the width."""
    names = _names_beside(attention)
    if "rotate_every_two" in names or type(attention).__name__ == "NativeAttention":
        return True
    turn = names.get("rotate_half")
    if turn is None:
        return False
    turned = turn(torch.arange(4.0))
    return bool(turned[1] == 0)


@torch.no_grad()
def _made_rotation(model: TransformerBridge, attention: nn.Module, length: int) -> Rotation | None:
    tables = _tables(model, attention, length)
    if tables is None:
        return None
    # [ctx, pairs]: both dimensions of a pair have the same angle.
    adjacent = _turns_adjacent(attention)
    if adjacent:
        cos, sin = (table.repeat_interleave(2, -1) for table in tables)
    else:
        cos, sin = (table.repeat(1, 2) for table in tables)
    return Rotation(cos, sin, adjacent)


def _rotary(model: TransformerBridge) -> Any:
    """The module that computes angles, if one does so for all layers."""
    for name, module in model.original_model.named_modules():
        if name.endswith("rotary_emb"):
            return original(module)
    return None


def _tables(
    model: TransformerBridge, attention: nn.Module, length: int
) -> tuple[Table, Table] | None:
    """The cosine and sine of each position and pair of dimensions."""
    embedded = getattr(attention, "embed_positions", None)
    if isinstance(embedded, Tensor):
        # GPT-J: the sines of all pairs, then the cosines.
        sin, cos = embedded[:length].chunk(2, -1)
        return cos, sin
    native = getattr(attention, "rotary", None)
    if native is not None:
        both = native.cos_cached, native.sin_cached
        cos, sin = (table[:length, ::2] for table in both)
        return cos, sin
    rotary = _rotary(model)
    if rotary is None:
        return None
    like = next(model.original_model.parameters())
    positions = torch.arange(length, device=like.device)
    takes_kind = "layer_type" in signature(rotary.forward).parameters
    chosen = {"layer_type": attention.layer_type} if takes_kind else {}
    states = like.new_zeros(1, 1, 1)
    cos, sin = rotary(states, positions[None], **chosen)
    return _per_pair(cos[0]), _per_pair(sin[0])


def _per_pair(table: Float[Tensor, "ctx rotated"]) -> Table:
    """Reduce a table in which each pair's angle may be there twice."""
    half = table.shape[1] // 2
    halves = table[:, :half], table[:, half:]
    if torch.equal(*halves):
        return halves[0]
    turns = table[:, ::2], table[:, 1::2]
    return turns[0] if torch.equal(*turns) else table

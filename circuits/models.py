"""Models: the only module that imports transformer_lens or reads a model's modules.

Everything else names nodes; this module knows at which hook point a node writes or reads, which flags those hooks need, and what
the parts of a block are. It never changes a model: flags, hooks, gradients and modes are put back.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from circuits.distributed import own_gpu
from circuits.errors import InputError
from circuits.files import read_json, read_tensors, write_json, write_tensors
from circuits.graph import SLOTS
from circuits.nodes import MLP, Embed, Head, Logits, Node, PosEmbed, TokenEmbed
from circuits.sublayers import Attention, FeedForward, LinearNorm, Norm, Rotation, Unembedding, gelu_tanh

Model = HookedTransformer
Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation, returns its replacement, or None to leave it."""

EMBEDDED = "toy-world"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "circuits.model", 1


# Loading and saving


def load_model(name_or_path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """A model by name or from a folder, its weights as trained (nothing folded or centred).

    Args:
        name_or_path: `toy-world`, the model that ships with this package; any name TransformerLens knows (`gpt2`); or a folder, written by
            `save_model` or holding a Hugging Face checkpoint (config.json, safetensors weights, tokenizer files).
        device: None takes CUDA when there is one, else the CPU. "cuda" is the GPU of this rank where several processes work together.
        dtype: of the weights.

    Raises:
        InputError: no such name or folder, no CUDA when asked for, a folder that holds no model, weights that cannot be fetched.
    """
    chosen = _device(device)
    if name_or_path == EMBEDDED:
        with resources.as_file(resources.files("circuits") / "assets" / EMBEDDED) as folder:
            return _load_folder(folder, chosen, dtype)
    if Path(name_or_path).is_dir():
        return _load_folder(Path(name_or_path), chosen, dtype)
    return _load_by_name(str(name_or_path), chosen, dtype)


def build_model(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model from HookedTransformerConfig's arguments and a state dict under TransformerLens names.

    Raises:
        InputError: weights are missing, left over or of another shape than the configuration asks for.
    """
    # A seed in the configuration would set the seeds of torch, numpy and random for the whole process.
    settings = {**config, "seed": None, "init_weights": False, "dtype": dtype, "device": str(_device(device))}
    model = HookedTransformer(HookedTransformerConfig(**settings), tokenizer)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith(_BUFFERS)}
    wrong = [
        f"{name} ({'missing' if name not in weights else f'has shape {tuple(weights[name].shape)}, needs {tuple(shape)}'})"
        for name, shape in expected.items()
        if name not in weights or weights[name].shape != shape
    ] + [f"{name} (unknown)" for name in weights if name not in expected and not name.endswith(_BUFFERS)]
    if wrong:
        raise InputError(f"the weights do not fit the configuration: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}.")
    model.load_state_dict({name: weights[name].to(dtype) for name in expected}, strict=False)
    return model.eval()


def save_model(model: Model, folder: str | Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`, for `load_model`."""
    config = {name: value for name, value in model.cfg.to_dict().items() if _is_json(value)}
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_BUFFERS)}
    write_tensors(Path(folder) / WEIGHTS_FILE, weights, {}, FORMAT, FORMAT_VERSION)
    write_json(Path(folder) / CONFIG_FILE, {"config": config}, FORMAT, FORMAT_VERSION)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


# Buffers that TransformerLens derives from the configuration.
_BUFFERS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"there is no device {device!r}; use 'cpu', 'cuda' or 'cuda:1'.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} finds no CUDA here; use device='cpu' or a CUDA build."
        )
    return own_gpu() if chosen == torch.device("cuda") else chosen


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise InputError(
            f"the folder {folder} holds no model: it has no {CONFIG_FILE}; give a folder written by save_model or a checkpoint's."
        )
    try:
        ours = json.loads(config.read_text()).get("format") == FORMAT
    except ValueError as error:
        raise InputError(f"{config} is truncated or not JSON ({error}); restore it.") from error
    if not ours:
        return _load_checkpoint(folder, device, dtype)
    settings = read_json(config, FORMAT, FORMAT_VERSION)["config"]
    weights = folder / WEIGHTS_FILE
    tensors = read_tensors(weights, FORMAT, FORMAT_VERSION)[0]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    return build_model(settings, tensors, tokenizer, device=device, dtype=dtype)


def _load_checkpoint(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """A Hugging Face checkpoint in a folder."""
    from transformer_lens import loading_from_pretrained as loading

    try:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"the folder {folder} cannot be loaded as a checkpoint: {_first_line(error)}") from error
    with tempfile.TemporaryDirectory() as neutral:
        # TransformerLens guesses architectures from words in a path ("llama"); under a neutral name it reads config.json instead.
        link = Path(neutral) / "checkpoint"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        try:
            config = loading.get_pretrained_model_config(str(link), device=str(device), dtype=dtype)
            weights = loading.get_pretrained_state_dict(str(link), config, source, dtype=dtype)
        except (NotImplementedError, ValueError, AttributeError, KeyError) as error:
            raise InputError(f"TransformerLens cannot convert the checkpoint in {folder}: {_first_line(error)}") from error
    model = HookedTransformer(config, tokenizer, move_to_device=False)
    keep_as_trained = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(weights, **keep_as_trained)
    model.cfg.model_name = folder.name
    model.move_model_modules_to_device()
    return model.eval()


def _load_by_name(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    from transformer_lens import loading_from_pretrained as loading

    known = loading.make_model_alias_map()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        meant = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"use {EMBEDDED}, a name that TransformerLens knows (gpt2, pythia-160m) or a folder."
        )
        raise InputError(f"there is no model or folder {name!r}; {meant}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TransformerLens prints, and our output may be read by a program
            return HookedTransformer.from_pretrained_no_processing(name, device=str(device), dtype=dtype).eval()
    except OSError as error:
        raise InputError(
            f"the weights of {name!r} cannot be had: {_first_line(error)} Download them elsewhere and give the folder."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _is_json(value: object) -> bool:
    return (
        value is None or isinstance(value, str | int | float | bool) or (isinstance(value, list) and all(_is_json(item) for item in value))
    )


# Running a model with hooks


def output_hook(node: Node) -> str:
    """The hook point at which a component's output can be read. A head's is its z, whose product with W_O is what it writes."""
    match node:
        case TokenEmbed():
            return "hook_embed"
        case PosEmbed():
            return "hook_pos_embed"
        case Embed():
            return "blocks.0.hook_resid_pre"
        case Head(layer=layer):
            return f"blocks.{layer}.attn.hook_z"
        case MLP(layer=layer):
            return f"blocks.{layer}.hook_mlp_out"
    raise TypeError(f"{node} writes nothing to the residual stream.")


def input_hook(model: Model, node: Node, slot: str | None) -> str:
    """The hook point at which what a target reads can be changed; for heads, within `separate_inputs`."""
    match node:
        case Head(layer=layer) if slot in SLOTS:
            return f"blocks.{layer}.hook_{slot}_input"
        case MLP(layer=layer):
            return f"blocks.{layer}.hook_mlp_in"
        case Logits():
            return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    raise TypeError(f"{node} reads nothing in slot {slot}.")


def attention_output_hook(layer: int) -> str:
    """What a layer's heads and b_O add to the residual stream together."""
    return f"blocks.{layer}.hook_attn_out"


def residual_hook(layer: int) -> str:
    """The residual stream as it enters a layer."""
    return f"blocks.{layer}.hook_resid_pre"


def projection_hook(layer: int, slot: str) -> str:
    """A layer's q, k or v, one per head, before norms and rotations of their own."""
    return f"blocks.{layer}.attn.hook_{slot}"


def pattern_hook(layer: int) -> str:
    """How much each query of a layer's heads attends to each key."""
    return f"blocks.{layer}.attn.hook_pattern"


def mlp_residual_hook(model: Model, layer: int) -> str:
    """The residual stream that an MLP reads, before its norm: in a parallel block what its heads read too."""
    return f"blocks.{layer}.{'hook_resid_pre' if model.cfg.parallel_attn_mlp else 'hook_resid_mid'}"


def mlp_output_hook(model: Model, layer: int, *, before_norm: bool = False) -> str:
    """What an MLP adds to the residual stream, or what it gives to a norm that follows it."""
    return f"blocks.{layer}.{'mlp' if before_norm and _norms_after(model) else 'hook_mlp_out'}"


NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
"""The norms of a block: before and after attention, before and after the MLP."""


def scale_hooks(model: Model) -> dict[tuple[int, str], str]:
    """Where what each norm of each block divides by can be read, by layer and norm; the final norm's is `FINAL_SCALE`."""
    if model.cfg.normalization_type is None:
        return {}
    absent = {*(() if _norms_after(model) else ("ln1_post", "ln2_post")), *(("ln2", "ln2_post") if model.cfg.attn_only else ())}
    names = [name for name in NORMS if name not in absent]
    return {(layer, name): f"blocks.{layer}.{name}.hook_scale" for layer in range(model.cfg.n_layers) for name in names}


FINAL_SCALE = "ln_final.hook_scale"


def _norms_after(model: Model) -> bool:
    return bool(model.cfg.use_normalization_before_and_after)


@contextlib.contextmanager
def separate_inputs(model: Model) -> Iterator[None]:
    """Give every MLP and every head's q, k and v an input of its own; the flags are put back.

    Key and value heads that are shared are given one copy per query head.
    """
    mlps, shared = not model.cfg.attn_only, model.cfg.n_key_value_heads is not None
    with _flags(model, use_hook_mlp_in=mlps, use_split_qkv_input=True, ungroup_grouped_query_attention=shared):
        yield


@contextlib.contextmanager
def plain_inputs(model: Model) -> Iterator[None]:
    """Without the flags that make a forward pass slow, whatever the user has set; they are put back."""
    with _flags(model), _shared_norms(model):
        yield


@contextlib.contextmanager
def separate_gradients(model: Model) -> Iterator[None]:
    """Give every MLP an input of its own, and let hooks at k and v turn shared heads into one copy per query head (`copies_per_head`).

    The projections stay shared, so a pass costs what a plain one does. Flags and modules are put back.
    """
    attentions = [block.attn for block in model.blocks] if model.cfg.n_key_value_heads is not None else []
    before = [attention.repeat_kv_heads for attention in attentions]
    try:
        for attention in attentions:
            attention.repeat_kv_heads = 1
        with _flags(model, use_hook_mlp_in=not model.cfg.attn_only), _shared_norms(model):
            yield
    finally:
        for attention, repeats in zip(attentions, before, strict=True):
            attention.repeat_kv_heads = repeats


@contextlib.contextmanager
def _shared_norms(model: Model) -> Iterator[None]:
    """Compute the norm before attention once for q, k and v, where TransformerLens computes it three times; modules are put back."""
    norms = [block.ln1 for block in model.blocks]
    before = [dict(vars(norm)).get("forward") for norm in norms]
    try:
        for norm in norms:
            norm.forward = _remembered(norm.forward)
        yield
    finally:
        for norm, forward in zip(norms, before, strict=True):
            del norm.forward
            if forward is not None:
                norm.forward = forward


def _remembered(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, which gives its last result again to the next two calls on the very same tensor, and then forgets it."""
    last: list[tuple[Tensor, Tensor]] = []

    def remembering(given: Tensor) -> Tensor:
        if not last or last[0][0] is not given:
            last[:] = [(given, forward(given))] * 3
        return last.pop()[1]

    return remembering


def copies_per_head(model: Model, slot: str) -> int:
    """How many query heads read each head of q, k or v."""
    shared = model.cfg.n_key_value_heads
    return 1 if shared is None or slot == "q" else model.cfg.n_heads // shared


@contextlib.contextmanager
def _flags(model: Model, **chosen: bool) -> Iterator[None]:
    """Set these flags of hooks, and clear the others; all are put back."""
    before = {name: getattr(model.cfg, name) for name in _INPUT_FLAGS}
    try:
        for name in _INPUT_FLAGS:
            setattr(model.cfg, name, chosen.get(name, False))
        yield
    finally:
        for name, value in before.items():
            setattr(model.cfg, name, value)


_INPUT_FLAGS = ("use_hook_mlp_in", "use_split_qkv_input", "ungroup_grouped_query_attention", "use_attn_in", "use_attn_result")


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode and no gradients into the weights; both are put back."""
    training = [(module, module.training) for module in model.modules() if module.training]
    requiring = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module, _ in training:
            module.training = False
        for parameter in requiring:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter in requiring:
            parameter.requires_grad_(True)


def run_to_residual(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    hooks: Sequence[tuple[str, Hook]] = (),
    *,
    layers: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last layer, or after the first few, with hooks that are removed again even when the forward pass raises.

    Args:
        mask: real tokens, as against padding on the right. What pads hold never reaches a real token.
        hooks: (hook point, function) pairs.
    """
    # A tokenizer that pads on the left would make TransformerLens guess where the padding is.
    left = model.tokenizer is not None and model.tokenizer.padding_side == "left"
    attention_mask = torch.ones_like(tokens) if left else None
    with hooked(model, [*hooks, *_padding_hooks(model, mask)]):
        return model(tokens, stop_at_layer=model.cfg.n_layers if layers is None else layers, attention_mask=attention_mask)


@contextlib.contextmanager
def hooked(model: Model, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """With these (hook point or module, function) pairs in place; a module's function takes what the module gives."""
    points: list[Any] = [(name, _as_hook(function)) for name, function in hooks if name in model.hook_dict]
    modules = [(model.get_submodule(name), function) for name, function in hooks if name not in model.hook_dict]
    handles = [module.register_forward_hook(_as_module_hook(function)) for module, function in modules]
    try:
        with model.hooks(fwd_hooks=points):
            yield
    finally:
        for handle in handles:
            handle.remove()


def unembed(model: Model, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Logits from the final residual stream: final norm, unembedding, soft cap."""
    rows = residual.reshape(1, -1, residual.shape[-1])
    normed = rows if model.cfg.normalization_type is None else model.ln_final(rows)
    logits = model.unembed(normed)
    cap = model.cfg.output_logits_soft_cap
    if cap is not None and cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits.reshape(*residual.shape[:-1], -1)


def _as_hook(function: Hook) -> Callable[..., Tensor | None]:
    def hook(activation: Tensor, hook: object) -> Tensor | None:
        return function(activation)

    return hook


def _as_module_hook(function: Hook) -> Callable[..., Tensor | None]:
    def hook(module: torch.nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return function(output)

    return hook


def _padding_hooks(model: Model, mask: Bool[Tensor, "batch pos"]) -> list[tuple[str, Hook]]:
    """Bidirectional attention would read pads on the right, and TransformerLens masks them only under causal attention."""
    if model.cfg.attention_dir == "causal" or bool(mask.all()):
        return []

    def ignore_pads(scores: Float[Tensor, "batch head query key"]) -> Tensor:
        return scores.masked_fill(~mask[:, None, None, :], -torch.inf)

    return [(f"blocks.{layer}.attn.hook_attn_scores", ignore_pads) for layer in range(model.cfg.n_layers)]


# The parts of a block


@dataclass(frozen=True)
class Components:
    """A small read-only view of a model's parts, one layer at a time."""

    model: Model

    def normalized(self, layer: int, residual: Float[Tensor, "*batch d_model"]) -> tuple[Tensor, Tensor] | None:
        """The residual stream after the norm before attention (its weights apart), and what the norm divided by; None without norms.

        Both in float32 at least: [*batch, d_model] and [*batch, 1].
        """
        if self.model.cfg.normalization_type is None:
            return None
        wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if self._centres:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = (wide.square().mean(-1, keepdim=True) + float(self.model.cfg.eps)).sqrt()
        return wide / scale, scale

    def projection_after_norm(self, layer: int, slot: str) -> Float[Tensor, "head d_model d_head"]:
        """W_Q, W_K or W_V with the linear part of the norm before it: its centring and its weights. Shared heads are not repeated."""
        attention, shared = self.model.blocks[layer].attn, copies_per_head(self.model, slot) > 1
        norm_weight: Tensor | None = getattr(self.model.blocks[layer].ln1, "w", None)
        weight: Tensor = getattr(attention, f"{'_' if shared else ''}W_{slot.upper()}").detach()
        if norm_weight is not None:
            weight = weight * norm_weight.detach()[:, None]
        return weight - weight.mean(1, keepdim=True) if self._centres else weight

    def linear_norm(self, layer: int | None, name: str, scale: Float[Tensor, "*batch 1"] | None) -> LinearNorm:
        """One of the `NORMS` of a layer, or with None and "ln_final" the last one, its divisor held at `scale`; None where it is absent."""
        module = self.model if layer is None else self.model.blocks[layer]
        parts = getattr(module, name, None) if scale is not None else None
        weight, bias = (None if parts is None or not hasattr(parts, kind) else getattr(parts, kind).detach() for kind in ("w", "b"))
        return LinearNorm(scale, self._centres, weight, bias)

    def value_constant(self, layer: int) -> Float[Tensor, "head d_head"]:
        """What every head's values hold whatever the residual stream is: b_V, and the norm's bias through W_V."""
        attention, norm_bias = self.model.blocks[layer].attn, getattr(self.model.blocks[layer].ln1, "b", None)
        constant = attention.b_V.detach()
        return constant if norm_bias is None else constant + torch.einsum("d,hde->he", norm_bias.detach(), attention.W_V.detach())

    def mlp_input(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the norm before the MLP."""
        return _norm(self.model.blocks[layer].ln2)(residual)

    @property
    def _centres(self) -> bool:
        return self.model.cfg.normalization_type in ("LN", "LNPre")

    def output_projection(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O."""
        return self.model.blocks[layer].attn.W_O

    def output_bias(self, layer: int) -> Float[Tensor, "d_model"]:
        """b_O, which belongs to no node."""
        return self.model.blocks[layer].attn.b_O

    def attention(self, layer: int) -> Attention | None:
        """The heads of a layer as functions of tensors; None where they depend on the length of the prompt in other ways than these know."""
        cfg, block = self.model.cfg, self.model.blocks[layer]
        kind = cfg.positional_embedding_type
        if kind not in ("standard", "rotary", "alibi") or cfg.use_logn_attn or cfg.use_dynamic_ntk_rope:
            return None
        module = cast(Any, block.attn)
        return Attention(
            norm=_norm(block.ln1),
            weights={slot: getattr(module, f"W_{slot.upper()}") for slot in SLOTS},
            biases={slot: getattr(module, f"b_{slot.upper()}") for slot in SLOTS},
            output=module.W_O,
            scale=float(module.attn_scale),
            soft_cap=float(cfg.attn_scores_soft_cap or 0),
            clip=cfg.clip_qkv,
            norms={"q": _norm(module.q_norm), "k": _norm(module.k_norm)} if cfg.use_qk_norm else {},
            rotation=Rotation(module.rotary_cos, module.rotary_sin, cfg.rotary_adjacent_pairs) if kind == "rotary" else None,
            slopes=module.create_alibi_multipliers(cfg.n_heads, cfg.device) if kind == "alibi" else None,
            sinks=module.sinks if cfg.use_attention_sinks else None,
            causal=cfg.attention_dir == "causal",
            reach=cfg.window_size if module.attn_type == "local" else None,
        )

    def feed_forward(self, layer: int) -> FeedForward:
        """The MLP of a layer, with the norm before it, as a function of tensors."""
        block = self.model.blocks[layer]
        norm, mlp = _norm(block.ln2), cast(Any, block.mlp)
        plain = type(mlp).__name__ in ("MLP", "GatedMLP") and not self.model.cfg.is_layer_norm_activation()
        if not plain:
            return FeedForward(norm, None, None, None, None, None, None, whole=mlp)
        gate = mlp.W_gate if type(mlp).__name__ == "GatedMLP" else None
        # TransformerLens' own version of this activation takes eight passes over memory.
        activation = gelu_tanh if self.model.cfg.act_fn in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh") else mlp.act_fn
        return FeedForward(norm, mlp.W_in, mlp.b_in, gate, mlp.W_out, mlp.b_out, activation)

    def unembedding(self) -> Unembedding:
        """The final norm and the unembedding as a function of tensors."""
        cfg, module = self.model.cfg, self.model.unembed
        norm: Norm = (lambda x: x) if cfg.normalization_type is None else _norm(self.model.ln_final)
        return Unembedding(norm, module.W_U, module.b_U, float(cfg.output_logits_soft_cap or 0))


def _norm(module: torch.nn.Module) -> Norm:
    """A norm as one fused operation where torch has it; otherwise the module itself."""
    kind, width = type(module).__name__, getattr(module, "length", None)
    weight, bias, eps = getattr(module, "w", None), getattr(module, "b", None), getattr(module, "eps", 0.0)
    if kind in ("LayerNorm", "LayerNormPre"):
        return lambda x: functional.layer_norm(x, (width or x.shape[-1],), weight, bias, eps)
    if kind in ("RMSNorm", "RMSNormPre"):
        return lambda x: functional.rms_norm(x, (width or x.shape[-1],), weight, eps)
    return module

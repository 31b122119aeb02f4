"""How a HookedTransformer is read and run: by its own forward pass, hook points and flags."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from circuits.models.backend import Backend, Changes, Hook, Hooks, Inputs
from circuits.models.changes import Own, turn
from circuits.models.hooked_transformer.changes import (
    NORM_TYPES,
    changes,
    is_changed,
    last_step_changed,
    own_settings,
    part_of,
    unusable_parts,
    unusable_weights,
)
from circuits.models.hooked_transformer.identity import computed_by, first_fingerprint
from circuits.models.hooked_transformer.weights import HookedTransformerWeights
from circuits.models.layers.functional import soft_capped
from circuits.models.layers.shape import ModelShape
from circuits.models.running import Expected, attributes_set, check_were_run

Forward = Callable[[Tensor], Tensor]
Context = Iterator[None]

INPUT_FLAGS = (
    "use_hook_mlp_in", "use_split_qkv_input", "ungroup_grouped_query_attention",
    "use_attn_in", "use_attn_result",
)  # fmt: skip
"""TransformerLens' flags that copy the inputs or outputs of heads and MLPs."""

POST_NORM_ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


class HookedTransformerBackend(Backend, of=HookedTransformer):
    """How a HookedTransformer is read and run."""

    model: HookedTransformer

    def read_shape(self) -> ModelShape:
        """Return sizes and kinds, as its settings say."""
        cfg = self.model.cfg
        return ModelShape(
            model_name=str(cfg.model_name),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=cfg.d_mlp,
            d_vocab=cfg.d_vocab,
            d_vocab_out=cfg.d_vocab_out,
            n_ctx=cfg.n_ctx,
            dtype=cfg.dtype,
            device=torch.device(cfg.device or "cpu"),
            positions=cfg.positional_embedding_type,
            default_prepend_bos=cfg.default_prepend_bos,
            causal=cfg.attention_dir == "causal",
            attn_only=cfg.attn_only,
            parallel_attn_mlp=cfg.parallel_attn_mlp,
            gated_mlp=cfg.gated_mlp,
            has_norms=cfg.normalization_type is not None,
            has_norms_before=cfg.original_architecture not in POST_NORM_ARCHITECTURES,
            has_norms_after=cfg.use_normalization_before_and_after,
            clips=cfg.clip_qkv is not None,
            n_devices=cfg.n_devices,
        )

    def read_weights(self) -> HookedTransformerWeights:
        """Return a view of the weights."""
        return HookedTransformerWeights(self.model, self.shape)

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules."""
        return self.model.modules()

    def parameters(self) -> Mapping[str, Tensor]:
        """Return all parameters by name."""
        found = dict(self.model.named_parameters())
        if self.shape.positions == "alibi":
            # There is one, which no run reads, and which loading leaves as memory happens to be.
            found.pop("pos_embed.W_pos", None)
        return found

    def hook_names(self) -> tuple[str, ...]:
        """Return the names of all hook points."""
        return tuple(self.model.hook_dict)

    def run(self, tokens: Tensor, mask: Tensor, layers: int | None) -> Tensor:
        """Run the model by its own forward pass."""
        # With a tokenizer that pads on the left TransformerLens would guess where the padding is.
        pads_left = getattr(self.model.tokenizer, "padding_side", None) == "left"
        attention_mask = torch.ones_like(tokens) if pads_left else None
        masking = self._padding_hooks(mask)[:layers]
        with self.hooked(masking, tokens.shape):
            return self.model(tokens, attention_mask=attention_mask, stop_at_layer=layers)

    def last_step(self, residual: Tensor) -> Tensor:
        """Compute logits with the model's own modules."""
        # cap(norm(x) W_U + b_U)
        cfg = self.model.cfg
        normed = residual
        if cfg.normalization_type is not None:
            normed = self.model.ln_final(normed)
        soft_cap = cfg.output_logits_soft_cap or 0
        return soft_capped(self.model.unembed(normed), soft_cap)

    @contextlib.contextmanager
    def hooked(self, hooks: Hooks, shape: Sequence[int] | None) -> Context:
        """Add hooks to hook points, or to the outputs of modules, and remove them at the end."""
        expected = Expected(self.model, shape)
        with turn(self.model), contextlib.ExitStack() as stack:
            added: list[_OnOutput] = []
            for name, function in hooks:
                # A hook point is a module as well: it returns the activation that it is given.
                hook = _OnOutput(name, function, expected)
                handle = part_of(self.model, name).register_forward_hook(hook)
                stack.callback(handle.remove)
                added.append(hook)
            yield
        check_were_run(self.model, [hook.name for hook in added if not hook.was_run])

    @contextlib.contextmanager
    def received(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Record what modules are given."""
        seen: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for name in names:
                module = part_of(self.model, name)
                handle = module.register_forward_hook(_Receiver(name, seen))
                stack.callback(handle.remove)
            yield seen

    @contextlib.contextmanager
    def inputs(self, kind: Inputs) -> Context:
        """Set flags, so that hooks see separate inputs, or none that makes a pass slow."""
        is_shared = self.model.cfg.n_key_value_heads is not None
        with turn(self.model), contextlib.ExitStack() as stack:
            flags: list[str] = []
            if kind == "separate":
                # One copy of the residual stream for every head's q, k and v, and one for the MLP.
                # Shared key and value heads become one copy per query head.
                flags = ["use_split_qkv_input", "use_hook_mlp_in"]
                if is_shared:
                    flags.append("ungroup_grouped_query_attention")
            if kind == "gradients":
                flags = ["use_hook_mlp_in"]
                if is_shared:
                    # With one repeat the model leaves the repeating of shared heads to the hooks.
                    blocks = self.model.blocks
                    repeats = [(block.attn, "repeat_kv_heads", 1) for block in blocks]
                    stack.enter_context(attributes_set(repeats))
            stack.enter_context(self._input_flags(flags))
            if kind != "separate":
                stack.enter_context(self._shared_norms())
            yield

    def changes(self) -> Changes:
        """Describe what it has that TransformerLens does not build from its settings."""
        return changes(self.model)

    def problems(self) -> Iterator[str]:
        """Say why the model cannot be run as it is."""
        yield from unusable_parts(self.model)
        yield from unusable_weights(self.model)

    def computed(self) -> dict[str, Any]:
        """Return all that is in and on its modules."""
        return computed_by(self.model)

    def first_fingerprint(self) -> str:
        """Return the fingerprint in files of the first version."""
        return first_fingerprint(self.model)

    def last_step_changed(self) -> bool:
        """Whether the final norm or the unembedding has been changed."""
        return last_step_changed(self.model)

    def unsupported(self) -> Iterator[str]:
        """Say why the residual stream is not the sum of the model's components."""
        cfg = self.model.cfg
        architecture = cfg.original_architecture
        if cfg.use_normalization_before_and_after:
            yield (
                "norms after attention and MLP, as in Gemma 2 and 3, which are read from a bridge "
                "(load_model with backend='bridge')"
            )
        if architecture in POST_NORM_ARCHITECTURES:
            yield f"norms after attention and MLP ({architecture})"
        if cfg.positional_embedding_type == "shortformer":
            yield "shortformer positions, which enter queries and keys but not the residual stream"
        if architecture == "OlmoeForCausalLM":
            yield "query and key norms that mix heads (OLMoE)"
        if cfg.load_in_4bit:
            yield "4-bit weights"
        if cfg.n_devices > 1:
            yield f"layers spread over {cfg.n_devices} devices"

    def _padding_hooks(self, mask: Tensor) -> Hooks:
        """By layer, mask pads on the right; in causal attention TransformerLens does."""
        if self.model.cfg.attention_dir == "causal" or mask.all():
            return []
        # [batch, head, query, key]
        pads = ~mask[:, None, None]

        def ignore_pads(scores: Tensor) -> Tensor:
            return scores.masked_fill(pads, -torch.inf)

        layers = range(self.model.cfg.n_layers)
        return [(f"blocks.{layer}.attn.hook_attn_scores", ignore_pads) for layer in layers]

    @contextlib.contextmanager
    def _input_flags(self, chosen: Sequence[str]) -> Context:
        """Set these of `INPUT_FLAGS`, and clear the others."""
        # A layer that was copied, or comes from another model, has settings of its own.
        settings = (self.model.cfg, *own_settings(self.model).values())
        configs = {id(each): each for each in settings}
        flags = [(cfg, name, name in chosen) for cfg in configs.values() for name in INPUT_FLAGS]
        with turn(self.model), attributes_set(flags):
            yield

    @contextlib.contextmanager
    def _shared_norms(self) -> Context:
        """Compute the norm before attention once for q, k and v, not three times."""
        name = str(self.model.cfg.normalization_type)
        kind = NORM_TYPES.get(name, type(None))
        found = (module for path, module in self.model.named_modules() if path.endswith(".ln1"))
        # A changed norm may compute something else each time.
        norms = [norm for norm in found if not is_changed(norm, kind)]
        forwards = [(norm, "forward", _Remembering(norm.forward)) for norm in norms]
        with attributes_set(forwards):
            yield


class _OnOutput(Own):
    """A hook of torch that calls a `Hook`."""

    def __init__(self, name: str, function: Hook, expected: Expected) -> None:
        self.name, self.function, self.expected = name, function, expected
        self.was_run = False

    def __call__(self, module: object, arguments: Sequence[Tensor], output: Any) -> Tensor:
        self.was_run = True
        # A hook point returns what it is given, if no user's hook has acted there.
        given = arguments[0] if isinstance(module, HookPoint) else None
        whole = self.expected.whole(self.name, output, given)
        result = self.function(whole)
        return whole if result is None else result


class _Receiver(Own):
    """A hook of torch that records what a module is given, as other hooks have left it."""

    def __init__(self, name: str, seen: dict[str, Tensor]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, module: object, arguments: Sequence[Tensor], output: object) -> None:
        self.seen[self.name] = arguments[0]


class _Remembering(Own):
    """Return the last result again for the next two calls on the same tensor, then forget it."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        # The input and the output, once for each call that is left.
        self.last: list[tuple[Tensor, Tensor]] = []

    def __call__(self, given: Tensor) -> Tensor:
        if not self.last or self.last[0][0] is not given:
            call = (given, self.forward(given))
            self.last = [call, call, call]
        return self.last.pop()[1]

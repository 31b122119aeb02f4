"""Run a model with hooks and leave it unchanged: flags, hooks, gradients and modes are restored.

Whoever changes a model for a run takes its turn (`changes.turn`), so that several threads can use
one model.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from circuits.models.changes import (
    NORM_TYPES,
    Own,
    because,
    changes,
    is_changed,
    last_step_changed,
    named,
    own_settings,
    part_of,
    turn,
)
from circuits.models.functional import soft_capped
from circuits.models.loading import Model
from circuits.models.overflow import check_size
from circuits.system.errors import InputError
from circuits.system.memory import is_out_of_memory
from circuits.system.torch_modes import without_modes

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation and returns its replacement, or None to leave it unchanged."""

Hooks = Sequence[tuple[str, Hook]]
# Attention's own activations are [batch, head, query, key]. These, norms and the choice of experts
# may be in another type than the model.
ATTENTION = ("hook_pattern", "hook_attn_scores")
MIXED = (*ATTENTION, "hook_scale", "hook_normalized", "hook_expert_weights")
# Where all tokens are run to the logits, about this many numbers at a time.
WHOLE_LOGITS = 1 << 24

TokenMask = Bool[Tensor, "batch pos"]
Forward = Callable[[Tensor], Tensor]
Attribute = tuple[Any, str, Any]
Counts = dict[str, int]
Context = Iterator[None]

INSTEAD = (
    "read a head's output by its name (a0.h1), what it reads at hook_q_input, hook_k_input and "
    "hook_v_input, and what the logits read at the last hook_resid_post"
)
INPUT_FLAGS = (
    "use_hook_mlp_in", "use_split_qkv_input", "ungroup_grouped_query_attention",
    "use_attn_in", "use_attn_result",
)  # fmt: skip
"""TransformerLens' flags that copy the inputs or outputs of heads and MLPs."""


@contextlib.contextmanager
def separate_inputs(model: Model) -> Iterator[None]:
    """Give every MLP, and every head's q, k and v, a separate input, which hooks can change."""
    # One copy of the residual stream for every head's q, k and v, and one for the MLP. Shared key
    # and value heads become one copy per query head.
    flags = ["use_split_qkv_input", "use_hook_mlp_in"]
    if model.cfg.n_key_value_heads is not None:
        flags.append("ungroup_grouped_query_attention")
    with _input_flags(model, *flags):
        yield


@contextlib.contextmanager
def plain_inputs(model: Model) -> Iterator[None]:
    """Clear the flags that make a forward pass slow, whatever the user has set."""
    with _input_flags(model), _shared_norms(model):
        yield


@contextlib.contextmanager
def separate_gradients(model: Model) -> Iterator[None]:
    """Let hooks take a separate gradient at every MLP's input and at every head's q, k and v.

    A hook at k or v must itself repeat a shared head once per query head (`copies_per_head`). The
    projections stay shared, so a pass costs as much as a plain one.
    """
    repeats = []
    if model.cfg.n_key_value_heads is not None:
        # With one repeat the model leaves the repeating of shared heads to the hooks.
        repeats = [(block.attn, "repeat_kv_heads", 1) for block in model.blocks]
    with _attributes(repeats), _input_flags(model, "use_hook_mlp_in"), _shared_norms(model):
        yield


def copies_per_head(model: Model, slot: str) -> int:
    """Return how many query heads share one head of q, k or v."""
    shared = model.cfg.n_key_value_heads
    if shared is None or slot == "q":
        return 1
    return model.cfg.n_heads // shared


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Take the model's turn, in evaluation mode, without gradients of weights or modes of torch."""
    with turn(model), without_modes(), contextlib.ExitStack() as stack:
        training = [module for module in model.modules() if module.training]
        evaluating = [(module, "training", False) for module in training]
        stack.enter_context(_attributes(evaluating))
        for parameter in model.parameters():
            # Weights made in inference mode have no gradient in any case.
            if parameter.requires_grad and not parameter.is_inference():
                stack.callback(parameter.requires_grad_)
                parameter.requires_grad_(False)
        yield


def run_to_residual(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: TokenMask,
    hooks: Hooks = (),
    *,
    layers: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Run a model with hooks, and return the residual stream after the last layer.

    One that is too large for the norm after it is refused.

    Args:
        mask: True for real tokens, False for padding on the right, which no real token reads.
        layers: stop after this many layers.
    """
    last = model.cfg.n_layers if layers is None else layers
    given = _run(model, tokens, mask, hooks, last)
    expected = _Expected(model, tokens.shape)
    residual = expected.whole("the residual stream", given)
    check_size(model, residual)
    return residual


def run_to_logits(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: TokenMask
) -> Float[Tensor, "batch pos vocab"]:
    """Run a model as it is, to the logits at every token."""
    logits = _run(model, tokens, mask)
    expected = _Expected(model, tokens.shape)
    return expected.whole("the logits", logits)


def _run(
    model: Model, tokens: Tensor, mask: Tensor, hooks: Hooks = (), layers: int | None = None
) -> Tensor:
    # With a tokenizer that pads on the left TransformerLens would guess where the padding is.
    pads_left = getattr(model.tokenizer, "padding_side", None) == "left"
    attention_mask = torch.ones_like(tokens) if pads_left else None
    masking = _padding_hooks(model, mask)[:layers]
    shape = tokens.shape
    with hooked(model, [*hooks, *masking], shape):
        return model(tokens, attention_mask=attention_mask, stop_at_layer=layers)


@contextlib.contextmanager
def hooked(model: Model, hooks: Hooks, shape: Sequence[int] | None = None) -> Context:
    """Add hooks to hook points, or to the outputs of modules, and remove them at the end.

    A model that lacks one of these modules, or does not run it in between, is refused.

    Args:
        shape: of the tokens that are run, to which what a user's hooks return is expanded.
    """
    expected = _Expected(model, shape)
    with turn(model), contextlib.ExitStack() as stack:
        added: list[tuple[str, _OnOutput]] = []
        for name, function in hooks:
            # A hook point is a module as well: it returns the activation that it is given.
            hook = _OnOutput(name, function, expected)
            handle = part_of(model, name).register_forward_hook(hook)
            stack.callback(handle.remove)
            added.append((name, hook))
        yield
    # A hook that is not run would change nothing, and nobody would know.
    for name, hook in added:
        if not hook.was_run:
            reason = because(model) or f"; {INSTEAD}"
            raise InputError(f"{name} is not computed in the run of a circuit{reason}.")


@contextlib.contextmanager
def told(model: Model, tokens: Int[Tensor, "batch pos"]) -> Context:
    """Tell in one line how a changed model cannot be run, though it can be run on these prompts.

    What it raises as well on all of them, with their padding, and on the first is raised as it is.
    """
    try:
        yield
    # A user's hook may raise anything.
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        found = changes(model)
        runs = (_can_run(model, each) for each in (tokens, tokens[:1]))
        if not found or not any(runs):
            raise
        raise InputError(
            f"{model.cfg.model_name} cannot be run on each prompt alone and on many together "
            f"({type(error).__name__}: {str(error)[:80]!r}): {named(found)}; let it act on prompts "
            "of any number and length, and on each vector of the last axis alone, as heads may "
            "have separate inputs, [batch, pos, head, d_model]; or remove it."
        ) from error


@torch.no_grad()
def _can_run(model: Model, tokens: Int[Tensor, "batch pos"]) -> bool:
    mask = torch.ones_like(tokens).bool()
    try:
        _run(model, tokens, mask, layers=model.cfg.n_layers)
    # As above.
    except Exception:
        return False
    return True


@contextlib.contextmanager
def received(model: Model, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record what modules are given, by their names."""
    seen: dict[str, Tensor] = {}
    with turn(model), contextlib.ExitStack() as stack:
        for name in names:
            handle = part_of(model, name).register_forward_hook(_Receiver(name, seen))
            stack.callback(handle.remove)
        yield seen


@contextlib.contextmanager
def counting_passes(model: Model) -> Iterator[Counts]:
    """Count this thread's `forward_passes`, and the `prompts_run` in them (prompts times circuits).

    >>> import circuits, torch
    >>> model = circuits.load_model("toy-world")
    >>> with counting_passes(model) as counts:
    ...     _ = model(torch.zeros(3, 5, dtype=torch.long))
    >>> counts
    {'forward_passes': 1, 'prompts_run': 3}
    """
    counts = {"forward_passes": 0, "prompts_run": 0}
    with turn(model):
        handle = model.register_forward_pre_hook(_Counter(counts))
    try:
        yield counts
    finally:
        with turn(model):
            handle.remove()


def scored_logits(
    model: Model, residual: Float[Tensor, "batch pos d_model"], scored: TokenMask
) -> Float[Tensor, "scored vocab"]:
    """Compute the logits at some tokens from the final residual stream."""
    if not last_step_changed(model):
        return unembed(model, residual[scored])
    # A user's hook there may depend on the position, so it sees whole prompts, as in the model.
    prompt_logits = model.cfg.d_vocab_out * residual.shape[1]
    size = max(1, WHOLE_LOGITS // prompt_logits)
    pairs = zip(residual.split(size), scored.split(size), strict=True)
    whole = ((_whole_last_step(model, stream), chosen) for stream, chosen in pairs)
    return torch.cat([logits[chosen] for logits, chosen in whole])


def unembed(
    model: Model, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch vocab"]:
    """Compute the logits from the final residual stream with the model's own modules."""
    rows = residual.flatten(0, -2)
    logits = _last_step(model, rows[None])
    return logits[0].unflatten(0, residual.shape[:-1])


def _whole_last_step(
    model: Model, residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos vocab"]:
    logits = _last_step(model, residual)
    expected = _Expected(model, residual.shape[:2])
    return expected.whole("the logits", logits)


def _last_step(
    model: Model, residual: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos vocab"]:
    # cap(norm(x) W_U + b_U)
    normed = residual
    if model.cfg.normalization_type is not None:
        normed = model.ln_final(normed)
    soft_cap = model.cfg.output_logits_soft_cap or 0
    return soft_capped(model.unembed(normed), soft_cap)


@dataclass(frozen=True)
class _Expected:
    """What activations are of a run of tokens: a user's hooks may return what broadcasts to it."""

    model: Model
    shape: Sequence[int] | None

    def whole(self, name: str, found: Any, given: Tensor | None = None) -> Tensor:
        """Expand an activation, [batch, pos, ...] or in attention [batch, head, query, key].

        Args:
            given: what it takes the place of.
        """
        if self.shape is None:
            return found
        try:
            # Where the model adds what a hook returns, a number will do.
            found = torch.as_tensor(found)
            like = found if given is None else given
            keeps_type = name.endswith(MIXED) or not like.is_floating_point()
            dtype = like.dtype if keeps_type else self.model.cfg.dtype
            axes = 1 if name.endswith(ATTENTION) else 2
            tokens, rest = self.shape[:axes], like.shape[axes:]
            expected = (*tokens, *rest)
            # Norms of heads see all vectors in a row.
            pairs = zip(like.shape, tokens, strict=False)
            if given is not None and any(have not in (1, want) for have, want in pairs):
                expected = tuple(like.shape)
            found = found.to(like.device, dtype)
            return found if found.shape == expected else found.expand(expected)
        except (RuntimeError, TypeError, ValueError) as error:
            is_tensor = isinstance(found, Tensor)
            what = f"of shape {list(found.shape)}" if is_tensor else f"a {type(found).__name__}"
            raise InputError(
                f"in {self.model.cfg.model_name} {name} is {what} for tokens of shape "
                f"{list(self.shape)}{because(self.model)}; let hooks return tensors that have the "
                "shape of what they are given, for any number of prompts, or broadcast to it."
            ) from error


class _OnOutput(Own):
    """A hook of torch that calls a `Hook`."""

    def __init__(self, name: str, function: Hook, expected: _Expected) -> None:
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


class _Counter(Own):
    """A hook of torch that counts the runs of the thread that it was made in."""

    def __init__(self, counts: Counts) -> None:
        self.counts, self.thread = counts, threading.get_ident()

    def __call__(self, module: object, arguments: Sequence[Tensor]) -> None:
        if threading.get_ident() == self.thread:
            self.counts["forward_passes"] += 1
            self.counts["prompts_run"] += len(arguments[0])


def _padding_hooks(model: Model, mask: TokenMask) -> Hooks:
    """By layer, mask pads on the right, which TransformerLens does in causal attention only."""
    if model.cfg.attention_dir == "causal" or mask.all():
        return []
    # [batch, head, query, key]
    pads = ~mask[:, None, None]

    def ignore_pads(scores: Tensor) -> Tensor:
        return scores.masked_fill(pads, -torch.inf)

    layers = range(model.cfg.n_layers)
    return [(f"blocks.{layer}.attn.hook_attn_scores", ignore_pads) for layer in layers]


@contextlib.contextmanager
def _input_flags(model: Model, *chosen: str) -> Context:
    """Set these of `INPUT_FLAGS`, and clear the others."""
    # A layer that was copied, or comes from another model, has settings of its own.
    configs = {id(each): each for each in (model.cfg, *own_settings(model).values())}
    flags = [(cfg, name, name in chosen) for cfg in configs.values() for name in INPUT_FLAGS]
    with turn(model), _attributes(flags):
        yield


@contextlib.contextmanager
def _shared_norms(model: Model) -> Iterator[None]:
    """Compute the norm before attention once for q, k and v, not three times as TransformerLens."""
    name = str(model.cfg.normalization_type)
    kind = NORM_TYPES.get(name, type(None))
    found = (module for path, module in model.named_modules() if path.endswith(".ln1"))
    # A changed norm may compute something else each time.
    norms = [norm for norm in found if not is_changed(norm, kind)]
    forwards = [(norm, "forward", _Remembering(norm.forward)) for norm in norms]
    with _attributes(forwards):
        yield


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


@contextlib.contextmanager
def _attributes(changes: Sequence[Attribute]) -> Context:
    """Set attributes, given as (object, name, value), and restore them at the end."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            if name in vars(owner):
                before = getattr(owner, name)
                stack.callback(setattr, owner, name, before)
            else:
                # The object only inherits the attribute from its class.
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield

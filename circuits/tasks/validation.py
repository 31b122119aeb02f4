"""Checks of what a `Task` is made from. They raise `InputError`, as the input comes from users.

They return tensors in the form that `Task` keeps: int64 or bool, on the device of `clean`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Integer
from torch import Tensor
from torch.nn.functional import one_hot

from circuits.graph.nodes import check_position_name
from circuits.system.errors import InputError
from circuits.system.kinds import one_of
from circuits.system.numbers import shown

Masks = Mapping[str, Tensor]


def check_name(name: Any) -> None:
    """The name of a task can be that of a folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise InputError(
            f"a task cannot be called {shown(name)}, because folders get its name; use only "
            "letters, digits and . _ - +, and no . at the start."
        )


def check_prompts(clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and corrupted token ids have the same shape."""
    clean, corrupted = _tokens("clean", clean), _tokens("corrupted", corrupted)
    if clean.shape != corrupted.shape:
        raise InputError(
            f"clean has shape {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)}; "
            "they are compared token by token, so give the same number of prompts and tokens."
        )
    return clean, corrupted.to(clean.device)


def check_mask(
    attention_mask: Tensor | None, lengths: Tensor | None, padding_side: str, clean: Tensor
) -> Tensor:
    """The real tokens of each prompt, one stretch [batch, pos]; by default all tokens are real."""
    batch, pos = clean.shape
    padding_side = one_of(padding_side, "padding_side", ("right", "left"))
    if attention_mask is not None and lengths is not None:
        raise InputError("attention_mask and lengths both say which tokens are real; give one.")
    if attention_mask is not None:
        return _stretches(attention_mask, clean)
    if lengths is None:
        if padding_side == "left":
            raise InputError(
                "padding_side='left', but nothing says how much padding there is; give lengths, or "
                "attention_mask instead."
            )
        return torch.ones_like(clean, dtype=torch.bool)
    advice = f"integers [{batch}], from 1 to {pos}"
    _require("lengths", lengths, advice, Integer[Tensor, f"{batch}"])
    lengths = lengths.long()
    _require_valid("lengths", lengths, (lengths >= 1) & (lengths <= pos), advice)
    real = first_tokens(lengths.to(clean.device), clean)
    return real.flip(1) if padding_side == "left" else real


def first_tokens(n: Tensor, tokens: Tensor) -> Bool[Tensor, "batch pos"]:
    """True at as many tokens of each prompt [batch, pos] as `n` [batch] says, from the first on."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return positions < n[:, None]


def by_row(tokens: Tensor, row_prompt: Tensor) -> Tensor:
    """The answers of each scored row, of those of each prompt or of each row already."""
    return tokens if len(tokens) == len(row_prompt) else tokens[row_prompt]


def _stretches(mask: Tensor, clean: Tensor) -> Tensor:
    """A mask as booleans; each prompt has one stretch of real tokens."""
    batch, pos = clean.shape
    name, shape = "attention_mask", f"{batch} {pos}"
    advice = f"booleans, or integers 0 and 1, [{batch}, {pos}]"
    _require(name, mask, advice, Integer[Tensor, shape], Bool[Tensor, shape])
    _require_valid(name, mask, (mask == 0) | (mask == 1), advice)
    real = mask.to(clean.device).bool()
    # A stretch starts at a real token after no real token.
    nothing = torch.zeros_like(clean[:, :1])
    starts = real.int().diff(dim=1, prepend=nothing) > 0
    for prompt in _first_without(starts.sum(1, keepdim=True) == 1):
        found = "has a hole" if real[prompt].any() else "marks no token"
        raise InputError(
            f"attention_mask {found} in prompt {prompt}; mark one stretch of real tokens in every "
            "prompt, with padding before and after it only."
        )
    return real


def check_answers(name: str, tokens: Tensor | None, scored: Tensor) -> Tensor | None:
    """Different answer tokens [batch, k] or [scored, k], padded with -1; none are without any."""
    if tokens is None:
        return None
    batch, rows = len(scored), int(scored.sum())
    advice = f"integers [{batch}] or [{batch}, k], padded with -1"
    if rows != batch:
        advice += f", or {rows} for the scored rows instead of {batch} for the prompts"
    types = [Integer[Tensor, f"{n}{k}"] for n in (batch, rows) for k in ("", " k")]
    _require(name, tokens, advice, *types)
    # Without an axis k there is one answer each.
    tokens = tokens.reshape(len(tokens), -1).to(scored.device).long()
    what = "prompt" if len(tokens) == batch else "scored row"
    _require_valid(name, tokens, tokens >= -1, "token ids, padded with -1", what)
    for row in _first_without(tokens >= 0):
        raise InputError(
            f"{name} is empty for {what} {row}; give every {what} at least one token, or leave "
            f"{name} out."
        )
    return _different(tokens)


def _different(tokens: Tensor) -> Tensor:
    """Every token of a row [batch, k] once, in order of first appearance, padded with -1."""
    in_order, places = tokens.sort(dim=1, stable=True)
    again = in_order == in_order.roll(1, dims=1)
    again[:, 0] = False
    in_order[again] = -1
    once = torch.empty_like(tokens).scatter(1, places, in_order)
    # Padding comes last, and no more of it than the longest row needs.
    is_token = once >= 0
    order = is_token.int().argsort(dim=1, descending=True, stable=True)
    n_most = int(is_token.sum(1).max())
    return once.gather(1, order)[:, :n_most]


def check_different(answers: Tensor | None, wrong_answers: Tensor | None, scored: Tensor) -> None:
    """In no prompt is an answer also a wrong answer, at every scored position."""
    if answers is None or wrong_answers is None:
        return
    row_prompt = scored.nonzero()[:, 0]
    right, wrong = by_row(answers, row_prompt), by_row(wrong_answers, row_prompt)
    is_wrong = right[:, :, None] == wrong[:, None]
    both = is_wrong.any(2) & (right >= 0)
    # Answers of several tokens may begin alike.
    differs = torch.zeros_like(scored[:, :1])
    differs[row_prompt[~both.any(1)]] = True
    for prompt in _first_without(differs):
        token = int(right[row_prompt == prompt][0, 0])
        raise InputError(
            f"prompt {prompt} has an answer that is also a wrong answer (such as token {token}); "
            "remove it from one."
        )


def check_scored(answer_positions: Tensor | None, clean: Tensor, mask: Tensor) -> Tensor:
    """Every prompt has a scored position: [batch] integers, [batch, pos] booleans, or the last."""
    name = "answer_positions"
    batch, pos = clean.shape
    scored = _last(mask) if answer_positions is None else answer_positions
    advice = f"integers [{batch}] or booleans [{batch}, {pos}]"
    _require(name, scored, advice, Integer[Tensor, f"{batch}"], Bool[Tensor, f"{batch} {pos}"])
    scored = scored.to(clean.device)
    if scored.dtype != torch.bool:
        prompts = torch.arange(batch, device=scored.device)
        _require_real(name, torch.stack([prompts, scored.long()], 1), mask)
        return one_hot(scored.long(), pos).bool()
    _require_real(name, scored.nonzero(), mask)
    for prompt in _first_without(scored):
        raise InputError(f"prompt {prompt} has no scored position; set {name} in it.")
    return scored


def _last(mask: Tensor) -> Tensor:
    """The last real token of each prompt."""
    n_after = mask.flip(1).int().argmax(1)
    return mask.shape[1] - 1 - n_after


def check_spans(spans: Masks, clean: Tensor, real: Tensor) -> Masks:
    """The names of spans can be written in node names, and their tokens are real."""
    batch, pos = clean.shape
    checked = {}
    for name, mask in spans.items():
        check_position_name(name)
        title = f"span {name!r}"
        _require(title, mask, f"booleans [{batch}, {pos}]", Bool[Tensor, f"{batch} {pos}"])
        mask = mask.to(clean.device)
        _require_real(title, mask.nonzero(), real)
        checked[name] = mask
    return checked


def _tokens(name: str, tokens: Tensor) -> Tensor:
    _require(name, tokens, "integers [batch, pos]", Integer[Tensor, "batch pos"])
    tokens = tokens.long()
    advice = "token ids of 0 or more: pad with any token, and give lengths"
    _require_valid(name, tokens, tokens >= 0, advice)
    return tokens


def _first_without(marks: Tensor) -> list[int]:
    """The first row without a mark, if there is one."""
    without = ~marks.any(1)
    return without.nonzero()[:1].flatten().tolist()


def _require(name: str, tensor: Tensor, wanted: str, *types: Any) -> None:
    # The types of jaxtyping check dtype and shape at once.
    is_empty = tensor.numel() == 0
    if is_empty or not isinstance(tensor, types):
        found = f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        also = ", with no axis of size 0" if is_empty else ""
        raise InputError(f"{name} has {found}; give {wanted}{also}.")


def _require_valid(
    name: str, values: Tensor, is_valid: Tensor, wanted: str, what: str = "prompt"
) -> None:
    # Both tensors are [batch, ...].
    wrong = (~is_valid).nonzero()
    if len(wrong):
        value, prompt = int(values[~is_valid][0]), int(wrong[0, 0])
        raise InputError(f"{name} holds {value} for {what} {prompt}; give {wanted}.")


def _require_real(name: str, marks: Tensor, real: Tensor) -> None:
    # `marks` are rows of a prompt and a position in it.
    prompts, positions = marks.T
    inside = positions.clamp(0, real.shape[1] - 1)
    is_padding = (positions != inside) | ~real[prompts, inside]
    if is_padding.any():
        prompt, position = marks[is_padding][0].tolist()
        raise InputError(
            f"{name} marks position {position} of prompt {prompt}, "
            f"which has {int(real[prompt].sum())} tokens; mark real tokens only."
        )

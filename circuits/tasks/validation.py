"""Checks of what a `Task` is made from. They raise `InputError`, as the input comes from users.

They return tensors in the form that `Task` keeps: int64 or bool, on the device of `clean`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Integer
from torch import Tensor
from torch.nn.functional import one_hot

from circuits.graph.nodes import check_position_name
from circuits.system.errors import InputError

Masks = Mapping[str, Tensor]


def check_prompts(clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and corrupted token ids have the same shape."""
    clean, corrupted = _tokens("clean", clean), _tokens("corrupted", corrupted)
    if clean.shape != corrupted.shape:
        raise InputError(
            f"clean has shape {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)}; "
            "they are compared token by token, so give the same number of prompts and tokens."
        )
    return clean, corrupted.to(clean.device)


def check_lengths(lengths: Tensor | None, clean: Tensor) -> Tensor:
    """The number of real tokens of each prompt; None means that all tokens are real."""
    batch, pos = clean.shape
    if lengths is None:
        return clean.new_full((batch,), pos)
    advice = f"integers [{batch}], from 1 to {pos}"
    _require("lengths", lengths, advice, Integer[Tensor, f"{batch}"])
    lengths = lengths.long()
    _require_valid("lengths", lengths, (lengths >= 1) & (lengths <= pos), advice)
    return lengths.to(clean.device)


def check_answers(name: str, tokens: Tensor | None, clean: Tensor) -> Tensor | None:
    """Answer tokens become [batch, k], padded with -1, and no prompt is left without any."""
    if tokens is None:
        return None
    batch = len(clean)
    advice = f"integers [{batch}] or [{batch}, k], padded with -1"
    _require(name, tokens, advice, Integer[Tensor, f"{batch}"], Integer[Tensor, f"{batch} k"])
    # [batch] answers are the case k = 1.
    tokens = tokens.reshape(batch, -1).to(clean.device).long()
    _require_valid(name, tokens, tokens >= -1, "token ids, padded with -1")
    without = (tokens < 0).all(1).nonzero()
    if len(without):
        raise InputError(
            f"{name} is empty for prompt {int(without[0])}; give every prompt at least one token, "
            f"or leave {name} out."
        )
    return tokens


def check_scored(answer_positions: Tensor | None, clean: Tensor, lengths: Tensor) -> Tensor:
    """Every prompt has a scored position: [batch] integers, [batch, pos] booleans, or the last."""
    name = "answer_positions"
    batch, pos = clean.shape
    # By default the last real token is scored.
    scored = lengths - 1 if answer_positions is None else answer_positions
    advice = f"integers [{batch}] or booleans [{batch}, {pos}]"
    _require(name, scored, advice, Integer[Tensor, f"{batch}"], Bool[Tensor, f"{batch} {pos}"])
    scored = scored.to(clean.device)
    if scored.dtype != torch.bool:
        scored = scored.long()
        prompts = torch.arange(batch, device=scored.device)
        marks = torch.stack([prompts, scored], dim=1)
        _require_real(name, marks, lengths)
        return one_hot(scored, pos).bool()
    _require_real(name, scored.nonzero(), lengths)
    without = (~scored.any(1)).nonzero()
    if len(without):
        raise InputError(f"prompt {int(without[0])} has no scored position; set {name} in it.")
    return scored


def check_spans(spans: Masks, clean: Tensor, lengths: Tensor) -> Masks:
    """The names of spans can be written in node names, and their tokens are real."""
    batch, pos = clean.shape
    checked = {}
    for name, mask in spans.items():
        check_position_name(name)
        title = f"span {name!r}"
        _require(title, mask, f"booleans [{batch}, {pos}]", Bool[Tensor, f"{batch} {pos}"])
        mask = mask.to(clean.device)
        _require_real(title, mask.nonzero(), lengths)
        checked[name] = mask
    return checked


def _tokens(name: str, tokens: Tensor) -> Tensor:
    _require(name, tokens, "integers [batch, pos]", Integer[Tensor, "batch pos"])
    tokens = tokens.long()
    advice = "token ids of 0 or more: pad with any token, and give lengths"
    _require_valid(name, tokens, tokens >= 0, advice)
    return tokens


def _require(name: str, tensor: Tensor, wanted: str, *types: Any) -> None:
    # The types of jaxtyping check dtype and shape at once.
    is_empty = tensor.numel() == 0
    if is_empty or not isinstance(tensor, types):
        found = f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        also = ", with no axis of size 0" if is_empty else ""
        raise InputError(f"{name} has {found}; give {wanted}{also}.")


def _require_valid(name: str, values: Tensor, is_valid: Tensor, wanted: str) -> None:
    # Both tensors are [batch, ...].
    wrong = (~is_valid).nonzero()
    if len(wrong):
        value, prompt = int(values[~is_valid][0]), int(wrong[0, 0])
        raise InputError(f"{name} holds {value} for prompt {prompt}; give {wanted}.")


def _require_real(name: str, marks: Tensor, lengths: Tensor) -> None:
    # `marks` are rows of a prompt and a position in it.
    prompts, positions = marks.T
    is_padding = (positions < 0) | (positions >= lengths[prompts])
    if is_padding.any():
        prompt, position = marks[is_padding][0].tolist()
        raise InputError(
            f"{name} marks position {position} of prompt {prompt}, "
            f"which has {int(lengths[prompt])} tokens; mark real tokens only."
        )

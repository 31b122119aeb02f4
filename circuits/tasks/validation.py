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
_KINDS: dict[str, Any] = {"integers": Integer, "booleans": Bool}


def check_prompts(clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and corrupted token ids have the same shape."""
    clean = _integers("clean", clean, "batch pos", lowest=0)
    corrupted = _integers("corrupted", corrupted, "batch pos", lowest=0)
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
    lengths = _integers("lengths", lengths, f"{batch}", lowest=1, highest=pos)
    return lengths.to(clean.device)


def check_answers(name: str, tokens: Tensor | None, clean: Tensor) -> Tensor | None:
    """Answer tokens become [batch, k], padded with -1, and no prompt is left without any."""
    if tokens is None:
        return None
    batch = len(clean)
    tokens = _integers(name, tokens, f"{batch}", f"{batch} k", lowest=-1)
    # [batch] answers are the case k = 1.
    tokens = tokens.reshape(batch, -1).to(clean.device)
    without = (tokens < 0).all(1).nonzero()
    if len(without):
        raise InputError(f"{name} is empty for prompt {int(without[0])}; give it a token.")
    return tokens


def check_scored(answer_positions: Tensor | None, clean: Tensor, lengths: Tensor) -> Tensor:
    """Every prompt has a scored position: [batch] integers, [batch, pos] booleans, or the last."""
    name = "answer_positions"
    batch, pos = clean.shape
    # By default the last real token is scored.
    scored = lengths - 1 if answer_positions is None else answer_positions
    if scored.dtype != torch.bool:
        scored = _integers(name, scored, f"{batch}", lowest=0, highest=pos - 1)
        scored = one_hot(scored, pos).bool()
    scored = _mask(name, scored, lengths, pos)
    without = (~scored.any(1)).nonzero()
    if len(without):
        raise InputError(f"prompt {int(without[0])} has no scored position; set {name} in it.")
    return scored


def check_spans(spans: Masks, clean: Tensor, lengths: Tensor) -> Masks:
    """The names of spans can be written in node names, and their tokens are real."""
    checked = {}
    for name, mask in spans.items():
        check_position_name(name)
        checked[name] = _mask(f"span {name!r}", mask, lengths, clean.shape[1])
    return checked


def _mask(name: str, mask: Tensor, lengths: Tensor, pos: int) -> Tensor:
    _require(name, mask, "booleans", f"{len(lengths)} {pos}")
    mask = mask.to(lengths.device)
    positions = torch.arange(pos, device=lengths.device)
    is_padding = positions >= lengths[:, None]
    marked_padding = (mask & is_padding).nonzero()
    if len(marked_padding):
        prompt, position = marked_padding[0].tolist()
        raise InputError(
            f"{name} marks position {position} of prompt {prompt}, "
            f"which has {int(lengths[prompt])} tokens; mark real tokens only."
        )
    return mask


def _integers(
    name: str, values: Tensor, *shapes: str, lowest: int, highest: int | None = None
) -> Tensor:
    _require(name, values, "integers", *shapes)
    smallest, largest = map(int, values.aminmax())
    if smallest < lowest:
        raise InputError(f"{name} holds {smallest}; the smallest valid value is {lowest}.")
    if highest is not None and largest > highest:
        raise InputError(f"{name} holds {largest}; the largest valid value is {highest}.")
    return values.long()


def _require(name: str, tensor: Tensor, kind: str, *shapes: str) -> None:
    # Shapes are in jaxtyping's notation, such as "3 k". Its types check dtype and shape at once.
    types = tuple(_KINDS[kind][Tensor, shape] for shape in shapes)
    is_empty = tensor.numel() == 0
    if is_empty or not isinstance(tensor, types):
        found = f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        wanted = " or ".join(f"[{shape.replace(' ', ', ')}]" for shape in shapes)
        also = ", with no axis of size 0" if is_empty else ""
        raise InputError(f"{name} has {found}; give {kind} {wanted}{also}.")

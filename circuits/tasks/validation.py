"""What comes in as tensors is checked here, once, and brought into one form. Every refusal is an InputError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from circuits.graph.nodes import check_position_name
from circuits.system.errors import InputError
from circuits.tasks.prompts import PromptPair, shorten


def prompts(clean: Tensor, corrupted: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and corrupted prompts: non-negative integers of one shape [batch, pos]."""
    for part, tokens in (("clean", clean), ("corrupted", corrupted)):
        _check_integers(part, tokens)
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise InputError(
                f"{part} has shape {tuple(tokens.shape)}; give [batch, pos], with at least one prompt and one token."
            )
        if int(tokens.min()) < 0:
            raise InputError(
                f"{part} holds the token {int(tokens.min())}; tokens are not negative (pad with any token, and give lengths)."
            )
    if clean.shape != corrupted.shape:
        raise InputError(
            f"clean has shape {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)}; they are compared token by token, "
            "so give the same number of prompts and tokens."
        )
    return clean.long(), corrupted.to(clean.device).long()


def lengths(given: Tensor | None, clean: Tensor) -> Tensor:
    """The number of real tokens of each prompt."""
    batch, pos = clean.shape
    if given is None:
        return torch.full((batch,), pos, device=clean.device)
    _check_integers("lengths", given)
    if given.shape != (batch,) or int(given.min()) < 1 or int(given.max()) > pos:
        raise InputError(
            f"lengths has shape {tuple(given.shape)} and values {_range(given)}; give [{batch}] integers from 1 to {pos}."
        )
    return given.to(clean.device).long()


def answers(given: Tensor | None, clean: Tensor, part: str) -> Tensor | None:
    """Answers as [batch, k] padded with -1."""
    if given is None:
        return None
    _check_integers(part, given)
    columns = given[:, None] if given.dim() == 1 else given
    if columns.dim() != 2 or len(columns) != len(clean) or columns.shape[1] == 0:
        raise InputError(
            f"{part} has shape {tuple(given.shape)} for {len(clean)} prompts; give [{len(clean)}] or [{len(clean)}, k] padded with -1."
        )
    if int(columns.min()) < -1:
        raise InputError(f"{part} holds {int(columns.min())}; give token ids, padded with -1.")
    if empty := (columns < 0).all(1).nonzero().flatten().tolist():
        raise InputError(
            f"{part} is empty for prompt {empty[0]}; give every prompt at least one token, or leave {part} out."
        )
    return columns.to(clean.device).long()


def scored(given: Tensor | None, clean: Tensor, real: Tensor) -> Tensor:
    """Where prompts are scored, as booleans [batch, pos]."""
    batch, pos = clean.shape
    if given is not None and given.dtype == torch.bool:
        mask = _mask("answer_positions", given, clean, real)
        if none := (~mask.any(1)).nonzero().flatten().tolist():
            raise InputError(
                f"prompt {none[0]} has no scored position; give answer_positions at least one in every prompt."
            )
        return mask
    last = real - 1
    if given is not None:
        _check_integers("answer_positions", given)
        if given.shape != (batch,):
            raise InputError(
                f"answer_positions has shape {tuple(given.shape)}; give [{batch}] integers or [{batch}, {pos}] booleans."
            )
        given = given.to(clean.device)
        if outside := ((given < 0) | (given > last)).nonzero().flatten().tolist():
            row = outside[0]
            raise InputError(
                f"answer position {int(given[row])} lies outside prompt {row}, whose last token is at {int(last[row])}; move it inside."
            )
        last = given.long()
    return torch.nn.functional.one_hot(last, pos).bool()


def spans(given: Mapping[str, Tensor], clean: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Named spans as booleans [batch, pos]."""
    for name, mask in given.items():
        check_position_name(name)
        if mask.dtype != torch.bool:
            raise InputError(f"span {name!r} has dtype {mask.dtype}; give booleans [batch, pos].")
    return {name: _mask(f"span {name!r}", mask, clean, real) for name, mask in given.items()}


def same_parts(pairs: Sequence[PromptPair]) -> None:
    """All pairs of a task have answers, or none has; and so for wrong answers and each span."""
    for part in ("answers", "wrong_answers"):
        with_it = [bool(getattr(pair, part)) for pair in pairs]
        if any(with_it) and not all(with_it):
            raise InputError(
                f"prompt {shorten(pairs[with_it.index(False)].clean)} has no {part} but others have; give all prompts some, or none."
            )
    first = sorted(pairs[0].spans)
    for pair in pairs:
        if sorted(pair.spans) != first:
            raise InputError(
                f"the spans of {shorten(pair.clean)} are {sorted(pair.spans)}, those of the first prompt {first}; name the same."
            )


def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Rows of integers as one tensor, padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])


def _mask(what: str, mask: Tensor, clean: Tensor, real: Tensor) -> Tensor:
    if mask.shape != clean.shape:
        raise InputError(
            f"{what} has shape {tuple(mask.shape)}; give one boolean per token, {tuple(clean.shape)}."
        )
    mask = mask.to(clean.device)
    past_end = mask & (torch.arange(clean.shape[1], device=clean.device) >= real[:, None])
    if bool(past_end.any()):
        row, position = past_end.nonzero()[0].tolist()
        raise InputError(
            f"{what} marks position {position} of prompt {row}, which has {int(real[row])} tokens; mark real tokens only."
        )
    return mask


def _check_integers(part: str, tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise InputError(f"{part} has dtype {tensor.dtype}; give integers.")


def _range(values: Tensor) -> str:
    return f"from {int(values.min())} to {int(values.max())}" if values.numel() else "none"

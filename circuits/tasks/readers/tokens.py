"""Token ids and masks from what users have: lists, arrays, tensors, a tokenizer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.system.errors import InputError, OutOfRangeError
from circuits.system.numbers import python_number, shown, whole
from circuits.system.tensors import as_tensor
from circuits.tasks.prompts import DoesNotFit

Prompt = str | Sequence[int] | np.ndarray | Tensor | Mapping[str, Any]
"""Text, or the token ids of one prompt, also as a tokenizer's output."""


def split_encoding(given: Any) -> tuple[Any, Any]:
    """The token ids and, if there is one, the attention mask of a tokenizer's output."""
    # BatchEncoding is a UserDict, which is a mapping.
    if isinstance(given, Mapping) and "input_ids" in given:
        return given["input_ids"], given.get("attention_mask")
    return given, None


def token_ids(clean: Any, corrupted: Any, mask: Any) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Token ids of clean and corrupted prompts, their mask, and whether both have one."""
    ids, own_mask = _token_ids(clean, "clean")
    others, other_mask = ids, own_mask
    if corrupted is not None:
        others, other_mask = _token_ids(corrupted, "corrupted")
    are_marked = mask is not None or (own_mask is not None and other_mask is not None)
    given = [each for each in (mask, own_mask, other_mask) if each is not None]
    masks = [as_tensor(each, "attention_mask") for each in given]
    if any(not torch.equal(each.bool(), masks[0].bool()) for each in masks[1:]):
        raise InputError(
            "the attention masks that are given differ, and clean and corrupted prompts are "
            "compared token by token; give prompts of the same lengths, padded alike, or text with "
            "corrupted_spans."
        )
    return ids, others, masks[0] if masks else None, are_marked


def _token_ids(given: Any, name: str) -> tuple[Tensor, Any]:
    ids, mask = split_encoding(given)
    if ids is None or isinstance(ids, str):
        raise InputError(f"{name}={shown(ids)}: give token ids; for text use Task.from_prompts.")
    return as_tensor(ids, name), mask


def special_id(tokenizer: Any, name: str) -> int | None:
    """The id of a token such as "bos_token", if the tokenizer has it.

    TransformerLens gives every tokenizer the text of one; where its vocabulary lacks that text, the
    id is that of the unknown token.
    """
    number: int | None = getattr(tokenizer, f"{name}_id", None)
    if number is None or tokenizer.convert_ids_to_tokens(number) != getattr(tokenizer, name):
        return None
    return number


def checked_id(token: int, cfg: Any) -> int:
    """A token id that the model of this configuration predicts, or an InputError."""
    if token >= cfg.d_vocab_out:
        raise DoesNotFit(
            f"there is no token {shown(token)}: {cfg.model_name} predicts 0 to "
            f"{cfg.d_vocab_out - 1}; give an id of this model's, or the text.",
            "a token id that the model does not have",
        )
    return token


def each_prompt(given: Any) -> Any:
    """The prompts of a list, or of a tokenizer's output for several; others as they are."""
    ids, mask = split_encoding(given)
    if mask is None:
        return ids
    pairs = zip(ids, mask, strict=True)
    return [{"input_ids": row, "attention_mask": real} for row, real in pairs]


def prompt_indices(given: Any, n_prompts: int) -> Tensor:
    """What selects prompts, as integers: a slice, a number, several, or a boolean for each."""
    chosen = given
    if python_number(given) is not None:
        chosen = [whole(given, "index")]
    elif isinstance(given, slice):
        # Tensors have no slices that go backwards.
        chosen = _in_slice(given, n_prompts)
    indices = as_tensor(chosen, "indices").cpu()
    is_mask = indices.dtype == torch.bool
    if is_mask and indices.shape == (n_prompts,):
        return indices.nonzero().flatten()
    if not indices.numel():
        return indices.long()
    wrong = indices.is_floating_point() or indices.is_complex() or is_mask or indices.ndim != 1
    if wrong or indices.max() >= n_prompts or indices.min() < -n_prompts:
        raise OutOfRangeError(
            f"{shown(given)} selects no prompts of {n_prompts}; give a slice, numbers from 0 to "
            f"{n_prompts - 1}, or a boolean for each."
        )
    return indices.long()


def _in_slice(given: slice, n_prompts: int) -> list[int]:
    try:
        return list(range(n_prompts)[given])
    except (TypeError, ValueError) as error:
        raise InputError(f"{shown(given)} selects no prompts: {error}.") from error

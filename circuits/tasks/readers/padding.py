"""Padding that nobody marked, which a model would read as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from circuits.system.errors import InputError
from circuits.tasks.readers.tokens import special_id


def check_no_padding(
    tokenizer: Any,
    cfg: Any,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    name: Callable[[int], str],
    remedy: str,
) -> None:
    """Refuse prompts whose real tokens begin or end with the token that the tokenizer pads with.

    BOS may stand before or after the padding that a prompt begins with. Where BOS or EOS also pads,
    one is text if all prompts begin with one, or all end with one. So it is at the beginning where
    prompts have no BOS: some models are given a token of another use in its place.

    Args:
        cfg: the configuration of the model that reads them.
        real: the first tokens of each prompt.
        name: what an error calls the prompt of a number.
        remedy: what to do, also if the token is text.
    """
    names = ("pad_token", "bos_token", "eos_token")
    pad, bos, eos = [special_id(tokenizer, name) for name in names]
    if pad is None:
        return
    has_two_uses = pad in (bos, eos)
    may_begin = has_two_uses or not cfg.default_prepend_bos
    is_pad = (tokens == pad) & real
    begins = real & (is_pad | (tokens == bos)).cumprod(1).bool()
    ends = real & (is_pad | ~real).flip(1).cumprod(1).flip(1).bool()
    for where, run, may_be_text in (("begin", begins, may_begin), ("end", ends, has_two_uses)):
        count = (run & is_pad).sum(1)
        is_single = (run.sum(1) == 1) & may_be_text
        is_padded = (count > 0) & ~(is_single & (count > 0).all())
        for prompt in is_padded.nonzero()[:1].flatten().tolist():
            found = f"{int(count[prompt])} of token {pad}, {tokenizer.pad_token!r}"
            some = f", with which not all {where}" if is_single[prompt] else ""
            raise InputError(
                f"{name(prompt)} {where}s with padding ({found}{some}), which would be read as "
                f"text; {remedy}"
            )

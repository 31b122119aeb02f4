"""Padding that nobody marked, which a model would read as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from circuits.system.errors import InputError


def check_no_padding(
    tokenizer: Any,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    name: Callable[[int], str],
    remedy: str,
) -> None:
    """Refuse prompts whose real tokens begin or end with the token that the tokenizer pads with.

    BOS may stand before or after the padding that a prompt begins with. Where BOS or EOS also pads,
    one is text if all prompts begin with one, or all end with one.

    Args:
        real: the first tokens of each prompt.
        name: what an error calls the prompt of a number.
        remedy: what to do, also if the token is text.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return
    special = {"BOS": tokenizer.bos_token_id, "EOS": tokenizer.eos_token_id}
    uses = " and ".join(use for use, token in special.items() if token == pad)
    is_pad = (tokens == pad) & real
    begins = (is_pad | (tokens == special["BOS"])).cumprod(1).bool()
    ends = (is_pad | ~real).flip(1).cumprod(1).flip(1).bool()
    for where, run in (("begin", begins & real), ("end", ends & real)):
        count = (run & is_pad).sum(1)
        is_single = (run.sum(1) == 1) & (uses != "")
        is_padded = (count > 0) & ~(is_single & (count > 0).all())
        for prompt in is_padded.nonzero()[:1].flatten().tolist():
            found = f"{int(count[prompt])} of token {pad}, {tokenizer.pad_token!r}"
            also = f", also {uses}, but not all prompts {where} so" if is_single[prompt] else ""
            raise InputError(
                f"{name(prompt)} {where}s with padding ({found}{also}), which would be read as "
                f"text; {remedy}"
            )

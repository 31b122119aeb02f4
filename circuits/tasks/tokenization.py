"""Prompt pairs as tokens of one model.

The tokenizer is called directly. TransformerLens's `to_tokens` pads on a side that depends on the
tokenizer's state, and may add a second BOS token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from circuits.graph.nodes import check_position_name
from circuits.models import Model, check_class
from circuits.system.errors import InputError
from circuits.tasks.messages import quoted, shorten
from circuits.tasks.prompts import CharSpan, PromptPair

TokenIds = list[int]
PromptTokens = Int[Tensor, " pos"]
_ONE_PROMPT: tuple[Any, ...] = (Integer[Tensor, " pos"], Integer[Tensor, "1 pos"])


class DoesNotFit(InputError):
    """A prompt pair that this model's tokenizer cannot represent, because of `words`."""

    def __init__(self, message: str, words: Iterable[str]) -> None:
        super().__init__(message)
        self.words = tuple(words)


@dataclass(frozen=True)
class EncodedPair:
    """A prompt pair as token ids."""

    pair: PromptPair
    # "clean", "corrupted", then "answers" and "wrong_answers" if the pair has them, as token ids;
    # then for each "span NAME" whether it holds each token of the clean prompt.
    fields: dict[str, Sequence[int]]


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns text into tokens of one model."""

    # A Hugging Face tokenizer, and the configuration of the model.
    tokenizer: Any
    cfg: Any
    # The token ids before every prompt: BOS, or nothing.
    bos: tuple[int, ...]

    @staticmethod
    def of(model: Model) -> PromptTokenizer:
        """The prompt tokenizer of a model, or an InputError if it has no tokenizer."""
        check_class(model)
        cfg, tokenizer = model.cfg, model.tokenizer
        if tokenizer is None:
            name = cfg.model_name
            raise InputError(f"the model {name!r} has no tokenizer; use Task.from_tokens.")
        bos_id = tokenizer.bos_token_id if cfg.default_prepend_bos else None
        bos = () if bos_id is None else (bos_id,)
        return PromptTokenizer(tokenizer, cfg, bos)

    def encode(self, pair: PromptPair) -> EncodedPair:
        """Turn a prompt pair into tokens, or raise DoesNotFit or another InputError."""
        clean = self.prompt(pair.clean, "clean")
        corrupted = self.prompt(pair.corrupted, "corrupted")
        fields: dict[str, Sequence[int]] = {"clean": clean, "corrupted": corrupted}
        _check_answers(pair)
        for name in ("answers", "wrong_answers"):
            words = getattr(pair, name)
            if words:
                fields[name] = self._answers(pair.clean, clean, words)
        if len(clean) != len(corrupted):
            raise DoesNotFit(
                f"the clean prompt {shorten(pair.clean)} has {len(clean)} tokens and the corrupted "
                f"{shorten(pair.corrupted)} has {len(corrupted)}; they are compared token by "
                "token, so reword one until the numbers agree.",
                _differing_words(pair),
            )
        return EncodedPair(pair, fields | self._spans(pair))

    def prompt(self, text: str, role: str = "given") -> TokenIds:
        """Turn a prompt into tokens, with BOS where the model expects it. Errors name the role."""
        if not text.strip():
            raise InputError(f"a {role} prompt is empty ({text!r}); give it some text.")
        text_ids = self._ids(text)
        ids = [*self.bos, *text_ids]
        if len(ids) > self.cfg.n_ctx:
            raise InputError(
                f"the {role} prompt {shorten(text)} has {len(ids)} tokens and "
                f"{self.cfg.model_name} reads {self.cfg.n_ctx}; shorten it."
            )
        if self.tokenizer.unk_token_id in text_ids:
            self._check_words(text)
        return ids

    def answer(self, prompt: str, word: str) -> int:
        """The single token by which `word` continues `prompt`; DoesNotFit if there is none."""
        prompt_ids = self.prompt(prompt)
        [token] = self._answers(prompt, prompt_ids, [word])
        return token

    def words(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [self._text([token]) for token in tokens]

    def _ids(self, text: str) -> TokenIds:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        largest = max(ids, default=0)
        if largest >= self.cfg.d_vocab:
            raise InputError(
                f"the tokenizer gives token {largest}, but {self.cfg.model_name} has "
                f"{self.cfg.d_vocab} tokens; load the tokenizer that belongs to the model."
            )
        return ids

    def _text(self, ids: TokenIds) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _check_words(self, text: str) -> None:
        # Some tokenizers declare an ordinary token as the unknown token. No single word gives it.
        unk_id = self.tokenizer.unk_token_id
        words = dict.fromkeys(text.split())
        unknown = [word for word in words if unk_id in self._ids(word)]
        if unknown:
            raise DoesNotFit(
                f"the tokenizer of {self.cfg.model_name} does not know {quoted(unknown)} in "
                f"{shorten(text)}; use other words.",
                unknown,
            )

    def _answers(self, prompt: str, prompt_ids: TokenIds, words: Sequence[str]) -> TokenIds:
        found = {word: self._answer(prompt, prompt_ids, word) for word in words}
        # Two words may be the same token, or None.
        tokens = dict.fromkeys(found.values())
        if None in tokens:
            misfits = [word for word, token in found.items() if token is None]
            pieces = [f"{word!r} is {self.tokenizer.tokenize(word)}" for word in misfits[:4]]
            raise DoesNotFit(
                f"answers must be one token each after {shorten(prompt)}, with their leading "
                f"space where the text has one: {'; '.join(pieces)}; "
                "use other words, or Task.from_tokens.",
                misfits,
            )
        return [token for token in tokens if token is not None]

    def _answer(self, prompt: str, prompt_ids: TokenIds, word: str) -> int | None:
        unk_id = self.tokenizer.unk_token_id
        continued = self._ids(prompt + word)
        *context, token = [*self.bos, *continued]
        if context == prompt_ids and token != unk_id:
            return token
        # "17" and "33" may merge into the token "1733". The answer is still the token "33", if
        # that adds exactly this text: some tokenizers put a space before a word on its own.
        alone = self._ids(word)
        if len(alone) != 1 or alone[0] == unk_id:
            return None
        extended = self._text(prompt_ids + alone)
        return alone[0] if extended == self._text(prompt_ids) + word else None

    def _offsets(self, text: str) -> list[CharSpan]:
        # Only fast tokenizers say which characters a token stands for.
        if not self.tokenizer.is_fast:
            name = self.cfg.model_name
            raise InputError(
                f"spans need a fast tokenizer, which that of {name} is not; load a fast one, or "
                "leave the spans out."
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["offset_mapping"]

    def _spans(self, pair: PromptPair) -> dict[str, list[bool]]:
        text = pair.clean
        offsets = self._offsets(text) if pair.spans else []
        before = [False] * len(self.bos)
        spans = {}
        for name, (start, end) in sorted(pair.spans.items()):
            check_position_name(name)
            # A token belongs to a span when it overlaps it. BOS is not part of the text.
            overlaps = [first < end and start < last for first, last in offsets]
            is_inside = 0 <= start < end <= len(text)
            if not is_inside or not any(overlaps):
                raise InputError(
                    f"span {name!r} = {(start, end)} holds no token of {shorten(text)}; "
                    f"give (start, end) in characters, 0 <= start < end <= {len(text)}."
                )
            spans[f"span {name}"] = before + overlaps
        return spans


def prompt_tokens(model: Model, prompt: str | Sequence[int] | PromptTokens) -> PromptTokens:
    """Token ids of one prompt, on the CPU, or an InputError if it cannot be used.

    Text gets BOS where the model expects it. Token ids, also as a batch of one prompt, do not.
    """
    if isinstance(prompt, str):
        encoder = PromptTokenizer.of(model)
        return torch.tensor(encoder.prompt(prompt))
    try:
        tokens = torch.as_tensor(prompt).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{prompt!r} is no prompt: give text, or a list of token ids.") from error
    if tokens.shape == (0,):
        # An empty list becomes a tensor of floats.
        return tokens.long()
    if not isinstance(tokens, _ONE_PROMPT):
        found = f"shape {tuple(tokens.shape)} and type {tokens.dtype}"
        raise InputError(f"token ids of {found} are no prompt: give one list of integers.")
    return tokens.reshape(-1).long()


def _check_answers(pair: PromptPair) -> None:
    both = set(pair.answers) & set(pair.wrong_answers)
    if both:
        raise InputError(
            f"{quoted(sorted(both))} is both an answer and a wrong answer of "
            f"{shorten(pair.clean)}; remove it from one."
        )


def _differing_words(pair: PromptPair) -> list[str]:
    clean = pair.clean.split()
    corrupted = pair.corrupted.split()
    differing = set(clean) ^ set(corrupted)
    return [word for word in clean + corrupted if word in differing]

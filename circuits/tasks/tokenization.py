"""Prompt pairs as tokens of the model at hand.

The tokenizer is called directly: a model's own conversion pads on a side that depends on its state and may add a second <bos>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.graph.nodes import check_position_name
from circuits.models import Model
from circuits.system.errors import InputError
from circuits.tasks.prompts import PromptPair, shorten


class DoesNotFit(InputError):
    """A pair that cannot be turned into tokens of this model; `words` are to blame."""

    def __init__(self, message: str, words: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.words = words


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids, <bos> included where the model expects one, and for each span the indices of its tokens."""

    pair: PromptPair
    clean: list[int]
    corrupted: list[int]
    answers: list[int]
    wrong_answers: list[int]
    spans: dict[str, list[int]]


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns text into tokens of one model.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        bos: the id that goes before every prompt, or nothing.
        vocabulary: the number of ids the model knows.
        context: the most tokens it reads.
        model_name: for messages.
    """

    tokenizer: Any
    bos: tuple[int, ...]
    vocabulary: int
    context: int
    model_name: str

    @staticmethod
    def of(model: Model) -> PromptTokenizer:
        """The encoder of a model.

        Raises:
            InputError: the model has no tokenizer.
        """
        cfg, tokenizer = model.cfg, model.tokenizer
        if tokenizer is None:
            raise InputError(
                f"the model {cfg.model_name!r} has no tokenizer, so it cannot read text; make the task with Task.from_tokens."
            )
        with_bos = cfg.default_prepend_bos and tokenizer.bos_token_id is not None
        return PromptTokenizer(
            tokenizer,
            (tokenizer.bos_token_id,) if with_bos else (),
            cfg.d_vocab,
            cfg.n_ctx,
            str(cfg.model_name),
        )

    def encode(self, pair: PromptPair) -> EncodedPair:
        """A pair as tokens.

        Raises:
            DoesNotFit: an answer is not one token here, the prompts differ in length, or a word is unknown.
            InputError: a prompt is empty or too long, or a span is outside the prompt.
        """
        clean, corrupted = (
            self.prompt(text, role)
            for text, role in ((pair.clean, "clean"), (pair.corrupted, "corrupted"))
        )
        if both := set(pair.answers) & set(pair.wrong_answers):
            raise InputError(
                f"{', '.join(map(repr, sorted(both)))} is both an answer and a wrong answer of {shorten(pair.clean)}; drop it from one."
            )
        answers, wrong = (
            self._answers(pair.clean, clean, words) for words in (pair.answers, pair.wrong_answers)
        )
        if len(clean) != len(corrupted):
            raise DoesNotFit(
                f"the clean prompt {shorten(pair.clean)} has {len(clean)} tokens and the corrupted {shorten(pair.corrupted)} has "
                f"{len(corrupted)}; they are compared token by token, so reword one until the numbers agree.",
                self._differing_words(pair),
            )
        return EncodedPair(
            pair, clean, corrupted, answers, wrong, self._spans(pair) if pair.spans else {}
        )

    def prompt(self, text: str, role: str = "given") -> list[int]:
        """A prompt as tokens, <bos> included where the model expects one.

        Raises:
            DoesNotFit: a word is unknown.
            InputError: it is empty or too long.
        """
        if not text.strip():
            raise InputError(f"a {role} prompt is empty ({text!r}); give it some text.")
        ids = [*self.bos, *self._ids(text)]
        if len(ids) > self.context:
            raise InputError(
                f"the {role} prompt {shorten(text)} has {len(ids)} tokens and {self.model_name} reads {self.context}; shorten it."
            )
        if unknown := self._unknown(text):
            raise DoesNotFit(
                f"the tokenizer of {self.model_name} does not know {', '.join(map(repr, unknown))} in {shorten(text)}; use other words.",
                unknown,
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and max(ids) >= self.vocabulary:
            raise InputError(
                f"the tokenizer gives token {max(ids)}, but {self.model_name} knows {self.vocabulary}; load the tokenizer it belongs to."
            )
        return ids

    def _unknown(self, text: str) -> tuple[str, ...]:
        """The words that become the unknown token. Some tokenizers name an ordinary token so, which no text turns into."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in self._ids(text):
            return ()
        return tuple(dict.fromkeys(word for word in text.split() if unknown in self._ids(word)))

    def _answers(self, prompt: str, ids: list[int], words: tuple[str, ...]) -> list[int]:
        found = {word: self._answer(prompt, ids, word) for word in words}
        if wrong := tuple(word for word, token in found.items() if token is None):
            pieces = "; ".join(f"{word!r} is {self.tokenizer.tokenize(word)}" for word in wrong[:4])
            raise DoesNotFit(
                f"answers must be one token each after {shorten(prompt)}, with their leading space where the text has one: {pieces}; "
                "use other words, or Task.from_tokens.",
                wrong,
            )
        return list(dict.fromkeys(token for token in found.values() if token is not None))

    def answer(self, prompt: str, word: str) -> int:
        """The one token by which `word` continues `prompt`.

        Raises:
            DoesNotFit: it is not one token.
        """
        return self._answers(prompt, self.prompt(prompt), (word,))[0]

    def words(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """The text of each token."""
        return tuple(
            str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
            for token in tokens
        )

    def _answer(self, prompt: str, ids: list[int], word: str) -> int | None:
        """The one token by which `word` continues the prompt, or None."""
        together = [*self.bos, *self._ids(prompt + word)]
        if together[:-1] == ids and together[-1] != self.tokenizer.unk_token_id:
            return together[-1]
        # "17" and "33" may merge into "1733". The word's own token is meant all the same, if it adds exactly that text to the prompt;
        # a tokenizer that puts a space before a word on its own would add another.
        alone = self._ids(word)
        exact = len(alone) == 1 and self._text([*ids, *alone]) == self._text(ids) + word
        return alone[0] if exact and alone[0] != self.tokenizer.unk_token_id else None

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _spans(self, pair: PromptPair) -> dict[str, list[int]]:
        if not self.tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of {self.model_name} cannot say where its tokens stand in the text, which spans need; use a fast one."
            )
        offsets = self.tokenizer(pair.clean, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        spans = {}
        for name, (start, end) in pair.spans.items():
            check_position_name(name)
            spans[name] = [
                len(self.bos) + index
                for index, (first, last) in enumerate(offsets)
                if first < end and start < last
            ]
            if not 0 <= start < end <= len(pair.clean) or not spans[name]:
                raise InputError(
                    f"span {name!r} = {(start, end)} holds no token of {shorten(pair.clean)}; give (start, end) in characters, "
                    f"0 <= start < end <= {len(pair.clean)}."
                )
        return spans

    def _differing_words(self, pair: PromptPair) -> tuple[str, ...]:
        words = (*pair.clean.split(), *pair.corrupted.split())
        return tuple(
            dict.fromkeys(
                word
                for word in words
                if not (word in pair.clean.split() and word in pair.corrupted.split())
            )
        )


def prompt_tokens(
    model: Model, prompt: str | Sequence[int] | Int[Tensor, " pos"]
) -> Int[Tensor, " pos"]:
    """A prompt as token ids on the CPU: text with <bos> where the model expects one, ids (also as a batch of one) as they are.

    Raises:
        InputError: the text is empty or too long or has unknown words, the model has no tokenizer, or the ids are no whole numbers of one prompt.
    """
    if isinstance(prompt, str):
        return torch.tensor(PromptTokenizer.of(model).prompt(prompt))
    try:
        tokens = torch.as_tensor(prompt).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{prompt!r} is no prompt: give text, or a list of token ids.") from error
    tokens = tokens[0] if tokens.dim() == 2 and len(tokens) == 1 else tokens
    if tokens.dim() != 1 or (
        len(tokens) and (tokens.is_floating_point() or tokens.dtype == torch.bool)
    ):
        raise InputError(
            f"token ids of shape {tuple(tokens.shape)} and type {tokens.dtype} are no prompt: give whole numbers, one list of them."
        )
    return tokens.long()

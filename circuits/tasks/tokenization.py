"""Prompt pairs as tokens of one model.

The tokenizer is called directly. TransformerLens's `to_tokens` pads on a side that depends on the
tokenizer's state, and may add a second BOS token.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from circuits.graph.nodes import check_position_name
from circuits.models import Model, check_class, shape_of
from circuits.system.errors import InputError
from circuits.system.messages import quoted, shorten
from circuits.system.numbers import shown, truth
from circuits.system.tensors import as_tensor
from circuits.system.torch_modes import without_modes
from circuits.tasks.alignment import Spans, aligned
from circuits.tasks.families.words import as_words
from circuits.tasks.pairs import Row, pair_of
from circuits.tasks.prompts import CharSpan, DoesNotFit, PromptPair, Token
from circuits.tasks.readers.padding import check_no_padding
from circuits.tasks.readers.tokens import Prompt, checked_id, special_id, split_encoding
from circuits.tasks.validation import check_mask

TokenIds = list[int]
# By kind ("answers", "wrong_answers"), the tokens of each word, or of each scored position.
Answers = dict[str, list[TokenIds]]
# Its length may change where BOS is put in front.
PromptTokens = Int[Tensor, " _"]
# After these, words have a space before them.
ENDS = tuple(".,:;?!)]}")
# Two of them are one character, in UTF-16; alone they are none.
SURROGATES = re.compile(r"[\ud800-\udfff]")
_ONE = "one token each"
_ONE_OR_AS_MANY = f"{_ONE} (or one answer and one wrong answer of equally many)"
_ONE_PROMPT: tuple[Any, ...] = (Integer[Tensor, " pos"], Integer[Tensor, "1 pos"])


@dataclass(frozen=True)
class EncodedPair:
    """A prompt pair as token ids."""

    pair: PromptPair
    # "clean" and "corrupted" as token ids; then for each "span NAME" whether it holds each token
    # of the clean prompt.
    fields: dict[str, Sequence[int]]
    # For the kinds that the pair has, the tokens of each scored position, which are the last ones.
    answers: Answers
    # For each token of the clean prompt, the position of its counterpart in the corrupted one.
    alignment: Sequence[int]
    # On the space before an answer, if another one may be meant.
    remark: str | None
    # Where it comes from, such as "line 3"
    where: str = ""

    @property
    def parts(self) -> list[str]:
        """What the pair has besides its prompts, which all pairs of a task have."""
        _, _, *spans = self.fields
        lacking = ["corrupted=None"] if self.pair.corrupted is None else []
        return [*self.answers, *spans, *lacking]

    @property
    def n_scored(self) -> int:
        """The number of scored positions."""
        return max(map(len, self.answers.values()), default=1)


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns text into tokens of one model."""

    # A Hugging Face tokenizer, and the configuration of the model.
    tokenizer: Any
    cfg: Any
    # The token with which every prompt begins, once; None if text is taken as it is.
    bos: int | None
    # Which characters the tokenizer has been found to make no text of
    blank: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(model: Model, prepend_bos: bool | None = None) -> PromptTokenizer:
        """The prompt tokenizer of a model, or an InputError if it has no tokenizer.

        Args:
            prepend_bos: whether prompts begin with BOS, exactly once, even if the text has it;
                False puts nothing in front; None takes the model's default.
        """
        check_class(model)
        cfg, tokenizer = shape_of(model), model.tokenizer
        name = cfg.model_name
        if tokenizer is None:
            raise InputError(f"the model {name!r} has no tokenizer; use Task.from_tokens.")
        chosen = _checked_choice(prepend_bos)
        wanted = cfg.default_prepend_bos if chosen is None else chosen
        bos = special_id(tokenizer, "bos_token") if wanted else None
        if chosen and bos is None:
            raise InputError(
                f"prepend_bos=True, but the tokenizer of {name!r} has no BOS token; leave it out."
            )
        return PromptTokenizer(tokenizer, cfg, bos)

    def encode(self, pair: PromptPair, *, single: bool = False) -> EncodedPair:
        """Turn a prompt pair into tokens, or raise DoesNotFit or another InputError.

        `single` refuses answers of several tokens.
        """
        clean = self.prompt(pair.clean, "clean")
        answers = self._answers(pair, clean, single=single)
        corrupted = self._corrupted(pair, clean)
        spans = self._spans(pair.clean, pair.spans)
        pairing = self._pairing(pair, clean, corrupted, spans)
        # Teacher forcing: before each token of an answer stand the ones before it.
        right = answers.get("answers", [[]])
        forced = [tokens[0] for tokens in right[:-1]]
        fields: dict[str, Sequence[int]] = {}
        for role, ids in (("clean", clean), ("corrupted", corrupted)):
            fields[role] = ids + forced
            text = getattr(pair, role) or pair.clean
            self._check_length(fields[role], _called(role, text, forced))
        for name, is_inside in spans.items():
            fields[f"span {name}"] = is_inside + [False] * len(forced)
        pairing += range(len(corrupted), len(fields["corrupted"]))
        remark = self._remark(pair, clean)
        return EncodedPair(pair, fields, answers, pairing, remark)

    def _corrupted(self, pair: PromptPair, clean: TokenIds) -> TokenIds:
        if pair.corrupted is None:
            return clean
        corrupted = self.prompt(pair.corrupted, "corrupted")
        _check_differ(pair, clean, corrupted)
        return corrupted

    def _pairing(
        self, pair: PromptPair, clean: TokenIds, corrupted: TokenIds, spans: Spans
    ) -> list[int]:
        if pair.corrupted is None and pair.corrupted_spans:
            raise InputError(
                f"the prompt {shorten(pair.clean)} has corrupted_spans, but no corrupted prompt; "
                "give one, or leave them out."
            )
        bos = special_id(self.tokenizer, "bos_token")
        begins: list[int | None] = [clean[0], corrupted[0]]
        n_with_bos = begins.count(bos)
        if n_with_bos == 1 and pair.corrupted_spans:
            raise InputError(
                f"only one of the prompts {shorten(pair.clean)} and {shorten(str(pair.corrupted))} "
                "begins with BOS, which is no word's counterpart; begin both with it."
            )
        named = self._spans(pair.corrupted or "", pair.corrupted_spans)
        n_shared = int(n_with_bos == 2)
        return aligned(len(clean), len(corrupted), spans, named, n_shared=n_shared)

    def prompt(self, text: str, role: str = "given") -> TokenIds:
        """Turn a prompt into tokens that begin with `bos`. Errors name the role."""
        text_ids = self._ids(text)
        if not text.strip() or not text_ids:
            message = f"a {role} prompt is empty ({text!r}); give it some text."
            raise DoesNotFit(message, "an empty prompt")
        spelt = self.tokenizer.bos_token
        if self.bos not in (None, text_ids[0]) and text.lstrip().startswith(spelt):
            raise InputError(
                f"the {role} prompt {shorten(text)} has white space before its own {spelt}, which "
                "would get a second one in front; remove the white space."
            )
        ids, called = self.with_bos(text_ids), _called(role, text)
        self._check_length(ids, called)
        self._check_read(text, text_ids)
        _check_padding(self.tokenizer, self.cfg, ids, called, "remove it")
        return ids

    def answer(self, prompt: str, word: str) -> int:
        """The single token by which `word` continues `prompt`, or DoesNotFit."""
        prompt_ids = self.with_bos(self._ids(prompt))
        [[token]] = self._continuations(prompt, prompt_ids, [word], single=True)
        return token

    def is_single(self, word: str) -> bool:
        """Whether a word is one known token after a space."""
        # After a text, as some tokenizers put a space before a word on its own
        before = self._ids("So")
        ids = self._ids(f"So {word}")
        return ids[:-1] == before and self._knows(word, ids[-1:])

    def with_bos(self, ids: Sequence[int]) -> TokenIds:
        """The ids of a text as a prompt: BOS comes once, also if the text begins with it."""
        if self.bos is None:
            return list(ids)
        return [self.bos, *ids[self._n_bos(ids) :]]

    def words(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [self._text([token]) for token in tokens]

    def _n_bos(self, ids: Sequence[int]) -> int:
        """How many tokens BOS the ids begin with."""
        others = (place for place, token in enumerate(ids) if token != self.bos)
        return next(others, len(ids))

    def _ids(self, text: str) -> TokenIds:
        halves = SURROGATES.findall(text)
        if halves:
            raise InputError(
                f"the text {shorten(text)} holds {halves[0]!r}, half of a character, which no "
                "tokenizer reads; write the whole character."
            )
        try:
            ids = self._read(text)
        # Tokenizers of the `tokenizers` library raise plain exceptions.
        except Exception as error:
            raise InputError(
                f"the tokenizer of {self.cfg.model_name} fails on {shorten(text)} ({error}); use "
                "other words, or give it an unknown token."
            ) from error
        largest = max(ids, default=0)
        if largest >= self.cfg.d_vocab:
            raise InputError(
                f"the tokenizer gives token {largest}, but {self.cfg.model_name} has "
                f"{self.cfg.d_vocab} tokens; load the tokenizer that belongs to the model."
            )
        return ids

    def _read(self, text: str) -> TokenIds:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _tried(self, text: str) -> TokenIds | None:
        """The ids of a text that no user gave; None if the tokenizer fails on it."""
        with suppress(Exception):
            return self._read(text)
        return None

    def _text(self, ids: TokenIds) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _check_length(self, ids: Sequence[int], called: str) -> None:
        if len(ids) > self.cfg.n_ctx:
            raise DoesNotFit(
                f"{called} has {len(ids)} tokens and {self.cfg.model_name} reads "
                f"{self.cfg.n_ctx}; shorten it.",
                "a prompt that is too long",
            )

    def _check_read(self, text: str, ids: TokenIds) -> None:
        """Refuse a text of which these ids say less than it does."""
        unread = self._unknown(text, ids) or self._dropped(text)
        if unread:
            raise DoesNotFit(
                f"the tokenizer of {self.cfg.model_name} does not know {quoted(unread)} in "
                f"{shorten(text)}; use other words.",
                "a word that the tokenizer does not know",
                unread,
            )

    def _unknown(self, text: str, ids: TokenIds) -> list[str]:
        """The words, or else the white space, that become the unknown token."""
        # Some tokenizers declare an ordinary token, such as BOS, as the unknown token. No single
        # word gives it, and a text may spell it out.
        unk, unk_id = self.tokenizer.unk_token, self.tokenizer.unk_token_id
        if unk is None or unk_id not in ids:
            return []

        def unknown(pieces: Iterable[str]) -> list[str]:
            different = dict.fromkeys(pieces)
            return [piece for piece in different if unk_id in self._ids(piece)]

        words = unknown(text.replace(unk, " ").split())
        if words or self._knows(text, ids):
            return words
        spaces = filter(str.isspace, text.replace(unk, ""))
        return unknown(spaces) or [text]

    def _dropped(self, text: str) -> list[str]:
        """The characters without which the text would be read alike, though they are no spaces."""
        blank = filter(self._is_blank, dict.fromkeys(text))
        return [character for character in blank if self._drops(text, character)]

    def _drops(self, text: str, character: str) -> bool:
        texts = (text, text.replace(character, ""), text.replace(character, " "))
        read, without, spaced = map(self._tried, texts)
        # White space that ends words, whichever it is, is as good as a space.
        return None not in (without, spaced) and without == read != spaced

    def _is_blank(self, character: str) -> bool:
        """Whether there is nothing to see of a character, but for spaces, as it is read."""
        if character == " ":
            return False
        if character not in self.blank:
            alone = self._tried(character)
            is_seen = alone is None or self._text(alone).strip()
            self.blank[character] = not is_seen
        return self.blank[character]

    def _knows(self, text: str, ids: TokenIds) -> bool:
        """Whether these ids of a text stand for all of it; it may spell the unknown token out."""
        unk, unk_id = self.tokenizer.unk_token, self.tokenizer.unk_token_id
        return unk is None or ids.count(unk_id) <= text.count(unk)

    def _answers(self, pair: PromptPair, prompt_ids: TokenIds, *, single: bool) -> Answers:
        """By kind of answers, the tokens of each scored position; see `EncodedPair`."""
        found: Answers = {}
        for kind in ("answers", "wrong_answers"):
            words = getattr(pair, kind)
            if words:
                found[kind] = self._continuations(pair.clean, prompt_ids, words, single=single)
        right, wrong = found.get("answers", []), found.get("wrong_answers", [])
        _check_no_answer_is_wrong(pair, right, wrong)
        lengths = {len(ids) for ids in right + wrong}
        # Two words may be the same tokens.
        different = {kind: dict.fromkeys(map(tuple, ids)) for kind, ids in found.items()}
        if lengths <= {1}:
            return {kind: [[token for [token] in ids]] for kind, ids in different.items()}
        n_answers = set(map(len, different.values()))
        if right and len(lengths) == 1 and n_answers == {1}:
            return {kind: [[token] for token in ids] for kind, [ids] in different.items()}
        several = dict.fromkeys(pair.answers + pair.wrong_answers)
        reason = "answers of different numbers of tokens"
        raise self._unfit(pair.clean, several, reason, _ONE_OR_AS_MANY)

    def _continuations(
        self, prompt: str, prompt_ids: TokenIds, words: Sequence[Token], *, single: bool
    ) -> list[TokenIds]:
        """The tokens by which each word continues the prompt."""
        found = [self._continuation(prompt, prompt_ids, word) for word in words]
        slips = {}
        for word, ids in zip(words, found, strict=True):
            respaced = None
            if isinstance(word, str):
                respaced = self._respaced(prompt, prompt_ids, word, ids)
            if respaced or not ids or (single and len(ids) > 1):
                slips[word] = respaced
        if slips:
            wanted = _ONE if single else _ONE_OR_AS_MANY
            raise self._unfit(prompt, slips, "an answer that does not fit", wanted)
        return [ids for ids in found if ids]

    def _unfit(
        self, prompt: str, words: Mapping[Token, str | None], reason: str, wanted: str
    ) -> DoesNotFit:
        """The error about some words; for each, what to write instead, if that is known."""
        pieces = []
        for word, better in list(words.items())[:4]:
            text = str(word)
            is_tokens = f"{shorten(text)} is {self.tokenizer.tokenize(text)[:6]}"
            pieces.append(f"write {better!r} for {word!r}" if better else is_tokens)
        if prompt.endswith(" ") and any(words.values()):
            pieces.insert(0, "leave out the space that the prompt ends with")
        return DoesNotFit(
            f"answers must be {wanted} after {shorten(prompt)}, with their leading space where the "
            f"text has one: {'; '.join(pieces)}; use other words, or Task.from_tokens.",
            reason,
            map(str, words),
        )

    def _continuation(self, prompt: str, prompt_ids: TokenIds, word: Token) -> TokenIds | None:
        if isinstance(word, int):
            return [checked_id(word, self.cfg)]
        if self._dropped(word):
            self._check_read(word, self._ids(word))
        length = len(prompt_ids)
        continued = self.with_bos(self._ids(prompt + word))
        added = continued[length:]
        if continued[:length] == prompt_ids and self._knows(word, added):
            return added
        # "17" and "33" may merge into the token "1733". The answer is still the token "33", if
        # that adds exactly this text: some tokenizers put a space before a word on its own.
        alone = self._ids(word)
        if not self._knows(word, alone):
            return None
        extended = self._text(prompt_ids + alone)
        return alone if extended == self._text(prompt_ids) + word else None

    def _respaced(
        self, prompt: str, prompt_ids: TokenIds, word: str, ids: TokenIds | None
    ) -> str | None:
        """The word with the right leading space, if that was forgotten or doubled."""
        bare = word.lstrip()
        # "17" may go on with "332".
        if not bare or (ids and not (_fuses(prompt, word) or word[:2].isspace())):
            return None
        for candidate in (f" {bare}", bare):
            better = candidate != word and self._continuation(prompt, prompt_ids, candidate)
            if better and (not ids or len(better) < len(ids)):
                return candidate
        return None

    def _remark(self, pair: PromptPair, prompt_ids: TokenIds) -> str | None:
        """On the space before an answer, if another one than the given may be meant."""
        prompt, trimmed = pair.clean, pair.clean.rstrip(" ")
        answers = pair.answers + pair.wrong_answers
        for word in (each for each in answers if isinstance(each, str)):
            lacks_space = _lacks_space(prompt, word)
            if trimmed == prompt and not lacks_space:
                continue
            spaced = f" {word.lstrip()}"
            given = self._continuation(prompt, prompt_ids, word) or []
            n_given = len(prompt_ids) + len(given)
            # Most tokenizers put a space into the token after it.
            without = self.with_bos(self._ids(trimmed + spaced))
            if trimmed != prompt and len(without) < n_given:
                return (
                    f"the answer {word!r} comes after the space that {shorten(prompt)} ends with; "
                    f"write {spaced!r}, and leave out that space."
                )
            other = self._continuation(prompt, prompt_ids, spaced) or []
            is_other = given != other and 0 < len(other) <= len(given)
            if is_other and lacks_space:
                fuses = "goes on within the last word of" if _fuses(prompt, word) else "follows"
                return (
                    f"the answer {word!r} {fuses} {shorten(prompt)} without a space; write "
                    f"{spaced!r} if it is a word of its own."
                )
        return None

    def _offsets(self, text: str) -> list[CharSpan]:
        # Only fast tokenizers say which characters a token stands for.
        if not self.tokenizer.is_fast:
            raise InputError(
                f"spans need a fast tokenizer, which that of {self.cfg.model_name} is not; load a "
                "fast one, or leave the spans out."
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets, own = encoded["offset_mapping"], self._n_bos(encoded["input_ids"])
        if self.bos is None:
            return offsets
        # A BOS that is put in front stands for no characters.
        offsets = [(0, 0), *offsets]
        return offsets[own:]

    def _spans(self, text: str, named: Mapping[str, CharSpan]) -> dict[str, list[bool]]:
        """By name, whether a span holds each token of a text."""
        offsets = self._offsets(text) if named else []
        spans = {}
        for name, (start, end) in sorted(named.items()):
            check_position_name(name)
            # A token belongs to a span when it overlaps it.
            overlaps = [first < end and start < last for first, last in offsets]
            is_inside = 0 <= start < end <= len(text)
            if not is_inside or not any(overlaps):
                raise InputError(
                    f"span {name!r} = {(start, end)} holds no token of {shorten(text)}; "
                    f"give (start, end) in characters, 0 <= start < end <= {len(text)}."
                )
            spans[name] = overlaps
        return spans


@without_modes()
def single_token_words(model: Model, words: Iterable[str] | None = None) -> tuple[str, ...]:
    """The words that are one token each, after a space, of this model.

    For tasks that take words: the text of a task never depends on a model, unless you choose its
    words by one.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> circuits.single_token_words(model, ["Mary", "Zebediah", "John"])
    ('Mary', 'John')
    >>> words = circuits.single_token_words(model)
    >>> circuits.load_task("induction", model, n=8, words=words, repeated=2)
    Task('induction', 8 prompts of up to 15 tokens, metric='logit_difference')

    Args:
        words: which words; None means all of the vocabulary that consist of letters.

    Raises:
        InputError: the model has no tokenizer, or it fails on a word.
    """
    encoder = PromptTokenizer.of(model, prepend_bos=False)
    if words is None:
        n_tokens = min(encoder.cfg.d_vocab, len(encoder.tokenizer))
        texts = map(str.strip, encoder.words(range(n_tokens)))
        different = dict.fromkeys(filter(str.isalpha, texts))
        words = list(different)
    given = as_words(words, "words", 1)
    return tuple(filter(encoder.is_single, given))


@dataclass
class Fitting:
    """Turns pairs into tokens; leaves out those that do not fit, if asked to, and says why."""

    encode: Callable[[PromptPair], EncodedPair]
    skip: bool
    # How many pairs were left out, by reason, and the words that are to blame.
    left_out: Counter[str] = field(default_factory=Counter)
    words: list[str] = field(default_factory=list)

    def each(self, rows: Iterable[Row]) -> list[EncodedPair | None]:
        """The pairs of rows; an InputError says in which row it is."""
        encoded = []
        for where, given in rows:
            try:
                pair = self(given)
                encoded.append(pair and replace(pair, where=f"{where}: "))
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        return encoded

    def __call__(self, given: Any) -> EncodedPair | None:
        """A pair, in any of its forms, as tokens; None if it is left out."""
        try:
            return self.encode(pair_of(given))
        except DoesNotFit as misfit:
            if not self.skip:
                raise
            self.left_out[misfit.reason] += 1
            self.words += misfit.words
        return None

    def alike(self, encoded: Sequence[EncodedPair]) -> list[EncodedPair]:
        """Those with the fields that most have; all of them if none are to be left out."""
        if not self.skip or not encoded:
            return list(encoded)
        counts = Counter(tuple(each.parts) for each in encoded)
        usual = max(counts, key=counts.__getitem__)
        kept = [each for each in encoded if tuple(each.parts) == usual]
        n_others = len(encoded) - len(kept)
        if n_others:
            self.left_out["other fields than most prompts have"] += n_others
        return kept

    def told(self) -> str:
        """Why pairs were left out, such as "an empty prompt (3)"."""
        counts = self.left_out.items()
        return ", ".join(f"{reason} ({count})" for reason, count in counts)


def fitting(model: Model, prepend_bos: bool | None, skip: bool) -> Fitting:
    """What turns a user's pairs into tokens of this model."""
    encoder = PromptTokenizer.of(model, prepend_bos)
    return Fitting(encoder.encode, truth(skip, "skip_misfits"))


def prompt_tokens(model: Model, prompt: Prompt, prepend_bos: bool | None = None) -> PromptTokens:
    """Token ids of one prompt, on the CPU, or an InputError if it cannot be used.

    Args:
        prompt: text, or token ids, also as a batch of one prompt.
        prepend_bos: see `PromptTokenizer.of`; token ids are by default taken as they are.
    """
    if isinstance(prompt, str):
        encoder = PromptTokenizer.of(model, prepend_bos)
        return torch.tensor(encoder.prompt(prompt))
    ids, mask = split_encoding(prompt)
    tokens = _given_tokens(ids)
    if mask is None:
        remedy = "give its real tokens only"
        _check_padding(model.tokenizer, shape_of(model), tokens.tolist(), "the prompt", remedy)
    else:
        mask = as_tensor(mask, "attention_mask").reshape(1, -1)
        (is_real,) = check_mask(mask, None, "right", tokens[None])
        tokens = tokens[is_real]
    if not _checked_choice(prepend_bos) or not len(tokens):
        return tokens
    encoder = PromptTokenizer.of(model, prepend_bos)
    return torch.tensor(encoder.with_bos(tokens.tolist()))


def _given_tokens(prompt: Any) -> PromptTokens:
    try:
        tokens = as_tensor(prompt, "the prompt").cpu()
    except InputError as error:
        if np.ma.isMaskedArray(prompt) or isinstance(prompt, Tensor):
            raise
        raise InputError(
            f"{shown(prompt)} is no prompt: give text, or a list of token ids."
        ) from error
    if tokens.shape == (0,):
        # An empty list becomes a tensor of floats.
        return tokens.long()
    if not isinstance(tokens, _ONE_PROMPT):
        found = f"shape {tuple(tokens.shape)} and type {tokens.dtype}"
        raise InputError(f"token ids of {found} are no prompt: give one list of integers.")
    return tokens.reshape(-1).long()


def _called(role: str, text: str, forced: TokenIds | None = None) -> str:
    """What errors call a prompt, with the tokens of its answer after it."""
    end = " with its answer" if forced else ""
    return f"the {role} prompt {shorten(text)}{end}"


def _check_padding(tokenizer: Any, cfg: Any, ids: TokenIds, called: str, remedy: str) -> None:
    way_out = f"{remedy}, or give token ids with an attention_mask of ones if it is text."
    tokens = torch.tensor([ids], dtype=torch.long)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    check_no_padding(tokenizer, cfg, tokens, everything, lambda _: called, way_out)


def _checked_choice(prepend_bos: Any) -> bool | None:
    try:
        return None if prepend_bos is None else truth(prepend_bos, "prepend_bos")
    except InputError as error:
        found = shown(prepend_bos)
        raise InputError(f"prepend_bos={found}: give True, False or None.") from error


def _check_no_answer_is_wrong(
    pair: PromptPair, right: list[TokenIds], wrong: list[TokenIds]
) -> None:
    by_word = zip(pair.wrong_answers, wrong, strict=True)
    both = [word for word, ids in by_word if ids in right]
    if both:
        raise DoesNotFit(
            f"{quoted(map(str, both))} is both an answer and a wrong answer of "
            f"{shorten(pair.clean)}; remove it from one.",
            "an answer that is also a wrong answer",
        )


def _check_differ(pair: PromptPair, clean: TokenIds, corrupted: TokenIds) -> None:
    assert pair.corrupted is not None
    if clean == corrupted:
        raise DoesNotFit(
            f"the clean and the corrupted prompt {shorten(pair.clean)} are the same; change what "
            "decides the answer, or give corrupted=None and ablate by zero or mean.",
            "a corrupted prompt that is the clean one",
        )
    if len(clean) != len(corrupted) and not pair.corrupted_spans:
        raise DoesNotFit(
            f"the clean prompt {shorten(pair.clean)} has {len(clean)} tokens and the corrupted "
            f"{shorten(pair.corrupted)} has {len(corrupted)}; they are compared token by "
            "token, so reword one until the numbers agree, or name what corresponds (spans and "
            "corrupted_spans).",
            "two prompts of different numbers of tokens",
            _differing_words(pair.clean.split(), pair.corrupted.split()),
        )


def _lacks_space(prompt: str, word: str) -> bool:
    # "4.5" is one number.
    is_number = prompt[-2:-1].isdigit()
    is_apart = prompt[-1:] in ENDS and word[:1].isalnum() and not is_number
    return is_apart or _fuses(prompt, word)


def _fuses(prompt: str, word: str) -> bool:
    return prompt[-1:].isalpha() and word[:1].isalpha()


def _differing_words(clean: list[str], corrupted: list[str]) -> list[str]:
    differing = set(clean) ^ set(corrupted)
    return [word for word in clean + corrupted if word in differing]

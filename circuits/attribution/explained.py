"""What an attribution graph explains, from the user's tokens, pairs of tokens and directions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

from torch import Tensor

from circuits.attribution.build import Direction, difference_direction
from circuits.attribution.local_model import LocalModel
from circuits.models import Model
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.messages import shorten
from circuits.system.numbers import items, python_number, shown, whole
from circuits.system.tensors import as_tensor
from circuits.tasks.metrics import check_finite
from circuits.tasks.prompts import DoesNotFit
from circuits.tasks.tokenization import PromptTokenizer

Token = str | SupportsIndex
"""The text of a token, or its id."""
Group = Token | Sequence[Token] | Tensor
Explained = Token | tuple[Group, Group] | Direction
"""A token, a token or a group of them against others, or any direction after the last norm."""


def words_of(model: Model, tokens: Sequence[int]) -> list[str]:
    """The text of each token; its number if the model has no tokenizer."""
    if model.tokenizer is None:
        return [f"#{token}" for token in tokens]
    return list(PromptTokenizer.of(model).words(list(tokens)))


def most_probable(
    model: Model, local: LocalModel, *, most: int, probability: float, position: int | None = None
) -> list[Direction]:
    """The most probable next tokens, weighted by their probabilities.

    There are at most `most`, and no more than reach `probability` together.
    """
    logits = local.logits(-1 if position is None else position)
    check_finite(logits, model)
    most = min(most, len(logits))
    probabilities = logits.softmax(-1)
    values, tokens = probabilities.topk(most)
    # The fewest tokens that together reach `probability`
    is_below = values.cumsum(0) < probability
    n_below = int(is_below.sum())
    most = min(most, n_below + 1)
    pairs = zip(tokens[:most].tolist(), values[:most].tolist(), strict=True)
    return [_token_direction(model, local, *pair, position) for pair in pairs]


def _token_direction(
    model: Model, local: LocalModel, token: int, weight: float, position: int | None = None
) -> Direction:
    """The direction of a token's logit minus the mean logit."""
    (label,) = words_of(model, [token])
    direction = difference_direction(local, [token], None, label, position)
    return replace(direction, weight=weight, token=token)


def listed(explain: Any) -> list[Any]:
    """What the user asked to explain, in a list, with Directions of plain numbers and tensors.

    Raises:
        InputError: nothing was asked for, or a pair outside of a list; or a Direction holds what is
            none of its kind.
    """
    wanted = items(explain, "explain")
    if not wanted:
        raise InputError(
            f"explain={shown(explain)}: give a list of tokens, pairs of tokens or Directions, at "
            "least one."
        )
    if isinstance(explain, tuple) and len(explain) == 2:
        raise InputError(
            f"explain={shown(explain)} may be a pair or two tokens; give [{shown(explain)}] for "
            f"their difference, or {shown(wanted)} for each of them."
        )
    return [_plain_direction(each) if isinstance(each, Direction) else each for each in wanted]


def directions_of(model: Model, local: LocalModel, explain: Sequence[Explained]) -> list[Direction]:
    """What the user asked to explain, as directions.

    Raises:
        InputError: nothing was asked for; something is not a token, pair or direction of this
            model; or something was asked for twice.
    """
    reader = _Reader(model, local)
    wanted = listed(explain)
    directions = list(map(reader.direction, wanted))
    seen = set()
    for direction in directions:
        name = direction.label if direction.token is None else direction.token
        if (name, direction.position) in seen:
            raise InputError(
                f"explain holds {name!r} twice; give each once, and Directions different labels."
            )
        seen.add((name, direction.position))
    return directions


@dataclass(frozen=True)
class _Reader:
    """Reads what a user asked to explain of one prompt."""

    model: Model
    local: LocalModel

    def direction(self, wanted: Explained) -> Direction:
        if isinstance(wanted, Direction):
            _check_direction(self.local, wanted)
            token = wanted.token
            if token is None:
                return wanted
            return replace(wanted, token=self._token(token))
        if isinstance(wanted, tuple):
            return self._pair(wanted)
        token = self._token(wanted)
        probabilities = self.local.logits().softmax(-1)
        probability = float(probabilities[token])
        return _token_direction(self.model, self.local, token, probability)

    def _pair(self, wanted: tuple[Group, ...]) -> Direction:
        if len(wanted) != 2:
            raise InputError(
                f"explain holds {wanted!r}; a pair is (token, other token), whose logits' "
                "difference is explained."
            )
        right, wrong = map(self._group, wanted)
        if set(right) & set(wrong):
            raise InputError(
                f"explain holds {shown(wanted)}: a token against itself; give two different ones."
            )
        words = [" + ".join(words_of(self.model, tokens)) for tokens in (right, wrong)]
        label = " - ".join(words)
        if not _can_name_a_node(label):
            ids = [" + ".join(f"#{token}" for token in tokens) for tokens in (right, wrong)]
            label = " - ".join(ids)
        return difference_direction(self.local, right, wrong, label)

    def _group(self, wanted: Any) -> list[int]:
        """One token, or several whose mean logit counts."""
        is_single = isinstance(wanted, str) or python_number(wanted) is not None
        several = [wanted] if is_single else items(wanted, "a part of a pair in explain")
        tokens = list(map(self._token, several))
        if not tokens:
            raise InputError(
                f"explain holds {shown(wanted)} in a pair; give a token, or a list of them."
            )
        return list(dict.fromkeys(tokens))

    def _token(self, wanted: Token) -> int:
        """The token of a text or id, refused if it is not one token of this model."""
        if isinstance(wanted, str):
            return self._token_of_text(wanted)
        vocabulary = self.local.unembedding.shape[1]
        number = python_number(wanted)
        if number is None or number % 1 or not 0 <= number < vocabulary:
            raise InputError(
                f"explain holds {shown(wanted)}, which is no token of this model's; give its text, "
                f"or an id from 0 to {vocabulary - 1}; a pair of tokens is a tuple."
            )
        return int(number)

    def _token_of_text(self, text: str) -> int:
        tokenizer = PromptTokenizer.of(self.model)
        ids = self.local.tokens.tolist()
        prompt = str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True))
        # Words are shown without the space before them.
        for space in ("",) if text.startswith(" ") else ("", " "):
            with contextlib.suppress(DoesNotFit):
                return tokenizer.answer(prompt, space + text)
        pieces = tokenizer.tokenizer.tokenize(text)
        raise InputError(
            f"explain holds {shown(text)}, which must be one token after {shorten(prompt)} and is "
            f"{shown(pieces)}; give one token's text, with its leading space, or its id."
        )


def _plain_direction(wanted: Direction) -> Direction:
    """A direction whose numbers are Python's own, and whose vector is a tensor."""
    expect(wanted.label, str, "a text as a Direction's label", "give it a name")
    numbers: dict[str, Any] = {}
    for name in ("bias", "weight"):
        found = python_number(getattr(wanted, name))
        # What is no number is not finite either.
        numbers[name] = math.nan if found is None else float(found)
    if wanted.position is not None:
        numbers["position"] = whole(wanted.position, "position")
    vector = as_tensor(wanted.vector, f"the vector of the Direction {wanted.label!r}")
    return replace(wanted, vector=vector.detach(), **numbers)


def _check_direction(local: LocalModel, wanted: Direction) -> None:
    """Refuse a direction that does not fit the model or cannot be named."""
    length, width = local.embedding.shape
    vector, named = wanted.vector, f"the Direction {wanted.label!r}"
    is_weight = 0 < wanted.weight < math.inf
    if not math.isfinite(wanted.bias) or not is_weight:
        raise InputError(
            f"{named} has bias {wanted.bias} and weight {wanted.weight}: give finite ones, the "
            "weight above 0."
        )
    is_direction = vector.isfinite().all() and vector.any() and not vector.is_complex()
    if vector.shape != (width,) or not is_direction:
        raise InputError(
            f"{named} has a vector of shape {tuple(vector.shape)}; it must be {width} finite "
            "numbers, not all zero: give a tensor of them."
        )
    _check_position_and_label(wanted, length)


def _check_position_and_label(wanted: Direction, length: int) -> None:
    position, label = wanted.position, wanted.label
    if position is not None and not 0 <= position < length:
        raise InputError(
            f"the Direction {label!r} is at position {position} of a prompt of {length} tokens."
        )
    if wanted.token is None and not _can_name_a_node(label):
        raise InputError(
            f"a Direction cannot be called {label!r}, because nodes are: use a word that is "
            "no number, without @."
        )


def _can_name_a_node(label: str) -> bool:
    # Nodes are written logits:<token or label>@<position>.
    return bool(label) and "@" not in label and not label.isdecimal()

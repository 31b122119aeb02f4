"""Tasks: prompt pairs with answers, as tokens; and the families that write them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.models import Model
from circuits.system.errors import InputError
from circuits.tasks import validation as checks
from circuits.tasks.prompts import PromptPair, read_pairs
from circuits.tasks.tokenization import EncodedPair, PromptTokenizer


@dataclass(frozen=True, eq=False)
class Task:
    """Prompt pairs as tokens, with what is scored. Every scored (prompt, position) is one row of logits.

    Attributes:
        name: what it is called in records and folders.
        clean: the prompts, padded on the right.
        corrupted: their counterparts, aligned token by token.
        lengths: the number of real tokens of each prompt.
        scored: where the next token is judged.
        answers: the right tokens of each prompt, padded with -1; None when there are none.
        wrong_answers: the wrong ones, likewise.
        positions: named spans.
        metric: the name of the metric it is judged by unless another is asked for.
        prompts: the text it came from, where it came from text.
    """

    name: str
    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    scored: Bool[Tensor, "batch pos"]
    answers: Int[Tensor, "batch k"] | None
    wrong_answers: Int[Tensor, "batch k_wrong"] | None
    positions: Mapping[str, Bool[Tensor, "batch pos"]]
    metric: str
    prompts: tuple[PromptPair, ...] | None = None

    @staticmethod
    def from_prompts(
        model: Model,
        pairs: Sequence[PromptPair],
        *,
        name: str = "custom",
        metric: str | None = None,
    ) -> Task:
        """A task from text, scored at the end of each prompt.

        Args:
            metric: None is "logit_difference", without wrong answers "negative_log_probability", without answers "kl".

        Raises:
            InputError: the model has no tokenizer; a pair differs in length, is empty or too long, has an answer of several tokens or a
                span outside the prompt; or only some pairs have answers or a span.
        """
        encoder = PromptTokenizer.of(model)
        return Task._from_encoded([encoder.encode(pair) for pair in pairs], name, metric, model)

    @staticmethod
    def from_jsonl(
        path: str | Path, model: Model, *, name: str | None = None, metric: str | None = None
    ) -> Task:
        """A task from a file with one JSON object a line, whose fields are PromptPair's (`clean`, `corrupted`, `answer`, ...).

        Args:
            name: None is the file's name without its ending.
            metric: as in `from_prompts`.

        Raises:
            InputError: the file cannot be read, or a line cannot be used (with its number and the reason, see `from_prompts`).
        """
        encoder, encoded = PromptTokenizer.of(model), []
        for number, pair in read_pairs(path):
            try:
                encoded.append(encoder.encode(pair))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
        return Task._from_encoded(encoded, Path(path).stem if name is None else name, metric, model)

    # Tensors from users are checked by hand, so that what is wrong is said in our words: hence no shapes in this signature.
    @staticmethod
    def from_tokens(
        clean: Tensor,
        corrupted: Tensor,
        answers: Tensor | None = None,
        wrong_answers: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        answer_positions: Tensor | None = None,
        positions: Mapping[str, Tensor] | None = None,
        metric: str | None = None,
        name: str = "custom",
    ) -> Task:
        """A task from token ids, on whatever device they are.

        Args:
            clean: integers [batch, pos].
            corrupted: integers [batch, pos].
            answers: the right tokens, integers [batch] or [batch, k] padded with -1.
            wrong_answers: the wrong ones, likewise.
            lengths: integers [batch], the number of real tokens of each prompt; None: all are real.
            answer_positions: where prompts are scored: integers [batch], or booleans [batch, pos] for several positions of a prompt;
                None: at the last real token.
            positions: named spans, booleans [batch, pos].
            metric: as in `from_prompts`.

        Raises:
            InputError: something has the wrong shape or type or lies outside its prompt.
        """
        clean, corrupted = checks.prompts(clean, corrupted)
        lengths = checks.lengths(lengths, clean)
        right, wrong = (
            checks.answers(part, clean, kind)
            for part, kind in ((answers, "answers"), (wrong_answers, "wrong_answers"))
        )
        if metric is None:
            metric = (
                "kl"
                if right is None
                else "negative_log_probability"
                if wrong is None
                else "logit_difference"
            )
        if not re.fullmatch(r"[\w+-][\w.+-]*", name):
            raise InputError(
                f"a task cannot be called {name!r}, because folders are; use letters, digits and . _ - + only."
            )
        scored, spans = (
            checks.scored(answer_positions, clean, lengths),
            checks.spans(positions or {}, clean, lengths),
        )
        return Task(name, clean, corrupted, lengths, scored, right, wrong, spans, metric)

    @staticmethod
    def _from_encoded(
        encoded: Sequence[EncodedPair], name: str, metric: str | None, model: Model
    ) -> Task:
        if not encoded:
            raise InputError(f"task {name!r} has no prompts; give at least one PromptPair.")
        checks.same_parts([pair.pair for pair in encoded])
        clean, corrupted = (
            checks.padded(rows, 0)
            for rows in ([pair.clean for pair in encoded], [pair.corrupted for pair in encoded])
        )
        right, wrong = (
            checks.padded(rows, -1)
            for rows in (
                [pair.answers for pair in encoded],
                [pair.wrong_answers for pair in encoded],
            )
        )
        spans = {span: torch.zeros_like(clean, dtype=torch.bool) for span in encoded[0].spans}
        for row, pair in enumerate(encoded):
            for span, indices in pair.spans.items():
                spans[span][row, indices] = True
        lengths = torch.tensor([len(pair.clean) for pair in encoded])
        given = (right if right.numel() else None, wrong if wrong.numel() else None)
        task = Task.from_tokens(
            clean, corrupted, *given, lengths=lengths, positions=spans, metric=metric, name=name
        )
        return replace(task, prompts=tuple(pair.pair for pair in encoded)).to(model.cfg.device)

    def __len__(self) -> int:
        """The number of prompts."""
        return self.clean.shape[0]

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self)} prompts of up to {self.clean.shape[1]} tokens, metric={self.metric!r})"

    def __getitem__(self, indices: slice | Tensor | Sequence[int]) -> Task:
        """The task of some of its prompts: a slice, integers, or a boolean for each prompt."""
        index = torch.arange(len(self))[
            indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()
        ]
        chosen = {
            column: tensor[index.to(tensor.device)] for column, tensor in self._columns().items()
        }
        prompts = None if self.prompts is None else tuple(self.prompts[i] for i in index.tolist())
        return replace(self._with(chosen), prompts=prompts)

    @cached_property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """Real tokens, as against padding."""
        return torch.arange(self.clean.shape[1], device=self.clean.device) < self.lengths[:, None]

    @cached_property
    def row_prompt(self) -> Int[Tensor, " scored"]:
        """The prompt each row of logits belongs to. Rows are ordered by prompt, then by position."""
        return self.scored.nonzero()[:, 0]

    @cached_property
    def row_answers(self) -> Int[Tensor, "scored k"] | None:
        """The right tokens of each row, padded with -1."""
        return None if self.answers is None else self.answers[self.row_prompt]

    @cached_property
    def row_wrong_answers(self) -> Int[Tensor, "scored k_wrong"] | None:
        """The wrong tokens of each row, padded with -1."""
        return None if self.wrong_answers is None else self.wrong_answers[self.row_prompt]

    def to(self, device: str | torch.device | None) -> Task:
        """The same task with its tensors on `device`."""
        return self._with({column: tensor.to(device) for column, tensor in self._columns().items()})

    def digest(self) -> str:
        """A hash of name, metric and every tensor, the same on every device."""
        digest = hashlib.blake2b(f"{self.name} {self.metric}".encode(), digest_size=16)
        for column, tensor in sorted(self._columns().items()):
            digest.update(f" {column} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _columns(self) -> dict[str, Tensor]:
        names = ("clean", "corrupted", "lengths", "scored", "answers", "wrong_answers")
        columns = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return columns | {f"positions {span}": tensor for span, tensor in self.positions.items()}

    def _with(self, columns: Mapping[str, Tensor]) -> Task:
        spans = {span: columns[f"positions {span}"] for span in self.positions}
        plain: dict[str, Any] = {
            name: tensor for name, tensor in columns.items() if not name.startswith("positions ")
        }
        return replace(self, **plain, positions=spans)

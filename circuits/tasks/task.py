"""Tasks: prompt pairs as tokens, with their answers and scored positions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from circuits.models import Model
from circuits.system.errors import InputError
from circuits.system.tensors import as_tensor, optional_tensor
from circuits.tasks import validation
from circuits.tasks.messages import shorten
from circuits.tasks.prompts import PromptPair, PromptPairs, prompt_pairs, read_pairs
from circuits.tasks.readers.tokens import as_token_ids, prompt_indices
from circuits.tasks.tokenization import EncodedPair, PromptTokenizer

TokenMask = Bool[Tensor, "batch pos"]
EncodedPairs = Sequence[EncodedPair]
OptionalTensor = Tensor | None

TENSOR_FIELDS = ("clean", "corrupted", "lengths", "scored", "answers", "wrong_answers")


@dataclass(frozen=True, eq=False)
class Task:
    """Prompt pairs as tokens, with the positions at which the model's prediction is scored.

    Each scored (prompt, position) is one row of the logits given to a metric. Make a task with
    `circuits.load_task`, `from_prompts`, `from_file` or `from_tokens`.

    >>> import circuits
    >>> task = circuits.load_task("ioi", circuits.load_model("toy-world"), n=8)
    >>> len(task), len(task[:3]), task.metric
    (8, 3, 'logit_difference')

    Attributes:
        name: identifies the task in records and folders.
        clean: the clean prompts, padded on the right.
        corrupted: their corrupted counterparts, aligned token by token.
        lengths: the number of real tokens of each prompt.
        scored: the positions at which the next token is scored.
        answers: the right next tokens of each prompt, padded with -1; None if there are none.
        wrong_answers: the wrong ones, in the same form.
        positions: named spans: for each name, which tokens belong to the span.
        metric: the name of the metric used unless another is given.
        prompts: the text of the prompts, if the task was made from text.
    """

    name: str
    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    scored: TokenMask
    answers: Int[Tensor, "batch k"] | None
    wrong_answers: Int[Tensor, "batch k_wrong"] | None
    positions: Mapping[str, TokenMask]
    metric: str
    prompts: tuple[PromptPair, ...] | None = None

    @staticmethod
    def from_prompts(
        model: Model,
        pairs: PromptPairs,
        *,
        name: str = "custom",
        metric: str | None = None,
    ) -> Task:
        """Make a task from text, scored at the last token of each prompt.

        A pair is a `PromptPair`, a dict with its fields, or a tuple (clean, corrupted, answer,
        wrong_answer). Pairs may come as a list or as a table of pandas; a single one may come
        alone. Rows of MIB's data sets and EAP-IG's tables are understood as in `from_file`.

        >>> import circuits
        >>> pair = circuits.PromptPair("So Mary", "So John", " is", spans={"NAME": (3, 7)})
        >>> circuits.Task.from_prompts(circuits.load_model("toy-world"), [pair])
        Task('custom', 1 prompts of up to 3 tokens, metric='negative_log_probability')

        Args:
            metric: None means "logit_difference"; "negative_log_probability" if there are no wrong
                answers; "kl" if there are no answers.

        Raises:
            InputError: the model has no tokenizer; only some pairs have answers or a span; prompts
                of a pair differ in length, are empty or too long; or an answer is several tokens.
        """
        encode = PromptTokenizer.of(model).encode
        encoded = [encode(pair) for pair in prompt_pairs(pairs)]
        return task_from_encoded(encoded, name, metric, model)

    @staticmethod
    def from_file(
        path: str | Path,
        model: Model,
        *,
        name: str | None = None,
        metric: str | None = None,
    ) -> Task:
        r"""Make a task from a file: JSON lines, a JSON list, or a table (.csv, .tsv).

        Fields or columns are those of `PromptPair`, with spaces as they stand; in a table, several
        answers are a JSON list. Token ids of answers are in `answer_idx` and `wrong_answer_idx`.
        The tables of EAP-IG are understood as well (`correct_idx` and `incorrect_idx`,
        `country_idx` and `corrupted_country_idx`, ...), and the data sets of MIB as JSON, with the
        counterfactuals of its circuit track.

        >>> import circuits, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "names.csv")
        >>> _ = path.write_text("clean,corrupted,answer\nSo Mary,So John, is")
        >>> circuits.Task.from_file(path, circuits.load_model("toy-world")).name
        'names'

        Args:
            name: None means the file's name without its suffix.
            metric: as in `from_prompts`.

        Raises:
            InputError: the file cannot be read, or a line cannot be used.
        """
        encoded = read_pairs(path, PromptTokenizer.of(model).encode)
        name = Path(path).stem if name is None else name
        return task_from_encoded(encoded, name, metric, model)

    # Its name when JSON lines were the only format.
    from_jsonl = from_file

    # Users pass these tensors, so `validation` checks them. Shapes in this signature would make
    # the runtime type checker of the tests reject them first.
    @staticmethod
    def from_tokens(
        clean: Any,
        corrupted: Any,
        answers: Any = None,
        wrong_answers: Any = None,
        *,
        lengths: Any = None,
        answer_positions: Any = None,
        positions: Mapping[str, Any] | None = None,
        metric: str | None = None,
        name: str = "custom",
    ) -> Task:
        """Make a task from token ids. The task is on the device of `clean`.

        Lists and numpy arrays are as good as tensors, and so is a tokenizer's output.

        >>> import circuits, torch
        >>> clean = torch.tensor([[5, 6, 7], [5, 8, 7]])
        >>> task = circuits.Task.from_tokens(clean, clean.flip(0), answers=torch.tensor([6, 8]))
        >>> task.scored.nonzero().tolist()
        [[0, 2], [1, 2]]

        Args:
            clean: integers [batch, pos].
            corrupted: integers [batch, pos].
            answers: the right next tokens, integers [batch] or [batch, k] padded with -1.
            wrong_answers: the wrong ones, in the same form.
            lengths: integers [batch], the number of real tokens of each prompt; None means all.
            answer_positions: the scored positions: integers [batch], or booleans [batch, pos] for
                several positions per prompt; None means the last real token.
            positions: named spans, booleans [batch, pos].
            metric: as in `from_prompts`.

        Raises:
            InputError: a tensor has the wrong shape, type or values.
        """
        clean, corrupted = as_token_ids(clean, "clean"), as_token_ids(corrupted, "corrupted")
        answers = optional_tensor(answers, "answers", padding=-1)
        wrong_answers = optional_tensor(wrong_answers, "wrong_answers", padding=-1)
        lengths = optional_tensor(lengths, "lengths")
        answer_positions = optional_tensor(answer_positions, "answer_positions")
        masks = {name: as_tensor(mask, name) for name, mask in (positions or {}).items()}
        clean, corrupted = validation.check_prompts(clean, corrupted)
        lengths = validation.check_lengths(lengths, clean)
        answers = validation.check_answers("answers", answers, clean)
        wrong_answers = validation.check_answers("wrong_answers", wrong_answers, clean)
        scored = validation.check_scored(answer_positions, clean, lengths)
        spans = validation.check_spans(masks, clean, lengths)
        if not isinstance(name, str) or not re.fullmatch(r"[\w+-][\w.+-]*", name):
            raise InputError(
                f"a task cannot be called {name!r}, because folders get its name; use only "
                "letters, digits and . _ - +, and no . at the start."
            )
        metric = _default_metric(answers, wrong_answers) if metric is None else metric
        return Task(name, clean, corrupted, lengths, scored, answers, wrong_answers, spans, metric)

    def __len__(self) -> int:
        """The number of prompts."""
        return self.clean.shape[0]

    def __repr__(self) -> str:
        size = f"{len(self)} prompts of up to {self.clean.shape[1]} tokens"
        return f"Task({self.name!r}, {size}, metric={self.metric!r})"

    def __getitem__(self, indices: Any) -> Task:
        """Select prompts by a slice, integers, or one boolean per prompt.

        Raises:
            InputError: there are no such prompts.
        """
        indices = prompt_indices(indices, len(self))
        # Indices of prompts, whatever they were selected by.
        index = torch.arange(len(self))[indices]
        task = self._with_tensors(lambda tensor: tensor[index.to(tensor.device)])
        if self.prompts is None:
            return task
        prompts = [self.prompts[number] for number in index]
        return replace(task, prompts=tuple(prompts))

    @cached_property
    def mask(self) -> TokenMask:
        """True at real tokens, False at padding."""
        n_tokens = self.clean.shape[1]
        positions = torch.arange(n_tokens, device=self.clean.device)
        return positions < self.lengths[:, None]

    @cached_property
    def row_prompt(self) -> Int[Tensor, " scored"]:
        """The prompt of each scored row. Rows are ordered by prompt, then by position."""
        return self.scored.nonzero()[:, 0]

    @cached_property
    def row_answers(self) -> Int[Tensor, "scored k"] | None:
        """The right next tokens of each scored row, padded with -1."""
        return self._by_row(self.answers)

    @cached_property
    def row_wrong_answers(self) -> Int[Tensor, "scored k_wrong"] | None:
        """The wrong next tokens of each scored row, padded with -1."""
        return self._by_row(self.wrong_answers)

    def _by_row(self, tokens: OptionalTensor) -> OptionalTensor:
        return None if tokens is None else tokens[self.row_prompt]

    def to(self, device: str | torch.device | None) -> Task:
        """The same task with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device))

    def digest(self) -> str:
        """A hash of the name, the metric and every tensor; the same on every device."""
        title = f"{self.name} {self.metric}"
        digest = blake2b(title.encode(), digest_size=16)
        tensors = {name: getattr(self, name) for name in TENSOR_FIELDS}
        tensors |= {f"positions {span}": mask for span, mask in self.positions.items()}
        # Shapes count too, as the bytes of [2, 3] and [3, 2] tensors can be the same.
        for name, tensor in sorted(tensors.items()):
            if tensor is not None:
                digest.update(f" {name} {tuple(tensor.shape)} ".encode())
                values = tensor.cpu().contiguous()
                digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Task:
        fields: dict[str, Any] = {}
        for name in TENSOR_FIELDS:
            tensor = getattr(self, name)
            fields[name] = None if tensor is None else change(tensor)
        spans = {span: change(mask) for span, mask in self.positions.items()}
        return replace(self, **fields, positions=spans)


def task_from_encoded(encoded: EncodedPairs, name: str, metric: str | None, model: Model) -> Task:
    """Make a task from encoded prompt pairs, on the device of the model."""
    if not encoded:
        raise InputError(f"task {name!r} has no prompts; give at least one PromptPair.")
    _check_same_fields(encoded)
    tensors = _padded(encoded)
    prompts = tuple(each.pair for each in encoded)
    # In the order of the first pair, which sorted fields have lost.
    spans = {span: tensors.pop(f"span {span}") for span in prompts[0].spans}
    n_tokens = [len(each.fields["clean"]) for each in encoded]
    task = Task.from_tokens(
        **tensors,
        lengths=torch.tensor(n_tokens),
        positions=spans,
        metric=metric,
        name=name,
    )
    return replace(task, prompts=prompts).to(model.cfg.device)


def _padded(encoded: EncodedPairs) -> dict[str, Tensor]:
    tensors = {}
    for name in encoded[0].fields:
        values = [each.fields[name] for each in encoded]
        rows = list(map(torch.tensor, values))
        # No token has the id -1, and no span holds padding.
        padding = -1 if name in ("answers", "wrong_answers") else 0
        tensors[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    return tensors


def _check_same_fields(encoded: EncodedPairs) -> None:
    # All pairs have clean and corrupted tokens, which come first.
    _, _, *expected = encoded[0].fields
    for each in encoded:
        _, _, *fields = each.fields
        if fields != expected:
            raise InputError(
                f"prompt {shorten(each.pair.clean)} has the fields {fields}, and the first prompt "
                f"{expected}; give all prompts the same fields."
            )


def _default_metric(answers: OptionalTensor, wrong_answers: OptionalTensor) -> str:
    if answers is None:
        return "kl"
    return "negative_log_probability" if wrong_answers is None else "logit_difference"

"""Tasks: prompt pairs as tokens, with their answers and scored positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from circuits.models import Model, shape_of
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.kinds import expect
from circuits.system.messages import shorten
from circuits.system.tensors import as_tensor, check_same_labels, optional_tensor
from circuits.system.torch_modes import without_modes
from circuits.tasks import validation
from circuits.tasks.metric_names import checked_metric
from circuits.tasks.pairs import PromptPairs, pair_rows
from circuits.tasks.prompts import PromptPair
from circuits.tasks.readers.files import file_rows, name_of
from circuits.tasks.readers.tokens import prompt_indices, token_ids
from circuits.tasks.tokenization import EncodedPair, Fitting, fitting

TokenMask = Bool[Tensor, "batch pos"]
EncodedPairs = Sequence[EncodedPair]
OptionalTensor = Tensor | None

ANSWER_FIELDS = ("answers", "wrong_answers")
ALIGNED_FIELDS = ("alignment", "corrupted_lengths")
TENSOR_FIELDS = ("clean", "corrupted", "lengths", "scored", *ANSWER_FIELDS, *ALIGNED_FIELDS)


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
        corrupted: their corrupted counterparts, aligned token by token unless `alignment` says
            otherwise; the clean prompts themselves if there are none.
        lengths: the number of real tokens of each prompt.
        scored: the positions at which the next token is scored.
        answers: the right next tokens of each prompt, or of each scored row where a prompt has
            several, padded with -1; None if there are none.
        wrong_answers: the wrong ones, in the same form.
        positions: named spans: for each name, which tokens belong to the span.
        metric: the name of the metric used unless another is given.
        prompts: the text of the prompts, if the task was made from text.
        alignment: where corrupted prompts have other lengths, the position of each clean token's
            counterpart; else None.
        corrupted_lengths: the numbers of tokens of these corrupted prompts.
        left_out: how many prompts were left out because they do not fit the model, by reason.
        finds_padding: whether it is checked that no prompt begins or ends with padding, which a
            mask would have marked.
    """

    name: str
    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch corrupted_pos"]
    lengths: Int[Tensor, " batch"]
    scored: TokenMask
    answers: Int[Tensor, "answered k"] | None
    wrong_answers: Int[Tensor, "wrongly_answered k_wrong"] | None
    positions: Mapping[str, TokenMask]
    metric: str
    prompts: tuple[PromptPair, ...] | None = None
    alignment: Int[Tensor, "batch pos"] | None = None
    corrupted_lengths: Int[Tensor, " batch"] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    finds_padding: bool = False

    @staticmethod
    @without_modes()
    def from_prompts(
        model: Model,
        pairs: PromptPairs,
        *,
        name: str = "custom",
        metric: str | None = None,
        prepend_bos: bool | None = None,
        skip_misfits: bool = False,
    ) -> Task:
        """Make a task from text, scored at the last token of each prompt.

        A pair is a `PromptPair`, a dict with its fields, or a tuple (clean, corrupted, answer,
        wrong_answer). Pairs may come as a list or as a table of pandas; a single one may come
        alone. Rows of MIB's data sets and EAP-IG's tables are understood as in `from_file`.

        An answer of several tokens is appended to both prompts but for its last token, and all
        positions that predict its tokens are scored: its negative log probabilities add up to that
        of the whole answer.

        >>> import circuits
        >>> pair = circuits.PromptPair("So Mary", "So John", " is", spans={"NAME": (3, 7)})
        >>> circuits.Task.from_prompts(circuits.load_model("toy-world"), [pair])
        Task('custom', 1 prompts of up to 3 tokens, metric='negative_log_probability')

        Args:
            metric: None means "logit_difference"; "negative_log_probability" if there are no wrong
                answers; "kl" if there are no answers.
            prepend_bos: True begins each prompt with exactly one BOS token, which its text may
                bring; False takes text as it is; None is the model's default.
            skip_misfits: leave out pairs that do not fit the model, or have other fields than most,
                with a warning that counts them. `task.left_out` has the counts.

        Raises:
            InputError: the model has no tokenizer; only some pairs have answers or a span; prompts
                of a pair differ in length, are the same, empty or too long, or have unknown words;
                or answers are not one token each, or one answer and one wrong answer of equally
                many tokens.
        """
        encode = fitting(model, prepend_bos, skip_misfits)
        encoded = encode.each(pair_rows(pairs))
        return _task_of_fitting(encode, encoded, name, metric, model)

    @staticmethod
    @without_modes()
    def from_file(
        path: str | Path,
        model: Model,
        *,
        name: str | None = None,
        metric: str | None = None,
        prepend_bos: bool | None = None,
        skip_misfits: bool = False,
    ) -> Task:
        r"""Make a task from a file: JSON lines, a JSON list, or a table (.csv, .tsv).

        Fields or columns are those of `PromptPair`, with spaces as they stand; in a table, several
        answers and spans are JSON, or what pandas writes for lists and dicts. Token ids of answers
        are in `answer_idx` and `wrong_answer_idx`. The tables of EAP-IG are understood as well
        (`correct_idx` and `incorrect_idx`, `country_idx` and `corrupted_country_idx`, ...), and the
        data sets of MIB as JSON, with the counterfactuals of its circuit track. Columns that are
        none of these are refused.

        >>> import circuits, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "names.csv")
        >>> _ = path.write_text("clean,corrupted,answer\nSo Mary,So John, is")
        >>> circuits.Task.from_file(path, circuits.load_model("toy-world")).name
        'names'

        Args:
            name: None means the file's name without its suffix, with - for what names cannot have.
            metric, prepend_bos, skip_misfits: as in `from_prompts`.

        Raises:
            InputError: the file cannot be read, or a line cannot be used.
        """
        encode = fitting(model, prepend_bos, skip_misfits)
        encoded = encode.each(file_rows(path))
        name = name_of(path) if name is None else name
        return _task_of_fitting(encode, encoded, name, metric, model)

    # Its name when JSON lines were the only format.
    from_jsonl = from_file

    # Users pass these tensors, so `validation` checks them. Shapes in this signature would make
    # the runtime type checker of the tests reject them first.
    @staticmethod
    @without_modes()
    def from_tokens(
        clean: Any,
        corrupted: Any = None,
        answers: Any = None,
        wrong_answers: Any = None,
        *,
        attention_mask: Any = None,
        lengths: Any = None,
        padding_side: Literal["right", "left"] = "right",
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
            corrupted: integers [batch, pos]; None if there are none, for ablations that need none.
            answers: the right next tokens of each prompt, integers [batch] or [batch, k] padded
                with -1; or of each scored row, integers [scored] or [scored, k]. Every answer
                counts once, however often it is given.
            wrong_answers: the wrong ones, in the same form.
            attention_mask: the real tokens of clean and corrupted prompts, booleans or 0 and 1
                [batch, pos]. Padding may be on both sides; all positions that are given count it,
                and the task has it on the right. Only a mask makes text of a token that pads at
                either end of a prompt; models refuse it otherwise.
            lengths: instead of a mask, the number of real tokens of each prompt, integers [batch].
                Without both, all tokens are real.
            padding_side: where the padding is that `lengths` leaves.
            answer_positions: the scored positions: integers [batch], or booleans [batch, pos] for
                several positions per prompt; None means the last real token.
            positions: named spans, booleans [batch, pos].
            metric: as in `from_prompts`.

        Raises:
            InputError: a tensor has the wrong shape, type or values.
        """
        by_name = {"clean": clean, "corrupted": corrupted, "attention_mask": attention_mask}
        by_name |= {"answers": answers, "wrong_answers": wrong_answers, "lengths": lengths}
        named = {} if positions is None else positions
        expect(named, Mapping, "positions as a dict", "give name: booleans [batch, pos]")
        check_same_labels(by_name | {"answer_positions": answer_positions} | dict(named))
        given = token_ids(clean, corrupted, attention_mask)
        clean, corrupted, attention_mask, are_marked = given
        answers = optional_tensor(answers, "answers", padding=-1)
        wrong_answers = optional_tensor(wrong_answers, "wrong_answers", padding=-1)
        lengths = optional_tensor(lengths, "lengths")
        answer_positions = optional_tensor(answer_positions, "answer_positions")
        masks = {name: as_tensor(mask, name) for name, mask in named.items()}
        clean, corrupted = validation.check_prompts(clean, corrupted)
        mask = validation.check_mask(attention_mask, lengths, padding_side, clean)
        scored = validation.check_scored(answer_positions, clean, mask)
        answers = validation.check_answers("answers", answers, scored)
        wrong_answers = validation.check_answers("wrong_answers", wrong_answers, scored)
        validation.check_different(answers, wrong_answers, scored)
        spans = validation.check_spans(masks, clean, mask)
        validation.check_name(name)
        if metric is None:
            metric = _default_metric(answers, wrong_answers)
        task = Task(
            name,
            clean,
            corrupted,
            mask.sum(1),
            scored,
            answers,
            wrong_answers,
            spans,
            checked_metric(metric),
            finds_padding=not are_marked,
        )
        return task._padded_on_the_right(mask)

    def __len__(self) -> int:
        """The number of prompts."""
        return self.clean.shape[0]

    def __repr__(self) -> str:
        size = f"{len(self)} prompts of up to {self.clean.shape[1]} tokens"
        return f"Task({self.name!r}, {size}, metric={self.metric!r})"

    @without_modes()
    def __getitem__(self, indices: Any) -> Task:
        """Select prompts by a slice, integers, or one boolean per prompt.

        Raises:
            InputError: there are no such prompts.
        """
        # Indices of prompts, whatever they were selected by.
        index = torch.arange(len(self))[prompt_indices(indices, len(self))]
        index = index.to(self.scored.device)
        rows = self._rows_of(index)
        prompts = self.prompts and tuple(self.prompts[number] for number in index)
        selected = self._with_tensors(partial(self._selected, index, rows))
        return replace(selected, prompts=prompts)

    def _selected(self, index: Tensor, rows: Tensor, name: str, tensor: Tensor) -> Tensor:
        by_row = name in ANSWER_FIELDS and len(tensor) == len(self.row_prompt)
        return tensor[rows if by_row else index]

    def _rows_of(self, index: Tensor) -> Tensor:
        # The number of each scored row, where it is scored
        numbers = self.scored.flatten().cumsum(0) - 1
        return numbers.view_as(self.scored)[index][self.scored[index]]

    @cached_property
    def mask(self) -> TokenMask:
        """True at real tokens, False at padding."""
        return validation.first_tokens(self.lengths, self.clean)

    @cached_property
    def corrupted_mask(self) -> Bool[Tensor, "batch corrupted_pos"]:
        """True at real tokens of the corrupted prompts."""
        if self.corrupted_lengths is None:
            return self.mask
        return validation.first_tokens(self.corrupted_lengths, self.corrupted)

    @property
    def prompt_mask(self) -> TokenMask:
        """True at the tokens of the prompts as they were given, without appended answer tokens."""
        if self.prompts is None:
            return self.mask
        # The last token of a prompt is the first that is scored.
        n_appended = self.scored.sum(1) - 1
        return validation.first_tokens(self.lengths - n_appended, self.clean)

    @property
    def masked_prompts(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """Tokens, their mask and their scored positions: of clean, then of corrupted prompts."""
        scored = self.scored
        if self.alignment is not None:
            scored = torch.zeros_like(self.corrupted, dtype=torch.bool)
            scored[self.row_prompt, self.alignment[self.scored]] = True
        corrupted = self.corrupted, self.corrupted_mask, scored
        return (self.clean, self.mask, self.scored), corrupted

    def to_clean(self, activation: Tensor) -> Tensor:
        """What each clean token's counterpart has, of [batch, pos, ...] on corrupted prompts."""
        if self.alignment is None:
            return activation
        prompts = torch.arange(len(self), device=self.alignment.device)
        return activation[prompts[:, None], self.alignment]

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

    def numbering_answers(self) -> tuple[Int[Tensor, " token"], Task]:
        """The distinct tokens among all answers, and this task with answers numbered in these.

        >>> import circuits
        >>> task = circuits.load_task("ioi", circuits.load_model("toy-world"), n=8)
        >>> tokens, numbered = task.numbering_answers()
        >>> bool((tokens[numbered.answers] == task.answers).all())
        True
        """
        none = self.clean.new_empty(0)
        given = [none if each is None else each for each in (self.answers, self.wrong_answers)]
        every = torch.cat([each.flatten() for each in given])
        tokens = every[every >= 0].unique()

        def numbered(name: str, tensor: Tensor) -> Tensor:
            if name not in ANSWER_FIELDS:
                return tensor
            numbers = torch.searchsorted(tokens, tensor)
            # Padding stays -1.
            return numbers.masked_fill(tensor < 0, -1)

        return tokens, self._with_tensors(numbered)

    def _by_row(self, tokens: OptionalTensor) -> OptionalTensor:
        return None if tokens is None else validation.by_row(tokens, self.row_prompt)

    @checked_arguments
    def to(self, device: str | torch.device | None) -> Task:
        """The same task with its tensors on `device`; None leaves them where they are.

        Raises:
            InputError: there is no such device, or it cannot be used.
        """
        return self._with_tensors(partial(_moved, device))

    def digest(self) -> str:
        """A hash of the name, the metric and every tensor; the same on every device."""
        title = f"{self.name} {self.metric}"
        digest = blake2b(title.encode(), digest_size=16)
        tensors = {name: getattr(self, name) for name in TENSOR_FIELDS}
        tensors["prompt_mask"] = self.prompt_mask
        tensors |= {f"positions {span}": mask for span, mask in self.positions.items()}
        # Shapes count too, as the bytes of [2, 3] and [3, 2] tensors can be the same.
        for name, tensor in sorted(tensors.items()):
            if tensor is not None:
                digest.update(f" {name} {tuple(tensor.shape)} ".encode())
                values = tensor.cpu().contiguous()
                digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def _padded_on_the_right(self, mask: TokenMask) -> Task:
        """The task with all padding on the right; its real tokens are still where `mask` says."""
        first = mask.int().argmax(1, keepdim=True)
        n_tokens = mask.shape[1]
        # From each prompt's first real token on, and then what was before it
        order = (torch.arange(n_tokens, device=mask.device) + first) % n_tokens

        def moved(name: str, tensor: Tensor) -> Tensor:
            has_positions = name not in ("lengths", *ANSWER_FIELDS)
            return tensor.gather(1, order) if has_positions else tensor

        return self._with_tensors(moved)

    def _with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Task:
        """The task with every tensor changed, by a function of its name and itself."""
        fields: dict[str, Any] = {}
        for name in TENSOR_FIELDS:
            tensor = getattr(self, name)
            fields[name] = None if tensor is None else change(name, tensor)
        spans = {span: change("positions", mask) for span, mask in self.positions.items()}
        return replace(self, **fields, positions=spans)


def _moved(device: Any, name: str, tensor: Tensor) -> Tensor:
    # No gradient passes a tensor that was made in inference mode, but its copy.
    return tensor.to(device, copy=tensor.is_inference())


def _task_of_fitting(
    encode: Fitting,
    pairs: Sequence[EncodedPair | None],
    name: str,
    metric: str | None,
    model: Model,
) -> Task:
    """Make a task from the pairs that fit, and warn of those that were left out."""
    encoded = encode.alike([each for each in pairs if each is not None])
    if encode.left_out:
        told = f"{len(pairs) - len(encoded)} of {len(pairs)} prompt pairs do not fit the model"
        if not encoded:
            raise InputError(f"task {name!r}: {told}: {encode.told()}; use other prompts.")
        warnings.warn(f"task {name!r}: {told} and are left out: {encode.told()}.", stacklevel=3)
    remark = next((each.remark for each in encoded if each.remark), None)
    if remark is not None:
        warnings.warn(f"task {name!r}: {remark}", stacklevel=3)
    return task_from_encoded(encoded, name, metric, model, encode.left_out)


def task_from_encoded(
    encoded: EncodedPairs,
    name: str,
    metric: str | None,
    model: Model,
    left_out: Mapping[str, int],
) -> Task:
    """Make a task from encoded prompt pairs, on the device of the model."""
    if not encoded:
        raise InputError(f"task {name!r} has no prompts; give at least one PromptPair.")
    _check_same_fields(encoded)
    tensors: dict[str, Any] = _padded(encoded)
    alignment = _alignment(encoded)
    if alignment:
        # The corrupted prompts, which have another shape, come afterwards.
        alignment["corrupted"] = tensors.pop("corrupted")
    prompts = tuple(each.pair for each in encoded)
    # In the order of the first pair, which sorted fields have lost.
    spans = {span: tensors.pop(f"span {span}") for span in prompts[0].spans}
    lengths = torch.tensor([len(each.fields["clean"]) for each in encoded])
    n_before = lengths - torch.tensor([each.n_scored for each in encoded])
    real, before = [validation.first_tokens(n, tensors["clean"]) for n in (lengths, n_before)]
    task = Task.from_tokens(
        **tensors,
        attention_mask=real,
        answer_positions=real & ~before,
        positions=spans,
        metric=metric,
        name=name,
    )
    task = replace(task, prompts=prompts, left_out=dict(left_out), **alignment)
    return task.to(shape_of(model).device)


def _alignment(encoded: EncodedPairs) -> dict[str, Any]:
    """The fields of a task some of whose corrupted prompts are not aligned token by token."""
    pairings = [list(each.alignment) for each in encoded]
    lengths = [len(each.fields["corrupted"]) for each in encoded]
    if pairings == [list(range(length)) for length in lengths]:
        return {}
    return {"alignment": _stacked(pairings, 0), "corrupted_lengths": torch.tensor(lengths)}


def _padded(encoded: EncodedPairs) -> dict[str, Tensor]:
    first = encoded[0]
    # No span holds padding, and no token has the id -1.
    tensors = {name: _stacked([each.fields[name] for each in encoded], 0) for name in first.fields}
    for name in first.answers:
        by_row = [tokens for each in encoded for tokens in each.answers[name]]
        tensors[name] = _stacked(by_row, -1)
    return tensors


def _stacked(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=padding)


def _check_same_fields(encoded: EncodedPairs) -> None:
    expected, *others = [each.parts for each in encoded]
    for each, fields in zip(encoded[1:], others, strict=True):
        if fields != expected:
            raise InputError(
                f"{each.where}prompt {shorten(each.pair.clean)} has the fields {fields}, and "
                f"the first prompt {expected}; give all prompts the same fields."
            )


def _default_metric(answers: OptionalTensor, wrong_answers: OptionalTensor) -> str:
    if answers is None and wrong_answers is not None:
        raise InputError(
            "there are wrong answers but no answers, and kl would use neither; give answers, too, "
            "or the metric."
        )
    if answers is None:
        return "kl"
    return "negative_log_probability" if wrong_answers is None else "logit_difference"

"""Prompts in files and tables, token ids in lists and arrays: read as meant, or refused by line."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

import circuits
from circuits import PromptPair, Task

# What a user sees, who has no runtime type checks.
pytestmark = pytest.mark.usefixtures("unchecked_types")

HEADER = "clean,corrupted,answer,wrong_answer\n"
ROW = "So Mary,So John, is, was\n"
FIELDS = {"clean": "So Mary", "corrupted": "So John", "answer": " is", "wrong_answer": " was"}
LINE = json.dumps(FIELDS)
PAIR = PromptPair("So Mary", "So John", " is", " was")

SAME_PAIR = {
    "a.csv": HEADER + ROW,
    "crlf.csv": (HEADER + ROW).replace("\n", "\r\n"),
    "bom.csv": "\ufeff" + HEADER + ROW,
    "utf16.csv": (HEADER + ROW).encode("utf-16"),
    "semicolons.csv": (HEADER + ROW).replace(",", ";"),
    "a.tsv": (HEADER + ROW).replace(",", "\t"),
    "blank.csv": HEADER + "\n" + ROW,
    "numbered.csv": "," + HEADER + "0," + ROW,
    "lines.jsonl": LINE + "\n",
    "bom.jsonl": "\ufeff" + LINE,
    "utf16.jsonl": LINE.encode("utf-16"),
    "list.json": f"[{LINE}]",
    "pretty.json": json.dumps([FIELDS], indent=2),
}


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", SAME_PAIR)
def test_a_file_of_any_form_and_encoding_holds_the_same_task(name, tmp_path, toy_world):
    task = Task.from_file(written(tmp_path, name, SAME_PAIR[name]), toy_world)
    expected = Task.from_prompts(toy_world, [PAIR], name=task.name)
    assert task.prompts == expected.prompts and task.digest() == expected.digest()


DAMAGED = {
    "ragged.csv": (HEADER + ROW + "So Mary,So John\n", "line 3 has 2 cells"),
    "comma.csv": (HEADER + "So, Mary" + ROW[2:], "line 2 has 5 cells"),
    "quote.csv": (HEADER + '"So Mary,So John, is, was\n', "line 2: not a table"),
    "inner.csv": (HEADER + '"So" Mary,So John, is, was\n', "line 2: not a table"),
    "after-two-lines.csv": (HEADER + '"So Mary\n","So John\n", is, was\nx\n', "line 5 has 1 cell"),
    "column.csv": (
        "clean,corrupted,anser\na,b,c\n",
        "unknown field 'anser'; did you mean 'answer'",
    ),
    "spaces.csv": ("clean, corrupted\nSo Mary, So John\n", "unknown field ' corrupted'"),
    "twice.csv": ("clean,clean\na,b\n", "line 1 names the column 'clean' twice"),
    "missing.csv": (HEADER + ",So John, is, was\n", "line 2: field 'clean' is missing"),
    "header.csv": (HEADER, "holds no prompt pair"),
    "empty.csv": ("", "holds no prompt pair"),
    "latin.csv": ((HEADER + ROW).encode() + "Sé,a,b,c\n".encode("latin-1"), "line 3: not UTF-8"),
    "zeros.jsonl": (LINE.encode("utf-16-le"), "line 1: holds a zero byte"),
    "cut.json": (f"[{LINE},\n{LINE}", "line 2: not a JSON list"),
    "entry.json": (f"[{LINE},\n5]", "line 2 (entry 2): expected a JSON object, found int"),
    "deep.json": ("[" * 100_000, "line 1: not a JSON list"),
    "empty.json": ("[]", "holds no prompt pair"),
    "pickle.jsonl": (pickle.dumps([FIELDS]), "line 1: not UTF-8"),
    "years.csv": ("clean,corrupted,correct_idx\nSo Mary,So John,52\n", "writes years there"),
    "id.csv": ("clean,corrupted,correct_idx,incorrect_idx\nSo Mary,So John,x,1\n", "a token id"),
    "vocabulary.csv": ("clean,corrupted,answer_idx\nSo Mary,So John,673\n", "no token 673"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line_that_says_where(name, tmp_path, toy_world):
    content, message = DAMAGED[name]
    with pytest.raises(circuits.InputError) as caught:
        Task.from_file(written(tmp_path, name, content), toy_world)
    text = str(caught.value).replace(str(tmp_path), "")
    assert message in text and name in text and "\n" not in text and len(text) <= 500


def test_a_path_that_is_none_is_refused(toy_world, tmp_path):
    for path in (None, 5, tmp_path, tmp_path / "none.csv"):
        with pytest.raises(circuits.InputError, match="give a text file"):
            Task.from_file(path, toy_world)


def test_several_answers_and_spans_of_a_table_are_json(tmp_path, toy_world):
    rows = 'clean,corrupted,answer,spans\nSo Mary,So John,"["" is"", "" was""]","{""N"": [3, 7]}"\n'
    task = Task.from_file(written(tmp_path, "several.csv", rows), toy_world)
    assert task.prompts == (PromptPair("So Mary", "So John", (" is", " was"), spans={"N": (3, 7)}),)


# As in the data folders of hannamw/EAP-IG and hannamw/eap-ig-faithfulness.
EAP_IG = {
    "ioi": ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n7,So Mary,So John,x,9,10\n",
    "fact": "clean,country,country_idx,corrupted,corrupted_country,corrupted_country_idx\n"
    "So Mary,a,9,So John,b,10\n",
    "gender": "clean,corrupted,clean_answer_idx,corrupted_answer_idx,label\n"
    "So Mary,So John,9,10,x\n",
    "hypernymy": "clean,h1,answers,answers_idx,corrupted,corrupted_answers,corrupted_answers_idx\n"
    "So Mary,a,\"['gem']\",[9],So John,['x'],[10]\n",
}


@pytest.mark.parametrize("kind", EAP_IG)
def test_the_tables_of_eap_ig_are_read(kind, tmp_path, toy_world):
    path = written(tmp_path, f"{kind}.csv", EAP_IG[kind])
    in_memory = Task.from_prompts(toy_world, pd.read_csv(path), name=kind)
    for task in (Task.from_file(path, toy_world), in_memory):
        assert [(pair.clean, pair.corrupted) for pair in task.prompts] == [("So Mary", "So John")]
        assert task.answers.tolist() == [[9]] and task.wrong_answers.tolist() == [[10]]


def test_sets_of_answers_of_eap_ig_stay_sets(tmp_path, toy_world):
    table = 'clean,corrupted,answers_idx,corrupted_answers_idx\nSo Mary,So John,"[9, 11]",[10]\n'
    task = Task.from_file(written(tmp_path, "sets.csv", table), toy_world)
    assert task.answers.tolist() == [[9, 11]] and task.metric == "logit_difference"


NAMES = "Mary and John went. {} gave it to"
MIB = {
    # mib-bench/ioi
    "ioi": {
        "template": "x",
        "metadata": {"indirect_object": "Mary", "subject": "John", "random_a": "Mark"},
        "prompt": NAMES.format("John"),
        "choices": ["Mary", "John"],
        "answerKey": 0,
        "abc_counterfactual": {"prompt": "no", "choices": ["a", "b"], "answerKey": 0},
        "s2_io_flip_counterfactual": {
            "prompt": NAMES.format("Mary"),
            "choices": ["Mary", "John"],
            "answerKey": 1,
        },
    },
    # mib-bench/copycolors_mcqa and arc_easy, whose counterfactual labels may be numbers
    "mcqa": {
        "question": "x",
        "choices": {"label": [" Mark", " Mary"], "text": ["x", "y"]},
        "answerKey": 1,
        "prompt": NAMES.format("John"),
        "symbol_counterfactual": {
            "prompt": NAMES.format("Mary"),
            "choices": {"label": [" John", " Mark"], "text": ["x", "y"]},
            "answerKey": 0,
        },
    },
    # mib-bench/arithmetic_addition
    "arithmetic": {
        "operator": "+",
        "prompt": NAMES.format("John"),
        "label": " Mary",
        "ones_carry_counterfactual": None,
        "random_counterfactual": {"prompt": NAMES.format("Mary"), "label": " John"},
    },
}


@pytest.mark.parametrize("kind", MIB)
def test_the_data_sets_of_mib_are_read(kind, tmp_path, toy_world):
    expected = PromptPair(NAMES.format("John"), NAMES.format("Mary"), " Mary", " John")
    row = MIB[kind]
    lines = written(tmp_path, "lines.jsonl", json.dumps(row))
    listed = written(tmp_path, "list.json", json.dumps([row]))
    for task in (
        Task.from_file(lines, toy_world),
        Task.from_file(listed, toy_world),
        Task.from_prompts(toy_world, [row]),
        Task.from_prompts(toy_world, pd.DataFrame([row])),
    ):
        assert task.prompts == (expected,)


def test_a_row_of_mib_without_its_counterfactual_is_refused(toy_world):
    for name, value, message in (
        ("s2_io_flip_counterfactual", None, "has no prompt"),
        ("s2_io_flip_counterfactual", "left out", "none is MIB's for circuits"),
    ):
        row = {**MIB["ioi"], name: value}
        if value is not None:
            del row[name]
        with pytest.raises(circuits.InputError, match=message):
            Task.from_prompts(toy_world, [row])


TABLE = pd.DataFrame([FIELDS])
SAME_IN_MEMORY = {
    "pair": PAIR,
    "pairs": [PAIR],
    "generator": (pair for pair in [PAIR]),
    "dict": FIELDS,
    "dicts": [FIELDS],
    "columns": {name: [value] for name, value in FIELDS.items()},
    "tuple": tuple(FIELDS.values()),
    "tuples": [tuple(FIELDS.values())],
    "table": TABLE,
    "row": TABLE.iloc[0],
}


@pytest.mark.parametrize("kind", SAME_IN_MEMORY)
def test_pairs_in_memory_come_in_what_users_have_them_in(kind, toy_world):
    assert Task.from_prompts(toy_world, SAME_IN_MEMORY[kind]).prompts == (PAIR,)


@pytest.mark.parametrize(
    "pairs",
    ["So Mary", ["So Mary", "So John"], 5, None, [5], [("So Mary", 5)], [{"corrupted": "So John"}]],
)
def test_what_are_no_pairs_is_refused(pairs, toy_world):
    with pytest.raises(circuits.InputError):
        Task.from_prompts(toy_world, pairs)


@pytest.mark.parametrize(
    "answer",
    [9, np.int64(9), torch.tensor(9), 9.0, [9], (9,), {9}, np.array([9]), torch.tensor([9])],
)
def test_an_answer_may_be_a_token_id(answer, toy_world):
    task = Task.from_prompts(toy_world, [("So Mary", "So John", answer, {10, 11})])
    assert task.answers.tolist() == [[9]] and task.wrong_answers.tolist() == [[10, 11]]


@pytest.mark.parametrize("answer", [-1, 673, 1.5, True, [], [None], {}])
def test_what_is_no_answer_is_refused(answer, toy_world):
    with pytest.raises(circuits.InputError):
        Task.from_prompts(toy_world, [("So Mary", "So John", answer)])


def test_a_missing_cell_is_no_answer(toy_world):
    table = pd.DataFrame({**FIELDS, "answer": [None], "wrong_answer": [np.nan]})
    assert Task.from_prompts(toy_world, table).answers is None


IDS = [[5, 6, 7], [5, 8, 7]]
SAME_IDS = {
    "lists": IDS,
    "tuples": tuple(map(tuple, IDS)),
    "array": np.array(IDS),
    "small": np.array(IDS, dtype=np.uint16),
    "reversed": np.array(IDS[::-1])[::-1],
    "rows": [np.array(row) for row in IDS],
    "tensors": [torch.tensor(row) for row in IDS],
    "table": pd.DataFrame(IDS),
    "encoding": {"input_ids": IDS, "attention_mask": [[1, 1, 1]] * 2},
}


@pytest.mark.parametrize("kind", SAME_IDS)
def test_token_ids_may_be_lists_arrays_or_a_tokenizers_output(kind):
    task = Task.from_tokens(SAME_IDS[kind], SAME_IDS[kind])
    assert task.clean.tolist() == IDS and task.clean.dtype == torch.int64


def test_all_that_goes_with_token_ids_may_be_lists_or_arrays():
    task = Task.from_tokens(
        IDS,
        IDS,
        [9, [3, 4]],
        [{10, 11}, {12}],
        lengths=np.array([2, 3]),
        answer_positions=[[False, True, False], [True, False, True]],
        positions={"A": [[True, False, False]] * 2},
    )
    assert task.answers.tolist() == [[9, -1], [3, 4]]
    assert task.wrong_answers.tolist() == [[10, 11], [12, -1]]
    assert task.lengths.tolist() == [2, 3] and int(task.scored.sum()) == 3
    assert task.positions["A"].dtype == torch.bool


@pytest.mark.parametrize("ids", [None, "So Mary", ["a"], [[1, 2], [3]], [[1.0]], [1, 2], [[-1]]])
def test_what_are_no_token_ids_is_refused(ids):
    with pytest.raises(circuits.InputError):
        Task.from_tokens(ids, ids)


def test_a_task_is_indexed_by_numbers_of_any_library(toy_world):
    task = circuits.load_task("ioi", toy_world, n=4)
    for index in (2, -2, np.int64(2), torch.tensor(2), [2], np.array([False, False, True, False])):
        assert torch.equal(task[index].clean, task.clean[2:3])
    for index in (4, -5, 1.5, "a", None, [4], [True], [[0]]):
        with pytest.raises(circuits.InputError):
            task[index]
    assert [len(prompt) for prompt in task] == [1, 1, 1, 1]

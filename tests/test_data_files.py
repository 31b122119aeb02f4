"""Prompts in files and tables, token ids in lists and arrays: read as meant, or refused by line."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

import circuits
from circuits import PromptPair, Task
from circuits.tasks.pairs import pair_of

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
    "old-mac.csv": (HEADER + ROW).replace("\n", "\r"),
    "old-mac.jsonl": LINE + "\r" * 2,
    "blank-first.csv": "\n" + (HEADER + ROW).replace(",", ";"),
    "spaces-first.csv": "   \n" + (HEADER + ROW).replace(",", ";"),
    "renumbered.csv": "Unnamed: 0.1,index,level_0," + HEADER + "0,0,0," + ROW,
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
    "name-twice.jsonl": (LINE[:-1] + ', "answer": " a"}', "the name 'answer' is there twice"),
    "name-twice.json": (f'[{LINE[:-1]}, "answer": " a"}}]', "the name 'answer' is there twice"),
    "id.jsonl": ('{"clean": "So Mary", "answer": 9}', "token ids go into answer_idx"),
    "ids.csv": ('clean,answer\nSo Mary,"[9, 10]"\n', "token ids go into answer_idx"),
    "unnamed.csv": ("clean,corrupted,\nSo Mary,So John,x\n", "unknown field ''"),
    "uncorrupted.csv": ("clean,corrupted\nSo Mary,So John\nSo Anna,\n", "line 3: prompt 'So Anna"),
    "wide.csv": ("x" * 140_000 + "\n", "line 1: not a table"),
    "half.jsonl": ('{"clean": "So \\ud83d"}', r"holds '\ud83d', half of a character"),
    "column.tsv": ("prompt\tcorrupted\nSo Mary\tSo John\n", "unknown field 'prompt'"),
    "id-column.csv": ("id,clean\n3,So Mary\n", "If it is none, remove it"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line_that_says_where(name, tmp_path, toy_world):
    content, message = DAMAGED[name]
    with pytest.raises(circuits.InputError) as caught:
        Task.from_file(written(tmp_path, name, content), toy_world)
    text = str(caught.value).replace(str(tmp_path), "")
    assert message in text and "\n" not in text and len(text) <= 500
    assert name in text


class PathOfBytes:
    """A path as `os.scandir` gives one, asked for a folder in bytes."""

    def __fspath__(self):
        return b"pairs.csv"


def test_a_path_in_bytes_is_refused(toy_world):
    with pytest.raises(circuits.InputError, match=r"path=b'pairs.csv': give a text"):
        Task.from_file(PathOfBytes(), toy_world)


def test_a_path_that_is_none_is_refused(toy_world, tmp_path):
    for path in (None, 5, tmp_path, tmp_path / "none.csv", "a\0b", "\ud83d.csv"):
        with pytest.raises(circuits.InputError, match=r"give a(nother| text file)"):
            Task.from_file(path, toy_world)


def test_several_answers_and_spans_of_a_table_are_json(tmp_path, toy_world):
    rows = 'clean,corrupted,answer,spans\nSo Mary,So John,"["" is"", "" was""]","{""N"": [3, 7]}"\n'
    task = Task.from_file(written(tmp_path, "several.csv", rows), toy_world)
    assert task.prompts == (PromptPair("So Mary", "So John", (" is", " was"), spans={"N": (3, 7)}),)


def test_answers_and_spans_of_a_table_that_pandas_wrote_are_read(tmp_path, toy_world):
    path = tmp_path / "lists.csv"
    pair = PromptPair("So Mary", "So John", (" is", " was"), spans=SPANS)
    ids = PromptPair("So Mary", "So John", (9, 11))
    for fields, expected in (
        ({"answer": [" is", " was"], "spans": SPANS}, pair),
        ({"answer": (" is", " was"), "spans": {"N": (3, 7)}}, pair),
        ({"answer_idx": [9, 11]}, ids),
        ({"answer_idx": (9, 11)}, ids),
    ):
        pd.DataFrame([PROMPTS | fields]).to_csv(path)
        for form in (path, pd.read_csv(path)):
            assert made(form, toy_world).prompts == (expected,)


LISTS = [
    "[' is' ' was']",
    "[' is',' was']",
    "[' is', nan]",
    "[np.str_(' is')]",
    ' [" is", " was"]',
    "['is",
    "{' is', ' was'}",
    "array([' is'], dtype=object)",
    "tensor([ 9, 10])",
    "[ 9 10]",
    "[]",
    "{}",
    "(9, 10)",
    "(9,)",
    " (9, 10)",
    "{9, 10}",
    "{' is': 1}",
    "range(0, 3)",
    "set()",
    "frozenset({' is'})",
    "dict_keys([' is'])",
    "Index([' is', ' was'], dtype='str')",
    "RangeIndex(start=0, stop=3, step=1)",
    "0     is\n1    was\ndtype: object",
    "<map object at 0x7f5c>",
    "b' is'",
]


@pytest.mark.parametrize("text", LISTS)
def test_a_text_of_a_table_that_may_be_a_list_is_not_scored_as_a_text(text, tmp_path, toy_world):
    for column in ("answer", "wrong_answer"):
        table = pd.DataFrame([PROMPTS | {"answer": " is"} | {column: text}])
        table.to_csv(tmp_path / "lists.csv")
        for form in (tmp_path / "lists.csv", table):
            with pytest.raises(circuits.InputError, match=f"{column}.* as a JSON list"):
                made(form, toy_world)
        # As the remedy has it
        row = pd.Series(PROMPTS | {column: json.dumps([text])})
        assert getattr(pair_of(row), column) == (text,)


def test_a_text_that_is_a_list_of_texts_is_not_scored_as_a_text_wherever_it_comes_from():
    for text in ("[' is', ' was']", '[" is"]', "(' is', ' was')", "[' is' ' was']"):
        for give in (PromptPair, lambda *pair: pair_of(pair)):
            with pytest.raises(
                circuits.InputError, match="a text that holds a list; give the list"
            ):
                give("So Mary", "So John", text)
            assert give("So Mary", "So John", [text]).answers == (text,)
    for text in ("b' is'", "frozenset({' is'})", "Index([' is'], dtype='str')"):
        with pytest.raises(circuits.InputError, match="a text that holds a list; give the list"):
            PromptPair("So Mary", answer=text)
    for text in ("[", "['", "[0]", "()", "(x)", '("x")', "{", "[x]", "f(x)", "(9, 10)"):
        assert PromptPair("So Mary", answer=text).answers == (text,)


def test_brackets_alone_are_text_in_a_table():
    for text in ("[", "[0", "(", "()", '("x")', "[x]", "{", " [0]", "f(0)", "(a, b)", "range(n)"):
        assert pair_of(pd.Series(PROMPTS | {"answer": text})).answers == (text,)


def test_numbers_among_the_answers_of_a_table_are_refused_whatever_they_are_in(toy_world):
    ones = (9, np.array(9), torch.tensor(9))
    for answer in (*ones, [9, 10], np.array([9, 10]), torch.tensor([9, 10]), (9,), [" is", 9]):
        table = pd.DataFrame({"clean": ["So Mary"], "answer": [answer]})
        with pytest.raises(circuits.InputError, match="token ids go into answer_idx"):
            Task.from_prompts(toy_world, table)
    for answer in ones:
        table = pd.DataFrame({"clean": ["So Mary"], "answer_idx": [answer]})
        assert Task.from_prompts(toy_world, table).answers.tolist() == [[9]]


def in_every_form(row, folder):
    """A row as a file of each kind, and as what holds it in memory."""
    cells = {
        name: json.dumps(cell) if isinstance(cell, list | dict) else cell
        for name, cell in row.items()
    }
    table = written(folder, "row.csv", pd.DataFrame([cells]).to_csv())
    forms = {
        "csv": table,
        "jsonl": written(folder, "row.jsonl", json.dumps(row)),
        "dict": row,
        "columns": {name: [cell] for name, cell in row.items()},
        "frame": pd.DataFrame([row]),
        "read by pandas": pd.read_csv(table),
        "row": pd.read_csv(table).iloc[0],
        "named tuple": next(pd.read_csv(table, index_col=0).iloc[:, ::-1].itertuples()),
    }
    if "wrong_answer_idx" not in row:
        forms["series"] = pd.Series(row)
    return forms


def made(form, model, **settings):
    make = Task.from_file if hasattr(form, "suffix") else Task.from_prompts
    rows = [form] if isinstance(form, tuple) else form
    return make(*((rows, model) if make is Task.from_file else (model, rows)), **settings)


PROMPTS = {"clean": "So Mary", "corrupted": "So John"}
SPANS = {"N": [3, 7]}
ALL_USED = {
    "ids and spans": (
        PROMPTS | {"answer_idx": 9, "wrong_answer_idx": 10, "spans": SPANS},
        PromptPair("So Mary", "So John", 9, 10, {"N": (3, 7)}),
    ),
    "an id and a wrong text": (
        PROMPTS | {"answer_idx": [9, 11], "wrong_answer": " was"},
        PromptPair("So Mary", "So John", (9, 11), " was"),
    ),
    "a text and a wrong id": (
        PROMPTS | {"answer": [" is", " a"], "wrong_answer_idx": 10},
        PromptPair("So Mary", "So John", (" is", " a"), 10),
    ),
    "an id without a corrupted prompt": (
        {"clean": "So Mary", "answer_idx": 9, "spans": SPANS},
        PromptPair("So Mary", None, 9, spans={"N": (3, 7)}),
    ),
    "EAP-IG's ids and spans": (
        PROMPTS | {"correct_idx": 9, "incorrect_idx": 10, "spans": SPANS, "corrupted_spans": SPANS},
        PromptPair("So Mary", "So John", 9, 10, {"N": (3, 7)}, {"N": (3, 7)}),
    ),
}


@pytest.mark.parametrize("name", ALL_USED)
def test_every_field_of_a_row_is_used_in_whatever_form_the_row_comes(name, tmp_path, toy_world):
    row, pair = ALL_USED[name]
    for form in in_every_form(row, tmp_path).values():
        task = made(form, toy_world)
        assert task.prompts == (pair,) and list(task.positions) == list(pair.spans)


CONTRADICTIONS = {
    "answers": ({"answer": " is", "answer_idx": 9}, "'answer' and 'answer_idx' both give"),
    "wrong answers": (
        {"answer_idx": 9, "wrong_answer": " was", "wrong_answer_idx": 10},
        "'wrong_answer' and 'wrong_answer_idx' both give",
    ),
    "EAP-IG's": (
        {"answer": " is", "correct_idx": 9, "incorrect_idx": 10},
        "'correct_idx' both give",
    ),
    "two of EAP-IG's": (
        {"correct_idx": 9, "incorrect_idx": 10, "clean_idx": 9, "corrupted_idx": 10},
        "'correct_idx' and 'clean_idx' both give",
    ),
    "years": ({"answer": " is", "correct_idx": 52}, "EAP-IG writes years"),
    "misspelt ids": ({"answer_idx": 9, "wrong_answr_idx": 10}, "did you mean 'wrong_answer_idx'"),
    "misspelt spans": ({"answer_idx": 9, "spnas": SPANS}, "did you mean 'spans'"),
    "unknown": ({"correct_idx": 9, "incorrect_idx": 10, "weight": 3}, "unknown field 'weight'"),
    "of EAP-IG alone": ({"answer": " is", "country": "x"}, "unknown field 'country'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_a_row_says_twice_or_in_vain_is_refused(name, tmp_path, toy_world):
    fields, message = CONTRADICTIONS[name]
    for form in in_every_form(PROMPTS | fields, tmp_path).values():
        with pytest.raises(circuits.InputError, match=message):
            made(form, toy_world)


def test_a_table_says_the_same_read_by_pandas_and_from_its_file(tmp_path, toy_world):
    rows = (
        ',clean,corrupted,answer,spans\n0,So Mary,,"["" is"", "" was""]","{""N"": [3, 7]}"\n'
        '1,So John,, is a,"{""N"": [3, 7]}"\n'
    )
    path = written(tmp_path, "same.csv", rows.replace(" is a", " is"))
    from_file = Task.from_file(path, toy_world, name="same")
    frame = pd.read_csv(path)
    tables = [frame, frame.convert_dtypes(), frame.set_index("answer")]
    tables += [[row for _, row in frame.iterrows()]]
    for table in tables:
        task = Task.from_prompts(toy_world, table, name="same")
        assert task.prompts == from_file.prompts and task.digest() == from_file.digest()
    assert from_file.prompts[0] == PromptPair("So Mary", None, (" is", " was"), spans={"N": (3, 7)})
    # Whether 9 is a text or a token id, a frame does not say.
    numbers = written(tmp_path, "numbers.csv", "clean,answer\nSo Mary,9\n")
    with pytest.raises(circuits.InputError, match="token ids go into answer_idx"):
        Task.from_prompts(toy_world, pd.read_csv(numbers))


def test_a_column_that_is_there_twice_is_refused(toy_world):
    table = pd.DataFrame([["So Mary", "So John", " is", " was"]])
    table.columns = ["clean", "corrupted", "answer", "answer"]
    indexed = table.iloc[:, :3].set_index("answer", drop=False)
    for given in (table, table.iloc[0], indexed):
        with pytest.raises(circuits.InputError, match="'answer' is there twice"):
            Task.from_prompts(toy_world, given)


COLUMNS = {
    "lengths": (
        {"clean": ["So Mary"] * 2, "corrupted": ["So John"]},
        "clean has 2, corrupted has 1",
    ),
    "one text": ({"clean": ["So Mary"] * 3, "answer": " is"}, r"for one, give \[' is'\]"),
    "one span": ({"clean": ["So Mary"], "spans": {"N": (3, 7)}}, "spans=.* must be a list"),
    "other labels": (
        {"clean": pd.Series(["So Mary", "So Anna"]), "corrupted": pd.Series(["a", "b"])[::-1]},
        "clean and corrupted have different labels",
    ),
    "a set": ({"clean": {"So Mary", "So John"}, "corrupted": {"a", "b"}}, "no order"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_do_not_belong_together_are_refused(name, toy_world):
    given, message = COLUMNS[name]
    with pytest.raises(circuits.InputError, match=message):
        Task.from_prompts(toy_world, given)


def test_columns_may_be_arrays_or_missing(toy_world):
    columns = {"clean": np.array(["So Mary"]), "corrupted": None, "answer_idx": np.array([[9, 11]])}
    expected = (PromptPair("So Mary", None, (9, 11)),)
    assert Task.from_prompts(toy_world, columns).prompts == expected


MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT]


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_what_is_missing_is_missing_in_whatever_a_pair_is_in(missing, toy_world):
    names = ["clean", "corrupted", "answer"]
    cells = ["So Mary", missing, missing]
    row = dict(zip(names, cells, strict=True))
    table = pd.DataFrame([row])
    for given in (tuple(cells), row, table, table.iloc[0], {name: [row[name]] for name in row}):
        assert Task.from_prompts(toy_world, given).prompts == (PromptPair("So Mary"),)


@pytest.mark.parametrize(
    "spans",
    [
        [1],
        "N",
        5,
        {"N": 3},
        {"N": "ab"},
        {"N": (3, 5, 7)},
        {"N": (3.5, 7)},
        {"N": (True, 7)},
        {3: (3, 7)},
    ],
    ids=repr,
)
def test_what_are_no_spans_is_refused(spans):
    for name in ("spans", "corrupted_spans"):
        with pytest.raises(circuits.InputError, match=rf"{name}.*start, end\b.* in characters"):
            PromptPair("So Mary", "So John", **{name: spans})


def test_spans_may_be_lists_or_arrays_of_numbers_of_any_library():
    for bounds in ([3, 7], np.array([3, 7]), torch.tensor([3, 7]), (np.int64(3), 7.0)):
        assert PromptPair("So Mary", spans={"N": bounds}).spans == {"N": (3, 7)}


def test_rows_that_do_not_fit_are_left_out_on_request_whatever_is_wrong(tmp_path, toy_world):
    row = MIB["mcqa"]
    unfit = [
        {**row, "symbol_counterfactual": None},
        {**row, "answerKey": 7},
        {**row, "answerKey": -1},
        {**row, "answerKey": 0.5},
        {name: value for name, value in row.items() if name != "symbol_counterfactual"}
        | {"abc_counterfactual": {"prompt": "So Mary"}},
        PROMPTS | {"answer_idx": 673, "wrong_answer_idx": 10},
        PROMPTS | {"answer_idx": 9},
        PROMPTS | {"spans": SPANS, "answer_idx": 9, "wrong_answer_idx": 10},
        {"clean": "So Mary", "answer_idx": 9, "wrong_answer_idx": 10},
        {"clean": None, "corrupted": "So John", "answer_idx": 9, "wrong_answer_idx": 10},
    ]
    path = written(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, [*unfit, row, row])))
    for form in (path, [*unfit, row, row]):
        with pytest.warns(UserWarning, match="10 of 12 prompt pairs do not fit"):
            task = made(form, toy_world, skip_misfits=True)
        assert len(task) == 2 and sum(task.left_out.values()) == 10
    with pytest.raises(circuits.InputError, match="skip_misfits='no' must be True or False"):
        Task.from_file(path, toy_world, skip_misfits="no")


def test_a_pair_whose_tokens_have_no_counterparts_can_be_left_out(toy_world):
    spans = {"N": (3, 7)}
    unfit = PromptPair("So Mary", "Mary John", spans=spans, corrupted_spans={"N": (0, 4)})
    pairs = [unfit, PromptPair("So Mary", "So John", spans=spans)]
    with pytest.raises(circuits.InputError, match="have no counterpart"):
        Task.from_prompts(toy_world, pairs, prepend_bos=False)
    with pytest.warns(UserWarning, match="tokens without a counterpart"):
        task = Task.from_prompts(toy_world, pairs, prepend_bos=False, skip_misfits=True)
    assert task.prompts == tuple(pairs[1:])


def test_a_task_is_named_after_its_file_whatever_the_file_is_called(tmp_path, toy_world):
    for file_name, name in (("my prompts (1).jsonl", "my-prompts-1-"), ("..a.b.jsonl", "a.b")):
        assert Task.from_file(written(tmp_path, file_name, LINE), toy_world).name == name


def test_wrong_answers_without_answers_are_no_reason_for_kl(toy_world):
    for make in (
        lambda **settings: Task.from_prompts(
            toy_world, ("So Mary", None, None, " was"), **settings
        ),
        lambda **settings: Task.from_tokens(IDS, IDS, wrong_answers=[9, 10], **settings),
    ):
        with pytest.raises(circuits.InputError, match="wrong answers but no answers"):
            make()
        assert make(metric="kl").wrong_answers is not None


# As in the data folders of hannamw/EAP-IG and hannamw/eap-ig-faithfulness.
EAP_IG = {
    "ioi": ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n7,So Mary,So John,x,9,10\n",
    "fact": "clean,capital,country,country_idx,corrupted,corrupted_capital,corrupted_country,"
    "corrupted_country_idx\nSo Mary,c,a,9,So John,d,b,10\n",
    "gender": "clean,corrupted,clean_answer_idx,corrupted_answer_idx,label\n"
    "So Mary,So John,9,10,x\n",
    "hypernymy": "clean,h1,hypernym,answers,answers_idx,corrupted,c1,corrupted_hypernym,"
    "corrupted_answers,corrupted_answers_idx,clean2,corrupted2,prob_diff\n"
    "So Mary,a,b,\"['gem']\",[9],So John,c,d,['x'],[10],e,f,0.1\n",
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
        "dataset": "x",
        "dataset_specific_id": "x",
        "arc_id": "x",
        "idx": 3,
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
        "idx": 3,
        "template": "x",
        "num_digit": 2,
        "operator": "+",
        "operand1": 1,
        "operand2": 2,
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


@pytest.mark.parametrize("kind", MIB)
def test_a_row_of_mib_may_have_spans_and_nothing_else_that_would_be_lost(kind, tmp_path, toy_world):
    row = MIB[kind]
    task = Task.from_prompts(toy_world, row | {"spans": {"N": [0, 4]}})
    assert task.prompts[0].spans == {"N": (0, 4)} and list(task.positions) == ["N"]
    for name, message in (
        ("spnas", "did you mean 'spans'"),
        ("answer", "'answer' and '.*' both give the answer"),
        ("wrong_answer_idx", "'wrong_answer_idx' and '.*' both give the wrong_answer"),
        ("clean", "'clean' and 'prompt' both give"),
    ):
        slip = row | {name: 9 if name == "wrong_answer_idx" else " is"}
        for form in (slip, written(tmp_path, "slip.jsonl", json.dumps(slip))):
            with pytest.raises(circuits.InputError, match=message):
                made(form, toy_world)


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
    [
        np.array(3),
        torch.tensor(3),
        "So Mary",
        ["So Mary", "So John"],
        5,
        None,
        [5],
        [("So Mary", 5)],
        [{"corrupted": "So John"}],
    ],
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


@pytest.mark.parametrize(
    "answer",
    [-1, 673, 10**400, 1.5, True, [], [None], [" is", None], [True], {}, b"x", np.array(" is")],
    ids=lambda answer: repr(answer)[:20],
)
def test_what_is_no_answer_is_refused(answer, toy_world):
    with pytest.raises(circuits.InputError, match="give ") as told:
        Task.from_prompts(toy_world, [("So Mary", "So John", answer)])
    assert "[{}]" not in str(told.value) and len(str(told.value)) < 300


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
    for index in (4, -5, 1.5, 1j, [1j], "a", None, [4], [True], [[0]]):
        with pytest.raises(circuits.InputError):
            task[index]
    assert [len(prompt) for prompt in task] == [1, 1, 1, 1]


def test_pairs_may_be_the_rows_of_an_array(toy_world):
    row = ("So Mary", "So John", " is", " was")
    names = ["wrong_answer", "answer", "corrupted", "clean"]
    records = pd.DataFrame([row[::-1]], columns=names).to_records()
    structured = np.array([row[::-1]], dtype=[(name, "U9") for name in names])
    for given in (np.array([row]), np.array([row], dtype=object), records, structured, records[0]):
        assert Task.from_prompts(toy_world, given).prompts == (PAIR,)
    masked = np.ma.array(structured, mask=[(True, False, False, False)])
    expected = PromptPair("So Mary", "So John", " is")
    assert Task.from_prompts(toy_world, masked).prompts == (expected,)

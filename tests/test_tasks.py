"""Tasks: the same text for every model, tokens that fit it, and refusals that say what to do."""

import copy
import dataclasses
import itertools
import json
import random
import re
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

import numpy
import pytest
import torch
from architectures import random_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import circuits
from circuits.attribution.explained import words_of
from circuits.models import Model, build_model
from circuits.models.loading.saved import parts_of
from circuits.tasks import registry
from circuits.tasks.families import induction_prose, make_family, task_forms
from circuits.tasks.families.greater_than import NOUNS
from circuits.tasks.families.ioi import NAMES, OBJECTS, PLACES
from circuits.tasks.families.two_hop import CAPITALS, STATES
from circuits.tasks.families.words import COMMON, MEN, WOMEN
from circuits.tasks.family import REGISTRY, TaskFamily
from circuits.tasks.metric_names import SHIPPED_METRICS
from circuits.tasks.metrics import METRICS
from circuits.tasks.model_fit import check_task
from circuits.tasks.prompts import SPLITS, split_of
from circuits.tasks.task import PromptPair, Task
from circuits.tasks.tokenization import PromptTokenizer, prompt_tokens

TASKS = ("docstring", "gendered_pronoun", "greater_than", "induction", "ioi", "two_hop")
COMMON_NAMES, RARE_NAMES = NAMES[:75], NAMES[75:]


@pytest.fixture(scope="module")
def toy() -> Model:
    return circuits.load_model("toy-world", device="cpu")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model with a GPT-2-like tokenizer, to which rare names are several tokens, and 1776
    is one.
    """
    folder = tmp_path_factory.mktemp("bpe")
    bpe_tokenizer().save_pretrained(folder)
    return with_tokenizer(PreTrainedTokenizerFast.from_pretrained(folder))


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    lines = [
        pair.clean
        for pair in make_family("ioi").pairs(500, 0, "train")
        if not set(RARE_NAMES) & set(re.findall(r"\w+", pair.clean))
    ]
    lines += [f" {name} and {name} to {name}" for name in COMMON_NAMES for _ in range(20)]
    lines += [
        f"{number:02d} {number:02d} from 17 to 1776" for number in range(100) for _ in range(20)
    ]
    tokenizer.train_from_iterator(lines, trainer)
    special = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def with_tokenizer(tokenizer: PreTrainedTokenizerFast, **changes: object) -> Model:
    source = random_model("gpt2", d_vocab=len(tokenizer), n_ctx=64)
    config = {
        name: getattr(source.cfg, name)
        for name in (
            "n_layers",
            "d_model",
            "n_heads",
            "d_head",
            "d_mlp",
            "n_ctx",
            "d_vocab",
            "act_fn",
        )
    }
    return build_model(
        {**config, "normalization_type": "LN", **changes},
        parts_of(source)[1],
        tokenizer,
        device="cpu",
    )


def words_under(model: Model, task: Task, span: str) -> list[str]:
    """The text of the tokens that each prompt's span marks."""
    rows = zip(task.clean, task.positions[span], strict=True)
    return [model.tokenizer.decode(tokens[mask]).strip() for tokens, mask in rows]


# Text


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_the_prompts_asked_for_all_different_and_aligned(name: str, toy: Model) -> None:
    task = circuits.load_task(name, toy, n=100, seed=3)
    assert len(task) == 100 == len({pair.clean for pair in task.prompts or ()})
    assert task.clean.shape == task.corrupted.shape
    assert (task.clean != task.corrupted)[task.mask].any()
    assert torch.equal(task.clean[~task.mask], task.corrupted[~task.mask])
    assert task.row_answers is not None and len(task.row_answers) == 100
    assert torch.equal(task.scored.nonzero()[:, 1], task.lengths - 1)
    assert torch.equal(task.scored, task.positions["END"])


def test_the_shipped_tasks_are_those_of_the_design() -> None:
    assert set(TASKS) <= set(circuits.task_names())


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_of_one_split_is_in_the_other_whatever_the_seeds(name: str) -> None:
    family = make_family(name)
    texts = {
        split: {
            text
            for seed in (0, 1, 2)
            for pair in family.pairs(100, seed, split)
            for text in (pair.clean, pair.corrupted)
        }
        for split in ("train", "test")
    }
    assert not texts["train"] & texts["test"]
    assert all(split_of(text) == split for split, some in texts.items() for text in some)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", TASKS)
def test_words_are_shared_between_the_splits(name: str) -> None:
    family = make_family(name)
    train, test = (
        {
            word
            for pair in family.pairs(200, 0, split)
            for word in re.findall(r"\d\d|[a-z]+", pair.clean)
        }
        for split in ("train", "test")
    )
    assert len(train & test) > 0.5 * len(test)


def test_a_longer_task_begins_with_the_shorter_one_and_another_seed_is_another_task(
    toy: Model,
) -> None:
    short, long, other = (
        circuits.load_task("ioi", toy, n=n, seed=seed) for n, seed in ((10, 0), (30, 0), (10, 1))
    )
    assert long.prompts is not None and long.prompts[:10] == short.prompts
    assert not set(short.prompts or ()) & set(other.prompts or ())


def test_loading_a_task_leaves_global_randomness_as_it_was(toy: Model) -> None:
    torch_before, numpy_before = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    circuits.load_task("induction", toy, n=5)
    # Python's own generator is not looked at: the shape checks of these tests draw from it.
    assert (
        torch.equal(torch.get_rng_state(), torch_before)
        and numpy.random.get_state()[1].tolist() == numpy_before
    )


# What each task is


def test_ioi_repeats_the_subject_and_the_answer_is_the_other_name() -> None:
    orders = set()
    for pair in make_family("ioi").pairs(200, 0, "test"):
        names = [word for word in re.findall(r"\w+", pair.clean) if word in NAMES]
        assert len(names) == 3 and names[2] in names[:2] and names[0] != names[1]
        answer = next(name for name in names[:2] if name != names[2])
        assert (pair.answer, pair.wrong_answer) == (f" {answer}", f" {names[2]}")
        orders.add(names.index(answer))
    assert orders == {0, 1}  # ABBA and BABA


def test_ioi_abc_corruption_replaces_all_names_by_three_others() -> None:
    for pair in make_family("ioi").pairs(100, 0, "test"):
        clean, corrupted = (
            [word for word in re.findall(r"\w+", text) if word in NAMES]
            for text in (pair.clean, pair.corrupted)
        )
        assert len(set(corrupted)) == 3 and not set(corrupted) & set(clean)
        assert re.sub("|".join(clean), "_", pair.clean) == re.sub(
            "|".join(corrupted), "_", pair.corrupted
        )


def test_ioi_swapped_corruption_changes_the_last_name_only_and_flips_the_answer() -> None:
    for pair in make_family("ioi", corruption="swapped").pairs(100, 0, "test"):
        start, end = pair.spans["S2"]
        assert pair.corrupted == pair.clean[:start] + str(pair.answer).strip() + pair.clean[end:]


@pytest.mark.parametrize("which", ["toy", "bpe"])
def test_ioi_spans_are_where_their_names_say(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    task = circuits.load_task("ioi", model, n=40)
    assert task.prompts is not None
    answers = [str(pair.answer).strip() for pair in task.prompts]
    subjects = [str(pair.wrong_answer).strip() for pair in task.prompts]
    assert words_under(model, task, "IO") == answers
    assert words_under(model, task, "S1") == subjects == words_under(model, task, "S2")
    where = {name: mask.int().argmax(1) for name, mask in task.positions.items()}
    assert torch.equal(where["S1+1"], where["S1"] + 1)
    assert (where["S1"] < where["S2"]).all() and (where["IO"] < where["S2"]).all()
    assert torch.equal(where["END"], task.lengths - 1)
    assert all((mask.sum(1) == 1).all() for mask in task.positions.values())


def test_spans_come_in_one_order_whatever_the_first_prompt(toy: Model) -> None:
    """Graphs that are split by position are the same for both splits and for every seed."""
    for name, order in {
        "ioi": ["S2", "IO", "S1", "S1+1", "END"],
        "docstring": ["END", "A_def", "B_def", "C_def", "A_doc", "B_doc"],
    }.items():
        for seed in range(6):
            pairs = make_family(name).pairs(1, seed, "train" if seed % 2 else "test")
            assert list(pairs[0].spans) == order


def test_a_span_may_have_any_name(toy: Model) -> None:
    pairs = [
        circuits.PromptPair("Mary went", "John went", " to", spans={"answers": (0, 4)}),
        circuits.PromptPair("Then Mary went", "Then John went", " to", spans={"answers": (5, 9)}),
    ]
    task = Task.from_prompts(toy, pairs)
    assert words_under(toy, task, "answers") == ["Mary", "Mary"]


# Of the text that toy-world was trained and tested on
DIGESTS = {
    "docstring": "d0b7aaec4b038c98",
    "gendered_pronoun": "6cc35d9be33e337e",
    "greater_than": "0c760b376309a211",
    "induction": "36bd4d5ee5dfe4c2",
    "ioi": "81827e82984658ec",
    "two_hop": "22dcf80f95932549",
}


@pytest.mark.usefixtures("unchecked_types")
def test_the_text_of_a_task_and_a_seed_stays_what_it_was() -> None:
    for name, expected in DIGESTS.items():
        digest = blake2b(digest_size=8)
        for split in SPLITS:
            for pair in make_family(name).pairs(64, 0, split):
                parts = (pair.clean, pair.corrupted, pair.answer, pair.wrong_answer)
                digest.update(repr(parts).encode())
        assert digest.hexdigest() == expected, name


def test_a_model_that_reads_single_digits_completes_one_of_a_year() -> None:
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    pairs = make_family("greater_than", digits=1).pairs(40, 0, "test")
    words = {word for pair in pairs for word in re.findall(r"[A-Za-z]+|\d", pair.clean)}
    vocabulary = {word: i for i, word in enumerate(["<unk>", *sorted(words | set("0123456789"))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = digits
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    model = with_tokenizer(fast, default_prepend_bos=False)
    with pytest.raises(circuits.InputError, match="only 0 of 40 prompts fit"):
        circuits.load_task("greater_than", model, n=40)
    task = circuits.load_task("greater_than", model, n=40, digits=1)
    assert len(task) == 40 and torch.equal(task.scored, task.positions["END"])
    for pair in task.prompts or ():
        decade, year, again = re.fullmatch(r"\D+(\d{3})(\d)\D+(\d{3})", pair.clean).groups()
        assert decade == again and pair.corrupted == pair.clean.replace(decade + year, decade + "1")
        assert set(pair.answers) == {str(later) for later in range(int(year) + 1, 10)}
        assert set(pair.wrong_answers) == {str(other) for other in range(int(year) + 1)}


def test_greater_than_answers_are_all_later_years_and_the_corrupted_year_is_01(toy: Model) -> None:
    task = circuits.load_task("greater_than", toy, n=50)
    assert task.metric == "probability_difference" and task.prompts is not None
    for pair in task.prompts:
        century, year, end = re.findall(r"\d\d", pair.clean)
        assert century == end
        assert set(pair.answers) == {f"{later:02d}" for later in range(int(year) + 1, 100)}
        assert set(pair.wrong_answers) == {f"{other:02d}" for other in range(int(year) + 1)}
        assert pair.corrupted == pair.clean.replace(f"{century}{year} ", f"{century}01 ")
    assert (
        task.answers is not None
        and (
            (task.answers >= 0).sum(1) == torch.tensor([len(pair.answers) for pair in task.prompts])
        ).all()
    )
    assert words_under(toy, task, "YY") == [
        re.findall(r"\d\d", pair.clean)[1] for pair in task.prompts
    ]


def test_induction_repeats_one_word_and_its_corruption_none() -> None:
    for pair in make_family("induction", length=9).pairs(100, 0, "test"):
        *words, last = pair.clean.split()
        assert len(set(words)) == 9 and pair.answer == f" {words[words.index(last) + 1]}"
        assert len(set(pair.corrupted.split())) == 10
        assert (
            sum(a != b for a, b in zip(pair.clean.split(), pair.corrupted.split(), strict=True))
            == 1
        )
        assert [pair.clean[slice(*pair.spans[name])] for name in ("A1", "B")] == [
            last,
            str(pair.answer).strip(),
        ]


def test_induction_may_repeat_several_words_of_ones_own() -> None:
    letters = [f"w{number}" for number in range(20)]
    for pair in make_family("induction", length=9, repeated=3, words=letters).pairs(50, 0, "test"):
        clean, corrupted = pair.clean.split(), str(pair.corrupted).split()
        words, again = clean[:9], clean[9:]
        start = words.index(again[0])
        assert start > 0 and words[start : start + 3] == again and set(clean) < set(letters)
        assert pair.answer == f" {words[start + 3]}" and start + 4 < 9
        changed = [a != b for a, b in zip(clean, corrupted, strict=True)]
        assert [place for place, differs in enumerate(changed) if differs] == [
            *range(start, start + 3)
        ]
        assert len(set(corrupted)) == 12
        assert set(pair.wrong_answers) == {
            f" {word}" for word in {*words} - {*words[start : start + 4]}
        }
        assert pair.clean[slice(*pair.spans["A1"])] == " ".join(again)


def test_induction_in_prose_repeats_a_quality_and_its_corruption_none() -> None:
    listed = {*induction_prose.QUALITIES, *induction_prose.THINGS}
    assert len(listed) == len(induction_prose.QUALITIES) + len(induction_prose.THINGS)
    for template in induction_prose.TEMPLATES:
        assert not listed & set(re.findall(r"\w+", template))
    for pair in make_family("induction_prose").pairs(100, 0, "test"):
        quality, thing, other = pair.clean.split()[-1], str(pair.answer), str(pair.wrong_answer)
        assert f"a {quality}{thing}" in pair.clean and pair.clean.count(quality) == 2
        assert f"a {quality}{other}" not in pair.clean and other in pair.clean
        assert str(pair.corrupted).split()[-1] == quality
        assert str(pair.corrupted).count(quality) == 1 and thing in str(pair.corrupted)
        assert pair.clean[slice(*pair.spans["A1"])] == quality
        assert pair.clean[slice(*pair.spans["B"])] == thing.strip()


def test_docstring_answer_is_the_definitions_next_argument_and_not_in_the_corrupted_prompt() -> (
    None
):
    for pair in make_family("docstring").pairs(100, 0, "test"):
        arguments = re.findall(r"\w+", pair.clean.split(")")[0])[3:]  # after def, its name and self
        described = re.findall(r":param (\w+)", pair.clean)
        assert (
            len(arguments) == 6
            and described == arguments[2:4]
            and pair.answer == f" {arguments[4]}"
        )
        assert arguments[4] not in pair.corrupted
        assert not set(re.findall(r":param (\w+)", pair.corrupted)) & set(
            re.findall(r"\w+", pair.corrupted.split(")")[0])
        )
        assert pair.answer not in pair.wrong_answers and len(set(pair.wrong_answers)) == 10
        for letter, word in zip("ABC", arguments[2:5], strict=True):
            assert pair.clean[slice(*pair.spans[f"{letter}_def"])] == word


def test_pronouns_go_with_the_names() -> None:
    for pair in make_family("gendered_pronoun").pairs(100, 0, "test"):
        name, other = (
            {word for word in text.split() if word in NAMES}.pop()
            for text in (pair.clean, pair.corrupted)
        )
        assert pair.answer == (" she" if name in WOMEN else " he")
        assert pair.wrong_answer == (" she" if other in WOMEN else " he") != pair.answer


def test_two_hop_answers_are_the_capitals_of_the_cities_states() -> None:
    capital_of = {city: capital for capital, cities in STATES.values() for city in cities}
    for pair in make_family("two_hop").pairs(200, 0, "test"):
        city, other = (
            {word for word in text.split() if word in capital_of}.pop()
            for text in (pair.clean, pair.corrupted)
        )
        assert (pair.answer, pair.wrong_answer) == (f" {capital_of[city]}", f" {capital_of[other]}")
        assert pair.clean[slice(*pair.spans["CITY"])] == city


def test_two_hop_answers_about_countries_are_their_capitals_or_languages() -> None:
    facts = CAPITALS | {capital: language for language, capital in CAPITALS.items()}
    answers = set()
    for pair in make_family("two_hop", about="countries").pairs(100, 0, "test"):
        cue, other = (
            {word for word in re.findall(r"\w+", text) if word in facts}.pop()
            for text in (pair.clean, pair.corrupted)
        )
        assert (pair.answer, pair.wrong_answer) == (f" {facts[cue]}", f" {facts[other]}")
        assert pair.clean[slice(*pair.spans["CUE"])] == cue
        asked = "capital" if cue in CAPITALS else "language"
        assert asked in pair.clean.split(cue)[0] + pair.clean.split(cue)[1]
        answers.add(pair.answer)
    assert len(answers) > len(CAPITALS)


def test_names_are_no_places_and_no_word_is_listed_twice() -> None:
    places = [
        *STATES,
        *(capital for capital, _ in STATES.values()),
        *(city for _, cities in STATES.values() for city in cities),
    ]
    for words in (NAMES, places, COMMON, NOUNS, PLACES, OBJECTS):
        assert len(words) == len(set(words))
    assert len(NAMES) >= 60 and not set(NAMES) & set(places) and not set(WOMEN) & set(MEN)


# Tokens


@pytest.mark.usefixtures("unchecked_types")
def test_the_embedded_tokenizer_knows_every_word_of_every_task(toy: Model) -> None:
    places = [
        word for state, (capital, cities) in STATES.items() for word in (state, capital, *cities)
    ]
    numbers = [f"{number:02d}" for number in range(100)]
    vocabulary = set(toy.tokenizer.get_vocab())
    assert {
        *NAMES,
        *PLACES,
        *OBJECTS,
        *NOUNS,
        *COMMON,
        *places,
        *numbers,
        "he",
        "she",
    } <= vocabulary
    for name in TASKS:
        for pair in make_family(name).pairs(300, 11, "train"):
            assert (
                toy.tokenizer.unk_token_id
                not in toy.tokenizer(f"{pair.clean} {pair.corrupted}")["input_ids"]
            )


def test_the_embedded_tokenizer_splits_years_and_marks_and_says_where_its_tokens_stand(
    toy: Model,
) -> None:
    text = 'So Mary (isn\'t), from 1732 """door"""'
    encoded = toy.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert (
        pieces
        == ["So", "Mary", "(", "isn't", ")", ",", "from", "17", "32", '"""', "door", '"""']
        == toy.tokenizer.tokenize(text)
    )
    assert (toy.tokenizer.bos_token, toy.tokenizer.pad_token, toy.tokenizer.unk_token) == (
        "<bos>",
        "<pad>",
        "<unk>",
    )


def test_text_is_the_same_for_every_tokenizer_and_prompts_that_do_not_fit_are_dropped(
    toy: Model, bpe: Model
) -> None:
    text = make_family("ioi").pairs(100, 4, "test")
    assert circuits.load_task("ioi", toy, n=100, seed=4).prompts == tuple(text)
    fitting = [
        pair
        for pair in text
        if not set(RARE_NAMES) & set(re.findall(r"\w+", pair.clean + " " + pair.corrupted))
    ]
    assert 50 <= len(fitting) < 100
    kept = circuits.load_task("ioi", bpe, n=100, seed=4).prompts
    # Rare names of equally many pieces leave a pair aligned, and then it fits as long as its two
    # answers are single tokens.
    assert (
        kept is not None
        and set(fitting) <= set(kept) < set(text)
        and list(kept) == [pair for pair in text if pair in set(kept)]
    )
    assert not any(
        str(pair.answer).strip() in RARE_NAMES or str(pair.wrong_answer).strip() in RARE_NAMES
        for pair in kept
    )


def test_words_that_are_single_tokens_of_a_model_make_prompts_that_fit(
    bpe: Model, toy: Model
) -> None:
    dropped = circuits.load_task("ioi", bpe, n=60)
    names = circuits.single_token_words(bpe, NAMES)
    ids = [bpe.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in NAMES]
    assert names == tuple(name for name, each in zip(NAMES, ids, strict=True) if len(each) == 1)
    fitting = circuits.load_task("ioi", bpe, n=60, names=names)
    assert len(dropped) < 60 == len(fitting) and not fitting.left_out
    vocabulary = circuits.single_token_words(toy)
    assert set(NAMES) < set(vocabulary) < set(toy.tokenizer.get_vocab())
    assert all(word.isalpha() for word in vocabulary)
    random_words = circuits.load_task("induction", toy, n=20, words=vocabulary, repeated=4)
    assert len(random_words) == 20
    with pytest.raises(circuits.InputError, match="has no tokenizer"):
        circuits.single_token_words(random_model())


def test_answers_are_the_tokens_that_continue_the_prompt(bpe: Model) -> None:
    task = circuits.load_task("ioi", bpe, n=10)
    assert task.answers is not None and task.prompts is not None
    for tokens, length, answer, pair in zip(
        task.clean, task.lengths, task.answers, task.prompts, strict=True
    ):
        assert (
            bpe.tokenizer.decode([*tokens[1:length].tolist(), int(answer[0])])
            == f"{pair.clean}{pair.answer}"
        )


def test_an_answer_that_would_merge_with_the_prompt_is_still_found(bpe: Model) -> None:
    assert len(bpe.tokenizer.tokenize("from 1776")) < len(bpe.tokenizer.tokenize("from 17")) + 1
    task = Task.from_prompts(bpe, [PromptPair("from 17", "from 16", ("76", "33"), "16")])
    assert task.answers is not None and bpe.tokenizer.convert_ids_to_tokens(
        task.answers[0].tolist()
    ) == ["76", "33"]


def test_too_few_fitting_prompts_is_an_error_that_names_words_and_model(bpe: Model) -> None:
    with pytest.raises(
        circuits.InputError, match=r"two_hop.*only 0 of 5 .*' \w+'.*[Uu]se another model"
    ):
        circuits.load_task("two_hop", bpe, n=5)


@pytest.mark.usefixtures("unchecked_types")
def test_asking_for_more_prompts_than_there_are_says_how_many_there_are(toy: Model) -> None:
    with pytest.raises(
        circuits.InputError,
        match=r"only \d{3} different prompts in this split; ask for n=\d{3} or fewer",
    ):
        circuits.load_task("two_hop", toy, n=10_000)
    for n in (10**6 + 1, 10**30, 10**5000):
        with pytest.raises(circuits.InputError, match=r"at most 1,000,000 prompts|too long"):
            circuits.load_task("ioi", toy, n=n)


def test_drawing_very_many_prompts_gives_a_sign_of_life(
    toy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MANY_PROMPTS", 2)
    assert len(circuits.load_task("ioi", toy, n=2)) == 2
    with pytest.warns(UserWarning, match="drawing 3 prompts .* takes minutes"):
        circuits.load_task("ioi", toy, n=3)


@pytest.mark.parametrize("prepend", [True, False])
def test_bos_goes_before_a_prompt_once_and_only_where_the_model_expects_it(
    prepend: bool, bpe: Model
) -> None:
    model = with_tokenizer(bpe.tokenizer, default_prepend_bos=prepend)
    task = circuits.load_task("ioi", model, n=5)
    assert ((task.clean == model.tokenizer.bos_token_id) & task.mask).sum(1).tolist() == [
        int(prepend)
    ] * len(task)
    assert words_under(model, task, "IO") == [
        str(pair.answer).strip() for pair in task.prompts or ()
    ]


def test_text_that_brings_its_bos_keeps_the_space_after_it(bpe: Model) -> None:
    """To a tokenizer like GPT-2's, a word with a space before it is another token."""
    bos = bpe.tokenizer.bos_token
    for text in (f"{bos} Then Mary", f"{bos}Then Mary"):
        ids = bpe.tokenizer(text, add_special_tokens=False)["input_ids"]
        pair = PromptPair(text, text.replace("Mary", "John"), " and")
        task = Task.from_prompts(bpe, [pair])
        assert task.clean[0].tolist() == ids and ids.count(bpe.tokenizer.bos_token_id) == 1
        assert task.answers is not None
        assert bpe.tokenizer.decode([*ids, int(task.answers)]) == f"{text} and"
    with pytest.raises(circuits.InputError, match=r"white space before its own <\|endoftext\|>"):
        PromptTokenizer.of(bpe).prompt(f"\n{bos}Then Mary")


def test_padding_is_on_the_right_and_masked_whatever_the_tokenizer_prefers(
    bpe: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = circuits.load_task("ioi", bpe, n=10)
    monkeypatch.setattr(bpe.tokenizer, "padding_side", "left")
    left = circuits.load_task("ioi", bpe, n=10)
    assert right.digest() == left.digest()
    assert not right.mask.all() and torch.equal(right.mask.sum(1), right.lengths)
    assert (right.mask.int().diff(dim=1) <= 0).all()
    assert bpe.tokenizer.padding_side == "left"


# The user's own


PAIR = PromptPair(
    "So Mary is a really great friend, isn't",
    "So John is a really great friend, isn't",
    " she",
    " he",
)


def test_prompts_of_different_lengths_make_one_padded_task(toy: Model) -> None:
    other = PromptPair(
        "Well, John is such a nice person, isn't",
        "Well, Mary is such a nice person, isn't",
        (" he",),
        (" she", " Mary"),
    )
    task = Task.from_prompts(toy, [PAIR, other], name="mine")
    assert task.name == "mine" and task.metric == "logit_difference" and len(task) == 2
    assert (
        task.wrong_answers is not None
        and task.wrong_answers[0, 1] == -1
        and task.wrong_answers[1, 1] >= 0
    )
    assert Task.from_prompts(toy, [PromptPair("So Mary", "So John")]).metric == "kl"
    assert (
        Task.from_prompts(toy, [PromptPair("So Mary", "So John", " is")]).metric
        == "negative_log_probability"
    )


BAD_PAIRS = {
    "lengths": (
        [PromptPair("So Mary is", "So Mary")],
        r"'So Mary is' has 4 tokens and the corrupted 'So Mary' has 3.*reword",
    ),
    "answers of different numbers of tokens": (
        [PromptPair("So Mary", "So John", " is a", " he")],
        r"' is a' is \['is', 'a'\]; ' he' is \['he'\].*Task.from_tokens",
    ),
    "a set of answers of several tokens": (
        [PromptPair("So Mary", "So John", (" is a", " is the"))],
        r"one token each \(or one answer and one wrong answer of equally many\).* is \['is', 'a'\]",
    ),
    "no leading space": (
        [PromptPair("So Mary", "So John", "is", " he")],
        r"after 'So Mary', .*write ' is' for 'is'",
    ),
    "several tokens without a leading space": (
        [PromptPair("So Mary", "So John", "is a")],
        r"write ' is a' for 'is a'",
    ),
    "the same prompt": (
        [PromptPair("So Mary", "So Mary", " is")],
        r"the clean and the corrupted prompt 'So Mary' are the same; change .* or give corrupted=",
    ),
    "the same tokens": (
        [PromptPair("So  Mary", "So Mary", " is")],
        r"the clean and the corrupted prompt 'So  Mary' are the same",
    ),
    "too long with its answer": (
        [PromptPair("door " * 63, "wall " * 63, " is a")],
        r"door ' with its answer has 65 tokens and toy-world reads 64; shorten",
    ),
    "unknown answer": (
        [PromptPair("So Mary", "So John", " quokka")],
        r"' quokka' is .*use other words",
    ),
    "unknown word": (
        [PromptPair("So quokka", "So John", " is")],
        r"does not know 'quokka' in 'So quokka'; use other words",
    ),
    "empty": ([PromptPair(" ", " ")], r"clean prompt is empty \(' '\); give it some text"),
    "none": ([], r"has no prompts; give at least one"),
    "too long": (
        [PromptPair("door " * 80, "wall " * 80)],
        r"has 81 tokens and toy-world reads 64; shorten",
    ),
    "both": (
        [PromptPair("So Mary", "So John", " is", (" is", " he"))],
        r"' is' is both an answer and a wrong answer",
    ),
    "some answered": (
        [PromptPair("So Mary", "So John", " is"), PromptPair("So John", "So Mary")],
        r"'So John' has the fields \[\], and the first prompt \['answers'\]",
    ),
    "corrupted spans of no prompt": (
        [PromptPair("So Mary", spans={"A": (3, 7)}, corrupted_spans={"A": (3, 7)})],
        r"'So Mary' has corrupted_spans, but no corrupted prompt; give one, or leave",
    ),
    "span outside": (
        [PromptPair("So Mary", "So John", spans={"NAME": (3, 30)})],
        r"span 'NAME' = \(3, 30\) holds no token.*<= 7",
    ),
    "span empty": (
        [PromptPair("So Mary", "So John", spans={"NAME": (2, 3)})],
        r"span 'NAME' = \(2, 3\) holds no token",
    ),
    "span name": (
        [PromptPair("So Mary", "So John", spans={"a@b": (0, 2)})],
        r"span name 'a@b' cannot be used",
    ),
    "spans differ": (
        [PromptPair("So Mary", "So John", spans={"A": (0, 2)}), PromptPair("So John", "So Mary")],
        r"'So John' has the fields \[\], and the first prompt \['span A'\]",
    ),
}


@pytest.mark.parametrize(("pairs", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_pairs_that_cannot_be_used_are_refused_in_one_line(
    pairs: list[PromptPair], message: str, toy: Model
) -> None:
    with pytest.raises(circuits.InputError, match=message) as caught:
        Task.from_prompts(toy, pairs)
    assert "\n" not in str(caught.value)


def test_spaces_that_are_forgotten_or_doubled_are_named_where_a_tokenizer_makes_pieces_of_them(
    bpe: Model,
) -> None:
    for answer, right in (("Mary", " Mary"), ("  Mary", " Mary")):
        pair = PromptPair("Then Mary gave a drink to", "Then John gave a drink to", answer)
        with pytest.raises(circuits.InputError, match=f"write '{right}' for '{answer}'"):
            Task.from_prompts(bpe, [pair])
    # A word may go on: with digits it often does, with letters it is told.
    pair = PromptPair("from 17", "from 16", "76")
    assert Task.from_prompts(bpe, [pair]).answers is not None
    pair = PromptPair("Then Mary gave a drink to", "Then John gave a drink to", "a")
    with pytest.warns(UserWarning, match="'a' goes on within the last word of .*write ' a' if"):
        task = Task.from_prompts(bpe, [pair])
    assert task.answers is not None and words_of(bpe, task.answers[0].tolist()) == ["a"]


def test_a_space_that_stands_at_the_end_of_a_prompt_or_lacks_there_is_told(bpe: Model) -> None:
    prompt = "Then Mary gave a drink to"
    for end, answer, told in (
        (" ", "a", f"'a' comes after the space that '{prompt} ' ends with; write ' a', and leave"),
        (" ", " a", "leave out that space"),
        (":", "a", f"'a' follows '{prompt}:' without a space; write ' a' if"),
        # One token with its space, and two without
        (":", "Mary", f"'Mary' follows '{prompt}:' without a space; write ' Mary' if"),
    ):
        with pytest.warns(UserWarning, match=told):
            task = Task.from_prompts(bpe, [PromptPair(prompt + end, answer=answer)])
        # It is taken as it is written.
        assert task.answers is not None
        ids = [int(task.clean[task.scored][0]), *task.answers.flatten().tolist()]
        assert "".join(words_of(bpe, ids)) == end + answer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end, answer in ((":", " a"), ("\n", "a"), (" (", "a"), (" 17.", "33")):
            Task.from_prompts(bpe, [PromptPair(prompt + end, answer=answer)])


def test_a_space_that_a_tokenizer_puts_before_words_is_not_told_to_be_doubled(
    tmp_path: Path,
) -> None:
    """Llama's tokenizers have no piece for a word without its space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["The capital is Paris"] * 20, trainer)
    special = {"bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    model = with_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    for prompt, told in (
        ("The capital is ", "leave out the space that the prompt ends with; write ' Paris' for"),
        ("The capital is", r"one: write ' Paris' for"),
    ):
        with pytest.raises(circuits.InputError, match=told):
            Task.from_prompts(model, [PromptPair(prompt, answer="Paris")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Task.from_prompts(model, [PromptPair("The capital is", answer=" Paris")])


def test_the_token_that_ends_texts_may_be_an_answer_where_it_is_also_the_unknown_one(
    bpe: Model, toy: Model
) -> None:
    assert bpe.tokenizer.unk_token == bpe.tokenizer.eos_token
    task = Task.from_prompts(bpe, [PromptPair("Then Mary", answer="<|endoftext|>")])
    assert task.answers is not None and task.answers.tolist() == [[bpe.tokenizer.eos_token_id]]
    with pytest.raises(circuits.InputError, match="answers must be"):
        Task.from_prompts(toy, [PromptPair("So Mary", answer=" quokka")])


LETTERS = list("abcdefghijklmnopqrstuvwxyzJMS")


def reading(tokenizer: Tokenizer, **special: str) -> Model:
    """A random model that reads text with this tokenizer."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    model = random_model("gpt2", d_vocab=len(fast), n_ctx=64)
    model.tokenizer = fast
    return model


def read(model: Model, text: str) -> list[str]:
    return model.tokenizer.convert_ids_to_tokens(prompt_tokens(model, text))


def test_white_space_that_a_tokenizer_does_not_know_is_named() -> None:
    pieces = ["<unk>", "<s>", "▁", "▁So", "▁Mary", "▁went", "▁John", *LETTERS]
    unigram = Tokenizer(models.Unigram([(piece, -9.0) for piece in pieces], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    model = reading(unigram, unk_token="<unk>", bos_token="<s>")
    for text, named in (
        ("So Mary\nwent", r"'\\n'"),
        ("So\tMary", r"'\\t'"),
        ("So Mary\n", r"'\\n'"),
        ("So\u00a0Mary", r"'\\xa0'"),
        ("So <unk>\nMary", r"'\\n'"),
        ("So élan", "'élan'"),
    ):
        with pytest.raises(circuits.InputError, match=f"does not know {named} in"):
            Task.from_prompts(model, [PromptPair(text, "So John")])
    assert read(model, "So Mary went") == ["<s>", "▁So", "▁Mary", "▁went"]
    # As it is spelt out
    assert read(model, "So <unk> went") == ["<s>", "▁So", "▁", "<unk>", "▁went"]


def test_characters_that_a_tokenizer_drops_are_named() -> None:
    vocabulary = {piece: number for number, piece in enumerate(["<s>", " ", ".", *LETTERS])}
    letters = Tokenizer(models.BPE(vocabulary, []))
    model = reading(letters, bos_token="<s>")
    for text, named in (
        ("So\u00a0Mary", r"'\\xa0'"),
        ("So Mary ca\u0301n", "'\u0301'"),
        ("So Mary\n", r"'\\n'"),
        ("So, Mary", "','"),
    ):
        for pair in (PromptPair(text, "So John"), PromptPair("So Mary", "So Jary", f" {text}")):
            with pytest.raises(circuits.InputError, match=f"does not know {named} in"):
                Task.from_prompts(model, [pair])
    assert "".join(read(model, "So Mary can. ")) == "<s>So Mary can. "


def test_what_a_tokenizer_takes_for_a_space_is_as_good_as_one(toy: Model) -> None:
    for text in ("So\nMary", "So\tMary", "So  Mary", "So Mary\n"):
        assert read(toy, text) == ["<bos>", "So", "Mary"]


def test_a_text_of_bos_that_the_vocabulary_lacks_is_no_bos() -> None:
    words = {"[UNK]": 0, "so": 1, "mary": 2, "john": 3, "is": 4}
    pieces = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model = reading(pieces, unk_token="[UNK]")
    # As TransformerLens does, which adds nothing to the vocabulary
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    model.tokenizer._special_tokens_map.update(end)
    assert model.tokenizer.bos_token_id == model.tokenizer.unk_token_id
    task = Task.from_prompts(model, [PromptPair("So Mary", "So John", " is")])
    assert task.clean.tolist() == [[1, 2]] and task.corrupted.tolist() == [[1, 3]]
    assert circuits.model_logits(model, task).shape == (1, len(words))
    with pytest.raises(circuits.InputError, match=r"prepend_bos=True.* has no BOS token"):
        Task.from_prompts(model, [PromptPair("So Mary", "So John", " is")], prepend_bos=True)


def test_a_tokenizer_that_fails_on_a_word_is_told_to() -> None:
    words = Tokenizer(models.WordLevel({"So": 0, "Mary": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = reading(words)
    with pytest.raises(circuits.InputError, match=r"fails on 'So John' .*; use other words"):
        prompt_tokens(model, "So John")
    # It fails on single letters, too, which are not in question.
    assert prompt_tokens(model, "So Mary").tolist() == [0, 1]


def test_only_the_tokens_of_a_prompt_must_be_those_of_the_model() -> None:
    vocabulary = {"So": 0, "Mary": 1, "[UNK]": 2, "S": 500}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = reading(words)
    model.cfg.d_vocab = 3
    assert prompt_tokens(model, "So Mary").tolist() == [0, 1]
    with pytest.raises(circuits.InputError, match="gives token 500"):
        prompt_tokens(model, "S Mary")


def test_an_answer_of_several_tokens_may_be_given_twice(toy: Model) -> None:
    once, twice = [
        Task.from_prompts(toy, [PromptPair("So Mary", "So John", answer)])
        for answer in (" is a", [" is a", " is a"])
    ]
    assert once.digest() == twice.digest()


def test_half_of_a_character_is_refused_wherever_text_is_taken(toy: Model) -> None:
    half = "\ud83d"
    method = circuits.AttributionGraph("toy-world-plt")
    for give in (
        lambda: Task.from_prompts(toy, [PromptPair(half, "So John")]),
        lambda: Task.from_prompts(toy, [PromptPair("So Mary", half)]),
        lambda: Task.from_prompts(toy, [PromptPair("So Mary", "So John", half)]),
        lambda: Task.from_prompts(toy, [PromptPair("So Mary", "So John", " is", half)]),
        lambda: prompt_tokens(toy, f"So {half}"),
        lambda: method.attribute(toy, "So Mary", explain=[half]),
    ):
        with pytest.raises(circuits.InputError, match=r"holds '\\ud83d', half of a character"):
            give()


def test_the_metric_of_a_task_is_known_and_has_one_name(toy: Model, unchecked_types: None) -> None:
    def made(metric: object) -> Task:
        return Task.from_prompts(
            toy, [PromptPair("So Mary", "So John", " is", " was")], metric=metric
        )

    assert made("logit_diff").metric == "logit_difference"
    assert made("logit_diff").digest() == made("logit_difference").digest() == made(None).digest()
    own = circuits.Metric("mine", lambda logits, clean, task: logits[:, 0], "lower_is_damage")
    assert made(own).metric is own
    with pytest.raises(circuits.InputError, match="there is no metric 'KLL'; did you mean 'kl'"):
        made("KLL")
    for wrong in (5, [], b"kl", len):
        with pytest.raises(circuits.InputError, match="give the name of a metric, or a Metric"):
            made(wrong)
    assert set(SHIPPED_METRICS) == {name for name in METRICS if METRICS[name].shipped}


def test_a_prompt_without_tokens_is_refused(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptTokenizer.of(toy)
    monkeypatch.setattr(PromptTokenizer, "_ids", lambda self, text: [])
    with pytest.raises(circuits.InputError, match=r"a clean prompt is empty \('\\u200b'\)"):
        encoder.prompt("\u200b", "clean")


MISFITS = [
    PromptPair("So Mary", "So Mary", " is"),
    PromptPair("So Mary is", "So Mary", " is"),
    PromptPair("So quokka", "So Mary", " is"),
    PromptPair("So wombat", "So Mary", " is"),
    PromptPair("door " * 80, "wall " * 80, " is"),
    PromptPair(" ", " ", " is"),
    PromptPair("So Mary", "So John", " quokka"),
    PromptPair("So Mary", "So John", "is"),
    PromptPair("So Mary", "So John", " is", " is"),
    PromptPair("So Mary", "So John", (" is a", " is")),
]


def test_pairs_that_do_not_fit_are_left_out_on_request_and_counted(
    tmp_path: Path, toy: Model
) -> None:
    fitting = [PromptPair("So Mary", "So John", " is"), PromptPair("So Anna", "So John", " is")]
    pairs = [fitting[0], *MISFITS, fitting[1]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(dataclasses.asdict(pair)) for pair in pairs))
    told = "10 of 12 prompt pairs do not fit .*left out: .*a word .* does not know .2.,"
    with pytest.warns(UserWarning, match=told) as warned:
        task = Task.from_prompts(toy, pairs, skip_misfits=True)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert task.prompts == tuple(fitting)
    assert task.left_out["a word that the tokenizer does not know"] == 2
    assert sum(task.left_out.values()) == 10 and task[:1].left_out == task.left_out
    assert task.digest() == Task.from_prompts(toy, fitting).digest()
    with pytest.warns(UserWarning, match=told):
        assert Task.from_jsonl(path, toy, skip_misfits=True).left_out == task.left_out
    for pair in MISFITS:
        with pytest.raises(circuits.InputError):
            Task.from_prompts(toy, [pair, fitting[0]])
    with pytest.raises(circuits.InputError, match="10 of 10 prompt pairs do not fit the model: a"):
        Task.from_prompts(toy, MISFITS, skip_misfits=True)


def test_a_mistake_in_the_pairs_themselves_is_never_skipped(toy: Model) -> None:
    pair = PromptPair("So Mary", "So John", spans={"NAME": (3, 30)})
    with pytest.raises(circuits.InputError, match="span 'NAME'"):
        Task.from_prompts(toy, [pair], skip_misfits=True)


def test_a_task_without_corrupted_prompts_is_for_ablations_that_need_none(toy: Model) -> None:
    pairs = [PromptPair("So Mary is", answer=" a"), PromptPair("So John", None, " is")]
    task = Task.from_prompts(toy, pairs)
    whole = circuits.Circuit.full(circuits.component_graph(toy))
    for ablation in ("zero", "mean"):
        circuits.evaluate(toy, whole, task, ablation=ablation)
    for ablation in ("resample", circuits.Ablation("mean", over="corrupted")):
        with pytest.raises(
            circuits.InputError, match=r"corrupted prompts of .* are the clean ones.*or"
        ):
            circuits.evaluate(toy, whole, task, ablation=ablation)
    # Also token ids that are the same twice; one prompt that is not corrupted does no harm.
    same, other = task.clean, task.clean.clone()
    other[0, 1] += 1
    for method in (circuits.EAP(metric="kl", gradient_at="corrupted"), circuits.ACDC(0.1)):
        with pytest.raises(circuits.InputError, match="are the clean ones"):
            method.discover(toy, Task.from_tokens(same, same, lengths=task.lengths))
    mixed = Task.from_tokens(same, other, lengths=task.lengths)
    assert circuits.evaluate(toy, whole, mixed).kl == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def log_probability(model: Model, prompt: list[int], answer: list[int]) -> float:
    """Of a whole answer, token by token."""
    total = 0.0
    for token in answer:
        logits = model(torch.tensor([prompt]), prepend_bos=False)[0, -1]
        total += float(logits.log_softmax(-1)[token])
        prompt = [*prompt, token]
    return total


@pytest.mark.parametrize("which", ["toy", "bpe"])
def test_the_rows_of_an_answer_of_several_tokens_add_up_to_its_log_probability(
    which: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    pairs = [
        PromptPair("So Mary", "So John", " is a friend", spans={"NAME": (3, 7)}),
        PromptPair("Then Mary and John went", "Then John and Mary went", " to the"),
        PromptPair("So John", "So Mary", " is"),
    ]
    pairs = [dataclasses.replace(pair, spans={}) for pair in pairs]
    task = Task.from_prompts(model, pairs)
    logits = circuits.model_logits(model, task)
    surprise = circuits.tasks.metrics.METRICS["negative_log_probability"](logits, logits, task)
    by_prompt = torch.zeros(len(pairs)).index_add(0, task.row_prompt, surprise)
    encoder = PromptTokenizer.of(model)
    for pair, found in zip(pairs, by_prompt, strict=True):
        prompt = encoder.prompt(pair.clean)
        whole = encoder.prompt(f"{pair.clean}{pair.answer}")
        answer = whole[len(prompt) :]
        assert float(found) == pytest.approx(-log_probability(model, prompt, answer), abs=1e-4)
    # Both prompts go on with the answer, and each prompt can be taken alone.
    assert torch.equal((task.clean != task.corrupted).sum(1) > 0, torch.ones(3).bool())
    for number in (2, 0, 1):
        alone = task[[number]]
        rows = task.row_prompt == number
        assert torch.equal(alone.row_answers, task.row_answers[rows])
        torch.testing.assert_close(circuits.model_logits(model, alone), logits[rows])


@torch.no_grad()
def test_a_wrong_answer_of_several_tokens_is_compared_within_the_right_one(toy: Model) -> None:
    pair = PromptPair("So Mary", "So John", " is a", " is the", spans={"NAME": (3, 7)})
    task = Task.from_prompts(toy, [pair])
    assert words_under(toy, task, "NAME") == ["Mary"] and task.metric == "logit_difference"
    ids = toy.tokenizer("<bos> So Mary is a the", add_special_tokens=False)["input_ids"]
    logits = toy(torch.tensor([ids[:4]]), prepend_bos=False)[0]
    expected = [0.0, float(logits[3, ids[4]] - logits[3, ids[5]])]
    found = circuits.tasks.metrics.METRICS["logit_difference"](logits[2:], logits[2:], task)
    assert found.tolist() == pytest.approx(expected)


def test_load_task_still_drops_answers_of_several_tokens(bpe: Model) -> None:
    task = circuits.load_task("ioi", bpe, n=100, seed=4)
    assert task.scored.sum() == len(task) and sum(task.left_out.values()) == 100 - len(task) > 0


def test_spans_with_a_slow_tokenizer_are_refused_with_the_remedy(
    toy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(toy.tokenizer), "is_fast", False)
    pair = PromptPair("So Mary", "So John", spans={"NAME": (3, 7)})
    with pytest.raises(circuits.InputError, match="load a fast one, or leave the spans out"):
        Task.from_prompts(toy, [pair])


def test_a_model_without_a_tokenizer_is_told_to_use_tokens() -> None:
    with pytest.raises(circuits.InputError, match=r"no tokenizer.*Task\.from_tokens"):
        circuits.load_task("ioi", random_model(), n=4)


def test_a_task_is_read_from_a_file(tmp_path: Path, toy: Model) -> None:
    path = tmp_path / "pronouns.jsonl"
    line = {
        "clean": PAIR.clean,
        "corrupted": PAIR.corrupted,
        "answer": " she",
        "wrong_answer": [" he"],
        "spans": {"NAME": [3, 7]},
    }
    path.write_text(
        json.dumps(line) + "\n\n" + json.dumps({**line, "wrong_answer": [" he", " Mary"]}) + "\n"
    )
    task = Task.from_jsonl(path, toy)
    assert (task.name, len(task), task.metric) == ("pronouns", 2, "logit_difference")
    assert words_under(toy, task, "NAME") == ["Mary", "Mary"]


BAD_LINES = {
    "not JSON": ('{"clean": "So', r"line 2: not JSON .*write one object per line"),
    "not an object": ("[1]", r"line 2: expected a JSON object, found list"),
    "missing": ('{"corrupted": "So Mary"}', r"line 2: field 'clean' is missing"),
    "misspelt": (
        '{"clean": "So Mary", "corupted": "So John"}',
        r"line 2: unknown field 'corupted'; did you mean 'corrupted'\?",
    ),
    "not text": (
        '{"clean": 3, "corrupted": "So John"}',
        r"line 2: field 'clean' is 3; give the prompt as a string",
    ),
    "answer": (
        '{"clean": "So Mary", "corrupted": "So John", "answer": 3}',
        r"line 2: field 'answer' is 3; give a string, or a list",
    ),
    "spans": (
        '{"clean": "So Mary", "corrupted": "So John", "spans": {"A": 3}}',
        r"line 2: spans\['A'\] is 3; give \[start, end\]",
    ),
    "lengths": (
        '{"clean": "So Mary is", "corrupted": "So John"}',
        r"line 2: the clean prompt 'So Mary is' has 4 tokens",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_broken_line_is_refused_with_file_and_line_number(
    line: str, message: str, tmp_path: Path, toy: Model
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"clean": "So Mary", "corrupted": "So John"}\n' + line + "\n")
    with pytest.raises(circuits.InputError, match=r"broken\.jsonl, " + message) as caught:
        Task.from_jsonl(path, toy)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_empty_are_refused(tmp_path: Path, toy: Model) -> None:
    with pytest.raises(circuits.InputError, match=r"cannot be read.*; give a text file with one"):
        Task.from_jsonl(tmp_path / "none.jsonl", toy)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(circuits.InputError, match="holds no prompt pair"):
        Task.from_jsonl(tmp_path / "empty.jsonl", toy)


# Tensors


TOKENS = torch.arange(12).reshape(3, 4)


def test_every_scored_position_is_a_row_ordered_by_prompt_then_position() -> None:
    scored = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]]).bool()
    task = Task.from_tokens(
        TOKENS,
        TOKENS,
        torch.tensor([5, 6, 7]),
        lengths=torch.tensor([4, 4, 2]),
        answer_positions=scored,
    )
    assert task.row_prompt.tolist() == [0, 0, 1, 2, 2]
    assert task.row_answers is not None and task.row_answers.tolist() == [[5], [5], [6], [7], [7]]
    assert task.row_wrong_answers is None
    assert task.clean[task.scored].tolist() == [1, 3, 6, 8, 9]


def test_by_default_the_last_real_token_is_scored() -> None:
    task = Task.from_tokens(TOKENS, TOKENS, lengths=torch.tensor([4, 1, 2]))
    assert task.scored.nonzero().tolist() == [[0, 3], [1, 0], [2, 1]]
    assert task.metric == "kl" and task.mask.sum(1).tolist() == [4, 1, 2]
    moved = Task.from_tokens(
        TOKENS, TOKENS, answer_positions=torch.tensor([0, 1, 2], dtype=torch.int32)
    )
    assert moved.scored.nonzero()[:, 1].tolist() == [0, 1, 2]


def shifted(rows: list[list[int]], before: list[int], width: int) -> Tensor:
    """Rows of tokens with padding (token 1) before and after them."""
    padded = torch.ones(len(rows), width).long()
    for row, (tokens, start) in enumerate(zip(rows, before, strict=True)):
        padded[row, start : start + len(tokens)] = torch.tensor(tokens)
    return padded


@pytest.mark.parametrize("before", [[0, 0, 0], [2, 0, 3], [1, 0, 1]], ids=str)
def test_padding_may_be_wherever_a_mask_says(before: list[int], toy: Model) -> None:
    rows = [[0, 319, 372], [0, 532, 625, 604, 390], [604, 390]]
    other = [[0, 319, 390], [0, 532, 604, 604, 390], [372, 390]]
    clean, corrupted = shifted(rows, before, 5), shifted(other, before, 5)
    starts = torch.tensor(before)
    scored, span = torch.zeros(2, 3, 5).bool()
    for row in range(3):
        scored[row, [before[row], before[row] + 1]] = True
        span[row, before[row] + 1] = True
    answers = torch.arange(6)
    mask = (clean != 1).long()
    task = Task.from_tokens(
        clean,
        corrupted,
        answers,
        attention_mask=mask,
        answer_positions=scored,
        positions={"SECOND": span},
    )
    right = Task.from_tokens(
        shifted(rows, [0, 0, 0], 5),
        shifted(other, [0, 0, 0], 5),
        answers,
        lengths=torch.tensor([3, 5, 2]),
        answer_positions=torch.tensor([[1, 1, 0, 0, 0]] * 3).bool(),
        positions={"SECOND": torch.tensor([[0, 1, 0, 0, 0]] * 3).bool()},
    )
    assert task.digest() == right.digest()
    assert task.clean[task.positions["SECOND"]].tolist() == [319, 532, 390]
    logits = circuits.model_logits(toy, task)
    for row, tokens in enumerate(rows):
        alone = toy(torch.tensor([tokens]), prepend_bos=False)[0, :2]
        torch.testing.assert_close(logits[2 * row : 2 * row + 2], alone, atol=1e-4, rtol=1e-4)
    last = Task.from_tokens(clean, corrupted, attention_mask=mask.bool())
    at = Task.from_tokens(
        clean, corrupted, attention_mask=mask, answer_positions=starts + torch.tensor([2, 4, 1])
    )
    assert last.digest() == at.digest()


def test_lengths_may_be_those_of_prompts_padded_on_the_left() -> None:
    lengths = torch.tensor([2, 4, 3])
    task = Task.from_tokens(TOKENS, TOKENS.flip(0), lengths=lengths, padding_side="left")
    assert task.clean[0, :2].tolist() == [2, 3] and task.lengths.tolist() == [2, 4, 3]
    assert task.clean[task.scored].tolist() == [3, 7, 11]


def test_padding_that_nobody_marked_is_refused_when_the_task_meets_a_model(
    toy: Model, bpe: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])

    def padded(pad: int, *places: tuple[int, int]) -> Tensor:
        tokens = text.clone()
        for place in places:
            tokens[place] = pad
        return tokens

    pad, end = toy.tokenizer.pad_token_id, 0
    assert pad != toy.tokenizer.bos_token_id and bpe.tokenizer.eos_token_id == end
    padding = copy.deepcopy(bpe.tokenizer)
    padding.pad_token = padding.eos_token
    monkeypatch.setattr(bpe, "tokenizer", padding)
    for model, tokens, told in (
        (toy, padded(pad, (1, 0)), "clean prompt 1 .* begins with padding"),
        (toy, padded(pad, (0, 3)), "clean prompt 0 .* ends with padding"),
        (bpe, padded(end, (1, 0)), "clean prompt 1 .* begins with padding"),
        (bpe, padded(end, (0, 3)), "clean prompt 0 .* ends with padding"),
        # To this tokenizer padding is the token that also begins or ends a text: of all prompts.
        (bpe, padded(end, (0, 0), (1, 0)), "clean prompt 0 .*, with which not all begin"),
        (bpe, padded(end, (0, 3), (1, 3)), "clean prompt 0 .*, with which not all end"),
        (bpe, text, None),
    ):
        task = Task.from_tokens(tokens, text)
        marked = Task.from_tokens(tokens, text, attention_mask=torch.ones_like(tokens))
        check_task(model, marked)
        if told is None:
            check_task(model, task)
            continue
        with pytest.raises(circuits.InputError, match=told + ".*pass attention_mask"):
            circuits.model_logits(model, task)
        with pytest.raises(circuits.InputError, match=told.replace("clean", "corrupted")):
            check_task(model, Task.from_tokens(text, tokens))
        # Means and attribution graphs read all tokens, also those after the last scored one.
        early = Task.from_tokens(tokens, text, answer_positions=torch.tensor([2, 2]))
        with pytest.raises(circuits.InputError, match=told):
            check_task(model, early)


def test_lengths_that_leave_padding_in_a_prompt_are_refused(toy: Model) -> None:
    rows, other = [[0, 319, 372], [0, 532, 625, 604]], [[0, 319, 390], [0, 532, 625, 390]]
    expected = None
    for before, right_side in (([0, 0], "right"), ([1, 0], "left")):
        clean, corrupted = shifted(rows, before, 4), shifted(other, before, 4)
        for lengths, side in itertools.product(([3, 4], [4, 4]), ("right", "left")):
            task = Task.from_tokens(clean, corrupted, lengths=lengths, padding_side=side)
            if (lengths, side) == ([3, 4], right_side):
                logits = circuits.model_logits(toy, task)
                expected = logits if expected is None else expected
                torch.testing.assert_close(logits, expected)
                continue
            where = "begins" if right_side == "left" else "ends"
            with pytest.raises(circuits.InputError, match=f"{where} with padding .*padding_side"):
                circuits.model_logits(toy, task)


def test_a_model_without_bos_may_be_given_the_token_that_pads_in_its_place(
    toy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.cfg, "default_prepend_bos", False)
    assert prompt_tokens(toy, "<pad> So Mary").tolist() == [1, *prompt_tokens(toy, "So Mary")]
    check_task(toy, Task.from_tokens([[1, 319, 372], [1, 532, 625]]))
    for rows in ([[1, 1, 319]], [[1, 319, 372], [532, 625, 319]], [[1, 0, 319]], [[0, 319, 1]]):
        with pytest.raises(circuits.InputError, match="s with padding"):
            check_task(toy, Task.from_tokens(rows))


def test_the_mask_of_one_prompt_does_not_mark_the_padding_of_the_other(toy: Model) -> None:
    tokens = [[1, 0, 319, 372]]
    clean = {"input_ids": tokens, "attention_mask": [[0, 1, 1, 1]]}
    for other, told in (([[0, 319, 390, 1]], "ends"), ([[1, 1, 0, 319]], "begins")):
        with pytest.raises(circuits.InputError, match=f"corrupted prompt 0 .* {told} with padding"):
            check_task(toy, Task.from_tokens(clean, other))
    check_task(toy, Task.from_tokens(clean, [[1, 0, 319, 390]]))
    text = {"input_ids": tokens, "attention_mask": [[1, 1, 1, 1]]}
    for corrupted in (None, text):
        check_task(toy, Task.from_tokens(text, corrupted))


def test_the_other_prompts_of_a_mean_are_checked_as_a_task_is(toy: Model) -> None:
    task = circuits.load_task("ioi", toy, n=2)
    circuit = circuits.Circuit.from_edges(circuits.component_graph(toy), [])
    features = circuits.AttributionGraph("toy-world-plt").discover(toy, task)
    rows = shifted([[0, 319, 372], [0, 532, 625, 604, 390]], [2, 0], 5)
    for over, told in (
        (Task.from_tokens(rows), "prompt 0 .* begins with padding"),
        (Task.from_tokens(rows, lengths=[3, 5]), "prompt 0 .* begins with padding"),
        (Task.from_tokens(rows.flip(1), answer_positions=[1, 1]), "prompt 0 .* ends with padding"),
        (task[2:], "has no prompts"),
    ):
        for mean, found in (("mean", features), ("mean_by_position", circuit), ("mean", circuit)):
            with pytest.raises(circuits.InputError, match=told):
                circuits.evaluate(
                    toy, found, task, ablation=circuits.Ablation(mean, over=over), metrics="kl"
                )


def test_a_token_that_begins_or_ends_texts_and_also_pads_is_text_where_all_have_one(
    bpe: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = copy.deepcopy(bpe.tokenizer)
    padding.pad_token = padding.eos_token
    monkeypatch.setattr(bpe, "tokenizer", padding)
    for rows in ([[0, 5, 6], [0, 6, 7]], [[5, 6, 0], [5, 7, 0]]):
        check_task(bpe, Task.from_tokens(rows[:1], rows[1:]))
    task = Task.from_tokens([[0, 5, 6], [5, 6, 7]])
    with pytest.raises(circuits.InputError, match=r"endoftext.*, with which not all begin"):
        check_task(bpe, task)
    end = padding.eos_token
    # Text that spells it out means it; several of them are padding.
    for text in (f"Then Mary{end}", f"{end}Then Mary", f"{end}{end}Then Mary"):
        Task.from_prompts(bpe, [PromptPair(text), PromptPair("Then John")])
    for given in (f"Then Mary{end}{end}", [0, 0, 5, 6], [5, 6, 0, 0]):
        with pytest.raises(circuits.InputError, match=r"s with padding \(2 of token 0"):
            prompt_tokens(bpe, given)


@pytest.mark.parametrize(
    "padded",
    [
        [1, 1, 0, 319, 372],
        [1, 0, 319, 372],
        [1, 319, 372],
        [0, 1, 319, 372],
        [0, 319, 372, 1],
        [0, 319, 372, 1, 1],
    ],
    ids=str,
)
def test_padding_of_a_single_prompts_ids_is_refused(padded: list[int], toy: Model) -> None:
    """As in a row of a batch that a tokenizer has padded."""
    with pytest.raises(circuits.InputError, match=r"with padding \(. of token 1, '<pad>'\)"):
        prompt_tokens(toy, torch.tensor(padded))
    method = circuits.AttributionGraph("toy-world-plt")
    with pytest.raises(circuits.InputError, match="give its real tokens only"):
        method.attribute_all(toy, list(torch.tensor([padded, padded])))
    real = [token for token in padded if token != 1]
    assert prompt_tokens(toy, real).tolist() == real
    # A mask says which tokens are text: here all of them, and then those of each row.
    encoding = {"input_ids": padded, "attention_mask": [1] * len(padded)}
    assert method.attribute(toy, encoding).tokens.tolist() == padded
    rows = {"input_ids": [padded] * 2, "attention_mask": [[1] * len(padded)] * 2}
    rows["attention_mask"][1] = [int(token != 1) for token in padded]
    if padded[:2] != [0, 1]:
        found = [graph.tokens.tolist() for graph in method.attribute_all(toy, rows)]
        assert found == [padded, real]


def test_a_mask_that_does_not_fit_a_single_prompt_is_refused(toy: Model) -> None:
    for mask, told in (
        ([1, 0, 1], "has a hole in prompt 0"),
        ([1, 1], r"has shape \(1, 2\) .*\[1, 3\]"),
        ([0, 0, 0], "marks no token"),
    ):
        with pytest.raises(circuits.InputError, match=f"attention_mask {told}"):
            prompt_tokens(toy, {"input_ids": [[0, 319, 372]], "attention_mask": mask})


def test_answers_may_be_given_for_each_scored_row() -> None:
    scored = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]]).bool()
    answers, wrong = torch.arange(6), torch.tensor([[9, -1], [8, 7]] * 3)
    task = Task.from_tokens(TOKENS, TOKENS.flip(0), answers, wrong, answer_positions=scored)
    assert task.row_answers is not None and task.row_answers.tolist() == answers[:, None].tolist()
    assert torch.equal(task.row_wrong_answers, wrong)
    part = task[[2, 0]]
    assert part.row_answers.tolist() == [[3], [4], [5], [0], [1]]
    assert part.row_wrong_answers.tolist() == wrong[[3, 4, 5, 0, 1]].tolist()
    assert part.to("cpu").digest() == part.digest() != task.digest()
    assert task[1:2].row_answers.tolist() == [[2]]
    # Those of a prompt hold for all its rows.
    by_prompt = Task.from_tokens(
        TOKENS, TOKENS.flip(0), TOKENS[:, 0], wrong, answer_positions=scored
    )
    assert by_prompt[[2, 0]].row_answers.flatten().tolist() == [8, 8, 8, 0, 0]


BAD_TENSORS: dict[str, tuple[dict[str, object], str]] = {
    "shapes": ({"corrupted": TOKENS[:, :3]}, r"clean has shape \(3, 4\) and corrupted \(3, 3\)"),
    "floats": ({"clean": TOKENS.float()}, r"clean has .* dtype torch.float32; give integers"),
    "one prompt flat": (
        {"clean": TOKENS[0]},
        r"clean has shape \(4,\) .*; give integers \[batch, pos\]",
    ),
    "no prompt": ({"clean": TOKENS[:0]}, r"clean has shape \(0, 4\).*with no axis of size 0"),
    "negative": (
        {"clean": TOKENS - 1},
        r"clean holds -1 for prompt 0; .* pad with any token, and give lengths",
    ),
    "answers": (
        {"answers": torch.tensor([1, 2])},
        r"answers has shape \(2,\) .*; give integers \[3\] or \[3, k\], padded with -1",
    ),
    "answers without tokens": (
        {"answers": torch.zeros(3, 0).long()},
        r"answers has shape \(3, 0\).*with no axis of size 0",
    ),
    "answers floats": (
        {"answers": torch.ones(3)},
        r"answers has .* dtype torch.float32; give integers",
    ),
    "no answer": (
        {"answers": torch.tensor([[1, 2], [-1, -1], [1, -1]])},
        r"answers is empty for prompt 1; give every prompt .* token, or leave answers out",
    ),
    "wrong answers": (
        {"wrong_answers": torch.tensor([1, -7, 1])},
        r"wrong_answers holds -7 for prompt 1; give token ids, padded with -1",
    ),
    "answers for rows": (
        {"answers": torch.arange(4), "answer_positions": TOKENS < 5},
        r"prompt 2 has no scored position",
    ),
    "answers for neither prompts nor rows": (
        {"answers": torch.arange(4), "answer_positions": (TOKENS % 4) < 2},
        r"answers has shape \(4,\) .*or 6 for the scored rows instead of 3 for the prompts",
    ),
    "an answer that is wrong": (
        {"answers": torch.tensor([1, 2, 3]), "wrong_answers": torch.tensor([2, 2, 1])},
        r"prompt 1 has an answer that is also a wrong answer \(such as token 2\)",
    ),
    "hole": (
        {"attention_mask": (TOKENS != 5).long()},
        r"attention_mask has a hole in prompt 1; mark one stretch",
    ),
    "mask without tokens": (
        {"attention_mask": TOKENS > 3},
        r"attention_mask marks no token in prompt 0",
    ),
    "mask values": (
        {"attention_mask": TOKENS},
        r"attention_mask holds 2 for prompt 0; give booleans, or integers 0 and 1",
    ),
    "mask shape": (
        {"attention_mask": TOKENS[:, :3]},
        r"attention_mask has shape \(3, 3\)",
    ),
    "mask and lengths": (
        {"attention_mask": TOKENS < 12, "lengths": torch.tensor([4, 4, 4])},
        r"attention_mask and lengths both say",
    ),
    "side without lengths": (
        {"padding_side": "left"},
        r"padding_side='left', but nothing says how much",
    ),
    "side": ({"padding_side": "top"}, r"padding_side='top': choose 'right' or 'left'"),
    "position in the left padding": (
        {"attention_mask": TOKENS > 0, "answer_positions": torch.tensor([0, 3, 3])},
        r"answer_positions marks position 0 of prompt 0, which has 3 tokens",
    ),
    "lengths": (
        {"lengths": torch.tensor([4, 5, 1])},
        r"lengths holds 5 for prompt 1; give integers \[3\], from 1 to 4",
    ),
    "position": (
        {"lengths": torch.tensor([4, 2, 4]), "answer_positions": torch.tensor([3, 2, 0])},
        r"answer_positions marks position 2 of prompt 1, which has 2 tokens",
    ),
    "position outside all prompts": (
        {"answer_positions": torch.tensor([3, 3, 4])},
        r"answer_positions marks position 4 of prompt 2, which has 4 tokens",
    ),
    "negative position": (
        {"answer_positions": torch.tensor([3, -1, 3])},
        r"answer_positions marks position -1 of prompt 1, which has 4 tokens",
    ),
    "positions floats": (
        {"answer_positions": torch.ones(3, 4)},
        r"answer_positions has .* torch.float32; give integers \[3\] or booleans \[3, 4\]",
    ),
    "positions shape": (
        {"answer_positions": torch.tensor([3, 2])},
        r"answer_positions has shape \(2,\)",
    ),
    "positions mask shape": (
        {"answer_positions": torch.ones(3, 5).bool()},
        r"answer_positions has shape \(3, 5\)",
    ),
    "nothing scored": (
        {"answer_positions": torch.eye(3, 4).bool() & (TOKENS != 5)},
        r"prompt 1 has no scored position",
    ),
    "padding scored": (
        {"lengths": torch.tensor([4, 2, 4]), "answer_positions": torch.ones(3, 4).bool()},
        r"marks position 2 of prompt 1, which has 2 tokens",
    ),
    "span": (
        {"positions": {"A": torch.ones(3, 4)}},
        r"span 'A' has .* dtype torch.float32; give booleans",
    ),
    "name": ({"name": "a/b"}, r"cannot be called 'a/b', because folders get its name"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_cannot_be_used_are_refused(
    changes: dict[str, object], message: str, unchecked_types: None
) -> None:
    arguments: dict[str, object] = {"clean": TOKENS, "corrupted": TOKENS, **changes}
    with pytest.raises(circuits.InputError, match=message):
        Task.from_tokens(arguments.pop("clean"), arguments.pop("corrupted"), **arguments)  # type: ignore[arg-type]


# A task is a value


@pytest.mark.parametrize(
    "indices",
    [slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([0, 1, 1, 0, 0]).bool()],
    ids=str,
)
def test_some_prompts_of_a_task_are_a_task(indices: slice | list[int] | Tensor, toy: Model) -> None:
    task = circuits.load_task("ioi", toy, n=5)
    part = task[indices]
    assert len(part) == 2 and part.prompts == (task.prompts or ())[1:3]
    assert torch.equal(part.clean, task.clean[1:3]) and torch.equal(
        part.positions["S2"], task.positions["S2"][1:3]
    )
    assert (
        part.row_answers is not None
        and task.row_answers is not None
        and torch.equal(part.row_answers, task.row_answers[1:3])
    )
    assert part.digest() == task[1:3].digest() != task.digest()


def test_slices_of_a_task_may_go_backwards(toy: Model) -> None:
    task = circuits.load_task("ioi", toy, n=4)
    for chosen in (slice(None, None, -1), slice(-1, 0, -2), slice(-3, torch.tensor(3))):
        part = task[chosen]
        numbers = list(range(4)[chosen])
        assert part.digest() == task[numbers].digest()
        assert part.prompts == tuple(task.prompts[number] for number in numbers)
    for wrong in (slice("a", None), slice(None, None, 0), slice(0, 1.5)):
        with pytest.raises(circuits.InputError, match=r"slice.* selects no prompts"):
            task[wrong]


def test_a_task_without_prompts_is_refused_when_it_meets_a_model(toy: Model) -> None:
    task = circuits.load_task("ioi", toy, n=2)[2:]
    circuit = circuits.Circuit.full(circuits.component_graph(toy))
    for use in (
        lambda: circuits.evaluate(toy, circuit, task),
        lambda: circuits.EAP().discover(toy, task),
        lambda: circuits.AttributionGraph("toy-world-plt").discover(toy, task),
        lambda: circuits.model_logits(toy, task),
        lambda: circuits.ActivationPatching().by_position(toy, task),
    ):
        with pytest.raises(circuits.InputError, match="task 'ioi' has no prompts"):
            use()


def test_the_digest_sees_every_tensor_and_the_metric() -> None:
    first = TOKENS[:, :1] == TOKENS
    base = Task.from_tokens(TOKENS, TOKENS, TOKENS[:, 0], positions={"A": first})
    changes: list[dict[str, object]] = [
        {"corrupted": TOKENS + 1},
        {"answers": TOKENS[:, 1]},
        {"wrong_answers": TOKENS[:, 1], "metric": base.metric},
        {"lengths": torch.tensor([4, 4, 3])},
        {"answer_positions": torch.tensor([3, 3, 2])},
        {"positions": {"A": first & (TOKENS > 3)}},
        {"positions": {"B": first}},
        {"metric": "accuracy"},
        {"name": "other"},
    ]
    same = {"corrupted": TOKENS, "answers": TOKENS[:, 0], "positions": {"A": first}}
    tasks = [Task.from_tokens(TOKENS, **{**same, **change}) for change in changes]  # type: ignore[arg-type]
    assert (
        base.digest()
        == Task.from_tokens(TOKENS.clone(), **same).digest()
        == base.to("cpu").digest()
    )  # type: ignore[arg-type]
    assert len({base.digest(), *(task.digest() for task in tasks)}) == len(changes) + 1


# Names and options


def test_unknown_tasks_splits_and_options_are_refused_with_what_there_is(
    toy: Model, unchecked_types: None
) -> None:
    for arguments, message in (
        ({"name": "ioy"}, r"no task 'ioy'; did you mean 'ioi'\? there are .*greater_than.*two_hop"),
        ({"split": "validation"}, r"split='validation': choose 'train' or 'test'"),
        ({"corupption": "abc"}, r"'ioi' has no option 'corupption'; did you mean 'corruption'\?"),
        ({"corruption": "cba"}, r"corruption='cba': choose 'abc' or 'swapped'"),
        ({"name": "gendered_pronoun", "hops": 3}, r"has no option 'hops'; there is none"),
        ({"name": "ioi:names=A B"}, r"names='A B': give 5 or more different words"),
        ({"name": "ioi", "names": ["Mary Ann", "B", "C", "D", "E"]}, r"without spaces in them"),
        ({"name": "ioi", "names": set("ABCDE")}, r"is a set, which has no order; give a list"),
        ({"name": "induction", "words": "a b c d e e"}, r"give 5 or more different words"),
        ({"name": "induction", "repeated": 12}, r"repeated=12 and length=12 of 187 words"),
        ({"name": "induction", "repeated": 0}, r"repeated=0 and length=12 of"),
        ({"name": "induction:repeated=2:length=4"}, r"repeated=2 and length=4 of 187 words: rep"),
        ({"name": "greater_than:digits=3"}, r"digits=3: choose 1 or 2"),
        ({"name": f"docstring:before={'9' * 5000}"}, r"before='9+ \.\.\.|before="),
        ({"name": "docstring:after=" + "[" * 100_000}, r"after="),
        ({"name": 'ioi:names=["A", "B"]'}, r"names=\['A', 'B'\]: give 5 or more different words"),
        ({"name": "ioi:corruption"}, r"'corruption' of a task has no value; write NAME=VALUE"),
        ({"name": "ioi:names=A", "names": NAMES}, r"the option 'names' is given twice"),
        ({"name": "ioy:corruption=abc"}, r"no task 'ioy'; did you mean 'ioi'\?"),
        ({"n": 0}, r"n=0: give a whole number, 1 or more"),
    ):
        with pytest.raises(circuits.InputError, match=message):
            circuits.load_task(**{"name": "ioi", "model": toy, "n": 4, **arguments})


def test_options_may_come_with_the_name_of_a_task(toy: Model) -> None:
    task = circuits.load_task("docstring:before=3:after=0", toy, n=8)
    same = circuits.load_task("docstring", toy, n=8, before=3, after=0)
    assert task.digest() == same.digest() and task.name == "docstring"
    assert make_family("ioi:names=Mary John Anna Paul Mark:corruption=swapped") == make_family(
        "ioi", names=["Mary", "John", "Anna", "Paul", "Mark"], corruption="swapped"
    )
    assert "two_hop:about=countries" in task_forms() and "ioi:corruption=abc" not in task_forms()


def test_an_option_without_a_default_is_asked_for(toy: Model, only_shipped_tasks: None) -> None:
    @dataclass(frozen=True)
    class Named(TaskFamily):
        name: ClassVar[str] = "named"
        person: str

        def draw(self, random: random.Random) -> PromptPair:
            return PromptPair(f"So {self.person}", f"So {random.choice(MEN)}", " is")

    try:
        assert make_family("named:person=Mary").person == "Mary"
        with pytest.raises(circuits.InputError, match=r"task 'named': .*; give its options person"):
            circuits.load_task("named", toy, n=1)
        assert "give its options person" in circuits.performance(toy, n=1)["note"]["named"]
    finally:
        del REGISTRY["named"]


def test_a_family_of_ones_own_is_registered_by_being_defined(toy: Model) -> None:
    @dataclass(frozen=True)
    class Greeting(TaskFamily):
        """Says whom to like."""

        name: ClassVar[str] = "greeting"
        metric: ClassVar[str] = "kl"

        def draw(self, random: random.Random) -> PromptPair:
            first, second = random.sample(NAMES, 2)
            return PromptPair(f"I think {first}", f"I think {second}")

    try:
        task = circuits.load_task("greeting", toy, n=10)
        assert (
            len(task) == 10
            and task.metric == "kl"
            and task.answers is None
            and "greeting" in circuits.task_names()
        )
        with pytest.raises(circuits.InputError, match="two tasks are named 'greeting'"):
            type(
                "Other",
                (TaskFamily,),
                {"name": "greeting", "metric": "kl", "draw": Greeting.draw, "__module__": __name__},
            )
    finally:
        del REGISTRY["greeting"]

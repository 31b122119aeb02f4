"""The token <bos> comes once before a prompt, whoever puts it there: the package or the text."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from architectures import of_hooked_transformers

import circuits
from circuits.cli.main import main
from circuits.models import Model
from circuits.tasks.family import REGISTRY
from circuits.tasks.tokenization import PromptTokenizer, prompt_tokens

TEXT, OTHER = "The capital of the state containing Dallas is", "Oakland"
N_WORDS = 8


def other(text: str) -> str:
    return text.replace("Dallas", OTHER)


@pytest.fixture(scope="module")
def transcoders() -> circuits.Transcoders:
    return circuits.load_transcoders("toy-world-clt")


@dataclass(frozen=True)
class Written(circuits.TaskFamily):
    """One prompt, as it is written."""

    name: ClassVar[str] = "written"
    metric: ClassVar[str] = "kl"
    text: str = TEXT

    def draw(self, random: random.Random) -> circuits.PromptPair:
        return circuits.PromptPair(self.text, other(self.text))

    def pairs(self, n: int, seed: int, split: str) -> list[circuits.PromptPair]:
        return [self.draw(random.Random(seed))]


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    """The family is known in these tests only."""
    REGISTRY[Written.name] = Written
    yield
    REGISTRY.pop(Written.name, None)


class Entrances:
    """For each place where text comes in, the number of tokens that it becomes."""

    def __init__(self, model: Model, transcoders: circuits.Transcoders, folder: Path) -> None:
        self.model, self.transcoders, self.folder = model, transcoders, folder
        self.method = circuits.AttributionGraph(transcoders)

    def file(self, text: str) -> Path:
        path = self.folder / "written.jsonl"
        line = {"clean": text, "corrupted": other(text), "answer": " Austin"}
        line |= {"wrong_answer": " Sacramento"}
        path.write_text(json.dumps(line))
        return path

    def command(self, *words: str) -> None:
        assert main([*words, "--device", "cpu", "--out", str(self.folder / "runs")]) == 0

    def from_prompts(self, text: str, **bos: bool | None) -> int:
        pair = circuits.PromptPair(text, other(text), " Austin")
        return int(circuits.Task.from_prompts(self.model, [pair], **bos).lengths[0])

    def from_jsonl(self, text: str, **bos: bool | None) -> int:
        return int(circuits.Task.from_jsonl(self.file(text), self.model, **bos).lengths[0])

    def load_task(self, text: str, **bos: bool | None) -> int:
        return int(circuits.load_task("written", self.model, n=1, text=text, **bos).lengths[0])

    def attribute(self, text: str, **bos: bool | None) -> int:
        return len(self.method.attribute(self.model, text, **bos).tokens)

    def attribute_all(self, text: str, **bos: bool | None) -> int:
        return len(self.method.attribute_all(self.model, [text], **bos)[0].tokens)

    def intervene(self, text: str, **bos: bool | None) -> int:
        run = circuits.intervene(self.model, self.transcoders, text, [[]], **bos)
        return run.logits.shape[1]

    def direct_effects(self, text: str, **bos: bool | None) -> int:
        run = circuits.direct_effects(self.model, self.transcoders, text, [[]], **bos)
        return run.logits.shape[1]

    def generate(self, text: str, **bos: bool | None) -> int:
        tokens = circuits.generate(self.model, self.transcoders, text, [], new_tokens=0, **bos)
        return len(tokens)

    def run_graph(self, text: str, **bos: bool | None) -> int:
        run = circuits.run_graph(self.method, self.model, text, out=self.folder, **bos)
        return len(run.graph.tokens)

    def graph_command(self, text: str, prepend_bos: bool | None) -> int:
        self.command("graph", text, "--prepend-bos", str(prepend_bos))
        (folder,) = (self.folder / "runs" / "graphs").iterdir()
        return len(circuits.load_graph_run(folder).graph.tokens)

    def discover_command(self, text: str, prepend_bos: bool | None) -> int:
        words = "discover", "--method", "eap", "--prepend-bos", str(prepend_bos)
        self.command(*words, "--data", str(self.file(text)))
        (folder,) = (self.folder / "runs" / "written").iterdir()
        digest = json.loads((folder / "record.json").read_text())["task"]["digest"]
        for given in (True, False):
            task = circuits.Task.from_jsonl(self.file(text), self.model, prepend_bos=given)
            if task.digest() == digest:
                return int(task.lengths[0])
        raise AssertionError("the command made another task")


ENTRANCES = [name for name in vars(Entrances) if not name.startswith("_")]
ENTRANCES = [name for name in ENTRANCES if name not in ("file", "command")]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", ENTRANCES)
def test_every_entrance_of_text_puts_bos_in_front_once_or_leaves_text_as_it_is(
    name: str, toy_world: Model, transcoders: circuits.Transcoders, tmp_path: Path
) -> None:
    for number, (text, prepend_bos, extra) in enumerate(
        [
            (TEXT, None, 1),
            (f"<bos> {TEXT}", None, 1),
            (f"<bos> {TEXT}", True, 1),
            (TEXT, False, 0),
            (f"<bos> {TEXT}", False, 1),
            (f"<bos><bos> {TEXT}", True, 1),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        entrance: Callable[..., int]
        entrance = getattr(Entrances(toy_world, transcoders, folder), name)
        assert entrance(text, prepend_bos=prepend_bos) == N_WORDS + extra, (text, prepend_bos)


@pytest.mark.parametrize("name", ENTRANCES)
def test_every_entrance_of_text_refuses_padding(
    name: str,
    toy_world: Model,
    transcoders: circuits.Transcoders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in a decoded row of a batch that a tokenizer has padded."""
    entrance = getattr(Entrances(toy_world, transcoders, tmp_path), name)
    for text in (f"<pad><pad><bos> {TEXT}", f"<pad> {TEXT}", f"<bos> {TEXT}<pad>"):
        for prepend_bos in (None, True, False):
            is_command = name.endswith("command")
            kind = AssertionError if is_command else circuits.InputError
            with pytest.raises(kind) as caught:
                entrance(text, prepend_bos=prepend_bos)
            told = capsys.readouterr().err if is_command else str(caught.value)
            assert "s with padding (" in told and "remove it" in told


def test_a_graphs_own_text_and_its_tokens_decoded_give_the_same_graph_in_the_same_folder(
    toy_world: Model, transcoders: circuits.Transcoders, tmp_path: Path
) -> None:
    method = circuits.AttributionGraph(transcoders)
    first = circuits.run_graph(method, toy_world, TEXT, out=tmp_path)
    decoded = toy_world.tokenizer.decode(first.graph.tokens.tolist())
    for text in (first.graph.prompt, decoded):
        again = circuits.run_graph(method, toy_world, text, out=tmp_path)
        assert again.reused and again.folder == first.folder


def test_evaluate_reads_text_as_the_run_did(
    toy_world: Model, transcoders: circuits.Transcoders, tmp_path: Path
) -> None:
    entrances = Entrances(toy_world, transcoders, tmp_path)
    assert entrances.discover_command(TEXT, prepend_bos=False) == N_WORDS
    (folder,) = (tmp_path / "runs" / "written").iterdir()
    assert main(["evaluate", str(folder), "--size", "20", "--device", "cpu"]) == 0
    record = json.loads((folder / "record.json").read_text())
    found = json.loads((folder / "metrics.json").read_text())["evaluations"]
    (evaluation,) = found.values()
    assert evaluation["prompts"] == record["task"]["digest"]


def test_answers_are_those_that_continue_a_text_which_brings_its_bos(toy_world: Model) -> None:
    pairs = [
        circuits.PromptPair(start + TEXT, start + other(TEXT), " Austin", " Sacramento")
        for start in ("", "<bos> ")
    ]
    plain, own = (circuits.Task.from_prompts(toy_world, [pair], name="same") for pair in pairs)
    assert plain.digest() == own.digest()


def test_spans_are_counted_in_the_text_as_it_is_written(toy_world: Model) -> None:
    for start in ("", "<bos>", "<bos> ", "<bos><bos>"):
        text = f"{start}So Mary"
        spans = {"NAME": (len(text) - 4, len(text))}
        for prepend_bos in (True, False):
            pair = circuits.PromptPair(text, f"{start}So John", " is", spans=spans)
            task = circuits.Task.from_prompts(toy_world, [pair], prepend_bos=prepend_bos)
            marked = task.clean[task.positions["NAME"]]
            assert toy_world.tokenizer.decode(marked) == "Mary"


def test_ids_are_taken_as_they_are_unless_bos_is_asked_for(toy_world: Model) -> None:
    bos, *words = prompt_tokens(toy_world, TEXT).tolist()
    for given, prepend_bos, expected in [
        (words, None, words),
        (words, False, words),
        (words, True, [bos, *words]),
        ([bos, *words], True, [bos, *words]),
        ([bos, bos, *words], None, [bos, bos, *words]),
    ]:
        assert prompt_tokens(toy_world, given, prepend_bos).tolist() == expected


def test_whether_bos_is_put_in_front_is_true_false_or_none(
    toy_world: Model, unchecked_types: None
) -> None:
    for value in ("no", torch.tensor([1, 1]), [True]):
        for prompt in (TEXT, [319, 372]):
            with pytest.raises(circuits.InputError, match=r"prepend_bos=.*: give True, False or"):
                prompt_tokens(toy_world, prompt, value)  # type: ignore[arg-type]


# A bridge gives every tokenizer a BOS that is put on it.
@of_hooked_transformers
def test_a_bos_that_does_not_exist_cannot_be_put_in_front(
    toy_world: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_bos = copy.deepcopy(toy_world.tokenizer)
    without_bos.bos_token = None
    monkeypatch.setattr(toy_world, "tokenizer", without_bos)
    assert len(prompt_tokens(toy_world, TEXT)) == N_WORDS
    with pytest.raises(circuits.InputError, match="has no BOS token; leave it out"):
        prompt_tokens(toy_world, TEXT, True)


def test_the_models_default_holds_for_text_that_has_no_bos(
    toy_world: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_world.cfg, "default_prepend_bos", False)
    assert len(PromptTokenizer.of(toy_world).prompt(TEXT)) == N_WORDS
    assert len(PromptTokenizer.of(toy_world, True).prompt(TEXT)) == N_WORDS + 1

"""The command: help without torch, options from dataclass fields, mistakes told in one line."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

import circuits
from circuits.cli.console import frame_table, terminal
from circuits.cli.main import HELP, main
from circuits.cli.parsing.method_source import UnreadableError, described_in, shipped_methods
from circuits.cli.parsing.methods import describe, describe_method
from circuits.cli.parsing.read import OPTIONS, read_arguments

# Whole methods run: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

METHOD_OF_ONES_OWN = '''
from dataclasses import dataclass
from typing import ClassVar, Literal
import torch
import circuits

@dataclass(frozen=True)
class LayerDepth(circuits.CircuitDiscoverer):
    """Score edges by how late their source is.

    Reference: none; a test.

    Attributes:
        sign: which way is up.
        scale: multiplies every score.
    """

    name: ClassVar[str] = "layer-depth"
    sign: Literal["late", "early"] = "late"
    scale: float = 1.0

    def discover(self, model, task, *, graph=None, checkpoint=None, progress=None):
        graph = circuits.component_graph(model) if graph is None else graph
        scores = self.scale * graph.source.float() * (1 if self.sign == "late" else -1)
        return circuits.Circuit.full(graph, scores, record=self.record())
'''


FEW = ("--n", "2", "--n-eval", "2")


def run_here(capsys, *words: str) -> tuple[int, str, str]:
    status = main(words)
    output, errors = capsys.readouterr()
    return status, output, errors


HELP_AND_MISTAKES = """
import contextlib, io, sys
from circuits.cli.main import HELP, main

def said(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = main(words)
        except SystemExit as stopped:
            status = stopped.code
    heavy = {"torch", "transformers", "transformer_lens", "pandas", "plotly"} & set(sys.modules)
    assert not heavy, (words, heavy)
    return status, " ".join(text.getvalue().split())

for command in ("discover", "evaluate", "compare", "graph", "view", "list"):
    assert said(command, "--help")[0] == 0
for words in MISTAKES:
    status, text = said(*words[:-1])
    assert status == 2 and words[-1] in text, (words, status, text)
    assert text.startswith("circuits: ") and len(text) <= 500, text
FILE = ["--method", sys.argv[1]]
assert "--sign {late,early}" in said("discover", *FILE, "--help")[1]
assert "did you mean 'late'" in said("discover", *FILE, "--sign", "lat")[1]
"""


def test_help_and_mistakes_in_options_are_answered_without_importing_torch(tmp_path):
    eap = ("discover", "--method", "eap")
    acdc = ("discover", "--method", "acdc", "--threshold", "0.1")
    mistakes = [
        ("discver", "there is no command 'discver'; did you mean 'discover'?"),
        ("discover", "--threshold FLOAT"),
        ("discover", "--threshold", "x", "--threshold: could not convert string to float: 'x'"),
        ("discover", "--method", "ACDCC", "there is no method 'ACDCC'; did you mean 'acdc'?"),
        ("discover", "--method", "missing.py", "there is no Python file missing.py"),
        (*eap, "--gradient-a", "both", "no option --gradient-a; did you mean '--gradient-at'?"),
        (*eap, "--gradient-at", "bot", "did you mean 'both'?"),
        (*eap, "--ablation", "zeros", "did you mean 'zero'?"),
        (*eap, "--metric", "kll", "there is no metric 'kll'; did you mean 'kl'?"),
        (*eap, "--task", "IOI", "there is no task 'IOI'; did you mean 'ioi'?"),
        (*eap, "--size", "x", "parsing --size"),
        (*eap, "--n", "9" * 5000 + "x", "parsing --n"),
        (*eap, "--n", "0", "--n=0: give a whole number, 1 or more"),
        (*eap, "--data", "missing.csv", "--data: there is no file missing.csv"),
        (*eap, "--skip-misfits", "--skip-misfits needs prompts of your own"),
        (*eap, "--start", "missing", "eap does not search"),
        (*eap, "--positions", "S1,,S2", "--positions 'S1,,S2': a span has no name"),
        (*acdc, "--layers", "3-2", "3-2 is empty; write it as 2-3"),
        (*acdc, "--layers", "2-", "--layers 2- names no layers"),
        ("discover", "--treshold", "0.1", "did you mean '--threshold'?"),
        (*acdc, "--start-size", "9", "add --start FOLDER"),
        (*acdc, "--start", "missing", "--start: there is no folder missing"),
        ("discover", "--threshold", "-1", "threshold=-1.0 must be a number of at least 0"),
        ("discover", "--metod", "eap", "there is no option --metod; did you mean '--method'?"),
        ("evaluate", "circuits evaluate: PATH"),
        ("evaluate", "x", "--metrics", "kl,acuracy", "did you mean 'accuracy'?"),
        ("compare", "--methods", "acdc,eaap", "did you mean 'eap'?"),
        ("compare", "--methods", "eap:metric=kll", "did you mean 'kl'?"),
        ("compare", "--methods", "eap:steps=3", "eap has no setting 'steps'"),
        ("compare", "--thresholds", "1,x", "'x' is no number"),
        ("compare", "--thresholds", "1,-1", "threshold=-1.0 must be"),
        ("compare", "--methods", "eap,", "an entry is empty"),
        ("evaluate", "missing", "missing holds no finished run"),
        ("evaluate", "x", "--ablation", "zeroes", "did you mean 'zero'? there are mean, mean_by"),
        ("graph", "x", "--budgt", "3", "did you mean '--budget'?"),
        ("graph", "The", "capital", "'capital' is one word too many: name its option"),
        ("discover", "acdc", "name its option (--OPTION acdc)"),
        ("compare", "--methods", "eap", "acdc", "separate lists by commas"),
        ("compare", "eap,acdc", "'eap,acdc' is one word too many"),
        (*eap, "--gradient-at", "clean", "both", "'both' is one word too many"),
        ("discover", "--treshold=0.1", "no option --treshold; did you mean '--threshold'?"),
        *[
            (command, *positional, option, "", f"{option} is empty")
            for command, *positional, options in (
                ("discover", ["--model", "--task", "--data", "--out", "--positions", "--start"]),
                ("compare", ["--model", "--methods", "--thresholds", "--out", "--n-eval"]),
                ("evaluate", "x", ["--model", "--metrics"]),
                ("graph", "x", ["--model", "--transcoders", "--explain", "--out", "--device"]),
            )
            for option in options
        ],
        (*eap, "--model=", "--model is empty"),
        (*eap, "--metric", "", "there is no metric ''"),
        ("evaluate", "", "a text is empty"),
        ("graph", "", "a text is empty"),
        ("view", "x", "--no-browser", "", "--no-browser is empty"),
        (*acdc, "--layers", "0-1000000000000", "names no layers"),
        (*acdc, "--layers", "9" * 5000, "names no layers"),
        ("discover", "--method", "x" * 300 + ".py", "there is no Python file xxx"),
        ("view", "x", "--port", "http", "parsing --port"),
    ]
    file = tmp_path / "mine.py"
    file.write_text(METHOD_OF_ONES_OWN)
    script = HELP_AND_MISTAKES.replace("MISTAKES", repr(mistakes))
    words = [sys.executable, "-c", script, str(file)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_read_of_a_methods_source_is_what_importing_it_gives():
    methods = circuits.discoverers()
    ours = [name for name in methods if methods[name].__module__.startswith("circuits.")]
    assert list(shipped_methods()) == ours
    for name in ours:
        assert describe_method(name) == describe(methods[name])


def test_a_method_whose_source_does_not_say_its_options_is_imported(tmp_path):
    file = tmp_path / "computed.py"
    own = METHOD_OF_ONES_OWN.replace("layer-depth", "computed-default")
    file.write_text(own.replace("scale: float = 1.0", "scale: float = float('2')"))
    with pytest.raises(UnreadableError):
        described_in(file)
    assert describe_method(str(file)).options["scale"] == (float, 2.0)


def test_only_the_command_itself_says_how_threads_wait_and_only_where_the_user_does_not(
    monkeypatch,
):
    # What the environment holds after the test is restored only if the name was set here.
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(sys, "argv", ["circuits", "list"])
    main()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    main(["list"])
    assert "OMP_WAIT_POLICY" not in os.environ
    main()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", ["discover", "evaluate", "compare", "graph", "view"])
def test_help_shows_each_example_on_a_line_of_its_own(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    examples = [line for line in lines if line.startswith("$ ")]
    assert len(examples) >= 2
    assert all(line.count(f"circuits {name} ") == 1 for line in examples)


def test_every_example_in_the_help_can_be_read(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_method.py").write_text(METHOD_OF_ONES_OWN.replace("layer-depth", "of-the-example"))
    monkeypatch.setenv("COLUMNS", "200")
    texts = [HELP]
    for name in OPTIONS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        texts.append(capsys.readouterr().out)
    examples = re.findall(
        r"(?:  |\$ |-- )circuits (.*?)(?:    .*)?$", "\n".join(texts), re.MULTILINE
    )
    read = 0
    for example in examples:
        command, *words = shlex.split(example)
        if command in OPTIONS and "..." not in words:
            read_arguments(command, words)
            read += 1
    assert read >= 20


@pytest.mark.parametrize("name", ["discover", "evaluate", "compare", "list"])
def test_every_command_has_help_of_its_own(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    if name != "list":
        for option in ("--model", "--task", "--data", "--device"):
            assert option in output


def test_a_methods_options_are_its_fields_and_their_help_its_docstring(capsys):
    with pytest.raises(SystemExit):
        main(["discover", "--method", "eap-ig", "--help"])
    output = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for option in (
        "--steps",
        "--along {inputs,activations}",
        "--quadrature {midpoint,left}",
        "--ablation {resample,zero,mean,mean-by-position,noise}",
    ):
        assert option.replace("mean-by-position", "mean_by_position") in output
    assert "gradients taken along each line" in output


@pytest.mark.parametrize("method", circuits.discoverers())
def test_no_method_has_an_option_that_clashes_with_the_commands_own(capsys, method):
    with pytest.raises(SystemExit) as stopped:
        main(["discover", "--method", method, "--help"])
    assert stopped.value.code == 0
    assert method in capsys.readouterr().out


def test_what_only_makes_a_method_faster_is_an_option_and_finds_the_same_run(capsys, tmp_path):
    words = (
        "discover",
        "--method",
        "acdc",
        "--threshold",
        "0.1",
        "--n",
        "2",
        "--n-eval",
        "2",
        "--out",
        str(tmp_path),
        "--json",
    )
    folders = [
        json.loads(run_here(capsys, *words, *more)[1])["folder"]
        for more in (("--guess", "eap"), ("--guess", "own"))
    ]
    assert folders[0] == folders[1]
    assert json.loads((Path(folders[0]) / "record.json").read_text())["settings"]["guess"] == "eap"


def test_a_field_called_like_an_option_of_the_command_is_written_with_its_methods_prefix(
    capsys, tmp_path
):
    words = (
        "discover",
        "--method",
        "random",
        "--n",
        "2",
        "--seed",
        "1",
        "--method-seed",
        "7",
        "--out",
        str(tmp_path),
        "--json",
    )
    record = json.loads(
        (Path(json.loads(run_here(capsys, *words)[1])["folder"]) / "record.json").read_text()
    )
    assert record["settings"] == {"seed": 7}
    assert record["notes"]["seed"] == 1


def test_evaluate_takes_model_task_seed_and_ablation_from_the_run(capsys, tmp_path):
    words = (
        "discover",
        "--method",
        "eap",
        "--task",
        "two_hop",
        "--ablation",
        "zero",
        "--seed",
        "3",
        "--n",
        "4",
        "--n-eval",
        "4",
        "--size",
        "60",
    )
    found = json.loads(run_here(capsys, *words, "--out", str(tmp_path), "--json")[1])
    assert (found["task"], found["ablation"]) == ("two_hop", "zero")
    again = json.loads(
        run_here(capsys, "evaluate", found["folder"], "--n", "4", "--size", "60", "--json")[1]
    )
    assert again["values"] == found["values"]
    assert (again["task"], again["ablation"], again["prompts"]) == (
        "two_hop",
        "zero",
        found["prompts"],
    )
    printed = run_here(
        capsys,
        "evaluate",
        found["folder"],
        "--n",
        "4",
        "--size",
        "60",
        "--task",
        "ioi",
        "--ablation",
        "mean",
    )[1]
    assert "4 prompts of ioi, mean ablation" in " ".join(printed.split())


def test_compare_tells_variants_of_a_method_apart_and_refuses_the_same_twice(capsys, tmp_path):
    few = ("--n", "2", "--n-eval", "2", "--size", "9", "--out", str(tmp_path), "--json")
    words = ("compare", "--methods", "eap:gradient_at=clean,eap:gradient_at=both", *few)
    assert set(json.loads(run_here(capsys, *words)[1])["table"]) == {
        "eap:gradient_at=clean",
        "eap:gradient_at=both",
    }
    status, _, errors = run_here(capsys, "compare", "--methods", "eap,eap", *few)
    assert status == 2
    assert "names 'eap' twice" in errors


def test_settings_in_compare_can_be_booleans_and_negative_numbers(capsys, tmp_path):
    few = ("--n", "2", "--n-eval", "2", "--size", "9", "--out", str(tmp_path), "--json")
    words = ("compare", "--methods", "acdc:threshold=0.5:speculate=False,random:seed=-1", *few)
    status, output, errors = run_here(capsys, *words)
    assert status == 0, errors
    names = {"acdc:threshold=0.5:speculate=False", "random:seed=-1"}
    assert set(json.loads(output)["table"]) == names


def test_a_file_can_define_several_methods_and_be_named_several_times(capsys, tmp_path):
    file = tmp_path / "torch.py"  # the name of a module that is in use must do no harm
    first, second = (
        METHOD_OF_ONES_OWN.replace("layer-depth", "layer-depth-two"),
        METHOD_OF_ONES_OWN.replace("layer-depth", "second-depth"),
    )
    file.write_text(first + second.replace("LayerDepth", "Second"))
    few = ("--n", "2", "--n-eval", "2", "--size", "9", "--out", str(tmp_path), "--json")
    words = (
        "compare",
        "--methods",
        f"{file}:layer-depth-two,{file}:second-depth:scale=2,{file}:second-depth",
        *few,
    )
    status, output, errors = run_here(capsys, *words)
    assert status == 0, errors
    assert set(json.loads(output)["table"]) == {
        "layer-depth-two",
        "second-depth:scale=2",
        "second-depth",
    }
    status, _, errors = run_here(capsys, "discover", "--method", str(file), *few)
    assert status == 2
    assert "torch.py defines layer-depth-two, second-depth" in errors


@pytest.mark.filterwarnings("default")
def test_a_note_is_one_line_without_a_place_in_our_source(capsys, tmp_path):
    words = (
        "discover",
        "--method",
        "eap",
        "--ablation",
        "zero",
        "--gradient-at",
        "corrupted",
        "--n",
        "2",
        "--out",
        str(tmp_path),
        "--json",
    )
    status, _, errors = run_here(capsys, *words)
    assert status == 0
    assert errors.startswith("circuits: note: gradients are taken at zero embeddings")
    assert errors.count("\n") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, _, errors = run_here(capsys, *words, "--n", "1")
    assert status == 2 and errors.count("\n") == 1
    assert "a warning is an error here: gradients are taken at zero embeddings" in errors


def test_discover_evaluate_and_find_again(capsys, tmp_path):
    words = (
        "discover",
        "--method",
        "eap",
        "--task",
        "ioi",
        "--n",
        "8",
        "--n-eval",
        "8",
        "--size",
        "40",
        "--out",
        str(tmp_path),
        "--json",
    )
    status, output, _ = run_here(capsys, *words)
    found = json.loads(output)
    assert (status, found["reused"], found["edges"]) == (0, False, 40)
    assert json.loads(run_here(capsys, *words)[1])["reused"]
    status, output, _ = run_here(
        capsys, "evaluate", found["folder"], "--n", "8", "--size", "40", "--json"
    )
    assert json.loads(output)["values"]["kl"] == found["values"]["kl"]
    status, output, _ = run_here(
        capsys, "evaluate", found["folder"], "--n", "8", "--size", "40", "--metrics", "accuracy"
    )
    assert "accuracy" in output
    assert "logit difference" not in output


def test_a_method_that_only_scores_shows_its_strongest_edges_and_asks_for_a_size(capsys, tmp_path):
    status, output, _ = run_here(
        capsys, "discover", "--method", "random", "--n", "4", "--out", str(tmp_path)
    )
    assert status == 0
    assert "give --size N" in output
    assert len(re.findall(r"->", output)) == 15


def test_compare_prints_a_table_and_writes_a_report(capsys, tmp_path):
    few = ("--n", "8", "--n-eval", "8", "--size", "30", "--out", str(tmp_path))
    words = ("compare", "--task", "ioi", "--methods", "eap,eap-ig:steps=2,random", *few)
    status, output, _ = run_here(capsys, *words)
    assert status == 0
    assert "eap-ig:steps=2" in output
    report = Path(re.search(r"Report: (.*report\.html)", output)[1])
    page = report.read_text()
    assert "eap-ig" in page
    assert "faithfulness" in page.lower()
    assert not re.search(
        r'(src|href)="https?:', re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    )  # plotly.js is inlined
    tables = json.loads(run_here(capsys, *words, "--json")[1])
    table, reference = tables["table"], tables["reference"]
    assert {row["edges"] for row in table.values()} == {30}
    assert {name: row["edges"] for name, row in reference.items()} == {
        "whole model": 479,
        "empty circuit": 0,
    }
    assert all(name in page and name.split()[0] in output for name in reference)
    assert {name: row["model runs"] for name, row in table.items()} == {
        "eap": 2,
        "eap-ig:steps=2": 4,
        "random": 0,
    }
    assert "model runs: forward passes" in output
    assert "backward passes do not count" in page


def test_a_users_method_in_one_file_works_with_options_and_help(capsys, tmp_path):
    file = tmp_path / "layer_depth.py"
    file.write_text(METHOD_OF_ONES_OWN)
    words = (
        "discover",
        "--method",
        str(file),
        "--n",
        "4",
        "--n-eval",
        "4",
        "--size",
        "10",
        "--out",
        str(tmp_path),
        "--json",
    )
    status, output, _ = run_here(capsys, *words, "--sign", "early", "--scale", "2")
    assert status == 0
    record = json.loads((Path(json.loads(output)["folder"]) / "record.json").read_text())
    assert record["settings"] == {"sign": "early", "scale": 2.0}
    few = ("--n", "4", "--n-eval", "4", "--size", "9", "--out", str(tmp_path), "--json")
    output = run_here(capsys, "compare", "--methods", f"{file},random", *few)[1]
    assert set(json.loads(output)["table"]) == {"layer-depth", "random"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("def f(:", "cannot be run: SyntaxError"),
        ("raise SystemExit(3)", "cannot be run: SystemExit: 3"),
        (
            METHOD_OF_ONES_OWN.replace("layer-depth", "no-circuit").replace(
                "return circuits.Circuit", "None and circuits.Circuit"
            ),
            "returned NoneType",
        ),
    ],
)
def test_a_method_file_with_a_fault_is_told_in_one_line(capsys, tmp_path, content, told):
    (tmp_path / "mine.py").write_text(content)
    status, _, errors = run_here(
        capsys,
        "discover",
        "--method",
        str(tmp_path / "mine.py"),
        "--n",
        "2",
        "--out",
        str(tmp_path),
    )
    assert status == 2
    assert told in errors


def test_evaluating_a_run_that_chose_no_edges_asks_for_a_size(capsys, tmp_path):
    found = json.loads(
        run_here(
            capsys, "discover", "--method", "eap", "--n", "2", "--out", str(tmp_path), "--json"
        )[1]
    )
    status, _, errors = run_here(capsys, "evaluate", found["folder"])
    assert status == 2
    assert "give --size N" in errors


def test_positions_and_a_split_embedding_can_be_asked_for(capsys, tmp_path):
    words = (
        "discover",
        "--method",
        "eap",
        "--n",
        "4",
        "--n-eval",
        "4",
        "--size",
        "12",
        "--out",
        str(tmp_path),
        "--json",
    )
    output = run_here(capsys, *words, "--positions", "IO,S1,S2,END", "--split-embed")[1]
    circuit = circuits.Circuit.load(json.loads(output)["folder"])
    assert circuit.graph.positions == ("rest", "IO", "S1", "S2", "END")
    assert any(isinstance(node, circuits.TokenEmbed) for node in circuit.graph.nodes)


def test_a_search_can_start_from_another_run_and_try_some_layers(capsys, tmp_path):
    words = ["--n", "4", "--n-eval", "4", "--out", str(tmp_path), "--json"]
    _, output, _ = run_here(capsys, "discover", "--method", "eap", *words)
    scored = json.loads(output)["folder"]
    search = ("discover", "--method", "acdc", "--threshold", "0.01", "--start", scored, *words)
    status, _, errors = run_here(capsys, *search)
    assert status == 2
    assert "chooses none: give --start-size N to start from N of them" in errors
    _, output, _ = run_here(capsys, *search, "--start-size", "60", "--layers", "0,2-3")
    found = circuits.load_run(json.loads(output)["folder"])
    start = circuits.Circuit.load(scored).greedy(60)
    assert len(found.circuit - start) == 0
    tried = [edge for edge in start if re.search(r"->[am][023]", str(edge))]
    assert found.record["search_space"]["tried"] == len(tried)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("acdc", "--threshold", "0.1", "--layers", "one"), "--layers one names no layers"),
        (("acdc", "--threshold", "0.1", "--layers", "2-9"), "give layers of the graph"),
        (("eap", "--layers", "1"), "eap does not search, so it cannot be told where by --layers"),
        (("acdc", "--threshold", "0.1", "--start", "nowhere"), "nowhere"),
    ],
)
def test_a_search_that_cannot_be_told_so_is_refused(capsys, tmp_path, words, told):
    status, _, errors = run_here(
        capsys, "discover", "--n", "2", "--out", str(tmp_path), "--method", *words
    )
    assert status == 2
    assert told in errors


def test_ones_own_prompts_come_from_a_file(capsys, tmp_path):
    data = tmp_path / "mine.jsonl"
    prompt = "So {} is a really great friend, isn't"
    pairs = [
        (prompt.format(a), prompt.format(b)) for a, b in (("Mary", "John"), ("Sarah", "James"))
    ]
    lines = [
        {"clean": clean, "corrupted": corrupted, "answer": " she", "wrong_answer": " he"}
        for clean, corrupted in pairs
    ]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    status, output, errors = run_here(
        capsys,
        "discover",
        "--method",
        "eap",
        "--data",
        str(data),
        "--size",
        "20",
        "--out",
        str(tmp_path),
        "--json",
    )
    assert (status, errors) == (0, "")
    assert json.loads(output)["n_prompts"] == 2
    data.write_text("\n".join([json.dumps(lines[0]), '{"clean": "So']))
    status, _, errors = run_here(
        capsys, "discover", "--method", "eap", "--data", str(data), "--out", str(tmp_path)
    )
    assert status == 2
    assert "mine.jsonl, line 2" in errors


@pytest.mark.filterwarnings("always:task")
def test_pairs_that_do_not_fit_are_skipped_on_request_and_the_record_counts_them(capsys, tmp_path):
    data, out = tmp_path / "mine.jsonl", str(tmp_path / "runs")
    line = {"clean": "So Mary is", "corrupted": "So John is", "answer": " a", "wrong_answer": " he"}
    data.write_text("\n".join(map(json.dumps, [line, {**line, "corrupted": "So John"}])))
    words = ("discover", "--method", "eap", "--data", str(data), "--out", out, "--device", "cpu")
    status, _, errors = run_here(capsys, *words)
    assert status == 2 and "line 2" in errors and "reword one" in errors
    status, _, errors = run_here(capsys, *words, "--skip-misfits")
    assert status == 0 and "1 of 2 prompt pairs do not fit the model and are left out" in errors
    (folder,) = (tmp_path / "runs" / "mine").iterdir()
    record = json.loads((folder / "record.json").read_text())
    assert record["task"]["left_out"] == {"two prompts of different numbers of tokens": 1}
    # Prompts of a task instead of one's own have no misfits to skip.
    for more in ([], ["--task", "ioi", "--n", "2"]):
        words = ("evaluate", str(folder), "--size", "9", "--device", "cpu", *more)
        assert run_here(capsys, *words)[0] == 0


def test_only_the_prompts_of_the_search_are_called_those_it_was_found_on(capsys, tmp_path):
    first, other = tmp_path / "first.jsonl", tmp_path / "other.jsonl"
    for path, name in ((first, "Sarah"), (other, "Anna")):
        pair = {"clean": f"So {name}", "corrupted": "So John", "answer": " is"}
        path.write_text(json.dumps(pair))
    words = ("discover", "--method", "eap", "--metric", "negative_log_probability", "--size", "9")
    found = run_here(capsys, *words, "--data", str(first), "--out", str(tmp_path))[1]
    assert "those it was found on" in " ".join(found.split())
    (folder,) = (tmp_path / "first").iterdir()
    words = ("evaluate", str(folder), "--size", "9")
    again = run_here(capsys, *words)[1]
    assert "those it was found on" in " ".join(again.split())
    elsewhere = run_here(capsys, *words, "--data", str(other))[1]
    assert "1 prompts of other" in " ".join(elsewhere.split())
    assert "those it was found on" not in " ".join(elsewhere.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fly"], "there is no command 'fly'; there are discover"),
        (
            ["discover", "--method", "acdcd", "--threshold", "0.1"],
            "there is no method 'acdcd'; did you mean 'acdc'? there are acdc",
        ),
        (["discover", "--method", "missing.py"], "there is no Python file missing.py"),
        (
            ["discover", "--method", "random", "--task", "ioii"],
            "there is no task 'ioii'; did you mean 'ioi'",
        ),
        (
            ["discover", "--method", "random", "--model", "toy-word"],
            "there is no model or folder 'toy-word'",
        ),
        (["discover", "--method", "acdc", "--threshold", "-1"], "threshold=-1.0 must be"),
        (
            ["discover", "--method", "eap", "--metric", "kl", "--n", "2"],
            "the gradient of kl vanishes",
        ),
        (
            ["discover", "--method", "random", "--positions", "S3", "--n", "2", "--size", "5"],
            "has no span 'S3'",
        ),
        (
            ["discover", "--method", "random", "--task", "ioi", "--data", "x.jsonl"],
            "were both given",
        ),
        (["evaluate", "missing-folder"], "missing-folder holds no finished run"),
        (["discover", "--method", "random", "--device", "gpu"], "there is no device 'gpu'"),
        (["discover", "--method", "random", "--device", "meta"], "device 'meta' cannot be used"),
        (
            ["compare", "--methods", "random", "--n", "2", "--n-eval", "2", "--size", "480"],
            "--size 480: the circuit that random found has 479 edges",
        ),
        (
            ["discover", "--method", "random", "--n", "2", "--out", "/dev/null/runs"],
            "cannot be made",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_2(capsys, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run_here(capsys, *words)
    assert status == 2
    assert told in errors
    assert errors.splitlines()[-1].startswith("circuits: ")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        (
            "eap:speed=3",
            "eap has no setting 'speed'; there are metric, ablation, max_memory, gradient_at.",
        ),
        ("eap:gradient-at=both", "eap has no setting 'gradient-at'; did you mean 'gradient_at'?"),
        ("eap:metric", "metric has no value; write metric=VALUE."),
        ("attribution-graph", "needs transcoders; write attribution-graph:transcoders=VALUE."),
        ("acdc:threshold=x", "'threshold=x' has a wrong value; give float."),
        ("eap:max_memory=x", "'max_memory=x' has a wrong value; give int or None."),
        ("eap:gradient_at=here", "'gradient_at=here' has a wrong value; give clean or corrupted"),
        ("acdc:speculate=no", "'speculate=no' has a wrong value; give True or False."),
        ("acdc:threshold=0.1:threshold=0.2", "threshold is given twice."),
    ],
)
def test_a_setting_that_a_method_cannot_take_is_named_in_one_line(capsys, methods, told):
    status, output, errors = run_here(capsys, "compare", "--methods", f"random,{methods}")
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"circuits: --methods {methods!r}: ")
    assert told in errors


def test_a_threshold_that_is_no_number_is_named(capsys):
    status, output, errors = run_here(capsys, "compare", "--thresholds", "0.5,x")
    assert (status, output) == (2, "")
    assert errors == (
        "circuits: --thresholds '0.5,x': 'x' is no number; write numbers separated by commas.\n"
    )


def test_texts_that_look_like_markup_are_printed_as_they_are(capsys):
    frame = pd.DataFrame({"token": ["[bold]", ":smile:"]}, index=["[/INST]", "[red]"])
    terminal().print(frame_table(frame, "' x' -> '[/INST]'"))
    output = capsys.readouterr().out
    for text in ("' x' -> '[/INST]'", "[bold]", ":smile:", "[/INST]", "[red]"):
        assert text in output


def test_cuda_that_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, errors = run_here(capsys, "discover", "--method", "random", "--device", "cuda")
    assert status == 2
    assert "finds no CUDA here; use device='cpu'" in errors


def test_metrics_have_the_names_of_other_programs_too(capsys, tmp_path):
    words = ("discover", "--method", "eap", "--metric", "logit_diff", "--size", "9", *FEW)
    status, output, _ = run_here(capsys, *words, "--out", str(tmp_path), "--json")
    assert status == 0
    folder = json.loads(output)["folder"]
    words = ("evaluate", folder, "--size", "9", "--metrics", "kl, logit_diff", "--n", "2", "--json")
    status, output, _ = run_here(capsys, *words)
    assert status == 0 and list(json.loads(output)["values"]) == ["kl", "logit_difference"]


def test_list_names_what_there_is(capsys):
    content = json.loads(run_here(capsys, "list", "--json")[1])
    assert {"acdc", "eap", "eap-ig", "random", "activation-patching"} <= set(content["methods"])
    assert {"ioi", "greater_than", "docstring", "induction", "gendered_pronoun", "two_hop"} <= set(
        content["tasks"]
    )
    assert content["tasks"]["greater_than:digits=1"] == "" and "kl" in content["metrics"]


def test_list_of_a_model_says_how_well_it_does_every_task(capsys, only_shipped_tasks):
    words = ("list", "--model", "toy-world", "--n", "4")
    status, output, notes = run_here(capsys, *words)
    assert status == 0
    assert re.search(r"ioi +│ +4 │ +0 │ +1\.000 │", output)
    assert "task 'induction_prose': only 0 of 4 prompts fit toy-world" in notes
    content = json.loads(run_here(capsys, *words, "--json")[1])
    assert content["ioi"]["accuracy"] == 1 and content["induction_prose"]["accuracy"] is None
    assert content["ioi:corruption=swapped"]["prompts"] == 4


@pytest.mark.filterwarnings("always:task 'induction'")
def test_what_speaks_against_the_prompts_is_told_before_the_search(capsys, tmp_path):
    toy = circuits.load_model("toy-world")
    with torch.no_grad():
        toy.unembed.W_U.neg_()
    circuits.save_model(toy, tmp_path / "model")
    words = ("--model", str(tmp_path / "model"), "--method", "random", "--task", "induction")
    found, notes = found_by(capsys, tmp_path, *words)
    told = "circuits: note: task 'induction': the whole model does not clearly prefer the"
    assert notes.startswith(told) and "settings" not in found
    assert found_by(capsys, tmp_path, *words[2:])[1] == ""


@pytest.mark.filterwarnings("always:task 'ioi'")
def test_prompts_of_a_task_that_do_not_fit_are_counted_before_the_search(capsys, tmp_path):
    names = "Mary John Anna Paul Mark Sarah Emily James Robert Laura Zebediah"
    words = ("--method", "random", "--task", f"ioi:names={names}", "--n", "16")
    status, _, notes = run_here(capsys, "discover", *words, "--out", str(tmp_path), "--json")
    task = circuits.load_task(
        "ioi", circuits.load_model("toy-world"), n=16, split="train", names=names
    )
    told = f"task 'ioi': {len(task)} of 16 prompts fit the model, the others have a word that the"
    assert status == 0 and told in notes and 8 <= len(task) < 16


def test_a_task_of_the_command_takes_options(capsys, tmp_path, unchecked_types):
    words = ("--method", "random", "--size", "9", "--task", "ioi:corruption=swapped")
    found, _ = found_by(capsys, tmp_path, *words)
    swapped = circuits.load_task("ioi", circuits.load_model("toy-world"), n=2, corruption="swapped")
    assert (found["task"], found["prompts"]) == ("ioi", swapped.digest())
    again = json.loads(
        run_here(capsys, "evaluate", found["folder"], "--size", "9", "--n", "2", "--json")[1]
    )
    assert again["prompts"] == swapped.digest()
    status, _, errors = run_here(
        capsys, "discover", "--method", "eap", "--task", "ioi:corruption=no"
    )
    assert status == 2 and "corruption='no': choose 'abc' or 'swapped'" in errors


def found_by(capsys, tmp_path, *words: str) -> tuple[dict, str]:
    """What discover prints as JSON, and its notes."""
    status, output, errors = run_here(
        capsys, "discover", *words, *FEW, "--out", str(tmp_path), "--json"
    )
    assert status == 0, errors
    return json.loads(output), errors


@pytest.mark.parametrize("method", ["acdc", "batched-acdc"])
def test_a_threshold_that_removes_every_edge_is_told_with_one_that_does_not(
    capsys, tmp_path, method
):
    found, notes = found_by(capsys, tmp_path, "--method", method, "--threshold", "1000")
    assert found["edges"] == 0
    assert notes.startswith("circuits: note: every edge was removed (0 of 479 left): the largest")
    better = re.search(r"try --threshold (\S+)\.\n", notes)[1]
    found, notes = found_by(capsys, tmp_path, "--method", method, "--threshold", better)
    assert 0 < found["edges"] < 479 and notes == ""


def test_a_threshold_that_removes_every_edge_that_was_tried_is_told(capsys, tmp_path):
    search = ("--method", "acdc", "--layers", "3", "--threshold")
    found, notes = found_by(capsys, tmp_path, *search, "1000")
    assert 0 < found["edges"] < 479
    assert f"every edge tried was removed ({found['edges']} of 479 left)" in notes
    better = re.search(r"try --threshold (\S+)\.\n", notes)[1]
    assert found_by(capsys, tmp_path, *search, better)[1] == ""


def test_a_threshold_that_removes_no_edge_is_told(capsys, tmp_path):
    words = ("--method", "acdc", "--absolute", "--threshold", "0")
    found, notes = found_by(capsys, tmp_path, *words)
    assert found["edges"] == 479
    assert notes.startswith("circuits: note: no edge was removed (479 of 479 left): the smallest")


def test_a_size_larger_than_the_circuit_is_refused_in_terms_of_the_option(capsys, tmp_path):
    words = ("discover", "--method", "eap", *FEW, "--out", str(tmp_path), "--size")
    told = {"480": "--size 480: the circuit that eap found has 479 edges", "-1": "--size=-1: give"}
    for size, error in told.items():
        status, output, errors = run_here(capsys, *words, size)
        assert (status, output) == (2, "")
        assert error in errors


def test_compare_tells_thresholds_that_give_the_same_circuit(capsys, tmp_path):
    words = ("compare", "--methods", "acdc,random", "--thresholds", "0.1,500,1000", *FEW)
    status, output, _ = run_here(capsys, *words, "--out", str(tmp_path), "--json")
    assert status == 0
    told = "acdc: the thresholds 500 and 1000 give the same circuit."
    content = json.loads(output)
    assert content["notes"] == [told]
    assert told in Path(content["report"]).read_text()

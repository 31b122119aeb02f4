"""`circuits graph`: a prompt's attribution graph in a folder, its page and its mistakes."""

import json
import re
from pathlib import Path

import pytest

import circuits
from circuits.cli.main import main
from circuits.plotting.graph_page.server import open_server

PROMPT = "The capital of the state containing Dallas is"


def run_here(capsys, *words: str) -> tuple[int, str, str]:
    status = main(words)
    output, errors = capsys.readouterr()
    return status, output, errors


def test_a_graph_is_written_shown_and_found_again(capsys, tmp_path):
    words = (
        "graph",
        PROMPT,
        "--explain",
        " Austin",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--neuronpedia",
    )
    status, output, errors = run_here(capsys, *words)
    # A slow machine says what it does.
    assert status == 0 and re.fullmatch(r"(circuits: .* \.\.\.\n)*", errors)
    assert "replacement score: 0." in output and "f0." in output
    shown = " ".join(output.split())
    assert f"{PROMPT}' -> 'Austin': the 12 most influential of 146 active features" in shown
    assert "replacement score is the share of influence from tokens, not errors" in shown
    (folder,) = (tmp_path / "graphs").iterdir()
    assert folder.name.startswith("the-capital-of-the-state-containing")
    assert {path.name for path in folder.iterdir()} >= {
        "graph.safetensors",
        "record.json",
        "graph.html",
        "neuronpedia.json",
    }
    before = (folder / "record.json").read_bytes()
    status, output, _ = run_here(capsys, *words, "--json")
    found = json.loads(output)
    assert found["reused"] and found["folder"] == str(folder)
    assert (folder / "record.json").read_bytes() == before
    assert found["explained"] == ["Austin"] and 0 < found["kept_edges"] < found["edges"]
    graph = circuits.load_graph_run(folder).graph
    assert len(graph) == found["edges"] and graph.targets[0].label == "Austin"
    assert circuits.load_neuronpedia(folder / "neuronpedia.json").graph.words == graph.words
    assert "Austin" in (folder / "graph.html").read_text()


def test_groups_made_on_the_served_page_go_to_neuronpedia(toy_world, tmp_path):
    run = circuits.run_graph(
        circuits.AttributionGraph("toy-world-clt"), toy_world, PROMPT, out=tmp_path
    )
    assert run.groups == {}
    small = circuits.pruned(run.graph)
    one, two = (str(small.node(number)) for number in range(2))
    server = open_server(run.folder, 0)
    server.save(
        {
            "pinned": [],
            "supernodes": [{"name": "Texas", "nodes": [one]}, {"name": "Texas", "nodes": [two]}],
        }
    )
    server.server_close()
    assert circuits.load_graph_run(run.folder).groups == run.groups == {"Texas": [one, two]}
    path = circuits.save_neuronpedia(
        run.graph, tmp_path / "graph.json", slug="texas", groups=run.groups
    )
    assert {str(node) for node in circuits.load_neuronpedia(path).groups["Texas"]} == {one, two}


def test_a_graph_that_fails_leaves_no_folder_and_a_damaged_one_says_how_to_make_it_again(
    capsys, tmp_path
):
    words = ("graph", PROMPT, "--out", str(tmp_path), "--device", "cpu")
    assert run_here(capsys, *words, "--explain", " New York")[0] == 2
    assert list((tmp_path / "graphs").iterdir()) == []
    assert run_here(capsys, *words)[0] == 0
    (folder,) = (tmp_path / "graphs").iterdir()
    file = folder / "graph.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, _, errors = run_here(capsys, *words)
    assert (
        status == 2
        and errors.count("\n") == 1
        and f"To have it made again, delete the folder {folder}." in errors
    )
    assert file.exists()


def test_other_settings_make_another_folder(capsys, tmp_path):
    common = ("--out", str(tmp_path), "--device", "cpu", "--json")
    for words in (
        (),
        ("--explain", " Austin/ Sacramento"),
        ("--budget", "40"),
        ("--transcoders", "toy-world-plt"),
    ):
        assert main(("graph", PROMPT, *words, *common)) == 0
    assert len(list((tmp_path / "graphs").iterdir())) == 4
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((PROMPT, "--transcoders", "nowhere"), "nowhere"),
        (("",), "is empty"),
        ((" ".join(["the"] * 80),), "has 81 tokens and toy-world reads 64"),
        (("The xylophone is",), "does not know 'xylophone'"),
        ((PROMPT, "--explain", " New York"), "must be one token after"),
        ((PROMPT, "--model", "gpt2"), "which transcoders of gpt2?"),
        ((PROMPT, "--explain", "Austin/Austin"), "a token against itself"),
        ((PROMPT, "--node-threshold", "2"), "node_threshold=2.0"),
        ((PROMPT, "--leading", "20"), "no feature of 'toy-world-clt' is active"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tmp_path, words, message):
    status, output, errors = run_here(
        capsys, "graph", *words, "--out", str(tmp_path), "--device", "cpu"
    )
    assert (status, output) == (2, "")
    assert message in errors and errors.count("\n") == 1, errors


def test_the_page_starts_at_the_thresholds_asked_for_and_is_made_again_if_it_is_missing(
    capsys, tmp_path
):
    words = (
        "graph",
        PROMPT,
        "--explain",
        "Austin",
        "--node-threshold",
        "0.3",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--json",
    )
    assert main(words) == 0
    (folder,) = (tmp_path / "graphs").iterdir()
    page = (folder / "graph.html").read_text()
    assert 'id="node-threshold" min="0" max="1" step="0.01" value="0.3"' in page
    (folder / "graph.html").unlink()
    assert main(words) == 0
    assert (folder / "graph.html").read_text() == page
    capsys.readouterr()


def test_a_damaged_folder_is_refused_and_left_alone(capsys, tmp_path):
    words = ("graph", PROMPT, "--out", str(tmp_path), "--device", "cpu", "--json")
    assert main(words) == 0
    (folder,) = (tmp_path / "graphs").iterdir()
    file = folder / "graph.safetensors"
    file.write_bytes(content := file.read_bytes()[:200])
    capsys.readouterr()
    status, _, errors = run_here(capsys, *words)
    assert status == 2 and "truncated" in errors and file.read_bytes() == content
    assert main(("view", str(tmp_path / "nothing"))) == 2
    with pytest.raises(circuits.InputError, match="holds no finished graph"):
        circuits.load_graph_run(Path(tmp_path))


def test_a_task_is_discovered_on_the_command_line_and_evaluated_with_the_transcoders_it_remembers(
    capsys, tmp_path
):
    words = (
        "discover",
        "--method",
        "attribution-graph",
        "--transcoders",
        "toy-world-plt",
        "--task",
        "ioi",
        "--n",
        "4",
        "--n-eval",
        "8",
    )
    status, output, errors = run_here(
        capsys, *words, "--out", str(tmp_path), "--device", "cpu", "--json"
    )
    assert status == 0, errors
    folder = Path(json.loads(output)["folder"])
    status, output, _ = run_here(
        capsys, "evaluate", str(folder), "--n", "8", "--device", "cpu", "--json"
    )
    assert json.loads(output)["values"]["kl"]["circuit"] > 0
    status, _, errors = run_here(
        capsys, *words, "--split-embed", "--out", str(tmp_path), "--device", "cpu"
    )
    assert status == 2 and "makes its graph of features itself" in errors

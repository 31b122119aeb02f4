"""Several ranks, on the CPU: the circuit of one process, the same on every rank, whatever ends or
fails.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from architectures import random_model
from several_ranks import METHODS, TASKS, on_two_ranks, save_all
from test_run import tried

import circuits
from circuits.cli.main import main
from circuits.runs.circuit_run import CHECKPOINT, RECORD, load_run
from circuits.system.ranks import exchanged, gathered, in_slices, on_first, ranks, share, start

DISCOVER = [
    "discover",
    "--method",
    "acdc",
    "--threshold",
    "0.03",
    "--task",
    "ioi",
    "--n",
    "4",
    "--n-eval",
    "4",
    "--json",
]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--master-port=0",
    "--rdzv-backend=c10d",
]
TORCHRUN += ["--rdzv-endpoint=localhost:0"]
# The `--` keeps torchrun from taking --n for an option of its own.
COMMAND = [*TORCHRUN, "-m", "--", "circuits", *DISCOVER]


def begin(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory, new_process) -> Path:
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(new_process, save_all, folder)
    return folder


@pytest.fixture(scope="module")
def summaries(found) -> list[dict]:
    return [json.loads((found / str(rank) / "summary.json").read_text()) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:bfloat16 is simulated")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_find_the_circuit_of_one_process(found, method, task):
    """With one prompt, or one candidate at a time, there are more ranks than work."""
    first, second = (circuits.Circuit.load(found / str(rank) / task / method) for rank in range(2))
    assert first == second
    assert torch.equal(first.scores.nan_to_num(), second.scores.nan_to_num())
    alone = METHODS[method].discover(random_model(), TASKS[task]())
    assert torch.equal(first.kept, alone.kept)
    # What is computed together changes last bits; scores that are far from the threshold are not
    # confirmed, and left in the low precision.
    tolerance = 1e-5 if getattr(METHODS[method], "precision", None) is None else 1e-3
    torch.testing.assert_close(
        first.scores, alone.scores, rtol=1e-5, atol=tolerance, equal_nan=True
    )
    assert first.record.get("evaluations") == alone.record.get("evaluations")


def test_attributions_by_prompt_are_those_of_one_process(summaries):
    alone = circuits.EAP().attribute(random_model(), TASKS["several"]())
    for summary in summaries:
        assert summary["world"] == 2
        for name, expected in {
            "by_prompt": alone.edges_by_prompt,
            "positions": alone.sources_by_position,
            "neurons": alone.neurons,
        }.items():
            torch.testing.assert_close(torch.tensor(summary[name]), expected, rtol=1e-5, atol=1e-5)


def test_a_metric_of_ones_own_gets_all_rows_in_inference_mode_too(summaries):
    alone = METHODS["eap-own-metric"].discover(random_model(), TASKS["several"]())
    for summary in summaries:
        found = torch.tensor(summary["in inference mode"])
        torch.testing.assert_close(found, alone.scores, rtol=1e-5, atol=1e-5)


def test_a_finished_run_is_found_again_by_every_rank(summaries):
    assert [summary["reused"] for summary in summaries] == [[False, True]] * 2


def test_an_error_on_one_rank_is_raised_on_both(summaries):
    first, second = summaries
    assert first["vanishing"] == second["vanishing"]
    assert "the gradient of kl vanishes" in first["vanishing"]
    assert first["input error"] == second["input error"] == "SharedError: no number here"
    assert first["metric's error"] == second["metric's error"]
    assert "metric 'failing' fails with ValueError: no number here." in first["metric's error"]
    assert first["nan"] == second["nan"]
    assert first["nan"].startswith("SharedNotFiniteError: metric 'failing' is NaN or infinite on")
    # What is not for the user to mend keeps its traceback where it happened.
    assert second["mistake"] == "ValueError: no number here"
    assert first["mistake"] == "RankError: rank 1 failed: ValueError: no number here"


def test_a_rank_that_runs_out_of_memory_takes_smaller_steps_to_the_same_circuit(found):
    first, second = (
        circuits.Circuit.load(found / str(rank) / "little memory") for rank in range(2)
    )
    expected = circuits.Circuit.load(found / "0" / "several" / "acdc")
    assert torch.equal(first.kept, expected.kept)
    assert torch.equal(second.kept, expected.kept)
    torch.testing.assert_close(first.scores, expected.scores, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert first.record["batches"] > expected.record["batches"]


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def kill_second_rank(words: list[str], folder: Path) -> tuple[int, str]:
    """Start two ranks and kill one when ten decisions are made: the exit status, and what was
    said.
    """
    process = begin([*words, "--out", str(folder)])
    while process.poll() is None and not any(
        tried(path) >= 10 for path in folder.rglob(CHECKPOINT)
    ):
        time.sleep(0.005)
    (second,) = (child for child in psutil.Process(process.pid).children() if rank_of(child) == "1")
    second.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def discover(folder: Path) -> None:
    """Run the command in this process."""
    assert main([*DISCOVER, "--out", str(folder)]) == 0


def test_when_a_rank_is_killed_the_other_says_where_to_go_on_and_the_circuit_is_the_same(
    new_process, tmp_path
):
    status, errors = kill_second_rank(COMMAND, tmp_path / "killed")
    assert status != 0
    (line,) = (line for line in errors.splitlines() if line.startswith("circuits: "))
    (checkpoint,) = (tmp_path / "killed").rglob(CHECKPOINT)
    # Either its connection closed, or torchrun noticed first.
    assert re.match(r"circuits: (rank 1 ended|stopped by SIGTERM)", line)
    assert f"the state is in {checkpoint}: run the same command again." in line
    assert not (checkpoint.parent / RECORD).exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    on_two_ranks(new_process, discover, tmp_path / "killed")
    for name in ("alone", "whole"):
        discover(tmp_path / name)
    folders = [
        next((tmp_path / name).rglob(RECORD)).parent for name in ("killed", "alone", "whole")
    ]
    together, alone, whole = map(load_run, folders)
    assert [each.record["resumed"] for each in (together, alone, whole)] == [True, True, False]
    assert [each.record["ranks"] for each in (together, alone, whole)] == [2, 1, 1]
    for resumed in (together, alone):
        assert torch.equal(resumed.circuit.kept, whole.circuit.kept)
        torch.testing.assert_close(
            resumed.circuit.scores, whole.circuit.scores, rtol=1e-5, atol=1e-5, equal_nan=True
        )
    assert not list((tmp_path / "killed").rglob(CHECKPOINT))


ENDS = """
import os, signal
from circuits.system.ranks import RankError, exchanged, ranks, start
with start():
    assert exchanged(lambda: ranks().rank) == [0, 1]
    if ranks().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        exchanged(lambda: 0)
    except RankError as error:
        print(error)
"""


def test_a_rank_that_ends_is_noticed_without_torchruns_help():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
    }
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", ENDS],
            env={**environment, "RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    assert first.communicate(timeout=120)[0].startswith("rank 1 ended or cannot be reached (")
    second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, -signal.SIGKILL)


def test_a_mistake_is_told_once(tmp_path):
    process = begin(
        [
            *TORCHRUN,
            "-m",
            "--",
            "circuits",
            "discover",
            "--method",
            "eap",
            "--metric",
            "kl",
            "--n",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output == ""
    assert (
        len(
            [
                line
                for line in errors.splitlines()
                if line.startswith("circuits: the gradient of kl vanishes")
            ]
        )
        == 1
    )


def test_a_process_that_works_alone_measures_everything_itself_and_exchanges_nothing():
    with start():
        assert not torch.distributed.is_initialized()
    assert ranks() == (0, 1)
    assert share(7) == slice(0, 7)
    measured = torch.arange(7.0)
    assert in_slices(7, lambda mine: measured[mine]).data_ptr() == measured.data_ptr()
    assert gathered(lambda: [measured])[0] is measured
    assert exchanged(lambda: measured)[0] is measured
    assert on_first(lambda: measured) is measured


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_cover_the_work_and_differ_by_one_at_most(monkeypatch, world):
    for total in (0, 1, 5, 8, 17):
        done = []
        sizes = []
        for rank in range(world):
            monkeypatch.setattr(
                "circuits.system.ranks.ranks",
                lambda rank=rank: circuits.system.ranks.Ranks(rank, world),
            )
            done += list(range(total))[share(total)]
            sizes.append(len(range(total)[share(total)]))
        assert done == list(range(total))
        assert max(sizes) - min(sizes) <= 1

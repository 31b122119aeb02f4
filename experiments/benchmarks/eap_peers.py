"""How long do other packages take for EAP's scores, and do they agree?

    python experiments/benchmarks/eap_peers.py --venvs peers \\
        --out experiments/benchmarks/results/eap-peers-cpu.json

Every package runs in its own virtual environment, which this script makes. Weights and tokens are
identical; all run on one CPU thread in float32, and take turns with ours. A package that cannot be
installed or run is recorded as such.

- auto-circuit scores edges by the gradient of a mask (`mask_gradient_prune_scores`). That is EAP
  with our damage as its loss.
- transformer-lens 4 takes the gradient on the corrupted run (`attribution_patch`), position by
  position. With our damage as its metric and summed over positions, its scores are minus ours at
  `gradient_at="corrupted"`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import SHAPES, circumstances, random_model, random_task, write_results
from safetensors.torch import save_file

import circuits
from circuits.models import Model

# auto-circuit names no upper bounds; these are the newest versions of what it imports that it runs
# with.
PEERS: dict[str, dict[str, Any]] = {
    "auto-circuit": {
        "requirements": [
            "auto-circuit",
            "transformer-lens==2.18.0",
            "datasets<4",
            "pyarrow<20",
            "numpy<2",
            "safetensors",
        ],
        "ours": circuits.EAP(),
        "sign": 1,
    },
    "transformer-lens": {
        "requirements": ["transformer-lens>=4", "safetensors"],
        "ours": circuits.EAP(gradient_at="corrupted"),
        "sign": -1,
    },
}
SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Config:
    """Shape, prompts and repetitions."""

    venvs: Path
    """Folder outside of the project for the virtual environments.

    They are made there, or found from an earlier run.
    """
    shape: str = "4 layers, d_model 256"
    """A name in `common.SHAPES`."""
    prompts: int = 16
    """Prompts of 16 tokens."""
    repeats: int = 5
    """Timed repetitions, after one warm-up."""
    constraint: str = "torch==2.13.0"
    """A torch version that all environments share."""
    out: Path = Path("runs/benchmarks/eap-peers.json")
    """Result file."""


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = random_model(config.shape, "cpu")
    task = random_task(model, config.prompts, 16)
    config.venvs.mkdir(parents=True, exist_ok=True)
    case = write_case(config, model, task)
    results: dict[str, Any] = {
        "shape": config.shape,
        "prompts": config.prompts,
        **circumstances("cpu"),
        "peers": {},
    }
    for name, peer in PEERS.items():
        try:
            python = environment(config, name, peer["requirements"])
            results["peers"][name] = compare(python, name, peer, case, model, task, config)
        except subprocess.CalledProcessError as error:
            results["peers"][name] = {
                "failed": (error.stderr or error.stdout or str(error)).strip().splitlines()[-12:]
            }
        write_results(config.out, results)
        print(
            name,
            json.dumps(
                {key: value for key, value in results["peers"][name].items() if key != "seconds"},
                indent=1,
            ),
        )


def write_case(config: Config, model: Model, task: circuits.Task) -> Path:
    """Write weights and tokens to a folder that the other packages read."""
    folder = config.venvs / "case"
    folder.mkdir(exist_ok=True)
    assert task.answers is not None and task.wrong_answers is not None
    tokens = {
        "clean": task.clean,
        "corrupted": task.corrupted,
        "answers": task.answers,
        "wrong_answers": task.wrong_answers,
    }
    shape = {
        **SHAPES[config.shape],
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
    }
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()},
        folder / "model.safetensors",
    )
    write_results(
        folder / "case.json",
        {"config": shape, **{name: tensor.tolist() for name, tensor in tokens.items()}},
    )
    return folder


def environment(config: Config, name: str, requirements: list[str]) -> Path:
    """The interpreter of a package's virtual environment."""
    folder = (config.venvs / name).absolute()
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        run([sys.executable, "-m", "venv", str(folder)])
        constraints = config.venvs / "constraints.txt"
        constraints.write_text(config.constraint + "\n")
        run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--constraint",
                str(constraints),
                *requirements,
            ]
        )
        (folder / "ready").touch()
    return python


def compare(
    python: Path,
    name: str,
    peer: dict[str, Any],
    case: Path,
    model: Model,
    task: circuits.Task,
    config: Config,
) -> dict[str, Any]:
    """Time of both, and the difference of their scores from ours."""
    answer = case / f"{name}.json"
    process = subprocess.Popen(
        [str(python), str(SCRIPTS / f"{name.replace('-', '_')}_scores.py"), str(case), str(answer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PATH": ""},
    )
    assert process.stdin is not None and process.stdout is not None
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repetition in range(config.repeats + 1):
        print("again", file=process.stdin, flush=True)
        theirs = next(
            (line.split()[1] for line in process.stdout if line.startswith("seconds ")), None
        )
        if theirs is None:
            _, errors = process.communicate()
            raise subprocess.CalledProcessError(process.returncode, name, stderr=errors)
        start = time.perf_counter()
        circuit = peer["ours"].discover(model, task)
        if repetition:
            seconds["ours"].append(time.perf_counter() - start)
            seconds["theirs"].append(float(theirs))
    process.communicate("stop\n")
    theirs_by_edge = json.loads(answer.read_text())
    ours = dict(zip(map(str, circuit.graph.edges), circuit.scores.tolist(), strict=True))
    shared = sorted(ours.keys() & theirs_by_edge["scores"].keys())
    a, b = (
        torch.tensor([scores[edge] for edge in shared])
        for scores in (ours, theirs_by_edge["scores"])
    )
    return {
        "versions": theirs_by_edge["versions"],
        "edges": {
            "ours": len(ours),
            "theirs": len(theirs_by_edge["scores"]),
            "shared": len(shared),
        },
        "median_seconds": {who: statistics.median(values) for who, values in seconds.items()},
        "times_slower": statistics.median(
            y / x for x, y in zip(seconds["ours"], seconds["theirs"], strict=True)
        ),
        "largest_difference_over_largest_score": float(
            (a - peer["sign"] * b).abs().max() / a.abs().max()
        ),
        "correlation": float(torch.corrcoef(torch.stack([a, peer["sign"] * b]))[0, 1]),
        "seconds": seconds,
    }


def run(command: list[str]) -> None:
    """Run a command; raise an error if it fails."""
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    main(tyro.cli(Config))

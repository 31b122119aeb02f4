"""Cases computed by other people's code: models, prompts and their results, under our names."""

import json
from pathlib import Path
from typing import Any

import torch
from architectures import skip_if_lacked
from safetensors.torch import load_file

from circuits.models import Model, build_model
from circuits.tasks.task import Task

DATA = Path(__file__).parent / "data"
COMPILED = tuple(sorted(path.stem for path in (DATA / "tracr").glob("*.json")))
HAND_WIRED = tuple(sorted(path.stem for path in (DATA / "known_circuits").glob("*.json")))


def case(path: str) -> dict[str, Any]:
    return json.loads((DATA / f"{path}.json").read_text())


def case_model(config: dict[str, Any], weights: str, dtype: torch.dtype = torch.float32) -> Model:
    skip_if_lacked(config)
    return build_model(config, load_file(DATA / f"{weights}.safetensors"), dtype=dtype)


def scored_everywhere_task(content: dict[str, Any], mode: str) -> Task:
    """The prompts of a compiled or hand-wired model; `resample_pad` shortens the corrupted ones."""
    clean = torch.tensor(content["clean"])
    corrupted = torch.tensor(content["corrupted_pad" if mode == "resample_pad" else "corrupted"])
    scored = torch.zeros_like(clean, dtype=torch.bool)
    scored[:, content["score_positions"]] = True
    return Task.from_tokens(clean, corrupted, answer_positions=scored, metric="squared_error")


def our_edge(source: str, target: str, *, embed: str = "tok_embed") -> str:
    """Their `embed` and `input` are the token embedding (in ACDC's code the whole one); a slot is
    written `.q`, `<q>` or `.q_input`.
    """
    source = embed if source in ("embed", "input") else source
    return f"{source}->{target.replace('<', '.').replace('>', '').replace('_input', '')}"

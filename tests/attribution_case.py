"""The attribution graphs that circuit-tracer 0.5.0 computed of two random models, and the same
models and transcoders as ours.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from published import DATA
from safetensors.torch import load_file
from torch import Tensor

from circuits.models import Model, build_model
from circuits.transcoders.activations import JumpReLU
from circuits.transcoders.transcoder import Encoder, Transcoders

SMALL, LARGE = "attribution_graph_case", "attribution_graph_case_large"
# (case, run, transcoders)
RUNS = [
    (SMALL, "clt_full", "clt"),
    (SMALL, "clt_top128", "clt"),
    (SMALL, "plt_full", "plt"),
    (SMALL, "pltskip_top128", "pltskip"),
    (LARGE, "clt_top512", "clt"),
]
SHAPE = (
    "n_layers",
    "d_model",
    "n_heads",
    "d_head",
    "d_mlp",
    "d_vocab",
    "n_ctx",
    "act_fn",
    "normalization_type",
    "eps",
)


@dataclass(frozen=True)
class Run:
    """What circuit-tracer computed: its numbers of one run, and its settings."""

    case: str
    name: str
    kind: str

    @property
    def settings(self) -> dict[str, Any]:
        return case_files(self.case)[2]["runs"][self.name]

    @property
    def budget(self) -> tuple[int | None, int]:
        """Feature nodes, and how many were chosen at a time: four batches."""
        given = self.settings["kwargs"]
        return given.get("max_feature_nodes"), 4 * given.get("batch_size", 512)

    def expected(self, what: str) -> Tensor:
        return case_files(self.case)[1][f"{self.name}.{what}"]

    def adjacency(self) -> Tensor:
        files = case_files(self.case)[1]
        if f"{self.name}.adjacency" in files:
            return files[f"{self.name}.adjacency"]
        starts, columns, values = (
            self.expected(f"adj_{part}") for part in ("rowptr", "cols_i16", "values")
        )
        dense = torch.zeros(len(starts) - 1, len(starts) - 1)
        dense[torch.arange(len(dense)).repeat_interleave(starts.long().diff()), columns.long()] = (
            values
        )
        return dense


@cache
def case_files(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    folder = DATA / case
    return (
        load_file(folder / "case.safetensors"),
        load_file(folder / "expected.safetensors"),
        json.loads((folder / "expected.json").read_text()),
    )


def case_model(case: str) -> Model:
    weights, _, content = case_files(case)
    config = {name: content["config"][name] for name in SHAPE}
    return build_model(
        config,
        {
            name.removeprefix("model."): part
            for name, part in weights.items()
            if name.startswith("model.")
        },
        device="cpu",
    )


def case_tokens(case: str) -> Tensor:
    return case_files(case)[0]["tokens"].long()


def case_transcoders(case: str, kind: str) -> Transcoders:
    weights, prefix = case_files(case)[0], "clt" if kind == "clt" else "plt"
    layers = range(case_files(case)[2]["config"]["n_layers"])

    def part(name: str) -> list[Tensor]:
        return list(weights[f"{prefix}.{name}"])

    encoders = [
        Encoder(weight, bias, JumpReLU(threshold))
        for weight, bias, threshold in zip(
            part("W_enc"), part("b_enc"), part("threshold"), strict=True
        )
    ]
    if kind == "clt":
        return Transcoders(
            encoders, [weights[f"clt.W_dec_{layer}"] for layer in layers], part("b_dec"), name="clt"
        )
    return Transcoders(
        encoders,
        [decoder[:, None] for decoder in part("W_dec")],
        part("b_dec"),
        part("W_skip") if kind == "pltskip" else None,
        reads="mlp_input",
        writes="mlp",
        name=kind,
    )

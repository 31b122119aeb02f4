"""Graph JSON of the EAP-IG package (github.com/hannamw/EAP-IG, also used by the MIB benchmark): import and export.

There, edges are written `a5.h5->a9.h9<q>`, the embedding is called `input`, and scores are divided by the number of prompts once more than ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from circuits.graph.circuit import Circuit
from circuits.graph.edges import Edge, parse_edge
from circuits.graph.graph import Graph
from circuits.graph.nodes import Embed, Node, PosEmbed, TokenEmbed
from circuits.models import Model
from circuits.models.component_graph import component_graph
from circuits.system.errors import InputError
from circuits.system.files import write_bytes

THEIR_EMBED = "input"


def edge_to_eap_ig(edge: Edge) -> str:
    """The edge's name in EAP-IG's files.

    Raises:
        InputError: such an edge has no name there (it is at a position, or comes from the position embedding).
    """
    if "@" in str(edge) or isinstance(edge.source, PosEmbed):
        raise InputError(
            f"EAP-IG's files cannot hold {edge}: they know no positions and no position embedding."
        )
    source = THEIR_EMBED if isinstance(edge.source, Embed | TokenEmbed) else str(edge.source)
    return f"{source}->{edge.target}" + (f"<{edge.slot}>" if edge.slot else "")


def edge_from_eap_ig(name: str, *, embed: str = "embed") -> Edge:
    """The edge that a name in EAP-IG's files means; `embed` is what its `input` is called here (`tok_embed` in a split graph).

    Raises:
        InputError: the name is of another form.
    """
    return parse_edge(
        re.sub(rf"^{THEIR_EMBED}->", f"{embed}->", re.sub(r"<([qkv])>$", r".\1", name))
    )


def save_eap_ig(circuit: Circuit, path: str | Path, *, n_prompts: int = 1) -> Path:
    """Write a circuit as EAP-IG's graph JSON, which its `Graph.from_json` reads.

    Args:
        n_prompts: divide scores by it, as EAP-IG's are by the number of prompts.

    Raises:
        InputError: the circuit keeps edges that these files cannot hold, or its graph was not made from a model.
    """
    graph = circuit.graph
    if graph.model is None:
        raise InputError(
            "this graph was not made from a model, and EAP-IG's files say the model's shape; use component_graph(model)."
        )
    shape = graph.model.shape
    config = {name: shape[name] for name in ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")}
    edges, used = {}, set()
    for edge, score, kept in zip(
        graph.edges, circuit.scores.tolist(), circuit.kept.tolist(), strict=True
    ):
        if isinstance(edge.source, PosEmbed) and not kept:
            continue
        edges[edge_to_eap_ig(edge)] = {"score": score / n_prompts, "in_graph": kept}
        used |= {edge.source, edge.target} if kept else set()
    nodes = {
        _their_name(node): {"in_graph": node in used}
        for node in graph.nodes
        if not isinstance(node, PosEmbed)
    }
    return write_bytes(
        Path(path), json.dumps({"cfg": config, "nodes": nodes, "edges": edges}).encode()
    )


def load_eap_ig(
    path: str | Path, model: Model, *, n_prompts: int = 1, graph: Graph | None = None
) -> Circuit:
    """Read EAP-IG's graph JSON as a circuit of `model`.

    Args:
        n_prompts: multiply scores by it, since EAP-IG's are divided by the number of prompts once too often (its `exact` ones are not).
        graph: None takes the plain component graph; in one with a split embedding, `input` is `tok_embed`.

    Raises:
        InputError: the file is not such a graph, or belongs to a model of another shape.
    """
    graph = component_graph(model) if graph is None else graph
    content = _read(Path(path))
    embed = "tok_embed" if any(isinstance(node, TokenEmbed) for node in graph.nodes) else "embed"
    scores, kept = torch.full((len(graph),), torch.nan), torch.zeros(len(graph), dtype=torch.bool)
    for name, entry in content["edges"].items():
        try:
            index = graph.index(edge_from_eap_ig(name, embed=embed))
            scores[index], kept[index] = float(entry["score"]) * n_prompts, bool(entry["in_graph"])
        except InputError as error:
            raise InputError(f"{path} does not fit {model.cfg.model_name}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: edge {name} has no score and in_graph; it is not a graph JSON of EAP-IG."
            ) from error
    return Circuit(
        graph,
        scores,
        kept,
        selected=not bool(kept.all()),
        record={"imported_from": Path(path).name},
    )


def _their_name(node: Node) -> str:
    return THEIR_EMBED if isinstance(node, Embed | TokenEmbed) else str(node)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("edges"), dict):
        raise InputError(f"{path} is not a graph JSON of EAP-IG: it has no object 'edges'.")
    return content

"""Import and export of EAP-IG's graph JSON (github.com/hannamw/EAP-IG, also used by MIB).

EAP-IG writes an edge as `a5.h5->a9.h9<q>`, calls the embedding `input`, and divides scores by the
number of prompts once more than this package does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from circuits.formats.validation import read_checked_json
from circuits.graph.circuit import Circuit, check_is_circuit
from circuits.graph.edges import Edge, parse_edge
from circuits.graph.graph import Graph, check_is_graph
from circuits.graph.nodes import Embed, Node, PosEmbed, TokenEmbed
from circuits.models import Model, shape_of
from circuits.models.component_graph import component_graph
from circuits.system.errors import InputError
from circuits.system.files import path_of, write_bytes
from circuits.system.numbers import WholeNumber, whole

EAP_IG_EMBED = "input"
LARGEST = torch.finfo(torch.float32).max
CONFIG_FIELDS = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")


class EdgeEntry(TypedDict):
    """An edge of a file."""

    score: float
    in_graph: bool


EdgeEntries = dict[str, EdgeEntry]


class GraphFile(TypedDict):
    """A file. It holds more, which is not read."""

    edges: EdgeEntries


GRAPH_FILE = TypeAdapter(GraphFile)


def edge_to_eap_ig(edge: Edge) -> str:
    """Write an edge as EAP-IG's files do.

    Raises:
        InputError: the edge is at a position, or its source is the position embedding.
    """
    if "@" in str(edge) or isinstance(edge.source, PosEmbed):
        raise InputError(
            f"EAP-IG's files cannot hold {edge}: they have no positions and no position embedding; "
            "use a circuit over component_graph(model)."
        )
    slot = f"<{edge.slot}>" if edge.slot else ""
    return f"{_node_name(edge.source)}->{edge.target}{slot}"


def edge_from_eap_ig(name: str, *, embed: str = "embed") -> Edge:
    """Parse an edge of EAP-IG's files.

    Args:
        name: for example `a5.h5->a9.h9<q>`.
        embed: what EAP-IG's `input` is here: `tok_embed` in a graph that splits the embedding.

    Raises:
        InputError: the name has another form.
    """
    return parse_edge(re.sub(f"^{EAP_IG_EMBED}->", f"{embed}->", name))


def save_eap_ig(circuit: Circuit, path: str | Path, *, n_prompts: WholeNumber = 1) -> Path:
    """Write a circuit as EAP-IG's graph JSON, which its `Graph.from_json` reads.

    Args:
        circuit: over the component graph of a model, without positions.
        n_prompts: scores are divided by it, as EAP-IG divides by the number of prompts.

    Raises:
        InputError: the circuit keeps an edge that EAP-IG cannot write, or is not over a model.

    >>> import circuits, json, tempfile
    >>> graph = circuits.component_graph(circuits.load_model("toy-world"))
    >>> circuit = circuits.Circuit.from_edges(graph, ["embed->m0", "a0.h1->logits"])
    >>> path = circuits.save_eap_ig(circuit, tempfile.mkdtemp() + "/graph.json")
    >>> sum(edge["in_graph"] for edge in json.loads(path.read_text())["edges"].values())
    2
    """
    check_is_circuit(circuit)
    n_prompts = whole(n_prompts, "n_prompts", least=1)
    graph = circuit.graph
    if graph.model is None:
        raise InputError(
            "this graph was not made from a model, whose shape EAP-IG's files need; "
            "use component_graph(model)."
        )
    shape = graph.model.shape
    content = {
        "cfg": {name: shape[name] for name in CONFIG_FIELDS},
        "nodes": _node_entries(circuit),
        "edges": _edge_entries(circuit, n_prompts),
    }
    text = json.dumps(content)
    return write_bytes(path_of(path), text.encode())


def _node_entries(circuit: Circuit) -> dict[str, dict[str, bool]]:
    used = set(circuit.nodes)
    written = [node for node in circuit.graph.nodes if not isinstance(node, PosEmbed)]
    return {_node_name(node): {"in_graph": node in used} for node in written}


def _edge_entries(circuit: Circuit, n_prompts: int) -> EdgeEntries:
    entries: EdgeEntries = {}
    edges, scores = circuit.graph.edges, circuit.scores.tolist()
    for edge, score, in_graph in zip(edges, scores, circuit.kept.tolist(), strict=True):
        # EAP-IG has no position embedding: edges from it are left out, and refused if kept.
        if in_graph or not isinstance(edge.source, PosEmbed):
            name = edge_to_eap_ig(edge)
            # EAP-IG divides by the number of prompts.
            divided = score / n_prompts
            entries[name] = {"score": divided, "in_graph": in_graph}
    return entries


def load_eap_ig(
    path: str | Path, model: Model, *, n_prompts: WholeNumber = 1, graph: Graph | None = None
) -> Circuit:
    """Read EAP-IG's graph JSON as a circuit of `model`.

    Args:
        n_prompts: scores are multiplied by it, because EAP-IG divides by the number of prompts once
            too often (except in scores of its `exact` method).
        graph: by default the component graph. If it splits the embedding, `input` is `tok_embed`.

    Raises:
        InputError: the file is not a graph JSON of EAP-IG, or belongs to a model of another shape.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> circuit = circuits.Circuit.from_edges(circuits.component_graph(model), ["embed->m0"])
    >>> path = circuits.save_eap_ig(circuit, tempfile.mkdtemp() + "/graph.json")
    >>> circuits.load_eap_ig(path, model)
    Circuit(1 of 479 edges)
    """
    n_prompts = whole(n_prompts, "n_prompts", least=1)
    graph = component_graph(model) if graph is None else graph
    check_is_graph(graph)
    path = path_of(path)
    file = read_checked_json(path, GRAPH_FILE, "graph JSON of EAP-IG")
    try:
        scores, kept = _scores_and_kept(file["edges"], n_prompts, graph)
    except InputError as error:
        raise InputError(f"{path} does not fit {shape_of(model).model_name}: {error}") from error
    record = {"imported_from": path.name}
    return Circuit(graph, scores, kept, selected=not bool(kept.all()), record=record)


def _scores_and_kept(entries: EdgeEntries, n_prompts: int, graph: Graph) -> tuple[Tensor, Tensor]:
    embed = "tok_embed" if TokenEmbed() in graph.nodes else "embed"
    n_edges = len(graph)
    scores = torch.full((n_edges,), torch.nan, dtype=torch.float32)
    kept = torch.zeros(n_edges, dtype=torch.bool)
    for name, entry in entries.items():
        index = graph.index(edge_from_eap_ig(name, embed=embed))
        score = entry["score"] * n_prompts
        # NaN is an edge that was never scored.
        if abs(score) > LARGEST:
            raise InputError(
                f"the score of {name} is {score}, which is too large for float32; correct it."
            )
        scores[index] = score
        kept[index] = entry["in_graph"]
    return scores, kept


def _node_name(node: Node) -> str:
    return EAP_IG_EMBED if isinstance(node, Embed | TokenEmbed) else str(node)

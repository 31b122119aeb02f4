"""Circuits that people found by hand in published models, to compare a method's circuits with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from circuits.graph.circuit import Circuit
from circuits.graph.components import Components
from circuits.graph.graph import Graph
from circuits.graph.identity import ModelIdentity
from circuits.models import Model, check_fits
from circuits.models.component_graph import component_graph
from circuits.system.arguments import checked_arguments
from circuits.system.errors import InputError
from circuits.system.messages import suggestion

FILE = Path(__file__).parents[2] / "assets" / "published_circuits.json"


@checked_arguments
def published_circuit(name: str, model: Model | None = None) -> Circuit:
    """Return a published circuit, as the edges that the ACDC repository takes it to have.

    >>> import circuits
    >>> circuit = circuits.published_circuit("ioi")
    >>> circuit
    Circuit(963 of 32,491 edges)
    >>> circuit.record["groups"]["name mover"]
    ['a9.h9', 'a10.h0', 'a9.h6']

    The circuits:

    - "ioi", in GPT-2 small: 963 edges between the embedding, all MLPs, the logits and the 26 heads
      of Wang et al. 2022 (https://arxiv.org/abs/2211.00593), in seven groups.
    - "greater_than", in GPT-2 small: 235 edges between the embedding, all MLPs, the logits and 9
      heads, after Hanna et al. 2023 (https://arxiv.org/abs/2305.00586), in five groups. MLPs 4 to 7
      belong to no group.
    - "docstring", in attn-only-4l: 24 edges between the embedding, the logits and 6 heads, after
      Heimersheim and Janiak 2023 (https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn), without
      groups.

    The papers name components; the edges between them are those of the functions
    `get_ioi_true_edges`, `get_greaterthan_true_edges` and `get_docstring_subgraph_true_edges` of
    Conmy et al. 2023 (https://arxiv.org/abs/2304.14997, code at
    https://github.com/ArthurConmy/Automatic-Circuit-Discovery). That code also counts one edge
    within each slot of a head (78, 27 and 13 more), which here is part of the head. The token and
    the position embedding are one node, `embed`. Scores are NaN: nobody has measured the edges one
    by one.

    Args:
        name: "ioi", "greater_than" or "docstring".
        model: the model, which the circuit's graph is then made for; None makes the graph from the
            known shape. The heads mean something in the model they were found in only: other
            models of that shape are not refused.

    Returns:
        The circuit. Its record has the `model`, `paper` and `code` it is from, and `groups`: lists
        of nodes by name.

    Raises:
        InputError: there is no such circuit, or the model has another shape.
    """
    published = json.loads(FILE.read_text())
    if name not in published:
        known = suggestion(name, published)
        raise InputError(f"there is no published circuit {name!r}; {known}")
    record = published[name]
    shape = record.pop("shape")
    graph = Graph.complete(Components(**shape), None, causal=True)
    # Nothing is known of the weights here.
    graph = replace(graph, model=ModelIdentity(record["model"], shape, weights=""))
    if model is not None:
        own = component_graph(model)
        check_fits(model, graph)
        graph = own
    edges = []
    for source, targets in record.pop("edges").items():
        edges += [f"{source}->{target}" for target in targets.split()]
    found = Circuit.from_edges(graph, edges)
    return replace(found, record={"method": "published", "name": name, **record})

"""Edge attribution patching: every edge's damage predicted from a gradient.

EAP: Syed, Rager and Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery"
(https://arxiv.org/abs/2310.10348). EAP-IG: Hanna, Pezzelle and Belinkov 2024, "Have Faith in
Faithfulness" (https://arxiv.org/abs/2403.17806).

Both are difference times gradient (`gradients.edge_scores`), and differ in where the gradient is
taken. Scores differ from the published code's in scale and sign: ours are the predicted damage,
mean over scored rows, of ablating the edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

from typing_extensions import override

from circuits.discovery.gradients.edge_scores import GradientPoint
from circuits.discovery.gradients.gradient_method import GradientMethod, Nodes
from circuits.graph.nodes import MLP, Head, Node
from circuits.system.errors import InputError

# Where EAP takes gradients on the line from the corrupted run, 0, to the clean run, 1.
FRACTIONS = {"clean": [1.0], "corrupted": [0.0], "both": [0.0, 1.0]}


@dataclass(frozen=True)
class EAP(GradientMethod):
    """Score every edge by (corrupted - clean) . gradient.

    One forward pass on the corrupted prompts, and one forward and backward pass on the clean ones.
    Cheap, and blind where the metric saturates: KL, whose gradient vanishes at the clean run, is
    refused there.

    Reference: Syed et al. 2023, https://arxiv.org/abs/2310.10348

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead.
        gradient_at: the run on which the gradient is taken, as in Nanda's attribution-patching note
            for "corrupted"; "both" is the mean of the two, a good cheap baseline.
        max_memory: bytes that a run may take on top of model and task; None chooses from the memory
            that is free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> circuits.EAP().discover(model, circuits.load_task("ioi", model, n=4)).top(20)
    Circuit(20 of 479 edges)
    """

    name: ClassVar[str] = "eap"
    gradient_at: Literal["clean", "corrupted", "both"] = "clean"

    @override
    def points(self, nodes: Nodes) -> list[GradientPoint]:
        return list(map(GradientPoint, FRACTIONS[self.gradient_at]))


@dataclass(frozen=True)
class EAPIG(GradientMethod):
    """EAP with integrated gradients: the gradient averaged from the corrupted to the clean run.

    Reference: Hanna et al. 2024, https://arxiv.org/abs/2403.17806

    Attributes:
        metric: what damage is measured in.
        ablation: what an ablated edge carries instead; the line starts at the ablated embedding.
        steps: the number of gradients taken along each line.
        along: "inputs" moves the embeddings; "activations" moves what one sub-layer writes, each in
            turn: 2 n_layers + 1 lines.
        quadrature: "midpoint" takes the middles of equal pieces of the line; "left" their corrupted
            ends, as the published code does.
        max_memory: bytes that a run may take on top of model and task; None chooses from the memory
            that is free.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> task = circuits.load_task("ioi", model, n=4)
    >>> circuits.EAPIG(steps=3).discover(model, task).top(20)
    Circuit(20 of 479 edges)
    """

    name: ClassVar[str] = "eap-ig"
    steps: int = 5
    along: Literal["inputs", "activations"] = "inputs"
    quadrature: Literal["midpoint", "left"] = "midpoint"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(
                f"steps={self.steps}: at least one gradient must be taken; 5 is usual."
            )

    @override
    def points(self, nodes: Nodes) -> list[GradientPoint]:
        # alpha_k = (k + 1/2) / m, or k / m with the published code's left ends
        offset = 0.5 if self.quadrature == "midpoint" else 0.0
        fractions = [(step + offset) / self.steps for step in range(self.steps)]
        lines = [()] if self.along == "inputs" else _sub_layers(nodes)
        return [GradientPoint(fraction, line) for line in lines for fraction in fractions]


def _sub_layers(nodes: Nodes) -> list[Nodes]:
    """The embeddings, each layer's heads together, and each MLP."""

    def sub_layer(node: Node) -> object:
        if isinstance(node, Head | MLP):
            return type(node), node.layer
        return "embeddings"

    groups = groupby(nodes, key=sub_layer)
    return [tuple(group) for _, group in groups]

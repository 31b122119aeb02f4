"""Numbers that are not finite: refused by every method, with the parameter that is at fault."""

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from architectures import of_hooked_transformers, random_model, random_task, weight
from test_discoverers import METHODS, made

import circuits
from circuits.models import HAS_HOOKED_TRANSFORMER, cause
from circuits.models.running import run_to_residual


@dataclass(frozen=True)
class OwnForward(circuits.CircuitDiscoverer):
    """A user's method that runs the model itself, and checks nothing.

    Reference: none; an example.

    Attributes:
        scale: what the scores are multiplied by.
        scores: instead of those that it computes.
    """

    name: ClassVar[str] = "own-forward"
    scale: float = 1.0
    scores: torch.Tensor | None = None

    def discover(self, model, task, *, graph=None, checkpoint=None, progress=None):
        graph = circuits.component_graph(random_model("gpt2"))
        logits = model(task.clean)[:, -1].sum()
        scores = self.scale * logits.detach() * torch.ones(len(graph))
        scores = scores if self.scores is None else self.scores
        return circuits.Circuit.full(graph, scores)


IN_BRIDGES = {
    "blocks.0.attn.W_Q": "layers.0.attn.q.weight",
    "blocks.1.attn.W_V": "layers.1.attn.v.weight",
    "blocks.0.mlp.W_in": "layers.0.mlp.fc_in.weight",
    "blocks.1.mlp.W_in": "layers.1.mlp.fc_in.weight",
    "blocks.0.mlp.b_out": "layers.0.mlp.fc_out.bias",
    "unembed.W_U": "head.weight",
}


def called(name: str) -> str:
    """What a weight is called in messages."""
    return name if HAS_HOOKED_TRANSFORMER else IN_BRIDGES.get(name, name)


def broken(name: str, value: float):
    """The model of all tests with one entry changed."""
    model = random_model("gpt2")
    part = weight(model, name)
    part[(0,) * (part.dim() - 1)][3] = value
    return model


COMPUTING = {name: each for name, each in METHODS.items() if name not in ("random", "input-only")}
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.filterwarnings("ignore:random")
@pytest.mark.parametrize("method", COMPUTING.values(), ids=COMPUTING)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.0.attn.W_Q", NAN),
        ("blocks.1.mlp.W_in", INFINITY),
        ("blocks.0.mlp.W_in", 1e30),
        ("blocks.1.attn.W_V", 1e30),
        ("blocks.0.mlp.b_out", 1e20),
    ],
)
def test_weights_that_are_not_finite_or_far_too_large_are_named(method, name, value):
    """TransformerLens would hide the first, whose patterns it sets to 0, and a norm the last."""
    too_large = f"the largest {value:.1e} in {called(name)}: look for damaged weights"
    is_finite = torch.tensor(value).isfinite()
    message = (
        too_large if is_finite else f"entries of {called(name)} are not finite (NaN or infinite)"
    )
    with pytest.raises(circuits.InputError, match=re.escape(message)) as caught:
        made(method).discover(broken(name, value), random_task())
    assert "dtype" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_details_feature_graphs_and_evaluations_refuse_them_too(toy_world):
    model = deepcopy(toy_world)
    weight(model, "blocks.1.mlp.W_in")[3, 4] = 1e30
    task = circuits.load_task("ioi", toy_world, n=2)
    whole = circuits.Circuit.full(circuits.component_graph(toy_world))
    told = re.escape("1.0e+30 in " + called("blocks.1.mlp.W_in"))
    for run in (
        lambda: circuits.EAP().attribute(model, task),
        lambda: circuits.AttributionGraph("toy-world-plt").attribute(model, task.prompts[0].clean),
        lambda: circuits.model_logits(model, task),
        lambda: circuits.evaluate(model, whole, task),
    ):
        with pytest.raises(circuits.InputError, match=told):
            run()


def test_scores_of_a_users_own_forward_pass_are_checked():
    for name, value in (("unembed.b_U", INFINITY), ("unembed.W_U", 3e38)):
        with pytest.raises(circuits.InputError, match=called(name)):
            OwnForward().discover(broken(name, value), random_task())
    with pytest.raises(circuits.InputError, match="110 scores are infinite"):
        OwnForward(scale=1e38).discover(random_model("gpt2"), random_task())


def test_scores_that_were_never_made_are_no_error_where_the_model_is_sound():
    model, task = random_model("gpt2"), random_task()
    never = circuits.Circuit.full(circuits.component_graph(model)).scores
    assert OwnForward(scores=never).discover(model, task).scores.isnan().all()


def test_products_that_overflow_are_refused_although_the_logits_are_finite():
    """Outputs that a user gives are no weights."""
    model, task = random_model("gpt2"), random_task()
    nodes = {edge.source for edge in circuits.component_graph(model).edges}
    outputs = {node: torch.zeros(1, 1, 24) for node in nodes}
    outputs[max(nodes, key=str)] = torch.full((1, 1, 24), 3e38)
    ablation = circuits.Ablation("given", outputs=outputs)
    large = circuits.Metric("large", lambda logits, *_: 1e4 * logits[:, 0], "lower_is_damage")
    with pytest.raises(circuits.InputError, match=r"NaN or infinite: .* given outputs that"):
        circuits.EAP(metric=large, ablation=ablation).discover(model, task)


def test_a_small_dtype_is_named_where_it_is_the_cause():
    model = random_model("gpt2", dtype=torch.float16)
    assert "dtype=torch.float32 (or torch.bfloat16" in cause(model)
    weight(model, "blocks.1.mlp.W_in")[3, 4] = INFINITY
    name = called("blocks.1.mlp.W_in")
    told = f"{name} are not finite (NaN or infinite); load it with dtype=torch.float32"
    assert told in cause(model)


@of_hooked_transformers
def test_large_activations_that_no_norm_reads_are_sound():
    model, task = random_model("no_norms"), random_task()
    weight(model, "embed.W_E").mul_(1e20)
    assert run_to_residual(model, task.clean, task.mask).isfinite().all()

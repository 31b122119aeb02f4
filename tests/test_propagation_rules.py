"""The extension point for relevance methods and conductance, against plain autograd."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from architectures import of_hooked_transformers, random_model, random_task

import circuits
from circuits.discovery.gradients.edge_scores import GradientPoint
from circuits.discovery.gradients.gradient_method import GradientMethod
from circuits.discovery.methods.eap import EAP, EAPIG
from circuits.models.propagation import PropagationRules


@dataclass(frozen=True)
class RelP(EAP):
    """EAP with the rules of relevance patching.

    Reference: Jafari et al. 2025, https://arxiv.org/abs/2508.21258
    """

    name: ClassVar[str] = "relp-for-tests"

    @property
    def rules(self) -> PropagationRules:
        return PropagationRules("constant", "constant", "ratio", "half")


@dataclass(frozen=True)
class Conductance(GradientMethod):
    """Gradients times the change of the outputs along each piece of the line.

    Reference: Dhamdhere et al. 2018, https://arxiv.org/abs/1805.12233
    """

    name: ClassVar[str] = "conductance-for-tests"
    steps: int = 4

    def points(self, nodes):
        ends = [step / self.steps for step in range(self.steps + 1)]
        return [GradientPoint(a, until=b) for a, b in pairwise(ends)]


def relevance_hooks(model):
    """RelP by hooks on TransformerLens' own hook points, and by scaling gradients for the gates."""
    inputs = {}

    def detach(value, hook):
        return value.detach()

    def halve(value, hook):
        if value.requires_grad:
            value.register_hook(lambda gradient: gradient / 2)
        inputs[hook.name] = value

    def keep(value, hook):
        inputs[hook.name] = value

    hooks = [("ln_final.hook_scale", detach)]
    for layer in range(model.cfg.n_layers):
        block, mlp = f"blocks.{layer}", f"blocks.{layer}.mlp"
        hooks += [
            (f"{block}.{name}", detach)
            for name in ("attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale")
        ]
        gated = model.cfg.gated_mlp
        hooks.append((f"{mlp}.hook_pre", halve if gated else keep))
        if gated:
            hooks.append((f"{mlp}.hook_pre_linear", halve))

        def linear(value, hook, mlp=mlp, module=model.blocks[layer].mlp, gated=gated):
            pre = inputs[f"{mlp}.hook_pre"]
            activated = pre * (module.act_fn(pre) / pre).detach()
            if not gated:
                return activated
            return activated * inputs[f"{mlp}.hook_pre_linear"] + module.b_in

        hooks.append((f"{mlp}.hook_post", linear))
    return hooks


def by_autograd(model, task, hooks):
    """(corrupted - clean) . gradient for every edge, with one input per head and slot."""
    graph, cfg = circuits.component_graph(model), model.cfg
    for flag in ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"):
        setattr(cfg, flag, True)
    cfg.ungroup_grouped_query_attention = cfg.n_key_value_heads is not None
    outputs = {"embed": "blocks.0.hook_resid_pre"}
    reads = {"logits": f"blocks.{cfg.n_layers - 1}.hook_resid_post"}
    for layer in range(cfg.n_layers):
        outputs[f"m{layer}"], reads[f"m{layer}"] = (
            f"blocks.{layer}.hook_mlp_out",
            f"blocks.{layer}.hook_mlp_in",
        )
    seen = {}

    def keep(value, hook):
        if value.requires_grad:
            value.retain_grad()
        seen[hook.name] = value

    def start(value, hook):
        value = value.detach().requires_grad_()
        seen[hook.name] = value
        return value

    def at(value):
        return torch.zeros_like(value) if value.grad is None else value.grad

    def output(run, node):
        if node.startswith("a"):
            layer, head = node[1:].split(".h")
            return run[f"blocks.{layer}.attn.hook_result"][:, :, int(head)]
        return run[outputs[node]]

    def run(tokens):
        seen.clear()
        names = [
            *reads.values(),
            *outputs.values(),
            *(
                f"blocks.{layer}.{name}"
                for layer in range(cfg.n_layers)
                for name in ("hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result")
            ),
        ]
        kept = [
            (name, start if name == outputs["embed"] else keep) for name in dict.fromkeys(names)
        ]
        with model.hooks(fwd_hooks=[*hooks, *kept]):
            logits = model(tokens)
        return logits, dict(seen)

    _, corrupted = run(task.corrupted)
    logits, clean = run(task.clean)
    metric = circuits.METRICS["logit_difference"]
    scored = logits[task.scored]
    metric.damage(scored, scored.detach(), task).mean().backward()
    scores = []
    for edge in graph.edges:
        source, target = str(edge.source), str(edge.target)
        change = (output(corrupted, source) - output(clean, source)).detach()
        if edge.slot:
            layer, head = target[1:].split(".h")
            gradient = at(clean[f"blocks.{layer}.hook_{edge.slot}_input"])[:, :, int(head)]
        else:
            gradient = at(clean[reads[target]])
        scores.append(float((change * gradient).sum()))
    return torch.tensor(scores)


@of_hooked_transformers
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_relevance_by_rules_is_that_of_hooks_on_every_nonlinear_part(architecture):
    model, task = random_model(architecture), random_task(batch=3)
    found = RelP().discover(model, task).scores
    plain = EAP().discover(model, task).scores
    reference = by_autograd(model, task, relevance_hooks(model))
    torch.testing.assert_close(found, reference, atol=2e-5, rtol=1e-3)
    assert (found - plain).abs().max() > 1e-2, "the rules make a difference"


@of_hooked_transformers
def test_without_rules_the_reference_is_eap():
    model, task = random_model("llama"), random_task(batch=3)
    reference = by_autograd(model, task, [])
    torch.testing.assert_close(EAP().discover(model, task).scores, reference, atol=2e-5, rtol=1e-3)


def test_one_piece_of_the_whole_line_is_eap_at_the_corrupted_end():
    model, task = random_model("gpt2"), random_task(batch=3)
    found = Conductance(steps=1).discover(model, task).scores
    expected = EAP(gradient_at="corrupted").discover(model, task).scores
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_for_edges_from_the_embedding_pieces_of_the_line_are_integrated_gradients():
    """The embedding moves in equal steps, so both are the same sum."""
    model, task = random_model("gpt2"), random_task(batch=3)
    found = Conductance(steps=4).discover(model, task)
    expected = EAPIG(steps=4, quadrature="left").discover(model, task)
    embedding = torch.tensor([str(edge.source) == "embed" for edge in found.graph.edges])
    torch.testing.assert_close(
        found.scores[embedding], expected.scores[embedding], atol=1e-5, rtol=1e-4
    )
    assert (found.scores - expected.scores)[~embedding].abs().max() > 1e-3


@of_hooked_transformers
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_hook_that_changes_nothing_changes_no_score(architecture):
    """Gradients of a hooked model are taken in another way, at separate inputs of heads."""
    model, task = random_model(architecture), random_task(ragged=True, several=True)
    methods = [EAP(), EAPIG(along="activations", steps=1), RelP()]
    plain = [method.attribute(model, task) for method in methods]
    model.add_hook("blocks.1.ln1.hook_normalized", lambda x, hook: None)
    for method, expected in zip(methods, plain, strict=True):
        found = method.attribute(model, task)
        torch.testing.assert_close(found.edges, expected.edges, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.neurons, expected.neurons, atol=1e-5, rtol=1e-4)


@of_hooked_transformers
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_relp_as_hooks_around_eap_is_relp(architecture):
    model, task = random_model(architecture), random_task(several=True)
    with model.hooks(fwd_hooks=relevance_hooks(model)):
        found = EAP().discover(model, task)
    expected = RelP().discover(model, task)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)

"""Running circuits: what must hold whatever the architecture and the executor."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas.testing
import pytest
import torch
from architectures import (
    ARCHITECTURES,
    VOCAB,
    of_hooked_transformers,
    random_model,
    random_task,
    weight,
)
from random_transcoders import random_transcoders
from torch.nn import functional
from unequal_prompts import unequal_pair

import circuits
from circuits.graph.nodes import MLP, Head, Node
from circuits.models import counting_passes, run_to_residual, unembed, weights_of
from circuits.models.component_graph import component_nodes
from circuits.models.source_outputs import source_outputs
from circuits.running import run as execution
from circuits.running.ablation import NAMES
from circuits.running.noise import embedding_noise
from circuits.tasks.task import Task

# Many models and circuits: types are checked where each is tested.
pytestmark = pytest.mark.usefixtures("unchecked_types")

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_executor = pytest.mark.parametrize("executor", ["hooks", "incremental"])


def plain_logits(model, tokens, task) -> torch.Tensor:
    """Straight from the model, prompt by prompt and without padding."""
    with torch.no_grad():
        rows = [
            model(tokens[i : i + 1, : task.lengths[i]])[0, task.scored[i, : task.lengths[i]]]
            for i in range(len(task))
        ]
    return torch.cat(rows)


def padded_task() -> Task:
    return random_task(ragged=True, several=True)


@pytest.fixture(scope="module")
def task() -> Task:
    return padded_task()


@every_executor
@every_architecture
def test_with_everything_kept_the_logits_are_the_models(architecture, task, executor):
    model = random_model(architecture)
    whole = circuits.Circuit.full(circuits.component_graph(model))
    torch.testing.assert_close(
        circuits.run_circuit(model, whole, task, executor=executor),
        plain_logits(model, task.clean, task),
        atol=1e-4,
        rtol=0,
    )


@every_executor
@every_architecture
def test_with_everything_ablated_the_logits_are_the_corrupted_prompts(architecture, task, executor):
    model = random_model(architecture)
    empty = circuits.Circuit.from_edges(circuits.component_graph(model), [])
    torch.testing.assert_close(
        circuits.run_circuit(model, empty, task, executor=executor),
        plain_logits(model, task.corrupted, task),
        atol=1e-4,
        rtol=0,
    )


def nodes_of(model) -> list[Node]:
    return [
        node for node in component_nodes(model, split_embed=False) if isinstance(node, Head | MLP)
    ]


def written_at(node: Node) -> str:
    """The hook point of what a node writes."""
    if isinstance(node, Head):
        return f"blocks.{node.layer}.attn.hook_z"
    return f"blocks.{node.layer}.hook_mlp_out"


@cache
@torch.no_grad()
def patched_logits(architecture: str) -> dict[Node, torch.Tensor]:
    """By node, the clean run with its output replaced by the corrupted run's, with TransformerLens'
    own hooks.
    """
    model, task = random_model(architecture), padded_task()
    nodes = nodes_of(model)
    names = [written_at(node) for node in nodes]
    rows = {node: [] for node in nodes}
    for i, length in enumerate(task.lengths.tolist()):
        clean, corrupted = (tokens[i : i + 1, :length] for tokens in (task.clean, task.corrupted))
        _, kept = model.run_with_cache(corrupted, names_filter=names)
        for node, name in zip(nodes, names, strict=True):

            def patch(activation, hook, node=node, corrupted=kept[name]):
                if isinstance(node, MLP):
                    return corrupted
                activation[:, :, node.head] = corrupted[:, :, node.head]
                return activation

            logits = model.run_with_hooks(clean, fwd_hooks=[(name, patch)])
            rows[node].append(logits[0, task.scored[i, :length]])
    return {node: torch.cat(each) for node, each in rows.items()}


@every_executor
@every_architecture
def test_ablating_every_edge_into_a_node_is_patching_its_output(architecture, task, executor):
    model = random_model(architecture)
    graph = circuits.component_graph(model)
    nodes = nodes_of(model)
    kept = torch.stack(
        [torch.tensor([edge.target != node for edge in graph.edges]) for node in nodes]
    )
    for node, logits in zip(
        nodes, circuits.run_circuits(model, graph, kept, task, executor=executor), strict=True
    ):
        torch.testing.assert_close(
            logits,
            patched_logits(architecture)[node],
            atol=1e-4,
            rtol=0,
            msg=lambda text, node=node: f"{node}: {text}",
        )


@every_executor
@every_architecture
def test_ablating_every_edge_out_of_a_node_is_patching_its_output(architecture, task, executor):
    model = random_model(architecture)
    graph = circuits.component_graph(model)
    nodes = nodes_of(model)
    kept = torch.stack(
        [torch.tensor([edge.source != node for edge in graph.edges]) for node in nodes]
    )
    for node, logits in zip(
        nodes, circuits.run_circuits(model, graph, kept, task, executor=executor), strict=True
    ):
        torch.testing.assert_close(
            logits,
            patched_logits(architecture)[node],
            atol=1e-4,
            rtol=0,
            msg=lambda text, node=node: f"{node}: {text}",
        )


@every_architecture
def test_node_outputs_and_biases_sum_to_the_residual_stream(architecture):
    model, task = random_model(architecture), random_task()
    outputs = source_outputs(
        model, component_nodes(model, split_embed=False), task.clean, task.mask
    )
    weights = weights_of(model)
    biases = sum(weights.output_bias(layer) for layer in range(model.cfg.n_layers))
    with torch.no_grad():
        residual = run_to_residual(model, task.clean, task.mask)
    torch.testing.assert_close(outputs.sum(0) + biases.detach(), residual, atol=1e-5, rtol=1e-5)


def definition(model, graph, kept, task) -> torch.Tensor:
    """x_r = b_r + sum of M out_u + (1 - M) c_u written out for a GPT-2-style model, one node at a
    time: an independent executor.
    """
    nodes = component_nodes(model, split_embed=False)
    corrupted = source_outputs(model, nodes, task.corrupted, task.mask)
    of = partial(weight, model)
    positions = of("pos_embed.W_pos")[: task.clean.shape[1]]
    outputs: dict[Node, torch.Tensor] = {nodes[0]: of("embed.W_E")[task.clean] + positions}
    keeps = dict(zip(graph.edges, kept.tolist(), strict=True))

    def read(target, slot, bias):
        total = bias
        for index, node in enumerate(nodes):
            edge = circuits.Edge(node, target, slot)
            if edge in keeps:
                total = total + (outputs[node] if keeps[edge] else corrupted[index])
        return total

    def normed(name, x):
        return functional.layer_norm(x, x.shape[-1:], of(f"{name}.w"), of(f"{name}.b"))

    bias = torch.zeros(model.cfg.d_model)
    for layer in range(model.cfg.n_layers):
        block, attention, mlp = (f"blocks.{layer}{part}" for part in ("", ".attn", ".mlp"))
        for head in range(model.cfg.n_heads):
            q, k, v = (
                normed(f"{block}.ln1", read(Head(layer, head), slot, bias))
                @ of(f"{attention}.W_{slot.upper()}")[head]
                + of(f"{attention}.b_{slot.upper()}")[head]
                for slot in "qkv"
            )
            scores = (q @ k.transpose(1, 2) / model.cfg.d_head**0.5).masked_fill(
                ~torch.ones(q.shape[1], q.shape[1]).tril().bool(), -torch.inf
            )
            outputs[Head(layer, head)] = scores.softmax(-1) @ v @ of(f"{attention}.W_O")[head]
        bias = bias + of(f"{attention}.b_O")
        inputs = normed(f"{block}.ln2", read(MLP(layer), None, bias))
        hidden = functional.gelu(inputs @ of(f"{mlp}.W_in") + of(f"{mlp}.b_in"))
        outputs[MLP(layer)] = hidden @ of(f"{mlp}.W_out") + of(f"{mlp}.b_out")
    final = read(circuits.Logits(), None, bias)
    return unembed(model, final[task.scored]).detach()


@every_executor
def test_random_circuits_compute_what_the_definition_says(executor):
    model, task = random_model("gpt2"), random_task(several=True)
    graph = circuits.component_graph(model)
    kept = (
        torch.rand(5, len(graph), generator=torch.Generator().manual_seed(3))
        < torch.tensor([0.1, 0.3, 0.5, 0.8, 0.97])[:, None]
    )
    for mask, logits in zip(
        kept, circuits.run_circuits(model, graph, kept, task, executor=executor), strict=True
    ):
        torch.testing.assert_close(logits, definition(model, graph, mask, task), atol=1e-4, rtol=0)


@every_executor
def test_circuits_run_together_compute_what_they_compute_alone(executor):
    model, task = random_model("llama"), random_task(ragged=True)
    graph = circuits.component_graph(model)
    kept = torch.rand(7, len(graph), generator=torch.Generator().manual_seed(0)) < 0.6
    together = circuits.run_circuits(model, graph, kept, task, executor=executor)
    alone = torch.cat(
        [
            circuits.run_circuits(model, graph, kept[i : i + 1], task, executor=executor)
            for i in range(7)
        ]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    one_by_one = circuits.run_circuits(model, graph, kept, task, executor=executor, max_memory=1)
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=0)


@every_executor
@pytest.mark.parametrize("architecture", ["gpt2", "bidirectional", "llama"])
def test_padding_changes_nothing(architecture, executor):
    model, task = random_model(architecture), random_task(ragged=True)
    graph = circuits.component_graph(model)
    kept = torch.rand(1, len(graph), generator=torch.Generator().manual_seed(5)) < 0.5
    padded = circuits.run_circuits(model, graph, kept, task, executor=executor)[0]
    for i in range(len(task)):
        length = int(task.lengths[i])
        alone = Task.from_tokens(task.clean[i : i + 1, :length], task.corrupted[i : i + 1, :length])
        torch.testing.assert_close(
            circuits.run_circuits(model, graph, kept, alone, executor=executor)[0],
            padded[i : i + 1],
            atol=1e-4,
            rtol=0,
        )


@every_executor
@pytest.mark.parametrize("architecture", ["gpt2", "bidirectional"])
def test_a_split_by_position_with_every_position_treated_alike_is_the_plain_graph(
    architecture, executor
):
    model, task = random_model(architecture), random_task(ragged=True)
    plain, split = circuits.component_graph(model), circuits.component_graph(model, positions=8)
    kept = torch.rand(len(plain), generator=torch.Generator().manual_seed(0)) < 0.6
    by_name = {str(edge): bool(keep) for edge, keep in zip(plain.edges, kept, strict=True)}
    split_kept = torch.tensor(
        [
            by_name["->".join(part.split("@")[0] for part in str(edge).split("->"))]
            for edge in split.edges
        ]
    )
    torch.testing.assert_close(
        circuits.run_circuits(model, split, split_kept[None], task, executor=executor),
        circuits.run_circuits(model, plain, kept[None], task, executor=executor),
        atol=1e-5,
        rtol=0,
    )


@every_executor
def test_an_edge_at_one_position_is_ablated_there_only(executor):
    model, task = random_model("gpt2"), random_task()
    graph = circuits.component_graph(model, positions=8)
    without = ~graph.mask(["m0@3->m1@3"])

    def ablate(activation, hook):
        activation[:, 3] += (corrupted["blocks.0.hook_mlp_out"] - clean["blocks.0.hook_mlp_out"])[
            :, 3
        ]
        return activation

    _, corrupted = model.run_with_cache(task.corrupted)
    _, clean = model.run_with_cache(task.clean)
    model.cfg.use_hook_mlp_in = True
    expected = model.run_with_hooks(task.clean, fwd_hooks=[("blocks.1.hook_mlp_in", ablate)])[
        task.scored
    ]
    model.cfg.use_hook_mlp_in = False
    torch.testing.assert_close(
        circuits.run_circuits(model, graph, without[None], task, executor=executor)[0],
        expected.detach(),
        atol=1e-4,
        rtol=0,
    )


@every_executor
def test_splitting_the_embedding_changes_nothing_when_both_parts_are_treated_alike(executor):
    model, task = random_model("gpt2"), random_task()
    plain, split = (
        circuits.component_graph(model),
        circuits.component_graph(model, split_embed=True),
    )
    kept = torch.rand(len(plain), generator=torch.Generator().manual_seed(0)) < 0.6
    by_name = {str(edge): bool(keep) for edge, keep in zip(plain.edges, kept, strict=True)}
    names = [
        str(edge).replace("tok_embed", "embed").replace("pos_embed", "embed")
        for edge in split.edges
    ]
    split_kept = torch.tensor([by_name[name] for name in names])
    torch.testing.assert_close(
        circuits.run_circuits(
            model, split, split_kept[None], task, ablation="zero", executor=executor
        ),
        circuits.run_circuits(model, plain, kept[None], task, ablation="zero", executor=executor),
        atol=1e-4,
        rtol=0,
    )


@every_executor
def test_mean_ablation_uses_each_nodes_own_mean_over_real_tokens(executor):
    model, task = random_model("gpt2"), random_task(ragged=True)
    graph = circuits.component_graph(model)
    nodes = component_nodes(model, split_embed=False)
    outputs = source_outputs(model, nodes, task.clean, task.mask)
    by_hand = {
        node: torch.stack(
            [outputs[index, i, : task.lengths[i]].sum(0) for i in range(len(task))]
        ).sum(0)
        / task.lengths.sum()
        for index, node in enumerate(nodes)
    }
    kept = torch.rand(1, len(graph), generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(
        circuits.run_circuits(model, graph, kept, task, ablation="mean", executor=executor),
        circuits.run_circuits(
            model,
            graph,
            kept,
            task,
            ablation=circuits.Ablation("given", outputs=by_hand),
            executor=executor,
        ),
        atol=1e-5,
        rtol=0,
    )


@every_executor
def test_mean_by_position_averages_over_the_prompts_that_reach_a_position(executor):
    model, task = random_model("gpt2"), random_task(ragged=True)
    graph = circuits.component_graph(model)
    nodes = component_nodes(model, split_embed=False)
    outputs = source_outputs(model, nodes, task.corrupted, task.mask)
    by_hand = {
        node: torch.stack(
            [outputs[index, task.lengths > position, position].mean(0) for position in range(8)]
        )
        for index, node in enumerate(nodes)
    }
    kept = torch.rand(1, len(graph), generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(
        circuits.run_circuits(
            model,
            graph,
            kept,
            task,
            ablation=circuits.Ablation("mean_by_position", over="corrupted"),
            executor=executor,
        ),
        circuits.run_circuits(
            model,
            graph,
            kept,
            task,
            ablation=circuits.Ablation("given", outputs=by_hand),
            executor=executor,
        ),
        atol=1e-5,
        rtol=0,
    )


@every_executor
@pytest.mark.parametrize("length", [8, 5, 12])
@pytest.mark.parametrize("name", ["mean", "mean_by_position"])
def test_means_can_be_taken_over_the_clean_prompts_of_another_task(name, length, executor):
    model, task = random_model("gpt2"), random_task(ragged=True)
    other = random_task(batch=9, length=length, seed=5, ragged=True)
    by_position = name == "mean_by_position"
    graph = circuits.component_graph(model)
    nodes = component_nodes(model, split_embed=False)
    kept = torch.rand(1, len(graph), generator=torch.Generator().manual_seed(0)) < 0.5
    ablation = circuits.Ablation(name, over=other)
    if by_position and length < 8:
        with pytest.raises(circuits.InputError, match="of 8 tokens, and those of 'custom' have 5"):
            circuits.run_circuits(model, graph, kept, task, ablation=ablation, executor=executor)
        return
    # Straight from the model, prompt by prompt and without padding.
    runs = []
    for tokens, n_tokens in zip(other.clean, other.lengths, strict=True):
        cache = model.run_with_cache(tokens[None, :n_tokens])[1]
        heads = [
            torch.einsum("bphd,hdm->hbpm", cache["z", i], weight(model, f"blocks.{i}.attn.W_O"))
            for i in range(2)
        ]
        written = torch.cat(
            [
                cache["resid_pre", 0][None],
                *(torch.cat([heads[i], cache["mlp_out", i][None]]) for i in range(2)),
            ]
        )[:, 0]
        runs.append(written)
    tokens = torch.cat(runs, dim=1)
    by_hand = {
        node: torch.stack(
            [
                torch.stack([run[row, position] for run in runs if run.shape[1] > position]).mean(0)
                for position in range(8)
            ]
        )
        if by_position
        else tokens[row].mean(0)
        for row, node in enumerate(nodes)
    }
    torch.testing.assert_close(
        circuits.run_circuits(model, graph, kept, task, ablation=ablation, executor=executor),
        circuits.run_circuits(
            model,
            graph,
            kept,
            task,
            ablation=circuits.Ablation("given", outputs=by_hand),
            executor=executor,
        ),
        atol=1e-5,
        rtol=0,
    )


class TestNoiseOnTheTokenEmbeddings:
    @pytest.fixture
    def spanned(self) -> Task:
        task = random_task(ragged=True)
        span = torch.zeros_like(task.mask)
        span[:, 2:4] = True
        return replace(task, positions={"subject": span})

    @staticmethod
    def noised(model, task, row, scale=3.0, seed=0, span=None):
        """A hook of TransformerLens that adds the noise of one prompt, without padding."""
        n_tokens = int(task.lengths[row])
        alone = circuits.Task.from_tokens(*[task.clean[row : row + 1, :n_tokens].clone()] * 2)
        drawn = embedding_noise(model, alone, 1.0, seed, None)[0] / weight(model, "embed.W_E").std()
        noise = scale * weight(model, "embed.W_E").std() * drawn
        if span is not None:
            noise = noise * task.positions[span][row, :n_tokens, None]
        return lambda embedding, hook: embedding + noise

    @every_executor
    @pytest.mark.parametrize("span", [None, "subject"])
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "alibi"])
    def test_with_everything_ablated_the_logits_are_those_of_the_noised_prompts(
        self, architecture, spanned, executor, span
    ):
        model, task = random_model(architecture), spanned
        empty = circuits.Circuit.from_edges(circuits.component_graph(model), [])
        expected = [
            model.run_with_hooks(
                task.clean[row : row + 1, : task.lengths[row]],
                fwd_hooks=[("hook_embed", self.noised(model, task, row, 2.0, 7, span))],
            )[0, -1]
            for row in range(len(task))
        ]
        found = circuits.run_circuit(
            model,
            empty,
            task,
            ablation=circuits.Ablation("noise", scale=2, seed=7, span=span),
            executor=executor,
        )
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_a_patched_head_writes_what_it_writes_on_the_noised_prompt(self, spanned):
        model, task = random_model("gpt2"), spanned
        scores = circuits.ActivationPatching(
            metric="negative_log_probability", ablation="noise"
        ).node_scores(model, task)
        damage = []
        for row in range(len(task)):
            tokens = task.clean[row : row + 1, : task.lengths[row]]
            z = {}
            model.run_with_hooks(
                tokens,
                fwd_hooks=[
                    ("hook_embed", self.noised(model, task, row)),
                    (
                        "blocks.1.attn.hook_z",
                        lambda value, hook, z=z: z.update(head=value[:, :, 2].clone()),
                    ),
                ],
            )

            def patch(value, hook, z=z):
                value[:, :, 2] = z["head"]
                return value

            patched = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", patch)])
            answers = task.answers[row]
            clean, damaged = (
                -logits[0, -1].log_softmax(-1)[answers].logsumexp(-1)
                for logits in (model(tokens), patched)
            )
            damage.append(damaged - clean)
        assert scores[Head(1, 2)] == pytest.approx(float(torch.stack(damage).mean()), abs=1e-5)

    def test_a_prompts_noise_depends_on_nothing_but_its_tokens_and_the_seed(self, spanned):
        model, task = random_model("gpt2"), spanned
        noise = embedding_noise(model, task, 3.0, 0, None)
        some = torch.tensor([4, 1])
        assert torch.equal(embedding_noise(model, task[some], 3.0, 0, None), noise[some])
        longer = torch.nn.functional.pad(task.clean, (0, 3))
        padded = circuits.Task.from_tokens(longer, longer, lengths=task.lengths)
        assert torch.equal(embedding_noise(model, padded, 3.0, 0, None)[:, :8], noise)
        assert not torch.allclose(embedding_noise(model, task, 3.0, 1, None), noise)
        assert not noise[~task.mask].any()
        deviation = noise[task.mask].std() / weight(model, "embed.W_E").std()
        assert float(deviation) == pytest.approx(3, rel=0.1)

    def test_an_answer_that_was_appended_to_a_prompt_gets_no_noise(self, toy_world):
        pair = circuits.PromptPair("So Mary and John", answer=" went to the")
        task = Task.from_prompts(toy_world, [pair])
        noise = embedding_noise(toy_world, task, 3.0, 0, None)
        assert noise.any(-1).tolist() == [[True] * 5 + [False] * 2]

    @pytest.mark.usefixtures("unchecked_types")
    def test_an_absent_span_and_senseless_options_are_refused(self, spanned):
        model = random_model("gpt2")
        whole = circuits.Circuit.full(circuits.component_graph(model))
        with pytest.raises(circuits.InputError, match=r"no span 'subjct'.*did you mean 'subject'"):
            circuits.run_circuit(
                model, whole, spanned, ablation=circuits.Ablation("noise", span="subjct")
            )
        for options, message in [
            ({"name": "noise", "scale": 0}, "scale=0.* positive"),
            ({"name": "noise", "scale": float("nan")}, "scale=nan"),
            ({"name": "noise", "seed": 1.5}, "seed=1.5"),
            ({"name": "zero", "scale": 2.0}, "has no scale.*'noise'"),
            ({"name": "resample", "over": "corrupted"}, "has no over.*'mean'"),
            ({"name": "mean", "over": 3}, "over=3"),
            ({"name": "nois"}, "did you mean 'noise'"),
        ]:
            with pytest.raises(circuits.InputError, match=message):
                circuits.Ablation(**options)


@every_executor
def test_zero_ablation_leaves_the_attention_bias(executor):
    model, task = random_model("gpt2"), random_task()
    empty = circuits.Circuit.from_edges(circuits.component_graph(model), [])
    weights = weights_of(model)
    biases = sum(weights.output_bias(layer) for layer in range(model.cfg.n_layers))
    expected = unembed(model, biases[None]).detach().expand(len(task), VOCAB)
    torch.testing.assert_close(
        circuits.run_circuit(model, empty, task, ablation="zero", executor=executor),
        expected,
        atol=1e-4,
        rtol=0,
    )


def test_the_model_is_left_as_it_was(task):
    model = random_model("llama")
    calls = []
    model.add_hook("hook_embed", lambda activation, hook: calls.append("user"))
    model.cfg.use_attn_in, model.cfg.use_attn_result = False, True
    model.train()
    model.blocks[0].eval()
    next(model.parameters()).requires_grad_(False)
    flags = {
        name: value
        for name, value in vars(model.cfg).items()
        if name.startswith(("use_", "ungroup"))
    }
    at_first = {
        name: len(point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks
    }
    assert at_first["hook_embed"] == 1
    before = [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    graph = circuits.component_graph(model)
    circuits.run_circuits(model, graph, torch.zeros(1, len(graph), dtype=torch.bool), task)
    circuits.EAP().discover(model, task)
    assert {
        name: value
        for name, value in vars(model.cfg).items()
        if name.startswith(("use_", "ungroup"))
    } == flags
    assert [module.training for module in model.modules()] == modes
    for parameter, (requires_grad, grad, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is grad
        assert torch.equal(parameter, value)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {
        name: len(point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks
    } == at_first
    assert all(not point.bwd_hooks for point in model.hook_dict.values())


@of_hooked_transformers
def test_hooks_are_removed_when_the_forward_pass_raises(task, monkeypatch):
    model = random_model("gpt2")
    graph = circuits.component_graph(model)
    monkeypatch.setattr(
        model.blocks[1].mlp, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
    )
    with pytest.raises(RuntimeError, match="broken"):
        circuits.run_circuits(model, graph, torch.zeros(1, len(graph), dtype=torch.bool), task)
    assert all(not point.fwd_hooks for point in model.hook_dict.values())
    assert not model.cfg.use_split_qkv_input
    assert all(parameter.requires_grad for parameter in model.parameters())


@of_hooked_transformers
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
            "norms after attention and MLP",
        ),
        (
            {"original_architecture": "Olmo2ForCausalLM", "normalization_type": "RMS"},
            "Olmo2ForCausalLM",
        ),
        ({"positional_embedding_type": "shortformer"}, "shortformer"),
    ],
)
def test_a_residual_stream_that_is_no_sum_of_nodes_is_refused_by_name(changes, named, task):
    model = random_model("gpt2", **changes)
    with pytest.raises(circuits.InputError, match=named):
        circuits.component_graph(model)


@every_executor
def test_a_model_whose_outputs_do_not_sum_up_is_caught_when_it_runs(task, executor):
    model = random_model("gpt2")
    graph = circuits.component_graph(model)
    model.add_hook("blocks.0.hook_resid_post", lambda activation, hook: activation * 1.5)
    with pytest.raises(circuits.InputError, match="do not sum to the residual stream"):
        circuits.run_circuits(
            model, graph, torch.zeros(1, len(graph), dtype=torch.bool), task, executor=executor
        )


@every_executor
def test_logits_that_overflow_in_half_precision_are_an_error(task, executor):
    model = random_model("gpt2", dtype=torch.float16)
    weight(model, "unembed.W_U").mul_(60_000)
    with pytest.raises(circuits.InputError, match=r"overflows.*float32"):
        circuits.run_circuit(
            model, circuits.Circuit.full(circuits.component_graph(model)), task, executor=executor
        )


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (
            Task.from_tokens(torch.tensor([[1, VOCAB]]), torch.tensor([[1, 2]])),
            "has token 50, but custom knows 0 to 49",
        ),
        (
            Task.from_tokens(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), torch.tensor([VOCAB])),
            "has answer 50, but custom knows 0 to 49",
        ),
        (
            Task.from_tokens(
                torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17, dtype=torch.long)
            ),
            "prompts of 17 tokens, but custom reads 16",
        ),
    ],
)
def test_a_task_made_for_another_model_is_refused(task, told):
    model = random_model("gpt2")
    with pytest.raises(circuits.InputError, match=told):
        circuits.run_circuit(model, circuits.Circuit.full(circuits.component_graph(model)), task)
    with pytest.raises(circuits.InputError, match=told):
        circuits.EAP(metric="kl", gradient_at="corrupted").discover(model, task)


def test_an_unknown_executor_or_ablation_is_named(task):
    model = random_model("gpt2")
    whole = circuits.Circuit.full(circuits.component_graph(model))
    with pytest.raises(circuits.InputError, match=r"no ablation 'random'.*resample"):
        circuits.run_circuit(model, whole, task, ablation="random")
    with pytest.raises(circuits.InputError, match=r"kept has shape"):
        circuits.run_circuits(model, whole.graph, whole.kept[None, :-1], task)


@pytest.mark.usefixtures("unchecked_types")
def test_outputs_given_must_name_every_source_and_fit(task):
    model = random_model("gpt2")
    whole = circuits.Circuit.full(circuits.component_graph(model))
    with pytest.raises(circuits.InputError, match="no outputs are given for embed"):
        circuits.run_circuit(
            model, whole, task, ablation=circuits.Ablation("given", outputs={"m0": torch.zeros(24)})
        )
    sources = {str(node): torch.zeros(24) for node in component_nodes(model, split_embed=False)}
    with pytest.raises(circuits.InputError, match=r"m1 has shape \(3,\)"):
        circuits.run_circuit(
            model,
            whole,
            task,
            ablation=circuits.Ablation("given", outputs={**sources, "m1": torch.zeros(3)}),
        )
    with pytest.raises(circuits.InputError, match="m9"):
        circuits.run_circuit(
            model,
            whole,
            task,
            ablation=circuits.Ablation("given", outputs={**sources, "m9": torch.zeros(24)}),
        )
    for given, message in [
        ([1.0], "a list"),
        ({"m1": "much"}, "m1 is a str"),
        ({**sources, "m1": torch.zeros(24, dtype=torch.complex64)}, "m1 is complex"),
        ({**sources, "m1": torch.full((24,), torch.nan)}, "m1 has entries that are not finite"),
        (
            {**sources, "m1": torch.full((24,), 1e300, dtype=torch.float64)},
            "not finite in torch.float32",
        ),
        ({**sources, MLP(1): torch.zeros(24)}, "m1 twice"),
    ]:
        with pytest.raises(circuits.InputError, match=message):
            circuits.run_circuit(
                model, whole, task, ablation=circuits.Ablation("given", outputs=given)
            )


@pytest.mark.usefixtures("unchecked_types")
def test_outputs_may_be_given_as_numbers_or_arrays_in_another_precision(task):
    model = random_model("gpt2")
    empty = circuits.Circuit.from_edges(circuits.component_graph(model), [])
    nodes = component_nodes(model, split_embed=False)
    given = [0, 0.0, np.zeros(24), [0] * 24, torch.zeros(8, 24).double()]
    outputs = {node: given[index % 5] for index, node in enumerate(nodes)}
    torch.testing.assert_close(
        circuits.run_circuit(
            model, empty, task, ablation=circuits.Ablation("given", outputs=outputs)
        ),
        circuits.run_circuit(model, empty, task, ablation="zero"),
    )


class TestManyPromptsAreRunInPieces:
    @pytest.fixture
    def pieces(self, monkeypatch) -> list[int]:
        """How many prompts each executor that is prepared is for."""
        sizes: list[int] = []
        prepare = execution.get_executor

        def noted(model, graph, task, settings):
            sizes.append(len(task))
            return prepare(model, graph, task, settings)

        monkeypatch.setattr(execution, "get_executor", noted)
        return sizes

    @every_executor
    @pytest.mark.parametrize(
        "ablation", [*NAMES, circuits.Ablation("mean", over="corrupted")], ids=str
    )
    def test_the_logits_are_those_of_all_prompts_at_once(self, pieces, ablation, executor):
        """Means among them: they are taken over all prompts, whatever the pieces."""
        model, task = random_model(), random_task(batch=7, ragged=True, several=True)
        graph = circuits.component_graph(model)
        kept = torch.rand(3, len(graph), generator=torch.Generator().manual_seed(0)) < 0.5
        whole, parts = (
            circuits.run_circuits(
                model, graph, kept, task, ablation=ablation, executor=executor, max_memory=bound
            )
            for bound in (None, 150_000)
        )
        assert pieces == [7, 2, 2, 2, 1]
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)

    def test_edges_split_by_span_and_outputs_given_for_every_prompt_stay_with_their_prompts(
        self, pieces, toy_world
    ):
        task = circuits.load_task("ioi", toy_world, n=5, split="train")
        graph = circuits.component_graph(toy_world, positions=["S1", "S2", "END"])
        circuit = circuits.Circuit.from_edges(
            graph, [edge for edge in graph.edges if edge.source.position != "S2"]
        )
        nodes = component_nodes(toy_world, split_embed=False)
        given = circuits.Ablation(
            "given",
            outputs=dict(
                zip(nodes, source_outputs(toy_world, nodes, task.corrupted, task.mask), strict=True)
            ),
        )
        whole, parts, from_given = (
            circuits.run_circuit(toy_world, circuit, task, ablation=ablation, max_memory=bound)
            for ablation, bound in (("resample", None), ("resample", 1), (given, 1))
        )
        assert pieces == [5, 1, 1, 1, 1, 1, 5]
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(from_given, whole, atol=1e-4, rtol=1e-4)

    def test_evaluations_and_curves_are_the_same(self, pieces):
        # Faithfulness divides by what the whole model does better than the empty circuit: on these
        # prompts enough for its digits to hold.
        model, task = random_model(), random_task(several=True, seed=4)
        ranked = circuits.EAP().discover(model, task)
        whole, parts = (
            circuits.evaluate(model, ranked.top(30), task, ablation="mean", max_memory=bound)
            for bound in (None, 1)
        )
        pandas.testing.assert_frame_equal(parts.table(), whole.table(), atol=1e-5)
        pandas.testing.assert_frame_equal(parts.by_prompt(), whole.by_prompt(), atol=1e-5)
        curves = [
            circuits.faithfulness_curve(model, ranked, task, [10, 50], max_memory=bound)
            for bound in (None, 1)
        ]
        pandas.testing.assert_frame_equal(*curves, atol=1e-5)
        assert pieces == [6, *[1] * 6] * 2

    def test_what_does_not_fit_is_refused_as_ever(self, pieces):
        model, task = random_model(), random_task()
        with pytest.raises(circuits.InputError, match="has prompts of 8 tokens"):
            circuits.run_circuit(
                random_model(n_ctx=4),
                circuits.Circuit.full(circuits.component_graph(random_model(n_ctx=4))),
                task,
                max_memory=1,
            )
        with pytest.raises(circuits.InputError, match="a model of another shape"):
            circuits.run_circuit(
                random_model(n_layers=1),
                circuits.Circuit.full(circuits.component_graph(model)),
                task,
                max_memory=1,
            )
        with pytest.raises(circuits.InputError, match="max_memory=0 must be a positive number"):
            circuits.run_circuit(
                model, circuits.Circuit.full(circuits.component_graph(model)), task, max_memory=0
            )


# Prompts of different lengths


def test_tokens_of_unequal_prompts_are_paired_from_the_right_within_and_between_spans(unequal):
    assert unequal.alignment.tolist() == [
        # <bos> So | Mary | and John went, with "a great" and "friend and John went"
        [0, 1, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 2, 2, 3],
    ]
    assert unequal.corrupted_lengths.tolist() == [8, 6, 4]
    assert unequal[[2, 0]].alignment.tolist() == unequal.alignment[[2, 0]].tolist()
    assert unequal[1:2].digest() != unequal[:1].digest()


def test_before_all_spans_tokens_are_paired_from_the_left_and_bos_with_bos_only(toy_world):
    def alignment(clean: str, corrupted: str, **options: bool) -> list[int]:
        pair = unequal_pair(f"{clean}Mary went", "Mary", f"{corrupted}John went", "John")
        (found,) = Task.from_prompts(toy_world, [pair], **options).alignment.tolist()
        return found

    assert alignment("", "When ") == [0, 2, 3]
    assert alignment("When ", "So the ") == [0, 1, 3, 4]
    assert alignment("So the ", "When ") == [0, 1, 1, 2, 3]
    # Text that brings its own
    for options in ({}, {"prepend_bos": False}):
        assert alignment("<bos>", "<bos>When ", **options) == [0, 2, 3]
    assert alignment("So the ", "When ", prepend_bos=False) == [0, 0, 1, 2]
    bos, longer = "<bos> Mary", "<bos> When Mary"
    pair = unequal_pair(f"{bos} went", bos, f"{longer} went", longer)
    assert Task.from_prompts(toy_world, [pair]).alignment.tolist() == [[0, 2, 3]]
    with pytest.raises(circuits.InputError, match=r"tokens 1 to 1 .* have no counterpart"):
        alignment("When ", "")
    for clean, corrupted in (("<bos>", "When "), ("When ", "<bos>")):
        with pytest.raises(circuits.InputError, match=r"only one of .* begins with BOS"):
            alignment(clean, corrupted, prepend_bos=False)


@every_executor
@torch.no_grad()
def test_what_is_ablated_is_what_the_counterpart_has_in_a_run_of_the_other_prompt(
    executor, unequal, toy_world
):
    """All edges out of some heads ablated is the same as patching these heads by hand."""
    model, graph, heads = toy_world, circuits.component_graph(toy_world), [(0, 1), (1, 2), (2, 0)]
    sources = {f"a{layer}.h{head}" for layer, head in heads}
    kept = torch.tensor([str(edge).split("->")[0] not in sources for edge in graph.edges])
    kept = torch.stack([kept, torch.zeros_like(kept)])
    patched, empty = circuits.run_circuits(model, graph, kept, unequal, executor=executor)
    for row in range(len(unequal)):
        length, other = int(unequal.lengths[row]), int(unequal.corrupted_lengths[row])
        counterpart = unequal.alignment[row, :length]
        expected, cache = model.run_with_cache(
            unequal.corrupted[row : row + 1, :other], prepend_bos=False
        )

        def patch(z, hook, cache=cache, counterpart=counterpart):
            for layer, head in heads:
                if hook.layer() == layer:
                    z[0, :, head] = cache[hook.name][0, counterpart, head]
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", patch) for layer, _ in heads]
        by_hand = model.run_with_hooks(
            unequal.clean[row : row + 1, :length], prepend_bos=False, fwd_hooks=hooks
        )
        torch.testing.assert_close(patched[row], by_hand[0, -1], atol=1e-4, rtol=1e-4)
        # Without any edge, the scored token has what its counterpart computes.
        torch.testing.assert_close(empty[row], expected[0, -1], atol=1e-4, rtol=1e-4)
        found = circuits.model_logits(model, unequal, "corrupted")[row]
        torch.testing.assert_close(found, expected[0, -1], atol=1e-4, rtol=1e-4)


def test_unequal_prompts_are_run_incrementally_as_by_hooks_and_together_as_alone(
    unequal, toy_world
):
    graph = circuits.component_graph(toy_world)
    kept = torch.rand(4, len(graph), generator=torch.Generator().manual_seed(0))
    kept = kept < torch.tensor([0.1, 0.5, 0.8, 0.95])[:, None]
    run = partial(circuits.run_circuits, toy_world, graph, kept)
    together = run(unequal, executor="hooks")
    torch.testing.assert_close(run(unequal, executor="incremental"), together, atol=1e-4, rtol=1e-4)
    for row in range(len(unequal)):
        alone = run(unequal[[row]], executor="incremental")[:, 0]
        torch.testing.assert_close(alone, together[:, row], atol=1e-4, rtol=1e-4)


def test_the_gradient_score_of_an_edge_uses_what_the_counterpart_has(unequal, toy_world):
    scores = circuits.EAP().discover(toy_world, unequal)
    place = [str(edge) for edge in scores.graph.edges].index("m3->logits")
    damages = []
    for row in range(len(unequal)):
        length, other = int(unequal.lengths[row]), int(unequal.corrupted_lengths[row])
        ids = unequal.clean[row : row + 1, :length], unequal.corrupted[row : row + 1, :other]
        clean, corrupted = (toy_world.run_with_cache(each, prepend_bos=False)[1] for each in ids)
        end, name = int(unequal.alignment[row, length - 1]), "blocks.3.hook_mlp_out"
        change = corrupted[name][0, end] - clean[name][0, -1]
        residual = clean["blocks.3.hook_resid_post"][:, -1:].detach().requires_grad_()
        logits = unembed(toy_world, residual)[0, 0]
        difference = logits[unequal.answers[row, 0]] - logits[unequal.wrong_answers[row, 0]]
        (gradient,) = torch.autograd.grad(difference, residual)
        damages.append(-float(gradient[0, 0] @ change))
    assert float(scores.scores[place]) == pytest.approx(sum(damages) / 3, rel=1e-3)


def test_what_unequal_prompts_cannot_do_is_refused_with_the_remedy(unequal, toy_world):
    whole = circuits.Circuit.full(circuits.component_graph(toy_world))
    with pytest.raises(circuits.InputError, match="use gradient_at='clean', or quadrature"):
        circuits.EAP(gradient_at="both").discover(toy_world, unequal)
    with pytest.raises(circuits.InputError, match="means over clean prompts"):
        over = circuits.Ablation("mean", over="corrupted")
        circuits.evaluate(toy_world, whole, unequal, ablation=over)
    circuits.evaluate(toy_world, whole, unequal, ablation="mean_by_position")
    plain = unequal.prompts[0]
    for spans, told in (
        ({}, r"reword one until the numbers agree, or name what corresponds \(spans and"),
        ({"OTHER": (3, 5)}, "corrupted_spans has 'OTHER', but spans has not"),
        ({"NAME": (5, 30)}, "tokens 3 to 5 of the clean prompt have no counterpart"),
    ):
        pair = replace(plain, corrupted_spans=spans)
        with pytest.raises(circuits.InputError, match=told):
            Task.from_prompts(toy_world, [pair])
    crossed = replace(
        plain,
        spans={"A": (3, 7), "B": (12, 16)},
        corrupted_spans={"A": (22, 26), "B": (5, 10)},
    )
    with pytest.raises(circuits.InputError, match="span 'B' begins before the span before it ends"):
        Task.from_prompts(toy_world, [crossed])


@pytest.fixture
def threads_that_take_turns_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("threads_that_take_turns_often")
def test_threads_that_share_a_model_find_what_each_finds_alone():
    model, task = random_model("llama"), random_task(batch=2)
    transcoders, graph = random_transcoders(model), circuits.component_graph(model)
    few = circuits.EAP().discover(model, task).top(20)
    computations = {
        "acdc": lambda: circuits.ACDC(0.3).discover(model, task, graph=graph).scores,
        "eap": lambda: circuits.EAP().discover(model, task, graph=graph).scores,
        "hooks": lambda: circuits.run_circuit(model, few, task, executor="hooks"),
        "features": lambda: (
            circuits.AttributionGraph(transcoders).attribute(model, [3, 1, 2]).weight
        ),
    }
    alone = {name: compute() for name, compute in computations.items()}

    def same_each_time(name: str) -> bool:
        found = [computations[name]() for _ in range(5)]
        return all(torch.allclose(each, alone[name], equal_nan=True) for each in found)

    with ThreadPoolExecutor(len(computations)) as pool:
        results = dict(zip(computations, pool.map(same_each_time, computations), strict=True))
    assert results == dict.fromkeys(computations, True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_pass_is_counted_in_the_thread_that_makes_it(task):
    model = random_model("gpt2")
    with counting_passes(model) as counts, ThreadPoolExecutor(1) as pool:
        pool.submit(circuits.model_logits, model, task).result()
        assert counts == {"forward_passes": 0, "prompts_run": 0}
        circuits.model_logits(model, task)
    assert counts == {"forward_passes": 1, "prompts_run": len(task)}


def test_a_model_is_free_again_when_a_run_of_it_raises(task):
    model = random_model("gpt2")
    model.add_hook("hook_embed", lambda x, hook: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        circuits.model_logits(model, task)
    with pytest.raises(ZeroDivisionError):
        circuits.EAP().discover(model, task)
    model.reset_hooks()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(circuits.model_logits, model, task).result(timeout=60)


def test_prompts_that_a_task_does_not_have_are_refused(task, unchecked_types):
    with pytest.raises(circuits.InputError, match="prompts='Clean': choose 'clean' or"):
        circuits.model_logits(random_model("gpt2"), task, "Clean")

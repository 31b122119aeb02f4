"""Running circuits: what must hold whatever the architecture and the executor."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pandas.testing
import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, random_model, random_task
from changed_models import HONOURED, REFUSED
from random_transcoders import random_transcoders

import circuits
from circuits.graph.nodes import MLP, Head, Node
from circuits.models import counting_passes
from circuits.models.component_graph import component_nodes
from circuits.models.source_outputs import source_outputs
from circuits.running import run as execution
from circuits.running.ablation import NAMES
from circuits.tasks.task import Task

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


@pytest.fixture(scope="module")
def task() -> Task:
    return random_task(ragged=True, several=True)


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


def patched_logits(model, task, node: Node) -> torch.Tensor:
    """The clean run with one node's output replaced by the corrupted run's, with TransformerLens'
    own hooks.
    """
    name = (
        f"blocks.{node.layer}.attn.hook_z"
        if isinstance(node, Head)
        else f"blocks.{node.layer}.hook_mlp_out"
    )
    rows = []
    for i in range(len(task)):
        _, cache = model.run_with_cache(task.corrupted[i : i + 1, : task.lengths[i]])

        def patch(activation, hook, corrupted=cache[name]):
            if isinstance(node, MLP):
                return corrupted
            activation[:, :, node.head] = corrupted[:, :, node.head]
            return activation

        with torch.no_grad():
            logits = model.run_with_hooks(
                task.clean[i : i + 1, : task.lengths[i]], fwd_hooks=[(name, patch)]
            )
        rows.append(logits[0, task.scored[i, : task.lengths[i]]])
    return torch.cat(rows)


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
            patched_logits(model, task, node),
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
            patched_logits(model, task, node),
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
    biases = sum(block.attn.b_O for block in model.blocks)
    with torch.no_grad():
        residual = model(task.clean, stop_at_layer=model.cfg.n_layers)
    torch.testing.assert_close(outputs.sum(0) + biases.detach(), residual, atol=1e-5, rtol=1e-5)


def definition(model, graph, kept, task) -> torch.Tensor:
    """x_r = b_r + sum of M out_u + (1 - M) c_u written out for a GPT-2-style model, one node at a
    time: an independent executor.
    """
    nodes = component_nodes(model, split_embed=False)
    corrupted = source_outputs(model, nodes, task.corrupted, task.mask)
    outputs: dict[Node, torch.Tensor] = {
        nodes[0]: model.embed(task.clean) + model.pos_embed(task.clean)
    }
    keeps = dict(zip(graph.edges, kept.tolist(), strict=True))

    def read(target, slot, bias):
        total = bias
        for index, node in enumerate(nodes):
            edge = circuits.Edge(node, target, slot)
            if edge in keeps:
                total = total + (outputs[node] if keeps[edge] else corrupted[index])
        return total

    bias = torch.zeros(model.cfg.d_model)
    for layer, block in enumerate(model.blocks):
        for head in range(model.cfg.n_heads):
            attention = block.attn
            q, k, v = (
                block.ln1(read(Head(layer, head), slot, bias))
                @ getattr(attention, f"W_{slot.upper()}")[head]
                + getattr(attention, f"b_{slot.upper()}")[head]
                for slot in "qkv"
            )
            scores = (q @ k.transpose(1, 2) / attention.attn_scale).masked_fill(
                ~torch.ones(q.shape[1], q.shape[1]).tril().bool(), -torch.inf
            )
            outputs[Head(layer, head)] = scores.softmax(-1) @ v @ attention.W_O[head]
        bias = bias + block.attn.b_O
        outputs[MLP(layer)] = block.mlp(block.ln2(read(MLP(layer), None, bias)))
    final = read(circuits.Logits(), None, bias)
    return model.unembed(model.ln_final(final))[task.scored].detach()


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
def test_zero_ablation_leaves_the_attention_bias(executor):
    model, task = random_model("gpt2"), random_task()
    empty = circuits.Circuit.from_edges(circuits.component_graph(model), [])
    biases = sum(block.attn.b_O for block in model.blocks)
    expected = (
        model.unembed(model.ln_final(biases[None, None]))[0].detach().expand(len(task), VOCAB)
    )
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
    } == {"hook_embed": 1}
    assert all(not point.bwd_hooks for point in model.hook_dict.values())


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
    model.unembed.W_U.data.mul_(60_000)
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


class TestModelsThatAUserHasChanged:
    """The whole circuit is the model and the empty one its corrupted run, or both are refused."""

    @pytest.fixture(autouse=True)
    def reference_executor_is_said_to_be_used(self, recwarn):
        warnings.simplefilter("default")

    @pytest.mark.parametrize("change", HONOURED)
    def test_are_run_as_they_are(self, change, task):
        model = random_model("gpt2")
        HONOURED[change](model)
        graph = circuits.component_graph(model)
        kept = torch.stack([~graph.mask([]), graph.mask([])])
        expected = torch.stack(
            [whole_logits(model, tokens)[task.scored] for tokens in (task.clean, task.corrupted)]
        )
        torch.testing.assert_close(
            circuits.model_logits(model, task), expected[0], atol=1e-4, rtol=0
        )
        for executor in ("auto", "hooks"):
            found = circuits.run_circuits(model, graph, kept, task, executor=executor)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("change", REFUSED)
    def test_are_refused_in_one_line_where_circuits_would_not_be_theirs(self, change, task):
        model = random_model("gpt2")
        graph = circuits.component_graph(model)
        make, told = REFUSED[change]
        make(model)
        whole = circuits.Circuit.full(graph)
        for compute in (
            lambda: circuits.run_circuit(model, whole, task),
            lambda: circuits.run_circuit(model, whole, task, executor="hooks"),
            lambda: circuits.EAP().discover(model, task, graph=graph),
        ):
            with pytest.raises(circuits.InputError, match=told) as error:
                compute()
            assert "\n" not in str(error.value) and len(str(error.value)) <= 500

    def test_a_hook_that_fails_with_separate_inputs_is_named(self, task):
        def change(x, hook):
            _, _, d_model = x.shape
            return x / d_model

        model = random_model("gpt2")
        model.add_hook("blocks.1.ln1.hook_normalized", change)
        whole = circuits.Circuit.full(circuits.component_graph(model))
        told = r"ValueError: 'too many values .*blocks\.1\.ln1\.hook_normalized"
        with pytest.raises(circuits.InputError, match=told):
            circuits.run_circuit(model, whole, task)

    def test_a_hook_that_mixes_the_embeddings_of_tokens_is_honoured(self, task):
        model = random_model("gpt2")
        model.add_hook("hook_embed", lambda x, hook: x + x.mean(1, keepdim=True))
        even = task[task.lengths == task.clean.shape[1]]
        graph = circuits.component_graph(model)
        kept = torch.stack([~graph.mask([]), graph.mask([])])
        found = circuits.run_circuits(model, graph, kept, even)
        for logits, tokens in zip(found, (even.clean, even.corrupted), strict=True):
            expected = whole_logits(model, tokens)[even.scored]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    def test_a_hook_of_torch_on_all_modules_is_honoured(self, task):
        def halve_norms(module, arguments, output):
            return output * 0.5 if type(module).__name__ == "LayerNorm" else None

        model = random_model("gpt2")
        whole = circuits.Circuit.full(circuits.component_graph(model))
        handle = torch.nn.modules.module.register_module_forward_hook(halve_norms)
        try:
            found, expected = circuits.run_circuit(model, whole, task), model(task.clean)
        finally:
            handle.remove()
        torch.testing.assert_close(found, expected[task.scored].detach(), atol=1e-4, rtol=0)

    def test_a_hook_that_writes_over_what_gradients_need_is_refused(self, task):
        model = random_model("gpt2")
        model.add_hook("blocks.1.ln1.hook_scale", lambda x, hook: x.mul_(0.5))
        with pytest.raises(circuits.InputError, match=r"in place .*ln1\.hook_scale"):
            circuits.EAP().discover(model, task)

    def test_hooks_in_a_context_act_inside_of_it_only(self, task):
        model = random_model("gpt2")
        graph = circuits.component_graph(model)
        whole = circuits.Circuit.full(graph)
        halve = ("ln_final.hook_normalized", lambda x, hook: x * 0.5)
        with model.hooks(fwd_hooks=[halve]):
            inside, expected = circuits.run_circuit(model, whole, task), model(task.clean)
        torch.testing.assert_close(inside, expected[task.scored].detach(), atol=1e-4, rtol=0)
        outside = circuits.run_circuit(model, whole, task)
        torch.testing.assert_close(
            outside, whole_logits(model, task.clean)[task.scored], atol=1e-4, rtol=0
        )

    def test_are_searched_and_evaluated_as_they_are(self, task):
        model = random_model("gpt2")
        HONOURED["a hook on the last norm"](model)
        circuit = circuits.ACDC(0.05).discover(model, task)
        evaluation = circuits.evaluate(model, circuit, task)
        expected = whole_logits(model, task.clean)[task.scored]
        metric = circuits.tasks.metrics.METRICS["logit_difference"]
        mean = float(metric.function(expected, expected, task).mean())
        assert evaluation.table().loc["logit_difference", "model"] == pytest.approx(mean, abs=1e-4)
        whole = circuits.evaluate(model, circuits.Circuit.full(circuit.graph), task)
        assert whole.kl == pytest.approx(0, abs=1e-5)


def whole_logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


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

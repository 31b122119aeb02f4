"""Interventions on features.

The physical test of attribution graphs: direct effects are the columns of the adjacency.
"""

import math

import pytest
import torch
from random_transcoders import KINDS, WITH_MLPS, model_of, random_transcoders

import circuits
from circuits.attribution.feature_graph import FEATURE
from circuits.attribution.interventions import Intervention, direct_effects, generate, intervene

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]


def before_soft_cap(model, logits: torch.Tensor) -> torch.Tensor:
    cap = model.cfg.output_logits_soft_cap
    return logits if cap is None or cap <= 0 else cap * torch.atanh((logits / cap).double()).float()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", WITH_MLPS)
@torch.no_grad()
def test_doubling_a_feature_changes_every_preactivation_by_its_column_of_the_adjacency(
    architecture, kind
):
    model = model_of(architecture, n_layers=3)
    transcoders = random_transcoders(model, kind)
    graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    n, adjacency = int(graph.is_kind(FEATURE).sum()), graph.adjacency()
    chosen = range(0, n, max(1, n // 12))
    variants = [[], *([Intervention.scale(graph.node(number), 2.0)] for number in chosen)]
    run = direct_effects(model, transcoders, PROMPT, variants)
    layer, position, index = (
        column[:n] for column in (graph.nodes.layer, graph.nodes.position, graph.nodes.index)
    )
    reached = torch.stack([pre for pre in run.preactivations], 1)[:, layer, position, index]
    logits = before_soft_cap(model, run.logits[:, -1])
    explained = torch.stack(
        [logits[:, target.token] - logits.mean(-1) for target in graph.targets], 1
    )
    for row, number in enumerate(chosen, start=1):
        scale = max(1.0, float(reached[row].abs().max()))
        assert float((reached[row] - reached[0] - adjacency[:n, number]).abs().max()) < 1e-4 * scale
        gap = (explained[row] - explained[0] - adjacency[-len(graph.targets) :, number]).abs().max()
        assert float(gap) < 2e-4 * max(1.0, float(logits.abs().max()))
    assert float(adjacency[:n, list(chosen)].abs().max()) > 0.1


@torch.no_grad()
def test_no_intervention_is_the_model_whatever_is_frozen():
    model = model_of("gpt2")
    transcoders = random_transcoders(model, "clt")
    plain = model(torch.tensor([PROMPT]))
    for frozen in (
        {},
        {"freeze_attention": False},
        {"frozen_layers": [0]},
        {"frozen_layers": [0, 1], "freeze_norms": True},
    ):
        run = intervene(model, transcoders, PROMPT, [[]], **frozen)
        torch.testing.assert_close(run.logits, plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_setting_scaling_and_ablating_add_the_change_times_the_decoder():
    model = model_of("gpt2")
    transcoders = random_transcoders(model, "plt")
    feature = (
        (run := intervene(model, transcoders, PROMPT, [[]])).activations[1][0].nonzero()[0].tolist()
    )
    position, index = feature
    now = float(run.activations[1][0, position, index])
    variants = [
        [Intervention.set(f"f1.{index}@{position}", now + 0.5)],
        [Intervention(1, index, slice(position, position + 1), factor=(now + 0.5) / now)],
        [Intervention.ablate(f"f1.{index}@{position}")],
        [Intervention.set(f"f1.{index}@{position}", 0.0)],
    ]
    logits = intervene(model, transcoders, PROMPT, variants).logits
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[3])
    decoder = transcoders.decoders[1][index, 0]

    def added(output, hook):
        output = output.clone()
        output[:, position] += 0.5 * decoder
        return output

    by_hand = model.run_with_hooks(
        torch.tensor([PROMPT]), fwd_hooks=[("blocks.1.hook_mlp_out", added)]
    )
    torch.testing.assert_close(logits[:1], by_hand, rtol=0, atol=1e-5)
    assert not torch.allclose(logits[0], logits[2])


@torch.no_grad()
def test_frozen_attention_and_frozen_layers_keep_the_change_from_spreading():
    model = model_of("gpt2", n_layers=3)
    transcoders = random_transcoders(model, "clt")
    before = intervene(model, transcoders, PROMPT, [[]])
    position, index = before.activations[0][0].nonzero()[0].tolist()
    change = [[Intervention(0, index, position, value=9.0)]]
    free, attention, layers, direct = (
        intervene(model, transcoders, PROMPT, change, **frozen)
        for frozen in (
            {"freeze_attention": False},
            {},
            {"frozen_layers": [0, 1]},
            {"frozen_layers": [0, 1, 2], "freeze_norms": True},
        )
    )
    assert all(
        not torch.allclose(a.logits, b.logits)
        for a, b in ((free, attention), (attention, layers), (layers, direct))
    )
    # With attention frozen, nothing before the position changes, and features of its own layer see
    # nothing of it.
    torch.testing.assert_close(attention.preactivations[0], before.preactivations[0])
    torch.testing.assert_close(
        attention.logits[:, :position], before.logits[:, :position], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_the_direct_effects_of_several_features_add_up():
    """Each is changed from what it is without the others: nothing is live in a frozen layer."""
    model = model_of("gpt2", n_layers=3)
    transcoders = random_transcoders(model, "clt")
    graph = circuits.AttributionGraph(transcoders).attribute(model, PROMPT)
    chosen = [graph.node(number) for number in range(0, int(graph.is_kind(FEATURE).sum()), 25)]
    assert len({node.layer for node in chosen}) == 3
    changes = [Intervention.ablate(node) for node in chosen]
    run = direct_effects(
        model, transcoders, PROMPT, [[], changes, *([change] for change in changes)]
    )
    alone = run.logits[2:] - run.logits[0]
    torch.testing.assert_close(run.logits[1] - run.logits[0], alone.sum(0), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model = model_of("llama")
    flags, hooks = (
        vars(model.cfg).copy(),
        [len(point.fwd_hooks) for point in model.hook_dict.values()],
    )
    intervene(
        model,
        random_transcoders(model, "plt"),
        PROMPT,
        [[Intervention(0, 1, value=1.0)]],
        frozen_layers=[0],
        freeze_norms=True,
    )
    assert vars(model.cfg) == flags
    assert [len(point.fwd_hooks) for point in model.hook_dict.values()] == hooks
    assert not any(
        module._forward_hooks for module in model.modules() if type(module).__name__ != "HookPoint"
    )


@torch.no_grad()
def test_text_is_generated_under_interventions_that_go_on():
    model = model_of("gpt2")
    transcoders = random_transcoders(model, "plt")
    plain = generate(model, transcoders, PROMPT, [], new_tokens=6)
    assert plain[: len(PROMPT)].tolist() == PROMPT and len(plain) == len(PROMPT) + 6
    assert plain[len(PROMPT)] == model(torch.tensor([PROMPT]))[0, -1].argmax()
    steered = generate(
        model,
        transcoders,
        PROMPT,
        [Intervention(1, 4, slice(len(PROMPT) - 1, None), value=40.0)],
        new_tokens=6,
    )
    assert plain.tolist() != steered.tolist()
    assert len(generate(model, transcoders, PROMPT, [], new_tokens=50)) == model.cfg.n_ctx
    drawn = [
        generate(model, transcoders, PROMPT, [], new_tokens=6, temperature=2.0, seed=seed).tolist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@torch.no_grad()
@pytest.mark.parametrize(
    ("counted", "from_start"),
    [
        (-1, 7),
        (slice(-2, None), slice(6, None)),
        (slice(-3, -1), slice(5, 7)),
        (slice(9, 12), slice(9, 12)),
    ],
)
def test_positions_are_those_of_the_prompt_also_while_text_is_generated(counted, from_start):
    model = model_of("gpt2")
    transcoders = random_transcoders(model, "plt")
    texts = []
    for position in (counted, from_start):
        tokens = torch.tensor(PROMPT)
        texts.append(
            generate(
                model,
                transcoders,
                PROMPT,
                [Intervention(0, 4, position, value=300.0)],
                new_tokens=6,
            ).tolist()
        )
    for _ in range(6):
        steered = (
            [at for at in range(len(tokens))[from_start]]
            if isinstance(from_start, slice)
            else [from_start]
        )
        changes = [Intervention(0, 4, at, value=300.0) for at in steered]
        logits = intervene(model, transcoders, tokens, [changes], freeze_attention=False).logits
        tokens = torch.cat([tokens, logits[0, -1].argmax()[None]])
    assert texts[0] == texts[1] == tokens.tolist()
    assert texts[0] != generate(model, transcoders, PROMPT, [], new_tokens=6).tolist()


def test_things_of_another_kind_are_refused_in_one_line(unchecked_types):
    model = model_of("gpt2")
    transcoders = random_transcoders(model, "plt")
    change = Intervention.ablate("f0.1")
    for run, message in (
        (
            lambda: intervene(model, "toy-world-clt", PROMPT, [[]]),
            "load them with circuits.load_transcoders",
        ),
        (
            lambda: direct_effects(model, "toy-world-clt", PROMPT, [[]]),
            "load them with circuits.load_transcoders",
        ),
        (
            lambda: intervene(model, transcoders, PROMPT, [change]),
            "a list of interventions for each run",
        ),
        (
            lambda: intervene(model, transcoders, PROMPT, [["f0.1@3"]]),
            "expected an intervention, got",
        ),
        (
            lambda: intervene(model, transcoders, PROMPT, [[]], frozen_layers=1),
            "frozen_layers=1 must be a list; for one, give",
        ),
        (
            lambda: intervene(model, transcoders, PROMPT, [[Intervention(0.5, 1, factor=0.0)]]),
            "layer=0.5: give a whole number",
        ),
        (lambda: intervene(model, transcoders, [PROMPT, PROMPT], [[]]), "are no prompt"),
        (lambda: intervene(model, transcoders, [0.0, 1.5], [[]]), "are no prompt"),
        (lambda: intervene(model, transcoders, None, [[]]), "None is no prompt"),
        (lambda: generate(model, transcoders, PROMPT, change), "interventions must be a list"),
        (lambda: Intervention(0, 1, value="2"), "give a finite number"),
    ):
        with pytest.raises(circuits.InputError, match=message):
            run()


def test_what_cannot_be_changed_is_said():
    model = model_of("gpt2")
    transcoders = random_transcoders(model, "plt")
    for change, message in (
        (
            [Intervention(2, 0, value=1.0)],
            "there is no feature f2.0: 'random plt' has 2 layers of 40 features",
        ),
        ([Intervention(0, 40, value=1.0)], "there is no feature f0.40"),
        ([Intervention(0, 3, 12, value=1.0)], "at position 12 of a prompt of 8 tokens"),
        ([Intervention(0, 3, 0, value=1.0)], "the first 1 positions have no features"),
        ([Intervention(0, 3, slice(9, 12), value=1.0)], "choose an existing position"),
        ([Intervention(0, 3, slice(9, None), value=1.0)], "choose an existing position"),
        ([Intervention(0, 3, slice(0, 1), value=1.0)], "the first 1 positions have no features"),
        ([Intervention(0, 3, slice(None, None, -1), value=1.0)], "choose an existing position"),
        ([Intervention(0, 3, -9, value=1.0)], "at position -9 of a prompt of 8 tokens"),
    ):
        with pytest.raises(circuits.InputError, match=message):
            intervene(model, transcoders, PROMPT, [change])
    with pytest.raises(
        circuits.InputError, match="frozen_layers holds 9, and the model has layers 0 to 1"
    ):
        intervene(model, transcoders, PROMPT, [[]], frozen_layers=[0, 9])
    with pytest.raises(circuits.InputError, match=r"there is no feature f5\.0"):
        generate(model, transcoders, PROMPT, [Intervention(5, 0, value=1.0)], new_tokens=0)
    with pytest.raises(circuits.InputError, match="a prompt has 17 tokens"):
        generate(model, transcoders, [1] * 17, [])
    for temperature in (-1.0, math.inf):
        with pytest.raises(circuits.InputError, match="give 0 for the most probable token"):
            generate(model, transcoders, PROMPT, [], temperature=temperature)
    with pytest.raises(circuits.InputError, match="new_tokens=-1"):
        generate(model, transcoders, PROMPT, [], new_tokens=-1)
    for variant in ([], [Intervention.ablate("f0.1")]):
        with pytest.raises(circuits.InputError, match="leading=-1"):
            intervene(model, transcoders, PROMPT, [variant], leading=-1)
    for number in (math.nan, math.inf):
        with pytest.raises(circuits.InputError, match="give a finite number"):
            Intervention.scale("f0.1", number)
    with pytest.raises(circuits.InputError, match="either a value or a factor"):
        Intervention(0, 1)
    with pytest.raises(circuits.InputError, match="m3 is no feature"):
        Intervention.ablate("m3")

"""Activations inside the run of a circuit, against TransformerLens' own caches and hooks."""

from functools import partial

import pytest
import torch
from architectures import of_hooked_transformers, random_model, random_task, weight
from random_transcoders import random_transcoders

import circuits
from circuits.graph.nodes import MLP, Embed, Head
from circuits.models import HAS_HOOKED_TRANSFORMER, hook_names

EVERY_ARCHITECTURE = ("gpt2", "attention_only", "pythia", "qwen3", "soft_caps", "bidirectional")


@pytest.fixture(scope="module")
def task() -> circuits.Task:
    return random_task(ragged=True)


def of(model, *edges: str) -> circuits.Circuit:
    return circuits.Circuit.from_edges(circuits.component_graph(model), edges)


def caches(model, task, tokens):
    """One prompt after the other, without padding."""
    return [
        model.run_with_cache(prompt[None, :length])[1]
        for prompt, length in zip(tokens, task.lengths, strict=True)
    ]


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_in_the_whole_circuit_every_activation_is_the_models(architecture, task):
    model = random_model(architecture)
    whole = circuits.Circuit.full(circuits.component_graph(model))
    plain = caches(model, task, task.clean)
    # A bridge's own run has other activations as well.
    known = plain[0].keys() if HAS_HOOKED_TRANSFORMER else hook_names(model)
    names = [
        name
        for name in known
        if not name.startswith(("ln_final", "unembed")) and ".ln1.hook" not in name
        if name in plain[0].keys()
        # Scores in a bridge's own run are masked or scaled later.
        and (HAS_HOOKED_TRANSFORMER or not name.endswith("attn_scores"))
    ]
    found, in_parts = (
        circuits.circuit_activations(model, whole, task, names, max_memory=bound)
        for bound in (None, 150_000)
    )
    assert list(found) == names and "blocks.1.attn.hook_pattern" in names
    for name in names:
        torch.testing.assert_close(in_parts[name], found[name], atol=1e-5, rtol=1e-5)
        if "_norm.hook" in name:
            continue  # of all tokens' heads together
        for row, cache in enumerate(plain):
            expected = cache[name][0]
            if ".hook_" in name and expected.dim() + 1 < found[name].dim():
                # Bridges show the axes of heads as one.
                expected = expected.unflatten(-1, found[name].shape[-2:])
            value = found[name][row]
            # Queries and keys by head, everything else by position.
            real = [slice(expected.shape[0])]
            if name.endswith(("pattern", "attn_scores")):
                real = [slice(None), *[slice(expected.shape[-1])] * 2]
            value = value[tuple(real)]
            if value.shape != expected.shape:  # shared keys and values, repeated
                expected = expected.repeat_interleave(value.shape[1] // expected.shape[1], 1)
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("split_embed", [False, True])
def test_nodes_write_their_outputs(task, split_embed):
    model = random_model("gpt2")
    whole = circuits.Circuit.full(circuits.component_graph(model, split_embed=split_embed))
    embeddings = ["tok_embed", "pos_embed"] if split_embed else ["embed"]
    found = circuits.circuit_activations(model, whole, task, [*embeddings, Head(1, 2), "m0"])
    cache = model.run_with_cache(task.clean)[1]
    assert list(found) == [*embeddings, "a1.h2", "m0"]
    expected = cache["blocks.1.attn.hook_z"][:, :, 2] @ weight(model, "blocks.1.attn.W_O")[2]
    torch.testing.assert_close(found["a1.h2"], expected)
    torch.testing.assert_close(found["m0"], cache["blocks.0.hook_mlp_out"])
    written = torch.stack([found[name] for name in embeddings]).sum(0)
    torch.testing.assert_close(written, cache["blocks.0.hook_resid_pre"])


@pytest.mark.parametrize("ablation", ["resample", "noise"])
def test_in_the_empty_circuit_everything_but_the_embedding_is_the_corrupted_runs(task, ablation):
    model = random_model("gpt2")
    names = [
        "a1.h0", "m1", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_q",
        "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post",
    ]  # fmt: skip
    found = circuits.circuit_activations(
        model, of(model), task, [*names, "embed"], ablation=ablation
    )
    # The circuit of a task whose clean prompts are the corrupted ones is the whole model.
    other = circuits.Task.from_tokens(task.corrupted, task.clean, lengths=task.lengths)
    whole = circuits.Circuit.full(circuits.component_graph(model))
    expected = circuits.circuit_activations(model, whole, other, names)
    clean = circuits.circuit_activations(model, whole, task, ["embed", *names])
    torch.testing.assert_close(found["embed"], clean["embed"])
    for name in names:
        is_the_same = torch.allclose(found[name][0], expected[name][0], atol=1e-4)
        assert is_the_same == (ablation == "resample"), name
        assert not torch.allclose(found[name][0], clean[name][0], atol=1e-4), name
    sums = found["blocks.1.attn.hook_pattern"].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@of_hooked_transformers
@torch.no_grad()
def test_one_ablated_edge_changes_what_a_hand_written_hook_changes(task):
    """The query of one head reads another head's output on the corrupted prompt."""
    model = random_model("gpt2")
    graph = circuits.component_graph(model)
    names = ["blocks.1.attn.hook_pattern", "blocks.1.hook_q_input", "blocks.1.hook_mlp_out"]
    names += ["blocks.1.hook_k_input", "a1.h3"]
    found = circuits.circuit_activations(
        model, of(model, *(e for e in graph.edges if str(e) != "a0.h1->a1.h3.q")), task, names
    )
    z = {
        which: model.run_with_cache(tokens)[1]["blocks.0.attn.hook_z"][:, :, 1]
        for which, tokens in (("clean", task.clean), ("corrupted", task.corrupted))
    }
    change = (z["corrupted"] - z["clean"]) @ weight(model, "blocks.0.attn.W_O")[1]

    def query_reads(value, hook):
        value[:, :, 3] += change
        return value

    kept = {}

    def keep(value, hook):
        kept[hook.name] = value.clone()

    model.set_use_split_qkv_input(True)
    try:
        hooks = [("blocks.1.hook_q_input", query_reads), *((name, keep) for name in names[:-1])]
        model.run_with_hooks(
            task.clean, fwd_hooks=[*hooks, ("blocks.1.attn.hook_z", partial(keep))]
        )
    finally:
        model.set_use_split_qkv_input(False)
    kept["a1.h3"] = kept["blocks.1.attn.hook_z"][:, :, 3] @ weight(model, "blocks.1.attn.W_O")[3]
    whole = circuits.Circuit.full(graph)
    plain = circuits.circuit_activations(model, whole, task, names)
    for name in names:
        for row, length in enumerate(task.lengths):
            last = slice(None), slice(int(length))
            place = last if name.endswith("pattern") else last[1:]
            expected = kept[name][row][place]
            torch.testing.assert_close(found[name][row][place], expected, atol=1e-5, rtol=1e-5)
        changes = not torch.allclose(found[name], plain[name], atol=1e-4)
        assert changes == (name != "blocks.1.hook_k_input"), name


# A bridge does not list these.
OF_HOOKED_TRANSFORMERS = (
    ("blocks.0.attn.hook_result", r"not computed in the run.*by its name"),
    ("blocks.0.ln1.hook_normalized", r"for q, k and v each.*hook_q_input"),
)


def test_names_that_are_not_computed_are_refused_with_a_hint(task):
    model = random_model("gpt2")
    circuit = of(model)
    for name, message in [
        ("a1.h9", r"did you mean 'a1\.h\d'\?"),
        (MLP(7), r"'m7' is no activation of this circuit's run.* embed to m1"),
        (Embed("END"), r"'embed@END'.* did you mean 'embed'\?"),
        ("blocks.1.attn.patern", r"did you mean 'blocks\.1\.attn\.hook_pattern'\?"),
        ("logits", r"hook points such as blocks\.0\.attn\.hook_pattern"),
        *(OF_HOOKED_TRANSFORMERS if HAS_HOOKED_TRANSFORMER else ()),
    ]:
        with pytest.raises(circuits.InputError, match=message) as error:
            circuits.circuit_activations(model, circuit, task, ["m0", name])
        assert len(str(error.value)) <= 500
    transcoders = random_transcoders(model, "plt")
    of_features = circuits.AttributionGraph(transcoders).discover(model, task[:1])
    with pytest.raises(circuits.InputError, match="transcoder features"):
        circuits.circuit_activations(model, of_features, task, "m0")

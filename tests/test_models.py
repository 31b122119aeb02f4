"""Loading and saving models, by name, from folders and from checkpoints of real architectures."""

import json
import shutil

import pytest
import torch
import transformers
from architectures import random_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import circuits
from circuits.models.identity import identity


def byte_pair_tokenizer(folder) -> transformers.PreTrainedTokenizerFast:
    """A small byte-level BPE like GPT-2's, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = ["When Mary and John went to the store, John gave a drink to Mary"] * 10
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return fast


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
CHECKPOINTS = {
    "gpt2": lambda vocab: transformers.GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=32, n_ctx=32
    ),
    "pythia": lambda vocab: transformers.GPTNeoXConfig(vocab_size=vocab, **SMALL),
    "llama": lambda vocab: transformers.LlamaConfig(
        vocab_size=vocab, num_key_value_heads=2, **SMALL
    ),
    "qwen2": lambda vocab: transformers.Qwen2Config(
        vocab_size=vocab, num_key_value_heads=2, **SMALL
    ),
}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_checkpoint_in_a_folder_gives_its_own_logits_and_finds_circuits(family, tmp_path):
    tokenizer = byte_pair_tokenizer(tmp_path)
    generator_state = torch.get_rng_state()
    source = transformers.AutoModelForCausalLM.from_config(
        CHECKPOINTS[family](len(tokenizer))
    ).eval()
    source.save_pretrained(tmp_path)
    torch.set_rng_state(generator_state)
    model = circuits.load_model(tmp_path, device="cpu")
    tokens = torch.tensor([tokenizer.encode("When Mary and John went to the store")])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), source(tokens).logits, atol=1e-4, rtol=1e-4)
    pairs = [circuits.PromptPair("John gave a drink to", "Mary gave a drink to", " Mary", " John")]
    task = circuits.Task.from_prompts(model, pairs)
    circuit = circuits.EAP().discover(model, task)
    assert circuits.evaluate(model, circuit, task).kl == pytest.approx(0, abs=1e-5)


def test_a_checkpoint_that_transformer_lens_cannot_convert_is_one_clear_line(tmp_path):
    config = transformers.GemmaConfig(vocab_size=20, num_key_value_heads=1, head_dim=8, **SMALL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_pair_tokenizer(tmp_path)
    with pytest.raises(
        circuits.InputError, match=r"TransformerLens cannot convert .*GemmaForCausalLM"
    ):
        circuits.load_model(tmp_path, device="cpu")


def test_a_model_saved_and_loaded_is_the_same(tmp_path):
    model = random_model("llama")
    circuits.save_model(model, tmp_path)
    loaded = circuits.load_model(tmp_path, device="cpu")
    assert identity(loaded).weights == identity(model).weights
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_building_a_model_sets_no_seed():
    model = random_model("gpt2")
    config = {
        **{name: value for name, value in model.cfg.to_dict().items() if name != "dtype"},
        "seed": 7,
    }
    state = torch.get_rng_state()
    circuits.build_model(config, model.state_dict(), device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_do_not_fit_are_named():
    model = random_model("gpt2")
    config, weights = model.cfg.to_dict(), model.state_dict()
    weights["blocks.0.mlp.W_in"] = torch.zeros(2, 2)
    del weights["embed.W_E"]
    weights["extra"] = torch.zeros(1)
    told = (
        r"embed.W_E \(missing\), blocks.0.mlp.W_in "
        r"\(has shape \(2, 2\), needs \(24, 32\)\), extra \(unknown\)"
    )
    with pytest.raises(circuits.InputError, match=told):
        circuits.build_model(config, weights, device="cpu")


def test_an_unknown_name_suggests_what_was_meant():
    with pytest.raises(
        circuits.InputError, match=r"no model or folder 'gpt2-smal'; did you mean gpt2-small"
    ):
        circuits.load_model("gpt2-smal", device="cpu")


def test_a_folder_that_holds_no_model_or_a_damaged_one_is_one_clear_line(tmp_path):
    with pytest.raises(circuits.InputError, match=r"holds no model: it has no config\.json"):
        circuits.load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(circuits.InputError, match="truncated or not JSON"):
        circuits.load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(circuits.InputError, match="cannot be loaded as a checkpoint"):
        circuits.load_model(tmp_path, device="cpu")
    circuits.save_model(random_model("gpt2"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(circuits.InputError, match="truncated"):
        circuits.load_model(tmp_path, device="cpu")


def test_files_of_two_models_or_of_an_interrupted_save_are_not_taken_for_one(toy_world, tmp_path):
    for seed in (1, 2):
        circuits.save_model(random_model("gpt2", seed=seed), tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "model.safetensors", tmp_path / "2")
    with pytest.raises(circuits.InputError, match=r"model\.safetensors is not the file that was"):
        circuits.load_model(tmp_path / "2", device="cpu")
    circuits.save_model(toy_world, tmp_path / "toy")
    tokenizer = tmp_path / "toy" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"Mary"', '"Marie"'))
    with pytest.raises(circuits.InputError, match=r"tokenizer\.json is not.*delete the lines"):
        circuits.load_model(tmp_path / "toy", device="cpu")
    config = tmp_path / "toy" / "config.json"
    kept = [line for line in config.read_text().splitlines() if '"digest' not in line]
    config.write_text("\n".join(kept))
    assert "Marie" in circuits.load_model(tmp_path / "toy", device="cpu").tokenizer.get_vocab()


@pytest.mark.parametrize(
    "n_layer, reason", [(3, "lacks weights"), (1, "more layers than"), (10**9, "n_layer is 1")]
)
def test_a_checkpoint_with_another_number_of_layers_than_its_configuration_is_refused(
    n_layer, reason, toy_world, tmp_path
):
    toy_world.tokenizer.save_pretrained(tmp_path)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 673}
    config = transformers.GPT2Config(**shape, n_ctx=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert circuits.load_model(tmp_path, device="cpu").cfg.n_layers == 2
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layer": n_layer}))
    with pytest.raises(circuits.InputError, match=reason):
        circuits.load_model(tmp_path, device="cpu")


def test_cuda_that_is_not_there_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(circuits.InputError, match=r"device 'cuda' was asked for.*use device='cpu'"):
        circuits.load_model("toy-world", device="cuda")


def test_something_else_than_a_hooked_transformer_is_refused(unchecked_types):
    with pytest.raises(circuits.InputError, match="expected a HookedTransformer, got Linear"):
        circuits.component_graph(torch.nn.Linear(2, 2))

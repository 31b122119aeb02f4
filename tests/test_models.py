"""Loading and saving models, by name, from folders and from checkpoints of real architectures."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from architectures import of_hooked_transformers, random_model, random_task
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import circuits
from circuits.models import HAS_HOOKED_TRANSFORMER
from circuits.models.identity import identity
from circuits.models.loading.saved import parts_of


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


def test_a_checkpoint_that_transformer_lens_cannot_convert_is_loaded_as_a_bridge_which_is_said(
    tmp_path, monkeypatch
):
    config = transformers.GemmaConfig(vocab_size=20, num_key_value_heads=1, head_dim=8, **SMALL)
    source = transformers.AutoModelForCausalLM.from_config(config)
    source.save_pretrained(tmp_path)
    byte_pair_tokenizer(tmp_path)
    said = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: said.append(str(message)))
    model = circuits.load_model(tmp_path, device="cpu")
    assert type(model).__name__ == "TransformerBridge"
    if HAS_HOOKED_TRANSFORMER:
        assert any("TransformerLens cannot convert it" in each for each in said)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), source.eval()(tokens).logits)


CODE = """
from pathlib import Path
Path({trace!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CODE_OF_MODEL = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
CODE_OF_TOKENIZER = {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def llama_checkpoint(folder):
    tokenizer = byte_pair_tokenizer(folder)
    config = CHECKPOINTS["llama"](len(tokenizer))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("part", ["model", "tokenizer", "own tokenizer", "both known"])
def test_code_in_a_models_folder_never_runs_and_nobody_is_asked_to_run_it(
    part, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    waits = transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE
    folder, trace = tmp_path / "folder", tmp_path / "trace"
    folder.mkdir()
    if part == "own tokenizer":
        circuits.save_model(circuits.load_model("toy-world", device="cpu"), folder)
    else:
        llama_checkpoint(folder)
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    config, of_tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    if part == "model":
        change(config, auto_map=CODE_OF_MODEL, model_type="own")
    elif part == "both known":
        change(config, auto_map=CODE_OF_MODEL)
        change(of_tokenizer, auto_map=CODE_OF_TOKENIZER)
    else:
        change(of_tokenizer, auto_map=CODE_OF_TOKENIZER, tokenizer_class="Tokenizer")
    try:
        model = circuits.load_model(folder, device="cpu")
    except circuits.InputError as error:
        # A changed file of one's own may be refused for that.
        assert part != "both known"
        assert part == "own tokenizer" or "code of models is never run" in str(error)
    else:
        assert part in ("own tokenizer", "both known")
        assert model.tokenizer.bos_token
    assert not trace.exists() and not asked
    assert transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE == waits > 0


def test_a_kernel_on_the_hub_that_a_checkpoint_names_is_not_loaded(tmp_path):
    llama_checkpoint(tmp_path)
    change(tmp_path / "config.json", _attn_implementation="kernels-community/flash-attn")
    assert circuits.load_model(tmp_path, device="cpu").cfg.n_layers == 2


@pytest.mark.parametrize(
    ("config", "kind", "told"),
    [
        (
            transformers.T5Config(
                num_layers=1, num_heads=2, d_model=16, d_kv=8, d_ff=16, vocab_size=40
            ),
            transformers.T5ForConditionalGeneration,
            "is an encoder-decoder model; circuits are found in decoder-only language models",
        ),
        (
            transformers.BertConfig(vocab_size=40, **SMALL),
            transformers.BertForMaskedLM,
            "is an encoder .a masked language model.; circuits are found in decoder-only",
        ),
    ],
    ids=["T5", "BERT"],
)
@pytest.mark.parametrize("by", ["folder", "name"])
def test_encoders_are_refused_as_what_they_are(by, config, kind, told, tmp_path, monkeypatch):
    kind(config).save_pretrained(tmp_path)
    byte_pair_tokenizer(tmp_path)
    where = tmp_path
    if by == "name":
        where = {"t5": "t5-small", "bert": "bert-base-cased"}[config.model_type]
        saved = transformers.AutoConfig.from_pretrained(tmp_path)
        monkeypatch.setattr(
            transformers.AutoConfig, "from_pretrained", staticmethod(lambda *_, **__: saved)
        )
    with pytest.raises(circuits.InputError, match=told):
        circuits.load_model(where, device="cpu")


def _halve(file):
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda folder: _halve(folder / "model.safetensors"),
            "truncated or not a safetensors file",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[1"), "JSONDecodeError"),
        (lambda folder: change(folder / "config.json", num_attention_heads=0), "ZeroDivisionError"),
        (
            lambda folder: change(
                folder / "config.json",
                quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
            ),
            "bitsandbytes",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_one_line_with_the_reason(damage, told, tmp_path):
    llama_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(circuits.InputError, match=told) as refused:
        circuits.load_model(tmp_path, device="cpu")
    text = str(refused.value)
    assert str(tmp_path) in text
    assert "; give a complete folder" in text or "; restore it" in text
    assert "\n" not in text and len(text) <= 500


def test_a_model_saved_and_loaded_is_the_same(tmp_path):
    model = random_model("llama" if HAS_HOOKED_TRANSFORMER else "gpt2")
    circuits.save_model(model, tmp_path)
    loaded = circuits.load_model(tmp_path, device="cpu")
    assert identity(loaded).weights == identity(model).weights
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_building_a_model_sets_no_seed():
    config, weights = parts_of(random_model("gpt2"))
    state = torch.get_rng_state()
    circuits.build_model({**config, "seed": 7}, weights, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_do_not_fit_are_named():
    config, weights = parts_of(random_model("gpt2"))
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
        circuits.InputError, match=r"no model or folder 'gpt2-smal'; did you mean 'gpt2-small'"
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


def test_warnings_as_errors_fail_no_load_and_those_for_users_are_shown(
    toy_world, tmp_path, monkeypatch
):
    llama_checkpoint(tmp_path)
    circuits.save_model(toy_world, tmp_path / "toy")
    loading = transformers.PreTrainedTokenizerFast.from_pretrained

    def told(*given, **named):
        warnings.warn("this will change", FutureWarning, stacklevel=1)
        warnings.warn("this tokenizer is old", UserWarning, stacklevel=1)
        return loading(*given, **named)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", told)
    for action in ("error", "default"):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter(action)
            before = [*warnings.filters]
            model = circuits.load_model(tmp_path / "toy", device="cpu")
            assert warnings.filters == before
            circuits.load_model(tmp_path, device="cpu")
            circuits.build_model(*parts_of(model), model.tokenizer)
        assert {str(each.message) for each in shown} == {"this tokenizer is old"}
        assert identity(model) == identity(toy_world)


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


CALLS = {
    "graph": lambda model, task, graph: circuits.component_graph(model),
    "eap": lambda model, task, graph: circuits.EAP().discover(model, task),
    "acdc": lambda model, task, graph: circuits.ACDC(0.1).discover(model, task, graph=graph),
    "random": lambda model, task, graph: circuits.RandomScores().discover(model, task, graph=graph),
    "logits": lambda model, task, graph: circuits.model_logits(model, task),
    "run": lambda model, task, graph: circuits.run_circuit(
        model, circuits.Circuit.full(graph), task
    ),
    "evaluation": lambda model, task, graph: circuits.evaluate(
        model, circuits.Circuit.full(graph), task
    ),
    "curve": lambda model, task, graph: circuits.faithfulness_curve(
        model, circuits.Circuit.full(graph), task, [3]
    ),
    "attribution graph": lambda model, task, graph: circuits.AttributionGraph(
        "toy-world-clt"
    ).attribute(model, "Dallas is in"),
    "task": lambda model, task, graph: circuits.load_task("ioi", model, n=2),
    "prompts": lambda model, task, graph: circuits.Task.from_prompts(
        model, [circuits.PromptPair("So Mary", "So John")]
    ),
    "saving": lambda model, task, graph: circuits.save_model(model, "nowhere"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
def test_something_else_than_a_hooked_transformer_is_refused(call, toy_world, unchecked_types):
    task, graph = circuits.load_task("ioi", toy_world, n=2), circuits.component_graph(toy_world)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    for wrong, told in (
        (torch.nn.Linear(2, 2), r"expected a (Hooked|Transformer).*, got Linear; load it with"),
        (None, "got NoneType; load it with circuits.load_model"),
        ("toy-world", "got str; load it with"),
        (transformers.GPT2LMHeadModel(config), "got GPT2LMHeadModel; load it with"),
        (torch.nn.DataParallel(toy_world), r"got DataParallel; hand over its \.module"),
        (torch.compile(toy_world), r"got OptimizedModule; hand over its \._orig_mod"),
    ):
        with pytest.raises(circuits.InputError, match=told):
            CALLS[call](wrong, task, graph)


@of_hooked_transformers
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda model: model.half(),
            r"embed\.W_E is in torch\.float16 .*model\.to\(torch\.float16",
        ),
        (lambda model: model.double(), r"in torch\.float64 and cfg\.dtype is torch\.float32"),
        (lambda model: model.unembed.bfloat16(), r"unembed\.W_U is in torch\.bfloat16"),
        (lambda model: torch.nn.Module.to(model, "meta"), "on the meta device"),
        (lambda model: setattr(model.cfg, "device", "cuda"), r"on cpu .*model\.to\('cpu'\)"),
        (lambda model: setattr(model.cfg, "device", None), r"on cpu .*model\.to\('cpu'\)"),
        (lambda model: setattr(model.cfg, "n_layers", 3), r"2 layers and cfg\.n_layers is 3"),
    ],
)
def test_settings_that_do_not_say_what_the_weights_are_refused(change, told):
    model, task = random_model("gpt2"), random_task()
    graph = circuits.component_graph(model)
    change(model)
    for call in ("logits", "run", "acdc", "eap", "evaluation"):
        with pytest.raises(circuits.InputError, match=f"cannot be run as it is: .*{told}"):
            CALLS[call](model, task, graph)


def test_a_model_that_transformer_lens_converts_to_another_type_is_run_in_it(capsys):
    model, task = random_model("gpt2"), random_task()
    plain = circuits.EAP().discover(model, task).scores
    model.to(torch.float64)
    assert circuits.model_logits(model, task).dtype == torch.float64
    torch.testing.assert_close(
        circuits.EAP().discover(model, task).scores, plain, atol=1e-5, rtol=1e-4
    )

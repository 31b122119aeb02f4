"""What load_model gives computes what the files' own model does, or is refused with the reason."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from zoo import config_of, hugging_face_model, word_tokenizer

import circuits
from circuits.models import HAS_HOOKED_TRANSFORMER, run_to_residual, shape_of, unembed
from circuits.models.bridge import weights as bridge_weights
from circuits.models.identity import identity

VOCAB = 64
HOOKED = "hooked_transformer"
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def checkpoint(folder, config, dtype=torch.float32):
    """A random checkpoint whose every part matters, saved; returns the model."""
    source = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            size = 1.0 if "embed" in name else 0.25
            parameter.copy_(size * noise if parameter.dim() > 1 else 1 + 0.2 * noise)
    source.to(dtype).eval().save_pretrained(folder)
    words = {"<bos>": 0, **{f"w{number}": number for number in range(1, VOCAB)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<bos>", unk_token="<bos>"
    )
    tokenizer.save_pretrained(folder)
    return source


@torch.no_grad()
def logits(model, tokens):
    return unembed(model, run_to_residual(model, tokens, torch.ones_like(tokens).bool()))


def assert_agree(model, source):
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source(tokens).logits
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def said(monkeypatch):
    """What warnings say."""
    texts = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: texts.append(str(message)))
    return texts


needs_hooked_transformer = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer"
)


@needs_hooked_transformer
def test_a_conversion_that_is_another_model_gives_way_to_a_bridge_and_the_reason_is_said(
    tmp_path, said
):
    # TransformerLens 3.9 leaves the biases out.
    config = transformers.LlamaConfig(**LLAMA, attention_bias=True)
    source = checkpoint(tmp_path, config)
    model = circuits.load_model(tmp_path, device="cpu")
    assert type(model).__name__ == "TransformerBridge"
    [text] = [text for text in said if "TransformerBridge" in text]
    assert "the output of layer 0 differs by" in text and "attention_bias=True" in text
    assert_agree(model, source)


@needs_hooked_transformer
def test_in_a_small_type_too_a_conversion_that_is_another_model_gives_way(tmp_path, said):
    # The left-out biases are small, and hardly larger than rounding where numbers are largest.
    config = transformers.Qwen3Config(**LLAMA, attention_bias=True, head_dim=8)
    source = checkpoint(tmp_path, config)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("proj.bias"):
                parameter.mul_(0.02)
    source.save_pretrained(tmp_path)
    model = circuits.load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert type(model).__name__ == "TransformerBridge"
    assert any("attention_bias=True" in text for text in said)


@needs_hooked_transformer
def test_a_window_that_is_longer_than_the_prompts_compared_is_not_lost(tmp_path, said):
    # TransformerLens 3.9 leaves it out.
    window = {"sliding_window": 200, "use_sliding_window": True, "max_window_layers": 1}
    config = transformers.Qwen2Config(**LLAMA | {"max_position_embeddings": 512}, **window)
    source = checkpoint(tmp_path, config)
    model = circuits.load_model(tmp_path, device="cpu")
    assert any("layer 1 attends to inf tokens, and its source to 200" in text for text in said)
    tokens = torch.randint(VOCAB, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), source(tokens).logits, atol=1e-4, rtol=0)


def test_a_model_takes_no_longer_prompts_than_its_configuration_says(tmp_path):
    # TransformerLens 3.9 says 2048 for every Mistral. Positions would be turned by other angles.
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    checkpoint(tmp_path, transformers.MistralConfig(**LLAMA, rope_parameters=rope))
    model = circuits.load_model(tmp_path, device="cpu")
    assert shape_of(model).n_ctx == 128
    with pytest.raises(circuits.InputError, match="128"):
        circuits.EAP().discover(model, circuits.Task.from_tokens(torch.ones(1, 129).long()))


@needs_hooked_transformer
def test_a_conversion_that_is_another_model_is_refused_if_one_insists_on_it(tmp_path):
    checkpoint(tmp_path, transformers.LlamaConfig(**LLAMA, mlp_bias=True))
    with pytest.raises(circuits.InputError, match="mlp_bias=True; use backend='bridge'"):
        circuits.load_model(tmp_path, device="cpu", backend="hooked_transformer")


def test_a_pass_that_differs_from_its_source_is_refused_with_the_layer_the_size_and_the_setting(
    tmp_path, monkeypatch
):
    config = transformers.MistralConfig(**LLAMA, sliding_window=8)
    source = checkpoint(tmp_path, config)
    with monkeypatch.context() as patched:
        patched.setattr(bridge_weights, "window", lambda *_: float("inf"))
        told = r"the output of layer 0 differs by [\d.]+%; likely because of .*sliding_window=8"
        with pytest.raises(circuits.InputError, match=told):
            circuits.load_model(tmp_path, device="cpu", backend="bridge")
        loaded = circuits.load_model(tmp_path, device="cpu", backend="bridge", check=False)
        assert loaded.cfg.n_layers == 2
    assert_agree(circuits.load_model(tmp_path, device="cpu", backend="bridge"), source)


@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
def test_a_folder_in_bfloat16_stays_mapped_from_its_file(backend, tmp_path):
    if backend == "hooked_transformer" and not HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the system does not say how much memory is mapped")

    def own_bytes():
        [line] = [line for line in status.read_text().splitlines() if "RssAnon" in line]
        return 1024 * int(line.split()[1])

    # 59 MB
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    config = transformers.LlamaConfig(**{**LLAMA, **large})
    source = checkpoint(tmp_path, config, torch.bfloat16)
    size = sum(2 * parameter.numel() for parameter in source.parameters())
    before = own_bytes()
    model = circuits.load_model(tmp_path, device="cpu", dtype=torch.bfloat16, backend=backend)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert own_bytes() - before < 0.3 * size


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"backend": "lens"}, "backend='lens': choose 'hooked_transformer' or 'bridge'"),
        ({"device_map": {"": "meta"}}, "this device_map keeps the weights of .* out of memory"),
        ({"device_map": "nonsense"}, "nonsense"),
        ({"backend": "hooked_transformer", "device_map": "cpu"}, "device|no such class"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line(chosen, told, tmp_path, unchecked_types):
    checkpoint(tmp_path, transformers.LlamaConfig(**LLAMA))
    with pytest.raises(circuits.InputError, match=told):
        circuits.load_model(tmp_path, device="cpu", **chosen)


def test_a_device_map_is_not_ignored(toy_world, tmp_path):
    circuits.save_model(toy_world, tmp_path / "model")
    for place in ("toy-world", tmp_path / "model"):
        with pytest.raises(circuits.InputError, match="device_map is for checkpoints of transf"):
            circuits.load_model(place, device_map="cpu")


def test_a_model_that_also_reads_images_is_loaded_and_nothing_is_installed(tmp_path, monkeypatch):
    # TransformerLens installs torchvision where it is missing, and with it another torch.
    started = []
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(subprocess, "check_call", lambda command, **_: started.append(command))
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    images |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8},
        vision_config=images,
        mm_tokens_per_image=4,
    )
    kinds = transformers.AutoProcessor
    source = checkpoint(tmp_path, config)
    assert_agree(circuits.load_model(tmp_path, device="cpu", backend="bridge"), source)
    assert started == []
    assert transformers.AutoProcessor is kinds


@needs_hooked_transformer
def test_local_attention_of_some_layers_is_converted(tmp_path, said):
    # Its configuration says it in other words than those of later models.
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=100,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    source = checkpoint(tmp_path, config)
    model = circuits.load_model(tmp_path, device="cpu")
    assert not any("TransformerBridge" in text for text in said)
    tokens = torch.randint(VOCAB, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), source(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.5, "inv_sqrt_d_model"])
def test_a_setting_that_transformers_does_not_read_changes_nothing(scale, tmp_path):
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    source = checkpoint(tmp_path, transformers.MptConfig(**sizes, logit_scale=scale))
    assert_agree(circuits.load_model(tmp_path, device="cpu", backend="bridge"), source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_expert_that_rounding_chooses_is_no_other_model(dtype, tmp_path):
    # In float16 a token of this model goes to another expert in the one run than in the other.
    hugging_face_model(config_of("gpt-oss")).save_pretrained(tmp_path)
    word_tokenizer(96).save_pretrained(tmp_path)
    model = circuits.load_model(tmp_path, device="cpu", dtype=dtype, backend="bridge")
    assert shape_of(model).dtype == dtype


def test_experts_in_a_small_type_that_compute_something_else_are_refused(tmp_path, monkeypatch):
    hugging_face_model(config_of("gpt-oss")).save_pretrained(tmp_path)
    word_tokenizer(96).save_pretrained(tmp_path)
    plain = bridge_weights.BridgeWeights.output_bias
    monkeypatch.setattr(
        bridge_weights.BridgeWeights, "output_bias", lambda *given: 0 * plain(*given)
    )
    with pytest.raises(circuits.InputError, match="the output of layer 0 differs by"):
        circuits.load_model(tmp_path, device="cpu", dtype=torch.float16, backend="bridge")


def test_a_lost_window_that_few_tokens_pass_is_seen_among_experts_too(tmp_path, monkeypatch):
    config = config_of("gpt-oss")
    config.sliding_window = 48
    hugging_face_model(config).save_pretrained(tmp_path)
    word_tokenizer(96).save_pretrained(tmp_path)
    small = {"dtype": torch.float16, "backend": "bridge"}
    circuits.load_model(tmp_path, device="cpu", **small)
    monkeypatch.setattr(bridge_weights, "window", lambda *_: float("inf"))
    with pytest.raises(circuits.InputError, match="run layer by layer, the output of layer 0"):
        circuits.load_model(tmp_path, device="cpu", **small)


def test_what_a_folder_lacks_or_says_wrongly_is_one_line(tmp_path):
    config = transformers.LlamaConfig(**LLAMA)
    checkpoint(tmp_path, config)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 0}))
    with pytest.raises(circuits.InputError, match="num_hidden_layers is 0; correct it"):
        circuits.load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(circuits.InputError, match="has no tokenizer files, such as"):
        circuits.load_model(tmp_path, device="cpu")
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(circuits.InputError, match=r"model\.bin is a file of another kind"):
        circuits.load_model(file, device="cpu")
    with pytest.raises(circuits.InputError, match=r"model\.gguf does not exist"):
        circuits.load_model(tmp_path / "model.gguf", device="cpu")


def test_a_model_is_built_in_a_class_that_there_is(unchecked_types):
    model = circuits.load_model("toy-world", device="cpu", backend="bridge")
    parts = model.cfg.to_dict() if hasattr(model.cfg, "to_dict") else {}
    with pytest.raises(circuits.InputError, match="backend='lens': choose"):
        circuits.build_model(parts, {}, backend="lens")
    with pytest.raises(circuits.InputError, match="backend='bridge'"):
        circuits.build_model({"architecture": "TransformerLensNative"}, {}, backend=HOOKED)


def test_a_model_over_several_devices_is_refused(tmp_path):
    checkpoint(tmp_path, transformers.LlamaConfig(**LLAMA))
    spread = {"model.layers": "meta", "model.embed_tokens": "cpu", "model.norm": "cpu"}
    spread |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(circuits.InputError, match="over 2 devices: circuits are found"):
        circuits.load_model(tmp_path, device="cpu", device_map=spread)


def test_a_device_map_of_one_device_is_taken(tmp_path):
    source = checkpoint(tmp_path, transformers.LlamaConfig(**LLAMA))
    assert_agree(circuits.load_model(tmp_path, device_map={"": "cpu"}), source)


STATE_SPACE = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
LATENT = transformers.DeepseekV3Config(
    **{**LLAMA, "num_key_value_heads": 4},
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=32,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)


@pytest.mark.parametrize("config", [STATE_SPACE, LATENT], ids=["state space", "latent attention"])
def test_a_model_without_queries_keys_and_values_is_refused_as_such(config, tmp_path):
    checkpoint(tmp_path, config)
    with pytest.raises(circuits.InputError, match="no attention with queries, keys and values"):
        circuits.load_model(tmp_path, device="cpu")


def write_gguf(path, source):
    """A small Llama as a GGUF file, with a vocabulary of bytes."""
    config, writer = source.config, gguf.GGUFWriter(path, "llama")
    heads, d_head = config.num_attention_heads, config.head_dim
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(d_head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*map(chr, range(ord("A"), ord("A") + VOCAB - 1)), "AB"])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "blk", "lm_head": "output",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    }  # fmt: skip
    for name, parameter in source.named_parameters():
        values = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            # These files keep the two dimensions of a rotated pair side by side.
            pairs = values.view(-1, 2, d_head // 2, values.shape[-1])
            values = pairs.transpose(1, 2).reshape(values.shape)
        for theirs, short in names.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read_and_agrees_with_the_model_it_was_made_of(tmp_path):
    source = checkpoint(tmp_path / "folder", transformers.LlamaConfig(**LLAMA))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, source)
    model = circuits.load_model(file, device="cpu")
    assert model.cfg.model_name == "tiny"
    assert_agree(model, source)


def test_a_broken_gguf_file_is_one_line(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(circuits.InputError, match=r"broken\.gguf cannot be loaded"):
        circuits.load_model(file, device="cpu")


@pytest.mark.parametrize("backend", ["bridge", None])
def test_weights_that_are_not_finite_are_named_when_a_folder_is_loaded(backend, tmp_path):
    source = checkpoint(tmp_path, transformers.LlamaConfig(**LLAMA))
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    source.save_pretrained(tmp_path)
    with pytest.raises(circuits.InputError, match=r"1 of 1536 entries of .* are not finite"):
        circuits.load_model(tmp_path, device="cpu", backend=backend)


@pytest.mark.parametrize("norm", ["ln1", "ln2", "ln_final"])
def test_an_eps_that_is_set_by_hand_in_a_bridge_is_another_fingerprint(norm, tmp_path):
    checkpoint(tmp_path, transformers.LlamaConfig(**LLAMA))
    model = circuits.load_model(tmp_path, device="cpu", backend="bridge")
    before = identity(model).weights
    owner = model if norm == "ln_final" else model.blocks[1]
    getattr(owner, norm).original_component.variance_epsilon = 0.5
    assert identity(model).weights != before

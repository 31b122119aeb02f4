"""Small random models of the architectures of Hugging Face's transformers, and bridges to them."""

import contextlib
import io
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

# The sizes of all, under the names of most classes of configurations.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SHARED = {**SIZES, "num_key_value_heads": 2}
UNSHARED = {**SIZES, "num_key_value_heads": 4}
HEADS_OF_8 = {**SHARED, "head_dim": 8}
OF_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
OF_OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {**EXPERTS, "moe_intermediate_size": 32}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
AFTER = {"query_pre_attn_scalar": 8, "sliding_window": 8}


def rope(kind: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA_3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LONG = rope(
    "longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 1.6, 1.7, 2.0],
    original_max_position_embeddings=32,
    factor=4.0,
)

# The class of the configuration, and its settings.
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHARED),
    "llama rope linear": ("Llama", {**SHARED, **rope("linear", factor=4.0)}),
    "llama rope llama3": ("Llama", {**SHARED, **LLAMA_3}),
    "llama rope yarn": ("Llama", {**SHARED, **YARN}),
    "llama rope dynamic": ("Llama", {**SHARED, **rope("dynamic", factor=4.0)}),
    "llama biases": ("Llama", {**SHARED, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", {**SHARED, "tie_word_embeddings": True}),
    "llama wide heads": ("Llama", {**SHARED, "head_dim": 16}),
    "qwen2": ("Qwen2", SHARED),
    "qwen2 window": (
        "Qwen2",
        {**SHARED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", HEADS_OF_8),
    "qwen3 biases": ("Qwen3", {**HEADS_OF_8, **YARN, "attention_bias": True}),
    "mistral": ("Mistral", {**SHARED, "sliding_window": 8}),
    "mixtral": ("Mixtral", {**SHARED, **LOCAL_MOE}),
    "phi3": ("Phi3", SHARED),
    "phi3 partial": ("Phi3", {**SHARED, **rope(partial_rotary_factor=0.5)}),
    "phi3 long": ("Phi3", {**SHARED, **LONG, "original_max_position_embeddings": 32}),
    "pythia": ("GPTNeoX", SIZES),
    "gpt-neox serial": ("GPTNeoX", {**SIZES, "use_parallel_residual": False}),
    "opt": ("OPT", OF_OPT),
    "opt without biases": ("OPT", {**OF_OPT, "enable_bias": False}),
    "gpt-neo": (
        "GPTNeo",
        {
            **{name: SIZES[name] for name in ("vocab_size", "hidden_size")},
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "gpt-oss": ("GptOss", {**HEADS_OF_8, **LOCAL_MOE, **rope()}),
    "olmo": ("Olmo", UNSHARED),
    "olmo clip": ("Olmo", {**SHARED, "clip_qkv": 0.5}),
    "gpt2": ("GPT2", OF_GPT),
    "gpt2 scaled": ("GPT2", {**OF_GPT, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2 relu": ("GPT2", {**OF_GPT, "activation_function": "relu"}),
    "phi": ("Phi", UNSHARED),
    "gptj": ("GPTJ", {**OF_GPT, "rotary_dim": 4}),
    "codegen": ("CodeGen", {**OF_GPT, "rotary_dim": 4, "n_ctx": 64}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": ("Falcon", SIZES),
    "mpt": (
        "Mpt",
        {
            "vocab_size": 96,
            "d_model": 32,
            "n_layers": 3,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
    ),
    "gpt-bigcode": ("GPTBigCode", OF_GPT),
    "starcoder2": ("Starcoder2", SHARED),
    "stablelm": ("StableLm", SHARED),
    "granite": (
        "Granite",
        {
            **SHARED,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
    ),
    "glm": ("Glm", HEADS_OF_8),
    "glm4": ("Glm4", HEADS_OF_8),
    "smollm3": ("SmolLM3", {**SHARED, "no_rope_layer_interval": 2}),
    "nemotron": ("Nemotron", SHARED),
    "qwen3-moe": ("Qwen3Moe", {**HEADS_OF_8, **MOE}),
    "qwen2-moe": ("Qwen2Moe", {**SHARED, **MOE, "shared_expert_intermediate_size": 32}),
    "gemma": ("Gemma", HEADS_OF_8),
    "gemma2": ("Gemma2", {**HEADS_OF_8, **AFTER}),
    "gemma3": ("Gemma3Text", {**HEADS_OF_8, **AFTER}),
    "ministral3": ("Ministral3", SHARED),
    "seed-oss": ("SeedOss", HEADS_OF_8),
    "ernie": ("Ernie4_5", SHARED),
    "apertus": ("Apertus", SHARED),
    "arcee": ("Arcee", SHARED),
}
# What keeps circuits from being found in these, in the words of the message.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "opt-350m": (
        "OPT",
        {**OF_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "token embeddings of another width",
    ),
    "opt with norms after": (
        "OPT",
        {**OF_OPT, "do_layer_norm_before": False},
        "do_layer_norm_before",
    ),
    "olmoe": ("Olmoe", {**UNSHARED, **EXPERTS}, "query and key norms that mix heads"),
    "olmo2": ("Olmo2", SHARED, "query and key norms that mix heads"),
    "olmo3": ("Olmo3", {**SHARED, "sliding_window": 8}, "query and key norms that mix heads"),
    "falcon alibi": (
        "Falcon",
        {**SIZES, "alibi": True, "parallel_attn": False, "bias": True, "multi_query": False},
        "the output of layer 0 differs",
    ),
    "stablelm with norms": (
        "StableLm",
        {**SHARED, "qk_layernorm": True, "use_parallel_residual": True},
        "query and key norms that differ between heads",
    ),
    "deepseek": (
        "DeepseekV3",
        {
            **UNSHARED,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        "no attention with queries, keys and values .DeepseekV3Attention",
    ),
    "mamba": (
        "Mamba",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3},
        "no attention with queries, keys and values",
    ),
    "exaone4": (
        "Exaone4",
        {**SHARED, "sliding_window": 8},
        "attention of a class that is not known",
    ),
    "openai-gpt": ("OpenAIGPT", OF_GPT, "attention of a class that is not known"),
    "xglm": (
        "XGLM",
        {
            "vocab_size": 96,
            "d_model": 32,
            "num_layers": 3,
            "attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
        },
        "the embedding differs",
    ),
}
# Whose bridges compute something else in TransformerLens 3.
SINCE_4: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", {**SHARED, "logit_scale": 0.5}),
    "cohere2": ("Cohere2", {**SHARED, "sliding_window": 8}),
}


def config_of(name: str) -> Any:
    """The configuration of one of these models."""
    kind, settings, *_ = {**READ, **REFUSED, **SINCE_4}[name]
    return getattr(transformers, f"{kind}Config")(**settings)


def hugging_face_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights and biases, large enough that every component matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(torch.float32)
        with torch.no_grad():
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    noise = torch.randn_like(parameter)
                    if isinstance(module, nn.Embedding):
                        parameter.copy_(noise)
                    elif parameter.dim() > 1:
                        parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
                    else:
                        # What norms multiply by stays about what it is: one, or in Gemma zero.
                        start = parameter if name == "weight" else torch.zeros_like(parameter)
                        parameter.copy_(start + noise * 0.3)
    # As in files; TransformerLens asks for it.
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval()


def word_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Words w1, w2, ... by their numbers, and BOS."""
    words = {"<bos>": 0, **{f"w{index}": index for index in range(1, size)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<bos>")
    # TransformerLens would load a tokenizer without these two a second time, from its files.
    known = {"name_or_path": "words", "add_bos_token": True}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special, **known)


def bridge_to(model: Any, name: str = "small model") -> TransformerBridge:
    """A bridge as a user makes it, without a tokenizer."""
    dtype = next(model.parameters()).dtype
    tokenizer = word_tokenizer(model.config.vocab_size)
    with contextlib.redirect_stdout(io.StringIO()):
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=tokenizer, device="cpu", dtype=dtype
        )
    bridge.tokenizer = None
    return bridge.eval()

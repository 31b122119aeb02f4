"""Small random models of the architectures of Hugging Face's transformers, and bridges to them."""

import contextlib
import io
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformer_lens.model_bridge import TransformerBridge


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

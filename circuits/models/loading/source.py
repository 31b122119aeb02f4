"""Models of Hugging Face's transformers, read from folders, files and the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformer_lens.utilities.architectures import classify_model_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from circuits.models.loading.placement import Placement
from circuits.models.loading.refusals import NO_CODE, first_line, refusals
from circuits.system.errors import InputError
from circuits.system.files import BROKEN, is_file, read_json_object
from circuits.system.messages import suggestion

CONFIG_FILE = "config.json"
EMBEDDED = "toy-world"
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

# What models without a causal decoder are, by TransformerLens' name for their kind.
NO_DECODERS = {
    "seq2seq": "an encoder-decoder model",
    "masked_lm": "an encoder (a masked language model)",
    "audio": "an audio model",
    "vision": "a vision model",
}


# Kinds of layers in configurations.
ATTENTION = ("full_attention", "sliding_attention", "attention")


# What files of tokenizers are called.
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "merges.txt")


@dataclass(frozen=True)
class Source:
    """A model of transformers, and where it comes from.

    Attributes:
        called: for messages.
        name: of what is made of it.
        place: the folder, or the name on the hub.
    """

    called: str
    name: str
    place: str
    model: Any
    tokenizer: Any


def from_folder(folder: Path, placement: Placement) -> Source:
    """Read a folder with config.json, safetensors weights and the tokenizer's files."""
    _check_layers(folder)
    return _read(f"the folder {folder}", folder.name or str(folder), str(folder), placement)


def from_gguf(file: Path, placement: Placement) -> Source:
    """Read a GGUF file; its weights are dequantized."""
    chosen = {"gguf_file": file.name}
    return _read(f"the file {file}", file.stem, str(file.parent), placement, chosen)


def from_hub(name: str, placement: Placement) -> Source:
    """Read a model of this name from the hub, or from where it has been downloaded to."""
    official = official_name(name)
    try:
        return _read(f"the model {name!r}", name, official, placement)
    except InputError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise InputError(
            f"the weights of {name!r} cannot be downloaded: {first_line(cause)} "
            "Download them elsewhere and give the folder."
        ) from cause


def official_name(name: str) -> str:
    """Return the name on the hub of a model; an unknown short name is refused."""
    known = {each.lower(): each for each in OFFICIAL_MODEL_NAMES}
    for official, aliases in MODEL_ALIASES.items():
        known |= {alias.lower(): official for alias in aliases}
    if name.lower() in known:
        return known[name.lower()]
    # The hub has more models than TransformerLens lists.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    hint = f"use {EMBEDDED}, a name such as gpt2 or EleutherAI/pythia-160m, or a folder."
    similar = suggestion(name, [EMBEDDED, *known], otherwise=hint)
    raise InputError(f"there is no model or folder {name!r}; {similar}")


def _read(
    called: str, name: str, place: str, placement: Placement, file: Mapping[str, str] | None = None
) -> Source:
    chosen = {**NO_CODE, **(file or {})}
    with refusals(f"{called} cannot be loaded as a checkpoint"):
        settings = AutoConfig.from_pretrained(place, **chosen)
        _check_is_decoder(called, settings)
        # The attention that config.json names may be a kernel on the hub, which is code. Any does,
        # as only weights are taken.
        settings._attn_implementation = "eager"
        if file:
            arguments = {**placement.arguments, **chosen}
            found: Any = AutoModelForCausalLM.from_pretrained(place, **arguments)
            # The weights are plain now, which the configuration does not say.
            found.config.__dict__.pop("quantization_config", None)
            found.config.architectures = [type(found).__name__]
            tokenizer = AutoTokenizer.from_pretrained(place, **chosen)
            return Source(called, name, place, found.eval(), tokenizer)
        found = AutoModelForCausalLM.from_pretrained(
            place,
            config=settings,
            use_safetensors=True,
            output_loading_info=True,
            **placement.arguments,
            **NO_CODE,
        )
        model, loaded = found
        _check_has_tokenizer(called, Path(place))
        tokenizer = AutoTokenizer.from_pretrained(place, **NO_CODE)
    _check_complete(called, model.state_dict(), loaded)
    return Source(called, name, place, model.eval(), tokenizer)


def _check_has_tokenizer(called: str, place: Path) -> None:
    found = (file for pattern in TOKENIZER_FILES for file in place.glob(pattern))
    if place.is_dir() and not any(found):
        raise InputError(
            f"{called} has no tokenizer files, such as tokenizer.json; save the tokenizer there as "
            "well, with its save_pretrained."
        )


def _check_is_decoder(called: str, settings: Any) -> None:
    kind = classify_model_config(settings)
    if kind in NO_DECODERS:
        raise InputError(
            f"{called} is {NO_DECODERS[kind]}; circuits are found in decoder-only language "
            "models, such as gpt2, pythia-160m or Llama: give one of these."
        )
    kinds = {*(getattr(settings, "layer_types", None) or ())}
    others = sorted(each for each in kinds if each not in ATTENTION)
    if others:
        raise InputError(
            f"{called} has layers that are no attention with queries, keys and values "
            f"({', '.join(others)}), and circuits are not found in such models; take another model."
        )
    quantized = getattr(settings, "quantization_config", None)
    if quantized is not None:
        how = getattr(quantized, "quant_method", None) or dict(quantized).get("quant_method")
        raise InputError(
            f"{called} holds quantized weights ({how or 'it does not say how'}); circuits need "
            "plain ones; give a complete folder in float32, bfloat16 or float16, or a GGUF file, "
            "which is dequantized."
        )


def _check_layers(folder: Path) -> None:
    """Refuse more layers than the files hold tensors, before anything of that size is made."""
    content = read_json_object(folder / CONFIG_FILE, "configuration")
    n_tensors = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                n_tensors += len(file.keys())
        except BROKEN as error:
            raise InputError(
                f"{path} is truncated or not a safetensors file ({first_line(error)}); restore it."
            ) from error
    for name in LAYER_COUNTS:
        n_layers = content.get(name)
        if isinstance(n_layers, int) and n_layers < 1:
            raise InputError(f"{folder / CONFIG_FILE}: {name} is {n_layers}; correct it.")
        if isinstance(n_layers, int) and n_layers > n_tensors > 0:
            raise InputError(
                f"{folder / CONFIG_FILE}: {name} is {n_layers}, but the folder holds {n_tensors} "
                "tensors; correct it."
            )


def _check_complete(called: str, weights: Mapping[str, Tensor], loaded: Mapping[str, Any]) -> None:
    """Refuse weights that transformers made up, and layers of the files that it left out."""
    same_in_all_layers = {re.sub(r"\.\d+\.", ".", name) for name in weights}
    left_out = [
        name
        for name in sorted(loaded["unexpected_keys"])
        if re.sub(r"\.\d+\.", ".", name) in same_in_all_layers
    ]
    for problem, names in (
        ("lacks weights that its config.json needs", sorted(loaded["missing_keys"])),
        ("has weights of more layers than its config.json says", left_out),
    ):
        if names:
            raise InputError(
                f"the checkpoint in {called} {problem} ({names[0]} and {len(names) - 1} more); "
                "restore its files."
            )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a configuration."""
    return is_file(folder / CONFIG_FILE)

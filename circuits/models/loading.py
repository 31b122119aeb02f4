"""Load, build and save models."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens import loading_from_pretrained as conversion
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from circuits.system.device import device_called, dtype_called
from circuits.system.errors import InputError
from circuits.system.files import path_of, read_json, read_tensors, write_json, write_tensors
from circuits.system.kinds import expect

Model = HookedTransformer
Weights = Mapping[str, Tensor]
EMBEDDED = "toy-world"
ASSETS = Path(__file__).parents[1] / "assets"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "circuits.model", 1

# Suffixes of the buffers that TransformerLens derives from the configuration.
DERIVED_BUFFERS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")

# TransformerLens' names for ways of rewriting weights, none of which is wanted.
REWRITES = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a model by name or from a folder, with its weights as trained: not folded or centred.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
    (4, 4, 128)

    Args:
        name_or_path: `toy-world`, the model that ships with this package; a name that
            TransformerLens knows, such as `gpt2`; or a folder that `save_model` wrote or that
            holds a Hugging Face checkpoint (config.json, safetensors weights, tokenizer files).
        device: None takes CUDA if it is available, else the CPU. "cuda" is the GPU of this rank
            where several processes work together.
        dtype: of the weights.

    Raises:
        InputError: no model has this name, the folder holds no model, the weights cannot be
            downloaded, or the device does not exist.
    """
    chosen, dtype = _device(device), dtype_called(dtype)
    # A folder of this name in the working directory does not hide the model that ships.
    folder = ASSETS / EMBEDDED if name_or_path == EMBEDDED else path_of(name_or_path)
    if folder.is_dir():
        return _load_folder(folder, chosen, dtype)
    return _load_by_name(str(name_or_path), chosen, dtype)


def check_model(model: object) -> None:
    """Refuse what is no model, such as its name or one of Hugging Face's."""
    expect(model, Model, "a HookedTransformer", "load it with circuits.load_model")


def build_model(
    config: Mapping[str, Any],
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Build a model from a configuration and weights.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> weights = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    >>> halved = circuits.build_model(model.cfg.to_dict(), weights, model.tokenizer)

    Args:
        config: arguments of TransformerLens' `HookedTransformerConfig`.
        weights: a state dict with TransformerLens' names.

    Raises:
        InputError: a weight is missing, unknown or of another shape than the configuration needs.
    """
    # A seed in the configuration would set the seeds of torch, numpy and random globally.
    fixed = {"seed": None, "init_weights": False}
    chosen = str(_device(device))
    placed = {"dtype": dtype_called(dtype), "device": chosen}
    settings = HookedTransformerConfig(**{**config, **fixed, **placed})
    model = HookedTransformer(settings, tokenizer)
    given = _without_derived(weights)
    _check_weights(_without_derived(model.state_dict()), given)
    # Not strict, because the derived buffers are missing.
    model.load_state_dict(given, strict=False)
    return model.eval()


def save_model(model: Model, folder: str | Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, for `load_model`.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     circuits.save_model(model, folder)
    ...     loaded = circuits.load_model(folder)
    """
    check_model(model)
    folder = Path(folder)
    # Types and devices are chosen when the model is loaded.
    settings = model.cfg.to_dict()
    config = {name: value for name, value in settings.items() if _is_json(value)}
    weights = _without_derived(model.state_dict())
    write_tensors(folder / WEIGHTS_FILE, weights, {}, FORMAT, FORMAT_VERSION)
    write_json(folder / CONFIG_FILE, {"config": config}, FORMAT, FORMAT_VERSION)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _without_derived(state: Weights) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith(DERIVED_BUFFERS)}


def _check_weights(needed: Weights, given: Weights) -> None:
    wrong = []
    for name, tensor in needed.items():
        shape = tuple(tensor.shape)
        if name not in given:
            wrong.append(f"{name} (missing)")
        elif given[name].shape != shape:
            found = tuple(given[name].shape)
            wrong.append(f"{name} (has shape {found}, needs {shape})")
    wrong += [f"{name} (unknown)" for name in given if name not in needed]
    if wrong:
        shown = [*wrong[:4], "..."] if len(wrong) > 4 else wrong
        raise InputError(f"the weights do not fit the configuration: {', '.join(shown)}.")


def _device(device: str | torch.device | None) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return device_called(default if device is None else device)


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise InputError(
            f"the folder {folder} holds no model: it has no {CONFIG_FILE}; "
            "give a folder that save_model wrote, or one with a checkpoint."
        )
    if not _is_saved_model(config):
        return _load_checkpoint(folder, device, dtype)
    settings = read_json(config, FORMAT, FORMAT_VERSION)["config"]
    weights, _ = read_tensors(folder / WEIGHTS_FILE, FORMAT, FORMAT_VERSION)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if has_tokenizer else None
    return build_model(settings, weights, tokenizer, device=device, dtype=dtype)


def _is_saved_model(config: Path) -> bool:
    """Whether `save_model` wrote it; folders of checkpoints have a config.json as well."""
    try:
        content = json.loads(config.read_text())
        return content.get("format") == FORMAT
    except ValueError as error:
        raise InputError(f"{config} is truncated or not JSON ({error}); restore it.") from error


def _load_checkpoint(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """Load a Hugging Face checkpoint and convert it."""
    try:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the folder {folder} cannot be loaded as a checkpoint: {_first_line(error)}"
        ) from error
    with tempfile.TemporaryDirectory() as parent:
        # TransformerLens guesses the architecture from words in the path, such as "llama". Under
        # a neutral path it reads config.json instead.
        neutral = Path(parent, "checkpoint")
        neutral.symlink_to(folder.resolve(), target_is_directory=True)
        path = str(neutral)
        try:
            config = conversion.get_pretrained_model_config(path, device=str(device), dtype=dtype)
            weights = conversion.get_pretrained_state_dict(path, config, source, dtype=dtype)
        except (NotImplementedError, ValueError, AttributeError, KeyError) as error:
            raise InputError(
                f"TransformerLens cannot convert the checkpoint in {folder}: {_first_line(error)}"
            ) from error
    model = HookedTransformer(config, tokenizer, move_to_device=False)
    rewrites = dict.fromkeys(REWRITES, False)
    model.load_and_process_state_dict(weights, **rewrites)
    model.cfg.model_name = folder.name
    model.move_model_modules_to_device()
    return model.eval()


def _load_by_name(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    known = conversion.make_model_alias_map()
    lower = name.lower()
    if lower not in known:
        hint = f"use {EMBEDDED}, a name that TransformerLens knows (gpt2, pythia-160m) or a folder."
        similar = difflib.get_close_matches(lower, known, n=3)
        if similar:
            hint = f"did you mean {' or '.join(similar)}?"
        raise InputError(f"there is no model or folder {name!r}; {hint}")
    try:
        # TransformerLens prints, but a program may read our standard output.
        with contextlib.redirect_stdout(sys.stderr):
            return HookedTransformer.from_pretrained_no_processing(
                name, device=str(device), dtype=dtype
            ).eval()
    except OSError as error:
        raise InputError(
            f"the weights of {name!r} cannot be downloaded: {_first_line(error)} "
            "Download them elsewhere and give the folder."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)

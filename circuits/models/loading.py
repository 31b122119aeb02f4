"""Loading, building and saving models."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from circuits.system.device import device_called
from circuits.system.errors import InputError
from circuits.system.files import read_json, read_tensors, write_json, write_tensors

Model = HookedTransformer

EMBEDDED = "toy-world"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "circuits.model", 1


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model by name or from a folder, its weights as trained (nothing folded or centred).

    Args:
        name_or_path: `toy-world`, the model that ships with this package; any name TransformerLens knows (`gpt2`); or a folder, written by
            `save_model` or holding a Hugging Face checkpoint (config.json, safetensors weights, tokenizer files).
        device: None takes CUDA when there is one, else the CPU. "cuda" is the GPU of this rank where several processes work together.
        dtype: of the weights.

    Raises:
        InputError: no such name or folder, no CUDA when asked for, a folder that holds no model, weights that cannot be fetched.
    """
    chosen = _device(device)
    if name_or_path == EMBEDDED:
        with resources.as_file(resources.files("circuits") / "assets" / EMBEDDED) as folder:
            return _load_folder(folder, chosen, dtype)
    if Path(name_or_path).is_dir():
        return _load_folder(Path(name_or_path), chosen, dtype)
    return _load_by_name(str(name_or_path), chosen, dtype)


def build_model(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model from HookedTransformerConfig's arguments and a state dict under TransformerLens names.

    Raises:
        InputError: weights are missing, left over or of another shape than the configuration asks for.
    """
    # A seed in the configuration would set the seeds of torch, numpy and random for the whole process.
    settings = {
        **config,
        "seed": None,
        "init_weights": False,
        "dtype": dtype,
        "device": str(_device(device)),
    }
    model = HookedTransformer(HookedTransformerConfig(**settings), tokenizer)
    expected = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.endswith(_BUFFERS)
    }
    wrong = [
        f"{name} ({'missing' if name not in weights else f'has shape {tuple(weights[name].shape)}, needs {tuple(shape)}'})"
        for name, shape in expected.items()
        if name not in weights or weights[name].shape != shape
    ] + [
        f"{name} (unknown)"
        for name in weights
        if name not in expected and not name.endswith(_BUFFERS)
    ]
    if wrong:
        raise InputError(
            f"the weights do not fit the configuration: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}."
        )
    model.load_state_dict({name: weights[name].to(dtype) for name in expected}, strict=False)
    return model.eval()


def save_model(model: Model, folder: str | Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`, for `load_model`."""
    config = {name: value for name, value in model.cfg.to_dict().items() if _is_json(value)}
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_BUFFERS)
    }
    write_tensors(Path(folder) / WEIGHTS_FILE, weights, {}, FORMAT, FORMAT_VERSION)
    write_json(Path(folder) / CONFIG_FILE, {"config": config}, FORMAT, FORMAT_VERSION)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


# Buffers that TransformerLens derives from the configuration.
_BUFFERS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")


def _device(device: str | torch.device | None) -> torch.device:
    return device_called(
        device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    )


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise InputError(
            f"the folder {folder} holds no model: it has no {CONFIG_FILE}; give a folder written by save_model or a checkpoint's."
        )
    try:
        ours = json.loads(config.read_text()).get("format") == FORMAT
    except ValueError as error:
        raise InputError(f"{config} is truncated or not JSON ({error}); restore it.") from error
    if not ours:
        return _load_checkpoint(folder, device, dtype)
    settings = read_json(config, FORMAT, FORMAT_VERSION)["config"]
    weights = folder / WEIGHTS_FILE
    tensors = read_tensors(weights, FORMAT, FORMAT_VERSION)[0]
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(folder)
        if (folder / "tokenizer.json").is_file()
        else None
    )
    return build_model(settings, tensors, tokenizer, device=device, dtype=dtype)


def _load_checkpoint(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """A Hugging Face checkpoint in a folder."""
    from transformer_lens import loading_from_pretrained as loading

    try:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the folder {folder} cannot be loaded as a checkpoint: {_first_line(error)}"
        ) from error
    with tempfile.TemporaryDirectory() as neutral:
        # TransformerLens guesses architectures from words in a path ("llama"); under a neutral name it reads config.json instead.
        link = Path(neutral) / "checkpoint"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        try:
            config = loading.get_pretrained_model_config(str(link), device=str(device), dtype=dtype)
            weights = loading.get_pretrained_state_dict(str(link), config, source, dtype=dtype)
        except (NotImplementedError, ValueError, AttributeError, KeyError) as error:
            raise InputError(
                f"TransformerLens cannot convert the checkpoint in {folder}: {_first_line(error)}"
            ) from error
    model = HookedTransformer(config, tokenizer, move_to_device=False)
    keep_as_trained = {
        "fold_ln": False,
        "center_writing_weights": False,
        "center_unembed": False,
        "fold_value_biases": False,
    }
    model.load_and_process_state_dict(weights, **keep_as_trained)
    model.cfg.model_name = folder.name
    model.move_model_modules_to_device()
    return model.eval()


def _load_by_name(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    from transformer_lens import loading_from_pretrained as loading

    known = loading.make_model_alias_map()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        meant = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"use {EMBEDDED}, a name that TransformerLens knows (gpt2, pythia-160m) or a folder."
        )
        raise InputError(f"there is no model or folder {name!r}; {meant}")
    try:
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # TransformerLens prints, and our output may be read by a program
            return HookedTransformer.from_pretrained_no_processing(
                name, device=str(device), dtype=dtype
            ).eval()
    except OSError as error:
        raise InputError(
            f"the weights of {name!r} cannot be had: {_first_line(error)} Download them elsewhere and give the folder."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _is_json(value: object) -> bool:
    return (
        value is None
        or isinstance(value, str | int | float | bool)
        or (isinstance(value, list) and all(_is_json(item) for item in value))
    )

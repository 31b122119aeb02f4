"""Load, build and save models."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformer_lens import (
    HookedTransformer,
    HookedTransformerConfig,
    loading_from_pretrained as conversion,
)
from transformer_lens.utilities.architectures import classify_model_config, classify_model_name
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    dynamic_module_utils as remote_code,
)

from circuits.system.device import device_called, dtype_called
from circuits.system.errors import InputError
from circuits.system.files import (
    BROKEN,
    DIGEST,
    is_file,
    path_of,
    read_json,
    read_json_object,
    read_tensors,
    stated_digest,
    write_bytes,
    write_json,
    write_tensors,
)
from circuits.system.kinds import expect
from circuits.system.messages import suggestion, warnings_passed_on
from circuits.system.torch_modes import without_modes

Model = HookedTransformer
Weights = Mapping[str, Tensor]
# Under these names wrappers keep a model.
INSIDE = ("_orig_mod", "module", "base_model", "model")
EMBEDDED = "toy-world"
ASSETS = Path(__file__).parents[1] / "assets"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
# Keys of config.json with the digests of the other files.
DIGEST_OF = "digest of "
FORMAT, FORMAT_VERSION = "circuits.model", 1
LONGEST_REASON = 200  # characters of another library's message

# Suffixes of the buffers that TransformerLens derives from the configuration.
DERIVED_BUFFERS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")

TRUST = "trust_remote_code"
NO_CODE: dict[str, Any] = {TRUST: False}
# Seconds that transformers waits for an answer to its question; with 0 it does not ask.
TIME_TO_ANSWER = "TIME_OUT_REMOTE_CODE"
# These settings are global, so models are loaded one at a time.
_LOADING = threading.RLock()

# What models without a causal decoder are, by TransformerLens' name for their kind.
NO_DECODERS = {
    "seq2seq": "an encoder-decoder model",
    "masked_lm": "an encoder (a masked language model)",
    "audio": "an audio model",
    "vision": "a vision model",
}

# TransformerLens' names for ways of rewriting weights, none of which is wanted.
REWRITES = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


@without_modes()
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
        InputError: no model has this name, the folder holds no model, or one that cannot be loaded
            (such as an encoder, or a model that needs Python code of its own, which is never run);
            the weights cannot be downloaded, or the device does not exist.
    """
    # A folder of this name in the working directory does not hide the model that ships.
    is_embedded = isinstance(name_or_path, str) and name_or_path == EMBEDDED
    folder = ASSETS / EMBEDDED if is_embedded else path_of(name_or_path)
    with _running_no_code():
        chosen, dtype = _device(device), dtype_called(dtype)
        if folder.is_dir():
            return _load_folder(folder, chosen, dtype)
        return _load_by_name(str(name_or_path), chosen, dtype)


@without_modes()
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
        InputError: the configuration makes no model; a weight is missing, unknown or of another
            shape than it needs.
    """
    for name, given in {"config": config, "weights": weights}.items():
        expect(given, Mapping, f"a dict as {name}", "see a model's cfg.to_dict() and state_dict()")
    if tokenizer is not None:
        remedy = "take a model's .tokenizer, or leave it out"
        expect(tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers", remedy)
    # A seed in the configuration would set the seeds of torch, numpy and random globally.
    fixed = {"seed": None, "init_weights": False}
    with _running_no_code():
        chosen = str(_device(device))
        placed = {"dtype": dtype_called(dtype), "device": chosen}
        try:
            settings = HookedTransformerConfig(**{**config, **fixed, **placed})
        # It raises errors of several types.
        except Exception as error:
            raise InputError(
                f"the configuration makes no model ({_first_line(error)}); give one such as "
                "model.cfg.to_dict()."
            ) from error
        model = HookedTransformer(settings, tokenizer)
    own = _without_derived(weights)
    _check_weights(_without_derived(model.state_dict()), own)
    # Not strict, because the derived buffers are missing.
    model.load_state_dict(own, strict=False)
    return model.eval()


def check_class(model: object) -> None:
    """Refuse anything but a HookedTransformer."""
    if isinstance(model, Model):
        return
    inside = [name for name in INSIDE if isinstance(getattr(model, name, None), Model)]
    remedy = f"hand over its .{inside[0]}" if inside else "load it with circuits.load_model"
    raise InputError(f"expected a HookedTransformer, got {type(model).__name__}; {remedy}.")


def save_model(model: Model, folder: str | Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, for `load_model`.

    `config.json` comes last and names the digests of the other files, so that files of two models,
    or of a save that was interrupted, are never taken for one model.

    Raises:
        InputError: the files cannot be written.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     circuits.save_model(model, folder)
    ...     loaded = circuits.load_model(folder)
    """
    check_class(model)
    folder = path_of(folder)
    # Types and devices are chosen when the model is loaded.
    settings = model.cfg.to_dict()
    config = {name: value for name, value in settings.items() if _is_json(value)}
    weights = _without_derived(model.state_dict())
    written = write_tensors(folder / WEIGHTS_FILE, weights, {}, FORMAT, FORMAT_VERSION)
    digests = {DIGEST_OF + WEIGHTS_FILE: stated_digest(written)}
    for name, content in _tokenizer_files(model.tokenizer).items():
        write_bytes(folder / name, content)
        digests[DIGEST_OF + name] = sha256(content).hexdigest()
    # Each on a line of its own that can be deleted.
    described = {**digests, "config": config}
    write_json(folder / CONFIG_FILE, described, FORMAT, FORMAT_VERSION)


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


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
    if not is_file(config):
        raise InputError(
            f"the folder {folder} holds no model: it has no {CONFIG_FILE}; "
            "give a folder that save_model wrote, or one with a checkpoint."
        )
    content = read_json_object(config, "configuration")
    # Folders of checkpoints have a config.json as well.
    if content.get("format") != FORMAT:
        return _load_checkpoint(folder, device, dtype)
    return _load_saved(folder, device, dtype)


def _load_saved(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """Load what `save_model` wrote."""
    content = read_json(folder / CONFIG_FILE, FORMAT, FORMAT_VERSION)
    weights, _ = read_tensors(folder / WEIGHTS_FILE, FORMAT, FORMAT_VERSION)
    try:
        _check_digests(folder, content)
        has_tokenizer = (folder / "tokenizer.json").is_file()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if has_tokenizer else None
        return build_model(content["config"], weights, tokenizer, device=device, dtype=dtype)
    except InputError:
        raise
    # The libraries for tokenizers and models raise errors of every type for files that are damaged.
    except Exception as error:
        raise InputError(
            f"the model in {folder} is damaged ({type(error).__name__}: {_first_line(error)}); "
            "restore the folder or save the model again."
        ) from error


def _check_digests(folder: Path, content: Mapping[str, Any]) -> None:
    for key, digest in content.items():
        if not key.startswith(DIGEST_OF):
            continue
        path = folder / key.removeprefix(DIGEST_OF)
        if path.name == WEIGHTS_FILE:
            found = stated_digest(path)
        else:
            found = sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if found != digest:
            raise InputError(
                f"{path} is not the file that was saved with {CONFIG_FILE}: it was changed, or "
                "saving was interrupted. Save the model again; if the change is wanted, delete "
                f'the lines "{key}" and "{DIGEST}" in {CONFIG_FILE}.'
            )


def _load_checkpoint(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """Load a Hugging Face checkpoint and convert it."""
    _check_layers(folder)
    with _refusals(f"the folder {folder} cannot be loaded as a checkpoint"):
        settings = AutoConfig.from_pretrained(folder, **NO_CODE)
        _check_is_decoder(str(folder), classify_model_config(settings))
        # The attention that config.json names may be a kernel on the hub, which is code. Any does,
        # as only weights are taken.
        settings._attn_implementation = "eager"
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **NO_CODE,
        )
        source, loaded = found
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    _check_complete(folder, source.state_dict(), loaded)
    with (
        tempfile.TemporaryDirectory() as parent,
        _refusals(f"TransformerLens cannot convert the checkpoint in {folder}"),
    ):
        # TransformerLens guesses the architecture from words in the path, such as "llama". Under
        # a neutral path it reads config.json instead.
        neutral = Path(parent, "checkpoint")
        neutral.symlink_to(folder.resolve(), target_is_directory=True)
        path = str(neutral)
        config = conversion.get_pretrained_model_config(
            path, device=str(device), dtype=dtype, **NO_CODE
        )
        weights = conversion.get_pretrained_state_dict(path, config, source, dtype=dtype, **NO_CODE)
        model = HookedTransformer(config, tokenizer, move_to_device=False)
        rewrites = dict.fromkeys(REWRITES, False)
        model.load_and_process_state_dict(weights, **rewrites)
    model.cfg.model_name = folder.name
    model.move_model_modules_to_device()
    return model.eval()


def _check_layers(folder: Path) -> None:
    """Refuse a number of layers for which the files have no weights, before they are made."""
    content = read_json_object(folder / CONFIG_FILE, "configuration")
    n_tensors = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                n_tensors += len(file.keys())
        except BROKEN as error:
            raise InputError(
                f"{path} is truncated or not a safetensors file ({_first_line(error)}); restore it."
            ) from error
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        n_layers = content.get(name)
        if isinstance(n_layers, int) and n_layers > n_tensors > 0:
            raise InputError(
                f"{folder / CONFIG_FILE}: {name} is {n_layers}, but the folder holds {n_tensors} "
                "tensors; correct it."
            )


def _check_complete(folder: Path, weights: Weights, loaded: Mapping[str, Any]) -> None:
    """Refuse weights that Transformers made up, and layers of the files that it left out."""
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
                f"the checkpoint in {folder} {problem} ({names[0]} and {len(names) - 1} more); "
                "restore its files."
            )


def _load_by_name(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    known = conversion.make_model_alias_map()
    if name.lower() not in known:
        hint = f"use {EMBEDDED}, a name that TransformerLens knows (gpt2, pythia-160m) or a folder."
        similar = suggestion(name, [EMBEDDED, *known], otherwise=hint)
        raise InputError(f"there is no model or folder {name!r}; {similar}")
    place: dict[str, Any] = {"device": str(device), "dtype": dtype}
    # TransformerLens prints, but a program may read our standard output.
    with (
        contextlib.redirect_stdout(sys.stderr),
        _refusals(f"the model {name!r} cannot be loaded"),
    ):
        kind = "causal_lm"
        # The hub has no configuration for a few names; TransformerLens says what cannot be loaded.
        with contextlib.suppress(Exception):
            kind = classify_model_name(known[name.lower()])
        _check_is_decoder(name, kind)
        try:
            config = conversion.get_pretrained_model_config(name, **place, **NO_CODE)
            if config.trust_remote_code:
                raise ValueError(f"TransformerLens would load it with {TRUST}")
            return HookedTransformer.from_pretrained_no_processing(name, **place, **NO_CODE).eval()
        except OSError as error:
            raise InputError(
                f"the weights of {name!r} cannot be downloaded: {_first_line(error)} "
                "Download them elsewhere and give the folder."
            ) from error


def _check_is_decoder(name: str, kind: str) -> None:
    if kind in NO_DECODERS:
        raise InputError(
            f"{name} is {NO_DECODERS[kind]}; circuits are found in decoder-only language models, "
            "such as gpt2, pythia-160m or Llama: give one of these."
        )


@contextlib.contextmanager
def _running_no_code() -> Iterator[None]:
    """Run no code that comes with a model, ask nobody whether it should be, and fail by no warning.

    `trust_remote_code=False` is not enough: TransformerLens loads a tokenizer a second time without
    it, in which case transformers asks on the terminal, and takes it for true for some names.
    """
    changed = ((conversion, "NEED_REMOTE_CODE_MODELS", ()), (remote_code, TIME_TO_ANSWER, 0))
    with _LOADING, warnings_passed_on(), contextlib.ExitStack() as stack:
        for module, name, value in changed:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


@contextlib.contextmanager
def _refusals(problem: str) -> Iterator[None]:
    """Tell in one line what transformers or TransformerLens cannot load."""
    try:
        yield
    except InputError:
        raise
    # They raise errors of every type.
    except Exception as error:
        if TRUST in str(error):
            raise InputError(
                f"{problem}: it needs Python code that comes with it (auto_map in its JSON files), "
                "and code of models is never run; give a checkpoint whose architecture "
                "transformers itself has."
            ) from error
        words = str(error).split()
        reason = " ".join([type(error).__name__, *words])
        reason = reason[:LONGEST_REASON]
        raise InputError(
            f"{problem} ({reason}); give a complete folder of a decoder-only model that "
            "TransformerLens supports."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)

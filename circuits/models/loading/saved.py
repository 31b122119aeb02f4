"""Models in TransformerLens' own format: built from a configuration and weights, and saved."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from circuits.models.backend import (
    HAS_HOOKED_TRANSFORMER,
    BackendName,
    Model,
    check_backend,
    check_class,
)
from circuits.models.loading import native
from circuits.models.loading.placement import Placement
from circuits.models.loading.refusals import first_line, running_no_code
from circuits.models.loading.source import CONFIG_FILE
from circuits.system.device import device_called, dtype_called
from circuits.system.errors import InputError
from circuits.system.files import (
    DIGEST,
    path_of,
    read_json,
    read_tensors,
    stated_digest,
    write_bytes,
    write_json,
    write_tensors,
)
from circuits.system.kinds import expect
from circuits.system.torch_modes import without_modes

if HAS_HOOKED_TRANSFORMER:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

Weights = Mapping[str, Tensor]
WEIGHTS_FILE = "model.safetensors"
# Keys of config.json with the digests of the other files.
DIGEST_OF = "digest of "
FORMAT, FORMAT_VERSION = "circuits.model", 1

# Suffixes of the buffers that TransformerLens derives from the configuration.
DERIVED_BUFFERS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")


@without_modes()
def build_model(
    config: Mapping[str, Any],
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    backend: BackendName | None = None,
) -> Model:
    """Build a model from a configuration and weights.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> weights = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    >>> halved = circuits.build_model(model.cfg.to_dict(), weights, model.tokenizer)

    Args:
        config: arguments of TransformerLens' `HookedTransformerConfig`, or of the configuration
            of a `TransformerBridge` that TransformerLens builds itself.
        weights: a state dict with TransformerLens' names, such as `blocks.0.attn.W_Q`, or those of
            such a bridge.
        backend: see `load_model`.

    Raises:
        InputError: the configuration makes no model; a weight is missing, unknown or of another
            shape than it needs.
    """
    check_backend(backend)
    for name, given in {"config": config, "weights": weights}.items():
        expect(given, Mapping, f"a dict as {name}", "see a model's cfg.to_dict() and state_dict()")
    if tokenizer is not None:
        remedy = "take a model's .tokenizer, or leave it out"
        expect(tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers", remedy)
    placement = Placement(chosen_device(device), dtype_called(dtype))
    # A seed in the configuration would set the seeds of torch, numpy and random globally.
    fixed = {
        "seed": None,
        "init_weights": False,
        "device": str(placement.device),
        "dtype": placement.dtype,
    }
    own = _without_derived(weights)
    with running_no_code():
        is_native = config.get("architecture") == native.NATIVE
        if is_native and backend == "hooked_transformer":
            raise InputError("this is the configuration of a bridge; use backend='bridge'.")
        is_bridged = backend == "bridge" or is_native
        if is_bridged or not HAS_HOOKED_TRANSFORMER:
            made = native.build({**config, **fixed}, tokenizer, placement)
            here = native.weights_named_as(own, made)
            _check_weights(here, own)
            native.fill(here, own)
            return made
        try:
            settings = HookedTransformerConfig(**{**config, **fixed})
        # It raises errors of several types.
        except Exception as error:
            raise InputError(
                f"the configuration makes no model ({first_line(error)}); give one such as "
                "model.cfg.to_dict()."
            ) from error
        model = HookedTransformer(settings, tokenizer)
    _check_weights(_without_derived(model.state_dict()), own)
    # Not strict, because the derived buffers are missing.
    model.load_state_dict(own, strict=False)
    return model.eval()


def parts_of(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the weights of a model in TransformerLens' own format."""
    check_class(model)
    if native.is_native(model):
        return native.config_of(model), native.weights_of(model)
    if HAS_HOOKED_TRANSFORMER and isinstance(model, HookedTransformer):
        # Types and devices are chosen when the model is built.
        settings = model.cfg.to_dict()
        config = {name: value for name, value in settings.items() if _is_json(value)}
        return config, _without_derived(model.state_dict())
    raise InputError(
        f"{model.cfg.model_name} wraps a model of Hugging Face; save that, with "
        "model.original_model.save_pretrained before it is wrapped, or keep the folder that it "
        "was loaded from."
    )


def save_model(model: Model, folder: str | Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, for `load_model`.

    `config.json` comes last and names the digests of the other files, so that files of two models,
    or of a save that was interrupted, are never taken for one model.

    Raises:
        InputError: the files cannot be written, or see `parts_of`.

    >>> import circuits, tempfile
    >>> model = circuits.load_model("toy-world")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     circuits.save_model(model, folder)
    ...     loaded = circuits.load_model(folder)
    """
    config, weights = parts_of(model)
    folder = path_of(folder)
    written = write_tensors(folder / WEIGHTS_FILE, weights, {}, FORMAT, FORMAT_VERSION)
    digests = {DIGEST_OF + WEIGHTS_FILE: stated_digest(written)}
    for name, content in _tokenizer_files(model.tokenizer).items():
        write_bytes(folder / name, content)
        digests[DIGEST_OF + name] = sha256(content).hexdigest()
    # Each on a line of its own that can be deleted.
    described = {**digests, "config": config}
    write_json(folder / CONFIG_FILE, described, FORMAT, FORMAT_VERSION)


def load_saved(folder: Path, placement: Placement, backend: BackendName | None) -> Model:
    """Load what `save_model` wrote."""
    content = read_json(folder / CONFIG_FILE, FORMAT, FORMAT_VERSION)
    weights, _ = read_tensors(folder / WEIGHTS_FILE, FORMAT, FORMAT_VERSION)
    place = {**placement.of_lens, "backend": backend}
    try:
        _check_digests(folder, content)
        has_tokenizer = (folder / "tokenizer.json").is_file()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if has_tokenizer else None
        return build_model(content["config"], weights, tokenizer, **place)
    except InputError:
        raise
    # The libraries for tokenizers and models raise errors of every type for files that are damaged.
    except Exception as error:
        raise InputError(
            f"the model in {folder} is damaged ({type(error).__name__}: {first_line(error)}); "
            "restore the folder or save the model again."
        ) from error


def chosen_device(device: str | torch.device | None) -> torch.device:
    """Return a device, which without a choice is a GPU if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return device_called(default if device is None else device)


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(Path(folder).iterdir())
        return {path.name: path.read_bytes() for path in paths}


def _without_derived(state: Weights) -> dict[str, Tensor]:
    kept = (name for name in state if not name.endswith(DERIVED_BUFFERS))
    return {name: state[name] for name in kept}


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


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)

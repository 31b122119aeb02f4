"""Load a model by its name or from files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from circuits.models.backend import (
    HAS_HOOKED_TRANSFORMER,
    BackendName,
    Model,
    check_backend,
    shape_of,
    weights_of,
)
from circuits.models.bridge.changes import note_known
from circuits.models.bridge.shape import unreadable
from circuits.models.loading.agreement import (
    SourceRun,
    computed_by,
    disagreement,
    likely,
    other_window,
)
from circuits.models.loading.placement import Placement
from circuits.models.loading.refusals import first_line, reason, refusals, running_no_code
from circuits.models.loading.saved import FORMAT, chosen_device, load_saved
from circuits.models.loading.source import (
    CONFIG_FILE,
    EMBEDDED,
    Source,
    from_folder,
    from_gguf,
    from_hub,
    is_checkpoint,
    official_name,
)
from circuits.models.running import frozen, run_to_logits
from circuits.models.tolerance import TOLERANCE, compared_rows, logit_gap
from circuits.system.device import dtype_called
from circuits.system.errors import InputError, NotFiniteError
from circuits.system.files import path_of, read_json_object
from circuits.system.torch_modes import without_modes

if HAS_HOOKED_TRANSFORMER:
    from circuits.models.loading import conversion

ASSETS = Path(__file__).parents[2] / "assets"
GGUF = ".gguf"
# Who publishes models in TransformerLens' own format.
NOT_OF_TRANSFORMERS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")


@without_modes()
def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    backend: BackendName | None = None,
    device_map: Any = None,
    check: bool = True,
) -> Model:
    """Load a model by name or from files, with its weights as trained: not folded or centred.

    What is loaded is run on a few tokens beside the model of transformers that it comes from, and
    refused if a layer's output or the logits differ by more than rounding.

    >>> import circuits
    >>> model = circuits.load_model("toy-world")
    >>> model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
    (4, 4, 128)

    Args:
        name_or_path: `toy-world`, the model that ships with this package; a name on the Hugging
            Face hub, or a short one that TransformerLens knows, such as `gpt2`; a folder that
            `save_model` wrote or that holds a Hugging Face checkpoint (config.json, safetensors
            weights, tokenizer files); or a `.gguf` file, which needs the package `gguf`.
        device: None takes CUDA if it is available, else the CPU. "cuda" is the GPU of this rank
            where several processes work together.
        dtype: of the weights.
        backend: "hooked_transformer" or "bridge", the class of TransformerLens to load. None takes
            a HookedTransformer where this version of TransformerLens has it and it agrees with its
            source, else a TransformerBridge, with a warning that says why.
        device_map: as in transformers, for its checkpoints; it must put the whole model on one
            device.
        check: False skips the comparison.

    Raises:
        InputError: no model has this name, the folder holds no model, or one that cannot be loaded
            (such as an encoder, or a model that needs Python code of its own, which is never run);
            what is loaded does not agree with its source; the weights cannot be downloaded, or the
            device does not exist.
    """
    # A folder of this name in the working directory does not hide the model that ships.
    is_embedded = isinstance(name_or_path, str) and name_or_path == EMBEDDED
    path = ASSETS / EMBEDDED if is_embedded else path_of(name_or_path)
    check_backend(backend)
    if backend == "hooked_transformer" and device_map is not None:
        raise InputError("device_map is for backend='bridge'; give device= instead.")
    with running_no_code():
        placement = Placement(chosen_device(device), dtype_called(dtype), device_map)
        if path.is_dir():
            if not is_checkpoint(path):
                raise InputError(
                    f"the folder {path} holds no model: it has no {CONFIG_FILE}; "
                    "give a folder that save_model wrote, or one with a checkpoint."
                )
            # Folders of checkpoints have a config.json as well.
            if read_json_object(path / CONFIG_FILE, "configuration").get("format") == FORMAT:
                if device_map is not None:
                    raise InputError(
                        f"device_map is for checkpoints of transformers, and {path} is none; give "
                        "device= instead."
                    )
                return load_saved(path, placement, backend)
            source = from_folder(path, placement)
        elif path.is_file() and path.suffix == GGUF:
            source = from_gguf(path, placement)
        else:
            name = str(name_or_path)
            if path.suffix == GGUF or path.is_file():
                what = "is a file of another kind" if path.is_file() else "does not exist"
                raise InputError(f"{path} {what}; of single files, .gguf is read.")
            if official_name(name).startswith(NOT_OF_TRANSFORMERS):
                return _of_lens(name, placement)
            source = from_hub(name, placement)
        return _wrapped(source, placement, backend, check)


def _wrapped(
    source: Source, placement: Placement, backend: BackendName | None, check: bool
) -> Model:
    """Make a model of TransformerLens from one of transformers."""
    _only_device(source)
    expected = None
    if check:
        with refusals(f"{source.called} cannot be run"):
            expected = computed_by(source)
    why = None
    if HAS_HOOKED_TRANSFORMER and backend != "bridge" and placement.device_map is None:
        model, why = _converted(source, placement, expected)
        if model is not None:
            return model
        if backend is not None:
            raise InputError(
                f"{source.called} is no HookedTransformer: {why}; use backend='bridge'."
            )
    model = _bridged(source, placement, expected)
    if why is not None:
        warnings.warn(
            f"{source.called} is loaded as a TransformerBridge, as its HookedTransformer would be "
            f"another model: {why}. backend='bridge' loads it without this warning.",
            stacklevel=4,
        )
    return model


def _converted(
    source: Source, placement: Placement, expected: SourceRun | None
) -> tuple[Model | None, str | None]:
    """Make a HookedTransformer, or say why there is none that computes the same."""
    try:
        model = conversion.to_hooked_transformer(source, placement)
        settings = source.model.config
        if expected is None:
            return model, None
        why = other_window(model, settings)
        why = why or disagreement(model, expected, settings, is_converted=True)
    except NotFiniteError:
        raise
    # Conversions raise errors of every type.
    except Exception as error:
        return None, f"TransformerLens cannot convert it ({reason(error)})"
    return (model, None) if why is None else (None, why)


def _bridged(source: Source, placement: Placement, expected: SourceRun | None) -> Model:
    settings = source.model.config
    if placement.device_map is None:
        source.model.to(placement.device)
    device = _only_device(source)
    reasons = likely(settings)
    with refusals(f"{source.called} cannot be loaded as a TransformerBridge{reasons}"):
        bridge = TransformerBridge.boot_transformers(
            source.place,
            hf_model=source.model,
            tokenizer=source.tokenizer,
            device=str(device),
            dtype=placement.dtype,
        )
        bridge.cfg.model_name = source.name
        bridge.eval()
        for found in unreadable(bridge):
            raise InputError(
                f"{source.called} cannot be loaded: it has {found}, and circuits are not found in "
                "such models; take another model."
            )
        why = None
        if expected is not None:
            why = disagreement(bridge, expected, settings, is_converted=False)
    if why is not None:
        raise InputError(
            f"{source.called} cannot be loaded: run layer by layer, {why}. Circuits in it would be "
            "those of another model; check=False loads it all the same."
        )
    if expected is not None:
        _check_when_called(bridge, source.called, expected)
    note_known(bridge)
    return bridge


def _only_device(source: Source) -> torch.device:
    """Return the device of a model; one that is spread over several is refused."""
    spread = {*map(str, getattr(source.model, "hf_device_map", {}).values())}
    if len(spread) > 1:
        raise InputError(
            f"{source.called} cannot be loaded over {len(spread)} devices: circuits are found in a "
            "model on one device; give device= instead of device_map, or a smaller dtype."
        )
    device = next(source.model.parameters()).device
    if device.type == "meta":
        raise InputError(
            f"this device_map keeps the weights of {source.called} out of memory; give device= "
            "instead."
        )
    return device


@torch.no_grad()
def _check_when_called(bridge: TransformerBridge, name: str, expected: SourceRun) -> None:
    """Refuse a bridge that computes something else than its source when it is called itself."""
    tokens = expected.tokens.to(shape_of(bridge).device)
    mask = torch.ones_like(tokens).bool()
    with frozen(bridge):
        found = run_to_logits(bridge, tokens, mask)
    compared = compared_rows(weights_of(bridge), found, expected.logits)
    gap = logit_gap(*compared)
    if not gap <= TOLERANCE[found.dtype]:
        raise InputError(
            f"{name} cannot be loaded: in this version of TransformerLens a TransformerBridge "
            f"computes other logits for it (by {gap:.1%}); install a newer transformer-lens."
        )


def _of_lens(name: str, placement: Placement) -> Model:
    """Load a model in TransformerLens' own format from the hub."""
    with refusals(f"the model {name!r} cannot be loaded"):
        try:
            if HAS_HOOKED_TRANSFORMER:
                return conversion.by_name(name, placement)
            return TransformerBridge.boot_transformers(name, **placement.of_lens)
        except OSError as error:
            raise InputError(
                f"the weights of {name!r} cannot be downloaded: {first_line(error)} "
                "Download them elsewhere and give the folder."
            ) from error

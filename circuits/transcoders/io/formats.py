"""The published formats of transcoder weights, all read to the same result.

The names and shapes of the tensors tell the format, never the name of a repository.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.system.errors import InputError
from circuits.transcoders.io.config_yaml import CLT_KIND, PLT_KIND
from circuits.transcoders.io.layer_files import LayerFiles, require_all
from circuits.transcoders.io.tensor_files import Tensors, read_tensors
from circuits.transcoders.transcoder import Reads, Writes

THRESHOLD = "activation_function.threshold"
Axes = tuple[str, ...]
# The biases come first: they tell the sizes that all other tensors must have.
AXES: dict[str, Axes] = {
    "bias": ("features",),
    "decoder_bias": ("d_model",),
    "encoder": ("features", "d_model"),
    "decoder": ("features", "d_model"),
    "threshold": ("features",),
    "skip": ("d_model", "d_model"),
}

Sizes = dict[str, int]
Copier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """The tensors of a format, and where its features read and write without a config.yaml."""

    name: str
    reads: Reads
    writes: Writes
    # Names of the tensors, with {} for the layer; empty if the format has no such part. The skip
    # adds x @ W_skip.T.
    encoder: str = "W_enc"
    decoder: str = "W_dec"
    bias: str = "b_enc"
    decoder_bias: str = "b_dec"
    threshold: str = "threshold"
    skip: str = "W_skip"
    # Parts that not all sets of the format have, parts that are stored transposed, and parts that
    # some files store transposed.
    optional: tuple[str, ...] = ("skip",)
    transposed: tuple[str, ...] = ()
    either_way: tuple[str, ...] = ()
    kind: str = PLT_KIND
    decoder_axes: Axes = AXES["decoder"]

    def tensor(self, part: str, layer: int) -> str:
        """Return the name of a tensor."""
        name: str = getattr(self, part)
        return name.format(layer)


# Where features read and write is from what the authors publish: PLTs of Qwen-3 and others, CLTs of
# Llama and Gemma-2; GemmaScope as circuit tracing uses it.
PLT = Format(
    "PLT",
    "mlp_input",
    "mlp",
    threshold=THRESHOLD,
    optional=("threshold", "skip"),
    either_way=("encoder", "decoder"),
)
CLT = Format(
    "CLT",
    "residual",
    "residual",
    encoder="W_enc_{}",
    decoder="W_dec_{}",
    bias="b_enc_{}",
    decoder_bias="b_dec_{}",
    threshold="threshold_{}",
    skip="W_skip_{}",
    optional=("threshold", "skip"),
    transposed=("skip",),
    kind=CLT_KIND,
    decoder_axes=("features", "layers written to", "d_model"),
)
GEMMA_SCOPE = Format("GemmaScope", "normalized", "residual", skip="", transposed=("encoder",))
# With A the stored matrix, the skip adds x @ A in both kinds of file. (Other tools load
# W_skip = A.T and add x @ W_skip.T in a PLT, but A and x @ W_skip in a CLT.)
GEMMA_SCOPE_2_PLT = Format(
    "GemmaScope-2 PLT",
    "mlp_input",
    "residual",
    encoder="w_enc",
    decoder="w_dec",
    skip="affine_skip_connection",
    transposed=("encoder", "skip"),
)
GEMMA_SCOPE_2_CLT = replace(
    GEMMA_SCOPE_2_PLT,
    name="GemmaScope-2 CLT",
    kind=CLT_KIND,
    decoder_axes=("features", "layers", "d_model"),
)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of one layer, as `Transcoders` has them; None for what the file does not have."""

    format: Format
    bias: Float[Tensor, " feature"]
    decoder_bias: Float[Tensor, " d_model"]
    encoder: Float[Tensor, "feature d_model"]
    decoder: Float[Tensor, "feature layer_written d_model"]
    threshold: Float[Tensor, " feature"] | None = None
    skip: Float[Tensor, "d_out d_in"] | None = None
    k: int | None = None

    @property
    def traits(self) -> dict[str, object]:
        """What must be the same in all layers."""
        return {
            "format": self.format.name,
            "threshold": self.threshold is not None,
            "skip": self.skip is not None,
            "k": self.k,
        }


def read_layers(files: LayerFiles, source: str, copy: Copier, *, check: bool) -> list[LayerWeights]:
    """Read and copy the weights of all layers of the set `source`.

    `check` also compares the digests of the files and looks for NaN, for which all is read.
    """
    sizes: Sizes = {}
    layers = []
    for number, paths in enumerate(files):
        # Copied before the next is read, so that the memory holds no more than one file.
        layer = _read_layer(paths, number, sizes, copy, check)
        layers.append(layer)
        # Each layer of a CLT writes to one layer less than the layer before.
        sizes["layers written to"] = layer.decoder.shape[1] - 1
    first = layers[0]
    require_all(range(len(layers)), source, n_layers=first.decoder.shape[1])
    expected = first.traits
    for number, layer in enumerate(layers):
        for trait, value in layer.traits.items():
            if value != expected[trait]:
                raise InputError(
                    f"{source}: layers 0 and {number} are of different sets ({trait}: "
                    f"{expected[trait]} and {value}); restore the wrong one."
                )
    return layers


def _read_layer(
    files: Sequence[Path], layer: int, sizes: Sizes, copy: Copier, check: bool
) -> LayerWeights:
    # The files are the one of a layer, or the two of a CLT.
    where = " and ".join(map(str, files))
    tensors: Tensors = {}
    for file in files:
        tensors |= read_tensors(file, check=check)
    format = _format_of(tensors, files[0])
    k = _k(tensors.pop("k", None), where) if format is PLT else None
    parts = _parts(tensors, format, layer, sizes, where)
    parts["decoder"] = _used(parts["decoder"], format, layer)
    for part, tensor in parts.items():
        if check:
            _check_finite(tensor, part, where)
        parts[part] = copy(tensor)
    return LayerWeights(format, k=k, **parts)


def _check_finite(tensor: Tensor, part: str, where: str) -> None:
    # A finite sum has finite terms, and is faster to check.
    if tensor.sum(dtype=torch.float32).isfinite():
        return
    # A feature with an infinite threshold never fires.
    bad = tensor.isnan() if part == "threshold" else ~tensor.isfinite()
    if n_bad := int(bad.sum()):
        raise InputError(
            f"{where}: {n_bad} of {tensor.numel()} numbers of the {part} are NaN or infinite; "
            "restore the file or convert the weights again."
        )


def _used(decoder: Tensor, format: Format, layer: int) -> Tensor:
    if format is GEMMA_SCOPE_2_CLT:
        # Decoders to the layers before this one are not used.
        return decoder[:, layer:]
    return decoder[:, None] if format.kind == PLT_KIND else decoder


def _parts(tensors: Tensors, format: Format, layer: int, sizes: Sizes, where: str) -> Tensors:
    parts = {}
    unknown = set(tensors)
    axes_of = AXES | {"decoder": format.decoder_axes}
    for part, axes in axes_of.items():
        name = format.tensor(part, layer)
        if name == THRESHOLD and name not in tensors:
            name = "threshold"
        if name in tensors:
            stored = tensors[name]
            parts[part] = _part(stored, part, axes, format, sizes, f"{where}: {name}")
        elif part not in format.optional:
            raise InputError(
                f"{where}: there is no tensor {name}; there are {', '.join(tensors)}. Restore the "
                "file."
            )
        unknown.discard(name)
    if unknown:
        # They might change what features do.
        raise InputError(
            f"{where}: it is not known what {', '.join(sorted(unknown))} does. Fold it into the "
            "other tensors, or remove it if it changes nothing."
        )
    return parts


def _format_of(tensors: Tensors, file: Path) -> Format:
    if "w_enc" in tensors:
        decoder = tensors.get("w_dec")
        is_clt = decoder is not None and decoder.dim() != 2
        return GEMMA_SCOPE_2_CLT if is_clt else GEMMA_SCOPE_2_PLT
    if "W_enc" in tensors:
        return GEMMA_SCOPE if file.suffix == ".npz" else PLT
    if any(re.fullmatch(r"W_(enc|dec)_\d+", name) for name in tensors):
        return CLT
    found = textwrap.shorten(", ".join(tensors), 200) or "no tensors"
    raise InputError(
        f"{file}: there is no encoder, only {found}; name it W_enc (per layer), W_enc_0 ... "
        "(cross-layer) or w_enc (GemmaScope-2)."
    )


def _part(tensor: Tensor, part: str, axes: Axes, format: Format, sizes: Sizes, name: str) -> Tensor:
    # Return a tensor with our axes, which the file may have in the other order.
    reverse = axes[::-1]
    is_turned = part in format.transposed
    if part in format.either_way:
        fits = _fits(tensor, axes, sizes)
        is_turned = not fits and _fits(tensor, reverse, sizes)
    if is_turned:
        return _checked(tensor, reverse, sizes, name).T
    return _checked(tensor, axes, sizes, name)


def _checked(tensor: Tensor, axes: Axes, sizes: Sizes, name: str) -> Tensor:
    # Refuse a tensor without these axes; add sizes that are new.
    if not tensor.is_floating_point():
        raise InputError(
            f"{name} holds {tensor.dtype}, not floating-point numbers; convert the weights to "
            "bfloat16 or float32."
        )
    if not _fits(tensor, axes, sizes):
        known = tuple(sizes.get(axis, "any size") for axis in axes)
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, expected {known} ({', '.join(axes)}); "
            "features and d_model are as in layer 0, whose biases tell them. Check that the file "
            "is complete and of this set."
        )
    sizes.update(zip(axes, tensor.shape, strict=True))
    return tensor


def _fits(tensor: Tensor, axes: Axes, sizes: Sizes) -> bool:
    if tensor.dim() != len(axes):
        return False
    stated = map(sizes.get, axes, tensor.shape)
    return tuple(stated) == tensor.shape


def _k(k: Tensor | None, where: str) -> int | None:
    if k is None:
        return None
    is_integer = k.numel() == 1 and not k.is_floating_point()
    if not is_integer or int(k) < 1:
        raise InputError(
            f"{where}: k has shape {tuple(k.shape)} and type {k.dtype}, expected one positive "
            "integer."
        )
    return int(k)

"""The published formats of transcoder weights, one function each, from the tensors of a layer to its weights in one convention.

Which format a file has is told by the names in it, never by the name of a repository.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from circuits.system.errors import InputError
from circuits.transcoders.io.tensor_files import LayerTensors, Placement, opened
from circuits.transcoders.transcoder import Reads, Writes

Format = Literal["PLT", "CLT", "GemmaScope", "GemmaScope-2 PLT", "GemmaScope-2 CLT"]

# Where features of a set without a config.yaml read and write. What is published says: for PLTs of Qwen-3 and others, Llama's and Gemma-2's
# CLTs, GemmaScope as circuit tracing uses it, and both kinds of GemmaScope-2.
DEFAULTS: dict[Format, tuple[Reads, Writes]] = {
    "PLT": ("mlp_input", "mlp"),
    "CLT": ("residual", "residual"),
    "GemmaScope": ("normalized", "residual"),
    "GemmaScope-2 PLT": ("mlp_input", "residual"),
    "GemmaScope-2 CLT": ("mlp_input", "residual"),
}
THRESHOLD, SKIP = "activation_function.threshold", "affine_skip_connection"


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer, in the convention of `Transcoders`.

    Attributes:
        threshold: of JumpReLU; None where the file has none.
        k: of top-k, where the file has one.
        skip: W of out += W @ x.
    """

    format: Format
    encoder: Float[Tensor, "feature d_model"]
    bias: Float[Tensor, " feature"]
    decoder: Float[Tensor, "feature written d_model"]
    decoder_bias: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " feature"] | None = None
    skip: Float[Tensor, "d_out d_in"] | None = None
    k: int | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Features and d_model."""
        return len(self.bias), len(self.decoder_bias)

    @property
    def parts(self) -> tuple[Format, bool, bool, int | None]:
        """What must be the same in all layers."""
        return self.format, self.threshold is not None, self.skip is not None, self.k

    def placed(self, placement: Placement) -> LayerWeights:
        """The same, copied to where the weights belong, or left where they are mapped."""
        place = placement.place
        return replace(
            self,
            encoder=place(self.encoder),
            bias=place(self.bias),
            decoder=place(self.decoder),
            decoder_bias=place(self.decoder_bias),
            threshold=None if self.threshold is None else place(self.threshold),
            skip=None if self.skip is None else place(self.skip),
        )


Sizes = tuple[int, int]
ANY: Sizes = (-1, -1)


def read_layer(
    files: Sequence[Path], layer: int, n_layers: int, sizes: Sizes, placement: Placement
) -> LayerWeights:
    """The weights of one layer.

    Args:
        files: one, or the two of a CLT.
        sizes: features and d_model of the layers before, or `ANY`.

    Raises:
        InputError: with the file and the tensor that is missing or of another shape than expected.
    """
    with opened(files) as tensors:
        return _reader(tensors)(tensors, layer, n_layers, sizes).placed(placement)


def layers_written(files: Sequence[Path]) -> int:
    """To how many layers the first layer of a set writes: in a CLT as many as there must be."""
    with opened(files) as tensors:
        return next(
            (
                tensors.raw(name).shape[1]
                for name in ("W_dec_0", "w_dec")
                if name in tensors and tensors.raw(name).dim() == 3
            ),
            1,
        )


Reader = Callable[[LayerTensors, int, int, Sizes], LayerWeights]


def _reader(tensors: LayerTensors) -> Reader:
    """The function that reads what these names are of."""
    if "w_enc" in tensors:
        return _gemma_scope_2
    if "W_enc" in tensors:
        return _gemma_scope if tensors.files[0].suffix == ".npz" else _plt
    if any(re.fullmatch(r"W_(enc|dec)_\d+", name) for name in tensors.readers):
        return _clt
    raise InputError(
        f"{tensors.where}: there is no encoder, only {tensors.names}; name it W_enc (per layer), W_enc_0 ... (cross-layer) or w_enc (GemmaScope-2)."
    )


def _biases(
    tensors: LayerTensors, encoder: str, decoder: str, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    features, width = sizes
    as_before = ", as in layer 0" if features >= 0 else ""
    return (
        tensors.get(encoder, features, meaning=f"features{as_before}"),
        tensors.get(decoder, width, meaning=f"d_model{as_before}"),
    )


def _plt(tensors: LayerTensors, layer: int, n_layers: int, sizes: Sizes) -> LayerWeights:
    """W_enc [F, d], W_dec [F, d] or, in older files, [d, F]; x @ W_skip.T is what the skip adds."""
    tensors.check_names(
        ("W_enc", "W_dec", "b_enc", "b_dec"), (THRESHOLD, "threshold", "W_skip", "k")
    )
    bias, decoder_bias = _biases(tensors, "b_enc", "b_dec", sizes)
    features, width = len(bias), len(decoder_bias)
    threshold = next((name for name in (THRESHOLD, "threshold") if name in tensors), None)
    return LayerWeights(
        "PLT",
        tensors.get("W_enc", features, width, meaning="features, d_model", reverse=True),
        bias,
        tensors.get("W_dec", features, width, meaning="features, d_model", reverse=True)[:, None],
        decoder_bias,
        tensors.get(threshold, features, meaning="features") if threshold else None,
        tensors.get("W_skip", width, width, meaning="d_model, d_model")
        if "W_skip" in tensors
        else None,
        tensors.count("k") if "k" in tensors else None,
    )


def _clt(tensors: LayerTensors, layer: int, n_layers: int, sizes: Sizes) -> LayerWeights:
    """W_enc_i [F, d], W_dec_i [F, L - i, d], each name with the number of its layer."""
    encoder, decoder, bias_name, decoder_bias_name, threshold, skip = (
        f"{name}_{layer}" for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip")
    )
    tensors.check_names((encoder, decoder, bias_name, decoder_bias_name), (threshold, skip))
    bias, decoder_bias = _biases(tensors, bias_name, decoder_bias_name, sizes)
    features, width = len(bias), len(decoder_bias)
    return LayerWeights(
        "CLT",
        tensors.get(encoder, features, width, meaning="features, d_model"),
        bias,
        tensors.get(
            decoder,
            features,
            n_layers - layer,
            width,
            meaning="features, layers written to, d_model",
        ),
        decoder_bias,
        tensors.get(threshold, features, meaning="features") if threshold in tensors else None,
        # A cross-layer skip adds x @ W_skip, where ours adds x @ skip.T.
        tensors.get(skip, width, width, meaning="d_model, d_model").T if skip in tensors else None,
    )


def _gemma_scope(tensors: LayerTensors, layer: int, n_layers: int, sizes: Sizes) -> LayerWeights:
    """W_enc [d, F], W_dec [F, d]."""
    tensors.check_names(("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), ())
    bias, decoder_bias = _biases(tensors, "b_enc", "b_dec", sizes)
    features, width = len(bias), len(decoder_bias)
    return LayerWeights(
        "GemmaScope",
        tensors.get("W_enc", width, features, meaning="d_model, features").T,
        bias,
        tensors.get("W_dec", features, width, meaning="features, d_model")[:, None],
        decoder_bias,
        tensors.get("threshold", features, meaning="features"),
    )


def _gemma_scope_2(tensors: LayerTensors, layer: int, n_layers: int, sizes: Sizes) -> LayerWeights:
    """w_enc [d, F]; w_dec [F, d], or [F, L, d] of which the first i layers are not written to by layer i."""
    tensors.check_names(("w_enc", "w_dec", "b_enc", "b_dec", "threshold"), (SKIP,))
    bias, decoder_bias = _biases(tensors, "b_enc", "b_dec", sizes)
    features, width = len(bias), len(decoder_bias)
    cross_layer = tensors.raw("w_dec").dim() == 3
    if cross_layer:
        decoder = tensors.get(
            "w_dec", features, n_layers, width, meaning="features, layers, d_model"
        )[:, layer:]
    else:
        decoder = tensors.get("w_dec", features, width, meaning="features, d_model")[:, None]
    # In both kinds of file the skip adds x @ A. Other tools load A.T for a PLT, whose skip they apply as x @ W_skip.T, and A itself for a CLT,
    # where they apply x @ W_skip: x @ A both times. Ours adds x @ skip.T for either, so skip is A.T.
    skip = (
        tensors.get(SKIP, width, width, meaning="d_model, d_model").T if SKIP in tensors else None
    )
    return LayerWeights(
        "GemmaScope-2 CLT" if cross_layer else "GemmaScope-2 PLT",
        tensors.get("w_enc", width, features, meaning="d_model, features").T,
        bias,
        decoder,
        decoder_bias,
        tensors.get("threshold", features, meaning="features"),
        skip,
    )

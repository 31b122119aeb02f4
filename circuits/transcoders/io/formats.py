"""The published formats of transcoder weights: one function for each, all with the same result.

The names and shapes of the tensors tell the format, never the name of a repository.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from circuits.system.errors import InputError
from circuits.transcoders.io.tensor_files import LayerTensors, read_tensors
from circuits.transcoders.transcoder import Reads, Writes

Format = Literal["PLT", "CLT", "GemmaScope", "GemmaScope-2 PLT", "GemmaScope-2 CLT"]

# Where features of a set without a config.yaml read and write, from what its authors publish: PLTs
# of Qwen-3 and others; CLTs of Llama and Gemma-2; GemmaScope as circuit tracing uses it.
DEFAULTS: dict[Format, tuple[Reads, Writes]] = {
    "PLT": ("mlp_input", "mlp"),
    "CLT": ("residual", "residual"),
    "GemmaScope": ("normalized", "residual"),
    "GemmaScope-2 PLT": ("mlp_input", "residual"),
    "GemmaScope-2 CLT": ("mlp_input", "residual"),
}
THRESHOLD = "activation_function.threshold"
SKIP = "affine_skip_connection"

ENCODER = "features, d_model"
ENCODER_TRANSPOSED = "d_model, features"
DECODER = "features, d_model"
SQUARE = "d_model, d_model"


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of one layer, as `Transcoders` has them.

    Attributes:
        threshold: of JumpReLU; None where the file has none.
        skip: W_skip, where the skip adds x @ W_skip.T; None where the file has none.
        k: of TopK, where the file has one.
    """

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
            "format": self.format,
            "threshold": self.threshold is not None,
            "skip": self.skip is not None,
            "k": self.k,
        }

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerWeights:
        """Apply a function to all tensors."""
        fields: dict[str, Any] = dict(vars(self))
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = function(value)
        return LayerWeights(**fields)


def read_layer(
    files: Sequence[Path], layer: int, first: LayerWeights | None = None
) -> LayerWeights:
    """Read the weights of one layer from its file, or the two of a CLT.

    All but the first layer need the weights of the first, whose sizes they must have.
    """
    sizes = {}
    if first is not None:
        features, n_layers, d_model = first.decoder.shape
        sizes = {"features": features, "d_model": d_model, "layers": n_layers}
        sizes["layers written to"] = n_layers - layer
    tensors = LayerTensors(read_tensors(files), " and ".join(map(str, files)), layer, sizes)
    weights = _reader(tensors.tensors, files[0])(tensors)
    tensors.check_all_known()
    return weights


def _reader(names: Iterable[str], file: Path) -> Callable[[LayerTensors], LayerWeights]:
    # The function that reads the format.
    if "w_enc" in names:
        return _read_gemma_scope_2
    if "W_enc" in names:
        return _read_gemma_scope if file.suffix == ".npz" else _read_plt
    if any(re.fullmatch(r"W_(enc|dec)_\d+", name) for name in names):
        return _read_clt
    found = textwrap.shorten(", ".join(names), 200) or "no tensors"
    raise InputError(
        f"{file}: there is no encoder, only {found}; name it W_enc (per layer), W_enc_0 ... "
        "(cross-layer) or w_enc (GemmaScope-2)."
    )


# The biases are read first: they tell the sizes that all other tensors must have.


def _read_plt(tensors: LayerTensors) -> LayerWeights:
    # W_enc [F, d], W_dec [F, d] or, in older files, [d, F]; the skip adds x @ W_skip.T.
    threshold = THRESHOLD if THRESHOLD in tensors.tensors else "threshold"
    return LayerWeights(
        "PLT",
        bias=tensors.get("b_enc", "features"),
        decoder_bias=tensors.get("b_dec", "d_model"),
        encoder=tensors.get("W_enc", ENCODER, or_transposed=True),
        decoder=tensors.get("W_dec", DECODER, or_transposed=True)[:, None],
        threshold=tensors.find(threshold, "features"),
        skip=tensors.find("W_skip", SQUARE),
        k=tensors.find_count("k"),
    )


def _read_clt(tensors: LayerTensors) -> LayerWeights:
    # W_enc_l [F, d], W_dec_l [F, L - l, d]; the skip adds x @ W_skip_l.
    layer = tensors.layer
    return LayerWeights(
        "CLT",
        bias=tensors.get(f"b_enc_{layer}", "features"),
        decoder_bias=tensors.get(f"b_dec_{layer}", "d_model"),
        encoder=tensors.get(f"W_enc_{layer}", ENCODER),
        decoder=tensors.get(f"W_dec_{layer}", "features, layers written to, d_model"),
        threshold=tensors.find(f"threshold_{layer}", "features"),
        # x @ W_skip_l = x @ skip.T
        skip=_transposed(tensors.find(f"W_skip_{layer}", SQUARE)),
    )


def _read_gemma_scope(tensors: LayerTensors) -> LayerWeights:
    # W_enc [d, F], W_dec [F, d].
    return LayerWeights(
        "GemmaScope",
        bias=tensors.get("b_enc", "features"),
        decoder_bias=tensors.get("b_dec", "d_model"),
        encoder=tensors.get("W_enc", ENCODER_TRANSPOSED).T,
        decoder=tensors.get("W_dec", DECODER)[:, None],
        threshold=tensors.get("threshold", "features"),
    )


def _read_gemma_scope_2(tensors: LayerTensors) -> LayerWeights:
    # w_enc [d, F]; w_dec [F, d], or [F, L, d] where layer l does not use the first l layers.
    bias, decoder_bias = tensors.get("b_enc", "features"), tensors.get("b_dec", "d_model")
    cross_layer = tensors.raw("w_dec").dim() == 3
    if cross_layer:
        decoder = tensors.get("w_dec", "features, layers, d_model")[:, tensors.layer :]
    else:
        decoder = tensors.get("w_dec", DECODER)[:, None]
    return LayerWeights(
        "GemmaScope-2 CLT" if cross_layer else "GemmaScope-2 PLT",
        bias=bias,
        decoder_bias=decoder_bias,
        encoder=tensors.get("w_enc", ENCODER_TRANSPOSED).T,
        decoder=decoder,
        threshold=tensors.get("threshold", "features"),
        # With A the stored matrix, the skip adds x @ A = x @ skip.T in both kinds of file. (Other
        # tools load W_skip = A.T and add x @ W_skip.T in a PLT, but A and x @ W_skip in a CLT.)
        skip=_transposed(tensors.find(SKIP, SQUARE)),
    )


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.T

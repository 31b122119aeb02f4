"""Mixed precision for searches: the target under test in float32, most products in a smaller type.

The idea is PAHQ's (https://arxiv.org/abs/2510.23264): only the component under investigation needs
full precision. Here the base of a search is exact, and what is rounded are the *changes* that
removing an edge makes. For y = x W, with x0 and y0 of the base,

    y = y0 + round(x - x0) round(W)

so rounding errors are relative to the change and vanish with it. Softmax, norms, sums and the
metric are computed in float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from circuits.models.functional import HeadSelection, Multiply, multiply
from circuits.system.errors import InputError

TypeName = Literal["bfloat16", "float16", "float8_e4m3", "int8"]

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# The largest numbers of the types that need scale factors.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Kernels for 8-bit numbers need sizes that are multiples of this.
ALIGNMENT = 16

Scaled = tuple[Tensor, Tensor | None]
"""Numbers in a small type, and their scale factors if the type needs them."""


@dataclass(frozen=True)
class Precision:
    """How exactly a search computes.

    Attributes:
        background: the type of most products: those of the changes downstream of the target under
            test. 8-bit types are scaled per row of the activations and per column of the weights.
            8-bit kernels serve MLPs; other products of such numbers are computed in bfloat16.
        investigated: the type of the target under test and its head. If it equals `background`,
            everything is computed in that type, and whole values are rounded instead of changes:
            plain low precision, as a baseline.
        confirm: measure again in float32 what is nearer to the threshold than the noise seen in
            this run, so that the circuit is that of float32.

    >>> import circuits
    >>> str(circuits.Precision("int8", confirm=False))
    'int8, unconfirmed'
    """

    background: str = "bfloat16"
    investigated: str = "float32"
    confirm: bool = True

    def __post_init__(self) -> None:
        names = get_args(TypeName)
        if self.background not in names:
            raise InputError(
                f"there is no background precision {self.background!r}; choose one of "
                f"{', '.join(names)}."
            )
        if self.investigated not in ("float32", self.background):
            raise InputError(
                f"investigated={self.investigated!r} must be 'float32', or {self.background!r} as "
                "the background is, which is plain low precision."
            )
        if self.confirm and self.investigated != "float32":
            raise InputError(
                f"plain {self.background} has nothing in float32 to confirm with; set "
                "confirm=False."
            )

    def __str__(self) -> str:
        # The default is its name alone, so that a search is found again however it was written.
        if self.investigated != "float32":
            return f"{self.background}, plain"
        return self.background if self.confirm else f"{self.background}, unconfirmed"


def get_precision(precision: str | Precision | None) -> Precision | None:
    """A precision, by the name of its background type.

    Raises:
        InputError: there is no such type, or it is neither a name nor a precision.
    """
    if isinstance(precision, str):
        return Precision(precision)
    if precision is not None and not isinstance(precision, Precision):
        raise InputError(
            f"precision={precision!r} must be a name such as 'bfloat16', or a circuits.Precision."
        )
    return precision


@dataclass(frozen=True, eq=False)
class Background:
    """Products in a small type, summed in float32. Weights are stored in the type once.

    Attributes:
        whole: whole values are rounded, not changes.
        kernel: whether this device has kernels for the type; if not, operands are rounded and then
            multiplied in float32.
    """

    dtype: torch.dtype
    whole: bool
    kernel: bool
    # By the weight's id. The weight is stored too, so that its id is not given to another tensor.
    _weights: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    @staticmethod
    def of(precision: Precision, device: torch.device | str | None) -> Background:
        """The background of a precision; warns once where it is simulated."""
        dtype, where = DTYPES[precision.background], torch.device(device or "cpu")
        kernel = _has_kernel(dtype, where)
        if not kernel:
            _say_once(
                f"{precision.background} is simulated on this {where.type}: its rounding is real, "
                "but it is no faster."
            )
        return Background(dtype, precision.investigated != "float32", kernel)

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        heads: HeadSelection | None = None,
    ) -> Tensor:
        """x @ weight + bias of these heads, with both operands rounded; see `multiply`."""
        stored, weight_scale = self._stored_weight(weight)
        rounded, scale = _rounded(x, self.dtype, axis=-1)
        if heads is not None:
            stored = stored[heads]
            weight_scale = None if weight_scale is None else weight_scale[heads]
            bias = None if bias is None else bias[heads][:, None]
        result = _matmul(rounded, stored) if self.kernel else rounded.to(x.dtype) @ stored
        if scale is not None and weight_scale is not None:
            result = result.mul_(scale).mul_(weight_scale)
        if bias is not None:
            result = result.add_(bias)
        return result.to(x.dtype)

    def increments(self, tokens: int) -> Multiply:
        """Products that round only the difference from variant 0, the base.

        Args:
            tokens: the number of rows of each variant.
        """

        def product(
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            heads: HeadSelection | None = None,
        ) -> Tensor:
            if x.shape[-2] == tokens:
                return multiply(x, weight, bias, heads)
            variants = x.unflatten(-2, (-1, tokens))
            base, changed = variants[..., 0, :, :], variants[..., 1:, :, :]
            # y = y0 + round(x - x0) round(W)
            exact = multiply(base, weight, bias, heads)[..., None, :, :]
            difference = (changed - base[..., None, :, :]).flatten(-3, -2)
            change = self.product(difference, weight, None, heads)
            change = change.unflatten(-2, (-1, tokens))
            return torch.cat([exact, exact + change], dim=-3).flatten(-3, -2)

        return product

    def _stored_weight(self, weight: Tensor) -> Scaled:
        if id(weight) not in self._weights:
            if self.kernel:
                stored, scale = _for_kernel(weight, self.dtype)
            else:
                rounded, scale = _rounded(weight, self.dtype, axis=-2)
                stored = rounded.to(weight.dtype)
            self._weights[id(weight)] = (weight, stored, scale)
        _, stored, scale = self._weights[id(weight)]
        return stored, scale


def _rounded(x: Tensor, dtype: torch.dtype, axis: int) -> Scaled:
    """x in a small type, scaled along an axis if the type needs it."""
    if dtype not in LARGEST:
        return x.to(dtype), None
    largest = x.abs().amax(axis, keepdim=True)
    scale = largest.div_(LARGEST[dtype]).clamp_(min=torch.finfo(x.dtype).tiny)
    scaled = x / scale
    if dtype == torch.int8:
        scaled = scaled.round_()
    return scaled.to(dtype), scale


def _for_kernel(weight: Tensor, dtype: torch.dtype) -> Scaled:
    """A weight as the kernels need it.

    8-bit numbers are stored by columns, or, for shapes without a kernel, in bfloat16, which holds
    them exactly.
    """
    stored, scale = _rounded(weight, dtype, axis=-2)
    if dtype not in LARGEST:
        return stored, scale
    if weight.dim() > 2 or any(size % ALIGNMENT for size in weight.shape):
        return stored.to(torch.bfloat16), scale
    return stored.transpose(-1, -2).contiguous().transpose(-1, -2), scale


def _matmul(a: Tensor, b: Tensor) -> Float[Tensor, "*batch row column"]:
    """a @ b on a GPU, by tensor cores, summed in float32."""
    if a.dim() == 2 and b.dtype in LARGEST and a.shape[0] > ALIGNMENT:
        return _matmul_8_bit(a, b)
    if a.dtype in LARGEST:
        a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    if b.dim() == 2:
        rows = a.reshape(-1, a.shape[-1])
        return torch.mm(rows, b, out_dtype=torch.float32).view(*a.shape[:-1], -1)
    return torch.bmm(a.expand(len(b), -1, -1), b, out_dtype=torch.float32)


def _matmul_8_bit(a: Tensor, b: Tensor) -> Float[Tensor, "row column"]:
    if a.dtype == torch.int8:
        return torch._int_mm(a, b).float()
    ones = a.new_ones((), dtype=torch.float32)
    per_tensor = functional.ScalingType.TensorWise
    return functional.scaled_mm(
        a, b, ones, per_tensor, ones, per_tensor, output_dtype=torch.float32
    )


@cache
def _has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type run on this device, and are right."""
    if device.type != "cuda":
        return False
    # 8-bit floats are summed with fewer digits. A wrong result is off by the size of the numbers.
    tolerance = 1e-2 if dtype == torch.float8_e4m3fn else 1e-4
    try:
        errors = [_kernel_error(dtype, device, n_heads) for n_heads in (0, 2)]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError):
        return False
    return max(errors) <= tolerance


def _kernel_error(dtype: torch.dtype, device: torch.device, n_heads: int) -> float:
    """The relative error of a random product; with heads, in another order than stored."""
    generator, shape = torch.Generator().manual_seed(0), (n_heads, 64, 64)[0 if n_heads else 1 :]
    a, b = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    (a, _), (b, _) = _rounded(a, dtype, axis=-1), _for_kernel(b, dtype)
    if n_heads:
        b = b[torch.arange(n_heads - 1, -1, -1, device=device)]
    expected = a.double() @ b.double()
    return float((_matmul(a, b).double() - expected).abs().max() / expected.abs().max())


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)

"""Mixed precision for searches: the target under test in float32, most products in a smaller type.

The idea is PAHQ's (https://arxiv.org/abs/2510.23264): only the component under investigation needs
full precision. Here the base of a search is exact, and what is rounded are the *changes* that
removing an edge makes. For y = x W, with x0 and y0 of the base,

    y = y0 + round(x - x0) round(W)

so rounding errors are relative to the change and vanish with it. Softmax, norms, sums and the
metric are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from circuits.models.layers.functional import HeadSelection, Multiply, multiply
from circuits.system.errors import InputError
from circuits.system.fields import CheckedFields
from circuits.system.messages import warn_once

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

# The axis along which numbers share a scale factor.
ROW, COLUMN = -1, -2

Rounding = Literal["values", "changes", "nothing"]
Bias = Tensor | None
Heads = HeadSelection | None
Device = torch.device | str | None
Product = Float[Tensor, "*batch row column"]
Scaled = tuple[Tensor, Tensor | None]
"""Numbers in a small type, and their scale factors if the type needs them."""
Stored = tuple[Tensor, Scaled]


@dataclass(frozen=True)
class Precision(CheckedFields):
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
        if self.background not in DTYPES:
            raise InputError(
                f"there is no background precision {self.background!r}; choose one of "
                f"{', '.join(DTYPES)}."
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
    """A precision, by the name of its background type; anything else is an InputError."""
    if isinstance(precision, str):
        return Precision(precision)
    if precision is not None and not isinstance(precision, Precision):
        raise InputError(
            f"precision={precision!r} must be a name such as 'bfloat16', or a circuits.Precision."
        )
    return precision


@dataclass(frozen=True, eq=False)
class Background:
    """How to compute products that need not be exact: in a small type, summed in float32.

    Attributes:
        rounds: what is rounded to the type: whole values, only changes from a base, or nothing.
        kernel: whether this device has kernels for the type; if not, operands are rounded and then
            multiplied in float32.
    """

    dtype: torch.dtype
    rounds: Rounding
    kernel: bool = False
    # Weights in the type, by id. The weight is stored too, so that its id is not given to another.
    _weights: dict[int, Stored] = field(default_factory=dict)

    @staticmethod
    def of(precision: Precision, device: Device) -> Background:
        """The background of a precision; warns once where it is simulated."""
        dtype = DTYPES[precision.background]
        where = torch.device(device or "cpu")
        kernel = _has_kernel(dtype, where)
        if not kernel:
            warn_once(
                f"{precision.background} is simulated on this {where.type}: its rounding is real, "
                "but it is no faster."
            )
        rounds: Rounding = "changes" if precision.investigated == "float32" else "values"
        return Background(dtype, rounds, kernel)

    @property
    def rounds_changes(self) -> bool:
        """Whether runs need the base as their first variant, to measure changes from it."""
        return self.rounds == "changes"

    @property
    def product_of_values(self) -> Multiply:
        """How to multiply by weights what must be exact unless all values are rounded."""
        return self.product if self.rounds == "values" else multiply

    def product_of_changes(self, n_variants: int) -> Multiply:
        """How to multiply by weights where rounded changes of the first variant are enough."""
        if self.rounds == "changes":
            return partial(self._increments, n_variants)
        return self.product_of_values

    def product(self, x: Tensor, weight: Tensor, bias: Bias = None, heads: Heads = None) -> Tensor:
        """x @ weight + bias of these heads, with both operands rounded; see `multiply`."""
        stored, weight_scale = self._stored_weight(weight)
        rounded, scale = _rounded(x, self.dtype, ROW)
        rows = slice(None) if heads is None else heads
        if self.kernel:
            result = _matmul(rounded, stored[rows])
        else:
            result = rounded.to(x.dtype) @ stored[rows]
        if scale is not None and weight_scale is not None:
            result.mul_(scale).mul_(weight_scale[rows])
        if bias is not None:
            result += bias if heads is None else bias[heads][:, None]
        return result.to(x.dtype)

    def _increments(
        self, n_variants: int, x: Tensor, weight: Tensor, bias: Bias = None, heads: Heads = None
    ) -> Tensor:
        """A product that rounds only the difference from the first variant, the base."""
        by_variant = (n_variants, -1)
        variants = x.unflatten(-2, by_variant)
        base = variants[..., 0, :, :]
        difference = variants - base.unsqueeze(-3)
        # y = y0 + round(x - x0) round(W)
        exact = multiply(base, weight, bias, heads)
        rows = difference.flatten(-3, -2)
        change = self.product(rows, weight, None, heads)
        changes = change.unflatten(-2, by_variant)
        sums = exact.unsqueeze(-3) + changes
        return sums.flatten(-3, -2)

    def _stored_weight(self, weight: Tensor) -> Scaled:
        """A weight in the type, rounded once."""
        key = id(weight)
        if key not in self._weights:
            if self.kernel:
                stored, scale = _for_kernel(weight, self.dtype)
            else:
                rounded, scale = _rounded(weight, self.dtype, COLUMN)
                stored = rounded.to(weight.dtype)
            self._weights[key] = weight, (stored, scale)
        return self._weights[key][1]


EXACT = Background(torch.float32, "nothing")


def _rounded(x: Tensor, dtype: torch.dtype, axis: int) -> Scaled:
    """x in a small type, scaled along an axis if the type needs it."""
    if dtype not in LARGEST:
        return x.to(dtype), None
    largest = x.abs().amax(axis, keepdim=True)
    scale = largest.div_(LARGEST[dtype])
    # A row of zeros is not divided by zero.
    smallest = torch.finfo(x.dtype).tiny
    scale.clamp_(min=smallest)
    scaled = x / scale
    if dtype == torch.int8:
        scaled = scaled.round_()
    return scaled.to(dtype), scale


def _for_kernel(weight: Tensor, dtype: torch.dtype) -> Scaled:
    """A weight as the kernels need it."""
    stored, scale = _rounded(weight, dtype, COLUMN)
    if dtype not in LARGEST:
        return stored, scale
    # Shapes without an 8-bit kernel are multiplied in bfloat16.
    unaligned = any(size % ALIGNMENT for size in weight.shape)
    if weight.dim() > 2 or unaligned:
        return stored.to(torch.bfloat16), scale
    # The 8-bit kernels read weights by columns.
    return stored.mT.contiguous().mT, scale


def _matmul(a: Tensor, b: Tensor) -> Product:
    """a @ b on a GPU, by tensor cores, summed in float32."""
    if a.dtype not in LARGEST:
        return _matmul_16_bit(a, b)
    has_kernel = b.dtype in LARGEST and a.dim() == 2
    if has_kernel and len(a) > ALIGNMENT:
        return _matmul_8_bit(a, b)
    # bfloat16 holds 8-bit numbers exactly.
    return _matmul_16_bit(a.bfloat16(), b.bfloat16())


def _matmul_16_bit(a: Tensor, b: Tensor) -> Product:
    if b.dim() == 2:
        rows = a.flatten(0, -2)
        product = torch.mm(rows, b, out_dtype=torch.float32)
        return product.unflatten(0, a.shape[:-1])
    n_heads = len(b)
    by_head = a.expand(n_heads, -1, -1)
    return torch.bmm(by_head, b, out_dtype=torch.float32)


def _matmul_8_bit(a: Tensor, b: Tensor) -> Product:
    if a.dtype == torch.int8:
        return torch._int_mm(a, b).float()
    ones = a.new_ones((), dtype=torch.float32)
    scaling = functional.ScalingType.TensorWise
    return functional.scaled_mm(a, b, ones, scaling, ones, scaling, output_dtype=torch.float32)


@cache
def _has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type run on this device, and are right."""
    if device.type != "cuda":
        return False
    # 8-bit floats are summed with fewer digits. A wrong result is off by the size of the numbers.
    tolerance = 1e-2 if dtype == torch.float8_e4m3fn else 1e-4
    try:
        of_matrix = _kernel_error(dtype, device, 64, 64)
        of_heads = _kernel_error(dtype, device, 2, 64, 64)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
    return max(of_matrix, of_heads) <= tolerance


def _kernel_error(dtype: torch.dtype, device: torch.device, *shape: int) -> float:
    """The relative error of a random product; with heads, in another order than stored."""
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, shape, generator=generator)
    a, _ = _rounded(random().to(device), dtype, ROW)
    b, _ = _for_kernel(random().to(device), dtype)
    if b.dim() == 3:
        b = b[[1, 0]]
    expected = a.double() @ b.double()
    errors = _matmul(a, b) - expected
    return float(errors.abs().max() / expected.abs().max())

"""Mixed precision for searches: what is under investigation in float32, the bulk of the products in
a smaller type.

The idea is PAHQ's (https://arxiv.org/abs/2510.23264): only the component at hand needs all digits.
Here the base of a search is exact, and
what is rounded are the *changes* that an edge's removal makes: for y = x W, with x0 and y0 of the
base,

    y = y0 + round(x - x0) round(W)

so that rounding is relative to the change and vanishes with it. Softmax, norms, sums and the metric
are in float32.
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
# Kernels for 8-bit numbers want sizes that are multiples of this.
ALIGNMENT = 16


@dataclass(frozen=True)
class Precision:
    """How exactly a search computes.

    Attributes:
        background: the type of the bulk of the products: of the changes downstream of what is
            investigated. 8-bit types are scaled per row of
            the activations and per column of the weights; 8-bit kernels serve MLPs, other products
            of such numbers are bfloat16's.
        investigated: the type of the target under test and its head; the same as `background`
            computes everything in that type and whole
            values instead of changes, which is plain low precision, to compare with.
        confirm: measure again in float32 whatever is nearer to the threshold than the noise seen in
            this run, so that the circuit is that of
            float32.
    """

    background: str = "bfloat16"
    investigated: str = "float32"
    confirm: bool = True

    def __post_init__(self) -> None:
        if self.background not in get_args(TypeName):
            raise InputError(
                f"there is no background precision {self.background!r}; choose one of "
                f"{', '.join(get_args(TypeName))}."
            )
        if self.investigated not in ("float32", self.background):
            raise InputError(
                f"investigated={self.investigated!r} must be 'float32', or {self.background!r} as "
                f"the background is, which is plain low precision."
            )
        if self.confirm and self.investigated != "float32":
            raise InputError(
                f"plain {self.background} has nothing in float32 to confirm with; set "
                f"confirm=False."
            )

    def __str__(self) -> str:
        # The default by its name alone, so that a search knows itself again whichever way it was
        # asked for.
        kind = (
            ", plain" if self.investigated != "float32" else "" if self.confirm else ", unconfirmed"
        )
        return f"{self.background}{kind}"


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
    """Products in a small type, with float32 sums; weights are stored in it once.

    Attributes:
        dtype: the type.
        whole: whole values are rounded, not changes.
        kernel: whether this device has kernels for it; otherwise operands are rounded and
            multiplied in float32.
    """

    dtype: torch.dtype
    whole: bool
    kernel: bool
    _weights: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    @staticmethod
    def of(precision: Precision, device: torch.device | str | None) -> Background:
        """The background of a precision; says so once where it is simulated."""
        dtype, where = DTYPES[precision.background], torch.device(device or "cpu")
        kernel = _has_kernel(dtype, where)
        if not kernel:
            _say_once(
                f"{precision.background} is simulated on this {where.type}: its rounding is real, "
                f"a gain in speed is not to be had."
            )
        return Background(dtype, precision.investigated != "float32", kernel)

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        heads: HeadSelection | None = None,
    ) -> Tensor:
        """x @ weight + bias, of these heads, both operands rounded; the signature is that of
        `sublayers.multiply`.
        """
        _, held, weight_scale = self._weight(weight)
        rounded, scale = _rounded(x, self.dtype, -1)
        if heads is not None:
            held, weight_scale = held[heads], None if weight_scale is None else weight_scale[heads]
            bias = None if bias is None else bias[heads][:, None]
        result = _matmul(rounded, held) if self.kernel else rounded.to(x.dtype) @ held
        if scale is not None and weight_scale is not None:
            result = result.mul_(scale).mul_(weight_scale)
        return (result if bias is None else result.add_(bias)).to(x.dtype)

    def increments(self, tokens: int) -> Multiply:
        """Products of which only the changes are rounded: the first of the variants, of so many
        tokens each, is what they change from.
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
            exact = multiply(base, weight, bias, heads)[..., None, :, :]
            change = self.product(
                (changed - base[..., None, :, :]).flatten(-3, -2), weight, None, heads
            ).unflatten(-2, (-1, tokens))
            return torch.cat([exact, exact + change], dim=-3).flatten(-3, -2)

        return product

    def _weight(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        key = id(weight)
        if key not in self._weights:
            held, scale = (
                _stored(weight, self.dtype) if self.kernel else _rounded(weight, self.dtype, -2)
            )
            if not self.kernel:
                held = held.to(weight.dtype)
            self._weights[key] = (
                weight,
                held,
                scale,
            )  # with the weight itself, so that its number is not given to another
        return self._weights[key]


def _rounded(x: Tensor, dtype: torch.dtype, axis: int) -> tuple[Tensor, Tensor | None]:
    """x in a type, and its scale along an axis where the type needs one."""
    if dtype not in LARGEST:
        return x.to(dtype), None
    scale = (
        x.abs().amax(axis, keepdim=True).div_(LARGEST[dtype]).clamp_(min=torch.finfo(x.dtype).tiny)
    )
    scaled = x / scale
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def _stored(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight as the kernels want it: 8-bit numbers by columns; where there is no kernel for its
    shape, in bfloat16, which holds them exactly.
    """
    held, scale = _rounded(weight, dtype, -2)
    if dtype not in LARGEST:
        return held, scale
    if weight.dim() > 2 or weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT:
        return held.to(torch.bfloat16), scale
    return held.transpose(-1, -2).contiguous().transpose(-1, -2), scale


def _matmul(a: Tensor, b: Tensor) -> Float[Tensor, "*batch row column"]:
    """a @ b on a GPU with float32 sums, by tensor cores."""
    if a.dim() == 2 and b.dtype in LARGEST and a.shape[0] > ALIGNMENT:
        if a.dtype == torch.int8:
            return torch._int_mm(a, b).float()
        ones = a.new_ones((), dtype=torch.float32)
        by_tensor = functional.ScalingType.TensorWise
        return functional.scaled_mm(
            a, b, ones, by_tensor, ones, by_tensor, output_dtype=torch.float32
        )
    if a.dtype in LARGEST:
        a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    if b.dim() == 2:
        return torch.mm(a.reshape(-1, a.shape[-1]), b, out_dtype=torch.float32).view(
            *a.shape[:-1], -1
        )
    return torch.bmm(a.expand(len(b), -1, -1), b, out_dtype=torch.float32)


@cache
def _has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the products of this type run on this device, and give what they should."""
    if device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    # 8-bit floats are summed with fewer digits; what is computed wrongly is off by the size of the
    # numbers themselves.
    tolerance = 1e-2 if dtype == torch.float8_e4m3fn else 1e-4
    try:
        for shape, heads in (((), slice(None)), ((2,), torch.tensor([1, 0]))):
            a, b = (torch.randn(*shape, 64, 64, generator=generator).to(device) for _ in range(2))
            (a, _), (b, _) = _rounded(a, dtype, -1), _stored(b, dtype)
            b = b[heads.to(device)] if isinstance(heads, torch.Tensor) else b
            expected = a.double() @ b.double()
            if (
                float((_matmul(a, b).double() - expected).abs().max() / expected.abs().max())
                > tolerance
            ):
                return False
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError):
        return False
    return True


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)

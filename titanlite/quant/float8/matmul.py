"""Matmuls of float8 operands: on float8 units, or emulated in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite.quant import kernels
from titanlite.quant.emulation import multiply_in_float32
from titanlite.quant.float8.casts import CastConfig
from titanlite.quant.float8.devices import scales_rows_in_matmuls
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, dequantize, quantize
from titanlite.quant.format import Operand


def cast(
    x: Tensor,
    config: CastConfig,
    *,
    contracted: int,
    power_of_2: bool,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
    emulate: bool,
) -> Operand:
    """Cast ``x`` (2-D) by ``config`` for a matmul that sums over dimension ``contracted``.

    Args:
        scale: the delayed or static scale; None: computed from ``amax``.
        amax: () or with size 1 along ``contracted``; None: that of ``x``.
        emulate: keep the memory layout of ``x``, instead of the one that float8 units need.
    """
    if not config.is_cast:
        return Operand(x.detach(), None)
    if scale is None:
        if amax is None:
            amax = amax_of(x, contracted if config.is_axiswise else None)
        scale = amax_to_scale(amax, config.dtype, power_of_2)
    else:
        # A clamped infinity would be a plausible number. (With a dynamic scale it becomes NaN by itself.)
        x = torch.where(x.isinf(), torch.nan, x)
    data = quantize(x, scale, config.dtype)
    if config.is_axiswise and contracted == 0 and not emulate:
        data = data.t().contiguous().t()  # the hardware needs the summed dimension contiguous
    return Operand(data, scale)


def scaled_mm(
    a: Operand, b: Operand, *, out_dtype: torch.dtype, fast_accum: bool, emulate: bool, target: str | None = None
) -> Tensor:
    """Return ``a @ b`` in ``out_dtype``, accumulated in float32.

    Args:
        a: (m, k), scale () or (m, 1).
        b: (k, n), scale () or (1, n). Both operands are float8, or neither.
        target: the architecture to compute for; None: that of the operands' device.
    """
    if a.data.numel() == 0 or b.data.numel() == 0:  # float8 units do not take empty operands
        return a.data.new_zeros(a.data.shape[0], b.data.shape[1], dtype=out_dtype)
    if a.scale is None or b.scale is None:
        return a.data.to(out_dtype) @ b.data.to(out_dtype)
    if emulate:
        return multiply_in_float32(dequantize(a.data, a.scale), dequantize(b.data, b.scale)).to(out_dtype)
    a8, b8 = _padded(a.data), _padded(b.data.t()).t()
    if not a.scale.ndim and not b.scale.ndim:
        return torch._scaled_mm(
            a8,
            b8,
            scale_a=a.scale.reciprocal(),
            scale_b=b.scale.reciprocal(),
            out_dtype=out_dtype,
            use_fast_accum=fast_accum,
        )
    # With full accumulation or another output dtype, the kernel for row scales is slow or missing on most devices.
    if out_dtype is torch.bfloat16 and (fast_accum or scales_rows_in_matmuls(a8.device, target)):
        return torch._scaled_mm(
            a8,
            b8,
            scale_a=a.scale.reciprocal().expand(a8.shape[0], 1).contiguous(),
            scale_b=b.scale.reciprocal().expand(1, b8.shape[1]).contiguous(),
            out_dtype=out_dtype,
            use_fast_accum=fast_accum,
        )
    return multiply_then_scale(Operand(a8, a.scale), Operand(b8, b.scale), out_dtype, fast_accum)


def scaled_grouped_mm(a: Operand, b: Operand, offsets: Tensor, fast_accum: bool) -> Tensor:
    """Return the products of groups by float8 units, in bfloat16: they write no other dtype.

    Args:
        a: (m, k), with a scale of each row; or, with the columns of both in groups, of each group and row.
        b: (groups, n, k), or (n, k). The scales are as those of ``a``.
        offsets: the end of each group in the rows of ``a``, or in the columns of both, int32 [groups].

    Returns:
        (m, n), or (groups, m, n).
    """
    assert a.scale is not None
    assert b.scale is not None
    a_scale, b_scale = a.scale.reciprocal(), b.scale.reciprocal()
    return torch._scaled_grouped_mm(
        a.data,
        b.data.transpose(-1, -2),
        a_scale.flatten(),
        b_scale.squeeze(-1) if b.data.ndim == 3 else b_scale.flatten(),
        offsets,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )


def multiply_then_scale(a: Operand, b: Operand, out_dtype: torch.dtype, fast_accum: bool) -> Tensor:
    """Return ``a @ b``, applying the scales in one more pass over the product. Both are laid out for float8 units."""
    assert a.scale is not None
    assert b.scale is not None
    one = a.scale.new_ones(())
    # The unscaled product could overflow float16, not bfloat16, which loses nothing where scales are powers of two.
    unscaled = torch.bfloat16 if out_dtype is torch.bfloat16 else torch.float32
    product = torch._scaled_mm(a.data, b.data, scale_a=one, scale_b=one, out_dtype=unscaled, use_fast_accum=fast_accum)
    if kernels.AVAILABLE and not torch.compiler.is_compiling():  # the compiler fuses the scaling itself
        return kernels.rescale(product, a.scale, b.scale, out_dtype)
    return (product.float() * a.scale.reciprocal() * b.scale.reciprocal()).to(out_dtype)


def _padded(a: Tensor) -> Tensor:
    """Return ``a`` row-major, its last (summed) dimension padded with zeros to a multiple of 16, as the units need."""
    missing = -a.shape[1] % 16
    if missing:
        return F.pad(a.view(torch.uint8), (0, missing)).view(a.dtype)
    return a.contiguous()

"""Casts and matmuls on the CPU. Casts and scaling are compiled into one pass each: plain operations write every
intermediate result.

They are operators of their own, so that a compiled model does not fuse them with what is around them. Fused, the two
casts of an operand share one loop, which the compiler does not vectorize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanlite.quant.compiled import CompiledFunction
from titanlite.quant.int8.numerics import amax_of, amax_to_scale, inverse_of, rescale

_BLOCK = 32  # rows of which the largest magnitudes are taken first: their cache lines stay for the next columns


def _amax_of_columns(x: Tensor) -> Tensor:
    rows, columns = x.shape
    if rows % _BLOCK or not x.numel():
        return amax_of(x, 0)
    return x.view(-1, _BLOCK, columns).abs().amax(1).amax(0, keepdim=True).float()


def _scale_and_inverse(amax: Tensor) -> tuple[Tensor, Tensor]:
    scale = amax_to_scale(amax)
    return scale, inverse_of(scale)


def _round(x: Tensor, inverse: Tensor) -> Tensor:
    """Return :func:`quantize`, for scales that come from ``x`` itself: nothing is beyond 127 then."""
    return (x.float() * inverse).round().to(torch.int8)


def _by_features(x: Tensor) -> tuple[Tensor, Tensor]:
    scale, inverse = _scale_and_inverse(amax_of(x, 1))
    return _round(x, inverse), scale


MATRIX_UNITS = torch.cpu._is_amx_tile_supported()
"""This processor has matrix units (AMX), which multiply bfloat16 too."""
# torch._int_mm takes a routine without AMX. Where there is no AMX it is the faster one.
_BY_QUANTIZED_LINEAR = torch.backends.mkldnn.is_available() and MATRIX_UNITS
_CASTS = "int8 casts"
_by_features_compiled = CompiledFunction(_by_features, _CASTS)
# In one function with the casts, the compiler would walk along the columns, and divide anew for each element.
_scales_of_columns = CompiledFunction(lambda x: _scale_and_inverse(_amax_of_columns(x)), _CASTS)
_cast_columns = CompiledFunction(_round, _CASTS)
_cast_columns_transposed = CompiledFunction(lambda x, inverse: _round(x, inverse).t().contiguous(), _CASTS)
_rescale = CompiledFunction(rescale, _CASTS)
_scale_rows = CompiledFunction(lambda product, scale, dtype: (product * scale).to(dtype), _CASTS)


@torch.library.custom_op("titanlite_int8::cast", mutates_args=(), device_types="cpu")
def cast(x: Tensor, contracted: int, transpose: bool) -> tuple[Tensor, Tensor]:
    """Return the int8 values of ``x``, (rows, columns), for a matmul that sums over dimension ``contracted``, and their
    scales, which have size 1 there.

    Args:
        transpose: let the rows be contiguous in memory, for the left operand of a matmul; else the columns are.
    """
    if contracted == 1:
        data, scale = _by_features_compiled(x)
    else:
        scale, inverse = _scales_of_columns(x)
        data = _cast_columns_transposed(x, inverse).t() if transpose else _cast_columns(x, inverse)
    return data, scale


@cast.register_fake
def _(x: Tensor, contracted: int, transpose: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    scale = x.new_empty((rows, 1) if contracted == 1 else (1, columns), dtype=torch.float32)
    if transpose:
        return x.new_empty(columns, rows, dtype=torch.int8).t(), scale
    return x.new_empty(rows, columns, dtype=torch.int8), scale


@torch.library.custom_op("titanlite_int8::multiply", mutates_args=(), device_types="cpu")
def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a @ b`` in ``dtype``, times the scales (m, 1) and (1, n). At most :data:`LONGEST` products are added."""
    if _BY_QUANTIZED_LINEAR:
        result: Tensor = _scale_rows(_onednn_matmul(a, b, b_scale), a_scale, dtype)
    else:
        result = _rescale(torch._int_mm(a, b), a_scale, b_scale, dtype)
    return result


@multiply.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


MULTIPLY = torch.ops.titanlite_int8.multiply.default


def _onednn_matmul(a: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Return ``a @ b`` times ``b_scale``, in float32.

    This operator, which the compiler uses for quantized models, takes oneDNN's matmul with scales, which runs in AMX.
    The weight is not packed before: that would take longer than the matmul.
    """
    weight = b.to_mkldnn() if b.is_contiguous() else b.t().contiguous().to_mkldnn().transpose(0, 1)
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        *(a.contiguous(), 1.0, 0, weight, b_scale.flatten(), torch.zeros(b.shape[1], dtype=torch.int32), None, 1.0, 0),
        *(torch.float32, "none", [], ""),
    )
    return result

"""Casts and matmuls on the CPU. Casts and scaling are compiled into one pass each: plain operations write every
intermediate result.

They are operators of their own, so that a compiled model does not fuse them with what is around them. Fused, the two
casts of an operand share one loop, which the compiler does not vectorize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanlite.quant.compiled import CompiledFunction
from titanlite.quant.int8.numerics import amax_of, amax_to_scale, quantize, rescale


def _by_features(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = amax_to_scale(amax_of(x, 1))
    return quantize(x, scale), scale


def _by_rows_transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = amax_to_scale(amax_of(x, 0))
    return quantize(x, scale).t().contiguous(), scale


_CASTS = "int8 casts"
_by_features_compiled = CompiledFunction(_by_features, _CASTS)
_by_rows_transposed_compiled = CompiledFunction(_by_rows_transposed, _CASTS)
_scale_of_columns = CompiledFunction(lambda x: amax_to_scale(amax_of(x, 0)), _CASTS)
_quantize = CompiledFunction(quantize, _CASTS)
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
    elif transpose:
        data, scale = _by_rows_transposed_compiled(x)
        data = data.t()
    else:
        scale = _scale_of_columns(x)  # in one function with the rest, the compiler would walk along the columns
        data = _quantize(x, scale)
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
    if torch.backends.mkldnn.is_available():
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

    This operator, which the compiler uses for quantized models, takes oneDNN's matmul with scales, which runs in AMX or
    VNNI. ``torch._int_mm`` takes an older routine without AMX. The weight is not packed before: that would take longer
    than the matmul.
    """
    weight = b.to_mkldnn() if b.is_contiguous() else b.t().contiguous().to_mkldnn().transpose(0, 1)
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        *(a.contiguous(), 1.0, 0, weight, b_scale.flatten(), torch.zeros(b.shape[1], dtype=torch.int32), None, 1.0, 0),
        *(torch.float32, "none", [], ""),
    )
    return result

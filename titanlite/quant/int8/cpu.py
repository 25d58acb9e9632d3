"""Casts and matmuls on the CPU. Casts and scaling are compiled into one pass each: plain operations write every
intermediate result.

They are operators of their own, so that a compiled model does not fuse them with what is around them. Fused, the two
casts of an operand share one loop, which the compiler does not vectorize.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titanlite.quant.int8.numerics import amax_of, amax_to_scale, quantize, rescale

logger = logging.getLogger("titanlite.int8")


def _by_features(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = amax_to_scale(amax_of(x, 1))
    return quantize(x, scale), scale


def _by_rows_transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = amax_to_scale(amax_of(x, 0))
    return quantize(x, scale).t().contiguous(), scale


class _Compiled:
    """A function that is compiled at its first call, for all shapes; as it is where there is no C++ compiler."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        # In one state of autograd and with plain tensors: each other one would be compiled again, eight times at most.
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            return self._call(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))

    def _call(self, *args: Any) -> Any:
        if self.function is None:
            from torch._dynamo.exc import BackendCompilerFailed  # loads the compiler
            from torch._inductor.exc import InductorError

            self.function = torch.compile(self.plain, dynamic=True)
            try:
                return self.function(*args)
            except (BackendCompilerFailed, InductorError) as e:
                reason = str(e).strip().splitlines()[0]
                logger.warning("int8 casts are not compiled, so they take several passes each (%s)", reason)
                self.function = self.plain
        return self.function(*args)


_by_features_compiled = _Compiled(_by_features)
_by_rows_transposed_compiled = _Compiled(_by_rows_transposed)
_scale_of_columns = _Compiled(lambda x: amax_to_scale(amax_of(x, 0)))
_quantize = _Compiled(quantize)
_rescale = _Compiled(rescale)
_scale_rows = _Compiled(lambda product, scale, dtype: (product * scale).to(dtype))


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

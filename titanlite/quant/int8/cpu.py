"""Casts and scaling on the CPU, compiled into one pass each: plain operations write every intermediate result.

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


def cast_plainly(x: Tensor, contracted: int) -> tuple[Tensor, Tensor]:
    """Return the int8 values of ``x``, (rows, columns), for a matmul that sums over dimension ``contracted``, which is
    contiguous in the result, and their scales, which have size 1 there."""
    scale = amax_to_scale(amax_of(x, contracted))
    data = quantize(x, scale)
    return (data if contracted == 1 else data.t().contiguous().t()), scale


class _Compiled:
    """A function that is compiled at its first call, for all shapes; as it is where there is no C++ compiler."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
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


_by_features = _Compiled(lambda x: cast_plainly(x, 1))
_by_rows = _Compiled(lambda x: cast_plainly(x, 0))
_rescale = _Compiled(rescale)


@torch.library.custom_op("titanlite_int8::cast", mutates_args=(), device_types="cpu")
def cast(x: Tensor, contracted: int) -> tuple[Tensor, Tensor]:
    """Compute :func:`cast_plainly`."""
    data, scale = _by_features(x) if contracted == 1 else _by_rows(x)
    return data, scale


@cast.register_fake
def _(x: Tensor, contracted: int) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    if contracted == 1:
        return x.new_empty(rows, columns, dtype=torch.int8), x.new_empty(rows, 1, dtype=torch.float32)
    return x.new_empty(columns, rows, dtype=torch.int8).t(), x.new_empty(1, columns, dtype=torch.float32)


@torch.library.custom_op("titanlite_int8::rescale", mutates_args=(), device_types="cpu")
def rescale_product(product: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``product * a * b`` in ``dtype``, computed in float32."""
    result: Tensor = _rescale(product, a, b, dtype)
    return result


@rescale_product.register_fake
def _(product: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(product, dtype=dtype)

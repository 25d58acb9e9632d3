"""The linear layer with a float8 weight, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.float8.float8_linear import Float8Linear
from titanlite.float8.inference_config import InputCast
from titanlite.float8.types import PerRow, PerTensor
from titanlite.quant.autograd import refuse_double_backward
from titanlite.quant.convertible import change_class
from titanlite.quant.float8.devices import has_native_float8
from titanlite.quant.float8.matmul import scaled_mm
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, dequantize, quantize
from titanlite.quant.format import Operand
from titanlite.quant.operands import autocast
from titanlite.quant.tensor import QuantTensor

HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)


class Float8Weight(QuantTensor):
    """A quantized weight, to look at: ``qdata``, and the multiplier ``scale``."""

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """Return the weight in high precision."""
        return dequantize(self.qdata, self.scale).to(self.dtype)


class _Matmul(torch.autograd.Function):
    """The matmul ``x @ weight.T`` in float8. Its gradient treats quantization as the identity, as training does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor | None, cast: InputCast
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        if x_scale is None:
            amax = amax_of(x, 1 if weight_scale.ndim else None)
            if cast.bounds != (None, None):
                amax = amax.clamp(*cast.bounds)
            x_scale = amax_to_scale(amax, cast.dtype)
        else:
            x = x.masked_fill(x.isinf(), float("nan"))  # a clamped infinity would be a plausible number
        a = Operand(quantize(x, x_scale, cast.dtype), x_scale)
        b = Operand(weight, weight_scale).t()
        emulate = cast.mm_config.emulate or not has_native_float8(x.device)
        return scaled_mm(a, b, out_dtype=x.dtype, fast_accum=cast.mm_config.use_fast_accum, emulate=emulate)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            refuse_double_backward("float8")
        return grad_output @ dequantize(*ctx.saved_tensors).to(grad_output.dtype), None, None, None, None


class Float8InferenceLinear(nn.Linear):
    """A linear layer with a float8 weight, as :func:`quantize_` makes it.

    Its state dict holds plain tensors: an unchanged ``bias``, and these buffers, which keep their dtypes under
    ``.to(dtype)``:

        weight_float8: (out_features, in_features), float8.
        weight_scale: float32 multiplier, () or (out_features, 1).
        input_scale: float32 multiplier, (); only with static scaling.
    """

    weight_float8: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_cast: InputCast | None
    weight_dtype: torch.dtype

    @property
    def casts_input(self) -> bool:
        """False if the weight is dequantized for the matmul."""
        return self.input_cast is not None

    @property
    def weight(self) -> Float8Weight:  # type: ignore[override]
        """The quantized weight, of the shape and dtype of the original. To compute with it, call the layer, or
        ``weight.dequantize()``."""
        return Float8Weight(self.weight_float8, self.weight_scale, self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [..., in_features] of bfloat16, float16 or float32 to [..., out_features] in the same dtype (in
        autocast's, if that is enabled).

        A NaN or infinity in the input gives NaN for all values with the same scale: the row, or the whole output. The
        input's gradient uses the dequantized weight, and treats quantization as the identity.

        Raises:
            TypeError: the input has another dtype.
            ValueError: the input has another number of features.
        """
        input = autocast(input)
        if input.dtype not in HIGH_PRECISION:
            raise TypeError(f"input of {input.dtype}: must be bfloat16, float16 or float32")
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"input of shape {tuple(input.shape)}: the last dimension must be {self.in_features}")
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.input_cast is None or input.numel() == 0:  # an empty input has no amax
            return F.linear(input, dequantize(self.weight_float8, self.weight_scale).to(input.dtype), bias)
        rows = input.reshape(-1, self.in_features)
        out: Tensor = _Matmul.apply(rows, self.weight_float8, self.weight_scale, self.input_scale, self.input_cast)
        out = out.view(*input.shape[:-1], self.out_features)
        return out if bias is None else out + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(dtype) is for the bias only: the buffers keep their dtypes.
        buffers = [self.weight_float8, self.weight_scale, self.input_scale]

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype != t.dtype and any(t is b for b in buffers) else moved

        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_float8.device)).dtype
        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        granularity = PerRow() if self.weight_scale.ndim else PerTensor()
        input = "static" if self.input_scale is not None else "dynamic" if self.casts_input else "not cast"
        return f"{super().extra_repr()}, weight={self.weight_float8.dtype} {granularity}, input={input}"


def from_quantized(
    module: nn.Linear, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, *, input_cast: InputCast | None
) -> Float8InferenceLinear:
    """Turn ``module`` itself into a :class:`Float8InferenceLinear` with an already quantized weight, and return it.

    Args:
        weight: (out_features, in_features), float8.
        weight_scale: float32 multiplier, () or (out_features, 1).
        input_scale: float32 multiplier, (), of a static cast of the input; None: a dynamic cast, or none.
        input_cast: multiply in float8, with this cast of the input; None: dequantize the weight, and multiply in the
            input's dtype.
    """
    if isinstance(module, Float8Linear):  # remove the state of training
        module.to_linear()
    dtype = module.weight.dtype
    del module.weight
    layer = change_class(module, Float8InferenceLinear)
    layer.register_buffer("weight_float8", weight)
    layer.register_buffer("weight_scale", weight_scale)
    layer.register_buffer("input_scale", input_scale)
    layer.input_cast, layer.weight_dtype = input_cast, dtype
    return layer

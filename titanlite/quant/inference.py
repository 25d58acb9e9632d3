"""The linear layer with a weight that is quantized for good, for inference, in any format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.quant.convertible import change_class
from titanlite.quant.format import WEIGHT, Format, Operand, Use
from titanlite.quant.operands import autocast
from titanlite.quant.tensor import QuantTensor


class QuantInferenceLinear(nn.Linear):
    """A linear layer whose weight exists in the format alone. Its state dict holds plain tensors: an unchanged
    ``bias``, and two buffers, which keep their dtypes under ``.to(dtype)``:

        weight_data: the weight in the format.
        weight_scale: its scales, as the format gives them.

    It has no gradients.
    """

    format: Format
    weight_data: Tensor
    weight_scale: Tensor
    weight_dtype: torch.dtype

    @property
    def weight(self) -> QuantTensor:  # type: ignore[override]
        """The quantized weight, of the shape and dtype of the original."""
        return QuantTensor(self.weight_data, self.weight_scale, self.weight_dtype)

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [..., in_features] to [..., out_features], in its dtype, or that of autocast."""
        input = autocast(input)
        rows, format = input.reshape(-1, self.in_features), self.format.on(input.device)
        w = Operand(self.weight_data, self.weight_scale).t()
        out = format.multiply(format.cast(rows, Use("input", 1)), w, "output", input.dtype)
        out = out.view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self.get_buffer(name) for name in ("weight_data", "weight_scale")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if (new := self.get_buffer(name)).dtype != old.dtype:  # .to(dtype) is for the bias only
                setattr(self, name, old.to(new.device))
        return self


def quantized_for_good(module: nn.Linear, format: Format, stored: Operand | None = None) -> QuantInferenceLinear:
    """Turn ``module`` itself into a :class:`QuantInferenceLinear`, and return it.

    Args:
        stored: the quantized weight; None: that of ``module`` is cast.
    """
    weight = module.weight.detach()
    data, scale = format.on(weight.device).cast(weight, WEIGHT) if stored is None else stored
    del module.weight
    layer = change_class(module, QuantInferenceLinear)
    layer.register_buffer("weight_data", data)
    layer.register_buffer("weight_scale", scale)
    layer.format, layer.weight_dtype = format, weight.dtype
    return layer

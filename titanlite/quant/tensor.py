"""A quantized tensor in place of a high-precision one: a weight that FSDP2 gathered, or an activation that tensor
parallelism gathered, in the format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from titanlite.quant.format import Operand

_aten = torch.ops.aten


class QuantTensor(Tensor):
    """A tensor with the shape and dtype of the original, and the bytes of its cast.

    Only a :class:`~titanlite.quant.linear.QuantLinear` computes with it. Any other operation raises an error; nothing
    dequantizes it silently.

    Args:
        qdata: the data in the format, contiguous.
        scale: as the format has it: (), or n per row, of shape (..., n).
        dtype: the dtype of the original.
    """

    qdata: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> QuantTensor:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, qdata.shape, strides=qdata.stride(), dtype=dtype, device=qdata.device
        )
        self.qdata, self.scale = qdata, scale
        return self  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["qdata", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> QuantTensor:
        return QuantTensor(tensors["qdata"], tensors["scale"], dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, {self.qdata.dtype} for {self.dtype}, scale={self.scale})"
        )

    def operand(self) -> Operand:
        """Return the data and scale as a (rows, columns) matrix."""
        scale = self.scale.flatten(0, -2) if self.scale.ndim else self.scale
        return Operand(self.qdata.reshape(-1, self.shape[-1]), scale)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        x = args[0]
        same = func is _aten.view.default and list(args[1]) == list(x.shape)
        if same or func in (_aten.detach.default, _aten.alias.default):
            return type(x)(x.qdata, x.scale, x.dtype)
        if func is _aten.as_strided.default and list(args[2]) == list(x.stride()) and not any(args[3:]):
            return type(x)(x.qdata[: args[1][0]], x.scale, x.dtype)  # FSDP2 removes its padding
        raise NotImplementedError(
            f"{func} of a QuantTensor, which arrived as {x.qdata.dtype}: only quantized layers compute with it; "
            "convert all layers that use it, or communicate it in high precision"
        )


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of: itself, unless it is a wrapper of others."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]

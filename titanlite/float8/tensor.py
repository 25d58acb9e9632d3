"""A float8 tensor that passes for the high-precision one it stands for, where data arrive in float8 already: weights
that FSDP gathered, activations that tensor parallelism did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlite.float8.matmul import Operand

_aten = torch.ops.aten


class Float8Tensor(Tensor):
    """Shape and dtype of the original, the bytes of the cast.

    Only a :class:`~titanlite.float8.Float8Linear` computes with it; any other operation is an error, never a silent
    dequantization.

    Args:
        data8: float8, contiguous.
        scale: float32 multiplier: (), or one per row, of shape (..., 1).
        dtype: the dtype it passes for.
    """

    data8: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, data8: Tensor, scale: Tensor, dtype: torch.dtype) -> Float8Tensor:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data8.shape, strides=data8.stride(), dtype=dtype, device=data8.device
        )
        self.data8, self.scale = data8, scale
        return self  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["data8", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Float8Tensor:
        return Float8Tensor(tensors["data8"], tensors["scale"], dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Float8Tensor(shape={tuple(self.shape)}, {self.data8.dtype} for {self.dtype}, scale={self.scale})"

    def operand(self) -> Operand:
        """As a (rows, columns) matrix."""
        scale = self.scale.reshape(-1, 1) if self.scale.ndim else self.scale
        return Operand(self.data8.reshape(-1, self.shape[-1]), scale)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        x = args[0]
        same = func is _aten.view.default and list(args[1]) == list(x.shape)
        if same or func in (_aten.detach.default, _aten.alias.default):
            return Float8Tensor(x.data8, x.scale, x.dtype)
        if func is _aten.as_strided.default and list(args[2]) == list(x.stride()) and not any(args[3:]):
            return Float8Tensor(x.data8[: args[1][0]], x.scale, x.dtype)  # FSDP2 cuts off its padding
        raise NotImplementedError(
            f"{func} of a Float8Tensor, which arrived in float8: only float8 layers compute with it. Convert all "
            "layers that use it, or communicate it in high precision"
        )

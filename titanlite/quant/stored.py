"""Weights that are stored quantized: one byte per element and a scale per row, and no copy in high precision.

A :class:`StoredWeight` takes the place of the parameter of a layer whose format has ``stores_weights``. FSDP2 shards
it by rows and gathers its bytes. The gathered weight is a :class:`QuantTensor`. The optimizer dequantizes one parameter
at a time, updates it in float32, and stores it rounded stochastically (:meth:`StoredWeight.update`).

Under tensor parallelism that splits rows, the ranks agree on the scale of each row by an all-reduce of the amaxes. So
the bytes are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from titanlite.quant.format import Format, Operand
from titanlite.quant.gather import GathersQuantized

_aten = torch.ops.aten
_DIM = {_aten.slice.Tensor: 0, _aten.split.Tensor: 1}  # the place of the dimension in the arguments; by rows, it is 0
_AS_WHOLE = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.empty_like.default}
_NO_DTYPE = {_aten._to_copy.default, _aten.empty_like.default}
SCALES = "_scale"
"""The end of the name of the scales in a state dict, after the name of the weight."""
Update = Callable[[Operand, Tensor, Tensor], None]
"""``(the stored data and scale, the new weight in float32, its amaxes)``: writes the new data and scale."""


class StoredWeight(GathersQuantized, Tensor):
    """A weight, (rows, columns), or a part of one, that exists in a number format only. It has the dtype of the weight
    that it stands for.

    Args:
        qdata: the data in the format.
        scale: float32, (rows, 1).
        dtype: of the weight that it stands for.
        split_over: the mesh over which tensor parallelism splits the rows, if it does.
    """

    qdata: Tensor
    scale: Tensor
    format: Format
    split_over: DeviceMesh | None

    @staticmethod
    def __new__(
        cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype, format: Format, split_over: DeviceMesh | None = None
    ) -> StoredWeight:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            qdata.shape,
            strides=qdata.stride(),
            storage_offset=qdata.storage_offset(),
            dtype=dtype,
            device=qdata.device,
        )
        self.qdata, self.scale, self.format, self.split_over = qdata, scale, format, split_over
        return self  # type: ignore[no-any-return]

    @classmethod
    def of(cls, weight: Tensor, format: Format, split_over: DeviceMesh | None = None) -> StoredWeight:
        """Return ``weight`` quantized, rounded to nearest; without values if it has none."""
        # Read back from the format, which knows its dtype: on the meta device this computes nothing.
        with torch.device("meta"):
            like = format.quantize(torch.empty(8, 8), torch.empty(8, 1), "weight")
        assert like.scale is not None
        data = torch.empty(weight.shape, dtype=like.data.dtype, device=weight.device)
        scale = torch.empty(weight.shape[0], 1, dtype=like.scale.dtype, device=weight.device)
        stored = cls(data, scale, weight.dtype, format, split_over)
        if not weight.is_meta:
            stored.write(weight.detach())
        return stored

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["qdata", "scale"], (self.dtype, self.format, self.split_over)

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], context: Any, size: Any, stride: Any) -> StoredWeight:
        return StoredWeight(tensors["qdata"], tensors["scale"], *context)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredWeight(shape={tuple(self.shape)}, {self.qdata.dtype} for {self.dtype})"

    def with_parts(self, qdata: Tensor, scale: Tensor) -> StoredWeight:
        """Return a weight of these parts, that is otherwise like this one."""
        return StoredWeight(qdata, scale, self.dtype, self.format, self.split_over)

    # ---- values

    def dequantized(self) -> Tensor:
        """Return the values in float32."""
        return self.format.dequantize(Operand(self.qdata, self.scale))

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Store ``weight``, rounded to nearest."""
        data, scale = self.format.quantize(weight, self._amax(weight), "weight")
        assert scale is not None
        self.qdata.copy_(data)
        self.scale.copy_(scale)

    @torch.no_grad()
    def update(self, weight: Tensor, store: Update) -> None:
        """Store ``weight``, float32, as ``store`` does it, with the amaxes that ranks agreed on."""
        store(Operand(self.qdata, self.scale), weight, self._amax(weight))

    def _amax(self, weight: Tensor) -> Tensor:
        amax = self.format.amax(weight, "weight")
        if self.split_over is not None:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.split_over.get_group())
        return amax

    # ---- operations

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is _aten.copy_.default:
            return _copy(*args[:2])
        first, *rest = args
        if func is _aten.zeros_like.default:  # a gradient, or a moment
            return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype, device=first.device)
        if func is _aten._to_copy.default and kwargs.get("dtype", first.dtype) != first.dtype:
            return func(first.dequantized(), **kwargs)
        if func in _NO_DTYPE:
            kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        if func in _AS_WHOLE or func in (_aten._to_copy.default, _aten._pin_memory.default):
            return first.with_parts(func(first.qdata, *rest, **kwargs), func(first.scale, *rest, **kwargs))
        if func in _DIM and (len(rest) <= _DIM[func] or rest[_DIM[func]] == 0):
            data, scale = func(first.qdata, *rest, **kwargs), func(first.scale, *rest, **kwargs)
            many = isinstance(data, (list, tuple))
            return [*map(first.with_parts, data, scale)] if many else first.with_parts(data, scale)
        if func is _aten.new_zeros.default:
            device = kwargs.get("device") or first.device
            zeros = (torch.zeros(*size, dtype=part.dtype, device=device) for size, part in _sizes(first, rest[0]))
            return first.with_parts(*zeros)
        if func is _aten.view.default and list(rest[0]) in ([-1], [first.numel()], list(first.shape)):
            # Flat for FSDP2, which keeps it beside a shard and, as the shard has hooks, never reads it.
            return first.with_parts(first.qdata.view(rest[0]), first.scale)
        raise NotImplementedError(
            f"{func} of a weight that is stored in {first.format.name if isinstance(first, cls) else 'a format'}: "
            "dequantize it first (StoredWeight.dequantized)"
        )

    # ---- FSDP2

    def operand_to_gather(self, mesh: DeviceMesh, dtype: torch.dtype) -> Operand:
        return Operand(self.qdata, self.scale)


def _copy(target: Tensor, source: Tensor) -> Tensor:
    if not isinstance(target, StoredWeight):
        assert isinstance(source, StoredWeight)
        return target.copy_(source.dequantized())
    if isinstance(source, StoredWeight):
        target.qdata.copy_(source.qdata)
        target.scale.copy_(source.scale)
    else:
        target.write(source.to(target.device))
    return target


def _sizes(weight: StoredWeight, size: list[int]) -> list[tuple[list[int], Tensor]]:
    return [([*size], weight.qdata), ([size[0], 1], weight.scale)]


# ---- parameters, which may be DTensors


def stored_weight(tensor: Tensor) -> StoredWeight | None:
    """Return the local part of a parameter if it is stored quantized; None if it is not."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local if isinstance(local, StoredWeight) else None


def stored_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the data and the scales, (rows, 1), of a parameter that is stored quantized, as plain tensors on the same
    memory, or as DTensors of them."""
    weight = stored_weight(tensor)
    assert weight is not None
    return beside(tensor, weight.qdata, tensor.shape[-1]), beside(tensor, weight.scale, 1)


def beside(tensor: Tensor, local: Tensor, columns: int) -> Tensor:
    """Return ``local``, which has so many ``columns``, sharded like the matrix ``tensor``: whole rows of one column are
    on all ranks that have a part of the row."""
    if not isinstance(tensor, DTensor):
        return local
    placements: list[Placement] = [
        Replicate() if columns == 1 and getattr(placement, "dim", 0) == 1 else placement
        for placement in tensor.placements
    ]
    shape = torch.Size((tensor.shape[0], columns))
    return DTensor.from_local(local, tensor.device_mesh, placements, run_check=False, shape=shape, stride=(columns, 1))


def joined(tensor: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """Return a parameter like ``tensor``, which is stored quantized, made of what :func:`stored_parts` returned."""
    weight = stored_weight(tensor)
    assert weight is not None
    parts = (part._local_tensor if isinstance(part, DTensor) else part for part in (data, scale))
    return beside(tensor, weight.with_parts(*parts), tensor.shape[-1])


@contextmanager
def overwritten(tensor: Tensor) -> Iterator[Tensor]:
    """Yield this process's part of a parameter, to be overwritten as a whole. One that is stored quantized is a float32
    tensor without values, which is then stored, rounded to nearest."""
    weight = stored_weight(tensor)
    if weight is None:
        data = tensor.detach()
        yield data.to_local() if isinstance(data, DTensor) else data
        return
    values = torch.empty(weight.shape, device=weight.device)
    yield values
    weight.write(values)

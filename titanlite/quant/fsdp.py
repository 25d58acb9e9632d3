"""FSDP2's all-gather in a number format: weights travel as one byte per element.

Before sharding, a weight is wrapped in a :class:`ShardedWeight`. FSDP2 calls its ``fsdp_pre_all_gather`` and
``fsdp_post_all_gather``, the extension point for tensor subclasses. Once per optimizer step the shard is rounded to the
dtype that FSDP2 would have gathered, and quantized. The gathered weight is a :class:`QuantTensor`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from titanlite.quant.format import WEIGHT, Format, Operand
from titanlite.quant.gather import GathersQuantized
from titanlite.quant.reuse import optimizer_steps
from titanlite.quant.stored import StoredWeight, stored_weight
from titanlite.quant.tensor import QuantTensor

_aten = torch.ops.aten
_VIEWS = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.view.default,
    _aten.as_strided.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
}
_COPIES = {
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten._pin_memory.default,
}


class _Writes:
    """The number of writes to a storage, shared by its views. (``_version`` does not count the operations of a tensor
    subclass, which run below autograd.)"""

    def __init__(self) -> None:
        self.count = 0


class ShardedWeight(GathersQuantized, Tensor):
    """A high-precision weight, or a shard of one, that FSDP2 gathers in a number format. All other operations see the
    high-precision weight.

    Args:
        shard: the plain tensor, (rows, columns).
        format: the format of the layer.
        writes: the number of writes to the memory of ``shard``.
        tensor_parallel: the mesh over which tensor parallelism shards what has one scale: the weight, or its rows.
    """

    shard: Tensor
    format: Format
    writes: _Writes
    tensor_parallel: DeviceMesh | None
    sharded_over: DeviceMesh | None  # set when FSDP2 first gathers
    _amax: tuple[Any, Tensor] | None
    _quantized: tuple[Any, Operand] | None

    @staticmethod
    def __new__(
        cls,
        shard: Tensor,
        format: Format,
        writes: _Writes | None = None,
        tensor_parallel: DeviceMesh | None = None,
    ) -> ShardedWeight:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            shard.shape,
            strides=shard.stride(),
            storage_offset=shard.storage_offset(),
            dtype=shard.dtype,
            device=shard.device,
        )
        self.shard, self.format, self.writes = shard, format, writes or _Writes()
        self.tensor_parallel, self.sharded_over = tensor_parallel, None
        self._amax = self._quantized = None
        return self  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["shard"], (self.format, self.tensor_parallel)

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], context: Any, size: Any, stride: Any) -> ShardedWeight:
        format, tensor_parallel = context
        return ShardedWeight(tensors["shard"], format, None, tensor_parallel)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedWeight({self.shard})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        weights: list[ShardedWeight] = []

        def unwrap(weight: ShardedWeight) -> Tensor:
            weights.append(weight)
            return weight.shard

        args, kwargs = tree_map_only(ShardedWeight, unwrap, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            for weight in weights:
                weight.writes.count += 1
        if func not in _VIEWS and func not in _COPIES:
            return out
        first = weights[0]
        writes = first.writes if func in _VIEWS else None
        return tree_map_only(Tensor, lambda t: ShardedWeight(t, first.format, writes, first.tensor_parallel), out)

    # ---- FSDP2

    @property
    def _state(self) -> tuple[int, ...]:
        # The optimizer steps are part of the state because all ranks must recompute their amaxes, an all-reduce, at the
        # same time. Writes alone may differ between ranks where a shard is empty.
        return self.writes.count, self.shard._version, optimizer_steps()

    @property
    def scale_amax(self) -> Tensor:
        """The amax of the whole weight, float32, (), all-reduced over the shards."""
        if self._amax is None or self._amax[0] != self._state:
            assert self.sharded_over is not None
            amax = self._format().amaxes(self.shard, (WEIGHT,))[WEIGHT]
            for mesh in (self.sharded_over, self.tensor_parallel):
                if mesh is not None:
                    dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=mesh.get_group())
            self._amax = self._state, amax
        return self._amax[1]

    def _format(self) -> Format:
        return self.format.on(self.shard.device).eager()

    def _amax_of_rows(self) -> Tensor | None:
        """Return the amaxes of the whole rows where tensor parallelism splits them and the format has to agree; None:
        those of the shard."""
        if self.tensor_parallel is None or not self.format.agrees(WEIGHT, 1):
            return None
        amax = self.format.amax(self.shard, "weight")
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.tensor_parallel.get_group())
        return amax

    def quantized(self, dtype: torch.dtype) -> Operand:
        """Return the shard rounded to ``dtype`` and cast; cached until the weight changes."""
        state = (*self._state, dtype)
        if self._quantized is None or self._quantized[0] != state:
            amax = self._amax_of_rows() if self.format.has_scales_of_rows("weight") else self.scale_amax
            self._quantized = state, self._format().cast_to_gather(self.shard, dtype, amax)
        return self._quantized[1]

    def operand_to_gather(self, mesh: DeviceMesh, dtype: torch.dtype) -> Operand:
        self.sharded_over = mesh
        return self.quantized(dtype)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """Return ``local``, wrapped in a DTensor like ``tensor`` if that is one."""
    if not isinstance(tensor, DTensor):
        return local
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def plain(tensor: Tensor) -> Tensor:
    """Return ``tensor`` detached and unwrapped, on the same memory, as for a state dict. Writes to it change the
    version of the original, also for a DTensor (after its own ``detach`` they would not). A weight that is stored
    quantized is dequantized, to memory of its own."""
    local = _local(tensor)
    if (stored := stored_weight(tensor)) is not None:
        return _with_local(tensor, stored.dequantized().to(stored.dtype))
    return _with_local(tensor, (local.shard if isinstance(local, ShardedWeight) else local).detach())


def shard_with_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the part of ``tensor`` that this process holds, without gradients, and its offset in the whole tensor."""
    data = tensor.detach()
    if not isinstance(data, DTensor):
        return data, (0,) * data.dim()
    with _disable_current_modes():  # it computes with tensors, of which an estimate has no values
        shape, offset = compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements)
    local = data.to_local()
    assert local.shape == tuple(shape), (local.shape, shape)
    return local, tuple(offset)


def wrapped_for_gather(param: nn.Parameter, format: Format, *, tensor_parallel: bool = False) -> nn.Parameter:
    """Return ``param`` wrapped so that FSDP2 gathers it in the format; stored in it if the format stores weights. A
    parameter that is wrapped or gathered already is returned unchanged.

    Args:
        tensor_parallel: ``param`` comes from a style of tensor parallelism: if its placement is a Shard, the ranks of
            its mesh share one scale, or those of the rows that it splits.
    """
    local = _local(param)
    sharded = tensor_parallel and isinstance(param, DTensor) and isinstance(param.placements[0], Shard)
    if not isinstance(local, (ShardedWeight, StoredWeight, QuantTensor)):
        from titanlite.quant.gathered_casts import use_cast_in_backward  # loads the compiler

        use_cast_in_backward()  # for what may be compiled later
        if format.stores_weights:
            split = sharded and param.placements[0] == Shard(1)  # type: ignore[attr-defined]
            local = StoredWeight.of(local, format, param.device_mesh if split else None)  # type: ignore[attr-defined]
        else:
            local = ShardedWeight(local.detach(), format)
        param = nn.Parameter(_with_local(param, local), requires_grad=param.requires_grad)
        local = _local(param)
    by_rows = format.has_scales_of_rows("weight") if isinstance(local, ShardedWeight) else False
    if sharded and isinstance(local, ShardedWeight) and (not by_rows or param.placements[0] == Shard(1)):  # type: ignore[attr-defined]
        local.tensor_parallel = param.device_mesh  # type: ignore[attr-defined]
    return param


@torch.no_grad()
def precompute_scales(module: nn.Module) -> None:
    """Compute the amaxes of all weights that are gathered in a number format at once: for scales of whole weights with
    one all-reduce (under tensor parallelism two) instead of one per weight; scales of rows need none. Call it after the
    optimizer step. It changes no result.

    Args:
        module: a model sharded by ``fully_shard``.
    """
    by_groups: defaultdict[Any, list[ShardedWeight]] = defaultdict(list)
    for param in module.parameters():
        weight = _local(param)
        if not isinstance(weight, ShardedWeight) or weight.sharded_over is None:
            continue
        if not weight.format.has_scales_of_rows("weight"):
            meshes = (weight.sharded_over, weight.tensor_parallel)
            by_groups[tuple(mesh.get_group() for mesh in meshes if mesh is not None)].append(weight)
    for groups, weights in by_groups.items():
        # With fewer rows than shards, some shards are empty and have no norm.
        shards = [w.shard if w.shard.numel() else w.shard.new_zeros(1) for w in weights]
        amaxes = torch.stack(torch._foreach_norm(shards, torch.inf)).float()
        for group in groups:
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
        for weight, amax in zip(weights, amaxes.unbind(), strict=True):
            weight._amax = weight._state, amax

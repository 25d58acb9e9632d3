"""The forward of layers whose parameters or inputs are DTensors, on one mesh of tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from titanlite.quant.agreement import Shards
from titanlite.quant.format import Format, Operand, OperandName
from titanlite.quant.operands import autocast
from titanlite.quant.reuse import share_casts
from titanlite.quant.tensor import QuantTensor

COLUMN: dict[OperandName, int] = {"weight": 0, "grad_output": 1}
"""The operands of a column-parallel layer, which has a part of the output features, and how they are split."""
ROW: dict[OperandName, int] = {"weight": 1, "input": 1}
"""The same of a row-parallel layer, which has a part of the input features."""
TOKENS: dict[OperandName, int] = {"input": 0, "grad_output": 0}
"""The same of a layer whose weight is whole, for a part of the tokens."""


class Sharding(Protocol):
    """The forward of a layer whose parameters or input are shared by ranks."""

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        """Return the output of ``layer``, a QuantLinear, for ``input``."""


# The operators are used directly: the names of their Python wrappers changed in torch 2.13.
_c10d = torch.ops._c10d_functional


def _all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Start to gather ``x`` of all ranks along ``dim``; :func:`_joined` waits for the result."""
    return _c10d.all_gather_into_tensor(x.contiguous(), size, group)


def _joined(gathered: Tensor, dim: int, size: int) -> Tensor:
    """Return the result of :func:`_all_gather`, joined along ``dim``. It arrives joined along the first dimension;
    moving that takes a copy, except for ``dim`` 0 or a batch of one."""
    whole = _c10d.wait_tensor(gathered)
    return whole.unflatten(0, (size, whole.shape[0] // size)).movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Return this rank's share, along ``dim``, of the sum of ``x`` over the ranks."""
    if x.shape[dim] % size:
        raise ValueError(f"tensor parallelism: dimension {dim} of {tuple(x.shape)} cannot be shared by {size} ranks")
    by_rank = x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0).flatten(0, 1)
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(by_rank.contiguous(), "sum", size, group))


def _gather_quantized(
    x: Tensor, dim: int, size: int, group: str, format: Format, operand: OperandName
) -> tuple[Tensor, Tensor]:
    """Gather ``x``, which is sharded along ``dim``, in the format; return its data and scales."""
    amax = format.amax(x, operand)
    if not amax.ndim:
        amax = _c10d.wait_tensor(_c10d.all_reduce(amax, "max", group))
    local, scale = format.quantize(x, amax, operand)
    assert scale is not None
    # As uint8, which every backend can send. One gather after the other: a GPU would queue them anyway, and gloo (torch
    # 2.13) has crashed with two at a time in one group.
    data = _joined(_all_gather(local.view(torch.uint8), dim, size, group), dim, size).view(local.dtype)
    if scale.ndim:
        scale = _joined(_all_gather(scale, dim, size, group), dim, size)
    return data, scale


# Otherwise the compiler would trace the backward with a QuantTensor as gradient, because the output is one.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
class _GatherInput(torch.autograd.Function):
    """An all-gather in the format, whose backward reduce-scatters the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str, format: Format) -> Tensor:
        ctx.scatter_args = dim, size, group
        return QuantTensor(*_gather_quantized(x, dim, size, group, format, "input"), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(grad, *ctx.scatter_args), *[None] * 4


def gathered_input(x: Tensor, layout: Shard, layer: Any, mesh: DeviceMesh) -> Tensor:
    """Gather ``x``, which is sharded by ``layout`` over ``mesh``: in the format of ``layer``, or if the format does not
    allow it, as a replicated DTensor."""
    dim = _token_dim(layout, x)
    if isinstance(x, DTensor):
        if x.shape[dim] % mesh.size():
            raise ValueError(f"tensor parallelism: dimension {dim} of {tuple(x.shape)} is not sharded evenly")
        x = x.to_local()
    x = autocast(x)
    if layer.in_high_precision or not layer.format.travels("input"):
        return DTensor.from_local(x, mesh, (Shard(dim),), run_check=False).redistribute(mesh, (Replicate(),))
    whole: Tensor = _GatherInput.apply(x, dim, mesh.size(), mesh.get_group().group_name, layer.format)
    return share_casts(whole)  # nobody can write to a QuantTensor


def _token_dim(layout: Shard, x: Tensor) -> int:
    dim = layout.dim % x.ndim
    if dim == x.ndim - 1:
        raise ValueError(
            f"tensor parallelism: {layout} of a tensor of shape {tuple(x.shape)} shards its features; must be another "
            "dimension, such as Shard(1)"
        )
    return dim


@dataclass(frozen=True)
class Summation:
    """The sum of the partial outputs of a row-parallel layer; each rank gets all of it, or its share."""

    layout: Placement
    format: Format
    size: int
    group: str

    def sum(self, output: Tensor) -> Tensor:
        if not isinstance(self.layout, Shard):
            return _c10d.wait_tensor(_c10d.all_reduce(output, "sum", self.group))
        return _reduce_scatter(output, _token_dim(self.layout, output), self.size, self.group)

    def whole(self, grad: Tensor) -> Tensor | Operand:
        if not isinstance(self.layout, Shard):
            return grad
        dim = _token_dim(self.layout, grad)
        if not self.format.travels("grad_output"):
            return _joined(_all_gather(grad, dim, self.size, self.group), dim, self.size)
        data, scale = _gather_quantized(grad, dim, self.size, self.group, self.format, "grad_output")
        return Operand(data.flatten(0, -2), scale.flatten(0, -2) if scale.ndim else scale)


@dataclass(frozen=True)
class ColumnSharding:
    """The forward of a layer whose output features are sharded."""

    input_layout: Placement
    output_layout: Placement
    use_local_output: bool

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        assert isinstance(layer.weight, DTensor)
        mesh, x = layer.weight.device_mesh, input
        layout = x.placements[0] if isinstance(x, DTensor) else self.input_layout
        if isinstance(x, QuantTensor):
            pass  # PrepareQuantInput gathered it
        elif isinstance(layout, Shard):
            x = gathered_input(x, layout, layer, mesh)
        elif not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, (Replicate(),), run_check=False)
        if isinstance(x, DTensor):
            if x.placements != (Replicate(),):
                x = x.redistribute(mesh, (Replicate(),))
            # Each rank has the gradient of only its output features. Whoever made the DTensor sums them, once for all
            # layers that take it.
            x = x.to_local(grad_placements=(Partial(),))
        out = layer.multiply(x, shards=Shards(mesh.get_group().group_name, COLUMN))
        if layer.bias is not None:
            assert isinstance(layer.bias, DTensor)
            out = out + layer.bias.to_local().to(out.dtype)
        if self.use_local_output and self.output_layout == Shard(-1):
            return out
        whole = DTensor.from_local(out, mesh, (Shard(-1),), run_check=False)
        if self.output_layout != Shard(-1):
            whole = whole.redistribute(mesh, (self.output_layout,))
        return whole.to_local() if self.use_local_output else whole


@dataclass(frozen=True)
class RowSharding:
    """The forward of a layer whose input features are sharded. Without ``ranks``, the output is a DTensor of partial
    sums."""

    ranks: Summation | None
    use_local_output: bool

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        assert isinstance(layer.weight, DTensor)
        mesh = layer.weight.device_mesh
        x = input.redistribute(mesh, (Shard(-1),)).to_local() if isinstance(input, DTensor) else input
        out = layer.multiply(x, self.ranks, Shards(mesh.get_group().group_name, ROW))
        if self.ranks is None:
            partial = DTensor.from_local(out, mesh, (Partial(),), run_check=False)
            return partial if layer.bias is None else partial + layer.bias.to(out.dtype)
        layout = self.ranks.layout
        if layer.bias is not None:
            assert isinstance(layer.bias, DTensor)
            if isinstance(layout, Shard):
                # Each rank adds the bias to its share of the tokens, so the gradient is the sum over the ranks. The
                # backward of redistribute computes it (its forward does nothing).
                bias = layer.bias.redistribute(mesh, (Replicate(),)).to_local(grad_placements=(Partial(),))
            else:
                bias = layer.bias.to_local()
            out = out + bias.to(out.dtype)
        return out if self.use_local_output else DTensor.from_local(out, mesh, (layout,), run_check=False)


@dataclass(frozen=True)
class TokenSharding:
    """The forward of a layer whose parameters are whole on every rank, for an input whose tokens may be sharded."""

    def __call__(self, layer: Any, input: DTensor) -> Tensor:
        mesh, (layout,) = layer.weight.device_mesh, input.placements
        if not isinstance(layout, Shard) or layout.dim % input.ndim == input.ndim - 1:
            layout = Replicate()
            input = input.redistribute(mesh, (layout,))
        shards = None if layout == Replicate() else Shards(mesh.get_group().group_name, TOKENS)
        out = layer.multiply(input.to_local(), shards=shards)
        if layer.bias is not None:
            out = out + layer.bias.to_local(grad_placements=_of_parameters(shards)).to(out.dtype)
        # The shape is stated because shards of tokens may be uneven.
        shape = torch.Size((*input.shape[:-1], out.shape[-1]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(out, mesh, (layout,), run_check=False, shape=shape, stride=stride)


def _of_parameters(shards: Shards | None) -> tuple[Placement] | None:
    return None if shards is None else (Partial(),)


def local_part(weight: Tensor, shards: Shards | None) -> Tensor:
    """Return this rank's part of ``weight``. If ranks have parts of the tokens, its gradient is the sum over them."""
    if not isinstance(weight, DTensor):
        return weight
    whole = shards is not None and "weight" not in shards.dims
    return weight.to_local(grad_placements=_of_parameters(shards) if whole else None)


_OF_PLACEMENTS: dict[Placement, Any] = {
    Shard(0): ColumnSharding(Replicate(), Shard(-1), use_local_output=False),
    Shard(1): RowSharding(None, use_local_output=False),
    Replicate(): TokenSharding(),
}


def sharding_of(layer: Any, input: Tensor) -> Sharding | None:
    """Return the forward of ``layer`` that the placements of its weight imply: those of torch's ColwiseParallel,
    RowwiseParallel and SequenceParallel. None if neither weight nor input is a DTensor.

    Raises:
        TypeError: only one of them is a DTensor.
        ValueError: the weight has another layout, or its parts are too small.
    """
    weight = layer._parameters.get("weight")
    if not isinstance(weight, DTensor) and not isinstance(input, DTensor):
        return None
    name = type(layer).__name__
    if not isinstance(weight, DTensor) or not isinstance(input, DTensor):
        kinds = ("a DTensor" if isinstance(t, DTensor) else "a plain tensor" for t in (weight, input))
        raise TypeError("{}: its weight is {}, its input {}; parallelize the layer by a style".format(name, *kinds))
    sharding: Sharding | None = _OF_PLACEMENTS.get(weight.placements[0]) if weight.device_mesh.ndim == 1 else None
    if sharding is None:
        raise ValueError(
            f"{name}: its weight has placements {weight.placements}; must be Shard(0), Shard(1), Replicate()"
        )
    rows, columns = weight.to_local().shape
    if reason := layer.format.why_not(columns, rows):
        raise ValueError(
            f"{name}: this rank's part of the weight is {rows} x {columns}: {reason}; leave the layer in high precision"
        )
    return sharding

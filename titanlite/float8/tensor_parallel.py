"""Tensor and sequence parallelism for float8 layers, communicating float8 where the recipe allows.

The styles of ``torch.distributed.tensor.parallel`` for ``parallelize_module``, with ``Float8`` in their names. What is
gathered before a matmul travels in float8: the input of column-parallel layers, and the gradient of row-parallel ones.
What is summed travels in high precision. One tensor scale is agreed by all ranks with an all-reduce of one number;
scales of rows need none, as the rows are whole on their rank, and are gathered with them. Where the matmul that
computes grad_weight wants the operand in high precision (``rowwise_with_gw_hp``), or its scale is not dynamic, it is
gathered in high precision.

A sharded weight has the scale of its shard, and so has what is sharded like it (the gradient of column-parallel layers,
the input of row-parallel ones): that needs no communication and is more exact than one scale for all.

Parallelize all blocks with one and the same mesh object: torch.compile lets them share their code only then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle

from titanlite.float8.config import CastConfig, Float8LinearConfig, ScalingType
from titanlite.float8.fsdp import plain
from titanlite.float8.linear import Float8Linear
from titanlite.float8.matmul import Operand
from titanlite.float8.numerics import amax_of, amax_to_scale, quantize
from titanlite.float8.tensor import Float8Tensor

# The operators themselves: their names last, while those of the functions around them changed in torch 2.13.
_c10d = torch.ops._c10d_functional


def _all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """``x`` of all ranks along ``dim``; the caller waits for it with :func:`_joined`."""
    return _c10d.all_gather_into_tensor(x.contiguous(), size, group)


def _joined(gathered: Tensor, dim: int, size: int) -> Tensor:
    """What :func:`_all_gather` returned, in the order of ``dim``. The ranks come one after the other in the first
    dimension; to move them takes a copy, except for ``dim`` 0 and for a batch of one."""
    whole = _c10d.wait_tensor(gathered)
    return whole.unflatten(0, (size, whole.shape[0] // size)).movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """This rank's share, along ``dim``, of the sum of all ranks' ``x``."""
    if x.shape[dim] % size:
        raise ValueError(f"tensor parallelism: dimension {dim} of {tuple(x.shape)} cannot be shared by {size} ranks")
    by_rank = x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0).flatten(0, 1)
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(by_rank.contiguous(), "sum", size, group))


def _gather_float8(
    x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype, axiswise: bool, power_of_2: bool
) -> tuple[Tensor, Tensor]:
    """``x``, sharded along ``dim``, whole and in float8 on every rank: its data and scales."""
    amax = amax_of(x, -1 if axiswise else None).float()
    if not axiswise:
        amax = _c10d.wait_tensor(_c10d.all_reduce(amax, "max", group))
    scale = amax_to_scale(amax, dtype, power_of_2)
    # As uint8, which every backend can send. One after the other: on a GPU they queue up anyway, and gloo (torch 2.13)
    # has crashed with two of one group under way.
    data = _joined(_all_gather(quantize(x, scale, dtype).view(torch.uint8), dim, size, group), dim, size).view(dtype)
    if axiswise:
        scale = _joined(_all_gather(scale, dim, size, group), dim, size)
    return data, scale


# The compiler would trace the backward with a Float8Tensor for a gradient, taking it to be like the output.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
class _GatherInput(torch.autograd.Function):
    """Forward gathers in float8; backward sums the gradients of all ranks and keeps this rank's share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str, *how: Any) -> Tensor:
        ctx.where = dim, size, group
        return Float8Tensor(*_gather_float8(x, dim, size, group, *how), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(grad, *ctx.where), *[None] * 6


def _float8(config: Float8LinearConfig, operand: str) -> tuple[torch.dtype, bool, bool] | None:
    """How an operand is gathered in float8; None where it cannot be, as one of its two matmuls does not use those
    bytes."""
    own: CastConfig = getattr(config, f"cast_config_{operand}")
    other: CastConfig = getattr(config, f"cast_config_{operand}_for_grad_weight")
    if own.scaling_type is not ScalingType.DYNAMIC or other.scaling_type is not ScalingType.DYNAMIC:
        return None
    return own.dtype, own.is_axiswise, config.round_scales_to_power_of_2


def _gathered_input(x: Tensor, layout: Shard, layer: Float8Linear, mesh: DeviceMesh) -> Tensor:
    """``x``, sharded by ``layout`` over ``mesh``, whole: in float8, or where ``layer`` does not allow that, as a
    replicated DTensor."""
    dim = _token_dim(layout, x)
    if isinstance(x, DTensor):
        if x.shape[dim] % mesh.size():
            raise ValueError(f"tensor parallelism: dimension {dim} of {tuple(x.shape)} is not sharded evenly")
        x = x.to_local()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    how = None if layer.in_high_precision else _float8(layer.config, "input")
    if how is None:
        return DTensor.from_local(x, mesh, (Shard(dim),), run_check=False).redistribute(mesh, (Replicate(),))
    whole: Tensor = _GatherInput.apply(x, dim, mesh.size(), mesh.get_group().group_name, *how)
    return whole


def _token_dim(layout: Shard, x: Tensor) -> int:
    dim = layout.dim % x.ndim
    if dim == x.ndim - 1:
        raise ValueError(
            f"tensor parallelism: {layout} of a tensor of shape {tuple(x.shape)} shards its features; must be another "
            "dimension"
        )
    return dim


@dataclass(frozen=True)
class _Summation:
    """What row-parallel ranks do with their partial outputs: sum them, and take a share of that or the whole."""

    layout: Placement
    config: Float8LinearConfig
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
        how = _float8(self.config, "grad_output")
        if how is None:
            return _joined(_all_gather(grad, dim, self.size, self.group), dim, self.size)
        data, scale = _gather_float8(grad, dim, self.size, self.group, *how)
        return Operand(data.flatten(0, -2), scale.flatten(0, -2) if scale.ndim else scale)


def _float8_linear(style: ParallelStyle, module: nn.Module) -> Float8Linear:
    if not isinstance(module, Float8Linear):
        name = type(style).__name__
        raise ValueError(
            f"{name} on a {type(module).__name__}: is for Float8Linear; convert the layer, or use "
            f"{name.replace('Float8', '')}"
        )
    return module


def _shard(style: ParallelStyle, layer: Float8Linear, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter by its shard, a DTensor; the layer prepares a new weight for FSDP2 by itself."""
    param = getattr(layer, name)
    if isinstance(placement, Shard) and param.shape[placement.dim] % (16 * mesh.size()):
        raise ValueError(
            f"{type(style).__name__}: {name} of shape {tuple(param.shape)}, dimension {placement.dim} over "
            f"{mesh.size()} ranks: float8 matmuls need a multiple of 16 on each; leave this layer in high precision"
        )
    sharded = distribute_tensor(plain(param), mesh, (placement,), src_data_rank=style.src_data_rank)
    setattr(layer, name, nn.Parameter(sharded, requires_grad=param.requires_grad))


class Float8ColwiseParallel(ParallelStyle):
    """Shards a layer's output features.

    Args:
        input_layouts: of a plain input: ``Replicate()``, or ``Shard(dim)`` of another dimension than the last: gathered
            along it, in float8. A DTensor says so itself.
        output_layouts: ``Shard(-1)``, or ``Replicate()``: gathered in high precision.
        use_local_output: return a plain tensor, else a DTensor.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layout = input_layouts or Replicate()
        self.output_layout = output_layouts or Shard(-1)
        self.use_local_output = use_local_output
        if self.output_layout not in (Shard(-1), Replicate()):
            raise ValueError(
                f"Float8ColwiseParallel(output_layouts={output_layouts}): must be Shard(-1) or Replicate()"
            )
        if self.input_layout != Replicate() and not isinstance(self.input_layout, Shard):
            raise ValueError(f"Float8ColwiseParallel(input_layouts={input_layouts}): must be Replicate() or Shard(dim)")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _float8_linear(self, module)
        _shard(self, layer, "weight", device_mesh, Shard(0))
        if layer.bias is not None:
            _shard(self, layer, "bias", device_mesh, Shard(0))
        layer.__class__ = _ColumnParallelLinear  # type: ignore[assignment]
        assert isinstance(layer, _ColumnParallelLinear)
        layer.style = self
        return layer


class _ColumnParallelLinear(Float8Linear):
    # The class of a layer is replaced, not its forward: compiled code would not be shared by blocks whose layers have
    # each a forward of their own.
    style: Float8ColwiseParallel

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.weight, DTensor)
        mesh, style, x = self.weight.device_mesh, self.style, input
        layout = x.placements[0] if isinstance(x, DTensor) else style.input_layout
        if isinstance(x, Float8Tensor):
            pass  # PrepareFloat8ModuleInput gathered it
        elif isinstance(layout, Shard):
            x = _gathered_input(x, layout, self, mesh)
        elif not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, (Replicate(),), run_check=False)
        if isinstance(x, DTensor):
            if x.placements != (Replicate(),):
                x = x.redistribute(mesh, (Replicate(),))
            # Each rank has the gradient of its output features alone. Whoever made the DTensor sums them, once for all
            # layers that take it.
            x = x.to_local(grad_placements=(Partial(),))
        out = self.multiply(x)
        if self.bias is not None:
            assert isinstance(self.bias, DTensor)
            out = out + self.bias.to_local().to(out.dtype)
        if style.use_local_output and style.output_layout == Shard(-1):
            return out
        whole = DTensor.from_local(out, mesh, (Shard(-1),), run_check=False)
        if style.output_layout != Shard(-1):
            whole = whole.redistribute(mesh, (style.output_layout,))
        return whole.to_local() if style.use_local_output else whole


class Float8RowwiseParallel(ParallelStyle):
    """Shards a layer's input features; the partial outputs are summed in high precision.

    Args:
        input_layouts: ``Shard(-1)``.
        output_layouts: ``Replicate()``, or ``Shard(dim)`` of another dimension than the last; the gradient is then
            gathered along it, in float8.
        use_local_output: return a plain tensor, else a DTensor.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.output_layout = output_layouts or Replicate()
        self.use_local_output = use_local_output
        if (input_layouts or Shard(-1)) != Shard(-1):
            raise ValueError(f"Float8RowwiseParallel(input_layouts={input_layouts}): can only be Shard(-1)")
        if self.output_layout != Replicate() and not isinstance(self.output_layout, Shard):
            raise ValueError(
                f"Float8RowwiseParallel(output_layouts={output_layouts}): must be Replicate() or Shard(dim)"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _float8_linear(self, module)
        _shard(self, layer, "weight", device_mesh, Shard(1))
        if layer.bias is not None:
            _shard(self, layer, "bias", device_mesh, Replicate())
        layer.__class__ = _RowParallelLinear  # type: ignore[assignment]
        assert isinstance(layer, _RowParallelLinear)
        layer.style = self
        layer.ranks = _Summation(
            self.output_layout, layer.config, device_mesh.size(), device_mesh.get_group().group_name
        )
        return layer


class _RowParallelLinear(Float8Linear):
    style: Float8RowwiseParallel
    ranks: _Summation

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.weight, DTensor)
        mesh, layout = self.weight.device_mesh, self.style.output_layout
        x = input.redistribute(mesh, (Shard(-1),)).to_local() if isinstance(input, DTensor) else input
        out = self.multiply(x, self.ranks)
        if self.bias is not None:
            assert isinstance(self.bias, DTensor)
            if isinstance(layout, Shard):
                # Each rank adds it to its share of the tokens: its gradient is the sum over the ranks, which
                # redistribute does in backward (in forward it finds nothing to do).
                bias = self.bias.redistribute(mesh, (Replicate(),)).to_local(grad_placements=(Partial(),))
            else:
                bias = self.bias.to_local()
            out = out + bias.to(out.dtype)
        return out if self.style.use_local_output else DTensor.from_local(out, mesh, (layout,), run_check=False)


class PrepareFloat8ModuleInput(ParallelStyle):
    """Gathers a module's input once, in float8, for all the float8 layers in it that take it.

    Args:
        input_layouts: of each positional argument; None leaves one alone.
        desired_input_layouts: what the module needs.
        use_local_output: give the module plain tensors instead of DTensors. What is gathered in float8 is neither.
        fwd_config_submodule_fqn: the layer whose casts to use; by default those of the layers in the module, which must
            agree.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | tuple[Placement | None, ...],
        desired_input_layouts: Placement | tuple[Placement | None, ...],
        use_local_output: bool = False,
        fwd_config_submodule_fqn: str | None = None,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts if isinstance(input_layouts, tuple) else (input_layouts,)
        desired = desired_input_layouts
        self.desired_layouts = desired if isinstance(desired, tuple) else (desired,)
        self.use_local_output = use_local_output
        self.layer_name = fwd_config_submodule_fqn
        if len(self.input_layouts) != len(self.desired_layouts):
            raise ValueError(
                f"PrepareFloat8ModuleInput: {len(self.input_layouts)} input_layouts, {len(self.desired_layouts)} "
                "desired_input_layouts: must be as many"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = self._layer(module)
        module.register_forward_pre_hook(lambda _, inputs: self._prepare(inputs, layer, device_mesh))
        return module

    def _layer(self, module: nn.Module) -> Float8Linear:
        """The one whose casts to use."""
        if self.layer_name is not None:
            return _float8_linear(self, module.get_submodule(self.layer_name))
        layers = [m for m in module.modules() if isinstance(m, Float8Linear)]
        if not layers:
            raise ValueError("PrepareFloat8ModuleInput: the module has no Float8Linear; use PrepareModuleInput")
        if any(_input_casts(layer.config) != _input_casts(layers[0].config) for layer in layers):
            raise ValueError(
                "PrepareFloat8ModuleInput: the float8 layers of the module cast their input differently; name the one "
                "to follow with fwd_config_submodule_fqn"
            )
        return layers[0]

    def _prepare(self, inputs: tuple[Any, ...], layer: Float8Linear, mesh: DeviceMesh) -> tuple[Any, ...]:
        if len(inputs) != len(self.input_layouts):
            raise ValueError(
                f"PrepareFloat8ModuleInput: the module was given {len(inputs)} positional arguments, input_layouts "
                f"has {len(self.input_layouts)}; give a None for each argument to leave alone"
            )
        return tuple(
            x if layout is None or desired is None else self._prepared(x, layout, desired, layer, mesh)
            for x, layout, desired in zip(inputs, self.input_layouts, self.desired_layouts, strict=True)
        )

    def _prepared(
        self, x: Tensor, layout: Placement, desired: Placement, layer: Float8Linear, mesh: DeviceMesh
    ) -> Tensor:
        layout = x.placements[0] if isinstance(x, DTensor) else layout
        if isinstance(layout, Shard) and desired == Replicate():
            x = _gathered_input(x, layout, layer, mesh)
        else:
            x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, (layout,), run_check=False)
            x = x.redistribute(mesh, (desired,))
        return x.to_local() if self.use_local_output and isinstance(x, DTensor) else x


def _input_casts(config: Float8LinearConfig) -> tuple[Any, ...]:
    return config.cast_config_input, config.cast_config_input_for_grad_weight, config.round_scales_to_power_of_2

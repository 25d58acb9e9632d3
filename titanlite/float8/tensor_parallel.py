"""Tensor and sequence parallelism for float8 layers, communicating float8 where the recipe allows.

The styles of ``torch.distributed.tensor.parallel`` with the same names and arguments. What is gathered before a matmul
travels in float8: the input of column-parallel layers, and the gradient of row-parallel ones. What is summed travels in
high precision. One tensor scale is agreed by all ranks with an all-reduce of one number; scales of rows need none, as
the rows are whole on their rank. Where the matmul that computes grad_weight wants the operand in high precision
(``rowwise_with_gw_hp``), or its scale is not dynamic, it is gathered in high precision.

A sharded weight has the scale of its shard: that needs no communication and is more exact than one scale for all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel.style import ParallelStyle

from titanlite.float8.config import CastConfig, ScalingType
from titanlite.float8.fsdp import ShardedWeight
from titanlite.float8.linear import Float8Linear
from titanlite.float8.numerics import amax_of, amax_to_scale, quantize
from titanlite.float8.tensor import Float8Tensor


def _travels(config: CastConfig, for_grad_weight: CastConfig) -> bool:
    """Whether an operand can be gathered in float8: both of its matmuls then use those bytes."""
    return config.scaling_type is ScalingType.DYNAMIC and for_grad_weight.scaling_type is ScalingType.DYNAMIC


def _gather(x: Tensor, config: CastConfig, power_of_2: bool, mesh: DeviceMesh, dim: int) -> Float8Tensor:
    """``x``, sharded along ``dim``, whole and in float8 on every rank."""
    group = mesh.get_group()
    amax = amax_of(x, -1 if config.is_axiswise else None).float()
    if not config.is_axiswise:
        amax = funcol.all_reduce(amax, "max", group)
    scale = amax_to_scale(amax, config.dtype, power_of_2)
    data = funcol.all_gather_tensor(quantize(x, scale, config.dtype).view(torch.uint8), dim, group)
    if config.is_axiswise:
        scale = funcol.all_gather_tensor(scale, dim, group)
    return Float8Tensor(funcol.wait_tensor(data).view(config.dtype), funcol.wait_tensor(scale), x.dtype)


class _GatherInput(torch.autograd.Function):
    """Forward gathers in float8; backward sums the gradients of all ranks and keeps this rank's share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, config: CastConfig, power_of_2: bool, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        return _gather(x, config, power_of_2, mesh, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shard = funcol.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.dim, ctx.mesh.get_group())
        return funcol.wait_tensor(shard), None, None, None, None


class _ScatterOutput(torch.autograd.Function):
    """Forward sums over the ranks and keeps this rank's share; backward gathers the gradient in float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, config: CastConfig, power_of_2: bool, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.config, ctx.power_of_2, ctx.mesh, ctx.dim = config, power_of_2, mesh, dim
        return funcol.wait_tensor(funcol.reduce_scatter_tensor(x.contiguous(), "sum", dim, mesh.get_group()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, ctx.config, ctx.power_of_2, ctx.mesh, ctx.dim), None, None, None, None


def _gathered_input(x: Tensor, layer: Float8Linear, mesh: DeviceMesh, dim: int) -> Tensor:
    """``x``, sharded along ``dim`` over ``mesh``, as what ``layer`` takes: in float8, or where its recipe does not
    allow that, a replicated DTensor."""
    config = layer.config
    if _travels(config.cast_config_input, config.cast_config_input_for_grad_weight):
        rounded = config.round_scales_to_power_of_2
        whole: Tensor = _GatherInput.apply(x, config.cast_config_input, rounded, mesh, dim)
        return whole
    return DTensor.from_local(x, mesh, (Shard(dim),), run_check=False).redistribute(mesh, (Replicate(),))


def _as_local(x: Tensor, layout: Placement, mesh: DeviceMesh) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    if x.placements != (layout,):
        x = x.redistribute(mesh, (layout,))
    return x.to_local()


def _dim(layout: Placement, x: Tensor) -> int:
    assert isinstance(layout, Shard)
    return layout.dim % x.ndim


def _shard(layer: Float8Linear, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter by its shard, a DTensor; what wraps it for FSDP2 is put around the shard."""
    param = getattr(layer, name)
    wrapped = isinstance(param, ShardedWeight)
    sharded = torch.distributed.tensor.distribute_tensor(
        param.shard if wrapped else param.detach(), mesh, (placement,), src_data_rank=None
    )
    if wrapped:
        local = ShardedWeight(sharded.to_local(), layer.config)
        sharded = DTensor.from_local(
            local, mesh, (placement,), run_check=False, shape=sharded.shape, stride=sharded.stride()
        )
    setattr(layer, name, nn.Parameter(sharded, requires_grad=param.requires_grad))


def _bias(layer: Float8Linear, grad: Placement) -> Tensor:
    """This rank's part of the bias; ``grad`` says what its gradient is of the whole one's."""
    assert isinstance(layer.bias, DTensor)
    return layer.bias.to_local(grad_placements=(grad,))


def _check(style: ParallelStyle, module: nn.Module) -> Float8Linear:
    if not isinstance(module, Float8Linear):
        raise ValueError(
            f"{type(style).__name__} on a {type(module).__name__}: is for Float8Linear; convert the layer, or use "
            f"{type(style).__name__.removeprefix('Float8')}"
        )
    return module


class Float8ColwiseParallel(ParallelStyle):
    """Shards a layer's output features.

    Args:
        input_layouts: ``Replicate()``, or ``Shard(dim)`` of another dimension than the last: gathered along it, in
            float8.
        output_layouts: ``Shard(-1)``.
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
        self.use_local_output = use_local_output
        if (output_layouts or Shard(-1)) != Shard(-1):
            raise ValueError(f"Float8ColwiseParallel(output_layouts={output_layouts}): can only be Shard(-1)")
        if self.input_layout != Replicate() and not isinstance(self.input_layout, Shard):
            raise ValueError(f"Float8ColwiseParallel(input_layouts={input_layouts}): must be Replicate() or Shard(dim)")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _check(self, module)
        _shard(layer, "weight", device_mesh, Shard(0))
        if layer.bias is not None:
            _shard(layer, "bias", device_mesh, Shard(0))
        layer.forward = partial(self._forward, layer, device_mesh)  # type: ignore[method-assign]
        return layer

    def _forward(self, layer: Float8Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
        if not isinstance(x, Float8Tensor):
            if self.input_layout == Replicate():
                if not isinstance(x, DTensor):
                    x = DTensor.from_local(x, mesh, (Replicate(),), run_check=False)
            elif not (isinstance(x, DTensor) and x.placements == (Replicate(),)):
                x = _as_local(x, self.input_layout, mesh)
                x = _gathered_input(x, layer, mesh, _dim(self.input_layout, x))
        if isinstance(x, DTensor):  # each rank has the gradient of its output features alone: to be summed
            x = x.redistribute(mesh, (Replicate(),)).to_local(grad_placements=(Partial(),))
        out = layer.multiply(x)
        if layer.bias is not None:
            out = out + _bias(layer, Shard(0)).to(out.dtype)
        return out if self.use_local_output else DTensor.from_local(out, mesh, (Shard(-1),), run_check=False)


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
        layer = _check(self, module)
        _shard(layer, "weight", device_mesh, Shard(1))
        if layer.bias is not None:
            _shard(layer, "bias", device_mesh, Replicate())
        layer.forward = partial(self._forward, layer, device_mesh)  # type: ignore[method-assign]
        return layer

    def _forward(self, layer: Float8Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
        out = layer.multiply(_as_local(x, Shard(-1), mesh))
        config = layer.config
        layout = self.output_layout
        if isinstance(layout, Shard) and _travels(
            config.cast_config_grad_output, config.cast_config_grad_output_for_grad_weight
        ):
            rounded = config.round_scales_to_power_of_2
            out = _ScatterOutput.apply(out, config.cast_config_grad_output, rounded, mesh, _dim(layout, out))
        else:
            out = DTensor.from_local(out, mesh, (Partial(),), run_check=False).redistribute(mesh, (layout,)).to_local()
        if layer.bias is not None:
            # Each rank adds it to its share of the tokens: its gradient is the sum over the ranks.
            out = out + _bias(layer, Partial() if isinstance(layout, Shard) else Replicate()).to(out.dtype)
        return out if self.use_local_output else DTensor.from_local(out, mesh, (layout,), run_check=False)


class PrepareFloat8ModuleInput(ParallelStyle):
    """Gathers a module's input once, in float8, for all the float8 layers in it that take it.

    Args:
        input_layouts: of each positional argument; None leaves one alone.
        desired_input_layouts: what the module needs.
        use_local_output: accepted as in ``PrepareModuleInput``; what is gathered in float8 is no DTensor.
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
        if self.layer_name is not None:
            return _check(self, module.get_submodule(self.layer_name))
        layers = [m for m in module.modules() if isinstance(m, Float8Linear)]
        if not layers:
            raise ValueError("PrepareFloat8ModuleInput: the module has no Float8Linear; use PrepareModuleInput")
        if any(layer.config.cast_config_input != layers[0].config.cast_config_input for layer in layers):
            raise ValueError(
                "PrepareFloat8ModuleInput: the float8 layers of the module cast their input differently; name the one "
                "to follow with fwd_config_submodule_fqn"
            )
        return layers[0]

    def _prepare(self, inputs: tuple[Any, ...], layer: Float8Linear, mesh: DeviceMesh) -> tuple[Any, ...]:
        prepared = list(inputs)
        for i, (layout, desired) in enumerate(zip(self.input_layouts, self.desired_layouts, strict=True)):
            if layout is None or desired is None or layout == desired:
                continue
            x = _as_local(inputs[i], layout, mesh)
            if isinstance(layout, Shard) and desired == Replicate():
                prepared[i] = _gathered_input(x, layer, mesh, _dim(layout, x))
            else:
                prepared[i] = DTensor.from_local(x, mesh, (layout,), run_check=False).redistribute(mesh, (desired,))
        return tuple(prepared)

"""Tensor and sequence parallelism for layers in a number format, with gathers in the format where a recipe allows it.

The styles are for ``torch.distributed.tensor.parallel.parallelize_module``. Operands that are gathered before a matmul,
the input of column-parallel layers and the gradient of row-parallel ones, are gathered in the format. Sums are
communicated in high precision. For one scale of a whole tensor, the ranks all-reduce one number, the amax. Scales of
rows need no all-reduce, since each row is whole on its rank; they are gathered with the rows. An operand is gathered in
high precision if grad_weight is computed in high precision, or if its scale is not dynamic.

A sharded weight has the scales of its shard, and so have the operands that are sharded like it (the gradient of
column-parallel layers, the input of row-parallel ones). This needs no communication, and is more exact than one scale.

Parallelize all blocks with the same mesh object; only then can torch.compile share code between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle

from titanlite.quant.format import Format, Operand, OperandName
from titanlite.quant.fsdp import plain
from titanlite.quant.linear import QuantLinear, autocast, quant_layers
from titanlite.quant.tensor import QuantTensor

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


def _gathered_input(x: Tensor, layout: Shard, layer: QuantLinear, mesh: DeviceMesh) -> Tensor:
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
    return whole


def _token_dim(layout: Shard, x: Tensor) -> int:
    dim = layout.dim % x.ndim
    if dim == x.ndim - 1:
        raise ValueError(
            f"tensor parallelism: {layout} of a tensor of shape {tuple(x.shape)} shards its features; must be another "
            "dimension, such as Shard(1)"
        )
    return dim


@dataclass(frozen=True)
class _Summation:
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


def _quant_linear(style: ParallelStyle, module: nn.Module) -> QuantLinear:
    if not isinstance(module, QuantLinear):
        raise ValueError(
            f"{type(style).__name__} on a {type(module).__name__}: is for quantized layers; convert the layer, or "
            "use the style of torch.distributed.tensor.parallel"
        )
    return module


def _shard(style: ParallelStyle, layer: QuantLinear, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter by its shard, a DTensor. (Assigning a weight also wraps it for FSDP2.)"""
    param = getattr(layer, name)
    if isinstance(placement, Shard) and param.shape[placement.dim] % (layer.format.multiple * mesh.size()):
        raise ValueError(
            f"{type(style).__name__}: {name} of shape {tuple(param.shape)}, dimension {placement.dim} over "
            f"{mesh.size()} ranks: {layer.format.name} matmuls need a multiple of {layer.format.multiple} on each; "
            "leave this layer in high precision"
        )
    sharded = distribute_tensor(plain(param), mesh, (placement,), src_data_rank=style.src_data_rank)
    setattr(layer, name, nn.Parameter(sharded, requires_grad=param.requires_grad))


class QuantColwiseParallel(ParallelStyle):
    """A style that shards a layer's output features.

    Args:
        input_layouts: the layout of a plain input: ``Replicate()``, or ``Shard(dim)`` with any ``dim`` but the last;
            the input is then gathered along it, in the format. A DTensor has its own layout.
        output_layouts: ``Shard(-1)``, or ``Replicate()``: gathered in high precision.
        use_local_output: return a plain tensor; False: a DTensor.

    Raises:
        ValueError: another layout.
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
                f"{type(self).__name__}(output_layouts={output_layouts}): must be Shard(-1) or Replicate()"
            )
        if self.input_layout != Replicate() and not isinstance(self.input_layout, Shard):
            raise ValueError(f"{type(self).__name__}(input_layouts={input_layouts}): must be Replicate() or Shard(dim)")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _quant_linear(self, module)
        _shard(self, layer, "weight", device_mesh, Shard(0))
        if layer.bias is not None:
            _shard(self, layer, "bias", device_mesh, Shard(0))
        layer.sharding = _ColumnSharding(self.input_layout, self.output_layout, self.use_local_output)
        return layer


@dataclass(frozen=True)
class _ColumnSharding:
    """The forward of a layer whose output features are sharded."""

    input_layout: Placement
    output_layout: Placement
    use_local_output: bool

    def __call__(self, layer: QuantLinear, input: Tensor) -> Tensor:
        assert isinstance(layer.weight, DTensor)
        mesh, x = layer.weight.device_mesh, input
        layout = x.placements[0] if isinstance(x, DTensor) else self.input_layout
        if isinstance(x, QuantTensor):
            pass  # PrepareQuantInput gathered it
        elif isinstance(layout, Shard):
            x = _gathered_input(x, layout, layer, mesh)
        elif not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, (Replicate(),), run_check=False)
        if isinstance(x, DTensor):
            if x.placements != (Replicate(),):
                x = x.redistribute(mesh, (Replicate(),))
            # Each rank has the gradient of only its output features. Whoever made the DTensor sums them, once for all
            # layers that take it.
            x = x.to_local(grad_placements=(Partial(),))
        out = layer.multiply(x)
        if layer.bias is not None:
            assert isinstance(layer.bias, DTensor)
            out = out + layer.bias.to_local().to(out.dtype)
        if self.use_local_output and self.output_layout == Shard(-1):
            return out
        whole = DTensor.from_local(out, mesh, (Shard(-1),), run_check=False)
        if self.output_layout != Shard(-1):
            whole = whole.redistribute(mesh, (self.output_layout,))
        return whole.to_local() if self.use_local_output else whole


class QuantRowwiseParallel(ParallelStyle):
    """A style that shards a layer's input features. The partial outputs are summed in high precision.

    Args:
        input_layouts: ``Shard(-1)``.
        output_layouts: ``Replicate()``, or ``Shard(dim)`` with any ``dim`` but the last; the gradient is then gathered
            along it, in the format.
        use_local_output: return a plain tensor; False: a DTensor.

    Raises:
        ValueError: another layout.
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
            raise ValueError(f"{type(self).__name__}(input_layouts={input_layouts}): must be Shard(-1)")
        if self.output_layout != Replicate() and not isinstance(self.output_layout, Shard):
            raise ValueError(
                f"{type(self).__name__}(output_layouts={output_layouts}): must be Replicate() or Shard(dim)"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _quant_linear(self, module)
        _shard(self, layer, "weight", device_mesh, Shard(1))
        if layer.bias is not None:
            _shard(self, layer, "bias", device_mesh, Replicate())
        group = device_mesh.get_group().group_name
        ranks = _Summation(self.output_layout, layer.format, device_mesh.size(), group)
        layer.sharding = _RowSharding(ranks, self.use_local_output)
        return layer


@dataclass(frozen=True)
class _RowSharding:
    """The forward of a layer whose input features are sharded."""

    ranks: _Summation
    use_local_output: bool

    def __call__(self, layer: QuantLinear, input: Tensor) -> Tensor:
        assert isinstance(layer.weight, DTensor)
        mesh, layout = layer.weight.device_mesh, self.ranks.layout
        x = input.redistribute(mesh, (Shard(-1),)).to_local() if isinstance(input, DTensor) else input
        out = layer.multiply(x, self.ranks)
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


class PrepareQuantInput(ParallelStyle):
    """A style that gathers a module's input once, in the number format of the module's layers.

    Args:
        input_layouts: the layout of each positional argument; None leaves an argument unchanged.
        desired_input_layouts: the layout of each argument that the module needs.
        use_local_output: pass plain tensors to the module instead of DTensors. (An input gathered in the format is
            neither.)
        fwd_config_submodule_fqn: the name of the layer whose cast to use; None: all quantized layers of the module must
            cast their input in the same way.

    Raises:
        ValueError: the two arguments have different numbers of layouts.
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
                f"{type(self).__name__}: {len(self.input_layouts)} input_layouts, {len(self.desired_layouts)} "
                "desired_input_layouts: must be the same number"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = self._layer(module)
        module.register_forward_pre_hook(lambda _, inputs: self._prepare(inputs, layer, device_mesh))
        return module

    def _layer(self, module: nn.Module) -> QuantLinear:
        """Return the layer whose casts to use."""
        if self.layer_name is not None:
            return _quant_linear(self, module.get_submodule(self.layer_name))
        layers, name = quant_layers(module), type(self).__name__
        if not layers:
            raise ValueError(f"{name}: the module has no quantized layer; use PrepareModuleInput")
        if any(layer.format.input_key() != layers[0].format.input_key() for layer in layers):
            raise ValueError(
                f"{name}: the layers of the module cast their input differently; name the one to follow with "
                "fwd_config_submodule_fqn"
            )
        return layers[0]

    def _prepare(self, inputs: tuple[Any, ...], layer: QuantLinear, mesh: DeviceMesh) -> tuple[Any, ...]:
        if len(inputs) != len(self.input_layouts):
            raise ValueError(
                f"{type(self).__name__}: the module was given {len(inputs)} positional arguments, input_layouts "
                f"has {len(self.input_layouts)}; add a None for each argument to leave unchanged"
            )
        return tuple(
            x if layout is None or desired is None else self._prepared(x, layout, desired, layer, mesh)
            for x, layout, desired in zip(inputs, self.input_layouts, self.desired_layouts, strict=True)
        )

    def _prepared(
        self, x: Tensor, layout: Placement, desired: Placement, layer: QuantLinear, mesh: DeviceMesh
    ) -> Tensor:
        layout = x.placements[0] if isinstance(x, DTensor) else layout
        if isinstance(layout, Shard) and desired == Replicate():
            x = _gathered_input(x, layout, layer, mesh)
        else:
            x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, (layout,), run_check=False)
            x = x.redistribute(mesh, (desired,))
        return x.to_local() if self.use_local_output and isinstance(x, DTensor) else x

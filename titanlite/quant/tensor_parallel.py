"""Tensor and sequence parallelism for layers in a number format, with gathers in the format where a recipe allows it.

The styles are for ``torch.distributed.tensor.parallel.parallelize_module``. Operands that are gathered before a matmul,
the input of column-parallel layers and the gradient of row-parallel ones, are gathered in the format. Sums are
communicated in high precision. For one scale of a whole tensor, the ranks all-reduce one number, the amax. Scales of
rows need no all-reduce, since each row is whole on its rank; they are gathered with the rows. An operand is gathered in
high precision if grad_weight is computed in high precision, or if its scale is not dynamic.

Of a sharded weight each rank has a part, and so it has of the operands that are sharded like it (the gradient of
column-parallel layers, the input of row-parallel ones). For scales that are not powers of two, the ranks all-reduce the
amaxes of these parts (:mod:`titanlite.quant.agreement`), so that the result is that of one process.

Parallelize all blocks with the same mesh object; only then can torch.compile share code between them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle

from titanlite.quant.fsdp import plain
from titanlite.quant.linear import QuantLinear, quant_layers
from titanlite.quant.sharding import ColumnSharding, RowSharding, Summation, gathered_input


def _quant_linear(style: ParallelStyle, module: nn.Module) -> QuantLinear:
    if not isinstance(module, QuantLinear):
        raise ValueError(
            f"{type(style).__name__} on a {type(module).__name__}: is for quantized layers; convert the layer, or "
            "use the style of torch.distributed.tensor.parallel"
        )
    return module


def _shard(style: ParallelStyle, layer: QuantLinear, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter by its shard, a DTensor."""
    param = getattr(layer, name)
    if isinstance(placement, Shard) and param.shape[placement.dim] % (layer.format.multiple * mesh.size()):
        raise ValueError(
            f"{type(style).__name__}: {name} of shape {tuple(param.shape)}, dimension {placement.dim} over "
            f"{mesh.size()} ranks: {layer.format.name} matmuls need a multiple of {layer.format.multiple} on each; "
            "leave this layer in high precision"
        )
    sharded = distribute_tensor(plain(param), mesh, (placement,), src_data_rank=style.src_data_rank)
    layer.register_parameter(name, nn.Parameter(sharded, requires_grad=param.requires_grad))


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
        layer.sharding = ColumnSharding(self.input_layout, self.output_layout, self.use_local_output)
        return layer


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
        ranks = Summation(self.output_layout, layer.format, device_mesh.size(), group)
        layer.sharding = RowSharding(ranks, self.use_local_output)
        return layer


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
            x = gathered_input(x, layout, layer, mesh)
        else:
            x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, (layout,), run_check=False)
            x = x.redistribute(mesh, (desired,))
        return x.to_local() if self.use_local_output and isinstance(x, DTensor) else x

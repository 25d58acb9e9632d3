"""FSDP2: parameters, gradients and optimizer state are sharded over processes; HSDP: such groups are replicated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from titanlite.config.schema import Training
from titanlite.distributed.mesh import Mesh
from titanlite.distributed.one_shard import OneShard
from titanlite.errors import ConfigError
from titanlite.models.layers import Experts
from titanlite.quant.fsdp import shard_with_offset
from titanlite.quant.linear import quant_layers_by_name

_LARGE = 1 << 30  # bytes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def apply_fsdp(
    model: nn.Module, mesh: Mesh, training: Training, reshard: str, *, groups: Iterable[list[nn.Module]]
) -> None:
    """Shard ``model`` in place.

    Args:
        reshard: ``parallelism.fsdp_reshard_after_forward``.
        mesh: on one process FSDP2 still brings the mixed precision, so that one device computes what many do.
        groups: modules gathered together, in the order of the forward; the last one is needed again at the start of
            the backward, so it is kept gathered unless ``fsdp_reshard_after_forward`` is "always". Under pipeline
            parallelism all are kept by default, else each microbatch would gather them again; and where there is one
            shard, so that gathering is nothing but copies, unless it is kept in host memory.

    Raises:
        ConfigError: weights that are gathered with scales of rows cannot be shared evenly.
    """
    _check_rows(model, mesh.fsdp.size())
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[training.mixed_precision_param],
        reduce_dtype=DTYPES[training.mixed_precision_reduce],
        # Activations have the parameters' dtype already. Other inputs of a block, such as the rotary table, must stay
        # in float32.
        cast_forward_inputs=False,
    )
    in_host_memory = training.enable_cpu_offload and not mesh.target.is_cpu
    offload = CPUOffloadPolicy() if in_host_memory else OffloadPolicy()
    # Under tensor parallelism the logits are a view, the local part of a DTensor. FSDP2 warns about in-place writes to
    # views; there are none, since the loss makes a float32 copy.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    costly = mesh.pp.size() > 1 or (mesh.fsdp.size() == 1 and not in_host_memory)
    keep_all = reshard == "never" or (reshard == "default" and costly)
    groups = list(groups)
    placement = _placements(model, mesh)
    without_copy = mesh.fsdp.size() == 1 and not _experts_apart(model, mesh)
    for i, modules in enumerate(groups):
        keep = keep_all or (reshard == "default" and i == len(groups) - 1)
        fully_shard(
            modules,
            mesh=mesh.data_parallel,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=not keep,
            shard_placement_fn=placement,
        )
        if without_copy:
            modules[0].set_custom_reduce_scatter(OneShard())  # type: ignore[operator]
    fully_shard(
        model,
        mesh=mesh.data_parallel,
        mp_policy=policy,
        offload_policy=offload,
        reshard_after_forward=reshard == "always",
    )


def _check_rows(model: nn.Module, shards: int) -> None:
    """Check that the rows of each weight that has scales of rows when it is gathered, on this rank of tensor
    parallelism, can be shared evenly."""
    for name, layer in quant_layers_by_name(model).items():
        if not layer.gather_quantized or not layer.format.has_scales_of_rows("weight"):
            continue
        rows = len(shard_with_offset(layer.weight)[0])
        if rows % shards:
            raise ConfigError(
                f"{name} has {rows} rows on each rank of tensor parallelism, and {layer.gather_option} needs as many "
                "on each shard; choose another degree, name this layer in its converter's filter_fqns, or leave that "
                "option out",
                key="parallelism.data_parallel_shard_degree",
                value=shards,
            )


def _placements(model: nn.Module, mesh: Mesh) -> Callable[[nn.Parameter], Any]:
    """Return a function that says how FSDP2 shards a parameter, and over which mesh. None: by rows, over the mesh that
    ``fully_shard`` is given.

    Experts are sharded by their number, or where that does not divide, by their features, if they do. Under expert and
    tensor parallelism they have a mesh of their own. ``fully_shard`` takes parameters of several meshes in one call. So
    nothing inside a block has hooks, and the compiler still sees the whole block.
    """
    experts = {param for module in model.modules() if isinstance(module, Experts) for param in module.parameters()}
    if not _experts_apart(model, mesh):
        return lambda param: _shard_of_experts(param, mesh.fsdp.size()) if param in experts else None
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

    assert mesh.experts is not None
    over, shards = mesh.experts.data_parallel, mesh.experts.fsdp.size()
    info = FSDPMeshInfo(over, 0) if over.ndim == 1 else HSDPMeshInfo(over, shard_mesh_dim=1, replicate_mesh_dim=0)
    return lambda param: (
        ShardPlacementResult(_shard_of_experts(param, shards) or Shard(0), info) if param in experts else None
    )


def _experts_apart(model: nn.Module, mesh: Mesh) -> bool:
    """Return whether experts are sharded over a mesh of their own."""
    has_experts = any(isinstance(module, Experts) for module in model.modules())
    return has_experts and mesh.experts is not None and mesh.experts.ep.size() * mesh.tp.size() > 1


def _shard_of_experts(param: nn.Parameter, shards: int) -> Shard | None:
    local = param.to_local() if isinstance(param, DTensor) else param
    return Shard(1) if local.shape[0] % shards and not local.shape[1] % shards else None


def allocate(model: nn.Module, device: torch.device, offload: bool) -> None:
    """Allocate uninitialized memory for a sharded model on the meta device: for buffers on ``device``, for parameters
    too or, with ``offload``, in host memory."""
    if not offload:
        model.to_empty(device=device)
        return
    model.to_empty(device="cpu")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def whole_gradient_bytes(parameters: Iterable[nn.Parameter], mesh: Mesh, training: Training) -> int:
    """Return the bytes that the whole gradients of this device's layers take beyond their shards, until they are
    reduced. It is computed from the sizes of the whole model, so that all ranks have the same."""
    itemsize = DTYPES[training.mixed_precision_reduce].itemsize
    elements = sum(param.numel() for param in parameters if param.requires_grad) // mesh.tp.size()
    return elements * itemsize * (mesh.fsdp.size() - 1) // mesh.fsdp.size()


def reduces_each_microbatch(option: str, extra: int) -> bool:
    """Return whether gradients are reduced after each microbatch, and accumulated as shards.

    Args:
        option: ``parallelism.fsdp_reduce_gradients``. By default a device that would hold more than 1 GiB of unreduced
            gradients reduces them. The traffic of a microbatch then at most doubles: its two gathers of the weights in
            bfloat16 send as much as one reduction in float32.
        extra: the bytes of :func:`whole_gradient_bytes`.
    """
    return option == "microbatch" or (option == "default" and extra > _LARGE)


def reduce_gradients_after(model: nn.Module, last: bool, each: bool, in_place: bool = False) -> None:
    """Set whether the next backward reduces gradients to this rank's shards, and adds them to those of the microbatches
    before.

    Args:
        last: it is the last backward of a step.
        each: every backward reduces. Otherwise only the last does, and until then each device holds whole gradients.
            The replicas of HSDP are summed in the last one in both cases: until then each has its own shards.
        in_place: there is one shard, and its gradients need no reduction. No backward reduces, and weights stay
            gathered until ``one_shard.take_gradients``.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync((last or each) and not in_place)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(not in_place)
